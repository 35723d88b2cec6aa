"""Raw system calls that concern one thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from compiling import compile_without_a_warning
from local_users import Users

ROOT = Path(__file__).resolve().parent.parent

_thread_ids = pytest.importorskip("triosspi._thread_ids", reason="system calls of Linux")


def in_a_thread(function, *args):
    """Run in a thread of its own, which ends with it."""
    results = []

    def work() -> None:
        try:
            results.append((True, function(*args)))
        except Exception as exc:
            results.append((False, exc))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ((good, result),) = results
    if not good:
        raise result
    return result


def python(program: str) -> subprocess.CompletedProcess[bytes]:
    # Whoever runs the tests may have asked for no buffers.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=False, timeout=60
    )


def status(thread: int | str = "self") -> dict[str, list[str]]:
    """The kernel's own account of a thread."""
    lines = Path(f"/proc/self/task/{thread}/status").read_text().splitlines()
    return {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}


def test_the_getters_agree_with_the_kernels_own_account():
    shown = status(_thread_ids.thread_id())
    uids, gids = list(map(int, shown["Uid"])), list(map(int, shown["Gid"]))
    assert list(_thread_ids.user_ids()) == uids[:3] == list(os.getresuid())
    assert list(_thread_ids.group_ids()) == gids[:3] == list(os.getresgid())
    assert list(_thread_ids.filesystem_ids()) == [uids[3], gids[3]]
    assert list(_thread_ids.groups()) == list(map(int, shown["Groups"])) == sorted(os.getgroups())
    assert list(_thread_ids.capabilities()) == [int(shown[name][0], 16) for name in ("CapEff", "CapPrm", "CapInh")]
    assert _thread_ids.ambient() == int(shown["CapAmb"][0], 16)
    assert in_a_thread(_thread_ids.thread_id) != _thread_ids.thread_id() == threading.get_native_id()


@pytest.mark.parametrize(
    ("number", "error"),
    [(0xFFFFFFFF, ValueError), (-1, OverflowError), (1 << 32, OverflowError), ("0", TypeError)],
)
def test_what_is_no_id_never_reaches_the_kernel(number, error):
    """All ones means "leave as it is": a thread would believe itself somebody else and be root."""
    before = in_a_thread(lambda: (_thread_ids.user_ids(), _thread_ids.group_ids(), _thread_ids.groups()))

    def attempt():
        for position in range(3):
            for call, own in ((_thread_ids.set_user_ids, os.getuid()), (_thread_ids.set_group_ids, os.getgid())):
                ids = [own, own, own]
                ids[position] = number
                with pytest.raises(error):
                    call(*ids)
        with pytest.raises(error):
            _thread_ids.set_groups((0, number))
        return _thread_ids.user_ids(), _thread_ids.group_ids(), _thread_ids.groups()

    assert in_a_thread(attempt) == before


def test_too_many_groups_are_refused_before_any_memory_is_read(root):
    with pytest.raises(ValueError, match="65537 groups are more than the kernel takes"):
        _thread_ids.set_groups((1,) * 65537)
    with pytest.raises(TypeError):
        _thread_ids.set_groups([1])


def test_only_the_calling_thread_changes(users: Users):
    mine = status(_thread_ids.thread_id())
    groups = tuple(range(5000, 5300))

    def change():
        _thread_ids.set_groups(tuple(reversed(groups)))
        _thread_ids.set_group_ids(users.bob.gid, users.alice.gid, 0)
        _thread_ids.set_user_ids(users.alice.uid, users.bob.uid, 0)
        assert _thread_ids.groups() == groups
        assert _thread_ids.user_ids() == (users.alice.uid, users.bob.uid, 0)
        assert _thread_ids.group_ids() == (users.bob.gid, users.alice.gid, 0)
        assert _thread_ids.filesystem_ids() == (users.bob.uid, users.alice.gid)
        # The main thread, meanwhile, by its own account.
        shown = status(os.getpid())
        assert [shown[name] for name in ("Uid", "Gid", "Groups")] == [mine[name] for name in ("Uid", "Gid", "Groups")]
        _thread_ids.set_groups(())
        return _thread_ids.groups()

    with pytest.raises(PermissionError) as refused:
        in_a_thread(change)
    # No longer root: the kernel's own word, and the call's name.
    assert (refused.value.filename, refused.value.strerror) == ("setgroups", "Operation not permitted")
    assert os.getresuid() == (0, 0, 0)


def test_capabilities_are_set_for_the_calling_thread(root):
    before = _thread_ids.capabilities()

    def drop():
        effective, permitted, inheritable = _thread_ids.capabilities()
        kept = 1 << 6 | 1 << 7
        _thread_ids.set_capabilities(0, kept, kept)
        assert _thread_ids.capabilities() == (0, kept, kept)
        _thread_ids.raise_ambient(kept)
        assert _thread_ids.ambient() == kept
        _thread_ids.set_capabilities(kept, kept, 0)
        # They go with the inheritable ones.
        assert _thread_ids.ambient() == 0
        with pytest.raises(PermissionError):
            _thread_ids.set_capabilities(effective, permitted, inheritable)
        with pytest.raises(PermissionError) as refused:
            _thread_ids.raise_ambient(1)
        return refused.value.filename

    assert in_a_thread(drop) == "prctl"
    assert _thread_ids.capabilities() == before


def test_the_last_words_are_one_write_and_then_the_process_is_gone():
    # Nothing that Python would still do is done.
    program = """
import atexit, sys
from triosspi import _thread_ids
atexit.register(print, "at exit")
sys.stdout.write("not flushed")
try:
    _thread_ids.die(b"no way back\\n")
finally:
    print("finally")
"""
    done = python(program)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGABRT, b"", b"no way back\n")


def test_nobody_who_has_stopped_reading_keeps_the_process_alive():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(65536))
    except BlockingIOError:
        pass
    os.set_blocking(writer, True)
    done = subprocess.run(
        [sys.executable, "-c", "from triosspi import _thread_ids; _thread_ids.die(b'no way back')"],
        stderr=writer,
        check=False,
        timeout=60,
    )
    os.close(writer)
    os.close(reader)
    assert done.returncode == -signal.SIGABRT


@pytest.mark.long("compiles the extension, optimised")
def test_the_extension_compiles_without_a_warning(tmp_path: Path) -> None:
    """An id that is cut to fewer bits is somebody else's: the compiler must see none."""
    compile_without_a_warning("_thread_ids", tmp_path)
