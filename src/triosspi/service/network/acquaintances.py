"""Sources from which somebody has logged in before."""

# A table of a fixed size, in places that follow from the source: nothing grows, and nobody but who has logged in writes
# into it. A cell is a number of 64 bits: 48 of the source's hash and 16 of the hour. Two sources are taken for one
# another once in 2^46 times; what that gives away is to go first.

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable
from typing import Final

#: Sources that are remembered; 512 KiB of memory, once they are needed.
SOURCES: Final = 65_536
#: Hours for which they are.
HOURS: Final = 30 * 24

_WAYS: Final = 4
_HOUR: Final = 3600.0
_HOUR_BITS: Final = 16
_HOUR_MASK: Final = (1 << _HOUR_BITS) - 1


class Acquaintances:
    """A bounded memory of sources; where there is no room, the one that was seen longest ago is forgotten.

    Args:
      clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._cells = memoryview(mmap.mmap(-1, 8 * SOURCES)).cast("Q")

    def remember(self, source: int) -> None:
        """Somebody has logged in from there."""
        tag, places = _place(source)
        hour = self._hour()
        place = min(places, key=lambda index: (self._cells[index] >> _HOUR_BITS != tag, self._left(index, hour)))
        self._cells[place] = tag << _HOUR_BITS | hour

    def knows(self, source: int) -> bool:
        """Whether somebody has, not too long ago."""
        tag, places = _place(source)
        hour = self._hour()
        return any(self._cells[index] >> _HOUR_BITS == tag and self._left(index, hour) > 0 for index in places)

    def _hour(self) -> int:
        # From 1: a cell that was never written is 0.
        return 1 + int(self._clock() / _HOUR) % _HOUR_MASK

    def _left(self, index: int, hour: int) -> int:
        """Hours for which a cell is remembered yet; 0: it is free."""
        written = self._cells[index] & _HOUR_MASK
        return max(0, HOURS - (hour - written) % _HOUR_MASK) if written else 0


def _place(source: int) -> tuple[int, range]:
    digest = int.from_bytes(hashlib.blake2b(source.to_bytes(16, "little"), digest_size=8).digest(), "little")
    first = digest % (SOURCES // _WAYS) * _WAYS
    return digest >> _HOUR_BITS, range(first, first + _WAYS)
