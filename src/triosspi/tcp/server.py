"""A server of channels or streams over TCP: the life of a connection with nothing filled in but its counters."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias, TypeVar, Unpack

import trio

from .._errors import printable
from ..channel import ChannelKeywords, ChannelOptions, StreamKeywords, StreamOptions, takes_options
from ..security.credentials import Acceptor
from ..session import Tracer
from .accepting import accept_forever, peer_address
from .connection import (
    AnyHandler,
    Attempt,
    ConnectionServer,
    Handler,
    LiveSession,
    StreamHandler,
    TCPEndpoint,
)
from .endings import End, LoginFailure
from .listener import AuthenticatingListener, NegotiateStreamListener, SSPIListener
from .tickets import Tickets, ticket_end

log = logging.getLogger("triosspi.server")

TCPListener: TypeAlias = SSPIListener[trio.SocketStream]
TCPStreamListener: TypeAlias = NegotiateStreamListener[trio.SocketStream]
ListenerT = TypeVar("ListenerT", bound=AuthenticatingListener[trio.SocketStream, Any])

#: Seconds for a whole handshake, as OpenSSH's LoginGraceTime: for all of it, not for each read.
DEFAULT_HANDSHAKE_TIMEOUT: Final = 30.0


@dataclass(slots=True)
class ServerStatistics:
    """Counts what `serve_sspi_over_tcp` does. Pass one in, and look at it at any time.

    Attributes:
      accepted: connections.
      authenticated: handshakes that succeeded, so also handlers that were called.
      nothing_said: connections that ended before their first byte, as health checks do.
      refused: handshakes that failed, through the peer or the network.
      timed_out: handshakes that took longer than ``handshake_timeout``.
      handler_errors: handlers that raised something of their own.
      lost: sessions in which the connection was lost or a message did not open.
      expired: sessions that ended with the peer's Kerberos ticket.
      accept_errors: failures of accept(2).
    """

    accepted: int = 0
    authenticated: int = 0
    nothing_said: int = 0
    refused: int = 0
    timed_out: int = 0
    handler_errors: int = 0
    lost: int = 0
    expired: int = 0
    accept_errors: int = 0


@takes_options(ChannelOptions)
async def open_sspi_over_tcp_listeners(
    port: int,
    acceptor: Acceptor,
    *,
    host: str | None = None,
    make_tracer: Callable[[], Tracer] | None = None,
    backlog: int | None = None,
    **options: Unpack[ChannelKeywords],
) -> list[TCPListener]:
    """Listen. Accepting only wraps: the handshake is left to the first use of the channel.

    Args:
      port: TCP port; 0 lets the system choose.
      acceptor: what clients authenticate with.
      host: name or address to bind, of a name all addresses that this machine has; None binds all interfaces, IPv4 and
        IPv6.
      make_tracer: see `SSPIListener`.
      backlog: see `trio.open_tcp_listeners`.
      **options: see `ChannelOptions`.

    Raises:
      OSError: see `trio.open_tcp_listeners`.
      LocalProtocolError: an option cannot be.
    """
    # Checked before sockets are opened, which an error here would leave open.
    chosen = ChannelOptions(**options)
    return [
        SSPIListener(listener, acceptor, make_tracer=make_tracer, **chosen.keywords())
        for listener in await _open_tcp_listeners(port, host, backlog)
    ]


@takes_options(StreamOptions)
async def open_negotiate_stream_listeners(
    port: int,
    acceptor: Acceptor,
    *,
    host: str | None = None,
    make_tracer: Callable[[], Tracer] | None = None,
    backlog: int | None = None,
    **options: Unpack[StreamKeywords],
) -> list[TCPStreamListener]:
    """Listen for clients of .NET's NegotiateStream. In all else see `open_sspi_over_tcp_listeners`.

    Args:
      port: see `open_sspi_over_tcp_listeners`.
      acceptor: see `open_sspi_over_tcp_listeners`.
      host: see `open_sspi_over_tcp_listeners`.
      make_tracer: see `SSPIListener`.
      backlog: see `trio.open_tcp_listeners`.
      **options: see `StreamOptions`.

    Raises:
      OSError: see `trio.open_tcp_listeners`.
      LocalProtocolError: an option cannot be.
    """
    chosen = StreamOptions(**options)
    return [
        NegotiateStreamListener(listener, acceptor, make_tracer=make_tracer, **chosen.keywords())
        for listener in await _open_tcp_listeners(port, host, backlog)
    ]


async def _open_tcp_listeners(port: int, host: str | None, backlog: int | None) -> list[trio.SocketListener]:
    """As `trio.open_tcp_listeners`, but of several addresses of a name it may be that this machine has not all.

    In /etc/hosts "localhost" is ::1, too, where a container has no IPv6.
    """
    try:
        return await trio.open_tcp_listeners(port, host=host, backlog=backlog)
    except OSError as exc:
        if exc.errno != errno.EADDRNOTAVAIL or host is None:
            raise
        missing = exc
    found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM, flags=trio.socket.AI_PASSIVE)
    listeners: list[trio.SocketListener] = []
    with ExitStack() as undo:
        for address in dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found):
            try:
                opened = await trio.open_tcp_listeners(port, host=address, backlog=backlog)
            except OSError as exc:
                if exc.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                log.warning("not listening on %s, an address of %s: %s", address, printable(host), exc.strerror)
            else:
                for listener in opened:
                    undo.callback(listener.socket.close)
                listeners += opened
        undo.pop_all()
    if not listeners:
        raise missing
    return listeners


@takes_options(ChannelOptions)
async def serve_sspi_over_tcp(
    handler: Handler,
    port: int,
    acceptor: Acceptor,
    *,
    host: str | None = None,
    make_tracer: Callable[[], Tracer] | None = None,
    backlog: int | None = None,
    handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
    handler_nursery: trio.Nursery | None = None,
    statistics: ServerStatistics | None = None,
    task_status: trio.TaskStatus[list[TCPListener]] = trio.TASK_STATUS_IGNORED,
    **options: Unpack[ChannelKeywords],
) -> NoReturn:
    """Listen, authenticate every client, and call ``handler(channel)`` for each that succeeds.

    Unlike `trio.serve_tcp`, this goes on whatever happens to one connection: a handshake that fails
    or takes too long, a handler that raises, a peer that vanishes are logged (to the logger
    ``triosspi.server``) and counted. The channel is closed when the handler returns, and no session
    outlives its Kerberos ticket by more than seconds: then `SSPIChannel.receive` raises `trio.EndOfChannel` in the
    handler, one that has not ended five seconds later is cancelled, and the channel closed with a goodbye.

    Args:
      handler: called in a task of its own with an authenticated channel.
      port: see `open_sspi_over_tcp_listeners`.
      acceptor: see `open_sspi_over_tcp_listeners`.
      host: see `open_sspi_over_tcp_listeners`.
      make_tracer: see `SSPIListener`.
      backlog: see `trio.open_tcp_listeners`.
      handshake_timeout: seconds for each client's whole handshake.
      handler_nursery: where connections' tasks run; by default a nursery of its own.
      statistics: is counted up.
      task_status: `trio.Nursery.start` returns the listeners.
      **options: see `ChannelOptions`.

    Returns:
      Never, unless cancelled.
    """
    listeners = await open_sspi_over_tcp_listeners(
        port, acceptor, host=host, make_tracer=make_tracer, backlog=backlog, **options
    )
    await serve_sspi_listeners(
        handler,
        listeners,
        handshake_timeout=handshake_timeout,
        handler_nursery=handler_nursery,
        statistics=statistics,
        task_status=task_status,
    )


@takes_options(StreamOptions)
async def serve_negotiate_stream_over_tcp(
    handler: StreamHandler,
    port: int,
    acceptor: Acceptor,
    *,
    host: str | None = None,
    make_tracer: Callable[[], Tracer] | None = None,
    backlog: int | None = None,
    handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
    handler_nursery: trio.Nursery | None = None,
    statistics: ServerStatistics | None = None,
    task_status: trio.TaskStatus[list[TCPStreamListener]] = trio.TASK_STATUS_IGNORED,
    **options: Unpack[StreamKeywords],
) -> NoReturn:
    """The same for clients of .NET's NegotiateStream: ``handler(stream)`` gets an `SSPIStream`.

    A client whose login was refused may try again on its connection, twice, within the same ``handshake_timeout``; each of
    them is counted.

    Args:
      handler: called in a task of its own with an authenticated stream.
      port: see `open_sspi_over_tcp_listeners`.
      acceptor: see `open_sspi_over_tcp_listeners`.
      host: see `open_sspi_over_tcp_listeners`.
      make_tracer: see `SSPIListener`.
      backlog: see `trio.open_tcp_listeners`.
      handshake_timeout: see `serve_sspi_over_tcp`.
      handler_nursery: see `serve_sspi_over_tcp`.
      statistics: see `serve_sspi_over_tcp`.
      task_status: see `serve_sspi_over_tcp`.
      **options: see `StreamOptions`.

    Returns:
      Never, unless cancelled.
    """
    listeners = await open_negotiate_stream_listeners(
        port, acceptor, host=host, make_tracer=make_tracer, backlog=backlog, **options
    )
    await serve_sspi_listeners(
        handler,
        listeners,
        handshake_timeout=handshake_timeout,
        handler_nursery=handler_nursery,
        statistics=statistics,
        task_status=task_status,
    )


async def serve_sspi_listeners(
    handler: AnyHandler,
    listeners: list[ListenerT],
    *,
    handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
    handler_nursery: trio.Nursery | None = None,
    statistics: ServerStatistics | None = None,
    task_status: trio.TaskStatus[list[ListenerT]] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Serve listeners that are open already, of channels or of streams; they are closed at the end.

    See `serve_sspi_over_tcp` for details.
    """
    counts = statistics if statistics is not None else ServerStatistics()
    server = CountingServer(handler, handshake_timeout, counts)

    def failed(_: OSError) -> None:
        counts.accept_errors += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.tickets.watch)
        for listener in listeners:
            nursery.start_soon(accept_forever, listener, handler_nursery or nursery, server.serve, failed)
        # A nursery's block would end here, and the listeners' tasks never do.
        task_status.started(listeners)
    raise AssertionError("unreachable")  # pragma: no cover


