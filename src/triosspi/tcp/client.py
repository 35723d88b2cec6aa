"""A client's channel or stream over TCP."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, Unpack

import trio

from .._errors import LocalProtocolError
from ..channel import (
    ChannelKeywords,
    ChannelOptions,
    ConnectionOptions,
    SSPIChannel,
    SSPIStream,
    StreamKeywords,
    StreamOptions,
    takes_options,
)
from ..security.credentials import Initiator
from ..session import Tracer
from .connection import TCPChannel, TCPStream

T = TypeVar("T")


@takes_options(ChannelOptions)
async def open_sspi_over_tcp_channel(
    host: str,
    port: int,
    initiator: Initiator,
    *,
    tracer: Tracer | None = None,
    happy_eyeballs_delay: float | None = 0.25,
    **options: Unpack[ChannelKeywords],
) -> TCPChannel:
    """Connect to a server. The handshake is left to the first use, or `SSPIChannel.do_handshake`.

    Args:
      host: name or address; also the target's host where the initiator names no target.
      port: TCP port.
      initiator: what to log in with.
      tracer: see `SSPIChannel`.
      happy_eyeballs_delay: seconds, see `trio.open_tcp_stream`.
      **options: see `ChannelOptions`. Impersonation is an acceptor's, and an error here.

    Raises:
      OSError: no connection, see `trio.open_tcp_stream`.
      LocalProtocolError: an option cannot be.
      ConfigurationError: ``host`` cannot be a target's.
    """
    # Checked before the connection is opened, which an error here would leave open.
    chosen = ChannelOptions(**options)

    def wrap(stream: trio.SocketStream, initiator: Initiator) -> TCPChannel:
        return SSPIChannel(stream, initiator, tracer=tracer, **chosen.keywords())

    return await _open(host, port, initiator, options=chosen, happy_eyeballs_delay=happy_eyeballs_delay, wrap=wrap)


@takes_options(StreamOptions)
async def open_negotiate_stream(
    host: str,
    port: int,
    initiator: Initiator,
    *,
    tracer: Tracer | None = None,
    happy_eyeballs_delay: float | None = 0.25,
    **options: Unpack[StreamKeywords],
) -> TCPStream:
    """Connect to a server of .NET's NegotiateStream. The handshake is left to the first use, or `SSPIStream.do_handshake`.

    Args:
      host: see `open_sspi_over_tcp_channel`.
      port: see `open_sspi_over_tcp_channel`.
      initiator: see `open_sspi_over_tcp_channel`.
      tracer: see `SSPIStream`.
      happy_eyeballs_delay: seconds, see `trio.open_tcp_stream`.
      **options: see `StreamOptions`. Impersonation is an acceptor's, and an error here.

    Raises:
      OSError: see `open_sspi_over_tcp_channel`.
      LocalProtocolError: see `open_sspi_over_tcp_channel`.
      ConfigurationError: see `open_sspi_over_tcp_channel`.
    """
    chosen = StreamOptions(**options)

    def wrap(stream: trio.SocketStream, initiator: Initiator) -> TCPStream:
        return SSPIStream(stream, initiator, tracer=tracer, **chosen.keywords())

    return await _open(host, port, initiator, options=chosen, happy_eyeballs_delay=happy_eyeballs_delay, wrap=wrap)


async def _open(
    host: str,
    port: int,
    initiator: Initiator,
    *,
    options: ConnectionOptions,
    happy_eyeballs_delay: float | None,
    wrap: Callable[[trio.SocketStream, Initiator], T],
) -> T:
    if options.impersonation is not None:
        raise LocalProtocolError("impersonation is an acceptor's: a client cannot impersonate its server")
    initiator = initiator.with_default_host(host)
    stream = await trio.open_tcp_stream(host, port, happy_eyeballs_delay=happy_eyeballs_delay)
    try:
        return wrap(stream, initiator)
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
