"""`SSPIChannel`: messages. What it has in common with a byte stream is in `endpoint`."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any, Generic, Unpack

import trio

from ..security.credentials import Acceptor, Initiator
from ..security.identity import ContextSizes
from ..session import Session, Tracer
from .endpoint import Endpoint, StreamT
from .options import ChannelKeywords, ChannelOptions, takes_options


class SSPIChannel(Endpoint[StreamT], trio.abc.Channel[bytes], Generic[StreamT]):
    r"""Sealed messages over a byte stream, with a peer authenticated by SSPI's Negotiate.

    A message that is sent arrives whole or not at all, once, and in order; nobody but the two sides
    can read or change it. The handshake runs when it is first needed, or in `do_handshake`. Like a
    Trio stream, a channel may be used by one sending and one receiving task at a time.

    Anything that the peer, the network or the cryptography does wrong raises
    `trio.BrokenResourceError`, now and on every later use; its ``__cause__`` tells what it was, a
    `RemoteProtocolError` or the transport's own error.

    Args:
      transport_stream: the stream to speak over; the channel owns and closes it. Where it can
          half-close (`trio.abc.HalfCloseableStream`) replies in flight survive a close.
      credential: an `Acceptor` makes this the server's side, an `Initiator` the client's.
      tracer: is told of each handshake step and each sealed message.
      **options: see `ChannelOptions`.

    Attributes:
      transport_stream: see above.
      tracer: see above.
    """

    __slots__ = ()

    _session: Session

    @takes_options(ChannelOptions)
    def __init__(
        self,
        transport_stream: StreamT,
        credential: Acceptor | Initiator,
        *,
        tracer: Tracer | None = None,
        **options: Unpack[ChannelKeywords],
    ) -> None:
        chosen = ChannelOptions(**options)
        session = Session(credential, chosen.wire, max_message_size=chosen.max_message_size, tracer=tracer)
        super().__init__(transport_stream, session, credential, chosen, tracer)

    @property
    def sizes(self) -> ContextSizes:
        """Bytes of the trailer and of the longest message: SSPI's SECPKG_ATTR_SIZES.

        Raises:
          trio.NeedHandshakeError: before the handshake.
        """
        self._established()
        return self._session.sizes

    async def send(self, value: bytes) -> None:
        """Seal one message and send it.

        Not cancel-safe: a cancelled `send` breaks the channel, since nobody knows how much of the
        message has gone.

        Args:
          value: the message: 1 to ``sizes.max_message`` bytes.

        Raises:
          LocalProtocolError: (a ValueError) the message is empty or too long; nothing was sent, and
              the channel is as it was.
          trio.BrokenResourceError: the connection is gone, or the peer has said goodbye.
          trio.BusyResourceError: another task is sending.
          trio.ClosedResourceError: the channel is closed.
        """
        await self._send((value,))

    def send_many(self, messages: Sequence[bytes]) -> Coroutine[Any, Any, None]:
        """Seal messages in order and send them at once: one buffer, one `send_all`. To be awaited.

        See `send` for details. When one message cannot be sent, none is.
        """
        return self._send(messages)

    async def receive(self) -> bytes:
        """The next message.

        Cancel-safe: a cancelled `receive` loses nothing (but during the handshake it breaks the
        channel, see `do_handshake`).

        Raises:
          trio.EndOfChannel: the peer has said goodbye.
          trio.BrokenResourceError: a message did not open, or the connection is gone. Its cause is a
              `TruncatedError` with ``at_boundary`` true when the peer closed between two messages
              without a goodbye, which some peers cannot say.
          trio.BusyResourceError: another task is receiving.
          trio.ClosedResourceError: the channel is closed.
        """
        if self._left:
            left: list[bytes] = await self._receive_left(1)
            return left[0]
        messages: list[bytes] = await self._receive_opened()
        # No await from here on, or a cancellation would lose them.
        if len(messages) > 1:
            self._leave(messages, 1)
        return messages[0]

    def receive_many(self) -> Coroutine[Any, Any, list[bytes]]:
        """Every message at hand, at least one. To be awaited.

        See `receive` for details. One wake-up of a task costs many times what a message costs, so a
        peer that sends without waiting is served best by this and `send_many`.
        """
        return self._receive_opened()
