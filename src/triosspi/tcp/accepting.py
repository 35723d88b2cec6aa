"""Accepting connections: the errors of accept(2) that concern single ones, and the addresses that they come from."""

# A peer may reset its connection before it is accepted, as load balancers' health checks do. From then on getpeername(2)
# fails, while accept(2) returns the address in any case. With getpeername alone such a connection would come from nowhere: no
# cap and no penalty would know its source, and a proxy would be taken for a client, its header for the beginning of a
# login. So the address that accept(2) returned is kept, and asked for once.

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn, TypeVar, cast
from weakref import WeakKeyDictionary

import trio

log = logging.getLogger("triosspi.server")

StreamT = TypeVar("StreamT", bound=trio.abc.Stream)
ResourceT = TypeVar("ResourceT", bound=trio.abc.AsyncResource)

# The machine is out of something, and may have it again soon.
_CAPACITY_ERRNOS: Final = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
_CAPACITY_PAUSE: Final = 0.1
# Which limit was reached, where the system's message does not tell.
_LIMITS: Final = {
    errno.EMFILE: ", this process's limit (ulimit -n, LimitNOFILE=)",
    errno.ENFILE: ", the machine's limit (fs.file-max)",
}
#: Seconds between two lines that say that nothing can be accepted.
SHORTAGE_INTERVAL: Final = 10.0
#: accept(2) under Linux passes on what happened to a connection before it was accepted.
CONNECTION_ERRNOS: Final = {
    getattr(errno, name)
    for name in (
        "ECONNABORTED",
        "ECONNRESET",
        "EHOSTDOWN",
        "EHOSTUNREACH",
        "ENETDOWN",
        "ENETUNREACH",
        "ENONET",
        "ENOPROTOOPT",
        "ENOSR",
        "EOPNOTSUPP",
        "EPERM",
        "EPROTO",
        "EPROTONOSUPPORT",
        "ESOCKTNOSUPPORT",
        "ETIMEDOUT",
    )
    if hasattr(errno, name)
}
# Closed here: POSIX's, and Windows's.
_CLOSED_ERRNOS: Final = {errno.EBADF, errno.ENOTSOCK}

_PEERS: Final[WeakKeyDictionary[trio.abc.Stream, Any]] = WeakKeyDictionary()


async def accept_forever(
    listener: trio.abc.Listener[ResourceT],
    nursery: trio.Nursery,
    serve: Callable[[ResourceT], Awaitable[object]],
    failed: Callable[[OSError], object],
) -> NoReturn:
    """Accept connections and start ``serve(connection)`` for each, whatever accept(2) says of single ones.

    Args:
      listener: is closed at the end.
      nursery: where the connections' tasks run.
      serve: serves one, and raises nothing.
      failed: called with what accept(2) has said when it has failed.

    Raises:
      OSError: the listener itself is of no use.
    """
    shortage = Shortage(log)
    async with listener:
        while True:
            try:
                connection = await accept(listener)
            except OSError as exc:
                failed(exc)
                if exc.errno in _CAPACITY_ERRNOS:
                    # Waiting connections stay in the kernel's queue, and are served when others have ended. A spare descriptor
                    # to accept them with and close them would turn a moment of shortage into failures.
                    shortage.failed(exc)
                    await trio.sleep(_CAPACITY_PAUSE)
                elif exc.errno in CONNECTION_ERRNOS:
                    log.info("a connection was gone before it was accepted: %s", exc.strerror)
                else:
                    raise
            else:
                shortage.succeeded()
                nursery.start_soon(serve, connection)


class Shortage:
    """Says that nothing can be accepted: at once, then now and then, and in the end that it is over.

    It fails ten times a second, and each connection that ends frees a descriptor for the next one: so it is over when
    it has not failed for as long as lies between two lines.

    Args:
      logger: where to say so.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._log = logger
        self._since = self._told = self._last = 0.0
        self._untold = self._count = 0

    def failed(self, exc: OSError) -> None:
        """Accepting has failed."""
        self._last = now = trio.current_time()
        self._count += 1
        self._untold += 1
        if self._count > 1 and now - self._told < SHORTAGE_INTERVAL:
            return
        what = f"{exc.strerror or exc}{_LIMITS.get(exc.errno or 0, '')}"
        if self._count == 1:
            self._since = now
            self._log.error("cannot accept: %s; it is tried again and again", what)
        else:
            self._log.error("cannot accept: %s; %d times in the last %.0f s", what, self._untold, now - self._told)
        self._told, self._untold = now, 0

    def succeeded(self) -> None:
        """Something was accepted."""
        if self._count and trio.current_time() - self._last >= SHORTAGE_INTERVAL:
            # A warning, as the beginning is at least: an operator who filters by level must see the end, too.
            lasted = self._last - self._since
            self._log.warning("accepting again: it had failed %d times in %.0f s", self._count, lasted)
            self._count = self._untold = 0


async def accept(listener: trio.abc.Listener[ResourceT]) -> ResourceT:
    """Accept the next connection; what the kernel says of its peer is kept for `peername`.

    See `trio.abc.Listener.accept` for details.
    """
    if not isinstance(listener, trio.SocketListener):
        return await listener.accept()
    while True:
        try:
            sock, address = await listener.socket.accept()
        except OSError as exc:
            if exc.errno in _CLOSED_ERRNOS:
                raise trio.ClosedResourceError from None
            # The next one may be better, as Trio has it.
            if exc.errno not in CONNECTION_ERRNOS:
                raise
        else:
            return cast(ResourceT, remember(trio.SocketStream(sock), address))


def remember(stream: StreamT, address: object) -> StreamT:
    """Keep what accept(2) said of a connection for `peername`.

    Args:
      stream: of the connection.
      address: the peer's, as Python's `socket.socket.accept` returns it.

    Returns:
      The stream.
    """
    _PEERS[stream] = address
    return stream


def peername(stream: Any) -> Any:
    """Where a connection comes from, as sockets have it. To be asked once: it is not kept any longer.

    Returns:
      What accept(2) said; of a stream that was accepted elsewhere, what the kernel says now. None where the peer
      is gone.
    """
    try:
        return _PEERS.pop(stream)
    except KeyError:
        pass
    try:
        return stream.socket.getpeername()
    except OSError:
        return None


def peer_address(stream: Any) -> str:
    """Where a connection comes from, for people: ``192.0.2.1:50000`` or ``[2001:db8::1]:50000``.

    To be asked once, see `peername`.
    """
    address = peername(stream)
    if not isinstance(address, tuple):
        # A Unix socket's, mostly empty; or the peer is gone already.
        return "unknown address"
    host, port, *_ = address
    return format_address(host, port)


def format_address(host: str, port: int) -> str:
    """An address and port in one, as URLs write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
