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
# customer is given: counted by single addresses, one machine would be 2^64 sources.
#
# Whatever is remembered is bounded, and the work per call too: an attacker with many addresses would
# otherwise turn the defence into the attack. Counters live as long as the connections that they count,
# so there are never more of them than `max_connections`. Penalties and acquaintances have tables of a fixed size, see
# `penalties` and `acquaintances`.

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Final, Protocol

from .addresses import IPAddress, unmapped
from .penalties import Failure, PenaltyPolicy
from .sources import DropCause, Dropped, SourceLimits, Sources, source_key
from .waiting import Line, Queue, Stage

__all__ = ["Admission", "AdmissionLimits", "Dropped", "Entry"]

#: Seconds in which nobody is dropped for another's sake: the longest round trip, and some time to think. What opens a
#: connection to log in speaks at once; were there more time, attackers who come back at once would always be too young.
PATIENCE: Final = {Stage.SILENT: 0.1, Stage.QUEUED: 1.0, Stage.PARTIAL: 1.0, Stage.CHALLENGED: 1.0}
# Of more that must go, so many go with each call.
_PER_CALL: Final = 32
_UNREAD: Final = (Stage.SILENT, Stage.QUEUED)
_SERVED: Final = (Stage.PARTIAL, Stage.CHALLENGED)


class AdmissionLimits(SourceLimits, Protocol):
    """What is read of the settings."""

    @property
    def max_connections(self) -> int:
        """The most at a time."""

    @property
    def max_unauthenticated(self) -> int:
        """The most that are read and answered before they have logged in."""

    @property
    def max_waiting(self) -> int:
        """The most that wait, unread."""


def _nothing() -> None:
    pass


class Entry:
    """One connection that was admitted. Whoever got it must `close` it in the end, whatever happened.

    After that, and after it was evicted, the other methods do nothing: a late word about a connection that is gone
    must not disturb the counters.

    Attributes:
      stage: how far it is; None: it has logged in.
      busy: it has said all, and waits for us.
      favoured: somebody has logged in from its source before.
      evicted: it was dropped for another's sake, and is to be closed.
      on_turn: called when it may be read and answered.
      on_evicted: called when it is evicted.
    """

    __slots__ = (
        *("_address", "_closed", "_failed", "_ledger"),
        *("busy", "evicted", "favoured", "on_evicted", "on_turn", "stage"),
    )

    def __init__(self, ledger: _Ledger, address: IPAddress | None) -> None:
        self._ledger = ledger
        self._address = address
        self._failed = False
        self._closed = False
        self.stage: Stage | None = None
        self.busy = False
        self.favoured = False
        self.evicted = False
        self.on_turn: Callable[[], object] = _nothing
        self.on_evicted: Callable[[], object] = _nothing

    @property
    def source(self) -> Hashable:
        """What it has in common with others of the same source; whoever is unknown is alone."""
        return self if self._address is None else source_key(self._address)

    @property
    def address(self) -> IPAddress | None:
        """Where it comes from, as far as that is known."""
        return self._address

    @property
    def has_turn(self) -> bool:
        """Whether it may be read and answered."""
        return self.stage is None or self.stage in _SERVED

    def identify(self, address: IPAddress | None) -> None:
        """Tell where the connection really comes from, once a proxy has said so.

        It was counted by no source until now, and may have to wait for its turn again, see `has_turn`. When it is
        refused it still is an entry, to be closed.

        Args:
          address: None leaves the source unknown (the proxy's own client came through a unix socket).

        Raises:
          Dropped: this source may not connect, or not once more.
          ValueError: the source was known already.
        """
        if self._address is not None:
            raise ValueError("the source of this connection is known already")
        if address is None or self._closed:
            return
        address = unmapped(address)
        self._ledger.sources.check(address)
        stage = self._ledger.leave(self)
        self._address, self.busy = address, False
        self._ledger.come(self, Stage.QUEUED if stage in _SERVED else stage)
        self._ledger.serve_next()

    def spoke(self) -> None:
        """Tell that something has come: now it wants to be served."""
        if self.stage is Stage.SILENT and not self._closed:
            self._ledger.move(self, Stage.QUEUED)
            self._ledger.serve_next()

    def answered(self) -> None:
        """Tell that the peer's token was answered: the next word is the peer's."""
        if self.stage in _SERVED and not self._closed:
            self._ledger.move(self, Stage.CHALLENGED)

    def authenticated(self) -> None:
        """Tell that the peer has logged in."""
        if self.stage is not None and not self._closed:
            # They hold what the login needed, and nothing is needed for days.
            self.on_turn = self.on_evicted = _nothing
            self._ledger.settle(self)
            self._ledger.serve_next()

    def failed(self, failure: Failure) -> None:
        """Tell why the peer has not logged in; only the first time counts, and nothing does after a login.

        Args:
          failure: see `PenaltyPolicy`.
        """
        if self.stage is not None and not self._failed and not self._closed:
            self._failed = True
            if self._address is not None:
                self._ledger.sources.penalise(self._address, failure)

    def evict(self) -> None:
        """Drop it for another's sake."""
        if not self.favoured and self.stage is not Stage.QUEUED:
            # Who was queued has said his, and it was we who did not listen.
            self.failed("evicted")
        self.evicted = self._closed = True
        self._ledger.leave(self)
        self.on_evicted()

    def close(self) -> None:
        """Tell that the connection is gone. May be called more than once."""
        if not self._closed:
            self._closed = True
            self._ledger.leave(self)
            self._ledger.serve_next()


