"""Listening sockets that systemd has opened."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, MutableMapping
from contextlib import ExitStack, suppress
from typing import Final

import trio

from ..._errors import ConfigurationError, printable
from ..reasons import reason
from .unix_sockets import UNIX

# sd_listen_fds(3): SD_LISTEN_FDS_START, and all variables of the protocol.
_FIRST: Final = 3
_VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


def inherited_listeners(environ: MutableMapping[str, str]) -> list[trio.SocketListener]:
    """Take the sockets that were opened for this process before it started, by systemd's protocol.

    Args:
      environ: LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES are removed from it, so that no child takes them for
        its own.

    Returns:
      None of them where they are another process's, or there are none.

    Raises:
      ConfigurationError: one of them cannot be listened with. Those that were taken already are closed.
    """
    pid, count, names, _ = [environ.pop(name, None) for name in _VARIABLES]
    if pid is None or count is None or _number("LISTEN_PID", pid) != os.getpid():
        return []
    labels = [] if names is None else names.split(":")
    # A name for each, or none: it is for people only.
    labels += [""] * (_number("LISTEN_FDS", count) - len(labels))
    return _adopt(enumerate(labels[: int(count)], _FIRST))


def _number(name: str, text: str) -> int:
    # More descriptors than four digits tell no process has.
    if not (text.isascii() and text.isdigit() and len(text) <= (4 if name == "LISTEN_FDS" else 9)):
        raise ConfigurationError(f"the variable {name} is {printable(text)}, which it cannot be")
    return int(text)


def _adopt(descriptors: Iterable[tuple[int, str]]) -> list[trio.SocketListener]:
    listeners = []
    with ExitStack() as undo:
        for fd, label in descriptors:
            sock = _take(fd, f"descriptor {fd}" + (f" ({printable(label)})" if label else ""))
            undo.callback(sock.close)
            listeners.append(trio.SocketListener(trio.socket.from_stdlib_socket(sock)))
        undo.pop_all()
    return listeners


def _take(fd: int, name: str) -> socket.socket:
    try:
        # No program that this one starts is to hold it.
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as exc:
        # Open, but no socket: it was given to us all the same.
        with suppress(OSError):
            os.close(fd)
        raise ConfigurationError(f"cannot listen on {name}, which was passed on for it: {reason(exc)}") from None
    try:
        _check(sock, name)
    except ConfigurationError:
        sock.close()
        raise
    return sock


def _check(sock: socket.socket, name: str) -> None:
    if sock.family not in (socket.AF_INET, socket.AF_INET6, UNIX) or sock.type != socket.SOCK_STREAM:
        raise ConfigurationError(f"cannot listen on {name}: neither a TCP nor a unix stream socket (ListenStream=)")
    try:
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:
        # macOS does not tell: accept will.
        return
    if not listening:
        raise ConfigurationError(f"cannot listen on {name}: it does not listen (is it a connection? Accept=no)")
