"""Changes to an account file: nothing is lost, whoever interferes."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import spnego

from programs import PATIENCE, environment
from triosspi import AccountFile, ConfigurationError
from triosspi.security.ntlm.primitives import nt_hash
from triosspi.service import account_editor
from triosspi.service.account_editor import add, edit, hash_clear, import_clear, remove, set_enabled

PASSWORD = "correct horse"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "accounts"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def hashes(path: Path) -> dict[str, bytes]:
    return {account.principal: account.nt_hash for account in AccountFile(path)}


def test_a_line_is_samba_s_with_an_nt_hash_and_no_lm_hash(path: Path) -> None:
    assert add(path, "DOM\\alice", "password")
    (line,) = path.read_text().splitlines()
    fields = line.split(":")
    # The hash of "password" stands in every book on the subject.
    assert fields[:5] == ["DOM\\alice", "65534", "0" * 32, "8846F7EAEE8FB117AD06BDD830B7586C", "[U          ]"]
    assert fields[5].startswith("LCT-") and len(fields) == 6
    assert PASSWORD not in line


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_a_file_is_made_for_its_owner_alone_whatever_the_umask(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        add(path, "alice", PASSWORD)
    finally:
        os.umask(before)
    # A umask can only take away.
    assert mode(path) == 0o600 & ~umask
    assert os.listdir(path.parent) == [path.name]


def test_a_file_that_others_could_read_is_theirs_no_more_after_a_change(path: Path) -> None:
    path.touch(0o644)
    path.chmod(0o644)
    add(path, "alice", PASSWORD)
    assert mode(path) == 0o600


def test_a_new_password_replaces_the_line_where_it_stands_and_keeps_every_other_byte(path: Path) -> None:
    path.write_text(
        "# our staff; Zoë keeps it\n"
        "\n"
        "  indented rubbish:x\r\n"
        "DOM\\bob:1000:00000000000000000000000000000000:8846F7EAEE8FB117AD06BDD830B7586C:[U          ]:LCT-1:\r\n"
        "ALICE:is:not:this:one\n"
        "DOM:carol:in clear\n"
        "\n"
        "no line feed at the end",
        newline="",
    )
    before = path.read_bytes().split(b"\n")
    assert not add(path, "DOM\\bob", PASSWORD)
    after = path.read_bytes().split(b"\n")
    assert after.pop() == b""
    changed = [index for index, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    # A line that ends with Samba's colon and a carriage return is a line all the same.
    assert changed == [3]
    assert f":{nt_hash(PASSWORD).hex().upper()}:".encode() in after[3]
    assert add(path, "dave", PASSWORD)
    assert path.read_bytes().split(b"\n")[:8] == after


def test_an_account_whose_password_changes_keeps_its_spelling(path: Path) -> None:
    # Handlers compare principals: a slip in typing must not make alice another one to them.
    add(path, "DOM\\Alice", "old")
    assert not add(path, "dom\\ALICE", PASSWORD)
    assert hashes(path) == {"DOM\\Alice": nt_hash(PASSWORD)}


def test_a_disabled_account_that_gets_a_password_stays_disabled(path: Path) -> None:
    add(path, "DOM\\alice", "old")
    set_enabled(path, "DOM\\alice", enabled=False)
    assert not add(path, "DOM\\alice", PASSWORD)
    assert [(account.enabled, account.nt_hash) for account in AccountFile(path)] == [(False, nt_hash(PASSWORD))]
    assert import_clear(path, ["DOM:ALICE:imported\n"]) == (1, [])
    assert [(account.principal, account.enabled) for account in AccountFile(path)] == [("DOM\\alice", False)]
    set_enabled(path, "DOM\\alice", enabled=True)
    assert [(account.enabled, account.nt_hash) for account in AccountFile(path)] == [(True, nt_hash("imported"))]


def test_an_account_in_clear_gets_a_hash_with_its_new_password(path: Path) -> None:
    path.write_text("DOM:alice:old\n")
    assert not add(path, "DOM\\alice", PASSWORD)
    assert hashes(path) == {"DOM\\alice": nt_hash(PASSWORD)}
    assert len(path.read_text().split(":")) == 6


def test_alice_of_a_domain_and_alice_of_any_domain_are_two(path: Path) -> None:
    assert add(path, "DOM\\alice", "one")
    assert add(path, "alice", "two")
    assert add(path, "alice@example.com", "three")
    assert set(hashes(path)) == {"DOM\\alice", "alice", "alice@example.com"}


@pytest.mark.parametrize(
    "name",
    [
        *("", "\\", "dom\\", "\\alice", "a:b", "a\nb", "a\0b", "DOM\\EXTRA\\alice"),
        # Unprintable: a terminal's command, what pyspnego's reader takes for a line's end, half a character.
        *("a\x1b[2J", "a\x85b", "a\u2028b", "a\udcffb", "a\u202eb", "\ufeffa"),
        # It would be a comment, and never log in.
        "#alice",
    ],
)
def test_a_name_that_could_not_stand_in_the_file_is_refused_and_nothing_is_made(path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        add(path, name, PASSWORD)
    assert str(caught.value).isprintable()
    assert not path.exists()
    with pytest.raises(ConfigurationError):
        account_editor.check_principal(name)


@pytest.mark.parametrize("name", ["straße", "Müller", "o'neil", "a b", "日本", "DOM\\$machine", "a#b", "-x", "a.b@c"])
def test_a_name_of_any_printable_characters_is_taken(path: Path, name: str) -> None:
    add(path, name, PASSWORD)
    assert set(hashes(path)) == {name}


def test_an_empty_password_is_refused(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="the password is empty"):
        add(path, "alice", "")
    assert not path.exists()


def test_a_removed_account_is_gone_and_the_others_stay(path: Path) -> None:
    for name in ("alice", "bob", "carol"):
        add(path, name, PASSWORD)
    remove(path, "BOB")
    assert list(hashes(path)) == ["alice", "carol"]


def test_the_account_to_remove_or_to_disable_must_exist(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no account file"):
        remove(path, "alice")
    assert not path.exists()
    add(path, "alice", PASSWORD)
    before = path.stat()
    with pytest.raises(ConfigurationError, match="has no account bob"):
        remove(path, "bob")
    with pytest.raises(ConfigurationError, match="has no account bob"):
        set_enabled(path, "bob", enabled=False)
    # Not even written again.
    assert os.path.samestat(path.stat(), before)


def test_disabling_keeps_the_password_and_the_other_flags_and_enabling_undoes_it(path: Path) -> None:
    path.write_text(f"ws$:1000:{'0' * 32}:{nt_hash(PASSWORD).hex()}:[WX         ]:LCT-1\n")
    set_enabled(path, "ws$", enabled=False)
    assert path.read_text().split(":")[4] == "[WXD        ]"
    set_enabled(path, "ws$", enabled=False)
    assert path.read_text().split(":")[4] == "[WXD        ]"
    set_enabled(path, "ws$", enabled=True)
    assert path.read_text().split(":")[4] == "[WX         ]"
    assert hashes(path) == {"ws$": nt_hash(PASSWORD)}


def test_an_account_in_clear_has_no_flags_to_disable_it_by(path: Path) -> None:
    path.write_text("DOM:alice:old\n")
    with pytest.raises(ConfigurationError, match="triosspi accounts import"):
        set_enabled(path, "DOM\\alice", enabled=False)


def test_clear_lines_are_imported_and_what_cannot_be_is_told_by_its_number_and_quotes_nothing(path: Path) -> None:
    add(path, "DOM\\alice", "old")
    taken, refused = import_clear(
        path,
        [
            "# staff\n",
            "DOM:Alice:new one\r\n",
            "\n",
            ":bob:pass word\n",
            ":bob:later\n",
            "DOM:secret\n",
            "DOM:#x:fine\n",
            ":#x:secret\n",
            f"carol:1:{'0' * 32}:{'0' * 32}:[U]:LCT-1\n",
            "DOM:a\x1bb:secret",
        ],
    )
    assert taken == 4
    assert hashes(path) == {
        "DOM\\alice": nt_hash("new one"),
        "bob": nt_hash("later"),
        "DOM\\#x": nt_hash("fine"),
    }
    assert [text.partition(":")[0] for text in refused] == ["line 6", "line 8", "line 9", "line 10"]
    assert not any("secret" in text for text in refused)


def test_of_two_lines_for_one_account_the_one_that_counts_is_changed(path: Path) -> None:
    # A login is checked against the first.
    path.write_text("DOM:alice:first\nDOM:alice:second\n")
    import_clear(path, ["DOM:alice:imported"])
    assert hashes(path)["DOM\\alice"] == nt_hash("imported")
    add(path, "DOM\\alice", "added")
    assert hashes(path)["DOM\\alice"] == nt_hash("added")
    assert path.read_text().endswith("\nDOM:alice:second\n")


def test_who_is_disabled_or_removed_is_so_by_all_lines_of_that_name(path: Path) -> None:
    for name in ("alice", "bob", "alice"):
        with edit(path) as lines:
            lines.append(account_editor.format_line(name, nt_hash(PASSWORD)))
    set_enabled(path, "alice", enabled=False)
    assert path.read_text().count("[UD         ]") == 2
    set_enabled(path, "alice", enabled=True)
    assert [account.enabled for account in AccountFile(path)] == [True, True]
    remove(path, "alice")
    assert list(hashes(path)) == ["bob"]


def test_a_file_of_windows_is_edited_and_loses_its_mark_alone(path: Path) -> None:
    line = f"DOM\\alice:1:{'0' * 32}:{'1' * 32}:[U          ]:LCT-1"
    path.write_bytes(f"\ufeff{line}\r\n# staff\r\n".encode())
    assert add(path, "bob", PASSWORD)
    assert path.read_bytes().startswith(f"{line}\r\n# staff\r\nbob:".encode())
    assert not add(path, "dom\\ALICE", PASSWORD)
    set_enabled(path, "DOM\\alice", enabled=False)
    assert [(account.principal, account.enabled) for account in AccountFile(path)] == [
        ("DOM\\alice", False),
        ("bob", True),
    ]
    remove(path, "DOM\\alice")
    assert list(hashes(path)) == ["bob"]


def test_passwords_in_clear_within_the_file_are_replaced_by_hashes(path: Path) -> None:
    add(path, "bob", "b")
    with path.open("a") as file:
        file.write("# comment\nDOM:alice:a\n:carol:c\n")
    assert hash_clear(path) == 2
    assert hashes(path) == {"bob": nt_hash("b"), "DOM\\alice": nt_hash("a"), "carol": nt_hash("c")}
    assert ":a\n" not in path.read_text()
    assert hash_clear(path) == 0


def test_an_error_within_an_edit_leaves_the_file_as_it_was(path: Path) -> None:
    add(path, "alice", PASSWORD)
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), edit(path) as lines:
        lines.clear()
        raise ZeroDivisionError
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_file_that_is_not_text_is_not_changed(path: Path) -> None:
    path.write_bytes(b"# caf\xe9\n")
    with pytest.raises(ConfigurationError, match=r"accounts is not UTF-8 text, as line 1 shows: save it as UTF-8$"):
        add(path, "alice", PASSWORD)
    assert path.read_bytes() == b"# caf\xe9\n"


def test_a_file_that_cannot_be_written_is_an_error_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^cannot change the account file .*: No such file or directory$"):
        add(tmp_path / "nowhere" / "accounts", "alice", PASSWORD)
    with pytest.raises(ConfigurationError, match=r"^cannot change the account file .*: Is a directory$"):
        add(tmp_path, "alice", PASSWORD)


def test_a_failed_write_leaves_the_old_file_and_no_new_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(path, "alice", PASSWORD)
    before = path.read_bytes()

    def disk_full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(ConfigurationError, match="No space left on device"):
        add(path, "bob", PASSWORD)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_link_to_the_file_stays_one(tmp_path: Path) -> None:
    real = tmp_path / "etc" / "real"
    real.parent.mkdir()
    link = tmp_path / "accounts"
    link.symlink_to("etc/real")
    add(link, "alice", PASSWORD)
    add(link, "bob", PASSWORD)
    assert link.is_symlink()
    assert not real.is_symlink()
    assert set(hashes(real)) == {"alice", "bob"}
    assert sorted(os.listdir(tmp_path)) == ["accounts", "etc"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_a_file_of_somebody_else_stays_his(path: Path) -> None:
    path.touch()
    os.chown(path, 12345, 54321)
    add(path, "alice", PASSWORD)
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)
    assert mode(path) == 0o600


def start(script: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    )


def test_two_writers_at_once_lose_nothing(path: Path) -> None:
    # Both have loaded everything before either begins.
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from triosspi.service.account_editor import add\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for number in range(20): add(Path(sys.argv[1]), f'{sys.argv[2]}{number}', 'pw')\n"
    )
    with start(script, path, "left") as left, start(script, path, "right") as right:
        for writer in (left, right):
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        for writer in (left, right):
            assert writer.stdin is not None
            writer.stdin.write(b"go\n")
            writer.stdin.close()
        assert [writer.wait(PATIENCE) for writer in (left, right)] == [0, 0]
    assert set(hashes(path)) == {f"{side}{number}" for side in ("left", "right") for number in range(20)}
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_a_writer_killed_before_the_new_file_is_in_place_loses_nothing(path: Path, moment: str) -> None:
    add(path, "alice", PASSWORD)
    before = path.read_bytes()
    die = "os.fsync" if moment == "fsync" else "Path.rename"
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from triosspi.service.account_editor import add\n"
        f"{die} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "add(Path(sys.argv[1]), 'bob', 'pw')\n"
    )
    with start(script, path) as writer:
        writer.communicate(timeout=PATIENCE)
        assert writer.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    left_behind = path.with_name(".accounts.new")
    # It holds hashes too.
    assert mode(left_behind) == 0o600
    # The lock died with its holder, and the next writer clears up.
    assert add(path, "carol", PASSWORD)
    assert set(hashes(path)) == {"alice", "carol"}
    assert os.listdir(path.parent) == [path.name]


def test_a_second_writer_waits_for_the_first_and_sees_what_it_wrote(path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from triosspi.service import account_editor as editor\n"
        "with editor.edit(Path(sys.argv[1])) as lines:\n"
        "    print('locked', flush=True); sys.stdin.readline()\n"
        "    lines.append(editor.format_line('first', bytes(16)))\n"
    )
    waiting = (
        "import fcntl, sys\n"
        "from pathlib import Path\n"
        "from triosspi.service.account_editor import add\n"
        "flock = fcntl.flock\n"
        "def loud(fd, how):\n"
        "    try: flock(fd, how | fcntl.LOCK_NB)\n"
        "    except BlockingIOError: print('waiting', flush=True); flock(fd, how)\n"
        "fcntl.flock = loud\n"
        "add(Path(sys.argv[1]), 'second', 'pw')\n"
    )
    with start(script, path) as first:
        assert first.stdout is not None and first.stdout.readline() == b"locked\n"
        with start(waiting, path) as second:
            assert second.stdout is not None and second.stdout.readline() == b"waiting\n"
            first.communicate(b"go\n", timeout=PATIENCE)
            assert second.wait(PATIENCE) == 0
    assert list(hashes(path)) == ["first", "second"]


@pytest.mark.parametrize("principal", ["DOM\\alice", "DOM\\straße"])
def test_pyspnego_s_own_acceptor_reads_the_line_and_logs_the_account_in(
    path: Path, principal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(path, "other", "something else")
    add(path, principal, PASSWORD)
    monkeypatch.setenv("NTLM_USER_FILE", str(path))
    options = spnego.NegotiateOptions.use_ntlm
    client = spnego.client(principal, PASSWORD, hostname=socket.gethostname(), protocol="ntlm", options=options)
    server = spnego.server(protocol="ntlm", options=options)
    token = client.step()
    while not server.complete:
        token = client.step(server.step(token))
    assert server.client_principal == principal
    assert server.unwrap(client.wrap(b"sealed").data).data == b"sealed"
