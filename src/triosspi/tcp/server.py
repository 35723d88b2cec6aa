"""Channels over TCP: a client's one, a server's many."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final, NoReturn, TypeAlias, Unpack

import trio

from .._errors import ImpersonationError, TicketExpiredError, TruncatedError, UnsealError, printable
from ..channel import ChannelKeywords, ChannelOptions, SSPIChannel, takes_channel_options
from ..security.credentials import Acceptor, Initiator
from ..security.identity import PeerIdentity
from ..session import Tracer
from .accepting import accept_forever, peername
from .listener import SSPIListener

log = logging.getLogger("triosspi.server")

TCPChannel: TypeAlias = SSPIChannel[trio.SocketStream]
TCPListener: TypeAlias = SSPIListener[trio.SocketStream]
Handler: TypeAlias = Callable[[TCPChannel], Awaitable[object]]

#: Seconds for a whole handshake, as OpenSSH's LoginGraceTime: for all of it, not for each read.
DEFAULT_HANDSHAKE_TIMEOUT: Final = 30.0

#: Seconds between the notice that a handler gets on its channel, when its session's time is over, and its cancellation.
NOTICE: Final = 5.0
# How often tickets are looked at, while there are any.
_TICKETS_INTERVAL: Final = 1.0


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
      **options: see `ChannelOptions`.

    Raises:
      OSError: no connection, see `trio.open_tcp_stream`.
      LocalProtocolError: an option cannot be.
      ConfigurationError: ``host`` cannot be a target's.
    """
    # Before anything is opened that nobody would close.
    chosen = ChannelOptions(**options)
    initiator = initiator.with_default_host(host)
    stream = await trio.open_tcp_stream(host, port, happy_eyeballs_delay=happy_eyeballs_delay)
    try:
        return SSPIChannel(stream, initiator, tracer=tracer, **chosen.keywords())
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


@takes_channel_options
async def open_sspi_over_tcp_listeners(
    port: int,
    acceptor: Acceptor,
    *,
    host: str | None = None,
    make_tracer: Callable[[], Tracer] | None = None,
    backlog: int | None = None,
    **options: Unpack[ChannelKeywords],
) -> list[TCPListener]:
    """Listen. Accepting only wraps: the handshake is left to whoever uses the channel.

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
    # Before anything is opened that nobody would close.
    chosen = ChannelOptions(**options)
    return [
        SSPIListener(listener, acceptor, make_tracer=make_tracer, **chosen.keywords())
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


@takes_channel_options
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


async def serve_sspi_listeners(
    handler: Handler,
    listeners: list[TCPListener],
    *,
    handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
    handler_nursery: trio.Nursery | None = None,
    statistics: ServerStatistics | None = None,
    task_status: trio.TaskStatus[list[TCPListener]] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Serve listeners that are open already; they are closed at the end.

    See `serve_sspi_over_tcp` for details.
    """
    counts = statistics if statistics is not None else ServerStatistics()
    tickets = Tickets()
    serve = partial(
        serve_connection, handler=handler, handshake_timeout=handshake_timeout, counts=counts, tickets=tickets
    )

    def failed(_: OSError) -> None:
        counts.accept_errors += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tickets.watch)
        for listener in listeners:
            nursery.start_soon(accept_forever, listener, handler_nursery or nursery, serve, failed)
        # A nursery's block would end here, and the listeners' tasks never do.
        task_status.started(listeners)
    raise AssertionError("unreachable")  # pragma: no cover


