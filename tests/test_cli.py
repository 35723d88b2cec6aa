"""The command line, as its users meet it."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import trio

import triosspi
from programs import MODULE, PATIENCE, SCRIPT, Running, environment, run, running, stop_at_once, terminal
from triosspi import AccountFile, Initiator, open_sspi_over_tcp_channel
from triosspi.security.ntlm.primitives import nt_hash
from triosspi.service import account_editor, cli

USER = "DOM\\alice"
PASSWORD = "correct horse"
GREETING = "This is your server speaking"
LOCAL = ("--host", "127.0.0.1", "--port", "0")
LOGIN = ("--mechanism", "ntlm", "--user", USER)


class Outcome(NamedTuple):
    """How a command ended, and what it said."""

    status: object
    out: str
    err: str


Call = Callable[..., Outcome]


class Input(io.BytesIO):
    """What is typed into a pipe."""

    name = "<stdin>"


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of the machine's decides about a login, and the logging that a command sets up ends with it."""
    for name in ("TRIOSSPI_PASSWORD", "KRB5_KTNAME", "NTLM_USER_FILE"):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("triosspi")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], level, logger.propagate = before
    logger.setLevel(level)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Runs a command within the test's process: the same `main`, a tenth of the time."""
    monkeypatch.chdir(tmp_path)
    # To which an application's directory is added.
    monkeypatch.setattr(sys, "path", list(sys.path))

    def main(*arguments: object, stdin: bytes | None = b"") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["triosspi", *map(str, arguments)])
        standard_input = None if stdin is None else io.TextIOWrapper(io.BufferedReader(Input(stdin)))
        monkeypatch.setattr(sys, "stdin", standard_input)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Outcome(ended.value.code, *capsys.readouterr())

    return main


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("accounts") / "accounts"
    account_editor.add(path, USER, PASSWORD)
    return path


@pytest.fixture(scope="module")
def sample(accounts: Path) -> Iterator[str]:
    """The address of `triosspi serve --wire sample`."""
    with running("serve", *LOCAL, "--accounts", accounts) as server:
        yield f"127.0.0.1:{server.expect_port()}"


@pytest.fixture(scope="module")
def framed(accounts: Path) -> Iterator[str]:
    """The address of `triosspi serve --wire framed`."""
    with running("serve", "--wire", "framed", *LOCAL, "--accounts", accounts) as server:
        yield f"127.0.0.1:{server.expect_port()}"


def assert_one_line(outcome: Outcome | subprocess.CompletedProcess[str], status: int, *fragments: str) -> None:
    """It failed as every command should: with one line, and that on standard error."""
    if isinstance(outcome, subprocess.CompletedProcess):
        outcome = Outcome(outcome.returncode, outcome.stdout, outcome.stderr)
    assert outcome.out == ""
    assert re.fullmatch(r"triosspi: [^\n]+\n", outcome.err), outcome.err
    assert outcome.status == status, outcome.err
    for fragment in fragments:
        assert fragment in outcome.err


# Failures


APPS = {
    "raises": "1 / 0",
    "syncapp": "def app(channel): pass",
    "leaves": "raise SystemExit('usage')",
}


