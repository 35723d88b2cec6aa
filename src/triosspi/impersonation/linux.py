"""One thread as somebody else, and back again; Linux."""

# What must hold: while the function runs its thread is the local account and has nothing left of the server's
# power; afterwards it is exactly what it was, or the process is no more; nobody else notices. The event loop's
# thread and the other workers are who they are all the time, since `_thread_ids` concerns its own thread alone.
#
# Which of the three user ids is what, and why:
#
# * The effective one becomes the account's, and the file-system one follows it: these decide about files.
# * The real one becomes the account's too. Were it still the server's, a program that the function starts would
#   begin as that mixture, and `sh` ends the mixture by taking the real one for good: it would run as root. The price:
#   whoever has a process of his own on this machine under that account may send a signal to the thread while it
#   is he, also SIGKILL or SIGSTOP, which are the whole process's.
# * The saved one stays the server's. It is the way back. No program inherits it (execve takes the effective one
#   for it), and it, and that the process is not "dumpable", is what keeps the account's processes from tracing the
#   thread or looking at its memory. (The kernel makes a process undumpable when an effective id changes; it is left
#   so, since what would be dumped is a server's memory with keys in it.)
#
# Group ids alike. Groups are set first and the user last, since root may set groups and the account may not; they are
# taken back in the same order, when the capabilities have been.
#
# Capabilities. When root leaves the effective id, the kernel empties the effective set, and fills it on the return.
# A server that has CAP_SETUID and CAP_SETGID without being root keeps them through every change of ids, so it is
# done by hand, for both alike: the effective set is emptied and so is the inheritable one, of which programs would
# inherit (the ambient ones go with it). The permitted set stays, as without it there is no way back. For an account
# that is root the effective set stays what it was.
#
# A way back that does not work ends the process, at once: there would be a thread with the way back in it that is
# somebody else. "Works" means that the getters say so, not that the calls said nothing. The same end has a worker thread
# that is found to be somebody else before it does the server's own work: where one is there may be more, and whose errands
# they have done nobody knows. (How it could come to be one, and why it cannot: `confinement`.)
#
# What is not changed, since the process shares it: the working directory, the umask, open files, the memory. This is no
# sandbox. Nor is the garbage collector: it may run on this thread as on any other, and what it finalises then, whoever's it
# was, is finalised as the account. (Turned off meanwhile, a function that hangs would have the whole process grow.)

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple, TypeVar

from .._errors import ConfigurationError, ImpersonationError, printable
from . import confinement
from .accounts import LocalAccount

_ids: ModuleType | None
try:
    from .. import _thread_ids as _ids
except ImportError:  # pragma: no cover - another system than Linux, or no compiler
    _ids = None

T = TypeVar("T")

# capability.h: bits of the effective set.
_CAP_SETGID: Final = 1 << 6
_CAP_SETUID: Final = 1 << 7
_NEEDED: Final = {"CAP_SETUID": _CAP_SETUID, "CAP_SETGID": _CAP_SETGID}

_PROC: Final = Path("/proc/self")

Triple = tuple[int, int, int]


class Identity(NamedTuple):
    """All that one thread is to the kernel.

    Attributes:
      user_ids: real, effective, saved.
      group_ids: real, effective, saved.
      filesystem_ids: user and group.
      groups: the supplementary ones, ascending.
      capabilities: effective, permitted, inheritable, as bits.
      ambient: the ambient capabilities, as bits.
    """

    user_ids: Triple
    group_ids: Triple
    filesystem_ids: tuple[int, int]
    groups: tuple[int, ...]
    capabilities: Triple
    ambient: int


def _native() -> ModuleType:
    if _ids is None:
        raise ConfigurationError("impersonation needs the extension triosspi._thread_ids, which was not built here")
    return _ids


def thread_identity() -> Identity:
    """The calling thread, by the kernel's own word."""
    ids = _native()
    capabilities = ids.capabilities()
    return Identity(
        ids.user_ids(),
        ids.group_ids(),
        ids.filesystem_ids(),
        ids.groups(),
        capabilities,
        # Forty calls, and there are none but among the inheritable ones.
        ids.ambient() if capabilities[2] else 0,
    )


# Where it can be known beforehand that it would not work


