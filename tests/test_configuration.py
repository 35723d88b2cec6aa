"""The configuration: a file, variables and flags become settings, or errors that say where and what."""

from __future__ import annotations

import pickle
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest

from triosspi import ConfigurationError
from triosspi.service.config.configuration import Configuration, ConfigurationErrors, Origin, Sources, own_variables
from triosspi.service.config.settings import Limits, Settings, all_options

NAME = "triosspi.toml"


def load(
    path: Path | None = None, text: str | None = None, environ: dict[str, str] | None = None, **flags: object
) -> Configuration:
    """What a file in a directory, an environment and flags come to."""
    if text is not None:
        assert path is not None
        path /= NAME
        path.write_text(text, encoding="utf-8")
    return Sources(file=path, environ=environ or {}, flags=flags).load()


def problems(path: Path | None = None, text: str | None = None, environ: dict[str, str] | None = None) -> list[str]:
    """The errors of a configuration, without the directory that the file is in."""
    with pytest.raises(ConfigurationErrors) as caught:
        load(path, text, environ)
    return [line.replace(f"{path}/", "") for line in caught.value.lines]


# Where a value comes from


def test_without_anything_the_settings_are_the_defaults() -> None:
    configuration = load()
    assert configuration.settings == Settings()
    assert set(configuration.origins) == set(all_options())
    assert {origin.kind for origin in configuration.origins.values()} == {"default"}


def test_flags_win_over_variables_over_the_file_over_the_defaults(tmp_path: Path) -> None:
    text = '[limits]\nidle_timeout = "1m"\nmax_session_age = "1m"\n[workers]\ngrace = "1m"\n'
    environ = {"TRIOSSPI_IDLE_TIMEOUT": "2m", "TRIOSSPI_MAX_SESSION_AGE": "2m"}
    configuration = load(tmp_path, text, environ, idle_timeout=180.0)
    settings, origins = configuration.settings, configuration.origins
    assert settings.limits.idle_timeout == 180.0
    assert origins["idle_timeout"] == Origin("flag", "--idle-timeout")
    assert settings.limits.max_session_age == 120.0
    assert origins["max_session_age"] == Origin("variable", "TRIOSSPI_MAX_SESSION_AGE")
    assert settings.stopping.grace == 60.0
    assert origins["grace"] == Origin("file", f"{tmp_path / NAME}:5")
    assert settings.limits.handshake_timeout == 30.0
    assert origins["handshake_timeout"] == Origin("default", "default")


def test_a_flag_can_turn_off_what_the_file_turned_on(tmp_path: Path) -> None:
    text = '[limits]\nidle_timeout = "1m"\n[accept]\nallow_rc4 = true\n'
    configuration = load(tmp_path, text, {"TRIOSSPI_IDLE_TIMEOUT": "off"}, allow_rc4=False)
    assert configuration.settings.limits.idle_timeout is None
    assert configuration.settings.accept.allow_rc4 is False
    assert configuration.origins["allow_rc4"] == Origin("flag", "--no-allow-rc4")


def test_a_list_is_replaced_and_not_added_to(tmp_path: Path) -> None:
    text = '[listen]\nhosts = ["a", "b"]\n'
    assert load(tmp_path, text).settings.listen.hosts == ("a", "b")
    assert load(tmp_path, text, {"TRIOSSPI_HOSTS": "c, d"}).settings.listen.hosts == ("c", "d")
    assert load(tmp_path, text, {"TRIOSSPI_HOSTS": "c"}, hosts=("e",)).settings.listen.hosts == ("e",)


def test_nobody_is_allowed_by_an_empty_list_and_everybody_by_none(tmp_path: Path) -> None:
    assert load(tmp_path, "[accept]\nallow = []\n").settings.accept.allow == ()
    assert load(tmp_path, "").settings.accept.allow is None


