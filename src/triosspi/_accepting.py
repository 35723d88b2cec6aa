"""Accepting connections: whatever accept(2) says of single ones, and whom it says that they come from."""

# A peer may reset its connection before anybody has looked at it, as load balancers' health checks do. From then on
# getpeername(2) knows of no peer, while accept(2) is told the address in any case. Whoever asked later would have a connection
# from nowhere: no cap and no penalty would know its source, and a proxy would be taken for a client, its header for the
# beginning of a login. So what accept(2) has said is kept, and asked for once.

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
# accept(2) under Linux passes on what happened to a connection before it was accepted.
_CONNECTION_ERRNOS: Final = {
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
    failed: Callable[[], None],
) -> NoReturn:
    """Accept connections and start ``serve(connection)`` for each, whatever accept(2) says of single ones.

    Args:
      listener: is closed at the end.
      nursery: where the connections' tasks run.
      serve: serves one, and raises nothing.
      failed: called when accept has failed.

    Raises:
      OSError: the listener itself is of no use.
    """
    async with listener:
        while True:
            try:
                connection = await accept(listener)
            except OSError as exc:
                failed()
                if exc.errno in _CAPACITY_ERRNOS:
                    log.error(  # noqa: TRY400 - the reason is all there is to it
                        "cannot accept: %s; trying again in %s s", exc.strerror, _CAPACITY_PAUSE
                    )
                    await trio.sleep(_CAPACITY_PAUSE)
                elif exc.errno in _CONNECTION_ERRNOS:
                    log.info("a connection was gone before it was accepted: %s", exc.strerror)
                else:
                    raise
            else:
                nursery.start_soon(serve, connection)


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
            if exc.errno not in _CONNECTION_ERRNOS:
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
      What accept(2) said; of a stream that was accepted elsewhere, what the kernel says now. None where nobody
      knows: the peer is gone.
    """
    try:
        return _PEERS.pop(stream)
    except KeyError:
        pass
    try:
        return stream.socket.getpeername()
    except OSError:
        return None
