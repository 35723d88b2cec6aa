"""`SSPIStream`: a byte stream, by .NET's NegotiateStream. What it has in common with messages is in `endpoint`."""

from __future__ import annotations

import operator
from typing import Generic, Unpack

import trio

from .._errors import LocalProtocolError
from ..security.credentials import Acceptor, Initiator
from ..session import Protection, StreamSession, Tracer
from .endpoint import Endpoint, StreamT
from .options import StreamKeywords, StreamOptions, takes_options
from .states import CLOSED, HANDSHAKE


class SSPIStream(Endpoint[StreamT], trio.abc.HalfCloseableStream, Generic[StreamT]):
    r"""A sealed byte stream over another, with a peer authenticated by SSPI's Negotiate: .NET's NegotiateStream, [MS-NNS].

    Nobody but the two sides can read or change what is sent; but its end is not protected: [MS-NNS] has no
    goodbye, and whoever sits between can cut the stream between two records. Where that matters the application says how much
    there is. The handshake runs when it is first needed, or in `do_handshake`. All of Trio's rules for streams hold: one
    sending and one receiving task at a time.

    Anything that the peer, the network or the cryptography does wrong raises
    `trio.BrokenResourceError`, now and on every later use; its ``__cause__`` tells what it was, a
    `RemoteProtocolError` or the transport's own error.

    Args:
      transport_stream: see `SSPIChannel`.
      credential: an `Acceptor` makes this the server's side, an `Initiator` the client's.
      tracer: is told of each handshake step and each sealed record.
      **options: see `StreamOptions`.

    Attributes:
      transport_stream: see above.
      tracer: see above.
    """

    __slots__ = ()

    _session: StreamSession

    @takes_options(StreamOptions)
    def __init__(
        self,
        transport_stream: StreamT,
        credential: Acceptor | Initiator,
        *,
        tracer: Tracer | None = None,
        **options: Unpack[StreamKeywords],
    ) -> None:
        chosen = StreamOptions(**options)
        session = StreamSession(credential, protection=chosen.protection, tracer=tracer)
        super().__init__(transport_stream, session, credential, chosen, tracer)

    @property
    def protection(self) -> Protection:
        """How data is protected: ``"encrypt"`` or ``"sign"``, by what the two sides have agreed on.

        Raises:
          trio.NeedHandshakeError: before the handshake.
        """
        self._established()
        return self._session.protection

    # Sending

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Seal data and send it: all in one buffer, by one `send_all` of the transport's.

        Not cancel-safe: a cancelled `send_all` breaks the stream, since nobody knows how much of it has gone.

        Args:
          data: any number of bytes. They are sealed at once, a MiB in about two milliseconds; more than a few in one call
              hold up other tasks.

        Raises:
          trio.BrokenResourceError: the connection is gone.
          trio.BusyResourceError: another task is sending.
          trio.ClosedResourceError: the stream is closed, or `send_eof` was called.
        """
        self._check_not_ended()
        # Of bytes there is nothing to be gained; of all else it is made sure that it is bytes, in one piece.
        await self._send(data if isinstance(data, bytes) else memoryview(data).cast("B"))

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream.wait_send_all_might_not_block` for details."""
        self._enter_send()
        try:
            self._check_usable()
            self._check_not_ended()
            if self._state is HANDSHAKE:
                # The transport is used by the task that does it.
                await self._ensure_handshake(checkpoint=False)
            try:
                await self.transport_stream.wait_send_all_might_not_block()
            except BaseException as exc:
                self._translate(exc, cancel_breaks=False)
                raise
        finally:
            self._leave_send()

    async def send_eof(self) -> None:
        """Tell the peer that no more comes, and go on receiving. It is the transport's own end, which nothing protects.

        Raises:
          LocalProtocolError: the transport cannot end one direction alone.
          trio.BrokenResourceError: see `send_all`.
          trio.BusyResourceError: see `send_all`.
          trio.ClosedResourceError: the stream is closed.
        """
        transport = self.transport_stream
        if not isinstance(transport, trio.abc.HalfCloseableStream):
            raise LocalProtocolError(f"a {type(transport).__name__} cannot end one direction alone")
        self._enter_send()
        try:
            self._check_usable()
            await self._ensure_handshake(checkpoint=True)
            if self._session.said_all:
                return
            try:
                self._session.end()
                await transport.send_eof()
            except BaseException as exc:
                self._translate(exc, cancel_breaks=True)
                raise
        finally:
            self._leave_send()

    def _check_not_ended(self) -> None:
        if self._session.said_all and self._state is not CLOSED:
            raise trio.ClosedResourceError("send_eof was called")

    # Receiving

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Data, as it has come, and as it was sealed: at least a byte, unless the stream has ended.

        Cancel-safe: a cancelled `receive_some` loses nothing (but during the handshake it breaks the stream).

        Args:
          max_bytes: at most so many; None: all that is at hand.

        Returns:
          Nothing, once the peer has ended its direction between two records. Nobody vouches for that end.

        Raises:
          trio.BrokenResourceError: data was altered, or the connection is gone.
          trio.BusyResourceError: another task is receiving.
          trio.ClosedResourceError: the stream is closed.
          ValueError: ``max_bytes`` is less than 1.
        """
        if max_bytes is not None and (max_bytes := operator.index(max_bytes)) < 1:
            raise ValueError("max_bytes must be >= 1")
        try:
            if self._left:
                left: bytes = await self._receive_left(len(self._left) if max_bytes is None else max_bytes)
                return left
            data: bytes = await self._receive_opened()
        except trio.EndOfChannel:
            # It is raised without having waited, too.
            await trio.lowlevel.checkpoint()
            return b""
        # No await from here on, or a cancellation would lose it.
        if max_bytes is None or len(data) <= max_bytes:
            return data
        self._leave(data, max_bytes)
        return data[:max_bytes]
