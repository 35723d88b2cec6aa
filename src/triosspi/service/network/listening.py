"""Where a server listens: TCP addresses, unix sockets, descriptors that it was given."""

# The process that opens the sockets keeps them: with workers that is the parent, which accepts nothing itself, so
# that what is queued on a socket outlives the worker that was to accept it. Workers get descriptors and
# make their own listeners of them (see `descriptors`). So a unix socket's file is removed by `close_listeners` or
# `remove_socket_files` only, in the process that made it: that a worker closes its listener is not the end
# of the socket.

from __future__ import annotations

import errno
import logging
import math
import os
import socket
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import trio

from ..._errors import ConfigurationError, printable
from ...tcp import CONNECTION_ERRNOS, format_address, peername, remember
from ..config.settings import Listen
from ..reasons import reason
from .addresses import IPAddress, format_peer, unmapped
from .descriptors import inherited_listeners
from .unix_sockets import UNIX, SocketFile, open_unix_socket

log = logging.getLogger("triosspi.server")

#: All interfaces, as the sample's INADDR_ANY, and IPv6 too.
ANY_HOST: Final = ("0.0.0.0", "::")  # noqa: S104 - a server

# What binding says where the machine has no IPv6, or not this address.
_NO_SUCH_ADDRESS: Final = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}
# The most that every system takes; each cuts it to what it allows.
_LONGEST_BACKLOG: Final = 0xFFFF
# Port 0: how often to ask for another where the first address's choice is taken on the second.
_TRIES: Final = 10

# Questions that a silent peer's kernel may leave unanswered.
_KEEPALIVE_PROBES: Final = 4
# macOS has another name for the first. Where there is none, the system's own times hold.
_KEEPALIVE_IDLE: Final[int | None] = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))
_KEEPALIVE_INTERVAL: Final[int | None] = getattr(socket, "TCP_KEEPINTVL", None)
_KEEPALIVE_COUNT: Final[int | None] = getattr(socket, "TCP_KEEPCNT", None)

_FILES: Final[WeakKeyDictionary[trio.abc.Listener[trio.SocketStream], SocketFile]] = WeakKeyDictionary()


# Opening and closing


async def open_listeners(
    settings: Listen, environ: MutableMapping[str, str] | None = None
) -> list[trio.SocketListener]:
    """Listen everywhere; or take the sockets that systemd has opened, and then nowhere else.

    Args:
      settings: where.
      environ: the environment, by default this process's; the variables of systemd's protocol are removed.

    Raises:
      ConfigurationError: somewhere it is not possible; then nothing is left open.
    """
    inherited = inherited_listeners(os.environ if environ is None else environ)
    if inherited:
        return inherited
    with ExitStack() as undo:
        # A configuration with a unix socket and no host is not meant to be reached from everywhere.
        listeners = await _open_tcp(settings, undo) if settings.hosts or not settings.unix else []
        listeners += [_open_unix(path, settings, undo) for path in settings.unix]
        undo.pop_all()
    return listeners


async def close_listeners(listeners: Iterable[trio.SocketListener]) -> None:
    """Close listeners of this module, and remove their files; see `remove_socket_files`."""
    listeners = list(listeners)
    # While they are open: who starts next finds either a socket that answers, or none.
    remove_socket_files(listeners)
    for listener in listeners:
        listener.socket.close()
    await trio.lowlevel.checkpoint()


def remove_socket_files(listeners: Iterable[trio.abc.Listener[trio.SocketStream]]) -> None:
    """Remove the files of unix sockets that this process has made, if they are still the same files."""
    for listener in listeners:
        if (file := _FILES.pop(listener, None)) is not None:
            file.remove()


