"""Sources from which somebody has logged in before."""

# A cell is a number of 64 bits: 48 of the key's hash and 16 of the hour; see `shared` for the rest. Nobody but who has
# logged in writes into the table. Two sources are taken for one another once in 2^45 times, and what that gives away is to
# go first.

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .shared import WAYS, Tables

#: Hours for which they are remembered.
HOURS: Final = 30 * 24

_HOUR: Final = 3600.0
_HOUR_BITS: Final = 16
_HOUR_MASK: Final = (1 << _HOUR_BITS) - 1


class Acquaintances:
    """A bounded memory of sources; where there is no room, the one that was seen longest ago is forgotten.

    Args:
      tables: where.
      clock: seconds that never go back, the same for all who share the tables.
    """

    def __init__(self, tables: Tables, clock: Callable[[], float]) -> None:
        self._cells = tables.acquaintances
        self._hash = tables.hash
        self._clock = clock

    def remember(self, key: bytes) -> None:
        """Somebody has logged in from there."""
        tag, places = self._place(key)
        hour = self._hour()
        place = min(places, key=lambda index: (self._cells[index] >> _HOUR_BITS != tag, self._left(index, hour)))
        self._cells[place] = tag << _HOUR_BITS | hour

    def knows(self, key: bytes) -> bool:
        """Whether somebody has, not too long ago."""
        tag, places = self._place(key)
        hour = self._hour()
        return any(self._cells[index] >> _HOUR_BITS == tag and self._left(index, hour) > 0 for index in places)

    def _place(self, key: bytes) -> tuple[int, range]:
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
