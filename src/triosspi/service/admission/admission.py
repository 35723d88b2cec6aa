"""Which connections are let in before their login, and which go first: what an attacker can take without a password.

Nothing here knows Trio or a socket, and the clock is given: the same calls give the same answers.
"""

# What must hold, against any client
# ----------------------------------
# A failed login costs this server a hundred times what it costs the attacker, and a connection that says nothing costs a
# descriptor until the handshake's deadline. So connections that have not logged in have two limits: how many are read and
# answered at a time (`max_unauthenticated`, each with up to a token of 64 KiB in memory), and how many more wait, unread
# (`max_waiting`). A silent connection takes none of the former.
#
# Where there is no room, it is made: the connection that has waited longest for its own client's next word is dropped, and
# the newcomer is let in. A lottery among newcomers, as OpenSSH's MaxStartups, refuses honest clients as often as attackers,
# and a hard limit refuses only honest ones; but an honest client speaks within a round trip, and an attacker's idle
# connection does not. Silent connections go first, then those that wait unread, then those that have sent a part of a
# token (so one byte a second protects none of them), then those that owe an answer to our challenge. None is dropped within
# `PATIENCE`, so that an honest client has its round trip even when attackers come back as fast as they are dropped; and
# none while it waits for us.
#
# If all clients are honest, a place is free again in a moment; then those that wait follow in the order in which they
# came. If a place is free only because an idle connection was dropped, there are attackers; most of those that wait are
# theirs, and wait for longer than an honest client does: then the last that came is served first.
#
# A source with an earlier successful login is let in and served before all others, and dropped after them. That holds for
# a few of its connections at a time: there may be an attacker behind the same NAT.
#
# One source must not be able to use up everything. Of each source, a limited number is served at a time, and the rest waits
# its turn; sources take turns; the source with the most connections is the first to lose one. And penalties are for failed
# logins, as OpenSSH's PerSourcePenalties. A source is an IPv4 address or an IPv6 /64, which is the least that a
# customer is given: counted by single addresses, one machine would be 2^64 sources. See `sources`. Guessing at one account
# from many sources is the subject of `principals`.
#
# Whatever is remembered is bounded, and the work per call too: otherwise an attacker with many addresses would
# turn the defence into the attack. Counters live as long as the connections that they count, so there are never more of
# them than `max_connections`. All else has tables of a fixed size, which the processes of a server share, see `tables`.

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Final, Literal

from ..config.settings import Limits
from ..network.addresses import IPAddress, unmapped
from .penalties import Failure, PenaltyPolicy
from .principals import Principals
from .sources import DropCause, Dropped, Sources
from .tables import Tables
from .waiting import Line, Queue, Stage

__all__ = ["PATIENCE", "Admission", "Dropped", "Entry"]

#: Seconds in which a connection is not dropped for another's sake: the longest round trip, and some time to compute. A
#: client that connects to log in speaks at once; with more time, attackers that come back at once would never be dropped.
PATIENCE: Final = {Stage.SILENT: 0.1, Stage.QUEUED: 1.0, Stage.PARTIAL: 1.0, Stage.CHALLENGED: 1.0}
# Of more that must go, so many go with each call.
_PER_CALL: Final = 32
#: Stages in which nothing was read.
UNREAD: Final = (Stage.SILENT, Stage.QUEUED)
_SERVED: Final = (Stage.PARTIAL, Stage.CHALLENGED)


def _nothing() -> None:
    pass


class Entry:
    """One connection that was admitted. The caller of `Admission.admit` must `close` it in the end, whatever happens.

    After that, and after it was evicted, the other methods do nothing: a late word about a connection that is gone
    must not disturb the counters.

    Attributes:
      source: what it has in common with others of the same source; whoever is unknown is alone.
      stage: how far it is; None: it has logged in.
      busy: it has said all, and waits for us.
      favoured: somebody has logged in from its source before.
      evicted: it was dropped after it had been let in, and is to be closed: for another's sake, or because of a "penalty".
      on_turn: called when it may be read and answered.
      on_evicted: called when it is evicted.
    """

    __slots__ = (
        *("_address", "_admission", "_closed", "_failed", "_principal"),
        *("busy", "evicted", "favoured", "on_evicted", "on_turn", "source", "stage"),
    )

    def __init__(self, admission: Admission, address: IPAddress | None) -> None:
        self._admission = admission
        self._address = address
        self._failed = False
        self._closed = False
        self._principal: str | None = None
        self.source: Hashable = self
        self.stage: Stage | None = None
        self.busy = False
        self.favoured = False
        self.evicted: Literal["evicted", "penalty"] | None = None
        self.on_turn: Callable[[], object] = _nothing
        self.on_evicted: Callable[[], object] = _nothing

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
        self._admission.sources.check(address)
        stage = self._admission.leave(self)
        self._address, self.busy = address, False
        self.source = self._admission.sources.key(address)
        self._admission.come(self, Stage.QUEUED if stage in _SERVED else stage)
        self._admission.advance()

    def spoke(self) -> None:
        """Tell that something has come: now it wants to be served."""
        if self.stage is Stage.SILENT and not self._closed:
            self._admission.move(self, Stage.QUEUED)
            self._admission.advance()

    def answered(self) -> None:
        """Tell that the peer's token was answered: the next word is the peer's."""
        if self.stage in _SERVED and not self._closed:
            self._admission.move(self, Stage.CHALLENGED)

    def check_principal(self, name: str, *, guessable: bool) -> Literal["failures", "sessions"] | None:
        """Whether the peer, who has shown that it is this principal, may be let in.

        Args:
          name: of the principal.
          guessable: by a mechanism in which a password can be guessed.

        Returns:
          None: it may; else why not: there were too many failures, or there are too many sessions.
        """
        principals = self._admission.principals
        if guessable and not principals.looks_at(name, self.source):
            return "failures"
        return None if principals.may_have_more(name) else "sessions"

    def authenticated(self, principal: str | None = None) -> None:
        """Tell that the peer has logged in, as whom."""
        if self.stage is not None and not self._closed:
            if principal is not None:
                self._principal = principal
                self._admission.principals.come(principal, self.source)
            # They hold what the login needed, and nothing is needed for days.
            self.on_turn = self.on_evicted = _nothing
            self._admission.settle(self)
            self._admission.advance()

    def failed(self, failure: Failure, principal: str | None = None) -> None:
        """Tell why the peer has not logged in; only the first time counts, and nothing does after a login.

        Args:
          failure: see `PenaltyPolicy`.
          principal: as whom it tried to log in by NTLM, as far as that is known, whether there is such an account or not.
        """
        if self.stage is not None and not self._failed and not self._closed:
            self._failed = True
            if principal is not None:
                self._admission.principals.failed(principal)
            if self._address is not None:
                self._admission.sources.penalise(self._address, failure)

    def may_try_again(self) -> bool:
        """Whether a peer that has failed may try again on its connection. What `failed` is told next counts, too."""
        if self._closed or (self._address is not None and self._admission.sources.shut_out(self._address)):
            return False
        self._failed = False
        return True

    def evict(self) -> None:
        """Drop it for another's sake."""
        if not self.favoured and self.stage is not Stage.QUEUED:
            # What was queued had sent something that this server has not read.
            self.failed("evicted")
        self._drop("evicted")

    def shut_out(self) -> bool:
        """Drop it if others of its source have failed while it waited; returns whether they have."""
        if self._address is None or not self._admission.sources.shut_out(self._address):
            return False
        self._drop("penalty")
        return True

    def _drop(self, why: Literal["evicted", "penalty"]) -> None:
        self.evicted, self._closed = why, True
        self._admission.leave(self)
        self.on_evicted()

    def close(self) -> None:
        """Tell that the connection is gone. May be called more than once."""
        if not self._closed:
            self._closed = True
            if self._principal is not None:
                self._admission.principals.leave(self._principal)
            self._admission.leave(self)
            self._admission.advance()


