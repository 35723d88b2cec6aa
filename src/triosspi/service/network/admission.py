"""Who may connect: what an attacker can take from a server before he has shown who he is.

Nothing here knows Trio or a socket, and the clock and the dice are given: the same calls give the same
answers.
"""

# What must hold, whoever connects
# --------------------------------
# A login costs this server a hundred times what it costs whoever fails it, and a connection that says
# nothing costs a descriptor for the length of the handshake's deadline. So there are caps, on all
# connections and on those that have not logged in. The second one begins to drop at random long before
# it is reached, as OpenSSH's MaxStartups: an attacker who fills it to the brim still leaves an honest
# client, who tries again, a fair chance with each slot that comes free; a hard limit would leave him none.
#
# One source must not be able to use all of it up: per-source caps, and penalties for logins that failed,
# as OpenSSH's PerSourcePenalties. A source is an IPv4 address or an IPv6 /64, which is the least that a
# customer is given: counted by single addresses, one machine would be 2^64 sources.
#
# Whatever is remembered is bounded, and the work per call too: an attacker with many addresses would
# otherwise turn the defence into the attack. Counters live as long as the connections that they count,
# so there are never more of them than `max_connections`. Penalties have a table of a fixed size, see
# `penalties`.

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

from ..._errors import ConfigurationError, printable
from .addresses import IPAddress, IPNetwork, canonical_networks, is_in, unmapped
from .penalties import Failure, Penalties, PenaltyPolicy

DropCause: TypeAlias = Literal["penalty", "connections", "source_connections", "source_unauthenticated", "startups"]

_MAX_STARTUPS: Final = re.compile(r"([0-9]{1,9})(?::([0-9]{1,3}):([0-9]{1,9}))?")


@dataclass(frozen=True, slots=True)
class MaxStartups:
    """A cap on connections that have not logged in, with random early drop: OpenSSH's ``start:rate:full``.

    Attributes:
      start: from so many on, a newcomer may be dropped.
      rate: how likely that is with ``start`` of them, in percent; it grows evenly until
      full: with so many, every newcomer is dropped.

    Raises:
      ConfigurationError: a number is out of range, or ``full`` is less than ``start``.
    """

    start: int
    rate: int
    full: int

    def __post_init__(self) -> None:
        if not 1 <= self.start <= self.full:
            raise ConfigurationError(f"{self}: start must be at least 1, and full not less than start")
        if not 1 <= self.rate <= 100:
            raise ConfigurationError(f"{self}: the rate is a percentage, 1 to 100")

    @classmethod
    def parse(cls, text: str) -> MaxStartups:
        """Read ``"100:30:500"``, or ``"500"`` for a plain limit without early drop.

        Raises:
          ConfigurationError: it is neither.
        """
        match = _MAX_STARTUPS.fullmatch(text)
        if match is None:
            raise ConfigurationError(f"{printable(text)} is not start:rate:full, such as 100:30:500")
        start, rate, full = match.groups()
        return cls(int(start), 100, int(start)) if full is None else cls(int(start), int(rate), int(full))

    def __str__(self) -> str:
        return f"{self.start}:{self.rate}:{self.full}"

    def percentage(self, pending: int) -> float:
        """How likely a newcomer is dropped while ``pending`` others have not logged in, in percent."""
        if pending < self.start:
            return 0.0
        if pending >= self.full:
            return 100.0
        return self.rate + (100 - self.rate) * (pending - self.start) / (self.full - self.start)


class AdmissionLimits(Protocol):
    """What is read of the settings."""

    @property
    def max_connections(self) -> int:
        """The most at a time."""

    @property
    def max_connections_per_source(self) -> int | None:
        """The most of one source; None does not limit it."""

    @property
    def max_unauthenticated(self) -> MaxStartups:
        """The most that have not logged in."""

    @property
    def max_unauthenticated_per_source(self) -> int | None:
        """The most of one source that have not logged in; None does not limit it."""

    @property
    def penalties(self) -> bool:
        """Whether failed logins are held against their source."""

    @property
    def penalty_exempt(self) -> tuple[IPNetwork, ...]:
        """Networks whose failed logins are not."""


class RandomSource(Protocol):
    """`random.Random`, or what stands in for it."""

    def random(self) -> float:
        """A number from 0 to less than 1."""


class Dropped(Exception):
    """A connection that may not be; it is to be closed without a word.

    Attributes:
      cause: which limit it met.
    """

    def __init__(self, cause: DropCause) -> None:
        super().__init__(cause)
        self.cause: DropCause = cause


class _Source:
    """The connections of one source; it exists while there are any."""

    __slots__ = ("connections", "pending")

    def __init__(self) -> None:
        self.connections = 0
        self.pending = 0


