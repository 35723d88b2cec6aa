"""`triosspi check-config` and `config-example`, and the options that `triosspi serve` has from the settings."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from programs import stop_at_once
from triosspi import AccountFile
from triosspi.service import account_editor, cli
from triosspi.service.cli.config import example
from triosspi.service.config.configuration import Sources
from triosspi.service.config.settings import SECTIONS, Settings, StartSettings, all_options
from triosspi.service.serving.server import Loaded

OPTIONS = all_options()
COMMANDS: dict[str, Any] = {name: cli.cli.commands[name] for name in ("serve", "check-config")}
by_command = pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))


class Outcome(NamedTuple):
    """How a command ended, and what it said."""

    status: object
    out: str
    err: str


Call = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's decides."""
    for name in ("TRIOSSPI_CONFIG", "KRB5_KTNAME", *(option.variable for option in OPTIONS.values())):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Runs a command within the test's process, in a directory of its own."""
    # What a command sets up of the log would outlive it.
    for module in (cli.serve, cli.config):
        monkeypatch.setattr(module, "log_to_stderr", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def main(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["triosspi", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Outcome(ended.value.code, *capsys.readouterr())

    return main


def shown(out: str) -> dict[str, tuple[str, str]]:
    """What `check-config` has printed: each option's line without its comment, and where the value is from."""
    found = {}
    for line in out.splitlines():
        if not line.startswith("["):
            match = re.fullmatch(r"((?:# )?(\w+) .*?) +# (.*)", line)
            assert match, line
            found[match[2]] = (match[1], match[3])
    return found


# The options of the command line


@by_command
def test_every_option_is_a_flag_or_an_argument(command: click.Command) -> None:
    parameters = {parameter.name: parameter for parameter in command.params}
    for option in OPTIONS.values():
        parameter = parameters[option.name]
        if option.about.argument:
            assert isinstance(parameter, click.Argument)
        else:
            assert option.flag in parameter.opts
            assert parameter.multiple is option.many  # type: ignore[union-attr]
            if isinstance(option.default, bool):
                assert parameter.secondary_opts == [option.off_flag] == [f"--no-{option.flag[2:]}"]


def test_what_is_for_one_run_only_is_a_flag_of_serve_and_nothing_else() -> None:
    names = {command: {parameter.name for parameter in COMMANDS[command].params} for command in COMMANDS}
    assert names["serve"] - names["check-config"] == {"once", "verbose", "dump_tokens"}
    assert names["serve"] - set(OPTIONS) == {"once", "verbose", "dump_tokens", "config"}


def test_the_help_has_a_part_for_each_section(call: Call) -> None:
    out = call("serve", "--help").out
    parts = re.findall(r"^([A-Z]\w+):$", out, re.MULTILINE)
    assert parts == ["Options", *(section.capitalize() for section in SECTIONS)]
    # Wherever the lines are broken.
    out = " ".join(out.split())
    assert "[default: 30s]" in out
    assert "[default: all, IPv4" in out
    assert "[default: on]" in out


def run_settings(call: Call, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[StartSettings, Loaded]:
    """What `serve` would run with."""
    with monkeypatch.context() as patch:
        seen = stop_at_once(patch)
        outcome = call("serve", *arguments)
    assert outcome.status == 0, outcome.err
    program, loaded = seen[0]
    return program.start, loaded


def test_serve_takes_its_options_from_file_variables_and_flags(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account_editor.add(tmp_path / "accounts", "DOM\\alice", "secret")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/t.toml").write_text(
        '[serve]\nwire = "framed"\n[listen]\nport = 1\nhosts = ["127.0.0.9"]\n[accept]\naccounts = "../accounts"\n'
    )
    hosts = ["--host", "127.0.0.1", "--host", "127.0.0.2"]
    monkeypatch.setenv("TRIOSSPI_PORT", "0")
    start, loaded = run_settings(call, monkeypatch, "--config", "etc/t.toml", *hosts)
    serve, listen = start.serve, start.listen
    assert (serve.wire, listen.port, listen.hosts) == ("framed", 0, ("127.0.0.1", "127.0.0.2"))
    accounts = loaded.acceptor.accounts
    assert isinstance(accounts, AccountFile)
    assert [account.principal for account in accounts] == ["DOM\\alice"]
    monkeypatch.setenv("TRIOSSPI_CONFIG", "etc/t.toml")
    start, _ = run_settings(call, monkeypatch, "--wire", "sample", "--port", "0")
    assert (start.serve.wire, start.listen.hosts) == ("sample", ("127.0.0.9",))


def test_the_log_is_set_up_as_the_settings_say(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(cli.serve, "log_to_stderr", lambda *how: seen.append(how))
    run_settings(call, monkeypatch, "--port", "0", "--log-level", "warning", "--log-format", "json")
    run_settings(call, monkeypatch, "--port", "0")
    assert seen == [("warning", "json"), ("info", "console")]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--port", "x"], '--port must be an integer, 0<=x<=65535, not "x"'),
        (["--idle-timeout", "30"], '--idle-timeout must be a duration with its unit (ms, s, m, h or d), such as "30s"'),
        (["--host", ""], "--host is empty"),
        (["--proxy-from", "10.0.0.0/8", "--proxy-from", "10.0.0.1/8"], "--proxy-from must be an address or a network"),
        (["--log-level", "loud"], "--log-level"),
        (["--metrics", "0.0.0.0:1"], "--metrics must be a loopback address"),
        (["", "--port", "1"], "APP is empty"),
        (["--account-map", "x"], "--account-map, --auth-to-local and --min-uid go with --impersonate"),
        (["--impersonate"], "--impersonate needs --account-map, --auth-to-local or both"),
        (["echo", "--impersonate", "--account-map", "x"], "--impersonate is for 'greet'"),
        (["--unix-mode", "600x"], "--unix-mode must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_flag_is_one_line_and_a_usage_error(call: Call, arguments: list[str], fragment: str) -> None:
    outcome = call("serve", *arguments)
    assert re.fullmatch(r"triosspi: [^\n]+\n", outcome.err), outcome.err
    assert fragment in outcome.err
    assert (outcome.out, outcome.status) == ("", 1 if "--metrics" in arguments else 2)


def test_everything_that_is_wrong_in_the_file_is_a_line_each(call: Call, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text("[listen]\nport = 'x'\nprt = 1\n")
    for command in COMMANDS:
        outcome = call(command, "--config", "t.toml")
        assert (outcome.status, outcome.out) == (1, "")
        assert outcome.err == (
            'triosspi: t.toml:2: listen.port must be an integer, 0<=x<=65535, not "x"\n'
            "triosspi: t.toml:3: unknown key listen.prt; did you mean port?\n"
        )


def test_a_message_of_the_file_that_cannot_be_is_told_with_its_line(call: Call, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(f'[serve]\nmessage = "{"x" * 2029}"\n')
    outcome = call("serve", "--config", "t.toml")
    assert (outcome.status, outcome.err) == (
        1,
        "triosspi: t.toml:2: serve.message has 2029 bytes, and the sample's client reads 2028 at most\n",
    )


def test_an_empty_variable_for_the_file_is_an_error(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIOSSPI_CONFIG", "")
    assert call("check-config") == (1, "", "triosspi: TRIOSSPI_CONFIG is empty: leave it out, or name a file\n")
    assert call("serve", "--config", "no") == (
        1,
        "",
        "triosspi: cannot read the configuration no: No such file or directory\n",
    )


# check-config


def test_check_config_prints_every_option_with_where_it_is_from(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.toml").write_text('[limits]\nidle_timeout = "90s"\n[serve]\nwire = "framed"\n')
    monkeypatch.setenv("TRIOSSPI_GRACE", "1500ms")
    monkeypatch.setenv("TRIOSSPI_PASSWORD", "hunter2")
    monkeypatch.setenv("KRB5_KTNAME", "/nowhere/k")
    outcome = call("check-config", "greet", "--config", "t.toml", "--mechanisms", "ntlm", "--host", "a", "--host", "b")
    assert (outcome.status, outcome.err) == (0, "")
    found = shown(outcome.out)
    assert list(found) == list(OPTIONS)
    assert found["idle_timeout"] == ('idle_timeout = "90s"', "t.toml:2")
    assert found["wire"] == ('wire = "framed"', "t.toml:4")
    assert found["grace"] == ('grace = "1500ms"', "TRIOSSPI_GRACE")
    assert found["mechanisms"] == ('mechanisms = "ntlm"', "--mechanisms")
    assert found["hosts"] == ('hosts = ["a", "b"]', "--host")
    assert found["app"] == ('app = "greet"', "APP")
    assert found["keytab"] == ('keytab = "/nowhere/k"', "KRB5_KTNAME")
    assert found["port"] == ("port = 2000", "default")
    assert found["allow"] == ("# allow is not set", "default: all who log in")
    assert "hunter2" not in outcome.out


def test_what_check_config_prints_is_a_configuration_of_the_same_meaning(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: list[object] = [
        "--idle-timeout",
        "90s",
        "--workers",
        "3",
        "--proxy-from",
        "10.0.0.0/8",
        "--no-penalties",
    ]
    arguments += ["--message", 'say "\x1b[2J"', "--metrics", "[::1]:9464", "--unix-mode", "0666", "--backlog", "5"]
    out = call("check-config", *arguments).out
    assert out.isascii()
    (tmp_path / "again.toml").write_text(out)
    settings = Sources(file=tmp_path / "again.toml", environ={}).load().settings
    assert settings != Settings()
    assert settings.limits.idle_timeout == 90
    assert settings.serve.message == 'say "\x1b[2J"'
    again = call("check-config", "--config", "again.toml").out
    assert [line.split("  #")[0].rstrip() for line in again.splitlines()] == [
        line.split("  #")[0].rstrip() for line in out.splitlines()
    ]


def test_check_config_says_what_is_wrong_with_the_files_and_the_application_too(call: Call, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(
        "[serve]\napp = 'missing:app'\n[accept]\naccounts = 'nowhere'\n"
        "[impersonation]\nimpersonate = true\naccount_map = 'map'\n"
    )
    outcome = call("check-config", "--config", "t.toml")
    assert outcome.status == 1
    assert list(shown(outcome.out)) == list(OPTIONS)
    lines = outcome.err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("triosspi: cannot load the application 'missing:app'")
    assert lines[1] == f"triosspi: cannot read the account file {tmp_path}/nowhere: No such file or directory"
    assert lines[2] == f"triosspi: cannot read the account map {tmp_path}/map: No such file or directory"


def test_check_config_tells_where_an_option_stands_that_another_has_no_use_for(call: Call, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text("[serve]\nmessage = 'x'\napp = 'echo'\n")
    outcome = call("check-config", "--config", "t.toml")
    assert (outcome.status, outcome.err) == (1, "triosspi: t.toml:2: serve.message is for the application 'greet'\n")


def test_check_config_accepts_what_serve_starts_with_alone(call: Call) -> None:
    outcome = call("check-config")
    assert (outcome.status, outcome.err) == (0, "")
    assert {where.partition(":")[0] for _, where in shown(outcome.out).values()} == {"default"}


# config-example


def uncommented() -> str:
    """The example with every option that is commented out put in."""
    return re.sub(r"^#(?=\w)", "", example(), flags=re.MULTILINE)


def test_the_example_as_it_stands_is_the_defaults(call: Call, tmp_path: Path) -> None:
    outcome = call("config-example")
    assert outcome == (0, example(), "")
    (tmp_path / "t.toml").write_text(outcome.out)
    configuration = Sources(file=tmp_path / "t.toml", environ={}).load()
    assert configuration.settings == Settings()
    assert {origin.kind for origin in configuration.origins.values()} == {"default"}


def test_the_example_has_every_option_once_in_its_section_and_in_order() -> None:
    document = tomllib.loads(uncommented())
    assert list(document) == list(SECTIONS)
    assert {name: list(section) for name, section in document.items()} == {
        section: [name for name in OPTIONS if OPTIONS[name].section == section] for section in SECTIONS
    }


def test_the_example_says_what_needs_a_restart() -> None:
    said = re.search(r"which need a restart: ([a-z_, \n#]+)\.", example())
    assert said is not None
    assert re.findall(r"[a-z_]+", said[1]) == [name for name, option in OPTIONS.items() if not option.reloads]


def test_what_the_example_shows_is_the_default_wherever_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(uncommented())
    configuration = Sources(file=tmp_path / "t.toml", environ={}).load()
    differ = {name for name, option in OPTIONS.items() if configuration.settings.get(option) != option.default}
    assert differ == {name for name, option in OPTIONS.items() if option.show(option.default) is None}
    assert configuration.settings.serve.message == "This is your server speaking"


def test_the_example_explains_and_its_lines_are_short() -> None:
    lines = example().splitlines()
    assert max(map(len, lines)) <= 120
    assert all(not line or re.match(r"# |#\w|\[|#$", line) for line in lines)


# Where all of it comes together


def test_the_server_runs_with_what_the_example_says(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_once(monkeypatch)
    (tmp_path / "t.toml").write_text(example())
    outcome = call("serve", "--config", "t.toml", "--host", "127.0.0.1", "--port", "0")
    assert outcome.status == 0
    assert outcome.out.startswith("triosspi: serving greet (wire format: sample) on 127.0.0.1:")
