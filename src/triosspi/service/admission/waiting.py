"""Who waits, for what, and who goes first: the orders in which newcomers are dropped, and in which they are served."""

# Both orders are kept as connections come, speak and go, so that no call looks at all of them: each is a few steps in
# dictionaries, however many wait.

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import islice
from typing import Final, Generic, Protocol, TypeVar

# With each call. Who is not among them is with one of the next.
_RESUMED: Final = 32


class Stage(enum.IntEnum):
    """How far a connection is that has not logged in; who is less far is dropped first."""

    #: Nothing has come.
    SILENT = 0
    #: Something has come that nobody has read: there is no place yet among those who are served.
    QUEUED = 1
    #: Is being read; no whole token has come.
    PARTIAL = 2
    #: Was answered, and has to answer in its turn.
    CHALLENGED = 3


class Waiting(Protocol):
    """A connection that waits.

    Attributes:
      busy: has said all, and waits for us.
    """

    busy: bool


W = TypeVar("W", bound=Waiting)


class Line(Generic[W]):
    """Connections of one stage: whose turn it is to be dropped.

    Whoever has the most of them gives one first, and among equals whoever has waited longest. So one who comes with
    a thousand connections is dropped before any of those who come with one.
    """

    # So many who wait for us, or may not, are passed over before nobody is found.
    _STEPS: Final = 8

    def __init__(self) -> None:
        self._since: OrderedDict[W, float] = OrderedDict()
        self._by_source: dict[Hashable, OrderedDict[W, None]] = {}
        # The sources that have so many; who came to that number first is first.
        self._by_count: dict[int, OrderedDict[Hashable, None]] = {}
        self._most = 0

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, entry: W) -> bool:
        return entry in self._since

    def add(self, entry: W, source: Hashable, now: float) -> None:
        """It waits from now on, behind all others."""
        self._since[entry] = now
        mine = self._by_source.setdefault(source, OrderedDict())
        self._move(source, len(mine), len(mine) + 1)
        mine[entry] = None

    def remove(self, entry: W, source: Hashable) -> None:
        """It does not wait any more."""
        del self._since[entry]
        mine = self._by_source[source]
        del mine[entry]
        self._move(source, len(mine) + 1, len(mine))
        if not mine:
            del self._by_source[source]

    def _move(self, source: Hashable, old: int, new: int) -> None:
        if old:
            bucket = self._by_count[old]
            del bucket[source]
            if not bucket:
                del self._by_count[old]
        if new:
            self._by_count.setdefault(new, OrderedDict())[source] = None
        self._most = max(self._most, new)
        while self._most and self._most not in self._by_count:
            # By one only: nobody's number jumps.
            self._most -= 1

    def first(self, before: float) -> W | None:
        """Whom to drop, of those who have waited since ``before`` or longer; None: there is nobody."""
        if not self._since:
            return None
        largest = self._by_source[next(iter(self._by_count[self._most]))]
        found = self._oldest(largest, before)
        return found if found is not None else self._oldest(self._since, before)

    def newest(self, may: Callable[[W], bool]) -> W | None:
        """The last that came, of those that ``may``; of a few, at least."""
        return next(filter(may, islice(reversed(self._since), self._STEPS)), None)

    def _oldest(self, entries: OrderedDict[W, None] | OrderedDict[W, float], before: float) -> W | None:
        for _ in range(min(self._STEPS, len(entries))):
            entry = next(iter(entries))
            if self._since[entry] > before:
                return None
            if not entry.busy:
                return entry
            # It is ours to move; the next who looks here need not step over it again.
            entries.move_to_end(entry)
        return None


class Queue(Generic[W]):
    """Connections that are to be served: one of each source in turns."""

    def __init__(self) -> None:
        self._by_source: dict[Hashable, OrderedDict[W, None]] = {}
        # Whose turn it is, and the others: who may have no more now, until `resume`.
        self._turns: OrderedDict[Hashable, None] = OrderedDict()
        self._out_of_turn: OrderedDict[Hashable, None] = OrderedDict()

    def add(self, entry: W, source: Hashable) -> None:
        """It wants to be served."""
        if source not in self._by_source:
            self._by_source[source] = OrderedDict()
            self._turns[source] = None
        self._by_source[source][entry] = None

    def remove(self, entry: W, source: Hashable) -> None:
        """It does not, any more."""
        mine = self._by_source[source]
        del mine[entry]
        if not mine:
            del self._by_source[source]
            self._turns.pop(source, None)
            self._out_of_turn.pop(source, None)

    def resume(self, source: Hashable) -> None:
        """It may have more again."""
        if source in self._out_of_turn:
            del self._out_of_turn[source]
            self._turns[source] = None

    def resume_some(self) -> None:
        """Some may have more again: whose wider network has given up a place, or who has in another process."""
        for _ in range(min(_RESUMED, len(self._out_of_turn))):
            self._turns[self._out_of_turn.popitem(last=False)[0]] = None

    def next(self, may_have_more: Callable[[Hashable], bool]) -> W | None:
        """Whose turn it is; it stays in the queue. A source that may not have more is out of turn until `resume`."""
        while self._turns:
            source = next(iter(self._turns))
            if may_have_more(source):
                self._turns.move_to_end(source)
                return next(iter(self._by_source[source]))
            del self._turns[source]
            self._out_of_turn[source] = None
        return None
