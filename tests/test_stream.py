"""`SSPIStream`: Trio's rules for streams, and what is this one's own."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from harness import PASSWORD, RecordingStream, make_acceptor, make_initiator
from triosspi import (
    Initiator,
    LocalProtocolError,
    PeerRefusalError,
    ServerStatistics,
    SSPIChannel,
    SSPIStream,
    TruncatedError,
    UnsealError,
    WireFormat,
    open_negotiate_stream,
    serve_negotiate_stream_over_tcp,
)
from triosspi.security import context
from triosspi.wire import RECORD_DATA_SIZE

HOST = "127.0.0.1"
Stream = SSPIStream[Any]


def make_streams(**options: Any) -> tuple[Stream, Stream]:
    """(client, server) over memory, before their handshake."""
    client_side, server_side = trio.testing.memory_stream_pair()
    return SSPIStream(client_side, make_initiator(), **options), SSPIStream(server_side, make_acceptor(), **options)


async def connected_streams(**options: Any) -> tuple[Stream, Stream]:
    client, server = make_streams(**options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    return client, server


async def close_both(*streams: Stream) -> None:
    for stream in streams:
        await trio.aclose_forcefully(stream)


async def receive_exactly(stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        assert more
        data += more
    return data


@asynccontextmanager
async def serving(handler: Any, **options: Any) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        serve = partial(serve_negotiate_stream_over_tcp, handler, 0, make_acceptor(), host=HOST, **options)
        (listener,) = await nursery.start(serve)
        yield listener.transport_listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def echo(stream: Stream) -> None:
    async for data in stream:
        await stream.send_all(data)


# Trio's own checks


async def over_memory() -> tuple[Stream, Stream]:
    return make_streams()


async def shaken() -> tuple[Stream, Stream]:
    return await connected_streams()


async def shaken_lockstep() -> tuple[Stream, Stream]:
    client_side, server_side = trio.testing.lockstep_stream_pair()
    client, server = SSPIStream(client_side, make_initiator()), SSPIStream(server_side, make_acceptor())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    return client, server


async def reversed_roles() -> tuple[Stream, Stream]:
    client, server = await connected_streams()
    return server, client


@pytest.mark.parametrize("make", [over_memory, shaken, reversed_roles])
async def test_trios_rules_for_one_way_streams_hold(make, autojump_clock):
    # It asserts by itself.
    await trio.testing.check_one_way_stream(make, None)


@pytest.mark.parametrize("make", [over_memory, shaken, reversed_roles])
async def test_trios_rules_for_two_way_streams_hold(make, autojump_clock):
    # It asserts by itself.
    await trio.testing.check_two_way_stream(make, None)


@pytest.mark.parametrize("make", [over_memory, shaken, reversed_roles])
async def test_trios_rules_for_half_closeable_streams_hold(make, autojump_clock):
    # It asserts by itself.
    await trio.testing.check_half_closeable_stream(make, None)


async def test_trios_rules_hold_where_a_write_waits_for_its_reader(autojump_clock):
    # It asserts by itself.
    await trio.testing.check_half_closeable_stream(shaken_lockstep, shaken_lockstep)


# Data


@pytest.mark.parametrize("protection", ["encrypt", "sign"])
@pytest.mark.parametrize("size", [1, 2, RECORD_DATA_SIZE - 1, RECORD_DATA_SIZE, RECORD_DATA_SIZE + 1, 300_000])
async def test_data_of_any_size_arrives_as_it_was_sent(size, protection):
    client, server = await connected_streams(protection=protection)
    data = bytes(range(256)) * (size // 256 + 1)
    for sender, receiver in ((client, server), (server, client)):
        await sender.send_all(data[:size])
        assert await receive_exactly(receiver, size) == data[:size]
    assert client.protection == server.protection == protection
    await close_both(client, server)


@pytest.mark.parametrize("protection", ["encrypt", "sign"])
@pytest.mark.parametrize("natively", [("client",), ("server",), ()], ids=lambda who: "+".join(who) or "neither")
async def test_it_is_the_same_stream_where_sealing_is_not_native(natively, protection, monkeypatch):
    real = context.take_over

    def take_over(handshake, inner, *, initiator, encrypt):
        mine = ("client" if initiator else "server") in natively
        return real(handshake, inner, initiator=initiator, encrypt=encrypt) if mine else None

    monkeypatch.setattr(context, "take_over", take_over)
    client, server = await connected_streams(protection=protection)
    data = bytes(range(256)) * 600
    for _ in range(2):
        for sender, receiver in ((client, server), (server, client)):
            await sender.send_all(data)
            assert await receive_exactly(receiver, len(data)) == data
    assert client.protection == server.protection == protection
    # Traffic counts what was sent; records are its messages.
    assert client.traffic.bytes_sent == server.traffic.bytes_received == 2 * len(data)
    bad = bytearray(client._session.seal_checked(b"bad"))
    bad[-1] ^= 1
    await client.transport_stream.send_all(bad)
    with pytest.raises(trio.BrokenResourceError):
        await server.receive_some()
    await close_both(client, server)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_whatever_holds_bytes_can_be_sent(kind):
    client, server = await connected_streams()
    await client.send_all(kind(b"some data"))
    assert await server.receive_some() == b"some data"
    await close_both(client, server)


@pytest.mark.parametrize("value", ["text", 5, None, memoryview(b"abcdef")[::2]])
async def test_what_is_no_bytes_costs_nothing(value):
    client, server = await connected_streams()
    with pytest.raises(TypeError):
        await client.send_all(value)
    await client.send_all(b"after it")
    assert await server.receive_some() == b"after it"
    await close_both(client, server)


async def test_a_write_of_any_size_is_one_buffer_and_one_send_all():
    client_side, server_side = trio.testing.memory_stream_pair()
    recording = RecordingStream(client_side)
    client, server = SSPIStream(recording, make_initiator()), SSPIStream(server_side, make_acceptor())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    del recording.calls[:]
    await client.send_all(bytes(10 * 1024 * 1024))
    assert recording.calls == ["send_all"]
    await close_both(client, server)


@pytest.mark.parametrize("most", [1, 3, 5, 100])
async def test_no_more_is_returned_than_was_asked_for(most):
    client, server = await connected_streams()
    await client.send_all(b"hello")
    await client.send_all(b"world")
    pieces = []
    while sum(map(len, pieces)) < 10:
        pieces.append(await server.receive_some(most))
    assert b"".join(pieces) == b"helloworld"
    assert max(map(len, pieces)) <= most
    await close_both(client, server)


async def test_what_came_with_the_handshakes_end_is_received():
    client, server = make_streams()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, b"at once")
        assert await server.receive_some() == b"at once"
    await close_both(client, server)


async def test_a_cancelled_receive_loses_nothing():
    client, server = await connected_streams()
    await client.send_all(b"hello")
    assert await server.receive_some(1) == b"h"
    with trio.CancelScope() as scope:
        scope.cancel()
        await server.receive_some()
    assert await server.receive_some() == b"ello"
    await close_both(client, server)


async def test_waiting_for_room_waits_for_a_handshake_that_uses_the_transport():
    client, server = make_streams()
    done: list[str] = []

    async def wait() -> None:
        await client.wait_send_all_might_not_block()
        done.append("room")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert done == []
        nursery.start_soon(server.do_handshake)
    assert done == ["room"]
    await close_both(client, server)


# Ends


async def test_an_end_between_two_records_is_the_ordinary_one_and_stays():
    client, server = await connected_streams()
    await client.send_all(b"all")
    await client.send_eof()
    assert await server.receive_some() == b"all"
    assert [await server.receive_some() for _ in range(3)] == [b"", b"", b""]
    # The other way goes on.
    await server.send_all(b"answer")
    assert await client.receive_some() == b"answer"
    with pytest.raises(trio.ClosedResourceError):
        await client.send_all(b"more")
    await close_both(client, server)


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 20])
async def test_an_end_within_a_record_is_a_lost_connection(cut):
    client, server = await connected_streams()
    await client.transport_stream.send_all(client._session.seal_checked(b"hello")[:cut])
    await client.transport_stream.send_eof()
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError) as caught:
            await server.receive_some()
        assert isinstance(caught.value.__cause__, TruncatedError)
    await close_both(client, server)


async def test_what_was_good_comes_before_what_was_forged():
    client, server = await connected_streams()
    good, bad = client._session.seal_checked(b"good"), bytearray(client._session.seal_checked(b"bad"))
    bad[-1] ^= 1
    await client.transport_stream.send_all(good + bad)
    assert await server.receive_some() == b"good"
    with pytest.raises(trio.BrokenResourceError) as caught:
        await server.receive_some()
    assert isinstance(caught.value.__cause__, UnsealError)
    await close_both(client, server)


async def test_a_transport_that_cannot_half_close_says_so_and_goes_on():
    class OneWay(trio.abc.Stream):
        def __init__(self, stream):
            self._stream = stream
            self.receive_some, self.send_all, self.aclose = stream.receive_some, stream.send_all, stream.aclose

        async def receive_some(self, max_bytes=None):
            raise NotImplementedError

        send_all = wait_send_all_might_not_block = aclose = receive_some

    client_side, server_side = trio.testing.memory_stream_pair()
    client, server = SSPIStream(OneWay(client_side), make_initiator()), SSPIStream(server_side, make_acceptor())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    with pytest.raises(LocalProtocolError, match="OneWay cannot end one direction"):
        await client.send_eof()
    await client.send_all(b"goes on")
    assert await server.receive_some() == b"goes on"
    await close_both(client, server)


async def test_stop_receiving_ends_the_requests_while_answers_still_go_out():
    async with serving(partial(stopping, [])) as port:
        stream = await open_negotiate_stream(HOST, port, make_initiator())
        await stream.send_all(b"request")
        assert await receive_exactly(stream, 6) == b"answer"
        assert await stream.receive_some() == b""
        await stream.aclose()


async def stopping(_: list[object], stream: Stream) -> None:
    assert await stream.receive_some() == b"request"
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            # Woken by `stop_receiving`, though nothing comes.
            assert await stream.receive_some() == b""

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        stream.stop_receiving()
    await stream.send_all(b"answer")


async def test_closing_loses_nothing_of_what_was_sent():
    received = []

    async def handler(stream: Stream) -> None:
        received.append(await receive_exactly(stream, 1))
        await stream.send_all(bytes(1_000_000))

    async with serving(handler) as port:
        stream = await open_negotiate_stream(HOST, port, make_initiator())
        # More than the handler reads: a close with it unread would reset the connection.
        await stream.send_all(b"x" * 100_000)
        assert await receive_exactly(stream, 1_000_000) == bytes(1_000_000)
        await stream.aclose()


# Logins


async def test_a_refused_login_says_why_and_in_words():
    statistics = ServerStatistics()
    async with serving(echo, statistics=statistics) as port:
        wrong = Initiator(username=r"DOM\alice", password="wrong", mechanism="ntlm")
        stream = await open_negotiate_stream(HOST, port, wrong)
        with pytest.raises(trio.BrokenResourceError, match="SEC_E_LOGON_DENIED") as caught:
            await stream.do_handshake()
        cause = caught.value.__cause__
        assert isinstance(cause, PeerRefusalError)
        assert cause.code == 0x8009030C
        await trio.aclose_forcefully(stream)
        await trio.testing.wait_all_tasks_blocked()
    assert (statistics.refused, statistics.nothing_said) == (1, 0)


class Attempts:
    """Logins by hand, one behind the other, on one connection."""

    def __init__(self, port: int) -> None:
        self._connection = socket.create_connection((HOST, port), timeout=30)

    def log_in(self, password: str) -> int:
        """Returns the id of the server's last message."""
        initiator = Initiator(username=r"DOM\alice", password=password, mechanism="ntlm", target="host/localhost")
        session = SSPIStream(trio.testing.memory_stream_pair()[0], initiator)._session
        data = session.step(None)
        while True:
            self._connection.sendall(data)
            header = self._read(5)
            body = self._read(int.from_bytes(header[3:], "big"))
            if header[0] == 0x15:
                return header[0]
            session.receive_data(header + body)
            data = session.step(session.next_token())
            if session.established:
                self._connection.sendall(session.seal_checked(b"ping"))
                return header[0]

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._connection.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def close(self) -> None:
        self._connection.close()


