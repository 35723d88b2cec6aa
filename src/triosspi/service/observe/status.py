"""How the server is: /metrics, /healthz and /readyz over HTTP, from a thread of its own."""

# The thread is there to answer when the server's event loop does not: that it does not is what /healthz is asked for. It
# runs an event loop too, a second `trio.run`, rather than the standard library's threaded HTTP server, since here one
# deadline bounds a whole request, whatever its pieces, and a connection costs no thread: what http.server waits for anew at
# each read, with a thread that waits, is what slow and silent clients hold on to.
#
# The port is for loopback or an inner network, and a client that reaches it must still not be able to do harm: a request is one
# head of some KiB, read under one deadline, answered once; then the connection is closed. Nothing of it is ever shown or
# logged. When more than a few connections are open, the oldest is closed: a probe is answered within milliseconds, so a
# connection that stays open is none.

from __future__ import annotations

import contextlib
import email.utils
import errno
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, Final, Self

import trio

from ..._errors import ConfigurationError
from ...tcp import Shortage, format_address
from ..reasons import reason
from .metrics import CONTENT_TYPE

log = logging.getLogger("triosspi.status")

#: Seconds without a heartbeat after which the event loop counts as stuck.
DEFAULT_HEALTHY_FOR: Final = 10.0

# Bytes of a request's head; Prometheus's has some hundred.
_MAX_HEAD: Final = 8192
# Seconds for a whole request and its answer; what probes wait is mostly less.
_DEADLINE: Final = 5.0
# Connections at a time.
_MAX_CONNECTIONS: Final = 32
# What is read of a request that goes on behind its head. Unread, it would make closing destroy the answer on its way.
_MAX_REST: Final = 65536
# Seconds until accept(2) is tried again where the process has no descriptors left.
_PAUSE: Final = 0.5
# Seconds that `StatusServer.close` waits for the thread.
_PATIENCE: Final = 5.0

_END_OF_HEAD: Final = re.compile(rb"\r?\n\r?\n")
# Origin form, or absolute form, which every server must accept (RFC 9112 3.2.2). No byte can be matched in two ways, so a
# line that does not match takes no longer than one that does.
_REQUEST_LINE: Final = re.compile(rb"([A-Z]{1,16}+) (?:https?://[!-.0-~]*+)?(/[!-~]*+) HTTP/1\.[0-9]\r?(?:\n|\Z)")

_TEXT: Final = "text/plain; charset=utf-8"


