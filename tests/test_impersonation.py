"""Running code as somebody else, and coming back."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import itertools
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from local_users import Users
from programs import environment
from triosspi import ConfigurationError, Impersonation, ImpersonationError, LocalAccount, PeerIdentity
from triosspi.impersonation import AccountMap, linux, thread_user_name

if sys.platform != "linux":
    pytest.skip("Linux's own", allow_module_level=True)

from triosspi import _thread_ids
from triosspi.impersonation.linux import Identity, thread_identity
from triosspi.security.identity import ContextFlag

TESTS = Path(__file__).parent


@pytest.fixture
def account_map(users: Users, tmp_path: Path) -> AccountMap:
    path = tmp_path / "map"
    path.write_text(f"DOM\\alice {users.alice.name}\nDOM\\bob {users.bob.name}\n")
    return AccountMap(path)


@pytest.fixture
def impersonation(account_map: AccountMap) -> Impersonation:
    return Impersonation(account_map)


def is_account(found: Identity, account: LocalAccount) -> bool:
    return found == Identity(
        user_ids=(account.uid, account.uid, 0),
        group_ids=(account.gid, account.gid, 0),
        filesystem_ids=(account.uid, account.gid),
        groups=account.groups,
        capabilities=(0, _thread_ids.capabilities()[1], 0),
        ambient=0,
    )


async def workers_are_themselves(mine: Identity) -> bool:
    """Whether every idle worker thread of Trio's is as the event loop's thread. As many are asked as there may be."""
    found = []
    barrier = threading.Barrier(20)

    def look() -> None:
        found.append(thread_identity())
        # Nobody is asked twice.
        barrier.wait(30)

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(trio.to_thread.run_sync, look)
    return found == [mine] * 20


# What a function is and may


async def test_a_function_is_the_account_and_its_thread_is_itself_afterwards(
    users: Users, impersonation: Impersonation
) -> None:
    mine = thread_identity()
    assert mine.capabilities[0] & 0xC0 == 0xC0
    for account in (users.alice, users.bob):
        found, name = await impersonation.run_as(account, lambda: (thread_identity(), thread_user_name()))
        assert is_account(found, account)
        assert name == account.name
        assert thread_identity() == mine
    assert await workers_are_themselves(mine)


async def test_arguments_go_in_and_the_result_or_the_error_comes_out(
    users: Users, impersonation: Impersonation
) -> None:
    mine = thread_identity()
    assert await impersonation.run_as(users.alice, divmod, 17, 5) == (3, 2)
    raised = KeyError("theirs")

    def fail() -> None:
        raise raised

    with pytest.raises(KeyError) as caught:
        await impersonation.run_as(users.alice, fail)
    assert caught.value is raised

    def leave() -> None:
        sys.exit("usage")

    with pytest.raises(SystemExit):
        await impersonation.run_as(users.alice, leave)

    async def asynchronous() -> None: ...

    with pytest.raises(TypeError, match="appears to be asynchronous"):
        await impersonation.run_as(users.alice, asynchronous)  # type: ignore[unused-coroutine]
    assert await workers_are_themselves(mine)


async def test_what_is_one_users_own_the_other_cannot_read(users: Users, impersonation: Impersonation) -> None:
    diary, notice = users.place / "diary", users.place / "notice"

    def write() -> None:
        diary.touch(mode=0o600)
        diary.write_text("dear diary")
        notice.write_text("for the team")
        # To give a file to one's own group needs no power.
        os.chown(notice, -1, users.team)
        notice.chmod(0o640)

    await impersonation.run_as(users.alice, write)
    for path, group in ((diary, users.alice.gid), (notice, users.team)):
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (users.alice.uid, group)
    assert stat.S_IMODE(diary.stat().st_mode) == 0o600
    assert await impersonation.run_as(users.alice, diary.read_text) == "dear diary"
    for path in (diary, notice):
        with pytest.raises(PermissionError):
            await impersonation.run_as(users.bob, path.read_text)
        with pytest.raises(PermissionError):
            await impersonation.run_as(users.bob, path.chmod, 0o666)
        with pytest.raises(PermissionError):
            await impersonation.run_as(users.bob, path.unlink)
    # Membership of a supplementary group is what lets alice read what is nobody's she is.
    os.chown(notice, 0, users.team)
    assert await impersonation.run_as(users.alice, notice.read_text) == "for the team"
    # Not even what root alone may read: nothing of the server's power is left.
    secret = users.place / "secret"
    secret.write_text("the server's")
    secret.chmod(0o600)
    for account in (users.alice, users.bob):
        with pytest.raises(PermissionError):
            await impersonation.run_as(account, secret.read_text)
        with pytest.raises(PermissionError):
            await impersonation.run_as(account, os.chown, diary, account.uid, 0)
        with pytest.raises(PermissionError):
            await impersonation.run_as(account, os.kill, os.getppid(), 0)
        # access(2) goes by the real id.
        assert not await impersonation.run_as(account, os.access, secret, os.R_OK)
    assert secret.read_text() == "the server's"


async def test_a_program_that_a_function_starts_is_the_account_and_nothing_else(
    users: Users, impersonation: Impersonation
) -> None:
    """A shell ends a difference of real and effective id by taking the real one: that must not be the server's."""

    def start() -> str:
        command = "id -u; id -ru; cat /proc/self/status"
        return subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True).stdout

    effective, real, *status = (await impersonation.run_as(users.alice, start)).splitlines()
    assert (int(effective), int(real)) == (users.alice.uid, users.alice.uid)
    shown = {name: rest.split() for name, _, rest in (line.partition(":") for line in status)}
    assert shown["Uid"] == [str(users.alice.uid)] * 4
    assert shown["Gid"] == [str(users.alice.gid)] * 4
    assert shown["Groups"] == list(map(str, users.alice.groups))
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(shown[kind][0], 16) == 0


