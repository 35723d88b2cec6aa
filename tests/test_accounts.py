"""The account file: what its lines mean, who is found, and what an edit does to a running server."""

from __future__ import annotations

import errno
import gc
import logging
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from triosspi import Acceptor, Account, AccountFile, ConfigurationError, Initiator, SSPIChannel, _texts
from triosspi.security.ntlm import accounts
from triosspi.security.ntlm.accounts import AccountTable, parse_line, split_principal
from triosspi.security.ntlm.primitives import nt_hash

HASH = "8846F7EAEE8FB117AD06BDD830B7586C"  # of "password"
LINE = f"DOM\\alice:65534:{'0' * 32}:{HASH}:[U          ]:LCT-65000000"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write an account file; each write has a date of its own."""
    path = tmp_path / "accounts"
    dates = iter(range(1_000_000_000, 2_000_000_000))

    def write(*lines: str, mode: int = 0o600) -> Path:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        path.chmod(mode)
        date = next(dates)
        os.utime(path, (date, date))
        return path

    return write


# Lines


@pytest.mark.parametrize("end", ["", ":"])
def test_an_smbpasswd_line_is_read_as_samba_and_pyspnego_write_it(end: str) -> None:
    assert parse_line(LINE + end) == (Account("DOM", "alice", bytes.fromhex(HASH)), False)


def test_a_clear_line_is_read_and_said_to_be_clear() -> None:
    assert parse_line("DOM:alice:password") == (Account("DOM", "alice", bytes.fromhex(HASH)), True)
    assert parse_line(":alice@realm:password") == (Account("", "alice@realm", bytes.fromhex(HASH)), True)


@pytest.mark.parametrize("line", ["", "   ", "# DOM:alice:password"])
def test_empty_lines_and_comments_are_no_accounts(line: str) -> None:
    assert parse_line(line) is None


@pytest.mark.parametrize("flags", ["[UD         ]", "[DU]", "[N          ]"])
def test_a_line_with_the_flag_d_or_n_is_disabled(flags: str) -> None:
    parsed = parse_line(LINE.replace("[U          ]", flags))
    assert parsed is not None and not parsed[0].enabled


@pytest.mark.parametrize("hashed", ["NO PASSWORDXXXXXXXXXXXXXXXXXXXXX", "X" * 32])
def test_a_line_without_a_password_lets_nobody_in(hashed: str) -> None:
    parsed = parse_line(LINE.replace(HASH, hashed))
    assert parsed is not None and not parsed[0].enabled


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("alice", "1 fields"),
        ("a:b:c:d", "4 fields"),
        (LINE.replace("[U          ]", "U"), "brackets"),
        (LINE.replace(HASH, "12"), "32 hexadecimal"),
        (LINE.replace(HASH, "Z" * 31), "32 hexadecimal"),
        (LINE.replace("DOM\\alice", "\\alice"), "no such account name"),
        (LINE.replace("DOM\\alice", ""), "no such account name"),
        ("DOM::secret", "no such account name"),
        ("A\\B:alice:secret", "no such account name"),
    ],
)
def test_a_malformed_line_says_what_is_wrong_and_nothing_that_it_holds(line: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem) as caught:
        parse_line(line)
    assert "secret" not in str(caught.value) and HASH not in str(caught.value)


@pytest.mark.parametrize("name", ["", "\\", "DOM\\", "\\alice", "a:b", "a\0", "A\\B\\c", "a\nb"])
def test_a_name_that_no_account_can_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="no account name"):
        split_principal(name)


# Who is found


def table(*principals: str) -> AccountTable:
    found = AccountTable()
    for number, principal in enumerate(principals):
        assert found.add(Account(*split_principal(principal), number.to_bytes(16, "big")))
    return found


@pytest.mark.parametrize(
    ("domain", "user", "found"),
    [
        ("DOM", "alice", "DOM\\alice"),
        ("dom", "ALICE", "DOM\\alice"),
        ("", "alice", "alice"),
        ("OTHER", "Alice", "alice"),
        ("OTHER", "bob", None),
        ("", "bob", None),
        ("DOM", "bob", "DOM\\bob"),
        ("", "carol@EXAMPLE.com", "carol@example.com"),
        ("PC", "carol@example.com", "carol@example.com"),
        ("", "carol", None),
        ("DOM", "straße", "DOM\\straße"),
        ("DOM", "strasse", None),
        ("DOM", "ÜNÏCODE", "DOM\\Ünïcode"),
    ],
)
def test_an_account_is_found_by_its_folded_name_and_its_own_domain_first(
    domain: str, user: str, found: str | None
) -> None:
    account = table("DOM\\alice", "alice", "DOM\\bob", "carol@example.com", "DOM\\straße", "DOM\\Ünïcode").lookup(
        domain, user
    )
    assert (account and account.principal) == found


def test_the_first_of_two_accounts_of_one_name_stays(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    file = AccountFile(write(LINE, "dom:ALICE:other"))
    account = file.lookup("DOM", "alice")
    assert account is not None and account.nt_hash == bytes.fromhex(HASH)
    assert "accounts:2: line ignored: 'dom\\\\ALICE' stands further up" in caplog.text


def test_no_account_shows_its_hash_in_a_repr() -> None:
    account = Account("DOM", "alice", bytes.fromhex(HASH))
    assert "alice" in repr(account) and "88" not in repr(account) and "nt_hash" not in repr(account)


def test_all_accounts_can_be_listed() -> None:
    assert sorted(account.principal for account in table("DOM\\a", "b")) == ["DOM\\a", "b"]


# Any number


def test_100_000_accounts_fit_in_40_mb() -> None:
    gc.collect()
    tracemalloc.start()
    try:
        big = AccountTable()
        for number in range(100_000):
            big.add(Account("EXAMPLE", f"some.longer.user.name{number}", number.to_bytes(16, "big")))
        assert tracemalloc.get_traced_memory()[0] < 40 * 2**20
    finally:
        tracemalloc.stop()
    assert len(big) == 100_000


def test_a_lookup_does_the_same_work_among_one_and_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    folded: list[str] = []
    real = accounts.simple_upper
    monkeypatch.setattr(accounts, "simple_upper", lambda text: folded.append(text) or real(text))
    many = table(*(f"DOM\\user{number}" for number in range(2_000)))
    folded.clear()
    assert many.lookup("DOM", "user1999") is not None
    # With its domain and without: both are looked for, whichever is there.
    assert folded == ["DOM\\user1999", "\\user1999"]


# Files


def test_a_bad_line_refuses_the_whole_file_and_all_of_them_are_told_with_their_numbers(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The bad one may have disabled an account for which another line would then answer."""
    file = AccountFile(write(LINE, LINE.replace("DOM\\alice", "bob")))
    path = write("# people", LINE.replace("[U ", "UD "), LINE.replace("DOM\\", ""), "x:y", "DOM:carol:")
    with pytest.raises(ConfigurationError) as caught:
        AccountFile(path)
    assert str(caught.value) == (
        f"the account file {path} cannot be used until these lines are mended or removed: "
        "line 2: the flags are not in brackets, as in [U]; "
        "line 4: 2 fields between colons; an smbpasswd line has 6, DOMAIN:USER:PASSWORD 3; "
        "line 5: the password is empty"
    )
    assert file.lookup("DOM", "bob") is not None
    assert f"{caught.value}; the 2 accounts read before still serve" in caplog.text