def test_the_keytab_of_the_kerberos_library_counts_where_no_other_is_named(tmp_path: Path) -> None:
    environ = {"KRB5_KTNAME": "/theirs"}
    configuration = load(tmp_path, "", environ)
    assert configuration.settings.accept.keytab == "/theirs"
    assert configuration.origins["keytab"] == Origin("variable", "KRB5_KTNAME")
    assert load(tmp_path, '[accept]\nkeytab = "/ours"\n', environ).settings.accept.keytab == "/ours"
    assert load(tmp_path, "", {**environ, "TRIOSSPI_KEYTAB": "/ours"}).settings.accept.keytab == "/ours"
    assert load(tmp_path, "", environ, keytab="/ours").settings.accept.keytab == "/ours"
    # As the Kerberos library takes it.
    assert load(tmp_path, "", {"KRB5_KTNAME": ""}).settings.accept.keytab is None


def test_a_reload_reads_the_file_again_and_keeps_the_flags(tmp_path: Path) -> None:
    configuration = load(tmp_path, "[listen]\nport = 1\n", None, wire="framed")
    (tmp_path / NAME).write_text("[listen]\nport = 2\n")
    # As a worker process does it, which was given the configuration when it started.
    again = pickle.loads(pickle.dumps(configuration)).sources.load()
    assert (again.settings.listen.port, again.settings.serve.wire) == (2, "framed")
    (tmp_path / NAME).write_text("[listen]\nport = 3x\n")
    with pytest.raises(ConfigurationErrors):
        again.sources.load()
    assert configuration.settings.listen.port == 1


def test_what_is_kept_of_the_environment_holds_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIOSSPI_PASSWORD", "secret")
    monkeypatch.setenv("TRIOSSPI_PORT", "7")
    sources = Sources()
    assert "secret" not in repr(sources)
    assert sources.environ["TRIOSSPI_PORT"] == "7"
    assert "secret" not in sources.environ.values()
    given = {"KRB5_KTNAME": "k", "TRIOSSPI_PORT": "7", "TRIOSSPI_PASSWORD": "secret", "PATH": "/bin"}
    assert own_variables(given) == {"KRB5_KTNAME": "k", "TRIOSSPI_PORT": "7"}


# Paths


def test_relative_paths_are_relative_to_the_file_and_others_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / NAME).write_text('[accept]\naccounts = "accounts"\nkeytab = "FILE:k"\n')
    accept = load(Path("etc") / NAME).settings.accept
    assert accept.accounts == tmp_path / "etc/accounts"
    assert accept.keytab == f"FILE:{tmp_path}/etc/k"
    assert load(None, None, {"TRIOSSPI_ACCOUNTS": "accounts"}).settings.accept.accounts == Path("accounts")


