"""The files of unix sockets: made, found dead, and removed."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..._errors import ConfigurationError, printable
from ..reasons import reason

#: What a socket's family is compared with; None where there are no unix sockets.
UNIX: Final = getattr(socket, "AF_UNIX", None)


class SocketFile:
    """The file of a unix socket that this process has made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity = self._look()

    def remove(self) -> None:
        """Remove it; where it is another server's by now, or nobody lets us, leave it."""
        with suppress(OSError):
            if self._look() == self._identity:
                self._path.unlink()

    def _look(self) -> tuple[int, int, int]:
        status = self._path.lstat()
        # An inode's number is given again to the next file: the time tells the two apart.
        return status.st_dev, status.st_ino, status.st_ctime_ns


def open_unix_socket(path: Path, mode: int, backlog: int) -> tuple[socket.socket, SocketFile]:
    """Listen on a unix socket; the file of a server that is dead is replaced.

    Args:
      path: absolute, since the file is to be found again when it is to be removed.
      mode: of the file: who may connect.
      backlog: as `socket.socket.listen` takes it.

    Raises:
      ConfigurationError: it is not possible: somebody listens there, or there is something else.
    """
    if UNIX is None:
        raise _cannot_listen(path, "this system has no unix sockets")
    try:
        _make_room(path)
        sock = socket.socket(UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(os.fspath(path))
            return sock, _listen(sock, path, mode, backlog)
        except BaseException:
            sock.close()
            raise
    except OSError as exc:
        raise _cannot_listen(path, reason(exc)) from None
    except ValueError as exc:
        if isinstance(exc, ConfigurationError):
            raise
        raise _cannot_listen(path, "no file can be called so") from None


def _listen(sock: socket.socket, path: Path, mode: int, backlog: int) -> SocketFile:
    """Make a bound socket one that can be connected to."""
    try:
        # Nobody can connect until it listens: so nobody has used what the umask had made of the mode. The
        # umask itself is the whole process's, and other threads make files at this moment.
        path.chmod(mode)
        file = SocketFile(path)
        sock.listen(backlog)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    return file


def _make_room(path: Path) -> None:
    """Remove the file of a server that is dead.

    Raises:
      OSError: it cannot be told, or not be removed.
      ConfigurationError: it is alive, or that is no socket.
    """
    # Of two servers that start at the same moment the second may take the first for dead, between its bind
    # and its listen: then the second has the path. They were never to share one.
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise _cannot_listen(path, "what is there is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            # Alive, with as many waiting as may.
            pass
    raise _cannot_listen(path, os.strerror(errno.EADDRINUSE))


def _cannot_listen(path: Path, why: str) -> ConfigurationError:
    name = printable(os.fspath(path), 200)
    return ConfigurationError(f"cannot listen on {name}: {why}; choose another with --unix")