def queued(listener: Any) -> Iterator[trio.SocketStream]:
    """The connections that wait to be accepted, now, by a listener that has a ``socket``."""
    with socket.fromfd(listener.socket.fileno(), listener.socket.family, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        while True:
            try:
                connection, address = sock.accept()
            except BlockingIOError:
                # There are no more.
                return
            except OSError as exc:
                if exc.errno in CONNECTION_ERRNOS:
                    # That one was gone before anybody had looked at it; the next may be there.
                    continue
                log.warning("whoever is still queued cannot be accepted, and is reset: %s", reason(exc))
                return
            yield remember(trio.SocketStream(trio.socket.from_stdlib_socket(connection)), address)


def where(listener: trio.SocketListener) -> str:
    """What a listener is bound to, for people: ``0.0.0.0:2000``, ``[::]:2000`` or ``unix:/run/triosspi.sock``."""
    name: Any = listener.socket.getsockname()
    if listener.socket.family == UNIX:
        return f"unix:{os.fsdecode(name)}".replace("\0", "@")
    host, port, *_ = name
    return format_address(host, port)


def _open_unix(path: Path, settings: Listen, undo: ExitStack) -> trio.SocketListener:
    # Not `resolve`: where there is a link it is looked at, not followed.
    sock, file = open_unix_socket(Path(os.path.abspath(path)), settings.unix_mode, _backlog(settings))
    undo.callback(sock.close)
    undo.callback(file.remove)
    listener = _listener(sock)
    _FILES[listener] = file
    return listener


def _backlog(settings: Listen) -> int:
    return _LONGEST_BACKLOG if settings.backlog is None else min(settings.backlog, _LONGEST_BACKLOG)


def _listener(sock: socket.socket) -> trio.SocketListener:
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


# TCP


async def _open_tcp(settings: Listen, undo: ExitStack) -> list[trio.SocketListener]:
    for tries_left in reversed(range(_TRIES)):
        try:
            with ExitStack() as attempt:
                sockets = await _bind_all(settings, attempt)
                undo.push(attempt.pop_all())
                return [_listener(sock) for sock in sockets]
        except _PortTaken:
            if not tries_left:
                raise
    raise AssertionError("unreachable")  # pragma: no cover


class _PortTaken(ConfigurationError):
    """A port that the system has chosen for one address is not free on another."""


async def _bind_all(settings: Listen, undo: ExitStack) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    port = settings.port
    for host in settings.hosts or ANY_HOST:
        try:
            sockets += await _bind_host(host, port, settings, undo)
            # The system's choice for the first address serves the others too.
            port = sockets[0].getsockname()[1]
        except OSError as exc:
            if not settings.hosts and sockets and exc.errno in _NO_SUCH_ADDRESS:
                continue
            taken = exc.errno == errno.EADDRINUSE and not settings.port
            raise _cannot_listen(format_address(host, port), reason(exc), taken=taken) from None
        except UnicodeError:
            raise _cannot_listen(format_address(host, port), "no host can be called so") from None
    return sockets


async def _bind_host(host: str, port: int, settings: Listen, undo: ExitStack) -> list[socket.socket]:
    """Bind a socket to each address of a host, as far as this machine has it.

    A name may have one that it has not: in /etc/hosts "localhost" is ::1, too, where a container has no IPv6.

    Raises:
      OSError: it has none of them, or one of them cannot be bound.
    """
    found: list[socket.socket] = []
    missing: list[tuple[str, OSError]] = []
    for family, address in await _resolve(host, port):
        try:
            found.append(_bind(family, (address[0], port, *address[2:]), settings, undo))
        except OSError as exc:
            if exc.errno not in _NO_SUCH_ADDRESS:
                raise
            missing.append((address[0], exc))
        else:
            port = found[0].getsockname()[1]
    if not found:
        raise missing[0][1]
    for skipped, error in missing:
        place = format_address(skipped, port)
        log.warning("not listening on %s, an address of %s: %s", place, printable(host), reason(error))
    return found


async def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # A name in /etc/hosts may stand there twice with one address: it can be bound once.
    addresses: dict[tuple[socket.AddressFamily, Any], None] = {}
    addresses.update(dict.fromkeys((family, address) for family, _, _, _, address in found))
    usable = [(family, address) for family, address in addresses if family != socket.AF_INET6 or _has_ipv6()]
    # Where none is, binding says why.
    return usable or list(addresses)


def _has_ipv6() -> bool:
    """Whether the kernel knows IPv6 at all: a name may have such an address nevertheless."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return True


def _bind(family: socket.AddressFamily, address: tuple[Any, ...], settings: Listen, undo: ExitStack) -> socket.socket:
    """Bind a socket to an address, and listen.

    Raises:
      OSError: it is not possible.
    """
    sock = socket.socket(family, socket.SOCK_STREAM)
    undo.callback(sock.close)
    if os.name != "nt":
        # Else a restart would have to wait for the last connections' TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        # IPv4 has sockets of its own.
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        sock.bind(address)
    except OSError:
        # It may be forgiven, and then nobody undoes anything.
        sock.close()
        raise
    sock.listen(_backlog(settings))
    return sock


def _cannot_listen(place: str, why: str, *, taken: bool = False) -> ConfigurationError:
    kind = _PortTaken if taken else ConfigurationError
    return kind(f"cannot listen on {place}: {why}; choose others with --host and --port")


# Accepted connections


def tune(stream: trio.SocketStream, keepalive: float | None) -> None:
    """Set up an accepted connection: no delay, and a peer that has vanished is noticed.

    A connection that is broken already is left as it is: reading from it will tell.

    Args:
      stream: of a unix socket: nothing is done, its kernel knows both ends.
      keepalive: seconds of silence after which the peer's kernel is asked whether it is there; when it does not answer
        for as long again, the connection is over. None: never.
    """
    sock = stream.socket
    if sock.family == UNIX:
        return
    with suppress(OSError):
        # `trio.SocketStream` does so too, but promises it only as its default.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if keepalive is None:
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        idle = max(1, math.ceil(keepalive))
        for option, value in (
            (_KEEPALIVE_IDLE, idle),
            (_KEEPALIVE_INTERVAL, max(1, idle // _KEEPALIVE_PROBES)),
            (_KEEPALIVE_COUNT, _KEEPALIVE_PROBES),
        ):
            if option is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


def source_of(stream: trio.SocketStream) -> tuple[IPAddress | None, str] | None:
    """Where a connection comes from. To be asked once, see `peername`.

    Returns:
      The address (None: a unix socket), and the same for people: ``192.0.2.1:50000``, ``[2001:db8::1]:50000``,
      ``unix``. Or None, where the peer is gone and nobody knows.
    """
    if stream.socket.family == UNIX:
        return None, "unix"
    name = peername(stream)
    if name is None:
        return None
    host, port, *_ = name
    address = unmapped(ip_address(host))
    return address, format_peer(address, port)
