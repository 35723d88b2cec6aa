"""Who may connect, and who goes first: what an attacker can take from a server before he has shown who he is.

Nothing here knows Trio or a socket, and the clock is given: the same calls give the same answers.
"""

# What must hold, whoever connects
# --------------------------------
# A login costs this server a hundred times what it costs whoever fails it, and a connection that says nothing costs a
# descriptor for the length of the handshake's deadline. So what has not logged in has two limits: how many are read and
# answered at a time (`max_unauthenticated`, each with up to a token of 64 KiB in memory), and how many more wait, unread
# (`max_waiting`). Whoever says nothing takes none of the former.
#
# Where there is no room, it is made: whoever has waited longest for nothing but his own next word is dropped, and the
# newcomer comes in. A lottery among newcomers, as OpenSSH's MaxStartups, refuses honest ones as often as attackers, and
# a hard limit only honest ones; but an honest client speaks within a round trip, and who sits there does not. Who has
# said nothing goes first, then who waits unread, then who has sent a part of a token (one byte a second protects
# nobody), then who owes an answer to our challenge. Nobody is dropped within `PATIENCE`, so that an honest client has
# the time of its round trip even when attackers come back as fast as they are dropped; nor while he waits for us.
#
# Whoever is served gives up the place in a moment, if all are honest; then those who wait follow in the order in which
# they came. Where a place is free only because somebody was dropped who sat on it, there are attackers, and those who
# wait are theirs, mostly, and will wait for longer than an honest client does: then the last who came is the first.
#
# A source that somebody has logged in from before is let in and served before all others, and dropped after them. That
# holds for some of its connections at a time: there may be an attacker behind the same NAT.
#
# One source must not be able to use all of it up. Of one, so many are served at a time, and the rest waits its turn; the
# sources have turns, one each; the source that has the most is the first to give one up. And penalties are for logins
# that failed, as OpenSSH's PerSourcePenalties. A source is an IPv4 address or an IPv6 /64, which is the least that a
# customer is given: counted by single addresses, one machine would be 2^64 sources. See `sources`. Whose account is guessed
# at from many sources is the affair of `principals`.
#
# Whatever is remembered is bounded, and the work per call too: an attacker with many addresses would
# otherwise turn the defence into the attack. Counters live as long as the connections that they count,
# so there are never more of them than `max_connections`. All else has tables of a fixed size, which the processes of a
# server share, see `shared`.

from __future__ import annotations

from collections.abc import Callable

from .addresses import IPAddress, unmapped
from .ledger import PATIENCE, UNREAD, AdmissionLimits, Entry, Ledger
from .penalties import PenaltyPolicy
from .shared import Tables
from .sources import Dropped
from .waiting import Stage

__all__ = ["PATIENCE", "Admission", "AdmissionLimits", "Dropped", "Entry"]


class Admission:
    """Decides about newcomers, and counts who is there.

    Each process has its own; what they know of sources and principals they know together, if they are given the same tables.

    Args:
      limits: what is allowed.
      clock: seconds that never go back.
      policy: the sizes of penalties.
      tables: what is shared with other processes; None: nothing.
    """

    def __init__(
        self,
        limits: AdmissionLimits,
        *,
        clock: Callable[[], float],
        policy: PenaltyPolicy | None = None,
        tables: Tables | None = None,
    ) -> None:
        self._ledger = Ledger(limits, clock, policy or PenaltyPolicy(), tables or Tables.alone())

    def reconfigure(self, limits: AdmissionLimits) -> None:
        """Take other limits for who comes from now on; nobody who is there is sent away.

        Penalties stand, unless they are switched off: then they are forgotten.
        """
        self._ledger.take(limits)
        self._ledger.serve_next()

    @property
    def pending(self) -> int:
        """Connections that have not logged in."""
        return self._ledger.unread + self._ledger.served

    @property
    def established(self) -> int:
        """Connections that have logged in."""
        return self._ledger.established

    @property
    def queued(self) -> bool:
        """Whether somebody waits to be served: then `advance` must be called from time to time."""
        return self._ledger.queued

    @property
    def penalised(self) -> int:
        """Sources that penalties are remembered of, whether they are refused for it or not; for tests."""
        return self._ledger.sources.penalised

    def advance(self) -> None:
        """Let time do its work: who sits among those who are served makes room when ours is over, see `PATIENCE`."""
        self._ledger.serve_next()

    def admit(self, address: IPAddress | None) -> Entry:
        """Let a newcomer in, if need be by dropping another.

        Args:
          address: where it connects from; None for a unix socket, or for a proxy that has not yet said
            whom it speaks for. Such a connection is only under the caps on all.

        Raises:
          Dropped: it may not be.
        """
        ledger = self._ledger
        limits = ledger.limits
        if address is not None:
            address = unmapped(address)
            ledger.sources.check(address)
        known = address is not None and ledger.sources.favours(ledger.sources.key(address))
        excess = self.pending + ledger.established + 1 - limits.max_connections
        ledger.make_room(excess, tuple(Stage), "connections", known=known)
        ledger.make_room(ledger.unread + 1 - limits.max_waiting, UNREAD, "startups", known=known)
        entry = Entry(ledger, address)
        if address is not None:
            entry.source = ledger.sources.key(address)
        ledger.come(entry, Stage.SILENT)
        # If one of those who are served has gone for it.
        ledger.serve_next()
        return entry