# What is wrong with a file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[limits]\n\nidle_timout = '5m'\n", [":3: unknown key limits.idle_timout; did you mean idle_timeout?"]),
        ("[limits]\nidle-timeout = '5m'\n", [":2: unknown key limits.idle-timeout; did you mean idle_timeout?"]),
        ("[limits]\nIdle_Timeout = '5m'\n", [":2: unknown key limits.Idle_Timeout; did you mean idle_timeout?"]),
        ("[listen]\nidle_timeout = '5m'\n", [":2: idle_timeout belongs to the section [limits]"]),
        (
            "[workers]\nreuse_port = true\n",
            [":2: reuse_port is no option any more: all workers accept from the same sockets now"],
        ),
        # The flag's name.
        ("[listen]\nhost = ['a']\n", [":2: unknown key listen.host; did you mean hosts?"]),
        ("[listen]\nidle_timout = '5m'\n", [":2: unknown key listen.idle_timout; did you mean idle_timeout?"]),
        ("port = 1\n", [":1: port belongs to the section [listen]"]),
        ("prt = 1\n", [":1: unknown key prt; did you mean port?"]),
        ("zzz = 1\n", [":1: unknown key zzz; 'triosspi config-example' shows all there are"]),
        ("[limts]\nidle_timeout = '5m'\nx = 1\n", [":1: unknown section [limts]; did you mean limits?"]),
        ("[limts]\n", [":1: unknown section [limts]; did you mean limits?"]),
        ("limts.x = 1\nlimts.y = 2\n", [":1: unknown section [limts]; did you mean limits?"]),
        ("limits = 1\n", [":1: limits is a section: write [limits]"]),
        ("limits = {}\n", [":1: limits is a section: write [limits]"]),
        ("[[limits]]\nidle_timeout = '5m'\n", [":1: write [limits], with one pair of brackets"]),
        ("[limits.idle_timeout]\n", [":1: unknown section [limits.idle_timeout]"]),
        ("[limits]\nidle.timeout = '5m'\n", [":2: unknown key limits.idle.timeout; did you mean idle_timeout?"]),
        ("[limits]\nidle_timeout.x = '5m'\n", [":2: unknown key limits.idle_timeout.x; did you mean idle_timeout?"]),
        ('[limits]\n"\\u001b[2J" = 1\n', [":2: unknown key limits.'\\x1b[2J'; 'triosspi config-example' shows all"]),
        ("[limits]\nidle_timeout = 300\n", [":2: limits.idle_timeout must be a duration", "not 300: it has no unit"]),
        ("[listen]\nport = '1'\n", [':2: listen.port must be an integer, 0<=x<=65535, not "1"']),
        ("[accept]\n\nallow = '*@REALM'\n", [':3: accept.allow must be a list, each a string, not "*@REALM"']),
        ("[limits]\nx\n", [":2: Expected '=' after a key in a key/value pair"]),
        ("[limits]\nx = [\n1,\n", [":3: Invalid value"]),
        ("[limits]\nidle_timeout = 1\nidle_timeout = 2\n", [":3: Cannot overwrite a value"]),
        ("[limits]\n[limits]\n", [":2: Cannot declare ('limits',) twice"]),
        ("x = 1\ny = \n", [":2: Invalid value"]),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_line(text: str, expected: list[str], tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, text)
    assert problem.startswith(f"{NAME}{expected[0]}")
    for fragment in expected[1:]:
        assert fragment in problem
    assert problem.isprintable()


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    text = """
[listen]
port = "x"
hosts = "localhost"
prt = 3
[limts]
[metrics]
metrics = "x"
"""
    environ = {"TRIOSSPI_WIRE": "raw", "TRIOSSPI_IDEL_TIMEOUT": "5m"}
    found = problems(tmp_path, text, environ)
    assert [problem.partition(" must be ")[0] for problem in found] == [
        f"{NAME}:3: listen.port",
        f"{NAME}:4: listen.hosts",
        f"{NAME}:5: unknown key listen.prt; did you mean port?",
        f"{NAME}:6: unknown section [limts]; did you mean limits?",
        f"{NAME}:8: metrics.metrics",
        "TRIOSSPI_WIRE",
        "unknown variable TRIOSSPI_IDEL_TIMEOUT; did you mean TRIOSSPI_IDLE_TIMEOUT?",
    ]


def test_what_is_wrong_only_together_is_told_with_the_place_of_either(tmp_path: Path) -> None:
    assert problems(tmp_path, '[metrics]\nmetrics = "0.0.0.0:1"\n') == [
        f"{NAME}:2: metrics.metrics must be a loopback address, such as 127.0.0.1:9464, unless metrics_anywhere is given"
    ]
    assert problems(None, None, {"TRIOSSPI_METRICS": "0.0.0.0:1"})[0].startswith("TRIOSSPI_METRICS must be a loopback")
    with pytest.raises(ConfigurationErrors) as caught:
        load(metrics=("0.0.0.0", 1))
    assert str(caught.value).endswith("unless --metrics-anywhere is given")
    assert load(tmp_path, '[metrics]\nmetrics = "0.0.0.0:1"\n', None, metrics_anywhere=True)


def test_the_value_of_an_unknown_key_is_not_shown(tmp_path: Path) -> None:
    # It may be a password that somebody thought must stand there.
    (problem,) = problems(tmp_path, "[accept]\npassword = 'hunter2'\n")
    assert "hunter2" not in problem
    assert "unknown key accept.password" in problem