class Tickets:
    """Ends handlers with their peers' Kerberos tickets: gives them notice on their channels, then cancels them.

    One task looks at all, since a task for each would be the most of what an idle session takes. Should it end before
    the handlers, in a nursery that is given to the server, they are cancelled without notice.
    """

    def __init__(self) -> None:
        # On Trio's clock. Sessions that have ended are not in it: their tickets may have hours to go.
        self._ends: dict[TCPChannel, float] = {}
        self._some = trio.Event()

    async def watch(self) -> NoReturn:
        """Give notice, until cancelled."""
        while True:
            await self._some.wait()
            while self._ends:
                await trio.sleep(_TICKETS_INTERVAL)
                now = trio.current_time()
                for channel in [channel for channel, end in self._ends.items() if end <= now]:
                    del self._ends[channel]
                    channel.stop_receiving()
            self._some = trio.Event()

    async def run(self, handler: Handler, channel: TCPChannel, seconds: float) -> bool:
        """Run a handler as long as the ticket lasts, and a little longer.

        Returns:
          Whether it was ended, or ended by itself, when the ticket had.
        """
        end = trio.current_time() + seconds
        self._ends[channel] = end
        self._some.set()
        try:
            with trio.move_on_at(end + NOTICE):
                await handler(channel)
        except Exception as exc:
            found = connection_end(exc)
            if found is None or tampering(found) is not None:
                raise
            if trio.current_time() < end and not isinstance(found.__cause__, TicketExpiredError):
                raise
            return True
        finally:
            self._ends.pop(channel, None)
        return trio.current_time() >= end


async def serve_connection(
    channel: TCPChannel, handler: Handler, handshake_timeout: float, counts: ServerStatistics, tickets: Tickets
) -> bool:
    """One connection, from accept to close. Raises nothing but Cancelled and its like.

    Returns:
      Whether the peer was authenticated, and so the handler called.
    """
    # One coroutine for all of a connection's life: it waits for days, thousands of times.
    counts.accepted += 1
    source = peer_address(channel)
    authenticated = False
    try:
        authenticated = await _authenticate(channel, source, handshake_timeout, counts)
        if authenticated:
            # Errors are accounted for before closing, which takes its time, and when cancelled replaces them.
            try:
                if (seconds := _seconds_left(channel.peer)) is None:
                    # A scope has its price, too.
                    await handler(channel)
                elif await tickets.run(handler, channel, seconds):
                    counts.expired += 1
                    log.info("%s: %s: the Kerberos ticket has ended", source, channel.peer)
            except Exception as exc:  # noqa: BLE001 - logged with its traceback
                _account_for(exc, channel, source, counts)
            except BaseExceptionGroup as group:
                # While the server is cancelled, a handler's nursery raises its errors together with Cancelled.
                errors = group.subgroup(Exception)
                if errors is not None:
                    _account_for(errors, channel, source, counts)
                raise
    finally:
        if authenticated:
            await _close(channel, source, counts)
        else:
            await trio.aclose_forcefully(channel)
    return authenticated


async def _authenticate(channel: TCPChannel, source: str, handshake_timeout: float, counts: ServerStatistics) -> bool:
    try:
        with trio.move_on_after(handshake_timeout) as in_time:
            await channel.do_handshake()
    except trio.BrokenResourceError as exc:
        if said_nothing(exc):
            # Health checks and port scanners, by the thousand.
            counts.nothing_said += 1
            log.debug("%s: %s", source, exc)
        else:
            counts.refused += 1
            log.warning("%s: login refused: %s", source, exc)
        return False
    except Exception:
        # Not the peer's doing, but still only this connection's end.
        counts.refused += 1
        log.exception("%s: the handshake failed through an error of ours", source)
        return False
    if in_time.cancelled_caught:
        counts.timed_out += 1
        log.warning("%s: no login within %s s", source, handshake_timeout)
        return False
    counts.authenticated += 1
    return True


async def _close(channel: TCPChannel, source: str, counts: ServerStatistics) -> None:
    try:
        await channel.aclose()
    except Exception as exc:  # noqa: BLE001 - logged with its traceback
        _account_for(exc, channel, source, counts)


def _seconds_left(peer: PeerIdentity) -> float | None:
    """How long the peer's ticket lasts; None where there is no ticket."""
    if peer.expires_at is None:
        return None
    return max(0.0, (peer.expires_at - datetime.now(UTC)).total_seconds())