class Entry:
    """One connection that was admitted. Whoever got it must `close` it in the end, whatever happened.

    After that, the other methods do nothing: a late word about a connection that is gone must not
    disturb the counters.
    """

    __slots__ = ("_address", "_closed", "_failed", "_ledger", "_pending")

    def __init__(self, ledger: _Ledger, address: IPAddress | None) -> None:
        self._ledger = ledger
        self._address = address
        self._pending = True
        self._failed = False
        self._closed = False

    def identify(self, address: IPAddress | None) -> None:
        """Tell where the connection really comes from, once a proxy has said so.

        It was counted by no source until now. When it is refused it still is an entry, to be closed.

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
        self._ledger.check_penalty(address)
        self._ledger.check_counts(address)
        self._ledger.count(address, pending=self._pending)
        self._address = address

    def authenticated(self) -> None:
        """Tell that the peer has logged in."""
        if self._pending and not self._closed:
            self._pending = False
            self._ledger.settle(self._address)

    def failed(self, failure: Failure) -> None:
        """Tell why the peer has not logged in; only the first time counts, and nothing does after a login.

        Args:
          failure: see `PenaltyPolicy`.
        """
        if self._pending and not self._failed and not self._closed:
            self._failed = True
            if self._address is not None:
                self._ledger.penalise(self._address, failure)

    def close(self) -> None:
        """Tell that the connection is gone. May be called more than once."""
        if not self._closed:
            self._closed = True
            self._ledger.leave(self._address, pending=self._pending)


class Admission:
    """Decides about newcomers, and counts who is there.

    Each process has its own: N workers admit N times as much.

    Args:
      limits: what is allowed.
      clock: seconds that never go back.
      random: the dice of the early drop.
      policy: the sizes of penalties.
    """

    def __init__(
        self,
        limits: AdmissionLimits,
        *,
        clock: Callable[[], float],
        random: RandomSource,
        policy: PenaltyPolicy | None = None,
    ) -> None:
        self._random = random
        self._ledger = _Ledger(limits, clock, policy or PenaltyPolicy())

    def reconfigure(self, limits: AdmissionLimits) -> None:
        """Take other limits for who comes from now on; nobody who is there is sent away.

        Penalties stand, unless they are switched off: then they are forgotten.
        """
        self._ledger.take(limits)

    @property
    def pending(self) -> int:
        """Connections that have not logged in."""
        return self._ledger.pending

    @property
    def established(self) -> int:
        """Connections that have logged in."""
        return self._ledger.established

    @property
    def penalised(self) -> int:
        """Sources that penalties are remembered of, whether they are refused for it or not."""
        return sum(map(len, self._ledger.penalties.values()))

    def admit(self, address: IPAddress | None) -> Entry:
        """Let a newcomer in.

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
            ledger.check_penalty(address)
        if ledger.pending + ledger.established >= limits.max_connections:
            raise Dropped("connections")
        if address is not None:
            ledger.check_counts(address)
        # The dice at last: no draw is spent on whom something else keeps out.
        percentage = limits.max_unauthenticated.percentage(ledger.pending)
        if percentage and (percentage >= 100 or self._random.random() * 100 < percentage):
            raise Dropped("startups")
        ledger.pending += 1
        if address is not None:
            ledger.count(address, pending=True)
        return Entry(ledger, address)


class _Ledger:
    """The counters and penalties, which an `Admission` shares with its entries.

    Attributes:
      limits: see `Admission`.
      pending: see `Admission`.
      established: see `Admission`.
      penalties: by IP version.
    """

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float], policy: PenaltyPolicy) -> None:
        self._clock = clock
        self._policy = policy
        self.pending = 0
        self.established = 0
        self.penalties = {4: Penalties(policy), 6: Penalties(policy)}
        self._sources: dict[int, _Source] = {}
        self.take(limits)

    def take(self, limits: AdmissionLimits) -> None:
        """Use these limits from now on."""
        self.limits = limits
        self._exempt = canonical_networks(limits.penalty_exempt)
        if not limits.penalties:
            for table in self.penalties.values():
                table.clear()

    def check_penalty(self, address: IPAddress) -> None:
        """Raise `Dropped` where the source is not free to come."""
        if not self.limits.penalties:
            return
        refused = self.penalties[address.version].refuses(source_key(address), self._clock())
        if refused and not is_in(address, self._exempt):
            raise Dropped("penalty")

    def check_counts(self, address: IPAddress) -> None:
        """Raise `Dropped` where the source has as many connections as it may."""
        source = self._sources.get(source_key(address))
        connections, pending = (0, 0) if source is None else (source.connections, source.pending)
        limits = self.limits
        if limits.max_connections_per_source is not None and connections >= limits.max_connections_per_source:
            raise Dropped("source_connections")
        if limits.max_unauthenticated_per_source is not None and pending >= limits.max_unauthenticated_per_source:
            raise Dropped("source_unauthenticated")

    def count(self, address: IPAddress, *, pending: bool) -> None:
        """One more of this source."""
        # Also while no cap asks for it: a reload may set one.
        source = self._sources.setdefault(source_key(address), _Source())
        source.connections += 1
        source.pending += pending

    def settle(self, address: IPAddress | None) -> None:
        """One has logged in."""
        self.pending -= 1
        self.established += 1
        if address is not None:
            self._sources[source_key(address)].pending -= 1

    def leave(self, address: IPAddress | None, *, pending: bool) -> None:
        """One is gone."""
        self.pending -= pending
        self.established -= not pending
        if address is not None:
            key = source_key(address)
            source = self._sources[key]
            source.connections -= 1
            source.pending -= pending
            if not source.connections:
                del self._sources[key]

    def penalise(self, address: IPAddress, failure: Failure) -> None:
        """One has failed to log in."""
        if self.limits.penalties and not is_in(address, self._exempt):
            table = self.penalties[address.version]
            table.add(source_key(address), self._policy.seconds(failure), self._clock())


def source_key(address: IPAddress) -> int:
    """The source that an `unmapped` address belongs to: all of IPv4, or the first 64 bits of IPv6.

    A number, since it is kept for each connection; those of IPv6 begin behind IPv4's.
    """
    number = int(address)
    return number if address.version == 4 else (1 << 32) + (number >> 64)
