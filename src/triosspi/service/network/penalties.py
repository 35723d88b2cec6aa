"""Failed logins that are held against their source, as OpenSSH's PerSourcePenalties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Failure: TypeAlias = Literal["auth", "no_login", "timeout", "evicted", "protocol"]


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
      max_sources: the most sources remembered, for IPv4 and IPv6 each (max-sources4, max-sources6).
      overflow: what to do when there are more: "permissive" forgets the source that would be free soonest,
        "deny" refuses every source of that family until there is room.
    """

    auth: float = 5.0
    no_login: float = 1.0
    timeout: float = 10.0
    evicted: float = 5.0
    protocol: float = 90.0
    most: float = 600.0
    least: float = 15.0
    max_sources: int = 65_536
    overflow: Literal["permissive", "deny"] = "permissive"

    def seconds(self, failure: Failure) -> float:
        """What one failure costs."""
        seconds: float = getattr(self, failure)
        return seconds


class _Penalty:
    """One source's.

    Attributes:
      end: when it is forgotten, on the clock.
      active: whether the source is refused; once it is, until the end.
    """

    __slots__ = ("active", "end")

    def __init__(self, end: float) -> None:
        self.end = end
        self.active = False


class Penalties:
    """The penalties of one address family.

    A timer wheel: each source also stands in the bucket of the second in which its penalty ends.
    Buckets are emptied as time passes, a bounded number of entries with each call, so that what a
    flood of sources left behind stalls nobody; an entry whose end is over counts for nothing, emptied
    or not. A heap would need log(n) steps, and one that also moves entries either grows with dead ones
    or may have to move them all at once.

    Within a bucket whose penalty was the last to grow goes first: "soonest" is exact to a second.

    Args:
      policy: their sizes.
    """

    # Of more than one, or a table that was filled would never empty.
    _PER_CALL: Final = 32

    def __init__(self, policy: PenaltyPolicy) -> None:
        self._policy = policy
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self._by_source: dict[int, _Penalty] = {}
        # Buckets are sets; as dicts they give out their last entry.
        self._by_second: dict[int, dict[int, None]] = {}
        # No bucket lies before it.
        self._first = 0

    def __len__(self) -> int:
        return len(self._by_source)

    def refuses(self, key: int, now: float) -> bool:
        """Whether this source may not connect."""
        self._sweep(int(now))
        if self._policy.overflow == "deny" and len(self) >= self._policy.max_sources:
            return True
        penalty = self._by_source.get(key)
        return penalty is not None and penalty.active and now < penalty.end

    def add(self, key: int, seconds: float, now: float) -> None:
        """Add to a source's penalty."""
        policy = self._policy
        self._sweep(int(now))
        if seconds <= 0 or (policy.overflow == "deny" and len(self) >= policy.max_sources):
            return
        penalty = self._by_source.get(key)
        # Also one that is over: its bucket may not have been emptied yet.
        self._remove(key)
        if penalty is None or penalty.end <= now:
            penalty = _Penalty(now)
        penalty.end = min(penalty.end + seconds, now + policy.most)
        self._insert(key, penalty)
        if penalty.end - now > policy.least:
            penalty.active = True
        if len(self) > policy.max_sources:
            self._remove_soonest()

    def _sweep(self, second: int) -> None:
        """Forget what ended before this second, or some of it."""
        if not self._by_source:
            self._first = second
            return
        left = self._PER_CALL
        # The steps over empty seconds are at most as many as the longest penalty has.
        while self._first < second and self._by_source:
            bucket = self._by_second.get(self._first)
            if bucket is None:
                self._first += 1
                continue
            if not left:
                return
            left -= 1
            self._remove_one(bucket)

    def _remove_soonest(self) -> None:
        # It is at most as late as the one that was just added, so no further than one penalty away.
        while (bucket := self._by_second.get(self._first)) is None:
            self._first += 1
        self._remove_one(bucket)

    def _remove_one(self, bucket: dict[int, None]) -> None:
        # The last one: to the first a dict must step over the places of all that were first before it.
        key, _ = bucket.popitem()
        del self._by_source[key]
        if not bucket:
            del self._by_second[self._first]

    def _insert(self, key: int, penalty: _Penalty) -> None:
        second = int(penalty.end)
        self._by_source[key] = penalty
        self._by_second.setdefault(second, {})[key] = None
        self._first = min(self._first, second)

    def _remove(self, key: int) -> None:
        penalty = self._by_source.pop(key, None)
        if penalty is not None:
            second = int(penalty.end)
            bucket = self._by_second[second]
            del bucket[key]
            if not bucket:
                del self._by_second[second]