def _account_for(exc: Exception, channel: TCPChannel, source: str, counts: ServerStatistics) -> None:
    end, forged = connection_end(exc), tampering(exc)
    if (refused := impersonation_refused(exc)) is not None:
        # A line missing in a map, and no bug.
        counts.handler_errors += 1
        log.warning("%s: %s: cannot be impersonated: %s", source, channel.peer, refused)
    elif end is None:
        counts.handler_errors += 1
        log.error("%s: %s: the handler failed", source, channel.peer, exc_info=exc)
    elif is_ordinary_end(end) and forged is None:
        log.info("%s: %s: closed by the peer", source, channel.peer)
        return
    if end is not None or forged is not None:
        # Also beside a bug: else whoever tampers needs only to meet one.
        counts.lost += 1
        log.warning("%s: %s: connection lost: %s", source, channel.peer, forged or end)


def _leaves(exc: Exception) -> Iterator[Exception]:
    """What a group holds, however deep; an exception that is none holds itself."""
    if isinstance(exc, ExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc


def connection_end(exc: Exception, *, closed: bool = False) -> Exception | None:
    """The end of the connection that a handler ran into, if that is all that it raised.

    Where a group holds several, it is the worst: a message that did not open before a connection that was
    lost, and that before a peer that left.

    Args:
      exc: what it raised.
      closed: whether somebody else than the handler may have closed the channel.
    """
    ends = list(_leaves(exc))
    return max(ends, key=_gravity) if all(_is_end(end, closed=closed) for end in ends) else None


def _is_end(exc: Exception, *, closed: bool) -> bool:
    ended = isinstance(exc, (trio.BrokenResourceError, trio.EndOfChannel))
    return ended or (closed and isinstance(exc, trio.ClosedResourceError))


def _gravity(end: Exception) -> int:
    if tampering(end) is not None:
        return 2
    return int(not is_ordinary_end(end) and not isinstance(end, trio.ClosedResourceError))


def impersonation_refused(exc: Exception, *, closed: bool = False) -> ImpersonationError | None:
    """That a peer could not be impersonated, if that is all that a handler raised, but for ends of the connection."""
    refused = None
    for leaf in _leaves(exc):
        if isinstance(leaf, ImpersonationError):
            refused = refused or leaf
        elif not _is_end(leaf, closed=closed):
            return None
    return refused


def tampering(exc: BaseException) -> UnsealError | None:
    """The message that did not open, if one is behind what a handler raised, in whatever it was wrapped."""
    seen: set[int] = set()
    left: list[BaseException | None] = [exc]
    while left:
        found = left.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, UnsealError) and not isinstance(found, TicketExpiredError):
            return found
        left += [found.__cause__, found.__context__]
        if isinstance(found, BaseExceptionGroup):
            left += found.exceptions
    return None


def is_ordinary_end(exc: Exception) -> bool:
    """Whether a peer that simply was done raises this: a goodbye, or an end between two messages.

    The latter because some peers cannot say goodbye; whoever must tell it from an attacker's cut
    looks at `TruncatedError` himself.
    """
    cause = exc.__cause__
    if isinstance(cause, TruncatedError):
        return cause.at_boundary
    return isinstance(exc, trio.EndOfChannel) or isinstance(cause, trio.EndOfChannel)


def said_nothing(exc: trio.BrokenResourceError) -> bool:
    """Whether a handshake failed because the connection ended, in whatever way, before its first byte."""
    return isinstance(exc.__cause__, TruncatedError) and exc.__cause__.nothing_said


def peer_address(channel: TCPChannel) -> str:
    """Where a channel's peer connects from, for people: ``192.0.2.1:50000`` or ``[2001:db8::1]:50000``.

    To be asked once, see `peername`.
    """
    address = peername(channel.transport_stream)
    if not isinstance(address, tuple):
        # A Unix socket's, mostly empty; or the peer is gone already.
        return "unknown address"
    host, port, *_ = address
    return format_address(host, port)


def format_address(host: str, port: int) -> str:
    """An address and port in one, as URLs write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
