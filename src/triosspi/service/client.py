"""What `triosspi connect` runs."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import trio

from .._errors import AuthenticationError, ConfigurationError, RemoteProtocolError, SSPIError
from ..channel import SSPIStream
from ..security.credentials import Initiator
from ..tcp import (
    TCPChannel,
    TCPStream,
    format_address,
    is_ordinary_end,
    open_negotiate_stream,
    open_sspi_over_tcp_channel,
)
from ..wire import WireFormat
from .reasons import reason


class ConnectError(SSPIError):
    """It did not work; the text is what the user should read."""


@dataclass(frozen=True, kw_only=True)
class ConnectOptions:
    """Where to connect, and what to say.

    Attributes:
      host: name or address.
      port: TCP port.
      initiator: what to log in with.
      wire: the format.
      messages: what to send; empty: each line of standard input, in the negotiate-stream format all of it as it comes.
      timeout: seconds for connecting and logging in; in the sample's format for the message too.
      read_line: gives the next line of standard input with its end, or nothing at its end.
      read: the same for whatever there is of it.
      show: takes each message received.
      write: takes what a stream gives, as it comes.
    """

    host: str
    port: int
    initiator: Initiator
    wire: WireFormat
    messages: Sequence[bytes]
    timeout: float
    read_line: Callable[[], bytes]
    read: Callable[[], bytes]
    show: Callable[[bytes], None]
    write: Callable[[bytes | bytearray], None]


def parse_address(text: str, default_port: int) -> tuple[str, int]:
    """Read ``host``, ``host:port``, ``[address]:port`` or a bare IPv6 address.

    Raises:
      ConfigurationError: it is none of these.
    """
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        valid = bool(bracket) and (not rest or rest.startswith(":"))
        port_text = rest[1:]
    elif text.count(":") > 1:
        host, port_text, valid = text, "", True
    else:
        host, _, port_text = text.partition(":")
        valid = True
    if not valid or not host or (port_text and not port_text.isdecimal()):
        raise ConfigurationError(f"{text!r} is no address: write 'host', 'host:port' or '[ipv6]:port'")
    port = int(port_text) if port_text else default_port
    if not 0 < port < 65536:
        raise ConfigurationError(f"{port} is no TCP port: 1 to 65535")
    return host, port


async def run_client(options: ConnectOptions) -> None:
    """Connect, log in, say what is to be said, and show what comes back.

    Raises:
      ConnectError: it did not work.
      LocalProtocolError: a message cannot be sent.
    """
    where = format_address(options.host, options.port)
    try:
        with trio.fail_after(options.timeout) as deadline:
            try:
                channel = await _open(options)
            except OSError as exc:
                raise ConnectError(
                    f"cannot connect to {where}: {reason(exc)}; check the address, and that the server runs"
                ) from None
            except UnicodeError:
                raise ConnectError(f"cannot connect to {where}: no host can be called so") from None
            try:
                await channel.do_handshake()
            except BaseException:
                await trio.aclose_forcefully(channel)
                raise
            async with channel:
                await _converse(channel, options, deadline)
    except trio.TooSlowError:
        raise ConnectError(f"{where} did not answer within {options.timeout:g} s: is --wire as the server's?") from None
    except trio.BrokenResourceError as exc:
        if isinstance(exc.__cause__, AuthenticationError):
            raise ConnectError(
                f"no login at {where}: {exc}; check --user, the password, --mechanism and --wire"
            ) from None
        if is_ordinary_end(exc):
            raise ConnectError(f"{where} closed the connection before it had answered: see its log") from None
        if isinstance(exc.__cause__, RemoteProtocolError):
            raise ConnectError(f"{where} broke the protocol: {exc}; is --wire as the server's?") from None
        raise ConnectError(f"lost the connection to {where}: {exc}; try again") from None


async def _open(options: ConnectOptions) -> TCPChannel | TCPStream:
    if options.wire is WireFormat.NEGOTIATE_STREAM:
        return await open_negotiate_stream(options.host, options.port, options.initiator)
    return await open_sspi_over_tcp_channel(options.host, options.port, options.initiator, wire=options.wire)


async def _converse(channel: TCPChannel | TCPStream, options: ConnectOptions, deadline: trio.CancelScope) -> None:
    if isinstance(channel, SSPIStream):
        deadline.deadline = math.inf
        await _exchange(channel, options)
        return
    if options.wire is WireFormat.SAMPLE:
        async for reply in channel:
            options.show(reply)
        return
    # People who type may take their time.
    deadline.deadline = math.inf
    async with aclosing(_messages(options)) as messages:
        async for message in messages:
            await channel.send(message)
            try:
                options.show(await channel.receive())
            except trio.EndOfChannel:
                raise ConnectError("the server said goodbye before it had answered: see its log") from None


async def _exchange(stream: TCPStream, options: ConnectOptions) -> None:
    """Send and show at the same time, until there is no more of either."""
    failures: list[Exception] = []

    async def run(direction: Callable[[TCPStream, ConnectOptions], Awaitable[None]]) -> None:
        try:
            await direction(stream, options)
        except Exception as exc:  # noqa: BLE001 - raised below, in no group
            failures.append(exc)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, _show_stream)
        nursery.start_soon(run, _send_stream)
    if failures:
        raise failures[0]


async def _show_stream(stream: TCPStream, options: ConnectOptions) -> None:
    async for data in stream:
        options.write(data)


async def _send_stream(stream: TCPStream, options: ConnectOptions) -> None:
    """Say what is to be said, and that this was all."""
    for message in options.messages:
        await stream.send_all(message)
    if not options.messages:
        while data := await trio.to_thread.run_sync(options.read, abandon_on_cancel=True):
            await stream.send_all(data)
    await stream.send_eof()


async def _messages(options: ConnectOptions) -> AsyncGenerator[bytes]:
    if options.messages:
        for message in options.messages:
            yield message
        return
    while line := await trio.to_thread.run_sync(options.read_line, abandon_on_cancel=True):
        # An empty line cannot be sent: sealed, it would say goodbye.
        if stripped := line.rstrip(b"\r\n"):
            yield stripped
