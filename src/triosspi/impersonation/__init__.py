"""Running code as the authenticated peer.

A server that has its own power over files must judge each request of each client itself, and errs. One
that takes the client's identity for the request lets the system judge. `Impersonation` is given to a
listener or a channel; then `SSPIChannel.run_as_peer` runs a function as the client that has logged in.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Final, TypeVar, TypeVarTuple, Unpack

import trio

from .. import _server_threads
from .._errors import ConfigurationError, ImpersonationError
from ..security.identity import PeerIdentity
from . import linux, own_thread, windows
from .accounts import DEFAULT_MIN_UID as DEFAULT_MIN_UID
from .accounts import AccountMap as AccountMap
from .accounts import LocalAccount as LocalAccount

_WINDOWS = sys.platform == "win32"

#: So many functions by default, and so many look-ups of accounts: as many as Trio has of worker threads for all else.
_AT_ONCE: Final = 40

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Impersonation:
    r"""Runs functions under other identities, each in a thread of its own; the event loop keeps the server's.

    On Linux the server needs the capabilities CAP_SETUID and CAP_SETGID, as root has them, and a map from
    principals to local accounts. On Windows SSPI does it, and the account is the peer's own.

    What a function may count on: files are opened, made and refused as for the account and all its
    groups, whatever it raises reaches the caller, `trio.from_thread` works, and programs that it starts
    (`subprocess`, `os.posix_spawn`) are the account's (on Windows the server's). Its thread ends with it, and so
    does whatever it has done to that thread.

    What it must not do or expect:

    * It is no sandbox. The function shares memory and open files with the server, and the working
      directory and the umask.
    * Other identities only through here: `os.setuid` and its like change every thread, or end the process.
    * It cannot start threads, nor copies of the process (`os.fork`, and by it `multiprocessing`): they would
      be the account for ever, with the way back in them, perhaps in a pool that others use. Nor can it run an
      event loop, whose worker threads would be the server. Each of these is a `RuntimeError`, on Linux. Threads
      that a library in C starts, and processes of `multiprocessing` that are not forked, cannot be noticed: the
      function must not start them.
    * Work that is handed to another thread is done with that thread's identity, which is the server's: to a
      thread of a pool, by `trio.from_thread`. So is work that is put off: a finaliser of an object that outlives
      the function (a `tempfile.TemporaryDirectory` in the frame of an exception), a generator that is resumed
      later. And a garbage collection while the function runs finalises objects of others as the account.
    * It may be unable to read what the server can: import modules beforehand, and let no logging handler
      open or rotate its file meanwhile.
    * SELinux's domain, AppArmor's profile, the cgroup and the limits stay the server's, as does the
      network: other machines see the server. (Acting as the peer there is delegation.)
    * While it runs, a process of the same account may send a signal to its thread, as to any of the
      account's own: SIGKILL and SIGSTOP are for the whole server.

    If a thread cannot be given the server's identity back, the process writes one line to standard error and
    aborts. It does the same if a worker thread that is about to do the server's own work (read accounts, keys or
    the configuration) has another identity than the process.

    Args:
      accounts: which local account each principal is, on Linux. On Windows None.
      limiter: how many functions may run at once; by default 40, which are this object's own.

    Raises:
      ConfigurationError: it could not work: the privileges are missing, or an account of the map cannot be
          switched to.
    """

    def __init__(self, accounts: AccountMap | None = None, *, limiter: trio.CapacityLimiter | None = None) -> None:
        if _WINDOWS:  # pragma: no cover - not reachable elsewhere
            if accounts is not None:
                raise ConfigurationError("on Windows the account is the peer's own: leave out accounts")
        else:
            linux.check_privileges()
            if accounts is None:
                raise ConfigurationError("impersonation needs accounts: give an AccountMap")
            linux.check_namespace(accounts.min_uid)
            for account in accounts.named:
                linux.check_account(account)
            linux.remember_server()
            _server_threads.ask_first(linux.check_thread)
        self._accounts = accounts
        # Two limiters, and neither is Trio's default one: slow functions and a directory server that does not answer must
        # not keep the server from its threads, nor each other.
        self._limiter = limiter if limiter is not None else trio.CapacityLimiter(_AT_ONCE)
        self._lookups = trio.CapacityLimiter(_AT_ONCE)

    async def run_as_peer(
        self,
        peer: PeerIdentity,
        function: Callable[[Unpack[Ts]], T],
        *args: *Ts,
        native: object | None = None,
    ) -> T:
        """Run ``function(*args)`` in a thread of its own as an authenticated peer. See `SSPIChannel.run_as_peer`.

        Args:
          peer: whose local account the thread becomes.
          function: is called; it is not async.
          args: its arguments.
          native: the system's own security context of the peer, on Windows.

        Raises:
          ImpersonationError: the function was not called: the peer has no account here, or the thread could
              not become it.
        """
        if native is not None:
            return await _server_threads.run_sync(
                own_thread.call, windows.run_as_client, native, function, args, limiter=self._limiter
            )
        return await self.run_as(await self._account(peer), function, *args)

    async def run_as(self, account: LocalAccount, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run ``function(*args)`` in a thread of its own as a local account. Linux only.

        When this is cancelled it still waits for the function's end: a thread is never abandoned while
        it has another identity. A long function may ask `trio.from_thread.check_cancelled`.

        Args:
          account: any, root too: that is not judged here.
          function: is called; it is not async.
          args: its arguments.

        Raises:
          ImpersonationError: there was no thread, or it could not become the account; the function was not called.
        """
        return await _server_threads.run_sync(
            own_thread.call, linux.run_as, account, function, args, limiter=self._limiter
        )

    async def _account(self, peer: PeerIdentity) -> LocalAccount:
        if self._accounts is None:  # pragma: no cover - a Windows without a native context
            raise ImpersonationError("there is no security context to impersonate")
        if (account := self._accounts.cached(peer)) is not None:
            return account
        # As the server, before the switch. If a directory server does not answer, only this call waits, and cancelling it
        # ends the wait.
        lookup = self._accounts.lookup
        return await _server_threads.run_sync(lookup, peer, abandon_on_cancel=True, limiter=self._lookups)


def thread_user_name() -> str:
    """The user name that the calling thread runs under, as Microsoft's sample asks for it while it impersonates."""
    if _WINDOWS:  # pragma: no cover - not reachable elsewhere
        return windows.user_name()
    import pwd  # noqa: PLC0415 - not on Windows

    uid = os.geteuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
