"""Failed logins that are held against their source, as OpenSSH's PerSourcePenalties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from .tables import WAYS

Failure: TypeAlias = Literal["auth", "no_login", "timeout", "evicted", "protocol"]

# A cell: 27 bits of the key's hash, whether it is refused, and 36 bits of when it is forgotten, in sixteenths of a second.
_PER_SECOND: Final = 16
_END_BITS: Final = 36
_END_MASK: Final = (1 << _END_BITS) - 1
_ACTIVE: Final = 1 << _END_BITS
_TAG_SHIFT: Final = _END_BITS + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PenaltyPolicy:
    """How long a source is refused for what it did; the defaults are those of OpenSSH 10 (``sshd -T``).

    Penalties of one source add up, and nothing happens before ``least`` is exceeded: three wrong
    passwords in a row cost nothing, the fourth at once costs 20 seconds.

    Attributes:
      auth: seconds for a login that was refused (authfail).
      no_login: seconds for a connection that left without having tried (noauth).
      timeout: seconds for one that sat there until the handshake's deadline (grace-exceeded).
      evicted: seconds for one that sat there until its place was needed (OpenSSH has none). Without it, attackers who come
        back as fast as they are dropped would do so for ever.
      protocol: seconds for input that no honest client sends and that this server could not handle (crash).
      most: seconds, however often it happens (max).
      least: seconds that must add up before the source is refused (min).
    """

    auth: float = 5.0
    no_login: float = 1.0
    timeout: float = 10.0
    evicted: float = 5.0
    protocol: float = 90.0
    most: float = 600.0
    least: float = 15.0

    def seconds(self, failure: Failure) -> float:
        """What one failure costs."""
        seconds: float = getattr(self, failure)
        return seconds


class Penalties:
    """A table of them; see `tables` for how it is kept.

    Args:
      cells: its memory; a multiple of `WAYS`.
      hash_of: gives 64 bits of a key.
      most: seconds that a penalty is remembered, at most.
    """

    def __init__(self, cells: memoryview, hash_of: Callable[[bytes], int], most: float) -> None:
        self._cells = cells
        self._hash = hash_of
        self._most = most

    def clear(self) -> None:
        """Forget all."""
        for index, cell in enumerate(self._cells):
            if cell:
                self._cells[index] = 0

    def refused(self, key: bytes, now: float) -> bool:
        """Whether there is one that has exceeded what costs nothing."""
        _, cell = self._find(key)
        return bool(cell & _ACTIVE) and now * _PER_SECOND < cell & _END_MASK

    def left(self, key: bytes, now: float) -> float:
        """Seconds until it is forgotten; 0 where there is none."""
        _, cell = self._find(key)
        return max(0.0, (cell & _END_MASK) / _PER_SECOND - now)

    def add(self, key: bytes, seconds: float, now: float, least: float) -> None:
        """Add to a penalty.

        Args:
          key: whose.
          seconds: see `PenaltyPolicy`.
          now: on the clock that all processes share.
          least: see `PenaltyPolicy`.
        """
        if seconds <= 0:
            return
        place, cell = self._find(key)
        end = (cell & _END_MASK) / _PER_SECOND
        active = cell & _ACTIVE if end > now else 0
        end = min(max(end, now) + seconds, now + self._most)
        if end - now > least:
            active = _ACTIVE
        tag = self._hash(key) >> _TAG_SHIFT or 1
        self._cells[place] = tag << _TAG_SHIFT | active | int(end * _PER_SECOND) & _END_MASK

    def _find(self, key: bytes) -> tuple[int, int]:
        """Where a key's cell is, or is to be, and what it holds for it."""
        digest = self._hash(key)
        tag = digest >> _TAG_SHIFT or 1
        start = digest % (len(self._cells) // WAYS) * WAYS
        bucket = self._cells[start : start + WAYS].tolist()
        for index, cell in enumerate(bucket):
            if cell >> _TAG_SHIFT == tag:
                return start + index, cell
        # Nobody's, or whose would be forgotten soonest.
        return start + min(range(WAYS), key=lambda index: bucket[index] & _END_MASK), 0
