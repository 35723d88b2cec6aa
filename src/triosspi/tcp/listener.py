"""`SSPIListener`: wraps a listener, so that its connections are channels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, Unpack

import trio

from ..channel import ChannelKeywords, ChannelOptions, SSPIChannel, StreamT, takes_channel_options
from ..security.credentials import Acceptor
from ..session import Tracer
from .accepting import accept

log = logging.getLogger("triosspi.server")


class SSPIListener(trio.abc.Listener[SSPIChannel[StreamT]], Generic[StreamT]):
    """Wraps a listener, so that its connections are channels.

    `accept` only wraps: the handshake is left to the first use of the channel, so that a slow client
    does not hold up the others.

    Args:
      transport_listener: the listener underneath; it is owned and closed.
      acceptor: what clients authenticate with.
      make_tracer: makes the tracer of each connection. What it raises is logged (to the logger
          ``triosspi.server``), and is that connection's end: its channel is broken from the start.
      **options: see `ChannelOptions`.

    Raises:
      LocalProtocolError: an option cannot be.
    """

    @takes_channel_options
    def __init__(
        self,
        transport_listener: trio.abc.Listener[StreamT],
        acceptor: Acceptor,
        *,
        make_tracer: Callable[[], Tracer] | None = None,
        **options: Unpack[ChannelKeywords],
    ) -> None:
        # Made here so that what cannot be is found now, and not first when somebody connects.
        self._options = ChannelOptions(**options)
        self.transport_listener = transport_listener
        self._acceptor = acceptor
        self._make_tracer = make_tracer

    async def accept(self) -> SSPIChannel[StreamT]:
        """Accept the next connection and wrap it. See `trio.abc.Listener.accept` for details."""
        transport_stream = await accept(self.transport_listener)
        try:
            tracer, failure = self._trace()
            channel = SSPIChannel(transport_stream, self._acceptor, tracer=tracer, **self._options.keywords())
        except BaseException:
            # The caller does not have it, and could not close it.
            await trio.aclose_forcefully(transport_stream)
            raise
        if failure is not None:
            channel.give_up(failure)
        return channel

    def _trace(self) -> tuple[Tracer | None, Exception | None]:
        """A connection's tracer, or why there is none."""
        try:
            return (None if self._make_tracer is None else self._make_tracer()), None
        except Exception as exc:
            # Not raised by `accept`: an OSError there is the listener's, and ends a server.
            log.exception("make_tracer failed: its connection is given up")
            return None, exc

    async def aclose(self) -> None:
        """Close the listener underneath."""
        await self.transport_listener.aclose()
