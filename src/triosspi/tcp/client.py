"""A client's channel over TCP."""

from __future__ import annotations

from typing import Unpack

import trio

from .._errors import LocalProtocolError
from ..channel import ChannelKeywords, ChannelOptions, SSPIChannel, takes_channel_options
from ..security.credentials import Initiator
from ..session import Tracer
from .connection import TCPChannel


@takes_channel_options
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
    if chosen.impersonation is not None:
        raise LocalProtocolError("impersonation is an acceptor's: a client cannot impersonate its server")
    initiator = initiator.with_default_host(host)
    stream = await trio.open_tcp_stream(host, port, happy_eyeballs_delay=happy_eyeballs_delay)
    try:
        return SSPIChannel(stream, initiator, tracer=tracer, **chosen.keywords())
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
