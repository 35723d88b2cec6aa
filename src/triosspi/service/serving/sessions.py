"""The sessions of a server: their limits of time and traffic, and what ends them."""

# One task looks at all sessions in turns, every other second, instead of a timer for each, which would have to be moved at
# each message; here a session that says something costs nothing, and an idle one a microsecond now and then. The price:
# limits are kept to the nearest seconds, and a cap on messages or bytes may be passed by what goes over the wire
# meanwhile. The caps are far below what the cryptography can bear.
#
# A session is ended by closing its channel, with a goodbye. Its handler's next use of the channel raises
# ClosedResourceError, and the handler ends. A handler that does not use its channel, because it waits for something else, is
# cancelled a little later: else it would keep its place for ever. That takes a cancel scope for each session, the most
# expensive thing here: 0.8 KiB of an idle connection's eleven. Trio has no other way to end one task, and a limit may be
# set by a reload long after the handler has begun. A handler that shields itself from cancellation, swallows it, or waits
# for a thread cannot be ended; that is logged once.

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from typing import Final

import trio

from ...security.identity import Traffic
from ...tcp import NOTICE, LiveSession, Outcome, TCPEndpoint
from ..admission.admission import Entry
from ..config.settings import Limits

log = logging.getLogger("triosspi.server")

#: Seconds between two looks at a session.
WATCH_INTERVAL: Final = 2.0
#: Seconds after its cancellation until a handler that goes on is logged.
STUBBORN: Final = 30.0
# Sessions that are looked at without a checkpoint between them: 0.2 ms.
_SLICE: Final = 100
_NOTHING: Final = Traffic(0, 0, 0, 0)

_numbers = itertools.count(1)


class WatchedSession(LiveSession):
    """One peer that has logged in, under the limits.

    Args:
      channel: its channel.
      source: where it connects from, for people.
      expires: when its ticket ends, on Trio's clock; None if it has none.
      entry: its place in the admission.

    Attributes:
      number: unique in this process.
      since: when it logged in, on Trio's clock.
      entry: see above.
      scope: its handler runs in it.
    """

    __slots__ = ("_due", "_messages", "_moved", "entry", "number", "since")

    scope: trio.CancelScope

    def __init__(self, channel: TCPEndpoint, source: str, expires: float | None, entry: Entry) -> None:
        super().__init__(channel, source, expires)
        self.number = next(_numbers)
        self.since = trio.current_time()
        self.entry = entry
        self.scope = trio.CancelScope()
        # Once it is ended: when its handler is given no more time.
        self._due = math.inf
        # How many messages had gone over the channel when it was last looked at, and when one more had.
        self._messages = 0
        self._moved = self.since

    def look(self, now: float, limits: Limits) -> Traffic:
        """What has gone over the channel so far; if its time is over, `ended_by` says so from now on."""
        traffic = self.channel.traffic
        messages = traffic.messages_sent + traffic.messages_received
        if messages != self._messages:
            self._messages, self._moved = messages, now
        if self.ended_by is None:
            self.ended_by = self._overdue(now, limits, traffic)
        return traffic

    def give_notice(self, now: float) -> None:
        """Its channel is being closed; `insist` comes when that was to no avail."""
        self._due = now + NOTICE

    def insist(self, now: float) -> None:
        """Cancel a handler that has not ended by itself after its notice."""
        if now < self._due:
            return
        peer = self.channel.peer
        if not self.scope.cancel_called:
            log.warning("%s: %s: its handler has not ended within %g s: cancelled", self.source, peer, NOTICE)
            self.scope.cancel()
            self._due = now + STUBBORN
        else:
            log.warning("%s: %s: its handler goes on though cancelled, and keeps its place", self.source, peer)
            self._due = math.inf

    def _overdue(self, now: float, limits: Limits, traffic: Traffic) -> Outcome | None:
        if self.expires is not None and now >= self.expires:
            return "expired"
        if limits.idle_timeout is not None and now - self._moved >= limits.idle_timeout:
            return "idle"
        if self.channel.peer.mechanism != "ntlm" and limits.session_caps == "ntlm":
            return None
        if limits.max_session_age is not None and now - self.since >= limits.max_session_age:
            return "age"
        most_bytes = max(traffic.bytes_sent, traffic.bytes_received)
        if limits.max_session_bytes is not None and most_bytes >= limits.max_session_bytes:
            return "bytes"
        most_messages = max(traffic.messages_sent, traffic.messages_received)
        if limits.max_session_messages is not None and most_messages >= limits.max_session_messages:
            return "messages"
        return None


