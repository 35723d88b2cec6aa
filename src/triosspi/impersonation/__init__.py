"""Running code as the authenticated peer.

A server that has its own power over files must judge each request of each client itself, and errs. One
that takes the client's identity for the request lets the system judge. `Impersonation` is given to a
listener or a channel; then `SSPIChannel.run_as_peer` runs a function as whoever has logged in.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple, Unpack

import trio

from .._errors import ConfigurationError, ImpersonationError
from ..security.identity import PeerIdentity
from . import linux, windows
from .accounts import DEFAULT_MIN_UID as DEFAULT_MIN_UID
from .accounts import AccountMap as AccountMap
from .accounts import LocalAccount as LocalAccount

_WINDOWS = sys.platform == "win32"

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Impersonation:
    r"""Runs functions under other identities, each in a worker thread, while the event loop stays who it is.

    On Linux the server needs the capabilities CAP_SETUID and CAP_SETGID, as root has them, and a map from
    principals to local accounts. On Windows SSPI does it, and the peer becomes himself.

    What a function may count on: files are opened, made and refused as for the account and all its
    groups, whatever it raises reaches the caller, and programs that it starts are the account's (on Windows
    the server's). What it must not do or expect:

    * It is no sandbox. The function shares memory and open files with the server, and the working
      directory and the umask.
    * Other identities only through here: `os.setuid` and its like change every thread, or end the process.
    * A thread that it starts is the account, and stays so when the function has returned; the way back is in
      it, so it had better be no other's code.
    * What is put off is done by the server: a finaliser of an object that outlives the function (a
      `tempfile.TemporaryDirectory` in the frame of an exception), a generator, whatever it has
      `trio.from_thread` run. And a garbage collection while the function runs finalises others' objects as
      the account.
    * It may be unable to read what the server can: import modules beforehand, and let no logging handler
      open or rotate its file meanwhile.
    * SELinux's domain, AppArmor's profile, the cgroup and the limits stay the server's, as does the
      network: whoever is asked over it sees the server. (Acting as the peer there is delegation.)
    * While it runs, a process of the same account may send a signal to its thread, as to any of the
      account's own: SIGKILL and SIGSTOP are for the whole server.

    Should a thread not find back to what it was, the process writes one line to standard error and aborts.

    Args:
      accounts: who is whom, on Linux. On Windows None.
      limiter: how many functions may run at once; by default Trio's own limit for all worker threads.

    Raises:
      ConfigurationError: it could not work: the privileges are missing, or an account of the map cannot be
          switched to.
    """

    def __init__(self, accounts: AccountMap | None = None, *, limiter: trio.CapacityLimiter | None = None) -> None:
        if _WINDOWS:  # pragma: no cover - not reachable elsewhere
            if accounts is not None:
                raise ConfigurationError("on Windows the peer becomes himself: leave out accounts")
        else:
            linux.check_privileges()
            if accounts is None:
                raise ConfigurationError("impersonation needs accounts: give an AccountMap")
            linux.check_namespace(accounts.min_uid)
            for account in accounts.named:
                linux.check_account(account)
        self._accounts = accounts
        self._limiter = limiter

    async def run_as_peer(
        self,
        peer: PeerIdentity,
        function: Callable[[Unpack[Ts]], T],
        *args: *Ts,
        native: object | None = None,
    ) -> T:
        """Run ``function(*args)`` in a worker thread as an authenticated peer. See `SSPIChannel.run_as_peer`.

        Args:
          peer: who.
          function: is called; it is not async.
          args: its arguments.
          native: the system's own security context of the peer, on Windows.

        Raises:
          ImpersonationError: the function was not called: the peer has no account here, or the thread could
              not become it.
        """
        if native is not None:
            return await trio.to_thread.run_sync(
                windows.run_as_client, native, function, args, abandon_on_cancel=False, limiter=self._limiter
            )
        return await self.run_as(await self._account(peer), function, *args)

    async def run_as(self, account: LocalAccount, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run ``function(*args)`` in a worker thread as a local account. Linux only.

        When this is cancelled it still waits for the function's end: a thread is never abandoned while
        it is somebody else. A long function may ask `trio.from_thread.check_cancelled`.

        Args:
          account: who. It is not judged: root is as good as any.
          function: is called; it is not async.
          args: its arguments.

        Raises:
          ImpersonationError: the thread could not become the account; the function was not called.
        """
        return await trio.to_thread.run_sync(
            linux.run_as, account, function, args, abandon_on_cancel=False, limiter=self._limiter
        )

    async def _account(self, peer: PeerIdentity) -> LocalAccount:
        if self._accounts is None:  # pragma: no cover - a Windows without a native context
            raise ImpersonationError("there is no security context to impersonate")
        if (account := self._accounts.cached(peer)) is not None:
            return account
        # As the server, and before the switch. A directory server that does not answer holds up nobody else,
        # and whoever is cancelled no longer than that.
        return await trio.to_thread.run_sync(self._accounts.lookup, peer, abandon_on_cancel=True, limiter=self._limiter)


def thread_user_name() -> str:
    """The name of whom the calling thread is, as SSPI's sample asks for it while it impersonates."""
    if _WINDOWS:  # pragma: no cover - not reachable elsewhere
        return windows.user_name()
    import pwd  # noqa: PLC0415 - not on Windows

    uid = os.geteuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
