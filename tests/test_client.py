"""What `triosspi connect` runs, against good servers, bad ones and none."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from harness import SERVER_MESSAGE, dword, frame, make_acceptor, make_initiator
from triosspi import (
    ConfigurationError,
    MessageTooLongError,
    SSPIChannel,
    WireFormat,
    serve_negotiate_stream_over_tcp,
    serve_sspi_over_tcp,
)
from triosspi.service.apps import Greet, echo
from triosspi.service.client import ConnectError, ConnectOptions, parse_address, run_client
from triosspi.service.reasons import reason

HOST = "127.0.0.1"

Handler = Callable[[Any], Awaitable[object]]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("server", ("server", 2000)),
        ("server:", ("server", 2000)),
        ("server.example:443", ("server.example", 443)),
        ("192.0.2.1:1", ("192.0.2.1", 1)),
        ("2001:db8::1", ("2001:db8::1", 2000)),
        ("::", ("::", 2000)),
        ("[2001:db8::1]", ("2001:db8::1", 2000)),
        ("[2001:db8::1]:65535", ("2001:db8::1", 65535)),
        ("[fe80::1%eth0]:5", ("fe80::1%eth0", 5)),
        ("[server]:5", ("server", 5)),
    ],
)
def test_an_address_is_a_host_and_maybe_a_port(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text, 2000) == address


@pytest.mark.parametrize(
    "text", ["", ":", ":80", "[]", "[]:80", "[::1", "[::1]80", "a:b", "a:-1", "a:1.5", "a:²", "[::1]:x"]
)
def test_what_is_no_address_is_refused_with_the_ways_to_write_one(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is no address: write 'host', 'host:port' or '\[ipv6\]:port'$"):
        parse_address(text, 2000)


@pytest.mark.parametrize("port", ["0", "65536", "99999999999999999999"])
def test_a_port_that_tcp_does_not_have_is_refused(port: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{port} is no TCP port: 1 to 65535$"):
        parse_address(f"server:{port}", 2000)


@asynccontextmanager
async def serving(handler: Handler, wire: WireFormat) -> AsyncIterator[int]:
    """A server of ours; gives its port."""
    serve = partial(serve_sspi_over_tcp, handler, 0, make_acceptor(), host=HOST, wire=wire)
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(serve)
        yield listener.transport_listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def pretending(handler: Callable[[trio.SocketStream], Awaitable[object]]) -> AsyncIterator[int]:
    """A server that does with each connection what it likes; gives its port."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await handler(stream)

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, serve, 0, host=HOST))
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


class Conversation:
    """Runs the client, and keeps what it shows."""

    def __init__(self, port: int, wire: WireFormat, *messages: bytes, stdin: bytes = b"", **login: Any) -> None:
        self.shown: list[bytes] = []
        self.options = ConnectOptions(
            host=HOST,
            port=port,
            initiator=make_initiator(**login),
            wire=wire,
            messages=messages,
            timeout=30.0,
            read_line=partial(next, iter([*stdin.splitlines(keepends=True), b""])),
            read=partial(next, iter([stdin, b""])),
            show=self.shown.append,
            write=self.shown.append,
        )

    async def run(self) -> list[bytes]:
        await run_client(self.options)
        return self.shown

    async def fail(self) -> str:
        """Returns what the user reads."""
        with pytest.raises(ConnectError) as caught:
            await run_client(self.options)
        text = str(caught.value)
        assert text.isprintable()
        assert f"{HOST}:{self.options.port}" in text or "goodbye" in text
        return text


async def test_in_the_samples_format_the_servers_message_is_shown() -> None:
    async with serving(Greet(), WireFormat.SAMPLE) as port:
        assert await Conversation(port, WireFormat.SAMPLE).run() == [SERVER_MESSAGE]


async def test_each_message_is_answered_before_the_next_is_sent() -> None:
    log: list[bytes] = []

    async def answer(channel: SSPIChannel[Any]) -> None:
        async for message in channel:
            log.append(message)
            await channel.send(message[::-1])

    async with serving(answer, WireFormat.FRAMED) as port:
        conversation = Conversation(port, WireFormat.FRAMED, b"one", b"two", b"\xff\x00")
        assert await conversation.run() == [b"eno", b"owt", b"\x00\xff"]
    assert log == [b"one", b"two", b"\xff\x00"]


async def test_without_messages_each_line_of_standard_input_is_sent_that_is_not_empty() -> None:
    # A sealed empty message would be the goodbye. Bytes that are no text go as they are.
    stdin = b"first\nsecond \r\n\n\r\n\xff\xfe\nthe end"
    async with serving(echo, WireFormat.FRAMED) as port:
        shown = await Conversation(port, WireFormat.FRAMED, stdin=stdin).run()
        assert shown == [b"first", b"second ", b"\xff\xfe", b"the end"]


