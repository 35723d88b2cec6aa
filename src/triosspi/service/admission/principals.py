"""Principals, whatever the source: how many sessions each has, and how many failed logins."""

# An account that is guessed at from ten thousand addresses is not protected by what is held against addresses. Locking it
# would do the attackers' work. So, once so many logins by NTLM have failed, only those are looked at that come from where
# that account has logged in before; a stranger's is refused like a wrong password, on the wire and for the penalties, right
# or wrong. That ends by itself when the failures become fewer.
#
# What is remembered is a hash in a table of a fixed size, of accounts that exist and of names that do not alike: neither
# the time nor the answer tells them apart, and made-up names take no more memory.

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final

from ..config.settings import Limits
from .penalties import Penalties
from .sources import KnownSources
from .tables import Tables

#: Seconds in which as many failures as are allowed are forgotten.
WINDOW: Final = 600.0


class Principals:
    """All principals, by name.

    Args:
      limits: what is allowed.
      clock: seconds that never go back, the same for all who share the tables.
      tables: what is shared with other processes.
      known: where sources are remembered.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float], tables: Tables, known: KnownSources) -> None:
        self.limits = limits
        self._clock = clock
        self._tables = tables
        self._failures = Penalties(tables.failures, tables.hash, 2 * WINDOW)
        self._known = known
        # This process's own.
        self._sessions: dict[str, int] = {}

    def failed(self, name: str) -> None:
        """A login as this account has failed, whether it exists or not."""
        most = self.limits.max_failures_per_principal
        if most is not None:
            self._failures.add(_key(b"f", name), WINDOW / most, self._clock(), WINDOW)

    def looks_at(self, name: str, source: Hashable) -> bool:
        """Whether a login as this account that has succeeded may count, coming from there."""
        most = self.limits.max_failures_per_principal
        if most is None:
            return True
        # Each failure is remembered for its part of the window: there is room for one more, or there is not.
        if self._failures.left(_key(b"f", name), self._clock()) <= WINDOW - WINDOW / most:
            return True
        return self._known.knows(_key(b"a", name, source))

    def may_have_more(self, name: str) -> bool:
        """Whether there may be one more session of this principal."""
        most = self.limits.max_sessions_per_principal
        if most is None:
            return True
        others, _ = self._tables.others(_key(b"s", name))
        return self._sessions.get(name, 0) + others < most

    def come(self, name: str, source: Hashable) -> None:
        """It has logged in."""
        self._known.remember(_key(b"a", name, source))
        self._count(name, 1)

    def leave(self, name: str) -> None:
        """One of its sessions has ended."""
        self._count(name, -1)

    def _count(self, name: str, change: int) -> None:
        number = self._sessions.get(name, 0) + change
        if number:
            self._sessions[name] = number
        else:
            del self._sessions[name]
        self._tables.publish(_key(b"s", name), number)


def _key(kind: bytes, name: str, source: Hashable = None) -> bytes:
    # Of sources that are not known, each is a stranger but the first: they have no name of their own.
    where = str(source) if isinstance(source, int) else "-"
    return b"\0".join((kind, where.encode(), name.encode("utf-8", "surrogatepass")))