class Admission:
    """Decides about newcomers, and counts who is there.

    Each process has its own: N workers admit N times as much.

    Args:
      limits: what is allowed.
      clock: seconds that never go back.
      policy: the sizes of penalties.
    """

    def __init__(
        self, limits: AdmissionLimits, *, clock: Callable[[], float], policy: PenaltyPolicy | None = None
    ) -> None:
        self._ledger = _Ledger(limits, clock, policy or PenaltyPolicy())

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
        """Sources that penalties are remembered of, whether they are refused for it or not."""
        return sum(map(len, self._ledger.sources.penalties.values()))

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
        known = address is not None and ledger.sources.favours(source_key(address))
        excess = self.pending + ledger.established + 1 - limits.max_connections
        ledger.make_room(excess, tuple(Stage), "connections", known=known)
        ledger.make_room(ledger.unread + 1 - limits.max_waiting, _UNREAD, "startups", known=known)
        entry = Entry(ledger, address)
        ledger.come(entry, Stage.SILENT)
        # If one of those who are served has gone for it.
        ledger.serve_next()
        return entry


class _Ledger:
    """Who is there, which an `Admission` shares with its entries.

    Attributes:
      limits: see `Admission`.
      sources: where they come from.
      unread: connections that have not logged in and are not served.
      served: connections that have not logged in and are.
      established: see `Admission`.
    """

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float], policy: PenaltyPolicy) -> None:
        self._clock = clock
        self.limits = limits
        self.sources = Sources(limits, clock, policy)
        self.unread = 0
        self.served = 0
        self.established = 0
        # By whether somebody has logged in from there before.
        self._lines: dict[bool, dict[Stage, Line[Entry]]] = {
            favoured: {stage: Line() for stage in Stage} for favoured in (False, True)
        }
        self._queues: dict[bool, Queue[Entry]] = {favoured: Queue() for favoured in (False, True)}

    def take(self, limits: AdmissionLimits) -> None:
        """Use these limits from now on."""
        self.limits = limits
        self.sources.take(limits)
        for source in self.sources:
            self._resume(source)

    # Coming and going

    def come(self, entry: Entry, stage: Stage | None) -> None:
        """There is one more, of a source that is known or is not."""
        key = entry.source
        entry.favoured = stage is not None and isinstance(key, int) and self.sources.favours(key)
        self.sources.come(key, favoured=entry.favoured)
        self._enter(entry, stage)

    def leave(self, entry: Entry) -> Stage | None:
        """One is gone; returns the stage that it was at."""
        stage = entry.stage
        self._exit(entry)
        self.sources.leave(entry.source, favoured=entry.favoured)
        return stage

    def move(self, entry: Entry, stage: Stage) -> None:
        """One is at another stage."""
        self._exit(entry)
        self._enter(entry, stage)

    def settle(self, entry: Entry) -> None:
        """One has logged in."""
        self._exit(entry)
        self.sources.logged_in(entry.source, favoured=entry.favoured)
        entry.favoured = False
        self._enter(entry, None)

    def _enter(self, entry: Entry, stage: Stage | None) -> None:
        entry.stage = stage
        if stage is None:
            self.established += 1
            return
        self._lines[entry.favoured][stage].add(entry, entry.source, self._clock())
        if stage is Stage.QUEUED:
            self._queues[entry.favoured].add(entry, entry.source)
        self._count(entry.source, stage, 1)

    def _exit(self, entry: Entry) -> None:
        stage = entry.stage
        if stage is None:
            self.established -= 1
            return
        self._lines[entry.favoured][stage].remove(entry, entry.source)
        if stage is Stage.QUEUED:
            self._queues[entry.favoured].remove(entry, entry.source)
        self._count(entry.source, stage, -1)

    def _count(self, source: Hashable, stage: Stage, change: int) -> None:
        if stage in _UNREAD:
            self.unread += change
            return
        self.served += change
        self.sources.served(source, change)
        if change < 0:
            self._resume(source)

    def _resume(self, source: Hashable) -> None:
        for queue in self._queues.values():
            queue.resume(source)

    # Who is dropped, and who is served

    @property
    def queued(self) -> bool:
        """Whether somebody waits to be served."""
        return any(len(lines[Stage.QUEUED]) for lines in self._lines.values())

    def make_room(self, excess: int, stages: tuple[Stage, ...], cause: DropCause, *, known: bool) -> None:
        """Drop so many, at these stages, the first of them first.

        Args:
          excess: may be less than 1: then there is room.
          stages: see above.
          cause: why the newcomer is refused where there is nobody to be dropped.
          known: whether somebody has logged in from where it comes from; then it waits for no silent stranger's `PATIENCE`.

        Raises:
          Dropped: there is nobody, or not enough.
        """
        for _ in range(min(excess, _PER_CALL)):
            victim = self._victim(stages)
            if victim is None and known:
                victim = self._lines[False][Stage.SILENT].first(math.inf)
            if victim is None:
                raise Dropped(cause)
            victim.evict()
        if excess > _PER_CALL:
            # A reload has made it less by far.
            raise Dropped(cause)

    def _victim(self, stages: tuple[Stage, ...]) -> Entry | None:
        now = self._clock()
        for lines in self._lines.values():
            for stage in stages:
                if (victim := lines[stage].first(now - PATIENCE[stage])) is not None:
                    return victim
        return None

    def serve_next(self) -> None:
        """Let those be served for whom there is a place, or can be made."""
        while self.queued:
            victim = None
            if self.served >= self.limits.max_unauthenticated and (victim := self._victim(_SERVED)) is None:
                return
            entry = self._next(newest=victim is not None)
            if entry is None:
                return
            if victim is not None:
                victim.evict()
            self.move(entry, Stage.PARTIAL)
            entry.on_turn()

    def _next(self, *, newest: bool) -> Entry | None:
        may = self.sources.may_be_served
        if (entry := self._queues[True].next(may)) is not None:
            return entry
        if newest and (entry := self._lines[False][Stage.QUEUED].newest(lambda entry: may(entry.source))) is not None:
            return entry
        return self._queues[False].next(may)