async def test_a_message_that_is_too_long_is_the_callers_error() -> None:
    async with serving(echo, WireFormat.FRAMED) as port:
        with pytest.raises(MessageTooLongError):
            await Conversation(port, WireFormat.FRAMED, b"x" * (1024 * 1024 + 1)).run()


@pytest.mark.parametrize("mechanism", ["ntlm", "negotiate"])
async def test_a_refused_login_says_what_to_check(mechanism: str) -> None:
    async with serving(Greet(), WireFormat.SAMPLE) as port:
        text = await Conversation(port, WireFormat.SAMPLE, password="wrong", mechanism=mechanism).fail()
    assert text.startswith(f"no login at {HOST}:{port}: ")
    assert text.endswith("login probably refused; check --user, the password, --mechanism and --wire")
    assert "wrong" not in text


async def test_a_refused_raw_login_says_so_too() -> None:
    async with serving(Greet(), WireFormat.SAMPLE) as port:
        assert (
            "login probably refused" in await Conversation(port, WireFormat.SAMPLE, password="wrong", raw=True).fail()
        )


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        frame(b"\x1b]0;owned\x07\x1b[2J\r\n"),
        frame(b"NTLMSSP\0\x02\0\0\0" + b"\x1b[2J" * 20),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        dword(0xFFFFFFFF) + b"x",
        dword(100) + b"cut short",
    ],
    ids=["nothing", "terminal commands", "half a challenge", "http", "4 GiB", "cut"],
)
async def test_a_server_that_does_not_speak_the_protocol_is_one_harmless_line(answer: bytes) -> None:
    async def reply(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(answer)

    async with pretending(reply) as port:
        text = await Conversation(port, WireFormat.SAMPLE).fail()
    assert len(text) < 300


async def test_a_server_that_says_goodbye_before_it_answers_is_an_error() -> None:
    async def leave(channel: SSPIChannel[Any]) -> None:
        await channel.receive()

    async with serving(leave, WireFormat.FRAMED) as port:
        text = await Conversation(port, WireFormat.FRAMED, b"hello").fail()
    assert text == "the server said goodbye before it had answered: see its log"


async def test_a_server_that_closes_before_it_answers_is_an_error() -> None:
    async def cut(channel: SSPIChannel[Any]) -> None:
        await channel.receive()
        await trio.aclose_forcefully(channel.transport_stream)

    async with serving(cut, WireFormat.FRAMED) as port:
        text = await Conversation(port, WireFormat.FRAMED, b"hello").fail()
    assert text == f"{HOST}:{port} closed the connection before it had answered: see its log"


async def test_a_connection_that_is_reset_is_an_error() -> None:
    async def reset(channel: SSPIChannel[Any]) -> None:
        await channel.receive()
        transport = channel.transport_stream
        # Closing then sends RST.
        transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.aclose_forcefully(transport)

    async with serving(reset, WireFormat.FRAMED) as port:
        text = await Conversation(port, WireFormat.FRAMED, b"hello").fail()
    assert text.startswith(f"lost the connection to {HOST}:{port}: ")
    assert text.endswith("; try again")


async def test_a_framed_client_at_a_sample_server_is_asked_about_the_wire() -> None:
    async with serving(Greet(), WireFormat.SAMPLE) as port:
        text = await Conversation(port, WireFormat.FRAMED, b"hello").fail()
    assert f"{HOST}:{port} broke the protocol: " in text
    assert text.endswith("; is --wire as the server's?")


async def test_a_sample_client_at_a_framed_server_waits_no_longer_than_the_timeout(
    autojump_clock: trio.testing.MockClock,
) -> None:
    # Each would wait for the other to speak, for ever.
    async with serving(echo, WireFormat.FRAMED) as port:
        text = await Conversation(port, WireFormat.SAMPLE).fail()
    assert text == f"{HOST}:{port} did not answer within 30 s: is --wire as the server's?"


async def test_a_server_that_never_answers_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    async def sleep(_stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with pretending(sleep) as port:
        assert "did not answer within 30 s" in await Conversation(port, WireFormat.FRAMED, b"hello").fail()


async def test_whoever_types_may_take_longer_than_the_timeout(autojump_clock: trio.testing.MockClock) -> None:
    async def slow(channel: SSPIChannel[Any]) -> None:
        async for message in channel:
            await trio.sleep(1000)
            await channel.send(message)

    async with serving(slow, WireFormat.FRAMED) as port:
        assert await Conversation(port, WireFormat.FRAMED, b"a", b"b").run() == [b"a", b"b"]


async def test_what_cannot_be_shown_is_no_error_of_the_connection() -> None:
    # BrokenPipeError is an OSError, as "connection refused" is.
    def show(_message: bytes) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    async with serving(echo, WireFormat.FRAMED) as port:
        conversation = Conversation(port, WireFormat.FRAMED, b"a")
        object.__setattr__(conversation.options, "show", show)
        with pytest.raises(BrokenPipeError):
            await run_client(conversation.options)


async def test_a_port_where_nobody_listens_gives_the_systems_reason() -> None:
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        port = bound.getsockname()[1]
        text = await Conversation(port, WireFormat.SAMPLE).fail()
    assert text == (f"cannot connect to {HOST}:{port}: Connection refused; check the address, and that the server runs")


class NoSuchName(trio.abc.HostnameResolver):
    async def getaddrinfo(self, *_args: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def getnameinfo(self, *_args: Any) -> Any:
        raise AssertionError


async def test_an_unknown_host_gives_the_resolvers_reason() -> None:
    trio.socket.set_custom_hostname_resolver(NoSuchName())
    conversation = Conversation(7, WireFormat.SAMPLE)
    object.__setattr__(conversation.options, "host", "nowhere.example")
    with pytest.raises(ConnectError, match=r"^cannot connect to nowhere\.example:7: Name or service not known; check "):
        await run_client(conversation.options)


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example", "."])
async def test_a_host_that_no_name_can_be_is_an_error_and_no_traceback(host: str) -> None:
    conversation = Conversation(7, WireFormat.SAMPLE)
    object.__setattr__(conversation.options, "host", host)
    with pytest.raises(ConnectError, match=r"^cannot connect to "):
        await run_client(conversation.options)


def test_the_reasons_of_several_addresses_are_given_once_each() -> None:
    def failure(*causes: OSError) -> OSError:
        exc = OSError("all attempts to connect to server:1 failed")
        exc.__cause__ = ExceptionGroup("", causes)
        return exc

    refused = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    unreachable = OSError(errno.ENETUNREACH, "Network is unreachable")
    assert reason(failure(refused, refused)) == "Connection refused"
    assert reason(failure(refused, unreachable, refused)) == "Connection refused, Network is unreachable"
    assert reason(OSError("something else")) == "something else"
    assert reason(OSError(errno.ECONNREFUSED, "Error connecting to somewhere: refused")) == "Connection refused"


# NegotiateStream: as netcat


@asynccontextmanager
async def serving_stream(handler: Callable[[Any], Awaitable[object]]) -> AsyncIterator[int]:
    serve = partial(serve_negotiate_stream_over_tcp, handler, 0, make_acceptor(), host=HOST)
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(serve)
        yield listener.transport_listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def echo_all(stream: Any) -> None:
    async for data in stream:
        await stream.send_all(data)


async def test_standard_input_goes_to_the_stream_as_it_is_and_what_comes_is_shown_until_both_have_ended() -> None:
    stdin = b"no line\n\n" + bytes(range(256)) * 1000
    async with serving_stream(echo_all) as port:
        shown = await Conversation(port, WireFormat.NEGOTIATE_STREAM, stdin=stdin).run()
    assert b"".join(map(bytes, shown)) == stdin


async def test_messages_go_to_the_stream_instead_of_standard_input() -> None:
    async with serving_stream(echo_all) as port:
        shown = await Conversation(port, WireFormat.NEGOTIATE_STREAM, b"one", b"two", stdin=b"three").run()
    assert b"".join(map(bytes, shown)) == b"onetwo"


async def test_a_server_that_has_said_all_is_still_told_the_rest() -> None:
    heard: list[bytes] = []

    async def handler(stream: Any) -> None:
        await stream.send_all(b"hello")
        await stream.send_eof()
        heard.extend([bytes(data) async for data in stream])

    async with serving_stream(handler) as port:
        shown = await Conversation(port, WireFormat.NEGOTIATE_STREAM, stdin=b"the rest").run()
    assert shown == [b"hello"]
    assert b"".join(heard) == b"the rest"


async def test_a_streams_refusal_is_told_with_the_servers_code_in_words() -> None:
    async with serving_stream(echo_all) as port:
        text = await Conversation(port, WireFormat.NEGOTIATE_STREAM, password="wrong").fail()
    assert "SEC_E_LOGON_DENIED: unknown user or wrong password" in text


async def test_a_stream_that_breaks_is_an_error() -> None:
    async def handler(stream: Any) -> None:
        await stream.transport_stream.send_all(b"\x20\0\0\0" + bytes(32))

    async with serving_stream(handler) as port:
        text = await Conversation(port, WireFormat.NEGOTIATE_STREAM, stdin=b"").fail()
    assert "broke the protocol" in text