@pytest.mark.parametrize(
    ("arguments", "status", "fragments"),
    [
        # usage
        ([], 2, ["Missing command", "triosspi --help"]),
        (["accounts"], 2, ["Missing command", "accounts --help"]),
        (["frobnicate"], 2, ["No such command 'frobnicate'"]),
        (["serve", "--frobnicate"], 2, ["No such option", "--frobnicate", "serve --help"]),
        (["serve", "--port", "65536"], 2, ["--port", "0<=x<=65535"]),
        (["serve", "--wire", "raw"], 2, ["--wire", "sample", "framed"]),
        (["serve", "--mechanisms", "basic"], 2, ["--mechanisms", "negotiate", "ntlm", "kerberos"]),
        (["serve", "echo", "--message", "x"], 2, ["--message is for the application 'greet'"]),
        (["serve", "--wire", "framed", "--message", "x"], 2, ["--message is for the application 'greet'"]),
        (["serve", "--message", ""], 2, ["--message is empty"]),
        (["serve", "--message", "x" * 2029], 2, ["--message has 2029 bytes", "2028 at most"]),
        (["connect"], 2, ["Missing argument 'HOST[:PORT]'"]),
        (["connect", "host", "--wire", "sample", "--message", "x"], 2, ["--message needs another --wire"]),
        (["connect", "host", "--message", "x"], 2, ["--message needs another --wire"]),
        (["connect", "host", "--wire", "framed", *LOGIN, "--message", ""], 2, ["--message is empty"]),
        (["connect", "host", "--timeout", "0"], 2, ["--timeout"]),
        (["connect", "host", "--password-stdin"], 2, ["a password needs --user"]),
        (["connect", "host", "--password-file", "f"], 2, ["a password needs --user"]),
        (["connect", "host", *LOGIN, "--password-stdin", "--password-file", "f"], 2, ["exclude each other"]),
        (["connect", "host", "--password", "secret"], 2, ["No such option", "--password"]),
        (["accounts", "add", "file"], 2, ["Missing argument"]),
        # what the command line names and is not there, or not right
        (["serve", "--host", "127.0.0.1", "--port", "USED"], 1, ["Address already in use", "--host and --port"]),
        (["serve", "--host", "192.0.2.1", "--port", "0"], 1, ["Cannot assign requested address", "--host and --port"]),
        (["serve", "--host", "a..b", "--port", "0"], 1, ["cannot listen on a..b:0", "--host and --port"]),
        (["serve", "--accounts", "nowhere"], 1, ["cannot read the account file nowhere: No such file or directory"]),
        (["serve", "--accounts", "."], 1, ["cannot read the account file .: Is a directory"]),
        (["serve", "--accounts", "latin1"], 1, ["the account file latin1 is not UTF-8 text"]),
        (["serve", "--require-target", "allow"], 1, ["target"]),
        (["serve", "greeting"], 1, ["write 'greet', 'echo' or 'module:function'"]),
        (["serve", "missing:app"], 1, ["cannot load the application 'missing:app'", "No module named 'missing'"]),
        (["serve", "raises:app"], 1, ["cannot load the application 'raises:app'", "ZeroDivisionError"]),
        (["serve", "leaves:app"], 1, ["cannot load the application 'leaves:app'", "SystemExit: usage"]),
        (["serve", "syncapp:app"], 1, ["'syncapp:app' is not an async function"]),
        (["connect", "[::1", *LOGIN], 1, ["write 'host', 'host:port' or '[ipv6]:port'"]),
        (["connect", "host:port", *LOGIN], 1, ["write 'host', 'host:port' or '[ipv6]:port'"]),
        (["connect", "host:0", *LOGIN], 1, ["0 is no TCP port: 1 to 65535"]),
        (["connect", "host", *LOGIN], 1, ["no password", "--password-file, --password-stdin", "TRIOSSPI_PASSWORD"]),
        (["connect", "host", *LOGIN, "--password-file", "no"], 1, ["cannot read the password file no: No such file"]),
        (["connect", "host", *LOGIN, "--password-file", "."], 1, ["cannot read the password file .: Is a directory"]),
        (["connect", "host", *LOGIN, "--password-file", "latin1"], 1, ["the password file latin1 is not UTF-8 text"]),
        (["connect", "host", *LOGIN, "--password-stdin", "--target", "x"], 1, ["write it as 'host/server.example'"]),
        (["connect", "host", "--user", "", "--password-stdin"], 1, ["a password needs a username"]),
        (["connect", "a..b", *LOGIN, "--password-stdin"], 1, ["cannot connect to a..b:2000: no host can be called so"]),
        (["connect", "127.0.0.1:CLOSED", *LOGIN, "--password-stdin"], 1, ["Connection refused; check the address"]),
        (["accounts", "add", "new", USER], 1, ["no password", "--password-stdin"]),
        # The name is looked at first: nobody wants to type a password twice for nothing.
        (["accounts", "add", "new", "\\"], 1, ["write 'DOM\\user' or 'user'"]),
        (["accounts", "add", "new", "dom\\"], 1, ["write 'DOM\\user' or 'user'"]),
        (["accounts", "add", "new", "a:b"], 1, ["write 'DOM\\user' or 'user'"]),
        (["accounts", "add", "new", "#a"], 1, ["choose another name"]),
        (["accounts", "add", "new", "a\udcff"], 1, ["choose another name"]),
        (["accounts", "add", "new", USER, "--password-stdin", "EMPTY"], 1, ["the password on standard input is empty"]),
        (["connect", "host", *LOGIN, "--password-stdin", "EMPTY"], 1, ["the password on standard input is empty"]),
        (["accounts", "remove", "new", USER], 1, ["there is no account file new"]),
        (["accounts", "enable", "new", USER], 1, ["there is no account file new"]),
        (["accounts", "disable", "new", USER], 1, ["there is no account file new"]),
        (["accounts", "list", "new"], 1, ["cannot read the account file new"]),
        (["accounts", "import", "new"], 1, ["there is no account file new"]),
        (["accounts", "import", "new", "clear"], 1, ["clear: No such file or directory"]),
        (["accounts", "import", "new", "latin1"], 1, ["latin1 is not UTF-8 text"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_every_failure_is_one_line_that_says_what_to_do(
    call: Call, tmp_path: Path, arguments: list[str], status: int, fragments: list[str]
) -> None:
    for name, source in APPS.items():
        (tmp_path / f"{name}.py").write_text(source)
    (tmp_path / "latin1").write_bytes(b"caf\xe9\n")
    (tmp_path / "latin1").chmod(0o600)
    with socket.socket() as listening, socket.socket() as silent:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        silent.bind(("127.0.0.1", 0))
        ports = {"USED": listening.getsockname()[1], "CLOSED": silent.getsockname()[1]}
        for word, port in ports.items():
            arguments = [argument.replace(word, str(port)) for argument in arguments]
        empty = arguments[-1:] == ["EMPTY"]
        outcome = call(*arguments[: -1 if empty else None], stdin=b"\n" if empty else b"secret\n")
    for name in APPS:
        sys.modules.pop(name, None)
    assert_one_line(outcome, status, *fragments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("program", [MODULE, SCRIPT], ids=["python -m triosspi", "triosspi"])
def test_the_program_itself_fails_with_that_line_and_status(program: tuple[str, ...], tmp_path: Path) -> None:
    assert_one_line(run("serve", "--accounts", "nowhere", program=program, cwd=tmp_path), 1, "nowhere")
    assert_one_line(run("serve", "--port", "x", program=program, cwd=tmp_path), 2, "--port", "serve --help")


def test_an_unknown_host_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_name(*_args: object, **_options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    outcome = call("connect", "nowhere.example", *LOGIN, "--password-stdin", stdin=b"x\n")
    assert_one_line(outcome, 1, "nowhere.example:2000: Name or service not known; check the address")
    assert_one_line(call("serve", "--host", "nowhere.example"), 1, "Name or service not known; choose others")


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--mechanisms", "kerberos"],
        ["connect", "host", "--mechanism", "kerberos", "--user", USER, "--password-stdin"],
        # The system's own credentials are a Kerberos ticket.
        ["connect", "host"],
    ],
    ids=["serve", "connect", "connect without a user"],
)
def test_kerberos_without_python_gssapi_says_what_to_install(
    call: Call, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gssapi", None)
    assert_one_line(call(*arguments, stdin=b"secret\n"), 1, "pip install 'triosspi[kerberos]'")


def test_a_keytab_of_the_environment_without_python_gssapi_says_so(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gssapi", None)
    monkeypatch.setenv("KRB5_KTNAME", "/nowhere/krb5.keytab")
    assert_one_line(call("serve"), 1, "pip install 'triosspi[kerberos]'")


@pytest.mark.skipif(importlib.util.find_spec("gssapi") is None, reason="python-gssapi is not installed")
def test_a_keytab_that_is_not_there_is_named(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KRB5_KTNAME", "FILE:/nowhere/krb5.keytab")
    assert_one_line(call("serve"), 1, "/nowhere/krb5.keytab")


@pytest.mark.parametrize("way", ["stdin", "environment"])
def test_a_password_that_is_no_text_is_one_line(call: Call, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "environment":
        monkeypatch.setenv("TRIOSSPI_PASSWORD", os.fsdecode(b"caf\xe9"))
        outcome = call("connect", "host", *LOGIN)
    else:
        outcome = call("connect", "host", *LOGIN, "--password-stdin", stdin=b"caf\xe9\n")
    assert_one_line(outcome, 1, "password", "is not UTF-8 text")
    assert "caf" not in outcome.err


def test_without_a_standard_input_at_all_there_is_no_password_to_ask_for(call: Call) -> None:
    assert_one_line(call("connect", "host", *LOGIN, stdin=None), 1, "no terminal to ask for it")
    assert_one_line(call("accounts", "add", "new", USER, stdin=None), 1, "no terminal to ask for it")
    assert_one_line(call("accounts", "add", "new", USER, "--password-stdin", stdin=None), 1, "input is empty")


def test_an_error_outside_the_program_s_control_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> None:
        raise click.FileError("somewhere", "disk on fire")

    monkeypatch.setattr(account_editor, "remove", fail)
    assert_one_line(call("accounts", "remove", "f", USER), 1, "disk on fire")


# Help


def commands(command: click.Command = cli.cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))


COMMANDS = list(commands())


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[" ".join(("triosspi", *path)) for path, _ in COMMANDS])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_has_a_help(call: Call, path: tuple[str, ...], command: click.Command, option: str) -> None:
    outcome = call(*path, option)
    assert (outcome.status, outcome.err) == (0, "")
    # Before that stands the program's name, which is the test runner's here.
    assert " ".join(("", *path, "[OPTIONS]")) in outcome.out.partition("\n")[0]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.opts[0] in outcome.out


def test_commands_that_serve_nobody_do_not_wait_for_the_imports_of_what_serves(accounts: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *MODULE[1:], "accounts", "list", str(accounts)],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"spnego", "gssapi", "krb5", "cryptography", "trio", "prometheus_client"}


def test_the_version_is_the_packages(call: Call) -> None:
    assert call("--version") == (0, f"triosspi, version {triosspi.__version__}\n", "")


@pytest.mark.parametrize("native", [True, False])
def test_the_version_tells_with_v_how_messages_are_sealed(
    call: Call, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr("triosspi.security.native.available", lambda: {"ntlm": native, "kerberos": True})
    way = "natively" if native else "by pyspnego"
    version = f"triosspi, version {triosspi.__version__}"
    assert call("--version", "-v") == (0, f"{version}\nntlm: sealed {way}\nkerberos: sealed natively\n", "")


def test_a_v_that_belongs_to_nothing_is_a_usage_error(call: Call) -> None:
    assert call("-v", "serve").status == 2


def test_no_option_takes_a_password_where_other_users_could_read_it() -> None:
    for path, command in COMMANDS:
        for parameter in command.params:
            if "password" in str(parameter.name) or "secret" in str(parameter.name):
                is_flag = isinstance(parameter, click.Option) and parameter.is_flag
                assert is_flag or isinstance(parameter.type, click.Path), (path, parameter.name)


# serve and connect


@pytest.mark.parametrize("program", [MODULE, SCRIPT], ids=["python -m triosspi", "triosspi"])
def test_the_printed_line_of_the_demo_account_run_as_it_stands_prints_the_samples_message(
    program: tuple[str, ...], tmp_path: Path
) -> None:
    with running("serve", "--port", "0", program=program, cwd=tmp_path) as server:
        line = server.expect(r"^  (TRIOSSPI_PASSWORD=.*)\n")[1]
        assert server.expect(r"serving greet \(wire format: sample\) on 0\.0\.0\.0:\d+( and \[::\]:\d+)?\n")
        done = run("-c", line, program=["sh"], cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{GREETING}\n", "")
        password = re.match(r"TRIOSSPI_PASSWORD=(\S+)", line)
        assert password
        # Shown to whoever started the server, on purpose, and nowhere else.
        assert server.out.count(password[1]) == 2
        assert server.stop() == 0
        assert password[1] not in server.err


def test_a_program_started_by_its_relative_path_prints_a_line_that_works_from_there() -> None:
    where, script = Path(SCRIPT[0]).parents[2], Path(SCRIPT[0])
    relative = (str(script.relative_to(where)),)
    with running("serve", *LOCAL, "--wire", "framed", program=relative, cwd=where) as server:
        line = server.expect(r"^  (TRIOSSPI_PASSWORD=.*)\n")[1]
        assert f" {relative[0]} connect 127.0.0.1:" in line
        done = run("-c", line, program=["sh"], stdin=b"hello\nworld", cwd=where)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\nworld\n", "")


@pytest.mark.parametrize("mechanism", ["ntlm", "negotiate"])
def test_the_sample_message_is_printed_whatever_way_the_password_comes(
    call: Call, sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mechanism: str
) -> None:
    login = ["connect", sample, "--user", USER, "--mechanism", mechanism]
    expected = (0, f"{GREETING}\n", "")
    (tmp_path / "password").write_text(f"{PASSWORD}\r\nsecond line\n", newline="")
    assert call(*login, "--password-file", "password") == expected
    assert call(*login, "--password-stdin", stdin=f"{PASSWORD}\n".encode()) == expected
    monkeypatch.setenv("TRIOSSPI_PASSWORD", PASSWORD)
    assert call(*login) == expected
    assert call(*login, "--target", "HOST/server.example") == expected


def test_a_refused_login_is_one_line_and_holds_no_password(call: Call, sample: str) -> None:
    outcome = call("connect", sample, *LOGIN, "--password-stdin", stdin=b"Wr0ngPassw0rd\n")
    assert_one_line(outcome, 1, f"no login at {sample}", "check --user, the password, --mechanism and --wire")
    assert "Wr0ng" not in outcome.err


def test_messages_of_the_command_line_and_lines_of_standard_input_are_echoed(
    call: Call, framed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIOSSPI_PASSWORD", PASSWORD)
    login = ["connect", framed, "--wire", "framed", *LOGIN]
    assert call(*login, "--message", "größe", "--message", "two words") == (0, "größe\ntwo words\n", "")
    assert call(*login, stdin=b"one\n\ntwo\r\nthree") == (0, "one\ntwo\nthree\n", "")
    assert call(*login, stdin=None) == (0, "", "")
    # The first line is the password's, and no more than that is read ahead.
    monkeypatch.delenv("TRIOSSPI_PASSWORD")
    assert call(*login, "--password-stdin", stdin=f"{PASSWORD}\nhello\n".encode()) == (0, "hello\n", "")


def test_a_pipe_gets_the_bytes_of_a_reply_as_they_are(framed: str) -> None:
    # No text, a terminal's command, and Latin-1: a program that reads them wants them all.
    messages = [b"caf\xe9", b"\x1b[2Jx\x00"]
    env = {"TRIOSSPI_PASSWORD": PASSWORD}
    done = run("connect", framed, "--wire", "framed", *LOGIN, stdin=b"\n".join(messages), env=env)
    assert (done.returncode, os.fsencode(done.stdout), done.stderr) == (0, b"caf\xe9\n\x1b[2Jx\x00\n", "")
    done = run("connect", framed, "--wire", "framed", *LOGIN, "--message", os.fsdecode(messages[0]), env=env)
    assert (done.returncode, os.fsencode(done.stdout), done.stderr) == (0, b"caf\xe9\n", "")


def test_a_line_longer_than_one_read_is_one_message(call: Call, framed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIOSSPI_PASSWORD", PASSWORD)
    lines = ["x" * 300_000, "short", "y" * 70_000]
    outcome = call("connect", framed, "--wire", "framed", *LOGIN, stdin="\n".join(lines).encode())
    assert outcome == (0, "".join(f"{line}\n" for line in lines), "")


def test_the_wrong_wire_is_one_line_that_asks_about_it(call: Call, sample: str, framed: str) -> None:
    password = f"{PASSWORD}\n".encode()
    outcome = call("connect", sample, "--wire", "framed", "--message", "x", *LOGIN, "--password-stdin", stdin=password)
    assert_one_line(outcome, 1, "broke the protocol", "is --wire as the server's?")
    outcome = call("connect", framed, *LOGIN, "--password-stdin", "--timeout", "0.5", stdin=password)
    assert_one_line(outcome, 1, "did not answer within 0.5 s", "is --wire as the server's?")


def test_clients_are_served_at_once_and_not_one_after_the_other(framed: str) -> None:
    host, _, port = framed.partition(":")
    initiator = Initiator(username=USER, password=PASSWORD, mechanism="ntlm")

    async def crowd() -> None:
        channels = [await open_sspi_over_tcp_channel(host, int(port), initiator) for _ in range(20)]
        for channel in channels:
            await channel.do_handshake()
        # The last to come is the first to be answered, while all the others are connected.
        for number, channel in reversed(list(enumerate(channels))):
            await channel.send(b"%d" % number)
            assert await channel.receive() == b"%d" % number
        async with trio.open_nursery() as nursery:
            for channel in channels:
                nursery.start_soon(channel.aclose)

    trio.run(crowd)


def test_an_application_of_the_working_directory_is_served(accounts: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "shout.py").write_text(
        "async def app(channel):\n    async for message in channel:\n        await channel.send(message.upper())\n"
    )
    arguments = ["serve", "shout:app", "--wire", "framed", *LOCAL, "--accounts", accounts]
    with running(*arguments, program=SCRIPT, cwd=tmp_path) as server:
        address = f"127.0.0.1:{server.expect_port()}"
        assert "serving shout:app (wire format: framed)" in server.out
        login = ["connect", address, "--wire", "framed", *LOGIN, "--password-stdin", "--message", "hello"]
        assert call(*login, stdin=f"{PASSWORD}\n".encode()) == (0, "HELLO\n", "")


# The transcript

TRANSCRIPT = r"""Waiting for client to connect\.\.\.
Listening ! 
triosspi: serving greet \(wire format: sample\) on 127\.0\.0\.1:\d+
Token buffer received \(\d+ bytes\):
Token buffer generated \(\d+ bytes\):
AcceptSecurityContext result = 0x00090312
Token buffer received \(\d+ bytes\):
Token buffer generated \(\d+ bytes\):
AcceptSecurityContext result = 0x00000000
Package Name: NTLM
Client connected as :  DOM\\alice
Data before encryption: This is your server speaking
Length of data before encryption: 28 
The message has been encrypted\. 
data after encryption including trailer \(48 bytes\):
 48 encrypted bytes sent\. 
"""  # noqa: W291 - the sample's spaces

DUMP_LINE = re.compile(r"[0-9a-f]{4}  (?:[0-9a-f]{2}[ :]){1,16} *(.{1,16})\n")


def serve_once(accounts: Path, *options: str) -> Iterator[Running]:
    arguments = ["serve", *LOCAL, "--accounts", str(accounts), "--once", *options]
    with running(*arguments) as server:
        yield server


def connect_to(server: Running, call: Call, password: str = PASSWORD) -> Outcome:
    address = f"127.0.0.1:{server.expect_port()}"
    return call("connect", address, *LOGIN, "--password-stdin", stdin=f"{password}\n".encode())


def test_once_serves_one_client_and_verbose_prints_the_samples_transcript(accounts: Path, call: Call) -> None:
    for server in serve_once(accounts, "-v"):
        assert connect_to(server, call) == (0, f"{GREETING}\n", "")
        assert server.wait() == 0
        assert re.fullmatch(TRANSCRIPT, server.out)
        login, end = server.err.splitlines()
        assert re.match(r"\S+ \S+ INFO 127\.0\.0\.1:\d+: DOM\\alice: login \(session_id=1 mechanism=ntlm ", login)
        assert re.search(r": session ended \(.* outcome=finished .* messages_sent=1 .* bytes_sent=28 ", end)


def test_once_fails_when_the_login_is_refused_and_the_log_says_why_without_a_secret(accounts: Path, call: Call) -> None:
    for server in serve_once(accounts, "-v"):
        assert connect_to(server, call, "Wr0ngPassw0rd").status == 1
        assert server.wait() == 1
        assert server.out.endswith("Could not authenticate the socket.\n")
        assert re.fullmatch(
            r"\S+ \S+ WARNING 127\.0\.0\.1:\d+: login refused: [^\n]*wrong password[^\n]*\n", server.err
        )
        everything = (server.out + server.err).lower()
        for secret in ("wr0ng", PASSWORD, nt_hash(PASSWORD).hex(), nt_hash("Wr0ngPassw0rd").hex()):
            assert secret not in everything


def test_tokens_are_dumped_only_when_asked_for_and_with_a_warning(accounts: Path, call: Call) -> None:
    for server in serve_once(accounts, "--dump-tokens", "--message", "Good day"):
        assert connect_to(server, call) == (0, "Good day\n", "")
        assert server.wait() == 0
        warning, *audit = server.err.splitlines()
        assert len(audit) == 2
        assert warning.startswith("triosspi: --dump-tokens: ")
        shown = "".join(DUMP_LINE.findall(server.out))
        assert shown.count("NTLMSSP.") == 3
        # All but the dumps is what -v prints, in that order.
        expected = TRANSCRIPT.replace(GREETING, "Good day").replace(": 28 ", ": 8 ").replace("48", "28")
        assert re.fullmatch(expected, DUMP_LINE.sub("", server.out))


# Ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("connected", [False, True], ids=["idle", "with a client"])
def test_a_signal_ends_the_server_with_status_0_and_one_line(
    number: signal.Signals, connected: bool, accounts: Path
) -> None:
    arguments = ["serve", "--wire", "framed", *LOCAL, "--accounts", accounts]
    with running(*arguments) as server, socket.socket() as client:
        port = server.expect_port()
        if connected:
            client.connect(("127.0.0.1", port))
        assert server.stop(number) == 0
        dropped = r"\S+ \S+ WARNING connections dropped: draining \(count=1 [^\n]*\n" if connected else ""
        assert re.fullmatch(rf"\S+ \S+ INFO {number.name}: stopping\n{dropped}", server.err)
        assert server.out.count("\n") == 1


def test_ctrl_c_at_the_terminal_ends_the_server() -> None:
    with terminal("serve", *LOCAL) as user:
        user.expect("TRIOSSPI_PASSWORD=")
        user.expect("\n")
        user.type("\x03")
        assert user.wait() == 0
    assert user.shown.endswith(" INFO SIGINT: stopping\n")
    assert "Traceback" not in user.shown


def test_the_password_is_asked_for_unseen_and_lines_are_echoed_until_ctrl_c(framed: str) -> None:
    with terminal("connect", framed, "--wire", "framed", *LOGIN) as user:
        user.expect(f"Password for {USER}: ")
        user.type(f"{PASSWORD}\n")
        user.expect("\n")
        user.type("hello\n")
        # What is typed, as every terminal shows it, and what comes back.
        user.expect("hello\n")
        user.expect("hello\n")
        user.type("\x03")
        assert user.wait() == 1
    assert user.shown.endswith("\ntriosspi: aborted\n")
    assert "Traceback" not in user.shown
    assert PASSWORD not in user.shown


def test_what_a_hostile_server_says_cannot_command_the_terminal(accounts: Path, call: Call) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b1mline\ttab"
    env = {"TRIOSSPI_PASSWORD": PASSWORD}
    arguments = ["serve", *LOCAL, "--accounts", accounts, "--message", evil]
    with running(*arguments) as server:
        address = f"127.0.0.1:{server.expect_port()}"
        with terminal("connect", address, *LOGIN, env=env) as user:
            assert user.wait() == 0
        # A pipe gets the message as it is: programs read it.
        piped = call("connect", address, *LOGIN, "--password-stdin", stdin=f"{PASSWORD}\n".encode())
    # The terminal's own driver makes spaces of a tab, or not.
    assert user.shown.expandtabs() == "\\x1b]0;owned\\x07\\x1b[2J\\x9b1mline\ttab\n".expandtabs()
    assert piped == (0, f"{evil}\n", "")


def test_a_terminal_without_the_characters_shows_escapes_and_no_traceback(framed: str) -> None:
    env = {"TRIOSSPI_PASSWORD": PASSWORD, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "1"}
    login = ["connect", framed, "--wire", "framed", *LOGIN]
    with terminal(*login, "--message", "日本 caf", env=env) as user:
        assert user.wait() == 0
    assert user.shown == "\\u65e5\\u672c caf\n"


def test_a_client_whose_output_nobody_reads_ends_quietly(framed: str) -> None:
    env = {**os.environ, "TRIOSSPI_PASSWORD": PASSWORD}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            [*MODULE, "connect", framed, "--wire", "framed", *LOGIN],
            input=b"one\ntwo\n" * 100,
            stdout=pipe,
            stderr=subprocess.PIPE,
            env=env,
            timeout=PATIENCE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_server_whose_output_nobody_reads_goes_on_serving(accounts: Path, call: Call) -> None:
    # `triosspi serve -v | head -1`: the transcript's reader leaves, the clients stay.
    arguments = ["serve", "-v", *LOCAL, "--accounts", str(accounts)]
    with subprocess.Popen([*MODULE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        assert server.stdout is not None
        while b"serving" not in (line := server.stdout.readline()):
            assert line
        server.stdout.close()
        address = f"127.0.0.1:{int(line.rpartition(b':')[2])}"
        for _ in range(2):
            outcome = call("connect", address, *LOGIN, "--password-stdin", stdin=f"{PASSWORD}\n".encode())
            assert outcome == (0, f"{GREETING}\n", "")
        server.terminate()
        assert server.stderr is not None
        log = server.stderr.read().decode().splitlines()
        assert server.wait(PATIENCE) == 0
    assert [line.split(" ", 2)[2] for line in log if "session_id" not in line] == [
        "WARNING standard output was closed: serving goes on without it",
        "INFO SIGTERM: stopping",
    ]


# What a demo account is made for


@pytest.mark.parametrize(
    ("arguments", "demo"),
    [
        ("", True),
        ("--mechanisms ntlm", True),
        ("--accounts FILE", False),
        ("--mechanisms ntlm --accounts FILE", False),
        # A keytab is of no use to NTLM.
        ("KEYTAB --mechanisms ntlm", True),
        ("KEYTAB --mechanisms ntlm --accounts FILE", False),
    ],
)
def test_a_demo_account_is_made_up_where_nobody_else_could_log_in(
    call: Call, accounts: Path, arguments: str, demo: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at_once(patch)
        if "KEYTAB" in arguments:
            patch.setenv("KRB5_KTNAME", "/nowhere/krb5.keytab")
        outcome = call("serve", *LOCAL, *arguments.removeprefix("KEYTAB").replace("FILE", str(accounts)).split())
    assert outcome.status == 0
    assert ("demo account" in outcome.out) is demo
    assert ("--mechanism ntlm --user 'DEMO\\guest'" in outcome.out) is demo


# accounts


def test_accounts_are_added_changed_disabled_enabled_listed_and_removed(call: Call, tmp_path: Path) -> None:
    add = partial(call, "accounts", "add", "file", "--password-stdin")
    assert add(USER, stdin=b"one\n") == (0, "", f"added {USER}\n")
    assert add("bob", stdin="größe\r\n".encode()) == (0, "", "added bob\n")
    assert add(USER, stdin=b"two\nignored\n") == (0, "", f"changed {USER}\n")
    assert call("accounts", "disable", "file", USER) == (0, "", f"disabled {USER}\n")
    assert call("accounts", "list", "file") == (0, f"{USER} (disabled)\nbob\n", "")
    assert call("accounts", "enable", "file", USER) == (0, "", f"enabled {USER}\n")
    assert {account.principal: account.nt_hash for account in AccountFile(tmp_path / "file")} == {
        USER: nt_hash("two"),
        "bob": nt_hash("größe"),
    }
    assert call("accounts", "remove", "file", "BOB") == (0, "", "removed BOB\n")
    assert call("accounts", "list", "file") == (0, f"{USER}\n", "")


def test_clear_lines_are_imported_from_a_file_and_from_standard_input(call: Call, tmp_path: Path) -> None:
    (tmp_path / "clear").write_text("DOM:alice:one\n:bob:two\n")
    assert call("accounts", "import", "file", "clear") == (0, "", "imported 2 accounts\n")
    assert call("accounts", "import", "file", "-", stdin=b":carol:three\n") == (0, "", "imported 1 accounts\n")
    outcome = call("accounts", "import", "file", "-", stdin=b":dave:four\nrubbish secret\n")
    assert (outcome.status, outcome.out) == (1, "")
    lines = outcome.err.splitlines()
    assert lines[0].startswith("<stdin>: line 2: ")
    assert lines[1:] == ["imported 1 accounts", "triosspi: 1 lines of <stdin> were not imported"]
    assert "secret" not in outcome.err
    with (tmp_path / "file").open("a") as file:
        file.write(":eve:five\n")
    assert call("accounts", "import", "file") == (0, "", "replaced 1 clear passwords\n")
    assert call("accounts", "list", "file").out == "DOM\\alice\nbob\ncarol\ndave\neve\n"


def test_the_password_for_an_account_is_asked_for_twice_until_both_are_the_same(tmp_path: Path) -> None:
    # The environment's is somebody's who logs in, not for whomever one adds.
    env = {"TRIOSSPI_PASSWORD": "of somebody else"}
    with terminal("accounts", "add", "file", USER, cwd=tmp_path, env=env) as user:
        user.expect(f"Password for {USER}: ")
        user.type(f"{PASSWORD}\n")
        user.expect("Repeat for confirmation: ")
        user.type("mistyped\n")
        user.expect("do not match")
        user.expect(f"Password for {USER}: ")
        user.type(f"{PASSWORD}\n")
        user.expect("Repeat for confirmation: ")
        user.type(f"{PASSWORD}\n")
        assert user.wait() == 0
    assert user.shown.endswith(f"added {USER}\n")
    assert PASSWORD not in user.shown
    assert "mistyped" not in user.shown
    (account,) = AccountFile(tmp_path / "file")
    assert account.nt_hash == nt_hash(PASSWORD)


@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_whoever_gives_up_at_the_prompt_has_changed_nothing(tmp_path: Path, key: str) -> None:
    with terminal("accounts", "add", "file", USER, cwd=tmp_path) as user:
        user.expect(f"Password for {USER}: ")
        user.type(key)
        assert user.wait() == 1
    assert user.shown.endswith("triosspi: aborted\n")
    assert "Traceback" not in user.shown
    assert os.listdir(tmp_path) == []


# NegotiateStream, from end to end


def test_connect_is_a_netcat_for_negotiate_streams(tmp_path: Path) -> None:
    # Not text, and no whole lines.
    data = bytes(range(256)) * 2000
    with running("serve", "--wire", "auto", "--host", "127.0.0.1", "--port", "0", cwd=tmp_path) as server:
        port = server.expect_port()
        password = server.expect(r"password (\S+); in another")[1]
        done = subprocess.run(
            [
                *MODULE,
                "connect",
                f"127.0.0.1:{port}",
                "--wire",
                "negotiate-stream",
                "--mechanism",
                "ntlm",
                "--user",
                "DEMO\\guest",
                "--password-stdin",
            ],
            # What follows the password's line is the stream.
            input=password.encode() + b"\n" + data,
            capture_output=True,
            env=environment(),
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == data
