"""Even loads for worker processes that accept from one socket: the one with the fewest connections goes first (leastconn)."""

# A connection to a shared socket wakes every worker that waits for one, and the first to run takes it. Under load that is
# good: a busy worker comes late, so connections go to workers that have time for them, and none waits for one that
# hangs. Without load it is bad: the kernel wakes them in the same order always, so the same one always wins (of 1,000
# clients that came one by one, one of two workers got 730 to 940); sessions that last for a day are still there when there
# is work, and the caps on connections hold for each worker. With a socket for each (SO_REUSEPORT) the kernel deals
# evenly, by a hash; but a connection that was dealt to a worker that is busy, dead or hanging waits for that one, and there
# are no more logins per second.
#
# So workers share one socket, and tell each other how many connections they have: a number each, in memory that all have mapped. A
# worker that has more than another gives the others a moment for a new connection; and another moment, as long as they take
# some. If they take none they are busy, and it does not wait for them again for a while. It waits for no lock and for no worker that
# is dead, and a number that is wrong costs a client a few milliseconds.

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from typing import Final

import trio

from ...tcp import remember

#: Seconds that others have to take a connection. Waking up and accepting takes an idle worker a tenth of that.
MOMENT: Final = 0.001
#: How many in a row they get while they do take some.
MOMENTS: Final = 10
#: Seconds in which those are not waited for who have not used their moment.
PAUSE: Final = 0.05


class OwnLoad:
    """How many connections a worker has, for the others to see.

    Args:
      loads: of all, see `Tables`. Eight bytes at their natural place are written in one piece.
      number: the worker's, from 1.

    Attributes:
      count: how many connections it has now; by default how many it has ever accepted.
    """

    def __init__(self, loads: memoryview, number: int) -> None:
        self._loads = loads
        self._index = number - 1
        self._accepted = 0
        self.count: Callable[[], int] = lambda: self._accepted

    def tell(self) -> None:
        """Write the number down."""
        # 0: there is no such worker, or it does not accept.
        self._loads[self._index] = 1 + self.count()

    def took_one(self) -> None:
        """It has accepted a connection, which need not be counted yet."""
        self._accepted += 1
        self._loads[self._index] = 1 + self.count() + 1

    def others_if_more(self) -> list[int] | None:
        """The others' numbers, if this worker has more than one of them."""
        others = [load - 1 for index, load in enumerate(self._loads) if load and index != self._index]
        return others if others and min(others) < self.count() else None


class BalancedListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts from a socket that others accept from, too, and lets those go first who have fewer connections.

    Args:
      sock: listens already; belongs to this from now on.
      load: this worker's.
    """

    def __init__(self, sock: socket.socket, load: OwnLoad) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._load = load
        self._wait_for_nobody_until = -math.inf

    async def accept(self) -> trio.SocketStream:
        """See `trio.SocketListener.accept` for details."""
        while True:
            if self._sock.fileno() < 0:
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_readable(self._sock)
            await self._let_others_go_first()
            if self._sock.fileno() < 0:
                # Meanwhile.
                raise trio.ClosedResourceError
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                continue
            self._load.took_one()
            return remember(trio.SocketStream(trio.socket.from_stdlib_socket(sock)), address)

    async def _let_others_go_first(self) -> None:
        for _ in range(MOMENTS):
            others = self._load.others_if_more()
            if others is None or trio.current_time() < self._wait_for_nobody_until:
                return
            await trio.sleep(MOMENT)
            if others == self._load.others_if_more():
                break
        # They did not come, or there is too much even for them.
        self._wait_for_nobody_until = trio.current_time() + PAUSE

    @property
    def socket(self) -> socket.socket:
        """What it accepts from."""
        return self._sock

    def close(self) -> None:
        """Close the socket, here and now. May be called twice."""
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    async def aclose(self) -> None:
        """The same."""
        self.close()
        await trio.lowlevel.checkpoint()
