"""Sessions that end with their peers' Kerberos tickets."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final, NoReturn

import trio

from ..security.identity import PeerIdentity
from .connection import LiveSession

#: Seconds between the notice that a handler gets on its channel, when its session's time is over, and its cancellation.
NOTICE: Final = 5.0
# How often tickets are looked at, while there are any.
_INTERVAL: Final = 1.0


def ticket_end(peer: PeerIdentity) -> float | None:
    """When a peer's ticket ends, on Trio's clock; None where there is no ticket."""
    if peer.expires_at is None:
        return None
    return trio.current_time() + max(0.0, (peer.expires_at - datetime.now(UTC)).total_seconds())


class Tickets:
    """Gives handlers notice on their channels when their peers' tickets end, and cancels them a little later.

    One task looks at all, since a task for each would be the most of what an idle session takes. Should it end before
    the handlers, in a nursery that is given to the server, they are cancelled without notice.
    """

    def __init__(self) -> None:
        # Sessions that have ended are not in it: their tickets may have hours to go.
        self._ends: dict[LiveSession, float] = {}
        self._some = trio.Event()

    def add(self, session: LiveSession) -> None:
        """Look after a session, if it has a ticket; before its handler runs."""
        if session.expires is not None:
            # A scope has its price, so only here.
            session.scope = trio.CancelScope(deadline=session.expires + NOTICE)
            self._ends[session] = session.expires
            self._some.set()

    def remove(self, session: LiveSession) -> None:
        """Its handler has ended."""
        self._ends.pop(session, None)

    async def watch(self) -> NoReturn:
        """Give notice, until cancelled."""
        while True:
            await self._some.wait()
            while self._ends:
                await trio.sleep(_INTERVAL)
                now = trio.current_time()
                for session in [session for session, end in self._ends.items() if end <= now]:
                    del self._ends[session]
                    session.ended_by = "expired"
                    session.channel.stop_receiving()
            self._some = trio.Event()