def test_a_file_that_cannot_be_read_is_named_and_the_variables_are_judged_all_the_same(tmp_path: Path) -> None:
    environ = {"TRIOSSPI_PORT": "x"}
    found = problems(tmp_path / "nowhere", None, environ)
    assert found[0] == f"cannot read the configuration {tmp_path}/nowhere: No such file or directory"
    assert found[1].startswith("TRIOSSPI_PORT must be")
    assert problems(tmp_path) == [f"cannot read the configuration {tmp_path}: Is a directory"]
    (tmp_path / "latin1").write_bytes(b"# caf\xe9\n")
    assert problems(tmp_path / "latin1") == [
        f"the configuration {tmp_path}/latin1 is not UTF-8 text, as line 1 shows: save it as UTF-8"
    ]
    (tmp_path / "deep").write_text("x = " + "[" * 100_000)
    assert problems(tmp_path / "deep") == [f"{tmp_path}/deep:1: too deeply nested"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"[limits]\nmax_connections = {'9' * 5000}\n", ":2: a number of more than 4300 digits"),
        (f"[limits]\n# {'9' * 5000}\nx = [1,\n{'9_' * 5000}9]\ny = [\n", ":4: a number of more than 4300 digits"),
        (f"[limits]\nmax_connections = -{'9' * 5000}\n", ":2: a number of more than 4300 digits"),
        # Read whatever its length, but not to be shown.
        (f"[limits]\nmax_connections = 0x{'f' * 5000}\n", ":2: limits.max_connections must be an integer"),
        (f"[limits]\nidle_timeout = [0x{'f' * 5000}]\n", ":2: limits.idle_timeout must be a duration"),
        (f"[limits]\nidle_timeout = '{'9' * 5000}s'\n", ":2: limits.idle_timeout must be a duration"),
        (f"[serve]\nmax_message_size = '{'9' * 5000}GiB'\n", ":2: serve.max_message_size must be a size"),
        (f"[limits]\nmax_unauthenticated = '{'9' * 5000}'\n", ":2: limits.max_unauthenticated must be"),
        (f"[limits]\nmax_session_bytes = '{'9' * 4000}GiB'\n", ":2: limits.max_session_bytes must be a size"),
        (f"[listen]\nport = 1e{'9' * 5000}\n", ":2: listen.port must be an integer"),
        (f"\nx = {'[' * 100_000}\n", ":2: too deeply nested"),
        (f"[accept]\nallow = {'[' * 200}{']' * 200}\n", ":2: accept.allow must be a string"),
    ],
)
def test_a_value_of_any_length_or_depth_is_a_line_of_its_own_and_not_the_servers_end(
    text: str, problem: str, tmp_path: Path
) -> None:
    (found,) = problems(tmp_path, text)
    assert found.startswith(NAME + problem)
    assert len(found) < 300


def test_a_file_without_an_end_is_not_read_at_all() -> None:
    assert problems(Path("/dev/zero").parent / "zero") == [
        "the configuration /dev/zero is no regular file: put what is to be read into one"
    ]


def test_an_error_that_nobody_has_foreseen_is_a_configuration_error_with_nothing_hanging_on_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run_out(_text: str) -> None:
        raise MemoryError

    monkeypatch.setattr(tomllib, "loads", run_out)
    (tmp_path / NAME).write_text("x = 1")
    with pytest.raises(ConfigurationError, match=r"^the configuration cannot be used: MemoryError$") as caught:
        load(tmp_path / NAME)
    assert caught.value.__context__ is None


def test_a_file_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    load(tmp_path, "[listen]\nport = 1\n")
    (tmp_path / NAME).chmod(0o666)
    with pytest.raises(ConfigurationErrors, match="everybody may write the configuration .*: chmod o-w "):
        load(tmp_path / NAME)
    (tmp_path / NAME).chmod(0o664)
    assert load(tmp_path / NAME).settings.listen.port == 1


# Lines


def test_the_line_of_a_key_is_found_whatever_stands_before_it(tmp_path: Path) -> None:
    text = '''# port = 1
[serve]  # [listen]
message = """
[listen]
port = 3
""" # "
app = '''.rstrip()
    text += """ 'a:b'
  [ "listen" ]
hosts = [  # several
  "[limits]",
  "port = 5", # ]

]
"port" = 7
unix_mode = "0660"\t
[limits]
penalties = false
"""
    for newline in ("\n", "\r\n"):
        (tmp_path / NAME).write_bytes(text.replace("\n", newline).encode())
        configuration = load(tmp_path / NAME)
        found = {
            name: int(origin.text.rpartition(":")[2])
            for name, origin in configuration.origins.items()
            if origin.kind == "file"
        }
        assert found == {"message": 3, "app": 7, "hosts": 9, "port": 14, "unix_mode": 15, "penalties": 17}
        assert configuration.settings.listen.port == 7
        assert configuration.settings.listen.hosts == ("[limits]", "port = 5")


