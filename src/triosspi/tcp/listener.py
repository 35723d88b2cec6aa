"""`SSPIListener`: wraps a listener, so that its connections are channels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic

import trio

from ..channel import Impersonator, RunBlocking, SSPIChannel, StreamT, run_in_thread
from ..security.credentials import Acceptor
from ..session import Tracer
from ..wire import DEFAULT_MAX_MESSAGE_SIZE, WireFormat, check_max_message_size
from .accepting import accept

log = logging.getLogger("triosspi.server")


class SSPIListener(trio.abc.Listener[SSPIChannel[StreamT]], Generic[StreamT]):
    """Wraps a listener, so that its connections are channels.

    `accept` only wraps: the handshake is left to whoever uses the channel, so that a client that
    dawdles holds up nobody else.

    Args:
      transport_listener: the listener underneath; it is owned and closed.
      acceptor: what clients authenticate with.
      wire: see `SSPIChannel`.
      max_message_size: see `SSPIChannel`.
      run_blocking: see `SSPIChannel`.
      make_tracer: makes the tracer of each connection. What it raises is logged (to the logger
          ``triosspi.server``), and is that connection's end: its channel is broken from the start.
      impersonation: see `SSPIChannel`.
    """

    def __init__(
        self,
        transport_listener: trio.abc.Listener[StreamT],
        acceptor: Acceptor,
        *,
        wire: WireFormat = WireFormat.FRAMED,
        max_message_size: int = DEFAULT_MAX_MESSAGE_SIZE,
        run_blocking: RunBlocking = run_in_thread,
        make_tracer: Callable[[], Tracer] | None = None,
        impersonation: Impersonator | None = None,
    ) -> None:
        # Not first when somebody connects.
        check_max_message_size(max_message_size)
        self.transport_listener = transport_listener
        self._acceptor = acceptor
        self._wire = wire
        self._max_message_size = max_message_size
        self._run_blocking = run_blocking
        self._make_tracer = make_tracer
        self._impersonation = impersonation

    async def accept(self) -> SSPIChannel[StreamT]:
        """Accept the next connection and wrap it. See `trio.abc.Listener.accept` for details."""
        transport_stream = await accept(self.transport_listener)
        try:
            tracer, failure = self._trace()
            channel = SSPIChannel(
                transport_stream,
                self._acceptor,
                wire=self._wire,
                max_message_size=self._max_message_size,
                run_blocking=self._run_blocking,
                tracer=tracer,
                impersonation=self._impersonation,
            )
        except BaseException:
            # Nobody else knows of it.
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