class Health:
    """Whether the event loop turns, and whether the server takes connections. Any thread may ask and tell.

    Args:
      healthy_for: seconds that the event loop may take for one turn.
      clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self, *, healthy_for: float = DEFAULT_HEALTHY_FOR, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._healthy_for = healthy_for
        self._clock = clock
        # Starting counts as a turn: whatever takes longer at the start is stuck too.
        self._last_turn = clock()
        self._ready = False

    def heartbeat(self) -> None:
        """The event loop turns; called about every second."""
        self._last_turn = self._clock()

    def set_ready(self, ready: bool) -> None:
        """Whether the server takes connections: not while it starts, and not while it drains."""
        self._ready = ready

    @property
    def alive(self) -> bool:
        """Whether the event loop has turned of late."""
        return self._clock() - self._last_turn <= self._healthy_for

    @property
    def ready(self) -> bool:
        """Whether connections are taken, and not only by the kernel."""
        return self._ready and self.alive


class StatusServer:
    """Answers GET and HEAD of /healthz, /readyz and, where there are metrics, /metrics.

    /healthz is 200 while the event loop turns, /readyz while connections are taken; else they are 503. It listens from
    the construction on, and answers from `start` on. As a context manager it is started, and closed.

    Args:
      address: host and port to bind; port 0 for any.
      health: what it tells of.
      exposition: makes what /metrics shows, in the thread here, as `Metrics.exposition`; None where there is none.

    Attributes:
      address: the host and port that it is bound to.

    Raises:
      ConfigurationError: the address cannot be bound.
    """

    def __init__(self, address: tuple[str, int], health: Health, exposition: Callable[[], bytes] | None = None) -> None:
        self._health = health
        self._exposition = exposition
        self._socket = _bind(address)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        # The oldest first.
        self._open: dict[trio.CancelScope, None] = {}
        # A daemon: what may keep it from ending must not keep the process.
        self._thread = threading.Thread(target=self._run, name="triosspi-status", daemon=True)
        self._runs = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()
        self._runs.wait()

    def close(self) -> None:
        """Close the port, and what is open of connections. Idempotent, and never takes longer than seconds."""
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._scope.cancel)
            self._thread.join(_PATIENCE)
        self._socket.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # In the thread

    def _run(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException:
            # Nobody waits for it, and the server goes on without.
            log.exception("the status server has failed")
        finally:
            self._runs.set()

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            # Of its own descriptor: whoever closes this object closes the port, whatever became of the thread.
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._socket.dup()))
            shortage = Shortage(log)
            async with listener, trio.open_nursery() as nursery:
                self._runs.set()
                while True:
                    try:
                        stream = await listener.accept()
                    except OSError as exc:
                        # The process has no descriptors left, or a connection was gone already.
                        shortage.failed(exc)
                        await trio.sleep(_PAUSE)
                    else:
                        shortage.succeeded()
                        scope = self._admit()
                        nursery.start_soon(self._connection, stream, scope)

    def _admit(self) -> trio.CancelScope:
        while len(self._open) >= _MAX_CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.cancel()
        scope = trio.CancelScope()
        self._open[scope] = None
        return scope

    async def _connection(self, stream: trio.abc.HalfCloseableStream, scope: trio.CancelScope) -> None:
        """One connection, from accept to close."""
        scope.deadline = trio.current_time() + _DEADLINE
        try:
            with scope:
                head, rest = await _read_head(stream)
                if head is not None:
                    await stream.send_all(self._answer(head))
                    await stream.send_eof()
                    while rest <= _MAX_REST and (data := await stream.receive_some()):
                        rest += len(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # It is gone.
            pass
        except Exception:
            log.exception("a request of the status port has failed")
        finally:
            self._open.pop(scope, None)
            await trio.aclose_forcefully(stream)

    def _answer(self, head: bytes) -> bytes:
        """The whole answer to a request's head."""
        if len(head) > _MAX_HEAD:
            return _response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        if (request := _REQUEST_LINE.match(head)) is None:
            return _response(HTTPStatus.BAD_REQUEST)
        method, path = request[1], request[2].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, more="Allow: GET, HEAD\r\n")
        status, body, kind = self._resource(path)
        return _response(status, body, kind, body_too=method == b"GET")

    def _resource(self, path: bytes) -> tuple[HTTPStatus, bytes, str]:
        match path:
            case b"/healthz" if self._health.alive:
                return HTTPStatus.OK, b"ok\n", _TEXT
            case b"/healthz":
                return HTTPStatus.SERVICE_UNAVAILABLE, b"the event loop is stuck\n", _TEXT
            case b"/readyz" if self._health.ready:
                return HTTPStatus.OK, b"ready\n", _TEXT
            case b"/readyz":
                return HTTPStatus.SERVICE_UNAVAILABLE, b"not ready\n", _TEXT
            case b"/metrics" if self._exposition is not None:
                try:
                    return HTTPStatus.OK, self._exposition(), CONTENT_TYPE
                except Exception:
                    log.exception("the metrics cannot be shown")
                    return HTTPStatus.INTERNAL_SERVER_ERROR, b"the log says why\n", _TEXT
        return HTTPStatus.NOT_FOUND, b"not found\n", _TEXT


def _bind_first(found: Sequence[tuple[Any, ...]]) -> socket.socket:
    """Listen on the first address of a name that this machine has: "localhost" may be ::1 where there is no IPv6."""
    for number, (family, *_, address) in enumerate(found, 1):
        try:
            # Which sees to SO_REUSEADDR as each system means it.
            return socket.create_server((str(address[0]), address[1]), family=family, backlog=_MAX_CONNECTIONS)
        except OSError as exc:
            if number == len(found) or exc.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    raise AssertionError("unreachable")  # pragma: no cover


async def _read_head(stream: trio.abc.ReceiveStream) -> tuple[bytes | None, int]:
    """A request's head, or as much of one that is too long as shows it, and how many bytes came behind it.

    Returns:
      None for the head where the connection ended before it did.
    """
    received = bytearray()
    while True:
        # An end of two line breaks may have begun in what was received before.
        start = max(0, len(received) - 3)
        data = await stream.receive_some(_MAX_HEAD)
        received += data
        if (end := _END_OF_HEAD.search(received, start)) is not None:
            return bytes(received[: end.start()]), len(received) - end.end()
        if len(received) > _MAX_HEAD:
            return bytes(received), 0
        if not data:
            return None, 0


def _response(
    status: HTTPStatus, body: bytes = b"", kind: str = _TEXT, *, more: str = "", body_too: bool = True
) -> bytes:
    if not body:
        body = f"{status.phrase}\n".encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        f"Date: {email.utils.formatdate(usegmt=True)}\r\n"
        f"Content-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        f"{more}"
        "Connection: close\r\n"
        "\r\n"
    )
    return head.encode() + (body if body_too else b"")


def _bind(address: tuple[str, int]) -> socket.socket:
    host, port = address
    where = f"cannot listen on {format_address(host, port)} for metrics"
    if not 0 <= port <= 65535:
        raise ConfigurationError(f"{where}: ports are from 0 to 65535")
    try:
        listener = _bind_first(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE))
    except OSError as exc:
        raise ConfigurationError(f"{where}: {reason(exc)}") from None
    except UnicodeError:
        raise ConfigurationError(f"{where}: no host can be called so") from None
    listener.setblocking(False)
    return listener