def test_a_file_that_is_none_of_accounts_is_told_in_one_short_error(write: Callable[..., Path]) -> None:
    with pytest.raises(ConfigurationError, match="; and 980 more$") as caught:
        AccountFile(write(*["nonsense"] * 1000))
    assert len(str(caught.value)) < 4096


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_lines_for_one_account_the_first_counts_and_either_can_disable_it(
    write: Callable[..., Path], order: int, caplog: pytest.LogCaptureFixture
) -> None:
    disabled = LINE.replace("[U ", "[UD").replace(HASH, "1" * 32)
    file = AccountFile(write(*[LINE, disabled][::order]))
    account = file.lookup("DOM", "alice")
    assert account is not None and not account.enabled
    assert account.nt_hash.hex().upper() == [HASH, "1" * 32][::order][0]
    assert "accounts:2: line ignored: 'DOM\\\\alice' stands further up" in caplog.text


def test_a_file_readable_by_others_is_warned_about(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    AccountFile(write(LINE))
    assert not caplog.records
    AccountFile(write(LINE, mode=0o640))
    assert "others may read it" in caplog.text


def test_clear_passwords_are_warned_about_and_never_shown(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    file = AccountFile(write("DOM:alice:hunter2", "DOM:bob:hunter2"))
    assert "2 passwords in clear" in caplog.text
    assert "hunter2" not in caplog.text + repr(file)


def test_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "accounts"
    path.write_bytes(f"{LINE}\r\nDOM:bob:secret\r\n".encode())
    account = AccountFile(path).lookup("DOM", "bob")
    assert account is not None and account.nt_hash == nt_hash("secret")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is UTF-16 text"),
        (lambda path: path.write_text("nonsense\n"), "line 1: 1 fields"),
        (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    ],
    ids=["gone", "not text", "nonsense", "a directory"],
)
def test_a_file_that_cannot_be_read_is_an_error_at_the_start_and_keeps_the_old_table_later(
    write: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], object],
    problem: str,
) -> None:
    path = write(LINE)
    file = AccountFile(path)
    spoil(path)
    with pytest.raises(ConfigurationError, match=problem):
        AccountFile(path)
    for _ in range(3):
        assert file.lookup("DOM", "alice") is not None
    complaints = [record for record in caplog.records if "still serve" in record.getMessage()]
    assert len(complaints) == 1 and problem in complaints[0].getMessage()


