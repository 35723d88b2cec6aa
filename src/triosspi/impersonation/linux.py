"""One thread with a local account's credentials, and back again; Linux."""

# What must hold: while the function runs, its thread has the local account's credentials and nothing left of the server's
# power; afterwards it has exactly what it had before, or the process is aborted. No other thread is affected, neither the
# event loop's nor other workers': the system calls of `_thread_ids` are about the calling thread alone.
#
# Which of the three user ids is what, and why:
#
# * The effective one becomes the account's, and the file-system one follows it: these decide about files.
# * The real one becomes the account's too. Were it still the server's, a program that the function starts would
#   begin as that mixture, and `sh` ends the mixture by taking the real one for good: it would run as root. The price:
#   other processes of that account on this machine may send signals to the thread meanwhile, also SIGKILL and SIGSTOP,
#   which act on the whole process.
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
# If the way back fails, the process is aborted at once: it would have a thread with foreign credentials that can still
# become the server. Whether it has failed is asked of the kernel afterwards; that the calls reported no error is not enough.
# The process is aborted, too, when a worker thread is found with foreign credentials before it does the server's own work:
# there may be more such threads, and what they have done already cannot be known. (How that could happen, and what prevents
# it: `confinement`.)
#
# What is not changed, since all threads share it: the working directory, the umask, open files, the memory. This is no
# sandbox. The garbage collector is not changed either: it may run on this thread as on any other, and then finalises objects
# of others as the account. (Were it turned off meanwhile, the whole process would grow while a function hangs.)

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
    """A thread's credentials, as the kernel has them.

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
    """The calling thread's credentials, asked of the kernel."""
    ids = _native()
    capabilities = ids.capabilities()
    return Identity(
        ids.user_ids(),
        ids.group_ids(),
        ids.filesystem_ids(),
        ids.groups(),
        capabilities,
        # Forty system calls; and ambient capabilities are always inheritable ones.
        ids.ambient() if capabilities[2] else 0,
    )


# Where it can be known beforehand that it would not work


def check_privileges() -> None:
    """See that this thread, and so those that it starts, may change its credentials.

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

    # On a thread of its own: if it cannot be undone, only that thread is lost.
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
    """See that there are uids from this one on.

    Raises:
      ConfigurationError: there are none.
    """
    if not any(some[-1] >= min_uid for some in _ranges("uid") if some):
        raise ConfigurationError(f"this user namespace has no uid from {min_uid} on (/proc/self/uid_map)")


# The server's own credentials

#: A thread's credentials without its capabilities: ids of users, groups and the file system, and the groups.
_Who = tuple[Triple, Triple, tuple[int, int], tuple[int, ...]]
_server: _Who | None = None


def _who() -> _Who:
    ids = _native()
    return ids.user_ids(), ids.group_ids(), ids.filesystem_ids(), ids.groups()


def _main_thread() -> _Who | None:
    """The credentials of the process's first thread, which never impersonates; None where /proc does not tell."""
    try:
        text = (_PROC / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = {name: rest.split() for name, _, rest in (line.partition(":") for line in text.splitlines())}
    # Real, effective, saved, file system.
    (ru, eu, su, fu), (rg, eg, sg, fg) = (map(int, fields[name]) for name in ("Uid", "Gid"))
    return (ru, eu, su), (rg, eg, sg), (fu, fg), tuple(map(int, fields["Groups"]))


def remember_server() -> None:
    """Take the calling thread's credentials for the server's from now on; see `check_thread`.

    Raises:
      ConfigurationError: they are not those of the process.
    """
    global _server  # noqa: PLW0603 - a process is one server
    who, main = _who(), _main_thread()
    if main not in (who, None):
        raise ConfigurationError(f"this thread is {_describe(who)}, and the process is {_describe(main)}")
    _server = who


def check_thread() -> None:
    """See that the calling thread has the server's credentials, or abort the process. Takes a few microseconds.

    A process that has changed its credentials as a whole, by `os.setuid` or in a child of `os.fork`, is the server still.
    """
    global _server  # noqa: PLW0603 - the same
    ids = _native()
    line = b"triosspi: a worker thread whose credentials cannot be read; aborting\n"
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
    """Call a function as a local account, on the calling thread, which must be used by nothing else.

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
    # Only a server with a root id may become root: leaving root again would take every capability from any other.
    root = 0 in before.user_ids
    if account.uid == 0 and not root:
        raise ImpersonationError("only a server started by root may become root")
    effective, permitted, inheritable = before.capabilities
    wanted = Identity(
        # While one of the three is root's, the kernel leaves the permitted capabilities alone.
        user_ids=(account.uid, account.uid, 0 if root else before.user_ids[1]),
        group_ids=(account.gid, account.gid, before.group_ids[1]),
        filesystem_ids=(account.uid, account.gid),
        # In the order in which the kernel returns them.
        groups=tuple(sorted(account.groups)),
        # An inheritable capability that is not permitted could not be set again later, and has no effect.
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
    # They are still permitted. They come first, since the calls below need CAP_SETGID and CAP_SETUID.
    ids.set_capabilities(*before.capabilities)
    # Becoming root again makes all permitted capabilities effective, so `_set` sets them once more.
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
