"""What the processes of one server know together: numbers in memory that all of them have mapped."""

# Caps and penalties for a source hold for the server, and a source's next connection goes to whichever worker is free. So
# they share tables, without a lock: a process that was stopped while it held one (SIGSTOP, a debugger, a frozen container)
# would stop all others. What keeps that right:
#
# * A cell is eight bytes at their natural place, which are written in one piece, and says all that there is to say of one
#   source: a part of its hash, and the numbers. No process sees half of one.
# * Counts are written by one process each, in a column of its own, and added up when they are read. So none is
#   ever lost; two processes that look at the same moment may both find room, which lets in at most one more for each
#   other process. A process that has died takes its column with it: the supervisor clears it, and gives it to another.
# * Penalties are in one table that all write. Two that add to the same one at the same moment are as one: a failure
#   goes unpunished. They outlive the process that wrote them.
#
# Each table has a fixed size, and a key has its place in one bucket of some cells, by a hash with a secret: an attacker
# who chooses addresses cannot choose the cells that they fall on. Where a bucket is full, the cell goes first that would be free
# soonest; a count that finds no cell is its own process's only.

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
from typing import Final

_WORD: Final = 8
_KEY_WORDS: Final = 2
#: Cells. A third as many are used at most before buckets overflow in earnest.
KNOWN: Final = 131_072
PENALTIES: Final = 131_072
FAILURES: Final = 32_768
COUNTS: Final = 32_768
#: Cells of a bucket.
WAYS: Final = 8

_TAG_BITS: Final = 32
_NUMBER_BITS: Final = 16
_LARGEST: Final = (1 << _NUMBER_BITS) - 1


class Tables:
    """The memory, and one process's column in it.

    Args:
      memory: as `size` says; belongs to this from now on.
      column: the process's own, from 0; None: it counts for itself.
      fd: the file that the memory is of, if there is one.

    Attributes:
      known: cells for `KnownSources`.
      penalties: cells for `Penalties`.
      failures: the same, of accounts.
      loads: how many connections each worker has, by its number; see `workers.balance`.
      column: see above.
    """

    def __init__(self, memory: mmap.mmap, column: int | None, fd: int = -1) -> None:
        self._memory = memory
        self._fd = fd
        self.column = column
        self._words = words = memoryview(memory).cast("Q")
        self._secret = words[:_KEY_WORDS].tobytes()
        at = _KEY_WORDS
        self.known, at = words[at : at + KNOWN], at + KNOWN
        self.penalties, at = words[at : at + PENALTIES], at + PENALTIES
        self.failures, at = words[at : at + FAILURES], at + FAILURES
        columns, loads = divmod(len(words) - at, COUNTS)
        self._columns = [words[at + index * COUNTS : at + (index + 1) * COUNTS] for index in range(columns)]
        self.loads = words[len(words) - loads :]

    @staticmethod
    def size(columns: int, workers: int = 0) -> int:
        """Bytes for so many processes; what is never written costs nothing."""
        return _WORD * (_KEY_WORDS + KNOWN + PENALTIES + FAILURES + columns * COUNTS + workers)

    @classmethod
    def alone(cls) -> Tables:
        """For a process that shares with nobody."""
        memory = mmap.mmap(-1, cls.size(0))
        memory[: _KEY_WORDS * _WORD] = secrets.token_bytes(_KEY_WORDS * _WORD)
        return cls(memory, None)

    @classmethod
    def make(cls, columns: int, workers: int = 0) -> Tables:
        """For so many processes, of which so many accept at a time, in a file that they can be given.

        Raises:
          OSError: there is no memory.
        """
        fd = os.memfd_create("triosspi-tables")
        try:
            os.ftruncate(fd, cls.size(columns, workers))
            os.pwrite(fd, secrets.token_bytes(_KEY_WORDS * _WORD), 0)
            return cls(mmap.mmap(fd, 0), None, fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def of(cls, fd: int, column: int | None) -> Tables:
        """Those that another process has made; the descriptor is closed."""
        try:
            return cls(mmap.mmap(fd, 0), column)
        finally:
            os.close(fd)

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._fd

    def hash(self, key: bytes) -> int:
        """64 bits that nobody can foresee."""
        return int.from_bytes(hashlib.blake2b(key, digest_size=8, key=self._secret).digest(), "little")

    def close(self) -> None:
        """Forget it, in this process. May be called twice."""
        if not self._memory.closed:
            for view in (self.known, self.penalties, self.failures, self.loads, *self._columns, self._words):
                view.release()
            # It has a descriptor of its own.
            self._memory.close()
            if self._fd >= 0:
                os.close(self._fd)

    # Counts

    def publish(self, key: bytes, first: int, second: int = 0) -> None:
        """Say how many this process has, of two kinds."""
        if self.column is None:
            return
        cells = self._columns[self.column]
        tag, start = self._place(key)
        numbers = min(first, _LARGEST) << _NUMBER_BITS | min(second, _LARGEST)
        bucket = cells[start : start + WAYS].tolist()
        for index, cell in enumerate(bucket):
            if cell >> _TAG_BITS == tag:
                cells[start + index] = tag << _TAG_BITS | numbers if numbers else 0
                return
        if numbers and 0 in bucket:
            cells[start + bucket.index(0)] = tag << _TAG_BITS | numbers

    def others(self, key: bytes) -> tuple[int, int]:
        """How many the other processes have."""
        first = second = 0
        if self.column is None:
            return first, second
        tag, start = self._place(key)
        for column, cells in enumerate(self._columns):
            if column != self.column:
                for cell in cells[start : start + WAYS]:
                    if cell >> _TAG_BITS == tag:
                        first += cell >> _NUMBER_BITS & _LARGEST
                        second += cell & _LARGEST
        return first, second

    def clear(self, column: int) -> None:
        """A process has gone, and with it all that it had."""
        cells = self._columns[column]
        for index in range(COUNTS):
            # Read first: what was never written is to stay so.
            if cells[index]:
                cells[index] = 0

    def _place(self, key: bytes) -> tuple[int, int]:
        digest = self.hash(key)
        # 0 is a free cell.
        return (digest >> _TAG_BITS) or 1, digest % (COUNTS // WAYS) * WAYS


class Columns:
    """Which column belongs to which process; the supervisor's.

    There are more than places, since a process that is replaced goes on for a while beside its successor.

    Args:
      tables: the memory.
      number: how many there are.
    """

    def __init__(self, tables: Tables, number: int) -> None:
        self._tables = tables
        self._free = list(range(number))

    def take(self) -> int | None:
        """One that is nobody's; None: there is none, and the process counts for itself."""
        return self._free.pop(0) if self._free else None

    def give_back(self, column: int | None) -> None:
        """Its process has ended."""
        if column is not None:
            self._tables.clear(column)
            self._free.append(column)