@pytest.mark.parametrize("wrong", [0, 1, 2])
async def test_who_was_refused_may_try_again_on_the_same_connection_and_each_try_is_counted(wrong):
    statistics = ServerStatistics()
    heard = trio.Event()

    async def handler(stream: Stream) -> None:
        assert await stream.receive_some() == b"ping"
        heard.set()

    async with serving(handler, statistics=statistics) as port:
        client = Attempts(port)
        answers = [await trio.to_thread.run_sync(client.log_in, "wrong") for _ in range(wrong)]
        assert answers == [0x15] * wrong
        assert await trio.to_thread.run_sync(client.log_in, PASSWORD) == 0x14
        with trio.fail_after(30):
            await heard.wait()
        client.close()
    assert (statistics.accepted, statistics.refused, statistics.authenticated) == (1, wrong, 1)


async def test_after_three_refusals_the_connection_is_closed():
    statistics = ServerStatistics()
    async with serving(echo, statistics=statistics) as port:
        client = Attempts(port)
        for _ in range(3):
            assert await trio.to_thread.run_sync(client.log_in, "wrong") == 0x15
        with pytest.raises((EOFError, ConnectionError)):
            await trio.to_thread.run_sync(client.log_in, PASSWORD)
        client.close()
    assert (statistics.refused, statistics.authenticated, statistics.timed_out) == (3, 0, 0)