async def test_what_a_function_has_the_event_loop_do_is_done_by_the_server(
    users: Users, impersonation: Impersonation
) -> None:
    mine = thread_identity()

    def ask() -> tuple[Identity, Identity]:
        return trio.from_thread.run_sync(thread_identity), thread_identity()

    theirs, own = await impersonation.run_as(users.alice, ask)
    assert theirs == mine
    assert is_account(own, users.alice)


async def test_what_outlives_a_function_is_finalised_by_the_server(users: Users, impersonation: Impersonation) -> None:
    """The documentation warns of it: a temporary directory of the peer's would be removed by root."""
    by: list[Identity] = []

    class Resource:
        def __init__(self) -> None:
            weakref.finalize(self, lambda: by.append(thread_identity()))

    def fail() -> None:
        resource = Resource()  # noqa: F841 - the exception's frame keeps it
        raise ValueError

    mine = thread_identity()
    with suppress(ValueError):
        await impersonation.run_as(users.alice, fail)
    # The worker has let go of it at the latest when it does something else.
    await trio.to_thread.run_sync(int)
    gc.collect()
    assert by == [mine]


# Cancelled, many at once, and the limit


async def test_a_thread_is_never_abandoned_while_it_is_somebody_else(
    users: Users, impersonation: Impersonation
) -> None:
    mine = thread_identity()
    started, release = trio.Event(), threading.Event()
    events: list[str] = []

    def work() -> None:
        trio.from_thread.run_sync(started.set)
        release.wait(30)
        events.append("done" if is_account(thread_identity(), users.alice) else "somebody else")

    async def call(scope: trio.CancelScope) -> None:
        with scope:
            await impersonation.run_as(users.alice, work)
            events.append("returned")
            await trio.lowlevel.checkpoint()
        events.append("cancelled" if scope.cancelled_caught else "not cancelled")

    scope = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, scope)
        await started.wait()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert events == []
        release.set()
    assert events == ["done", "returned", "cancelled"]
    assert await workers_are_themselves(mine)


