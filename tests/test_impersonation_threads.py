"""What a function that ran as a peer leaves behind: no thread, no process, nothing in a thread that others use."""

from __future__ import annotations

import contextvars
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from local_users import Users
from programs import environment
from triosspi import AccountMap, ConfigurationError, Impersonation, ImpersonationError

if sys.platform != "linux":
    pytest.skip("Linux's own", allow_module_level=True)

from triosspi import _thread_ids
from triosspi.impersonation import confinement, linux, own_thread
from triosspi.impersonation.linux import thread_identity

TESTS = Path(__file__).parent


@pytest.fixture
def impersonation(users: Users, tmp_path: Path) -> Impersonation:
    path = tmp_path / "map"
    path.write_text(f"DOM\\alice {users.alice.name}\n")
    return Impersonation(AccountMap(path))


# All imports first: who is nobody may not read this directory.
PRELUDE = """
import asyncio, json, logging, logging.handlers, os, queue, subprocess, sys, threading, warnings
import multiprocessing.dummy, multiprocessing.pool, multiprocessing.popen_fork, multiprocessing.synchronize
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
import trio
from triosspi import AccountMap, Impersonation, LocalAccount, _thread_ids
from triosspi.impersonation.linux import thread_identity

# Of coroutines that were never run, and of sockets of event loops that were never started.
warnings.simplefilter("ignore")
path, alice = sys.argv[1], LocalAccount.lookup(sys.argv[2])

def everybody():
    # By the kernel's own word, whoever has started them and whatever for.
    found = set()
    for task in Path("/proc/self/task").iterdir():
        fields = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        found.add((fields["Uid"], fields["Gid"], fields["Groups"]))
    return len(found)
"""


def child(users: Users, path: Path, program: str) -> subprocess.CompletedProcess[str]:
    path.write_text(f"DOM\\alice {users.alice.name}\n")
    surroundings = {name: value for name, value in environment().items() if not name.startswith("COVERAGE_")}
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + program, str(path), users.alice.name],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**surroundings, "PYTHONDONTWRITEBYTECODE": "1"},
    )


# Pools that are shared


def test_whatever_a_function_tries_the_pools_of_the_process_stay_the_servers(users: Users, tmp_path: Path) -> None:
    """Threads inherit. Three of five calls of the server's own were done as the peer after a function that had nested
    `trio.run`; an executor of the application, once grown, was the peer's for good."""
    program = """
executor = ThreadPoolExecutor(20)
executor.submit(int).result()
stay = threading.Event()

async def several():
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(trio.to_thread.run_sync, int)

async def several_of_asyncio():
    await asyncio.gather(*(asyncio.to_thread(int) for _ in range(5)))

def pool_grows():
    # Each holds one that is there until the next is asked for.
    for _ in range(5):
        executor.submit(stay.wait, 1)

ATTEMPTS = {
    "trio.run": lambda: trio.run(several),
    "asyncio.run": lambda: asyncio.run(several_of_asyncio()),
    "executor": pool_grows,
    "executor of its own": lambda: ThreadPoolExecutor(1).submit(int),
    "thread that stays": lambda: threading.Thread(target=stay.wait, args=(30,), daemon=True).start(),
    "timer": lambda: threading.Timer(30, int).start(),
    "queue listener": lambda: logging.handlers.QueueListener(queue.Queue()).start(),
    "pool": lambda: multiprocessing.pool.ThreadPool(1),
    "process": lambda: multiprocessing.get_context("fork").Process(target=int).start(),
    "process pool": lambda: ProcessPoolExecutor(1, multiprocessing.get_context("fork")).submit(int),
}

def work():
    done = {}
    for name, attempt in ATTEMPTS.items():
        try:
            attempt()
            done[name] = "done"
        except RuntimeError as exc:
            done[name] = str(exc)
    return done

async def main():
    mine = thread_identity()
    impersonation = Impersonation(AccountMap(path))
    # The cache has an idle thread, as any server's.
    await trio.to_thread.run_sync(int)
    print(json.dumps(await impersonation.run_as(alice, work)))
    stay.set()
    barrier, found = threading.Barrier(20), []
    def look():
        found.append(thread_identity() == mine)
    def look_together():
        # Nobody is asked twice.
        barrier.wait(30)
        look()
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(trio.to_thread.run_sync, look_together)
    for future in [executor.submit(look) for _ in range(20)]:
        await trio.to_thread.run_sync(future.result)
    print(json.dumps([found.count(True), found.count(False), everybody()]))

trio.run(main)
"""
    done = child(users, tmp_path / "map", program)
    assert done.returncode == 0, done.stderr
    attempts, (servers, others, kinds) = map(json.loads, done.stdout.splitlines())
    assert (servers, others, kinds) == (40, 0, 1)
    threads = "a function that runs as a peer may not start threads: they would be the peer for ever"
    loop = "a function that runs as a peer may not run an event loop: the worker threads that it finds are the server"
    copy = "a function that runs as a peer may not fork: the copy of the server would be the peer for ever"
    assert attempts == {
        **dict.fromkeys(attempts, threads),
        **dict.fromkeys(("trio.run", "asyncio.run"), loop),
        **dict.fromkeys(("process", "process pool"), f"{copy} (a program may be started)"),
    }


