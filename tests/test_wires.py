"""One port for all wire formats: what a server makes of a connection by its first bytes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import trio
import trio.testing

from harness import PASSWORD, make_initiator
from test_server import Running, serving
from triosspi import (
    Initiator,
    SSPIChannel,
    SSPIStream,
    WireFormat,
    open_negotiate_stream,
)
from triosspi.service.apps import Greet, echo
from triosspi.service.config.settings import Limits, Serve
from triosspi.service.serving.wires import Wires

AUTO = Serve(wire="auto")
NO_PENALTIES = Limits(penalties=False)


async def log_in_stream(running: Running, password: str = PASSWORD, **options: Any) -> SSPIStream[Any]:
    initiator = Initiator(username=r"DOM\alice", password=password, mechanism="ntlm")
    stream = await open_negotiate_stream(*running.addresses[0][:2], initiator, **options)
    try:
        await stream.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream


def told_wires(running: Running) -> list[str]:
    return [event[-1]["wire"] for event in running.told.all("login")]


@pytest.mark.parametrize("messages", ["framed", "sample"])
async def test_on_one_port_each_client_chooses_by_what_it_begins_with(messages: Any) -> None:
    app = echo if messages == "framed" else Greet(b"good day")
    async with serving(app, serve=Serve(wire="auto", auto_wire=messages)) as running:
        stream = await log_in_stream(running)
        channel = await running.client(wire=WireFormat(messages))
        if messages == "framed":
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            await channel.send(b"hello")
            assert await channel.receive() == b"hello"
        else:
            assert await stream.receive_some() == b"good day"
            assert [message async for message in channel] == [b"good day"]
        await stream.aclose()
        await channel.aclose()
        await running.told.until(lambda: len(running.told.ends) == 2)
    assert told_wires(running) == ["negotiate-stream", messages]


@pytest.mark.parametrize("wire", ["framed", "negotiate-stream"])
@pytest.mark.parametrize("size", [1, 2, 5, 7])
async def test_it_is_told_from_however_few_bytes_come_at_a_time(wire: str, size: int) -> None:
    class Dripping(trio.abc.HalfCloseableStream):
        def __init__(self, stream: trio.SocketStream) -> None:
            self._stream = stream
            self.wait_send_all_might_not_block = stream.wait_send_all_might_not_block  # type: ignore[method-assign]
            self.receive_some, self.aclose, self.send_eof = stream.receive_some, stream.aclose, stream.send_eof  # type: ignore[method-assign]

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            for start in range(0, len(data), size):
                await self._stream.send_all(data[start : start + size])

        async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
            raise NotImplementedError

        async def send_eof(self) -> None:
            raise NotImplementedError

        wait_send_all_might_not_block = aclose = send_eof

    async with serving(serve=AUTO) as running:
        transport = await trio.open_tcp_stream(*running.addresses[0][:2])
        transport.setsockopt(6, 1, 1)
        made: Any = SSPIStream if wire == "negotiate-stream" else SSPIChannel
        peer = made(Dripping(transport), make_initiator().with_default_host("localhost"))
        await peer.do_handshake()
        await peer.aclose()
        await running.told.until(lambda: running.told.ends)
    assert told_wires(running) == [wire]


@pytest.mark.parametrize(
    ("beginning", "reason"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "TLS"),
        (b"GET / HTTP/1.1\r\n", "HTTP"),
        (b"\x16\x01\x00\x00\x05hello", "does not begin"),
        (b"\x16\x01\x00\x00", "closed during the handshake"),
        (b"\xff" * 64, "4294967295"),
    ],
)
async def test_an_unknown_beginning_costs_a_connection_and_nothing_else(beginning: bytes, reason: str) -> None:
    async with serving(serve=AUTO) as running:
        other = await log_in_stream(running)
        attacker = await trio.open_tcp_stream(*running.addresses[0][:2])
        await attacker.send_all(beginning)
        await attacker.send_eof()
        assert await attacker.receive_some() == b""
        await attacker.aclose()
        await running.told.until(lambda: running.told.all("login_refused"))
        await other.send_all(b"still here")
        assert await other.receive_some() == b"still here"
        await other.aclose()
    (refused,) = running.told.all("login_refused")
    assert re.search(reason, refused[-1]["reason"])


async def test_whoever_leaves_before_its_first_byte_is_no_failed_login() -> None:
    async with serving(serve=AUTO) as running:
        async with await trio.open_tcp_stream(*running.addresses[0][:2]):
            pass
        await running.told.until(lambda: running.told.all("dropped"))
    assert running.told.all("login_refused") == []


@pytest.mark.parametrize("protection", ["encrypt", "sign"])
async def test_protection_is_an_option(protection: Any) -> None:
    async with serving(serve=Serve(wire="negotiate-stream", protection=protection)) as running:
        stream = await log_in_stream(running, protection=protection)
        assert stream.protection == protection
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        await stream.aclose()


def test_a_reload_exchanges_the_impersonation_of_all_wires() -> None:
    mine: Any = object()
    for serve in (AUTO, Serve(wire="framed"), Serve(wire="negotiate-stream")):
        before = Wires.of(serve, None)
        after = before.impersonating(mine)
        for kind in ("messages", "streams"):
            old, new = getattr(before, kind), getattr(after, kind)
            assert (old is None) is (new is None)
            assert old is None or (old.impersonation is None and new.impersonation is mine)


# Refusals


async def refuse(running: Running, stream: trio.SocketStream) -> bytes:
    """A login that cannot be, by hand; the id of the answer."""
    await stream.send_all(b"\x16\x01\x00\x00\x0a" + b"NTLMSSP\0\x01\0")
    answer = bytes(await stream.receive_some())
    return answer[:1]


@pytest.mark.parametrize(
    ("limits", "answers"), [(NO_PENALTIES, [b"\x15", b"\x15", b"\x15", b""]), (Limits(), None)], ids=["off", "on"]
)
async def test_each_refusal_on_a_connection_counts_as_one_on_a_connection_of_its_own(
    limits: Limits, answers: list[bytes] | None
) -> None:
    async with serving(serve=AUTO, limits=limits) as running:
        attacker = await trio.open_tcp_stream(*running.addresses[0][:2])
        heard = []
        try:
            while (answer := await refuse(running, attacker)) == b"\x15":
                heard.append(answer)
        except trio.BrokenResourceError:
            answer = b""
        heard.append(answer)
        await attacker.aclose()
        await running.told.until(lambda: len(running.told.all("login_refused")) == len(heard) - 1)
        # With penalties the source has none left, whether it comes back or not.
        if answers is None:
            for _ in range(20):
                other = await trio.open_tcp_stream(*running.addresses[0][:2])
                try:
                    if await refuse(running, other) != b"\x15":
                        break
                except trio.BrokenResourceError:
                    break
                finally:
                    await trio.aclose_forcefully(other)
            else:
                pytest.fail("no penalty")
    assert 2 <= len(heard) <= 4
    if answers is not None:
        assert heard == answers


async def test_a_client_that_gives_up_after_its_refusal_is_told_of_once() -> None:
    async with serving(serve=AUTO) as running:
        with pytest.raises(trio.BrokenResourceError, match="SEC_E_LOGON_DENIED"):
            await log_in_stream(running, "wrong")
        await running.told.until(lambda: running.told.all("login_refused"))
        stream = await log_in_stream(running)
        await stream.aclose()
        await running.told.until(lambda: running.told.ends)
    assert len(running.told.all("login_refused")) == 1
    assert running.told.all("dropped") == []


async def test_a_session_of_a_stream_ends_with_the_server_and_loses_nothing() -> None:
    received: list[bytes] = []
    heard = trio.Event()

    async def handler(stream: Any) -> None:
        async for data in stream:
            received.append(bytes(data))
            heard.set()
        await stream.send_all(b"the last answer")

    async with serving(handler, serve=AUTO) as running:
        stream = await log_in_stream(running)
        await stream.send_all(b"request")
        await heard.wait()
        running.server.stop()
        assert await stream.receive_some() == b"the last answer"
        assert await stream.receive_some() == b""
        await stream.aclose()
        await running.ended.wait()
    assert received == [b"request"]
