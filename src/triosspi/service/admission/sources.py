"""What is known of where connections come from: how many there are of each source, its logins, and its failures."""

# A source is an IPv4 address, or as much of an IPv6 address as is one customer's, by default 64 bits. Who has a /48 has
# 65,536 of those. So failures and connections are also counted by prefixes that are 8 and 16 bits shorter (/56 and /48), where
# more is allowed: many customers of one provider may be in a /48.
#
# A cell of `KnownSources` is a number of 64 bits: 48 of the key's hash and 16 of the hour; see `tables` for the rest. Only
# who has logged in writes into it. Two sources are taken for one another once in 2^45 times, and all that comes of it is
# that one goes first that should not.

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Final, Literal, TypeAlias

from ..config.settings import Limits
from ..network.addresses import IPAddress, canonical_networks, is_in
from .penalties import Failure, Penalties, PenaltyPolicy
from .tables import WAYS, Tables

DropCause: TypeAlias = Literal["penalty", "connections", "source_connections", "startups"]

#: Connections of one source at a time that its earlier logins speak for.
FAVOURED: Final = 32
#: Bits by which an IPv6 prefix is shorter than a source's, and how many times as much is allowed to it.
WIDER: Final = ((8, 4), (16, 16))

_LENGTH_SHIFT: Final = 128
_KEY_BYTES: Final = 18

#: Hours for which known sources are remembered.
HOURS: Final = 30 * 24

_HOUR: Final = 3600.0
_HOUR_BITS: Final = 16
_HOUR_MASK: Final = (1 << _HOUR_BITS) - 1


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


_NONE: Final = _Source()


