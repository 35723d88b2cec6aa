"""A connection's stream while its peer logs in: it tells who waits for whom."""

from __future__ import annotations

from collections.abc import Callable

import trio

from ..admission.admission import Entry


class LoginStream(trio.abc.HalfCloseableStream):
    """The stream underneath; what goes over it is told to the connection's entry.

    A channel has it only for the time of its handshake: whoever is logged in pays nothing for it.

    Args:
      stream: the stream underneath.
      entry: is told.

    Attributes:
      before_sending: called before something is sent, which is not if that raises.
    """

    def __init__(self, stream: trio.SocketStream, entry: Entry) -> None:
        self._stream = stream
        self._entry = entry
        self.before_sending: Callable[[], object] = bool
        self._put_back = b""

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """See `trio.abc.ReceiveStream.receive_some` for details."""
        if self._put_back:
            data, self._put_back = self._put_back, b""
            return data
        # Asking for more with nothing sent in between is waiting on: one byte a second does not make a peer younger.
        self._entry.busy = False
        received = await self._stream.receive_some(max_bytes)
        self._entry.busy = True
        return received

    def put_back(self, data: bytes) -> None:
        """Have it received once more: it was only looked at."""
        self._put_back = data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream.send_all` for details."""
        self.before_sending()
        self._entry.answered()
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream.wait_send_all_might_not_block` for details."""
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream.send_eof` for details."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource.aclose` for details."""
        await self._stream.aclose()