async def test_a_function_may_ask_whether_its_caller_was_cancelled(users: Users, impersonation: Impersonation) -> None:
    mine = thread_identity()
    started = trio.Event()

    def work() -> None:
        trio.from_thread.run_sync(started.set)
        pause = threading.Event()
        while True:
            trio.from_thread.check_cancelled()
            pause.wait(0.001)

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(impersonation.run_as, users.alice, work)
            await started.wait()
            scope.cancel()
    assert scope.cancelled_caught
    assert await workers_are_themselves(mine)


async def test_two_peers_at_once_while_the_event_loop_goes_on_as_itself(
    users: Users, impersonation: Impersonation
) -> None:
    mine = thread_identity()
    both, looked = threading.Barrier(3), threading.Barrier(3)

    def meet(name: str) -> Identity:
        both.wait(30)
        (users.place / name).write_text("here")
        # Neither leaves before the event loop has looked.
        looked.wait(30)
        return thread_identity()

    found: dict[str, Identity] = {}

    async def call(account: LocalAccount, name: str) -> None:
        found[name] = await impersonation.run_as(account, meet, name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, users.alice, "by alice")
        nursery.start_soon(call, users.bob, "by bob")
        await trio.to_thread.run_sync(both.wait, 30)
        assert thread_identity() == mine
        (users.place / "by the server").write_text("here")
        await trio.to_thread.run_sync(looked.wait, 30)
    assert is_account(found["by alice"], users.alice)
    assert is_account(found["by bob"], users.bob)
    owners = {path.name: path.stat().st_uid for path in users.place.glob("by *")}
    assert owners == {"by alice": users.alice.uid, "by bob": users.bob.uid, "by the server": 0}


