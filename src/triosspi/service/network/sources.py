"""What is known of where connections come from: how many there are of each source, its logins, and its failures."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Final, Literal, Protocol, TypeAlias

from .acquaintances import Acquaintances
from .addresses import IPAddress, IPNetwork, canonical_networks, is_in
from .penalties import Failure, Penalties, PenaltyPolicy

DropCause: TypeAlias = Literal["penalty", "connections", "source_connections", "startups"]

#: Connections of one source at a time that its earlier logins speak for.
FAVOURED: Final = 32


class SourceLimits(Protocol):
    """What is read of the settings."""

    @property
    def max_connections_per_source(self) -> int | None:
        """The most of one source; None does not limit it."""

    @property
    def max_unauthenticated_per_source(self) -> int | None:
        """The most of one source that are read before they have logged in; the others wait. None does not limit it."""

    @property
    def penalties(self) -> bool:
        """Whether failed logins are held against their source."""

    @property
    def penalty_exempt(self) -> tuple[IPNetwork, ...]:
        """Networks whose failed logins are not."""


class Dropped(Exception):
    """A connection that may not be; it is to be closed without a word.

    Attributes:
      cause: which limit it met.
    """

    def __init__(self, cause: DropCause) -> None:
        super().__init__(cause)
        self.cause: DropCause = cause


class _Source:
    """The connections of one source; it exists while there are any.

    Attributes:
      connections: all of them.
      served: those that are read and answered, and have not logged in.
      favoured: those that its earlier logins speak for.
    """

    __slots__ = ("connections", "favoured", "served")

    def __init__(self) -> None:
        self.connections = 0
        self.served = 0
        self.favoured = 0


class Sources:
    """All sources. What is not an integer stands for one that is not known, which has no limits.

    Args:
      limits: what is allowed.
      clock: seconds that never go back.
      policy: the sizes of penalties.

    Attributes:
      penalties: by IP version.
    """

    def __init__(self, limits: SourceLimits, clock: Callable[[], float], policy: PenaltyPolicy) -> None:
        self._clock = clock
        self._policy = policy
        self.penalties = {4: Penalties(policy), 6: Penalties(policy)}
        self._acquaintances = Acquaintances(clock)
        self._connected: dict[int, _Source] = {}
        self.take(limits)

    def take(self, limits: SourceLimits) -> None:
        """Use these limits from now on."""
        self._limits = limits
        self._exempt = canonical_networks(limits.penalty_exempt)
        if not limits.penalties:
            for table in self.penalties.values():
                table.clear()

    def __iter__(self) -> Iterator[int]:
        """Those that are connected."""
        return iter(self._connected)

    # Judging

    def check(self, address: IPAddress) -> None:
        """See that the source of an `unmapped` address may have one more.

        Raises:
          Dropped: it may not.
        """
        key = source_key(address)
        refused = self._limits.penalties and self.penalties[address.version].refuses(key, self._clock())
        # Last: there may be many networks.
        if refused and not is_in(address, self._exempt):
            raise Dropped("penalty")
        most = self._limits.max_connections_per_source
        source = self._connected.get(key)
        if most is not None and (0 if source is None else source.connections) >= most:
            raise Dropped("source_connections")

    def favours(self, key: int) -> bool:
        """Whether somebody has logged in from there, and not too many are favoured for it already."""
        source = self._connected.get(key)
        return (source is None or source.favoured < FAVOURED) and self._acquaintances.knows(key)

    def may_be_served(self, key: Hashable) -> bool:
        """Whether one more of this source may be read and answered."""
        most = self._limits.max_unauthenticated_per_source
        return most is None or not isinstance(key, int) or self._connected[key].served < most

    # Counting

    def penalise(self, address: IPAddress, failure: Failure) -> None:
        """One has failed to log in."""
        if self._limits.penalties and not is_in(address, self._exempt):
            table = self.penalties[address.version]
            table.add(source_key(address), self._policy.seconds(failure), self._clock())

    def come(self, key: Hashable, *, favoured: bool) -> None:
        """There is one more."""
        if isinstance(key, int):
            # Also while no cap asks for it: a reload may set one.
            source = self._connected.setdefault(key, _Source())
            source.connections += 1
            source.favoured += favoured

    def leave(self, key: Hashable, *, favoured: bool) -> None:
        """One is gone."""
        if isinstance(key, int):
            source = self._connected[key]
            source.connections -= 1
            source.favoured -= favoured
            if not source.connections:
                del self._connected[key]

    def served(self, key: Hashable, change: int) -> None:
        """One more, or less, is read and answered."""
        if isinstance(key, int):
            self._connected[key].served += change

    def logged_in(self, key: Hashable, *, favoured: bool) -> None:
        """One has logged in, and is favoured no more."""
        if isinstance(key, int):
            self._connected[key].favoured -= favoured
            self._acquaintances.remember(key)


def source_key(address: IPAddress) -> int:
    """The source that an `unmapped` address belongs to: all of IPv4, or the first 64 bits of IPv6.

    A number, since it is kept for each connection; those of IPv6 begin behind IPv4's.
    """
    number = int(address)
    return number if address.version == 4 else (1 << 32) + (number >> 64)
