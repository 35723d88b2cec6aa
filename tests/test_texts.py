"""What people save, and where: every reader of their files takes it as it was meant, or says what is wrong."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from triosspi import AccountFile, AccountMap, ConfigurationError, LocalAccount, _texts
from triosspi.service import account_editor
from triosspi.service.cli import passwords
from triosspi.service.config.configuration import Sources

if os.name != "posix":
    pytest.skip("Windows has neither these files nor these devices", allow_module_level=True)

Reader = Callable[[Path], list[str]]


def accounts(path: Path) -> list[str]:
    return [account.principal for account in AccountFile(path)]


def account_map(path: Path) -> list[str]:
    return [line.rule.who for line in AccountMap(path)._lines]


def configuration(path: Path) -> list[str]:
    settings = Sources(file=path, environ={}).load().settings
    return [settings.listen.hosts[0], *settings.accept.deny]


def password_file(path: Path) -> list[str]:
    return [passwords.read_password_file(path), "second"]


def edited(path: Path) -> list[str]:
    with account_editor.edit(path) as lines:
        return [account.principal for _, account, _ in account_editor._accounts(lines)]


def imported(path: Path) -> list[str]:
    taken, refused = account_editor.import_clear(path.with_name("into"), passwords.read_clear(path)[1])
    assert (taken, refused) == (2, [])
    return accounts(path.with_name("into"))


# Each with a text of two lines that it understands, and what that means.
READERS: dict[str, tuple[Reader, str, list[str]]] = {
    "accounts": (accounts, "DOM:first:secret\nDOM:second:secret\n", ["DOM\\first", "DOM\\second"]),
    "account map": (account_map, "DOM\\first -\nDOM\\second root\n", ["DOM\\first", "DOM\\second"]),
    "configuration": (
        configuration,
        'listen.hosts = ["127.0.0.1"]\naccept.deny = [\n"*@DOM"]\n',
        ["127.0.0.1", "*@DOM"],
    ),
    "password file": (password_file, "secret\nsecond\n", ["secret", "second"]),
    "editor": (edited, "DOM:first:secret\nDOM:second:secret\n", ["DOM\\first", "DOM\\second"]),
    "import": (imported, "DOM:first:secret\nDOM:second:secret\n", ["DOM\\first", "DOM\\second"]),
}
# They take what comes through a pipe: whoever runs the command waits with it.
COMMANDS = {"password file", "import"}
by_reader = pytest.mark.parametrize("name", READERS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


def refusal(name: str, path: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        READERS[name][0](path)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    return str(caught.value)


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o600)


@by_reader
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["no mark", "mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_a_mark_and_the_line_ends_of_windows_change_nothing(path: Path, name: str, mark: bytes, end: bytes) -> None:
    read, text, meaning = READERS[name]
    write(path, mark + text.encode().replace(b"\n", end))
    assert read(path) == meaning


@by_reader
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_told(path: Path, name: str, encoding: str) -> None:
    write(path, READERS[name][1].encode(encoding))
    assert refusal(name, path).endswith(f"{path} is UTF-16 text: save it as UTF-8")


@by_reader
@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda text: text.replace(b"s", b"\0", 1), "has a NUL in line 1: it is no text, or is damaged"),
        (lambda text: text.replace(b"s", b"\xe9", 1), "is not UTF-8 text, as line 1 shows: save it as UTF-8"),
        (lambda text: text.replace(b"s", b"\r", 1), "has a carriage return within line 1: save it with line feeds"),
        (lambda text: text.replace(b"s", b"\r\r\n", 1), "has a carriage return within line 1: save it with line feeds"),
        (lambda text: text.replace(b"\n", b"\r"), "has a carriage return within line 1: save it with line feeds"),
    ],
    ids=["NUL", "Latin-1", "CR", "CRCRLF", "CR for LF"],
)
def test_what_is_no_text_is_told_with_its_line(
    path: Path, name: str, spoil: Callable[[bytes], bytes], problem: str
) -> None:
    write(path, spoil(READERS[name][1].encode()))
    assert f"{path} {problem}" in refusal(name, path)


@by_reader
@pytest.mark.parametrize("char", [*"\v\f\x1c\x1d\x1e\x85\u2028\u2029", "\ufeff"], ids=lambda char: f"{ord(char):04x}")
def test_what_an_editor_shows_as_a_line_of_its_own_or_not_at_all_is_no_line_and_no_part_of_one(
    path: Path, name: str, char: str
) -> None:
    _, text, _ = READERS[name]
    first, rest = text.split("\n", 1)
    write(path, f"{first}\n# a comment{char}{rest}".encode())
    if name == "password file":
        # Of it only the first line is looked at, and a password may have any such character in it.
        write(path, f"{first}{char}x\n".encode())
        assert passwords.read_password_file(path) == f"{first}{char}x"
    else:
        told = "has a byte order mark within it, in line 2" if char == "\ufeff" else f"has U+{ord(char):04X} in line 2"
        assert f"{path} {told}" in refusal(name, path)


@by_reader
def test_what_is_too_long_is_refused(path: Path, name: str) -> None:
    limit = 64 if name in ("accounts", "editor", "import") else 1
    write(path, b"")
    os.truncate(path, (limit << 20) + 1)
    assert refusal(name, path).endswith(f"{path} is longer than {limit} MiB")


@by_reader
def test_a_directory_is_refused(path: Path, name: str) -> None:
    path.mkdir()
    assert refusal(name, path).endswith(f"{path}: Is a directory")


@by_reader
def test_a_fifo_holds_nobody_up_but_a_command(path: Path, name: str) -> None:
    os.mkfifo(path, 0o600)
    read, text, meaning = READERS[name]
    if name in COMMANDS:
        writer = threading.Thread(target=lambda: path.write_text(text))
        writer.start()
        assert read(path) == meaning
        writer.join()
    else:
        assert f"{path} is no regular file" in refusal(name, path)


@by_reader
def test_a_socket_and_a_device_hold_nobody_up(path: Path, name: str) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        assert f"{path}: No such device or address" in refusal(name, path)
    # The editor would lock it, and put a file in its place.
    if name != "editor":
        told = "is longer than" if name in COMMANDS else "is no regular file"
        assert told in refusal(name, Path("/dev/zero"))


# No command line can have such an argument.
@pytest.mark.parametrize("name", sorted(READERS.keys() - {"editor"}))
def test_a_path_that_no_file_can_have_is_told(name: str) -> None:
    assert "no file can be called so" in refusal(name, Path("a\0b"))


def test_a_map_behind_a_mark_keeps_out_whom_its_first_line_keeps_out(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalAccount, "lookup", lambda name: LocalAccount(name, 1000, 1000, (1000,)))
    write(path, "\ufeffDOM\\guest -\nDOM\\* visitor\n".encode())
    assert next((line.rule.who, line.account) for line in AccountMap(path)._lines) == ("DOM\\guest", "-")


def test_a_disabled_account_behind_a_mark_is_not_answered_for_by_another(path: Path) -> None:
    account_editor.add(path, "DOM\\alice", "secret")
    account_editor.set_enabled(path, "DOM\\alice", enabled=False)
    account_editor.add(path, "alice", "secret")
    write(path, b"\xef\xbb\xbf" + path.read_bytes())
    account = AccountFile(path).lookup("DOM", "alice")
    assert account is not None and not account.enabled


def test_what_grows_while_it_is_read_is_not_read_beyond_the_limit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, b"x")
    endless = iter(lambda: b"x" * 1000, None)
    monkeypatch.setattr(os, "read", lambda _fd, size: next(endless)[:size])
    with pytest.raises(ConfigurationError, match="is longer than"):
        _texts.read(path, "the file", 10_000)


# Passwords from elsewhere


@pytest.mark.parametrize("value", ["secret\n", "secret\r\n", "a\nb", "\n"])
def test_a_line_end_in_the_variable_is_told(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIOSSPI_PASSWORD", value)
    with pytest.raises(ConfigurationError, match="^the password in TRIOSSPI_PASSWORD has a line's end in it"):
        passwords.read_password_variable("TRIOSSPI_PASSWORD")


@pytest.mark.parametrize("data", [b"", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n", b"\nsecret\n"])
def test_an_empty_password_is_told_wherever_it_comes_from(
    path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, data)
    with pytest.raises(ConfigurationError, match=f"^the password file {path} is empty$"):
        passwords.read_password_file(path)
    with pytest.raises(ConfigurationError, match="^the password on standard input is empty$"):
        passwords.read_password_stdin(lambda _limit: data)  # type: ignore[arg-type]
    monkeypatch.setenv("TRIOSSPI_PASSWORD", "")
    with pytest.raises(ConfigurationError, match="^the password in TRIOSSPI_PASSWORD is empty$"):
        passwords.read_password_variable("TRIOSSPI_PASSWORD")


@pytest.mark.parametrize("data", [b"\xef\xbb\xbfsecret\r\n", b"secret\n", b"secret\r\n", b"secret"])
def test_of_a_password_on_standard_input_the_mark_and_one_line_end_are_no_part(data: bytes) -> None:
    assert passwords.read_password_stdin(lambda _limit: data) == "secret"  # type: ignore[arg-type]
