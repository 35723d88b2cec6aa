"""`SSPIListener` and `NegotiateStreamListener`: wrap a listener, so that its connections are channels or streams."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar, Unpack

import trio

from ..channel import (
    ChannelKeywords,
    ChannelOptions,
    Endpoint,
    SSPIChannel,
    SSPIStream,
    StreamKeywords,
    StreamOptions,
    StreamT,
    takes_options,
)
from ..security.credentials import Acceptor
from ..session import Tracer
from .accepting import accept

log = logging.getLogger("triosspi.server")


EndpointT = TypeVar("EndpointT", bound=Endpoint[Any])


class AuthenticatingListener(trio.abc.Listener[EndpointT], Generic[StreamT, EndpointT]):
    """What both have in common.

    Args:
      transport_listener: the listener underneath; it is owned and closed.
      wrap: makes of a stream and a tracer what is accepted.
      make_tracer: see `SSPIListener`.

    Attributes:
      transport_listener: see above.
    """

    def __init__(
        self,
        transport_listener: trio.abc.Listener[StreamT],
        wrap: Callable[[StreamT, Tracer | None], EndpointT],
        make_tracer: Callable[[], Tracer] | None,
    ) -> None:
        self.transport_listener = transport_listener
        self._wrap = wrap
        self._make_tracer = make_tracer

    async def accept(self) -> EndpointT:
        """Accept the next connection and wrap it. See `trio.abc.Listener.accept` for details."""
        transport_stream = await accept(self.transport_listener)
        try:
            tracer, failure = self._trace()
            endpoint = self._wrap(transport_stream, tracer)
        except BaseException:
            # The caller does not have it, and could not close it.
            await trio.aclose_forcefully(transport_stream)
            raise
        if failure is not None:
            endpoint.give_up(failure)
        return endpoint

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


class SSPIListener(AuthenticatingListener[StreamT, SSPIChannel[StreamT]], Generic[StreamT]):
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

    @takes_options(ChannelOptions)
    def __init__(
        self,
        transport_listener: trio.abc.Listener[StreamT],
        acceptor: Acceptor,
        *,
        make_tracer: Callable[[], Tracer] | None = None,
        **options: Unpack[ChannelKeywords],
    ) -> None:
        # Made here so that what cannot be is found now, and not first when somebody connects.
        chosen = ChannelOptions(**options).keywords()
        super().__init__(
            transport_listener,
            lambda stream, tracer: SSPIChannel(stream, acceptor, tracer=tracer, **chosen),
            make_tracer,
        )


class NegotiateStreamListener(AuthenticatingListener[StreamT, SSPIStream[StreamT]], Generic[StreamT]):
    """Wraps a listener, so that its connections are streams of .NET's NegotiateStream.

    Args:
      transport_listener: see `SSPIListener`.
      acceptor: see `SSPIListener`.
      make_tracer: see `SSPIListener`.
      **options: see `StreamOptions`.

    Raises:
      LocalProtocolError: an option cannot be.
    """

    @takes_options(StreamOptions)
    def __init__(
        self,
        transport_listener: trio.abc.Listener[StreamT],
        acceptor: Acceptor,
        *,
        make_tracer: Callable[[], Tracer] | None = None,
        **options: Unpack[StreamKeywords],
    ) -> None:
        chosen = StreamOptions(**options).keywords()
        super().__init__(
            transport_listener,
            lambda stream, tracer: SSPIStream(stream, acceptor, tracer=tracer, **chosen),
            make_tracer,
        )