async def test_a_thousand_switches_sixteen_at_once_never_touch_the_event_loop(
    users: Users, impersonation: Impersonation
) -> None:
    mine = thread_identity()
    looks = 0
    over = False
    wrong: list[Identity] = []
    at_once, most = itertools.count(), 0
    running: set[int] = set()
    # The first sixteen wait for each other, so that they are sixteen.
    barrier = threading.Barrier(16)

    def look(account: LocalAccount, number: int) -> None:
        nonlocal most
        running.add(number)
        most = max(most, len(running))
        if number < 16:
            barrier.wait(30)
        found = thread_identity()
        if not is_account(found, account):
            wrong.append(found)
        running.discard(number)

    async def watch() -> None:
        nonlocal looks
        while not over:
            looks += 1
            if thread_identity() != mine:
                wrong.append(thread_identity())
            await trio.lowlevel.checkpoint()

    numbers = iter(range(1000))

    async def switch() -> None:
        for number in numbers:
            account = (users.alice, users.bob)[next(at_once) % 2]
            await impersonation.run_as(account, look, account, number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        async with trio.open_nursery() as switches:
            for _ in range(16):
                switches.start_soon(switch)
        over = True
    assert wrong == []
    assert most == 16
    assert looks > 100
    assert next(at_once) == 1000
    assert await workers_are_themselves(mine)


@pytest.mark.parametrize("given", [True, False])
async def test_functions_never_take_a_thread_from_trios_own_limit(
    users: Users, account_map: AccountMap, given: bool
) -> None:
    limiter = trio.CapacityLimiter(1)
    impersonation = Impersonation(account_map, limiter=limiter) if given else Impersonation(account_map)

    def borrowed() -> tuple[int, int]:
        usual = trio.from_thread.run_sync(trio.to_thread.current_default_thread_limiter)
        return limiter.borrowed_tokens, usual.borrowed_tokens

    assert await impersonation.run_as(users.alice, borrowed) == (given, 0)


PEER = PeerIdentity(
    principal="DOM\\alice",
    domain="DOM",
    name="alice",
    mechanism="ntlm",
    flags=ContextFlag(0),
    mutual=False,
    authenticated_at=datetime.now(UTC),
)


class Crowd:
    """More calls than any limit of threads lets run at once, which wait until they are let go."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self._inside: list[int] = []

    def wait(self) -> None:
        self._inside.append(1)
        assert self.released.wait(60)

    async def wait_until_full(self) -> None:
        with trio.fail_after(30):
            while len(self._inside) < 40:
                await trio.lowlevel.checkpoint()
            # Whoever else could go in has done so.
            await trio.testing.wait_all_tasks_blocked()


async def test_slow_functions_keep_nobody_else_from_a_thread(users: Users, impersonation: Impersonation) -> None:
    """Trio has forty for all that waits in threads: logins, the reading of accounts."""
    crowd = Crowd()
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(impersonation.run_as, users.alice, crowd.wait)
        await crowd.wait_until_full()
        with trio.fail_after(30):
            assert await trio.to_thread.run_sync(int) == 0
            assert await impersonation._account(PEER) == users.alice
        crowd.released.set()


async def test_a_directory_server_that_is_silent_keeps_nobody_else_from_a_thread(
    users: Users, impersonation: Impersonation, account_map: AccountMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = Crowd()
    lookup = account_map.lookup

    def hang(peer: PeerIdentity) -> LocalAccount:
        crowd.wait()
        return lookup(peer)

    monkeypatch.setattr(account_map, "lookup", hang)
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(impersonation.run_as_peer, PEER, int)
        await crowd.wait_until_full()
        with trio.fail_after(30):
            assert await trio.to_thread.run_sync(int) == 0
            assert await impersonation.run_as(users.alice, int) == 0
        crowd.released.set()


# What cannot be done


@pytest.mark.parametrize(
    ("change", "call"),
    [({"uid": 0xFFFFFFFF}, "id"), ({"gid": 0xFFFFFFFF}, "id"), ({"groups": (1,) * 65537}, "65537 groups")],
)
async def test_an_account_that_cannot_be_is_an_error_and_the_function_is_not_called(
    users: Users, impersonation: Impersonation, change: dict[str, Any], call: str
) -> None:
    mine = thread_identity()
    account = LocalAccount(**{"name": "nobody's", "uid": 4000, "gid": 4000, "groups": (4000,), **change})
    called: list[bool] = []
    with pytest.raises(ImpersonationError, match=f'cannot become "nobody\'s": .*{call}'):
        await impersonation.run_as(account, called.append, True)
    assert called == []
    assert await workers_are_themselves(mine)


def test_the_kernels_word_is_compared_with_what_was_wanted(users: Users, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that says that it worked is not enough."""
    monkeypatch.setattr(linux, "_ids", Forgetful("set_groups"))
    called: list[bool] = []

    def work() -> None:
        with pytest.raises(ImpersonationError, match=r"cannot become .*: groups \(.*\) instead of \("):
            linux.run_as(users.alice, called.append, (True,))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert called == []


class Forgetful:
    """The extension, with one call that does nothing."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: None) if name == self._name else getattr(_thread_ids, name)


async def test_the_order_of_an_accounts_groups_does_not_matter(users: Users, impersonation: Impersonation) -> None:
    account = dataclasses.replace(users.alice, groups=(*reversed(users.alice.groups), 5000, 4999))
    wanted = tuple(sorted((*users.alice.groups, 5000, 4999)))
    assert await impersonation.run_as(account, _thread_ids.groups) == wanted


def test_a_thread_whose_file_system_ids_are_not_its_effective_ones_is_left_alone(users: Users) -> None:
    errors: list[ImpersonationError] = []

    def work() -> None:
        ctypes.CDLL(None).setfsuid(users.bob.uid)
        try:
            linux.run_as(users.alice, int, ())
        except ImpersonationError as exc:
            errors.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [str(exc) for exc in errors] == ["this thread's file-system ids are not its effective ones"]


# The order of things, and what is done about each failure: with a kernel that is made up


class Gone(BaseException):
    """The process was aborted."""


class Kernel:
    """One thread's credentials, and the calls about them.

    Attributes:
      calls: the setters called, in order.
      fail: a call that is refused from the given time on, counted from 1.
      forget: the same, but it does as if it had worked.
      said: the last words.
    """

    def __init__(self, uid: int = 0, capabilities: int = 0xFF) -> None:
        self.state = Identity((uid,) * 3, (0, 0, 0), (uid, 0), (), (capabilities, capabilities, 0xC0), 0xC0)
        self.calls: list[str] = []
        self.fail = self.forget = ("", 0)
        self.said = b""

    def __getattr__(self, name: str) -> Any:
        if name in Identity._fields:
            return lambda: getattr(self.state, name)
        return lambda *arguments: self._set(name, arguments)

    def _set(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.calls.append(name)
        for fault in (self.fail, self.forget):
            if fault[0] == name and self.calls.count(name) >= fault[1]:
                if fault is self.fail:
                    raise PermissionError(1, "Operation not permitted", name)
                return
        new = self.state
        if name == "set_groups":
            new = new._replace(groups=arguments[0])
        elif name == "set_group_ids":
            new = new._replace(group_ids=arguments, filesystem_ids=(new.filesystem_ids[0], arguments[1]))
        elif name == "set_user_ids":
            new = new._replace(user_ids=arguments, filesystem_ids=(arguments[1], new.filesystem_ids[1]))
        elif name == "set_capabilities":
            new = new._replace(capabilities=arguments, ambient=new.ambient & arguments[2])
        elif name == "raise_ambient":
            new = new._replace(ambient=arguments[0])
        self.state = new

    def thread_id(self) -> int:
        return 4711

    def confine(self, confined: bool) -> None:
        # Not the kernel's business, but Python's.
        _thread_ids.confine(confined)

    def die(self, line: bytes) -> None:
        self.said = line
        raise Gone


SOMEBODY = LocalAccount("somebody", 4000, 4001, (4001, 4002))
THERE = ["set_groups", "set_group_ids", "set_user_ids", "set_capabilities"]
BACK = ["set_capabilities", *THERE, "raise_ambient"]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(linux, "_ids", made)
    return made


def test_groups_go_first_and_the_user_last_and_all_comes_back(kernel: Kernel) -> None:
    before = kernel.state
    found = linux.run_as(SOMEBODY, lambda: (kernel.state, list(kernel.calls)), ())
    assert found == (
        Identity((4000, 4000, 0), (4001, 4001, 0), (4000, 4001), (4001, 4002), (0, 0xFF, 0), 0),
        THERE,
    )
    assert kernel.state == before
    assert kernel.calls == THERE + BACK


@pytest.mark.parametrize("name", THERE)
def test_whatever_fails_on_the_way_there_is_taken_back(kernel: Kernel, name: str) -> None:
    before = kernel.state
    kernel.fail = (name, 1)
    called: list[bool] = []
    # The second time is for the way back, which then has to do without what is lost.
    calls = kernel._set

    def set_once(which: str, arguments: tuple[Any, ...]) -> None:
        try:
            calls(which, arguments)
        finally:
            if which == name:
                kernel.fail = ("", 0)

    kernel._set = set_once  # type: ignore[method-assign]
    with pytest.raises(ImpersonationError, match=f"cannot become 'somebody': .*Operation not permitted: '{name}'"):
        linux.run_as(SOMEBODY, called.append, (True,))
    assert called == []
    assert kernel.state == before
    assert kernel.said == b""
    first = THERE[: THERE.index(name) + 1]
    assert kernel.calls == (first if name == "set_groups" else first + BACK)


@pytest.mark.parametrize("name", THERE)
@pytest.mark.parametrize("how", ["fail", "forget"])
def test_whatever_fails_on_the_way_back_is_the_end(kernel: Kernel, name: str, how: str) -> None:
    setattr(kernel, how, (name, 2))
    with pytest.raises(Gone):
        linux.run_as(SOMEBODY, int, ())
    line = kernel.said.decode()
    assert line.startswith("triosspi: thread 4711 cannot come back from uid 4000: ")
    assert line.endswith("; aborting\n") and line.count("\n") == 1
    assert (f"'{name}'" if how == "fail" else " instead of ") in line


def test_the_last_words_need_nothing_that_may_be_missing(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    kernel.fail = ("set_user_ids", 2)
    monkeypatch.setattr(linux, "_last_words", no_memory)
    with pytest.raises(Gone):
        linux.run_as(SOMEBODY, int, ())
    assert kernel.said == b"triosspi: a thread cannot come back from an impersonation; aborting\n"


def test_who_is_not_root_keeps_his_own_id_as_the_way_back_and_becomes_nobody_special(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel(uid=990)
    monkeypatch.setattr(linux, "_ids", kernel)
    assert linux.run_as(SOMEBODY, lambda: kernel.state.user_ids, ()) == (4000, 4000, 990)
    superuser = LocalAccount("root", 0, 0, (0,))
    with pytest.raises(ConfigurationError, match="'root' is root, which only a server started by root may become"):
        linux.check_account(superuser)
    with pytest.raises(ImpersonationError, match="only a server started by root may become root"):
        linux.run_as(superuser, int, ())
    assert kernel.state.user_ids == (990, 990, 990)


# What is known beforehand


@pytest.mark.parametrize(
    ("capabilities", "missing"),
    [(0, "CAP_SETUID and CAP_SETGID"), (0x80, "CAP_SETGID"), (0xFFFFFFFFFF40, "CAP_SETUID"), (0xC0, None)],
)
def test_the_two_capabilities_are_asked_for_and_no_other(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, capabilities: int, missing: str | None
) -> None:
    # Permitted is not enough, nor to be root.
    kernel.state = kernel.state._replace(capabilities=(capabilities, 0xFF, 0))
    if missing is None:
        linux.check_privileges()
        return
    with pytest.raises(ConfigurationError, match=f"; {missing} is not there: "):
        linux.check_privileges()


@pytest.mark.parametrize("name", THERE)
def test_a_filter_of_system_calls_is_noticed_at_the_start(kernel: Kernel, name: str) -> None:
    kernel.fail = (name, 1)
    with pytest.raises(ConfigurationError, match=rf"cannot work: {name}: Operation not permitted; is there a filter"):
        linux.check_privileges()
    kernel.fail = ("", 0)
    before = kernel.state
    linux.check_privileges()
    assert kernel.state == before


def test_without_the_extension_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "_ids", None)
    with pytest.raises(
        ConfigurationError, match=r"needs the extension triosspi\._thread_ids, which was not built here"
    ):
        Impersonation()


def test_without_a_map_nobody_is_anybody(kernel: Kernel) -> None:
    with pytest.raises(ConfigurationError, match="impersonation needs accounts: give an AccountMap"):
        Impersonation()


def test_a_user_namespace_is_looked_at(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(linux, "_PROC", tmp_path)
    (tmp_path / "setgroups").write_text("deny\n")
    with pytest.raises(ConfigurationError, match="/proc/self/setgroups says 'deny'"):
        linux.check_privileges()
    (tmp_path / "setgroups").write_text("allow\n")
    linux.check_privileges()
    (tmp_path / "uid_map").write_text("         0     100000       1000\n      4000     104000          1\n")
    (tmp_path / "gid_map").write_text("         0     100000       4002\n")
    linux.check_namespace(4000)
    with pytest.raises(ConfigurationError, match=r"has no uid from 4001 on \(/proc/self/uid_map\)"):
        linux.check_namespace(4001)
    with pytest.raises(ConfigurationError, match=r"has the gid 4002, which .* \(/proc/self/gid_map\)"):
        linux.check_account(SOMEBODY)
    (tmp_path / "gid_map").write_text("         0     100000       4003\n")
    linux.check_account(SOMEBODY)
    with pytest.raises(ConfigurationError, match=r"has the uid 4001, which .* \(/proc/self/uid_map\)"):
        linux.check_account(LocalAccount("other", 4001, 4001, (4001,)))


def test_a_thread_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 3_999_999_999)
    assert thread_user_name() == "3999999999"


# No way back

# In a process of its own. The program is given two accounts and says what it does.
ABORTS = """
import os, sys, ctypes, struct, platform
sys.path.insert(0, sys.argv[1])
import trio
import trio.testing
from local_users import LocalAccount
from seccomp import answer
from triosspi import _thread_ids
from triosspi.impersonation import linux

alice, bob = map(LocalAccount.lookup, sys.argv[2:4])
def main():
    {body}

async def run():
    async with trio.open_nursery() as nursery:
        await trio.to_thread.run_sync(linux.run_as, alice, main, ())
        print("came back", flush=True)

try:
    trio.run(run)
finally:
    print("finally", flush=True)
"""


def aborts(users: Users, body: str) -> subprocess.CompletedProcess[str]:
    program = ABORTS.replace("{body}", body)
    return subprocess.run(
        [sys.executable, "-c", program, str(TESTS), users.alice.name, users.bob.name],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment(),
    )


def test_without_a_fault_the_program_of_the_next_tests_comes_back(users: Users) -> None:
    done = aborts(users, "print('impersonated', flush=True)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "impersonated\ncame back\nfinally\n", "")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        # The function gives the way back away.
        ("_thread_ids.set_user_ids(alice.uid, alice.uid, alice.uid)", "PermissionError .*'capset'"),
        ("_thread_ids.set_capabilities(0, 0, 0)", "PermissionError .*'capset'"),
        # The kernel refuses each of the calls.
        ("answer('setgroups', 1)", "PermissionError .*'setgroups'"),
        ("answer('setresgid', 1)", "PermissionError .*'setresgid'"),
        ("answer('setresuid', 1)", "PermissionError .*'setresuid'"),
        ("answer('setresuid', 11)", "BlockingIOError .*'setresuid'"),
        # Or says yes and does nothing: the getters are believed.
        ("answer('setgroups', 0)", r"groups \(.*\) instead of \(.*\)"),
        ("answer('setresgid', 0)", r"group_ids \(\d+, \d+, 0\) instead of \(0, 0, 0\)"),
        ("answer('setresuid', 0)", r"user_ids \(\d+, \d+, 0\) instead of \(0, 0, 0\)"),
        # Nobody can be asked any more.
        ("answer('getresuid', 1)", "PermissionError .*'getresuid'"),
    ],
)
def test_a_thread_that_cannot_come_back_aborts_the_process_in_one_line(users: Users, body: str, why: str) -> None:
    done = aborts(users, body)
    # Not even `finally` is run: it could be anybody's.
    assert (done.returncode, done.stdout) == (-signal.SIGABRT, "")
    pattern = rf"triosspi: thread \d+ cannot come back from uid {users.alice.uid}: ({why}).*; aborting\n"
    assert re.fullmatch(pattern, done.stderr), done.stderr


def test_a_function_that_raises_and_cannot_come_back_aborts_too(users: Users) -> None:
    done = aborts(users, "answer('setresuid', 1); raise ValueError('theirs')")
    assert (done.returncode, done.stdout) == (-signal.SIGABRT, "")
    assert "theirs" not in done.stderr


def test_a_switch_that_never_began_aborts_nobody(users: Users) -> None:
    """Lost privileges are an error for a peer, and not the end of the server for all."""
    body = "pass"
    program = ABORTS.replace("{body}", body).replace(
        "await trio.to_thread.run_sync(linux.run_as, alice, main, ())",
        """answer('setgroups', 1)
        try:
            await trio.to_thread.run_sync(linux.run_as, alice, main, ())
        except Exception as exc:
            print(type(exc).__name__, exc)""",
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(TESTS), users.alice.name, users.bob.name],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ImpersonationError cannot become ")
    assert done.stdout.endswith("'setgroups'\ncame back\nfinally\n")