class KnownSources:
    """Sources from which somebody has logged in before.

    The memory is bounded: where there is no room, the one that was seen longest ago is forgotten.

    Args:
      tables: where.
      clock: seconds that never go back, the same for all who share the tables.
    """

    def __init__(self, tables: Tables, clock: Callable[[], float]) -> None:
        self._cells = tables.known
        self._hash = tables.hash
        self._clock = clock

    def remember(self, key: bytes) -> None:
        """Somebody has logged in from there."""
        tag, slots = self._slot(key)
        hour = self._hour()
        slot = min(slots, key=lambda index: (self._cells[index] >> _HOUR_BITS != tag, self._left(index, hour)))
        self._cells[slot] = tag << _HOUR_BITS | hour

    def knows(self, key: bytes) -> bool:
        """Whether somebody has, not too long ago."""
        tag, slots = self._slot(key)
        hour = self._hour()
        return any(self._cells[index] >> _HOUR_BITS == tag and self._left(index, hour) > 0 for index in slots)

    def _slot(self, key: bytes) -> tuple[int, range]:
        digest = self._hash(key)
        first = digest % (len(self._cells) // WAYS) * WAYS
        return digest >> _HOUR_BITS, range(first, first + WAYS)

    def _hour(self) -> int:
        # From 1: a cell that was never written is 0.
        return 1 + int(self._clock() / _HOUR) % _HOUR_MASK

    def _left(self, index: int, hour: int) -> int:
        """Hours for which a cell is remembered yet; 0: it is free."""
        written = self._cells[index] & _HOUR_MASK
        return max(0, HOURS - (hour - written) % _HOUR_MASK) if written else 0


class Sources:
    """All sources. A key that is no integer stands for one that is not known, which has no limits.

    Args:
      limits: what is allowed.
      clock: seconds that never go back, the same for all who share the tables.
      policy: the sizes of penalties.
      tables: what is shared with other processes.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float], policy: PenaltyPolicy, tables: Tables) -> None:
        self._clock = clock
        self._policy = policy
        self._tables = tables
        self._penalties = Penalties(tables.penalties, tables.hash, policy.most)
        self.known = KnownSources(tables, clock)
        # This process's own.
        self._connected: dict[int, _Source] = {}
        self._limits = limits
        self.reconfigure(limits)

    def reconfigure(self, limits: Limits) -> None:
        """Use these limits from now on."""
        if self._limits.penalties and not limits.penalties:
            self._penalties.clear()
        self._limits = limits
        self._exempt = canonical_networks(limits.penalty_exempt)

    def key(self, address: IPAddress) -> int:
        """The source that an `unmapped` address belongs to.

        A number, since it is kept for each connection; those of IPv6 begin behind IPv4's, and tell how long they are.
        """
        number = int(address)
        if address.version == 4:
            return number
        length = self._limits.ipv6_source_prefix
        return length << _LENGTH_SHIFT | number >> _LENGTH_SHIFT - length

    # Judging

    def check(self, address: IPAddress) -> None:
        """See that the source of an `unmapped` address may have one more.

        Raises:
          Dropped: it may not.
        """
        if self.shut_out(address):
            raise Dropped("penalty")
        key = self.key(address)
        most = self._limits.max_connections_per_source
        if most is not None:
            for wide, times in levels(key):
                others, _ = self._tables.others(_bytes(wide))
                if self._connected.get(wide, _NONE).connections + others >= most * times:
                    raise Dropped("source_connections")

    def shut_out(self, address: IPAddress) -> bool:
        """Whether the source of an `unmapped` address is refused for its failures."""
        if not self._limits.penalties:
            return False
        now = self._clock()
        refused = any(self._penalties.refused(_bytes(wide), now) for wide, _ in levels(self.key(address)))
        # Last: there may be many networks.
        return refused and not is_in(address, self._exempt)

    def favours(self, key: int) -> bool:
        """Whether somebody has logged in from there, and not too many are favoured for it already."""
        return self._connected.get(key, _NONE).favoured < FAVOURED and self.known.knows(_bytes(key))

    def may_be_served(self, key: Hashable) -> bool:
        """Whether one more of this source may be read and answered."""
        most = self._limits.max_unauthenticated_per_source
        if most is None or not isinstance(key, int):
            return True
        return all(
            self._connected[wide].served + self._tables.others(_bytes(wide))[1] < most * times
            for wide, times in levels(key)
        )

    # Counting

    def penalise(self, address: IPAddress, failure: Failure) -> None:
        """One has failed to log in."""
        if self._limits.penalties and not is_in(address, self._exempt):
            seconds, now = self._policy.seconds(failure), self._clock()
            for wide, times in levels(self.key(address)):
                # One failure of one customer, however bad, does not shut out all of the neighbours.
                counted = seconds if times == 1 else min(seconds, self._policy.least)
                self._penalties.add(_bytes(wide), counted, now, self._policy.least * times)

    def come(self, key: Hashable, *, favoured: bool) -> None:
        """There is one more."""
        if isinstance(key, int):
            # Also while no cap asks for it: a reload may set one.
            for wide, _ in levels(key):
                self._connected.setdefault(wide, _Source()).connections += 1
                self._publish(wide)
            self._connected[key].favoured += favoured

    def leave(self, key: Hashable, *, favoured: bool) -> None:
        """One is gone."""
        if isinstance(key, int):
            self._connected[key].favoured -= favoured
            for wide, _ in levels(key):
                source = self._connected[wide]
                source.connections -= 1
                self._publish(wide)
                if not source.connections:
                    del self._connected[wide]

    def served(self, key: Hashable, change: int) -> None:
        """One more, or less, is read and answered."""
        if isinstance(key, int):
            for wide, _ in levels(key):
                self._connected[wide].served += change
                self._publish(wide)

    def logged_in(self, key: Hashable, *, favoured: bool) -> None:
        """One has logged in, and is favoured no more."""
        if isinstance(key, int):
            self._connected[key].favoured -= favoured
            self.known.remember(_bytes(key))

    def _publish(self, key: int) -> None:
        source = self._connected[key]
        self._tables.publish(_bytes(key), source.connections, source.served)


def levels(key: int) -> Iterator[tuple[int, int]]:
    """A source and the wider prefixes that it lies in, and how many times as much is allowed to each."""
    yield key, 1
    length = key >> _LENGTH_SHIFT
    if length:
        prefix = key - (length << _LENGTH_SHIFT)
        for bits, times in WIDER:
            yield length - bits << _LENGTH_SHIFT | prefix >> bits, times


def _bytes(key: int) -> bytes:
    return key.to_bytes(_KEY_BYTES, "little")
