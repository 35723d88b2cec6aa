"""How a channel ends: the order of a farewell, its bounds, and whoever is using the channel at that moment."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from socket import IPPROTO_TCP, SO_RCVBUF, SO_SNDBUF, SOL_SOCKET, TCP_NODELAY
from typing import Any

import pytest
import trio
import trio.testing

import triosspi
from harness import (
    SERVER_MESSAGE,
    Channel,
    PlainCredential,
    RecordingStream,
    ScriptedStream,
    close_both,
    connected_channels,
    frame,
    make_acceptor,
    make_channels,
    make_initiator,
    shake_hands,
    tcp_channels,
)
from triosspi import SSPIChannel, TruncatedError, WireFormat
from triosspi.security.context import SecurityContext

Call = Callable[[], Awaitable[Any]]


async def expect(error: type[BaseException], call: Call) -> BaseException:
    with pytest.raises(error) as caught:
        await call()
    return caught.value


def every_use(channel: Channel) -> list[Call]:
    return [
        channel.do_handshake,
        partial(channel.send, b"x"),
        partial(channel.send_many, [b"x"]),
        partial(channel.send_many, []),
        channel.receive,
        channel.receive_many,
    ]


def calls_since_handshake(channel: Channel) -> list[str]:
    """Starts recording anew: what is in this list later was called after this."""
    channel.transport_stream.calls = []
    calls: list[str] = channel.transport_stream.calls
    return calls


# ---- the order ----


async def test_closing_says_goodbye_then_ends_sending_drains_meanwhile_then_closes():
    client, server = await connected_channels()
    calls = calls_since_handshake(client)
    await server.send_many([b"unread"] * 3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.aclose)
        await expect(trio.EndOfChannel, server.receive)
        # The peer's own end is what the drain waits for.
        await trio.testing.wait_all_tasks_blocked()
        assert "aclose" not in calls
        nursery.start_soon(server.aclose)
    assert [call for call in calls if call != "receive_some"] == ["send_all", "send_eof", "aclose"]
    assert calls[0] == "send_all"
    assert calls.count("receive_some") >= 2


async def test_a_channel_that_sent_nothing_says_goodbye_too():
    client, server = await connected_channels()
    before = len(client.transport_stream.sent)
    await close_both(client, server)
    assert len(client.transport_stream.sent) - before == 24


async def test_a_transport_that_cannot_half_close_is_closed_without():
    class Whole(trio.abc.Stream):
        """Passes on what `trio.abc.Stream` has, and that is no `send_eof`."""

        def __init__(self, stream: RecordingStream) -> None:
            self.stream = stream

        async def send_all(self, data: bytes) -> None:
            await self.stream.send_all(data)

        async def wait_send_all_might_not_block(self) -> None:
            raise AssertionError

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            return await self.stream.receive_some(max_bytes)

        async def aclose(self) -> None:
            await self.stream.aclose()

    ours, theirs = trio.testing.memory_stream_pair()
    recording = RecordingStream(ours)
    client: Channel = SSPIChannel(Whole(recording), make_initiator())
    server: Channel = SSPIChannel(theirs, make_acceptor())
    await shake_hands(client, server)
    recording.calls.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.aclose)
        await expect(trio.EndOfChannel, server.receive)
        await server.aclose()
    assert recording.calls == ["send_all", "receive_some", "aclose"]


async def test_the_samples_acceptor_half_closes_and_drains_without_a_goodbye():
    client, server = await connected_channels(wire=WireFormat.SAMPLE)
    calls = calls_since_handshake(server)
    await server.send(SERVER_MESSAGE)
    await client.transport_stream.send_all(b"whatever the client still says")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.aclose)
        assert await client.receive() == SERVER_MESSAGE
        await trio.testing.wait_all_tasks_blocked()
        assert "aclose" not in calls
        nursery.start_soon(client.aclose)
    assert calls == ["send_all", "send_eof", "receive_some", "receive_some", "aclose"]


async def test_a_goodbye_is_not_answered_by_another():
    # The peer reads nothing more; what is still owed to it is the end of the stream.
    client, server = await connected_channels()
    calls = calls_since_handshake(server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.aclose)
        await expect(trio.EndOfChannel, server.receive)
        await server.aclose()
    assert calls == ["receive_some", "send_eof", "receive_some", "aclose"]


async def test_leaving_a_with_block_closes():
    client, server = await connected_channels()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_until_goodbye, server)
        async with client:
            await client.send(b"hello")
    assert client.transport_stream.calls[-1] == "aclose"


async def read_until_goodbye(channel: Channel) -> None:
    async for _ in channel:
        pass
    await channel.aclose()


# ---- the goodbye ----


@pytest.mark.parametrize("side", [0, 1], ids=["client", "server"])
@pytest.mark.parametrize("raw", [False, True], ids=["spnego", "raw"])
async def test_either_side_may_say_goodbye(side, raw):
    channels = await connected_channels(raw=raw)
    leaver, other = channels[side], channels[1 - side]
    await leaver.send(b"last words")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(leaver.aclose)
        assert await other.receive() == b"last words"
        # Every time, in any order.
        for _ in range(2):
            for receive in (other.receive, other.receive_many):
                await expect(trio.EndOfChannel, receive)
            for send in (partial(other.send, b"x"), partial(other.send_many, [b"x"]), partial(other.send_many, [])):
                error = await expect(trio.BrokenResourceError, send)
                assert "goodbye" in str(error)
        await other.aclose()


async def test_what_comes_after_a_goodbye_is_discarded_and_never_parsed():
    client, server = await connected_channels()
    goodbye = client._session.goodbye()
    await client.transport_stream.send_all(goodbye + b"\xff" * 100)
    await expect(trio.EndOfChannel, server.receive)
    calls = calls_since_handshake(server)
    await client.transport_stream.send_all(frame(b"\xff" * 20))
    await expect(trio.EndOfChannel, server.receive)
    assert calls == []


async def test_a_goodbye_that_a_cut_follows_is_an_end_all_the_same():
    client, server = await connected_channels()
    await client.transport_stream.send_all(client._session.goodbye())
    await client.transport_stream.aclose()
    for _ in range(2):
        await expect(trio.EndOfChannel, server.receive)


async def test_the_end_of_the_stream_alone_is_no_goodbye():
    client, server = await connected_channels()
    await client.transport_stream.send_eof()
    error = await expect(trio.BrokenResourceError, server.receive)
    assert isinstance(error.__cause__, TruncatedError)
    assert error.__cause__.at_boundary


# ---- the bounds ----


async def test_a_peer_that_does_not_read_cannot_keep_us(autojump_clock):
    client, server = await connected_channels(trio.testing.lockstep_stream_pair)
    calls = calls_since_handshake(client)
    start = trio.current_time()
    with trio.testing.assert_checkpoints():
        await client.aclose()
    assert 0 < trio.current_time() - start <= 2
    assert calls == ["send_all", "receive_some", "aclose"]
    assert server.peer


async def test_a_peer_that_never_closes_cannot_keep_us(autojump_clock):
    client, _ = await connected_channels()
    calls = calls_since_handshake(client)
    start = trio.current_time()
    await client.aclose()
    assert trio.current_time() - start == pytest.approx(1)
    assert calls == ["send_all", "receive_some", "send_eof", "aclose"]


async def test_a_peer_that_trickles_for_ever_cannot_keep_us(autojump_clock):
    client, server = await connected_channels()

    async def trickle() -> None:
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await server.transport_stream.send_all(b"x")
                await trio.sleep(0.1)

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trickle)
        await client.aclose()
        assert trio.current_time() - start == pytest.approx(1)


async def test_both_sides_closing_without_reading_come_to_an_end(autojump_clock):
    client, server = await connected_channels(trio.testing.lockstep_stream_pair)
    start = trio.current_time()
    await close_both(client, server)
    assert trio.current_time() - start <= 2
    for channel in (client, server):
        assert channel.transport_stream.calls[-1] == "aclose"


class Bounded(RecordingStream):
    """Half a connection that holds so much and no more: `send_all` waits until its bytes have been taken."""

    LIMIT = 1000

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.held = 0
        self.taken = trio.Event()
        self.other: Bounded

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await super().send_all(data)
        self.held += len(data)
        while self.held > self.LIMIT:
            await self.taken.wait()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = await super().receive_some(100)
        self.other.held -= len(data)
        self.other.taken.set()
        self.other.taken = trio.Event()
        return data


async def test_two_sides_that_close_with_full_buffers_wait_for_no_time_to_be_up(autojump_clock):
    # Each waited for the other to read before it read itself, until its time was up, and closed on unread input.
    streams = list(map(Bounded, trio.testing.memory_stream_pair()))
    streams[0].other, streams[1].other = reversed(streams)
    client: Channel = SSPIChannel(streams[0], make_initiator())
    server: Channel = SSPIChannel(streams[1], make_acceptor())
    await shake_hands(client, server)
    for channel in (client, server):
        await channel.send(bytes(Bounded.LIMIT - 24 - channel.transport_stream.held))
        assert channel.transport_stream.held == Bounded.LIMIT
    start = trio.current_time()
    await close_both(client, server)
    assert trio.current_time() == start
    for stream in streams:
        assert stream.held == 0
        assert [call for call in stream.calls if call in ("send_eof", "aclose")] == ["send_eof", "aclose"]


async def test_at_most_one_mebibyte_is_drained():
    chunk = bytes(64 * 1024)
    stream = ScriptedStream(itertools.chain([frame(b"NTLMSSP\0token")], itertools.repeat(chunk)))
    channel: Channel = SSPIChannel(stream, PlainCredential("accept", [b"done"]))
    await channel.do_handshake()
    before = stream.received
    await channel.aclose()
    assert stream.received - before == 1024 * 1024
    assert stream.closed


async def test_less_than_that_is_drained_to_its_end():
    chunks = [bytes(64 * 1024)] * 15
    stream = ScriptedStream([frame(b"NTLMSSP\0token"), *chunks])
    channel: Channel = SSPIChannel(stream, PlainCredential("accept", [b"done"]))
    await channel.do_handshake()
    before = stream.received
    await channel.aclose()
    assert stream.received - before == 15 * 64 * 1024


# ---- whoever uses the channel meanwhile, or afterwards ----


async def test_every_use_of_a_closed_channel_is_a_closed_resource():
    client, server = await connected_channels()
    await server.send(b"never received")
    await close_both(client, server)
    for channel in (client, server):
        for use in every_use(channel):
            await expect(trio.ClosedResourceError, use)


async def test_a_task_that_is_blocked_in_receive_wakes_to_a_closed_resource():
    client, server = await connected_channels()
    async with trio.open_nursery() as nursery:
        for receive in (client.receive,):
            nursery.start_soon(expect, trio.ClosedResourceError, receive)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(client.aclose)
        await expect(trio.EndOfChannel, server.receive)
        await server.aclose()
    await expect(trio.ClosedResourceError, client.receive)


async def test_a_task_that_is_blocked_in_receive_wakes_even_if_the_peer_never_does(autojump_clock):
    client, _ = await connected_channels()
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, trio.ClosedResourceError, client.receive_many)
        await trio.testing.wait_all_tasks_blocked()
        await client.aclose()
    assert trio.current_time() - start == pytest.approx(1)


@pytest.mark.parametrize("last_words", [True, False], ids=["goodbye", "cut"])
async def test_a_task_that_is_blocked_in_receive_is_closed_not_ended_when_the_peer_leaves_too(last_words):
    # We closed it: what the peer said meanwhile is nothing that this task may conclude from.
    client, server = await connected_channels()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, trio.ClosedResourceError, client.receive)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(client.aclose)
        await trio.testing.wait_all_tasks_blocked()
        if last_words:
            # Sealed before our goodbye was read, as when both leave at once.
            await server.transport_stream.send_all(server._session.goodbye())
        await server.transport_stream.aclose()


async def test_a_message_that_comes_while_we_close_is_not_delivered():
    client, server = await connected_channels()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, trio.ClosedResourceError, client.receive)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(client.aclose)
        await trio.testing.wait_all_tasks_blocked()
        await server.send(b"too late")
        await server.aclose()
    await expect(trio.ClosedResourceError, client.receive)


async def test_a_bad_message_that_comes_while_we_close_does_not_make_it_broken():
    client, server = await connected_channels()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, trio.ClosedResourceError, client.receive)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(client.aclose)
        await trio.testing.wait_all_tasks_blocked()
        await server.transport_stream.send_all(frame(b"\x00" * 30))
        await server.transport_stream.aclose()
    await expect(trio.ClosedResourceError, client.receive)


async def test_closing_at_the_checkpoint_of_a_receive_with_messages_at_hand_wakes_it_at_once(monkeypatch):
    # The receiver must not go back to the transport, and wait there for the peer, when it finds that
    # what it was about to return has been thrown away.
    client, server = await connected_channels()
    await server.send_many([b"1", b"2"])
    assert await client.receive() == b"1"
    closing, woken = trio.Event(), trio.Event()

    async def receive() -> None:
        await expect(trio.ClosedResourceError, client.receive)
        woken.set()

    async with trio.open_nursery() as nursery:

        async def close_meanwhile() -> None:
            monkeypatch.undo()
            nursery.start_soon(client.aclose)
            await trio.testing.wait_all_tasks_blocked()
            closing.set()

        monkeypatch.setattr(trio.lowlevel, "checkpoint", close_meanwhile)
        nursery.start_soon(receive)
        await closing.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert woken.is_set()
        await server.aclose()


async def test_a_task_that_is_blocked_in_send_wakes_to_a_closed_resource():
    client, _ = await connected_channels(trio.testing.lockstep_stream_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, trio.ClosedResourceError, partial(client.send, b"x" * 1000))
        await trio.testing.wait_all_tasks_blocked()
        await client.aclose()
    await expect(trio.ClosedResourceError, partial(client.send, b"x"))


async def test_closing_while_another_task_sends_says_no_goodbye_and_is_not_busy():
    client, _ = await connected_channels(trio.testing.lockstep_stream_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, trio.ClosedResourceError, partial(client.send, b"x" * 1000))
        await trio.testing.wait_all_tasks_blocked()
        calls = calls_since_handshake(client)
        await client.aclose()
    assert calls == ["aclose"]


async def test_a_sender_and_a_receiver_both_wake_when_a_third_task_closes():
    client, _ = await connected_channels(trio.testing.lockstep_stream_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, trio.ClosedResourceError, partial(client.send, b"x" * 1000))
        nursery.start_soon(expect, trio.ClosedResourceError, client.receive)
        await trio.testing.wait_all_tasks_blocked()
        await client.aclose()


@pytest.mark.parametrize("side", [0, 1], ids=["client", "server"])
async def test_closing_before_the_handshake_says_nothing(side):
    channel = make_channels()[side]
    with trio.testing.assert_checkpoints():
        await channel.aclose()
    assert channel.transport_stream.calls == ["aclose"]
    for use in every_use(channel):
        await expect(trio.ClosedResourceError, use)
    with pytest.raises(trio.NeedHandshakeError):
        _ = channel.peer


@pytest.mark.parametrize("side", [0, 1], ids=["client", "server"])
async def test_closing_during_the_handshake_wakes_everybody_to_a_closed_resource(side):
    channel = make_channels()[side]
    async with trio.open_nursery() as nursery:
        for use in (channel.do_handshake, channel.do_handshake, partial(channel.send, b"x"), channel.receive):
            nursery.start_soon(expect, trio.ClosedResourceError, use)
        await trio.testing.wait_all_tasks_blocked()
        calls = calls_since_handshake(channel)
        await channel.aclose()
    assert calls == ["aclose"]


async def test_closing_while_a_step_runs_in_a_thread_lets_the_handshake_go_no_further():
    stream = ScriptedStream([frame(b"NTLMSSP\0token")])
    stepping, go_on = trio.Event(), trio.Event()

    async def run_blocking(step: Any, token: bytes | None) -> bytes:
        stepping.set()
        await go_on.wait()
        return step(token)

    credential: Any = PlainCredential("accept", [b"done"], may_block=True)
    recording = RecordingStream(stream)
    channel: Channel = SSPIChannel(recording, credential, run_blocking=run_blocking)

    def closed(_name: str) -> None:
        if stream.closed:
            raise trio.ClosedResourceError

    recording.before = closed
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, trio.ClosedResourceError, channel.do_handshake)
        await stepping.wait()
        await channel.aclose()
        go_on.set()
    await expect(trio.ClosedResourceError, channel.do_handshake)


async def test_a_broken_channel_is_closed_without_ceremony():
    client, server = await connected_channels()
    await client.transport_stream.send_all(frame(b"rubbish"))
    await expect(trio.BrokenResourceError, server.receive)
    calls = calls_since_handshake(server)
    with trio.testing.assert_checkpoints():
        await server.aclose()
    assert calls == ["aclose"]


async def test_closed_is_never_overwritten_by_broken():
    client, server = await connected_channels()
    await client.transport_stream.send_all(frame(b"rubbish"))
    await expect(trio.BrokenResourceError, server.receive)
    await server.aclose()
    for use in every_use(server):
        await expect(trio.ClosedResourceError, use)


async def test_the_peer_is_still_known_after_closing():
    client, server = await connected_channels()
    await close_both(client, server)
    assert server.peer.principal == "DOM\\alice"


async def test_closing_twice_is_closing_once():
    client, server = await connected_channels()
    await close_both(client, server)
    calls = calls_since_handshake(client)
    with trio.testing.assert_checkpoints():
        await client.aclose()
    assert calls == []


async def test_two_tasks_may_close_at_once():
    client, server = await connected_channels()
    calls = calls_since_handshake(client)
    await close_both(client, client, server, server)
    assert calls.count("send_all") == calls.count("send_eof") == calls.count("aclose") == 1
    assert calls[-1] == "aclose"


# ---- when closing itself goes wrong ----


@pytest.mark.parametrize("name", ["send_all", "send_eof", "receive_some"])
@pytest.mark.parametrize("error", [trio.BrokenResourceError, trio.ClosedResourceError])
async def test_a_transport_that_breaks_during_the_farewell_is_closed_and_nobody_is_told(name, error):
    client, _ = await connected_channels()
    calls = calls_since_handshake(client)

    def fail(called: str) -> None:
        if called == name:
            raise error

    client.transport_stream.before = fail
    with trio.testing.assert_checkpoints():
        await client.aclose()
    assert name in calls
    assert calls[-1] == "aclose"
    await expect(trio.ClosedResourceError, client.receive)


async def test_a_context_that_cannot_seal_the_goodbye_is_closed_and_nobody_is_told(monkeypatch):
    client, _ = await connected_channels()
    calls = calls_since_handshake(client)

    def fail(_self: SecurityContext, _message: bytes) -> tuple[bytes, bytes]:
        raise triosspi.UnsealError("worn out")

    monkeypatch.setattr(SecurityContext, "seal", fail)
    with trio.testing.assert_checkpoints():
        await client.aclose()
    assert calls == ["aclose"]


async def test_a_bug_during_the_farewell_still_closes():
    client, _ = await connected_channels()
    calls = calls_since_handshake(client)

    def fail(_name: str) -> None:
        raise ZeroDivisionError

    client.transport_stream.before = fail
    await expect(ZeroDivisionError, client.aclose)
    assert calls[-1] == "aclose"


async def test_a_cancelled_close_still_closes():
    client, _ = await connected_channels()
    calls = calls_since_handshake(client)
    await trio.aclose_forcefully(client)
    assert calls[-1] == "aclose"
    assert "send_eof" not in calls
    for use in every_use(client):
        await expect(trio.ClosedResourceError, use)


@pytest.mark.parametrize("name", ["send_all", "send_eof", "receive_some"])
async def test_a_close_that_is_cancelled_anywhere_still_closes(name):
    client, _ = await connected_channels()
    calls = calls_since_handshake(client)
    with trio.CancelScope() as scope:

        def cancel(called: str) -> None:
            if called == name:
                scope.cancel()

        client.transport_stream.before = cancel
        await client.aclose()
    assert scope.cancelled_caught
    assert calls[-1] == "aclose"
    await expect(trio.ClosedResourceError, client.receive)


async def test_a_close_that_is_cancelled_while_a_receiver_is_blocked_still_closes():
    client, _ = await connected_channels()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, trio.ClosedResourceError, client.receive)
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:

            async def cancel_when_idle() -> None:
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()

            nursery.start_soon(cancel_when_idle)
            await client.aclose()
    assert scope.cancelled_caught
    assert client.transport_stream.calls[-1] == "aclose"


# ---- with a kernel in between ----


async def test_replies_are_not_lost_when_the_closer_has_unread_input():
    # Closing with unread input makes the kernel send RST, which throws away replies that the peer has not
    # read yet: without the drain 196,608 of 200,007 bytes arrived.
    client, server = await tcp_channels()
    # All replies must be in the kernel, and most of them still on the server's side, when it closes.
    server.transport_stream.socket.setsockopt(SOL_SOCKET, SO_SNDBUF, 512 * 1024)
    server.transport_stream.setsockopt(IPPROTO_TCP, getattr(socket, "TCP_NOTSENT_LOWAT", TCP_NODELAY), 512 * 1024)
    replies = [bytes([i % 251]) * 1000 for i in range(200)]
    closing = trio.Event()

    async def serve() -> None:
        await server.send_many(replies)
        closing.set()
        await server.aclose()

    async with trio.open_nursery() as nursery:
        await client.send_many([b"request" * 10] * 300)
        nursery.start_soon(serve)
        await closing.wait()
        # Now the server drains, or, if it did not, has closed.
        await trio.testing.wait_all_tasks_blocked()
        received = [reply async for reply in client]
        await client.aclose()
    assert received == replies


async def test_the_samples_message_is_not_lost_when_the_client_still_talks():
    client, server = await tcp_channels(wire=WireFormat.SAMPLE)
    await client.transport_stream.send_all(bytes(5000))
    async with trio.open_nursery() as nursery:
        await server.send(SERVER_MESSAGE)
        nursery.start_soon(server.aclose)
        await trio.testing.wait_all_tasks_blocked()
        assert await client.receive() == SERVER_MESSAGE
        await client.aclose()


async def test_both_sides_may_close_at_once_over_tcp():
    client, server = await tcp_channels()
    await client.send(b"unread")
    await server.send(b"unread")
    await close_both(client, server)
    for channel in (client, server):
        await expect(trio.ClosedResourceError, channel.receive)


def fill_below(stream: trio.SocketStream) -> int:
    """Fill a connection from below its channel to the last byte; nobody ever opens what is drained."""
    filled = 0
    with socket.fromfd(stream.socket.fileno(), stream.socket.family, stream.socket.type) as raw:
        raw.setblocking(False)
        for size in (4096, 1):
            with suppress(BlockingIOError):
                while True:
                    filled += raw.send(bytes(size))
    return filled


async def test_two_sides_that_close_with_full_buffers_over_tcp_do_not_reset_each_other():
    client, server = await tcp_channels()
    streams = [channel.transport_stream for channel in (client, server)]
    for stream in streams:
        # As much as the drain takes, at the most.
        stream.socket.setsockopt(SOL_SOCKET, SO_SNDBUF, 64 * 1024)
        stream.socket.setsockopt(SOL_SOCKET, SO_RCVBUF, 64 * 1024)
    ended: list[bytes] = []

    while sum(fill_below(stream) for stream in streams):
        # What the kernel acknowledges late makes room again.
        with trio.move_on_after(0.1):
            await trio.lowlevel.wait_writable(streams[0].socket)
    receive = trio.SocketStream.receive_some

    async def note_the_end(self: trio.SocketStream, max_bytes: int | None = None) -> bytes:
        data: bytes = await receive(self, max_bytes)
        if not data:
            ended.append(data)
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trio.SocketStream, "receive_some", note_the_end)
        await close_both(client, server)
    # Each has read the other's all, its goodbye and its end: a reset would have raised instead.
    assert ended == [b"", b""]


async def test_a_raw_end_over_tcp_leaves_nothing_waiting():
    client, server = await tcp_channels()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, trio.BrokenResourceError, server.receive)
        await trio.testing.wait_all_tasks_blocked()
        await client.transport_stream.aclose()
    await server.aclose()