def check_privileges() -> None:
    """See that this thread, and so those that it starts, may become somebody else.

    Raises:
      ConfigurationError: it may not.
    """
    effective = thread_identity().capabilities[0]
    missing = [name for name, bit in _NEEDED.items() if not effective & bit]
    if missing:
        raise ConfigurationError(
            f"impersonation needs the capabilities CAP_SETUID and CAP_SETGID; {' and '.join(missing)} "
            "is not there: run as root, or better as a user with these two (systemd: AmbientCapabilities=)"
        )
    try:
        denied = (_PROC / "setgroups").read_text(encoding="ascii").strip() == "deny"
    except OSError:  # pragma: no cover - a kernel without user namespaces
        denied = False
    if denied:
        raise ConfigurationError("impersonation cannot work in this user namespace: /proc/self/setgroups says 'deny'")
    _rehearse()


def _rehearse() -> None:
    """Make each of the calls once, with what is already so, since a filter of system calls may refuse them.

    Raises:
      ConfigurationError: one is refused, or a confined thread is not.
    """
    refused: list[OSError | ConfigurationError] = []

    def work() -> None:
        try:
            _set(thread_identity())
            confinement.rehearse(_native())
        except (OSError, ConfigurationError) as exc:
            refused.append(exc)

    # Not on a thread that anybody needs.
    thread = threading.Thread(target=work, name="triosspi rehearsal")
    thread.start()
    thread.join()
    for exc in refused:
        if isinstance(exc, ConfigurationError):
            raise exc
        raise ConfigurationError(
            f"impersonation cannot work: {exc.filename}: {exc.strerror}; "
            "is there a filter of system calls (systemd: SystemCallFilter=, or a container's)?"
        )


def _ranges(kind: str) -> list[range]:
    """The ids that there are in this user namespace."""
    try:
        text = (_PROC / f"{kind}_map").read_text(encoding="ascii")
    except OSError:  # pragma: no cover - a kernel without user namespaces
        return [range(1 << 32)]
    return [range(int(first), int(first) + int(count)) for first, _, count in map(str.split, text.splitlines())]


def check_account(account: LocalAccount) -> None:
    """See that an account can be switched to from here.

    Raises:
      ConfigurationError: it cannot.
    """
    name = printable(account.name)
    if account.uid == 0 and 0 not in thread_identity().user_ids:
        raise ConfigurationError(f"the local account {name} is root, which only a server started by root may become")
    for kind, ids in (("uid", (account.uid,)), ("gid", (account.gid, *account.groups))):
        known = _ranges(kind)
        for number in ids:
            if not any(number in some for some in known):
                raise ConfigurationError(
                    f"the local account {name} has the {kind} {number}, which this user namespace does not have "
                    f"(/proc/self/{kind}_map)"
                )


def check_namespace(min_uid: int) -> None:
    """See that there is anybody at all from a uid on.

    Raises:
      ConfigurationError: there is nobody.
    """
    if not any(some[-1] >= min_uid for some in _ranges("uid") if some):
        raise ConfigurationError(f"this user namespace has no uid from {min_uid} on (/proc/self/uid_map)")


# Who the server is

#: What makes a thread somebody, without what it may: ids of users, groups and the file system, and the groups.
_Who = tuple[Triple, Triple, tuple[int, int], tuple[int, ...]]
_server: _Who | None = None


def _who() -> _Who:
    ids = _native()
    return ids.user_ids(), ids.group_ids(), ids.filesystem_ids(), ids.groups()