async def test_programs_are_started_as_before(users: Users, impersonation: Impersonation) -> None:
    def start() -> list[int]:
        command = ("id", "-u")
        # With pipes in both directions, with code before the program, and by the other calls that there are.
        found = [
            subprocess.run(command, input=b"x", capture_output=True, check=True).stdout,
            subprocess.run(command, stdout=subprocess.PIPE, check=True, preexec_fn=int, start_new_session=True).stdout,
        ]
        started = os.posix_spawn("/bin/true", ["true"], {})
        ends = (os.waitpid(started, 0)[1], os.system(f"test $(id -u) = {os.geteuid()}"))
        return [*map(int, found), *map(os.waitstatus_to_exitcode, ends)]

    uid = users.alice.uid
    assert await impersonation.run_as(users.alice, start) == [uid, uid, 0, 0]


def test_only_the_thread_that_is_the_peer_is_confined(users: Users) -> None:
    """And no longer than it is: the event loop goes on starting what it likes."""
    inside, looked = threading.Event(), threading.Event()

    def work() -> None:
        inside.set()
        assert looked.wait(30)

    def start() -> None:
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()

    def there_and_back() -> None:
        linux.run_as(users.alice, work, ())
        start()

    errors: list[BaseException] = []
    thread = threading.Thread(target=recording(there_and_back, errors))
    thread.start()
    assert inside.wait(30)
    start()
    trio.run(trio.to_thread.run_sync, int)
    if (pid := os.fork()) == 0:
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    looked.set()
    thread.join()
    assert errors == []


def recording(function: Callable[[], object], errors: list[BaseException]) -> Callable[[], None]:
    def call() -> None:
        try:
            function()
        except BaseException as exc:
            errors.append(exc)

    return call


def test_where_threads_could_be_started_impersonation_cannot_be_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit hook of somebody else's may keep ours from being added; and says nothing of it."""

    class Deaf:
        def confine(self, confined: bool) -> None: ...

    with pytest.raises(ConfigurationError, match="a function that runs as a peer could start threads"):
        confinement.rehearse(Deaf())  # type: ignore[arg-type]
    monkeypatch.setattr(linux._ids, "confine", Deaf().confine)
    with pytest.raises(ConfigurationError, match="a function that runs as a peer could start threads"):
        linux.check_privileges()


# A thread for each


async def test_what_a_function_has_done_to_its_thread_nobody_meets(users: Users, impersonation: Impersonation) -> None:
    """Ids and capabilities are proven to be back; this is what they are not all of. Some of it has no way back."""
    local = threading.local()
    libc = ctypes.CDLL(None)
    no_new_privileges = (39, 0, 0, 0, 0)  # PR_GET_NO_NEW_PRIVS

    def state() -> tuple[int, int, set[int], bool]:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        return nice, libc.prctl(*no_new_privileges), signal.pthread_sigmask(signal.SIG_BLOCK, ()), hasattr(local, "x")

    def spoil() -> threading.Thread:
        os.setpriority(os.PRIO_PROCESS, 0, 7)
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))
        local.x = "alice's"
        return threading.current_thread()

    before = state()
    mine = thread_identity()
    thread = await impersonation.run_as(users.alice, spoil)
    assert not thread.is_alive()
    for _ in range(5):
        assert await impersonation.run_as(users.bob, state) == before
        assert await trio.to_thread.run_sync(state) == before
    assert thread_identity() == mine


async def test_the_context_variables_of_the_caller_are_there_and_stay_his(
    users: Users, impersonation: Impersonation
) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("the caller's")

    def work() -> str:
        found = variable.get()
        variable.set("the function's")
        return found

    assert await impersonation.run_as(users.alice, work) == "the caller's"
    assert variable.get() == "the caller's"


def test_an_error_and_all_that_its_frames_hold_is_let_go_of_without_the_garbage_collector() -> None:
    class Resource:
        pass

    held: list[weakref.ref[Resource]] = []

    def fail() -> None:
        resource = Resource()
        held.append(weakref.ref(resource))
        raise ValueError

    gc.disable()
    try:
        with suppress(ValueError):
            own_thread.call(fail)
        assert held[0]() is None
    finally:
        gc.enable()