class CountedAttempt(Attempt):
    """A channel before its login, as the library's server sees it."""

    __slots__ = ("_channel", "_server")

    def __init__(self, channel: TCPEndpoint, server: CountingServer) -> None:
        super().__init__(peer_address(channel.transport_stream))
        self._channel = channel
        self._server = server

    async def open(self) -> TCPEndpoint:
        """See `Attempt.open`."""
        return self._channel

    def failed(self, failure: LoginFailure) -> None:
        """See `Attempt.failed`."""
        counts = self._server.counts
        if failure.kind == "nothing_said":
            counts.nothing_said += 1
            log.debug("%s: %s", self.source, failure.reason)
        elif failure.kind == "timeout":
            counts.timed_out += 1
            log.warning("%s: %s", self.source, failure.reason)
        else:
            counts.refused += 1
            if failure.kind != "error":
                log.warning("%s: login refused: %s", self.source, failure.reason)

    def logged_in(self, channel: TCPEndpoint) -> LiveSession:
        """See `Attempt.logged_in`."""
        self._server.counts.authenticated += 1
        session = LiveSession(channel, self.source, ticket_end(channel.peer))
        self._server.tickets.add(session)
        return session


class CountingServer(ConnectionServer[TCPEndpoint]):
    """The library's server, which counts and logs."""

    def __init__(self, handler: AnyHandler, handshake_timeout: float, counts: ServerStatistics) -> None:
        self.handler = handler
        self.counts = counts
        self.tickets = Tickets()
        self._handshake_timeout = handshake_timeout

    @property
    def handshake_timeout(self) -> float:
        """See `ConnectionServer.handshake_timeout`."""
        return self._handshake_timeout

    def admit(self, arrived: TCPEndpoint) -> CountedAttempt:
        """See `ConnectionServer.admit`."""
        self.counts.accepted += 1
        return CountedAttempt(arrived, self)

    def ended(self, session: LiveSession, end: End) -> None:
        """See `ConnectionServer.ended`."""
        self.tickets.remove(session)
        peer = session.channel.peer
        if end.outcome == "handler_error":
            self.counts.handler_errors += 1
        elif end.outcome == "expired":
            self.counts.expired += 1
            log.info("%s: %s: the Kerberos ticket has ended", session.source, peer)
        elif end.outcome in ("peer_closed", "goodbye"):
            log.info("%s: %s: closed by the peer", session.source, peer)
        if end.outcome == "lost" or end.forged is not None:
            self.counts.lost += 1
            log.warning("%s: %s: connection lost: %s", session.source, peer, end.forged or end.error)

    def closing_failed(self) -> None:
        """See `ConnectionServer.closing_failed`."""
        self.counts.handler_errors += 1