def _main_thread() -> _Who | None:
    """The process's first thread, which is nobody else ever; None where the kernel's account of it is not to be had."""
    try:
        text = (_PROC / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = {name: rest.split() for name, _, rest in (line.partition(":") for line in text.splitlines())}
    # Real, effective, saved, file system.
    (ru, eu, su, fu), (rg, eg, sg, fg) = (map(int, fields[name]) for name in ("Uid", "Gid"))
    return (ru, eu, su), (rg, eg, sg), (fu, fg), tuple(map(int, fields["Groups"]))


def remember_server() -> None:
    """Take the calling thread for the server from now on; see `check_thread`.

    Raises:
      ConfigurationError: it is somebody else than the process.
    """
    global _server  # noqa: PLW0603 - a process is one server
    who, main = _who(), _main_thread()
    if main not in (who, None):
        raise ConfigurationError(f"this thread is {_describe(who)}, and the process is {_describe(main)}")
    _server = who


def check_thread() -> None:
    """See that the calling thread is the server, or end the process: in a few microseconds, if it is.

    A process that has changed as a whole, by `os.setuid` or in a child of `os.fork`, is the server still.
    """
    global _server  # noqa: PLW0603 - the same
    ids = _native()
    line = b"triosspi: a worker thread of which nobody knows who it is; aborting\n"
    with suppress(Exception):
        who = _who()
        if who == _server:
            return
        main = _main_thread()
        if who == main:
            _server = who
            return
        line = f"triosspi: a worker thread is {_describe(who)} instead of {_describe(main)}; aborting\n".encode()
    ids.die(line)


def _describe(who: _Who | None) -> str:
    return "the server" if who is None else f"uid {who[0][1]}, gid {who[1][1]}, groups {list(who[3])}"


# There, and back again


def run_as(account: LocalAccount, function: Callable[..., T], args: tuple[Any, ...]) -> T:
    """Call a function as a local account. On a thread that nobody else uses, which is the account meanwhile.

    Raises:
      ImpersonationError: the thread could not become the account; the function was not called.
    """
    before = thread_identity()
    if before.filesystem_ids != (before.user_ids[1], before.group_ids[1]):
        # The way back would not lead there.
        raise ImpersonationError("this thread's file-system ids are not its effective ones")
    with _confined():
        try:
            _become(account, before)
            return function(*args)
        finally:
            _come_back(before, account)


@contextmanager
def _confined() -> Iterator[None]:
    ids = _native()
    ids.confine(True)
    try:
        yield
    finally:
        ids.confine(False)


def _set(wanted: Identity) -> None:
    ids = _native()
    ids.set_groups(wanted.groups)
    ids.set_group_ids(*wanted.group_ids)
    ids.set_user_ids(*wanted.user_ids)
    ids.set_capabilities(*wanted.capabilities)


def _become(account: LocalAccount, before: Identity) -> None:
    # To root only by root: whoever has no root id loses every capability when he leaves root's again.
    root = 0 in before.user_ids
    if account.uid == 0 and not root:
        raise ImpersonationError("only a server started by root may become root")
    effective, permitted, inheritable = before.capabilities
    wanted = Identity(
        # While one of the three is root's, the kernel leaves the permitted capabilities alone.
        user_ids=(account.uid, account.uid, 0 if root else before.user_ids[1]),
        group_ids=(account.gid, account.gid, before.group_ids[1]),
        filesystem_ids=(account.uid, account.gid),
        # In the kernel's order, as it will tell them.
        groups=tuple(sorted(account.groups)),
        # What is inheritable without being permitted could not be taken back, and gives nobody anything.
        capabilities=(effective if account.uid == 0 else 0, permitted, inheritable & ~permitted),
        ambient=0,
    )
    try:
        _set(wanted)
    except (OSError, ValueError, OverflowError) as exc:
        raise ImpersonationError(f"cannot become {printable(account.name)}: {exc}") from None
    found = thread_identity()
    if found != wanted:
        raise ImpersonationError(f"cannot become {printable(account.name)}: {_differences(wanted, found)}")


def _come_back(before: Identity, account: LocalAccount) -> None:
    ids = _native()
    line = b"triosspi: a thread cannot come back from an impersonation; aborting\n"
    try:
        why = _restore(before)
        if not why:
            return
        line = _last_words(account, why)
    except BaseException as exc:  # noqa: BLE001 - whatever it is, the thread is not what it was
        with suppress(BaseException):
            line = _last_words(account, f"{type(exc).__name__} {exc}")
    ids.die(line)


def _restore(before: Identity) -> str:
    """Undo; returns what is still not as it was."""
    ids = _native()
    if thread_identity() == before:
        # Not even the first call was allowed; then none here would be, and there is nothing to undo.
        return ""
    # Permitted they still are. Without them there is neither CAP_SETGID nor CAP_SETUID.
    ids.set_capabilities(*before.capabilities)
    # To become root again is to get all of the permitted ones, so they are set again.
    _set(before)
    if before.ambient:
        ids.raise_ambient(before.ambient)
    after = thread_identity()
    return "" if after == before else _differences(before, after)


def _last_words(account: LocalAccount, why: str) -> bytes:
    line = f"triosspi: thread {_native().thread_id()} cannot come back from uid {account.uid}: {why}; aborting"
    return f"{' '.join(line.split())}\n".encode(errors="backslashreplace")


def _differences(wanted: Identity, found: Identity) -> str:
    return ", ".join(
        f"{name} {there} instead of {here}"
        for name, here, there in zip(Identity._fields, wanted, found, strict=True)
        if here != there
    )