async def test_all_tries_have_the_time_of_one_login(autojump_clock):
    client_side, server_side = trio.testing.memory_stream_pair()
    server = SSPIStream(server_side, make_acceptor())
    refusals = []

    def refused(error: Exception) -> bool:
        refusals.append(str(error))
        return True

    with trio.move_on_after(30) as deadline:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(server.do_handshake, refused=refused))
            await client_side.send_all(b"\x16\x01\x00\x00\x0a" + b"NTLMSSP\0\x01\0")
            answer = bytes(await client_side.receive_some())
    assert deadline.cancelled_caught
    assert answer[0] == 0x15
    assert len(refusals) == 1


@pytest.mark.parametrize("again", [True, False])
async def test_whoever_owns_the_stream_decides_whether_there_is_another_try(again):
    client_side, server_side = trio.testing.memory_stream_pair()
    server = SSPIStream(server_side, make_acceptor())
    outcome: list[BaseException] = []

    async def accept() -> None:
        try:
            await server.do_handshake(refused=lambda _: again)
        except trio.BrokenResourceError as exc:
            outcome.append(exc)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        await client_side.send_all(b"\x16\x01\x00\x00\x0a" + b"NTLMSSP\0\x01\0")
        assert bytes(await client_side.receive_some())[0] == 0x15
        await trio.testing.wait_all_tasks_blocked()
        assert bool(outcome) is not again
        await client_side.aclose()


async def test_a_stream_is_not_a_format_of_messages():
    with pytest.raises(LocalProtocolError, match="SSPIStream"):
        SSPIChannel(trio.testing.memory_stream_pair()[0], make_acceptor(), wire=WireFormat.NEGOTIATE_STREAM)
