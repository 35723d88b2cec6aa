"""Which wire formats a server's port speaks, and what it makes of a connection."""

from __future__ import annotations

from dataclasses import dataclass, replace

import trio

from ...channel import ChannelOptions, Impersonator, SSPIChannel, SSPIStream, StreamOptions
from ...security.credentials import Acceptor
from ...session import Tracer
from ...tcp import TCPEndpoint
from ...wire import WireFormat, is_negotiate_stream
from ..config.assembly import message_wire
from ..config.settings import Serve
from .login_stream import LoginStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Wires:
    """One wire format, or a NegotiateStream's and one of messages, of which each client chooses by what it begins with.

    Attributes:
      messages: options of the channels; None: messages are not spoken.
      streams: options of the streams; None: NegotiateStream is not spoken.
    """

    messages: ChannelOptions | None = None
    streams: StreamOptions | None = None

    @classmethod
    def of(cls, serve: Serve, impersonation: Impersonator | None) -> Wires:
        """As the settings want it."""
        streams = StreamOptions(protection=serve.protection, impersonation=impersonation)
        if serve.wire == WireFormat.NEGOTIATE_STREAM.value:
            return cls(streams=streams)
        messages = ChannelOptions(
            wire=WireFormat(message_wire(serve)),
            max_message_size=serve.max_message_size,
            impersonation=impersonation,
        )
        return cls(messages=messages, streams=streams if serve.wire == "auto" else None)

    def impersonating(self, impersonation: Impersonator | None) -> Wires:
        """The same with another impersonation."""
        return Wires(
            messages=None if self.messages is None else replace(self.messages, impersonation=impersonation),
            streams=None if self.streams is None else replace(self.streams, impersonation=impersonation),
        )

    async def open(self, stream: LoginStream, acceptor: Acceptor, tracer: Tracer | None) -> TCPEndpoint:
        """Make a channel or a stream of a connection; where that depends on the client, read its first bytes.

        Raises:
          Exception: whatever reading from the peer raises.
        """
        # A login stream is one for the handshake only, which asks no more of it.
        transport: trio.SocketStream = stream  # type: ignore[assignment]
        if self.messages is None or (self.streams is not None and await _speaks_negotiate_stream(stream)):
            assert self.streams is not None
            return SSPIStream(transport, acceptor, tracer=tracer, **self.streams.keywords())
        return SSPIChannel(transport, acceptor, tracer=tracer, **self.messages.keywords())


async def _speaks_negotiate_stream(stream: LoginStream) -> bool:
    beginning = b""
    while (found := is_negotiate_stream(beginning)) is None:
        if not (data := await stream.receive_some()):
            # Gone before that could be told; whatever is made of it says so.
            found = False
            break
        beginning += data
    stream.put_back(beginning)
    return found