def test_dotted_keys_and_inline_tables_are_sections_too(tmp_path: Path) -> None:
    text = 'listen.port = 1\nlimits = { idle_timeout = "5m", penalties = false }\n'
    configuration = load(tmp_path, text)
    assert configuration.settings.listen.port == 1
    assert configuration.settings.limits == Limits(idle_timeout=300.0, penalties=False)
    assert configuration.origins["penalties"].text.endswith(":2")


def test_every_value_of_any_file_is_found_once_and_on_its_line(tmp_path: Path) -> None:
    rng = random.Random(17)
    options = [option for option in all_options().values() if option.show(option.default) is not None]
    for _ in range(30):
        chosen = rng.sample(options, 12)
        lines: list[str] = []
        expected = {}
        for section in {option.section for option in chosen}:
            lines += rng.sample(["", "# x = 1", "#[limits]"], rng.randrange(3))
            lines.append(f"[{section}]")
            for option in chosen:
                if option.section == section:
                    expected[option.name] = len(lines) + 1
                    lines += f"{option.name} = {option.show(option.default)}".split("\n")
                    lines += rng.sample(["", "   # y"], rng.randrange(2))
        configuration = load(tmp_path, "\n".join(lines))
        found = {name: origin.text for name, origin in configuration.origins.items() if origin.kind == "file"}
        assert found == {name: f"{tmp_path / NAME}:{line}" for name, line in expected.items()}
        assert configuration.settings == Settings()


def test_a_long_list_takes_no_longer_than_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each line tried as the last one would read the first ones thousands of times.
    real, read = tomllib.loads, []

    def count(text: str) -> Any:
        read.append(len(text))
        return real(text)

    monkeypatch.setattr(tomllib, "loads", count)
    text = "[accept]\nallow = [\n" + "".join(f'  "user{number}@REALM",\n' for number in range(5000)) + "]\n"
    allow = load(tmp_path, text).settings.accept.allow
    assert allow is not None
    assert len(allow) == 5000
    assert sum(read) < 4 * len(text)


# Variables


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("TRIOSSPI_IDLETIMEOUT", "TRIOSSPI_IDLE_TIMEOUT"),
        ("TRIOSSPI_HOST", "TRIOSSPI_HOSTS"),
        ("TRIOSSPI_LOGLEVEL", "TRIOSSPI_LOG_LEVEL"),
        ("TRIOSSPI_WORKER", "TRIOSSPI_WORKERS"),
    ],
)
def test_a_variable_that_looks_like_an_option_was_meant_as_one(name: str, suggested: str) -> None:
    assert problems(None, None, {name: "x"}) == [f"unknown variable {name}; did you mean {suggested}?"]


def test_a_variable_of_an_option_that_is_gone_is_not_passed_over() -> None:
    (problem,) = problems(None, None, {"TRIOSSPI_REUSE_PORT": "yes"})
    assert problem == (
        "TRIOSSPI_REUSE_PORT is no variable any more: all workers accept from the same sockets now: leave it out"
    )


def test_variables_that_others_set_are_left_alone() -> None:
    environ = {
        "TRIOSSPI_PASSWORD": "x",
        "TRIOSSPI_CONFIG": "x",
        "TRIOSSPI_VERSION": "1.0",
        # A service called "triosspi", in every container of its namespace.
        "TRIOSSPI_PORT": "tcp://10.0.0.7:2000",
        "TRIOSSPI_PORT_2000_TCP": "tcp://10.0.0.7:2000",
        "TRIOSSPI_PORT_2000_TCP_ADDR": "10.0.0.7",
        "TRIOSSPI_PORT_2000_TCP_PORT": "2000",
        "TRIOSSPI_PORT_2000_TCP_PROTO": "tcp",
        "TRIOSSPI_SERVICE_HOST": "10.0.0.7",
        "TRIOSSPI_SERVICE_PORT": "2000",
        "TRIOSSPI_SERVICE_PORT_METRICS": "9464",
        "TRIOSSPI_ECHO_SERVICE_HOST": "10.0.0.7",
        "PORT": "x",
    }
    assert load(None, None, environ).settings == Settings()