async def test_without_a_thread_to_be_had_the_function_is_not_called(
    users: Users, impersonation: Impersonation, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[bool] = []

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(own_thread._Errand, "start", start)
    with pytest.raises(ImpersonationError, match="there is no thread for it: can't start new thread"):
        await impersonation.run_as(users.alice, called.append, True)
    assert called == []


# Who the server is

# One thread of Trio's cache has been started by somebody else; how it could be, `confine` prevents.
FOREIGN = """
from functools import partial
import triosspi
from triosspi.channel import run_in_thread
from triosspi.service.serving.reloading import Reading, watch_files

def be(uid, gid):
    _thread_ids.set_groups((gid,))
    _thread_ids.set_group_ids(gid, gid, 0)
    _thread_ids.set_user_ids(uid, uid, 0)
    trio.run(trio.to_thread.run_sync, int)

def leak(uid, gid):
    thread = threading.Thread(target=be, args=(uid, gid))
    thread.start()
    thread.join()

impersonation = Impersonation(AccountMap(path))
identity = dict(principal="DOM\\\\alice", domain="DOM", name="alice", mechanism="ntlm", flags=0)
peer = triosspi.PeerIdentity(**identity, mutual=False, authenticated_at=None)

async def run(uid, gid):
    leak(uid, gid)
    await {door}
    print("done", flush=True)

trio.run(run, {uid}, {gid})
"""
DOORS = {
    "a handshake's step": "run_in_thread(lambda token: print('stepped', flush=True), None)",
    "the look-up of an account": "impersonation._account(peer)",
    "a function as the peer": "impersonation.run_as(alice, print, 'called')",
    "a reload": "Reading(partial(print, 'reloaded', flush=True)).read()",
    "the watch of the files": "watch_files(lambda: (Path('/'),), print)",
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_a_worker_thread_that_is_somebody_else_does_nothing_of_the_servers(
    users: Users, tmp_path: Path, door: str
) -> None:
    """Where one is there may be more, and nobody knows what they have done: it is the process's end."""
    uid, gid = users.bob.uid, users.bob.gid
    program = FOREIGN.replace("{door}", door).replace("{uid}", str(uid)).replace("{gid}", str(gid))
    done = child(users, tmp_path / "map", program)
    assert (done.returncode, done.stdout) == (-signal.SIGABRT, "")
    assert done.stderr == (
        f"triosspi: a worker thread is uid {uid}, gid {gid}, groups [{gid}] "
        f"instead of uid 0, gid 0, groups {os.getgroups()}; aborting\n"
    )


def test_a_worker_thread_that_is_the_server_does_what_it_should(users: Users, tmp_path: Path) -> None:
    program = FOREIGN.replace("    leak(uid, gid)\n", "").replace("{door}", DOORS["a handshake's step"])
    done = child(users, tmp_path / "map", program.replace("{uid}", "0").replace("{gid}", "0"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "stepped\ndone\n", "")


def test_a_process_that_changes_as_a_whole_is_the_server_still(users: Users, tmp_path: Path) -> None:
    """A child that gives up its parent's power, or who drops it late, has nobody else among its threads."""
    program = """
from triosspi.channel import run_in_thread
Impersonation(AccountMap(path))
async def step():
    await run_in_thread(lambda token: print(os.getresuid(), os.getgroups(), flush=True), None)
if (pid := os.fork()) == 0:
    trio.run(step)
    os.setgroups([4711])
    os.setuid(65534)
    trio.run(step)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    done = child(users, tmp_path / "map", program)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"(0, 0, 0) {os.getgroups()}\n(65534, 65534, 65534) [4711]\n"


def test_a_thread_that_is_somebody_else_is_not_taken_for_the_server(users: Users, tmp_path: Path) -> None:
    program = """
def work():
    _thread_ids.set_groups((4711,))
    try:
        Impersonation(AccountMap(path))
    except ValueError as exc:
        print(type(exc).__name__, exc)
thread = threading.Thread(target=work)
thread.start()
thread.join()
Impersonation(AccountMap(path))
"""
    done = child(users, tmp_path / "map", program)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "ConfigurationError this thread is uid 0, gid 0, groups [4711], "
        f"and the process is uid 0, gid 0, groups {os.getgroups()}\n"
    )


def test_nobody_can_tell_who_a_thread_is_and_that_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[bytes] = []

    class Mute:
        def user_ids(self) -> Any:
            raise PermissionError(1, "Operation not permitted", "getresuid")

        def die(self, line: bytes) -> None:
            said.append(line)

    monkeypatch.setattr(linux, "_ids", Mute())
    linux.check_thread()
    assert said == [b"triosspi: a worker thread whose credentials cannot be read; aborting\n"]


def test_without_the_kernels_account_of_the_process_whoever_asked_first_is_the_server(
    root: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Strange:
        said = b""

        def __getattr__(self, name: str) -> Any:
            return getattr(_thread_ids, name)

        def groups(self) -> tuple[int, ...]:
            return (4711,)

        def die(self, line: bytes) -> None:
            self.said = line

    monkeypatch.setattr(linux, "_PROC", tmp_path)
    linux.remember_server()
    linux.check_thread()
    strange = Strange()
    monkeypatch.setattr(linux, "_ids", strange)
    linux.check_thread()
    assert strange.said == b"triosspi: a worker thread is uid 0, gid 0, groups [4711] instead of the server; aborting\n"
