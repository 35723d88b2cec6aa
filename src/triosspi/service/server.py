"""What `triosspi serve` runs."""

from __future__ import annotations

import errno
import logging
import secrets
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from .._errors import ConfigurationError
from .._tcp import (
    DEFAULT_HANDSHAKE_TIMEOUT,
    Handler,
    ServerStatistics,
    TCPChannel,
    TCPListener,
    format_address,
    open_sspi_over_tcp_listeners,
    serve_connection,
    serve_sspi_listeners,
)
from .._wire import WireFormat
from ..security.accounts import Account, AccountTable
from ..security.credentials import Acceptor
from ..security.spnego_compat import nt_hash
from .reasons import reason
from .transcript import Transcript

log = logging.getLogger("triosspi.server")

#: All interfaces, as the sample's INADDR_ANY, and IPv6 too.
ANY_HOST: Final = ("0.0.0.0", "::")  # noqa: S104 - a server

# What binding says where the machine has no IPv6.
_NO_SUCH_FAMILY: Final = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What to serve, where and how.

    Attributes:
      handler: the application.
      acceptor: what clients authenticate with.
      wire: the format.
      hosts: names or addresses to bind; empty is `ANY_HOST`.
      port: TCP port, 0 for any.
      once: end after the first connection.
      verbose: print the sample's transcript.
      dump_tokens: with the bytes in it.
      write: takes whole lines of output.
    """

    handler: Handler
    acceptor: Acceptor
    wire: WireFormat
    hosts: Sequence[str]
    port: int
    once: bool
    verbose: bool
    dump_tokens: bool
    write: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DemoAccount:
    """An account made up for one run of the server, so that it can be tried without any set-up."""

    principal: str
    password: str = field(repr=False)

    @classmethod
    def make(cls) -> DemoAccount:
        """One with a random password of 96 bits."""
        return cls("DEMO\\guest", secrets.token_urlsafe(12))

    def table(self) -> AccountTable:
        """It alone, as an account source."""
        domain, _, name = self.principal.partition("\\")
        table = AccountTable()
        table.add(Account(domain, name, nt_hash(self.password)))
        return table


async def open_listeners(options: ServeOptions) -> list[TCPListener]:
    """Listen on every host, all on one port.

    Raises:
      ConfigurationError: a host or port cannot be bound.
    """
    listeners: list[TCPListener] = []
    port = options.port
    make_tracer = partial(Transcript, options.write, dump_tokens=options.dump_tokens) if options.verbose else None
    async with AsyncExitStack() as undo:
        for host in options.hosts or ANY_HOST:
            try:
                opened = await open_sspi_over_tcp_listeners(
                    port, options.acceptor, host=host, wire=options.wire, make_tracer=make_tracer
                )
            except OSError as exc:
                if not options.hosts and listeners and exc.errno in _NO_SUCH_FAMILY:
                    continue
                raise _cannot_listen(host, port, reason(exc)) from None
            except UnicodeError:
                raise _cannot_listen(host, port, "no host can be called so") from None
            for listener in opened:
                undo.push_async_callback(listener.aclose)
            listeners += opened
            # The system's choice for the first address serves the others too.
            port = bound_address(listeners[0])[1]
        undo.pop_all()
    return listeners


def _cannot_listen(host: str, port: int, why: str) -> ConfigurationError:
    where = format_address(host, port)
    return ConfigurationError(f"cannot listen on {where}: {why}; choose others with --host and --port")


def bound_address(listener: TCPListener) -> tuple[str, int]:
    """The host and port that a listener is bound to."""
    host, port, *_ = listener.transport_listener.socket.getsockname()  # type: ignore[attr-defined]
    return host, port


async def run_server(options: ServeOptions, started: Callable[[list[TCPListener]], None]) -> bool:
    """Serve until SIGINT or SIGTERM, or until the first connection's end where ``options.once``.

    Args:
      options: what to serve.
      started: called when every listener is bound.

    Returns:
      False where ``options.once`` and the one login was refused.

    Raises:
      ConfigurationError: see `open_listeners`.
    """
    listeners = await open_listeners(options)
    if options.verbose:
        options.write("Waiting for client to connect...\nListening ! ")
    handler = _announce(options.handler) if options.verbose else options.handler
    result = True
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on_signal, signals, nursery.cancel_scope)
            # Only now: whoever reads the address may send a signal at once.
            started(listeners)
            if options.once:
                result = await _serve_once(listeners, handler)
                nursery.cancel_scope.cancel()
            else:
                await serve_sspi_listeners(handler, listeners)
    return result


async def _stop_on_signal(signals: object, scope: trio.CancelScope) -> None:
    async for number in signals:  # type: ignore[attr-defined]
        log.info("%s: stopping", signal.Signals(number).name)
        scope.cancel()
        return


def _announce(handler: Handler) -> Handler:
    async def announced(channel: TCPChannel) -> None:
        if isinstance(channel.tracer, Transcript):
            channel.tracer.authenticated(channel)
        await handler(channel)

    return announced


async def _serve_once(listeners: list[TCPListener], handler: Handler) -> bool:
    accepted: list[TCPChannel] = []

    async def accept(listener: TCPListener, scope: trio.CancelScope) -> None:
        accepted.append(await listener.accept())
        scope.cancel()

    async with AsyncExitStack() as stack:
        for listener in listeners:
            await stack.enter_async_context(listener)
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(accept, listener, nursery.cancel_scope)
    first, *others = accepted
    for channel in others:
        await trio.aclose_forcefully(channel)
    return await serve_connection(first, handler, DEFAULT_HANDSHAKE_TIMEOUT, ServerStatistics())