def test_an_edit_takes_effect_at_the_next_login(write: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = AccountFile(write(LINE))
    assert not file.may_block
    write(LINE, "DOM:bob:secret")
    assert file.may_block
    assert file.lookup("DOM", "bob") is not None
    assert not file.may_block
    write("# nobody any more")
    assert file.lookup("DOM", "alice") is None
    assert ": 0 accounts" in caplog.text


def test_a_file_moved_into_place_is_noticed_even_with_the_same_size_and_date(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write("DOM:alice:secret1")
    file = AccountFile(path)
    fresh = tmp_path / "fresh"
    fresh.write_text("DOM:alice:secret2\n")
    status = path.stat()
    os.utime(fresh, ns=(status.st_atime_ns, status.st_mtime_ns))
    fresh.rename(path)
    account = file.lookup("DOM", "alice")
    assert account is not None and account.nt_hash == nt_hash("secret2")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(accounts, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def edit_unseen(path: Path, old: str, new: str) -> None:
    """In place, of the same size, and with the date set back."""
    status = path.stat()
    assert len(old) == len(new)
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) == (
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
    )


def enabled(file: AccountFile) -> bool:
    account = file.lookup("DOM", "alice")
    return account is not None and account.enabled


def test_an_edit_in_place_of_the_same_size_with_the_old_date_takes_effect_at_the_next_login(
    write: Callable[..., Path], clock: SimpleNamespace
) -> None:
    path = write(LINE)
    file = AccountFile(path)
    before = path.stat().st_ctime_ns
    # The kernel's clock for this ticks every few milliseconds.
    while path.stat().st_ctime_ns == before:
        edit_unseen(path, "[U ", "[UD")
    assert file.may_block
    assert not enabled(file)


def test_an_edit_that_nothing_shows_takes_effect_within_a_minute(
    write: Callable[..., Path],
    clock: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on a filesystem without a time of change, or after the clock was set back."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(AccountFile, "_signature", lambda _self: (1, 2, 3, 4))
    path = write(LINE)
    file = AccountFile(path)
    edit_unseen(path, "[U ", "[UD")
    clock.now += 59.9
    assert not file.may_block and enabled(file)
    clock.now += 0.1
    assert file.may_block and not enabled(file)
    assert not file.may_block
    # And back, with a look that finds nothing in between; nor does that one say anything.
    clock.now += 60
    assert file.may_block and not enabled(file) and not file.may_block
    assert caplog.text.count("1 accounts") == 1
    edit_unseen(path, "[UD", "[U ")
    clock.now += 60
    assert enabled(file)


def test_a_look_that_finds_nothing_holds_up_no_other_login(
    write: Callable[..., Path], clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = AccountFile(write(LINE))
    clock.now += 60
    real, looked = _texts.read, []

    def read(*args: Any) -> _texts.Content:
        # Another one comes during the look; were it to wait for it, this would never end.
        looked.append(file.may_block)
        assert enabled(file)
        return real(*args)

    monkeypatch.setattr(_texts, "read", read)
    assert enabled(file)
    assert looked == [False]


@pytest.mark.parametrize("seen", [True, False], ids=["the date shows it", "nothing shows it"])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ENOENT, errno.EACCES])
def test_an_error_that_passes_is_not_taken_for_a_reading(
    write: Callable[..., Path],
    clock: SimpleNamespace,
    *,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
    seen: bool,
) -> None:
    if not seen:
        monkeypatch.setattr(AccountFile, "_signature", lambda _self: (1, 2, 3, 4))
    file = AccountFile(write(LINE))
    write(LINE.replace("[U ", "[UD"))
    clock.now += 60
    tried = 0
    real = os.open

    def broken(*_args: object) -> int:
        nonlocal tried
        tried += 1
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", broken)
    for _ in range(30):
        # Many logins within a second are one attempt; and what goes wrong is told once.
        assert enabled(file)
        clock.now += 0.1
    assert tried in (3, 4)
    assert caplog.text.count("still serve") == 1 and os.strerror(number) in caplog.text
    monkeypatch.setattr(os, "open", real)
    clock.now += 1
    assert file.may_block and not enabled(file)
    # What goes wrong later is told again.
    monkeypatch.setattr(os, "open", broken)
    clock.now += 60
    assert not enabled(file)
    assert caplog.text.count("still serve") == 2


def test_a_refused_file_is_told_once_until_it_changes_and_counts_when_it_is_mended(
    write: Callable[..., Path], clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    file = AccountFile(write(LINE))
    for times in (1, 2):
        write(LINE, "nonsense")
        for _ in range(3):
            assert enabled(file) and not file.may_block
            clock.now += 60
        # Whoever has saved it again hears of it again.
        assert caplog.text.count("still serve") == times
    write(LINE.replace("[U ", "[UD"), "# mended")
    assert not enabled(file)


async def test_a_changed_file_is_read_in_a_worker_thread_and_an_unchanged_one_is_not(
    write: Callable[..., Path],
) -> None:
    hops = 0

    async def run_blocking(function: Callable[[bytes | None], bytes], token: bytes | None) -> bytes:
        nonlocal hops
        hops += 1
        return await trio.to_thread.run_sync(function, token)

    acceptor = Acceptor(accounts=AccountFile(write(LINE)))

    async def log_in(user: str, password: str) -> str:
        client_stream, server_stream = trio.testing.memory_stream_pair()
        initiator = Initiator(username=user, password=password, mechanism="ntlm")
        client = SSPIChannel(client_stream, initiator)
        server = SSPIChannel(server_stream, acceptor, run_blocking=run_blocking)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.do_handshake)
            nursery.start_soon(server.do_handshake)
        return server.peer.principal

    assert await log_in("DOM\\alice", "password") == "DOM\\alice"
    assert hops == 0
    write(LINE, "DOM:bob:secret")
    assert await log_in("DOM\\bob", "secret") == "DOM\\bob"
    assert hops > 0


async def test_a_source_of_ones_own_needs_one_method_and_is_asked_in_a_worker_thread() -> None:
    asked = []

    class Directory:
        def lookup(self, domain: str, user: str) -> Account | None:
            asked.append((domain, user))
            # Raises where there is an event loop: this is not its thread.
            with pytest.raises(RuntimeError):
                trio.lowlevel.current_task()
            return Account("DOM", "Alice", nt_hash("secret"))

    client_stream, server_stream = trio.testing.memory_stream_pair()
    client = SSPIChannel(client_stream, Initiator(username="x\\alice", password="secret", mechanism="ntlm"))
    server = SSPIChannel(server_stream, Acceptor(accounts=Directory()))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    assert server.peer.principal == "DOM\\Alice"
    assert asked == [("x", "alice")]


def test_random_edits_never_make_the_reader_raise_anything_else() -> None:
    rng = random.Random("account files")
    for _ in range(3_000):
        line = list(LINE)
        for _ in range(rng.randrange(1, 6)):
            line[rng.randrange(len(line))] = rng.choice("\\:[]XD \0é\u2028\x85#aF0")
        try:
            parsed = parse_line("".join(line))
        except ConfigurationError:
            continue
        assert parsed is None or len(parsed[0].nt_hash) == 16