class Admission:
    """Decides about newcomers, and counts who is there.

    Each process has its own; what they know of sources and principals they know together, if they are given the same tables.

    Args:
      limits: what is allowed.
      clock: seconds that never go back.
      policy: the sizes of penalties.
      tables: what is shared with other processes; None: nothing.

    Attributes:
      limits: see above.
      sources: where connections come from.
      principals: who they are.
      unread: connections that have not logged in and are not served.
      served: connections that have not logged in and are.
      established: connections that have logged in.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        clock: Callable[[], float],
        policy: PenaltyPolicy | None = None,
        tables: Tables | None = None,
    ) -> None:
        policy, tables = policy or PenaltyPolicy(), tables or Tables.alone()
        self._clock = clock
        self.limits = limits
        self.sources = Sources(limits, clock, policy, tables)
        self.principals = Principals(limits, clock, tables, self.sources.known)
        self.unread = 0
        self.served = 0
        self.established = 0
        # By whether somebody has logged in from there before.
        self._lines: dict[bool, dict[Stage, Line[Entry]]] = {
            favoured: {stage: Line() for stage in Stage} for favoured in (False, True)
        }
        self._queues: dict[bool, Queue[Entry]] = {favoured: Queue() for favoured in (False, True)}

    def reconfigure(self, limits: Limits) -> None:
        """Take other limits for connections from now on; none that is open is closed for them.

        Penalties stand, unless they are switched off: then they are forgotten.
        """
        self.limits = limits
        self.sources.reconfigure(limits)
        self.principals.limits = limits
        self.advance()

    @property
    def pending(self) -> int:
        """Connections that have not logged in."""
        return self.unread + self.served

    @property
    def queued(self) -> bool:
        """Whether somebody waits to be served: then `advance` must be called from time to time."""
        return any(len(lines[Stage.QUEUED]) for lines in self._lines.values())

    def admit(self, address: IPAddress | None) -> Entry:
        """Let a newcomer in, if need be by dropping another.

        Args:
          address: where it connects from; None for a unix socket, or for a proxy that has not yet said
            whom it speaks for. Such a connection is only under the caps on all.

        Raises:
          Dropped: it may not be.
        """
        if address is not None:
            address = unmapped(address)
            self.sources.check(address)
        known = address is not None and self.sources.favours(self.sources.key(address))
        excess = self.pending + self.established + 1 - self.limits.max_connections
        self._make_room(excess, tuple(Stage), "connections", known=known)
        self._make_room(self.unread + 1 - self.limits.max_waiting, UNREAD, "startups", known=known)
        entry = Entry(self, address)
        if address is not None:
            entry.source = self.sources.key(address)
        self.come(entry, Stage.SILENT)
        # If one of those who are served has gone for it.
        self.advance()
        return entry

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
        if stage in UNREAD:
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

    def _make_room(self, excess: int, stages: tuple[Stage, ...], cause: DropCause, *, known: bool) -> None:
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

    def advance(self) -> None:
        """Let those be served for whom there is a place, or can be made: time alone makes some, see `PATIENCE`."""
        for queue in self._queues.values():
            queue.resume_some()
        shut_out = 0
        while self.queued and shut_out < _PER_CALL:
            victim = None
            if self.served >= self.limits.max_unauthenticated and (victim := self._victim(_SERVED)) is None:
                return
            entry = self._next(newest=victim is not None)
            if entry is None:
                return
            if entry.shut_out():
                shut_out += 1
                continue
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