class Sessions:
    """All sessions of one server.

    Args:
      limits: gives the limits as they are now.
      traffic: is told what has gone over all channels since it was last told.

    Attributes:
      stopping: no handler receives any more.
    """

    def __init__(self, limits: Callable[[], Limits], traffic: Callable[[Traffic], None]) -> None:
        self._limits = limits
        self._traffic = traffic
        self._live: set[WatchedSession] = set()
        # What has gone over channels that are no more, and what of all traffic was told.
        self._ended = self._told = _NOTHING
        self.stopping = False

    def __len__(self) -> int:
        return len(self._live)

    def add(self, session: WatchedSession) -> None:
        """It has logged in."""
        self._live.add(session)
        if self.stopping:
            session.channel.stop_receiving()

    def remove(self, session: WatchedSession) -> None:
        """Its handler has ended."""
        self._live.remove(session)
        self._ended = _sum(self._ended, session.channel.traffic)

    def stop(self) -> None:
        """Let every handler finish what it has received, and receive no more; new sessions too."""
        self.stopping = True
        for session in list(self._live):
            session.channel.stop_receiving()

    async def watch(self, nursery: trio.Nursery) -> None:
        """Look after the sessions until cancelled; what must end is closed in tasks of the nursery."""
        try:
            while True:
                await trio.sleep(WATCH_INTERVAL)
                await self._look_at_all(nursery)
        finally:
            self._tell(_sum(self._ended, *(session.channel.traffic for session in self._live)))

    async def _look_at_all(self, nursery: trio.Nursery) -> None:
        limits, now = self._limits(), trio.current_time()
        sent = sent_bytes = received = received_bytes = 0
        for index, session in enumerate(list(self._live), 1):
            if index % _SLICE == 0:
                await trio.lowlevel.checkpoint()
            if session not in self._live:
                continue
            ended_before = session.ended_by
            traffic = session.look(now, limits)
            # Summed up without `_sum`, which would take a third of the time that ten thousand sessions take.
            sent += traffic.messages_sent
            sent_bytes += traffic.bytes_sent
            received += traffic.messages_received
            received_bytes += traffic.bytes_received
            if session.ended_by is not ended_before:
                session.give_notice(now)
                nursery.start_soon(_end, session)
            elif session.ended_by is not None:
                session.insist(now)
        self._tell(_sum(self._ended, Traffic(sent, sent_bytes, received, received_bytes)))

    def _tell(self, total: Traffic) -> None:
        # A session that ended while all were looked at may be counted next time, or twice: the sum must not go down.
        news = Traffic(*(max(0, new - old) for new, old in zip(total, self._told, strict=True)))
        if any(news):
            self._told = _sum(self._told, news)
            self._traffic(news)


def _sum(*traffics: Traffic) -> Traffic:
    return Traffic(*map(sum, zip(*traffics, strict=True)))


async def _end(session: WatchedSession) -> None:
    log.info("%s: %s: ended: %s", session.source, session.channel.peer, session.ended_by)
    try:
        await session.channel.aclose()
    except Exception as exc:  # noqa: BLE001 - whatever it is, it must not end the watch over all others
        log.warning("%s: %s: while closing: %s", session.source, session.channel.peer, exc)
