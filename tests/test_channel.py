"""Channels in use: the handshake, sending, receiving, and what may happen at the same time. See test_channel_closing."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from contextlib import nullcontext, suppress
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
    dword,
    frame,
    make_acceptor,
    make_channels,
    make_initiator,
    seal_from,
    shake_hands,
)
from triosspi import (
    AuthenticationError,
    ForeignProtocolError,
    FrameTooLongError,
    LocalProtocolError,
    MessageTooLongError,
    SSPIChannel,
    SSPIListener,
    Traffic,
    TruncatedError,
    UnsealError,
    WireFormat,
)
from triosspi.tcp.endings import is_ordinary_end, login_failure

both_formats = pytest.mark.parametrize("wire", [WireFormat.SAMPLE, WireFormat.FRAMED])
both_packagings = pytest.mark.parametrize("raw", [False, True], ids=["spnego", "raw"])
both_streams = pytest.mark.parametrize(
    "pair", [trio.testing.memory_stream_pair, trio.testing.lockstep_stream_pair], ids=["memory", "lockstep"]
)


async def raised_by(call: Any, *args: Any) -> BaseException:
    """What an async function raises; a test fails if it raises nothing."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the caller looks at it
        await call(*args)
    return caught.value


def plain_channel(stream: Any, usage: str, answers: list[bytes], **options: Any) -> tuple[Channel, PlainCredential]:
    """A channel over a context without cryptography."""
    may_block = options.pop("may_block", False)
    credential: Any = PlainCredential(usage, answers, may_block=may_block)
    return SSPIChannel(stream, credential, **options), credential


async def cancelled(call: Any, *args: Any) -> None:
    """Call, and be cancelled at the first checkpoint."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await call(*args)
    assert scope.cancelled_caught


# ---- the handshake ----


@both_formats
@both_packagings
@both_streams
async def test_a_handshake_tells_both_sides_who_is_there(wire, raw, pair):
    client, server = await connected_channels(pair, raw=raw, wire=wire)
    assert server.peer.principal == "DOM\\alice"
    assert client.peer.principal == "host/unspecified"
    assert client.package_name == server.package_name == "NTLM"
    assert server.sizes.security_trailer == 16
    assert server.sizes.max_message == (2028 if wire is WireFormat.SAMPLE else 1024 * 1024)


async def test_what_the_handshake_finds_needs_the_handshake():
    for channel in make_channels():
        for attribute in ("peer", "package_name", "sizes"):
            with pytest.raises(trio.NeedHandshakeError):
                getattr(channel, attribute)


async def test_making_a_channel_says_nothing():
    client, server = make_channels()
    assert client.transport_stream.calls == server.transport_stream.calls == []


async def test_the_first_use_does_the_handshake():
    client, server = make_channels()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send, b"hello")
        assert await server.receive() == b"hello"
    assert client.peer
    assert server.peer


async def test_the_handshake_is_done_once():
    client, server = await connected_channels()
    before = len(client.transport_stream.calls)
    await client.do_handshake()
    await server.do_handshake()
    assert len(client.transport_stream.calls) == before


async def test_a_sender_and_a_receiver_at_the_same_time_do_one_handshake():
    client, server = make_channels(trio.testing.lockstep_stream_pair)
    received = []

    async def receive_from(channel: Channel) -> None:
        received.append(await channel.receive())

    async with trio.open_nursery() as nursery:
        for channel in (client, server):
            nursery.start_soon(channel.send, b"hello")
            nursery.start_soon(receive_from, channel)
            nursery.start_soon(channel.do_handshake)
    assert received == [b"hello", b"hello"]
    # NTLM in SPNEGO: three tokens from the initiator at most, and its one message.
    assert client.transport_stream.calls.count("send_all") <= 4


async def test_nobody_uses_the_channel_before_the_last_token_has_gone():
    # A waiter let go too early would seal a record that overtakes, on the wire, the token before it.
    ours, theirs = trio.testing.memory_stream_pair()
    stream = RecordingStream(ours)
    channel, _ = plain_channel(stream, "accept", [b"last token"])
    reached, go_on = trio.Event(), trio.Event()
    pass_on = stream.send_all

    async def send_slowly(data: bytes) -> None:
        reached.set()
        await go_on.wait()
        await pass_on(data)

    stream.send_all = send_slowly
    await theirs.send_all(frame(b"NTLMSSP\0token"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.do_handshake)
        await reached.wait()
        nursery.start_soon(channel.send, b"message")
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
    assert stream.sent.startswith(frame(b"last token"))


async def test_handshake_failure_wakes_every_waiter():
    # In Trio's own _Once a second waiter hangs when the first one fails.
    client, server = make_channels()
    errors = []

    async def wait(call: Any, *args: Any) -> None:
        errors.append(await raised_by(call, *args))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, server.do_handshake)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(wait, server.do_handshake)
        nursery.start_soon(wait, server.send, b"x")
        nursery.start_soon(wait, server.receive)
        await trio.testing.wait_all_tasks_blocked()
        assert not errors
        await client.transport_stream.aclose()
    assert len(errors) == 4
    for error in errors:
        assert isinstance(error, trio.BrokenResourceError)
        assert isinstance(error.__cause__, TruncatedError)
        assert error.__cause__ is errors[0].__cause__


async def test_a_cancelled_handshake_breaks_the_channel_and_wakes_every_waiter():
    _, server = make_channels()
    errors = []

    async def wait() -> None:
        errors.append(await raised_by(server.receive))

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel_when_idle, scope, nursery, wait)
            await server.do_handshake()
    assert scope.cancelled_caught
    assert isinstance(errors[0], trio.BrokenResourceError)
    assert isinstance(await raised_by(server.do_handshake), trio.BrokenResourceError)


async def cancel_when_idle(scope: trio.CancelScope, nursery: trio.Nursery, *before: Any) -> None:
    await trio.testing.wait_all_tasks_blocked()
    for call in before:
        nursery.start_soon(call)
    await trio.testing.wait_all_tasks_blocked()
    scope.cancel()


async def test_a_handshake_cancelled_at_any_of_its_awaits_breaks_the_channel():
    count = 0
    for which in range(1, 100):
        client, server = make_channels()
        calls = 0
        with trio.CancelScope() as scope:

            def cancel_at(_name: str, scope: trio.CancelScope = scope, which: int = which) -> None:
                nonlocal calls
                calls += 1
                if calls == which:
                    scope.cancel()

            client.transport_stream.before = cancel_at
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.do_handshake)
                await client.do_handshake()
        if not scope.cancelled_caught:
            break
        count += 1
        error = await raised_by(client.send, b"x")
        assert isinstance(error, trio.BrokenResourceError)
        assert isinstance(error.__cause__, trio.Cancelled)
    assert count >= 4


async def test_a_waiter_that_is_cancelled_leaves_the_handshake_alone():
    client, server = make_channels()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.do_handshake)
        await trio.testing.wait_all_tasks_blocked()
        await cancelled(server.do_handshake)
        await cancelled(server.receive)
        await client.do_handshake()
    assert server.peer


async def test_a_wrong_password_is_a_broken_resource_on_both_sides():
    client, server = make_channels(password="wrong")

    async def refuse() -> None:
        error = await raised_by(server.do_handshake)
        assert isinstance(error, trio.BrokenResourceError)
        assert isinstance(error.__cause__, AuthenticationError)
        await server.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(refuse)
        error = await raised_by(client.do_handshake)
    assert isinstance(error, trio.BrokenResourceError)
    assert isinstance(error.__cause__, AuthenticationError)
    with pytest.raises(trio.NeedHandshakeError):
        _ = server.peer


async def test_a_refused_raw_login_is_a_finished_handshake_and_then_an_end():
    client, server = make_channels(password="wrong", raw=True)

    async def refuse() -> None:
        await raised_by(server.do_handshake)
        await server.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(refuse)
        await client.do_handshake()
        error = await raised_by(client.receive)
    assert isinstance(error, trio.BrokenResourceError)
    assert isinstance(error.__cause__, AuthenticationError)
    assert "without a word" in str(error)


async def test_a_refused_raw_login_that_ends_in_a_reset_is_one_too():
    client, server = make_channels(password="wrong", raw=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raised_by, server.do_handshake)
        await client.do_handshake()

    def reset(_name: str) -> None:
        raise trio.BrokenResourceError from ConnectionResetError("reset by peer")

    client.transport_stream.before = reset
    error = await raised_by(client.receive)
    assert isinstance(error.__cause__, AuthenticationError)


@pytest.mark.parametrize("may_block", [False, True])
async def test_steps_run_where_blocking_is_allowed_only_if_they_may_block(may_block):
    ran = []

    async def run_blocking(step: Any, token: bytes | None) -> bytes:
        await trio.lowlevel.checkpoint()
        ran.append(token)
        return step(token)

    stream = ScriptedStream([frame(b"NTLMSSP\0one"), frame(b"two")])
    channel, credential = plain_channel(
        stream, "accept", [b"more", b"done"], may_block=may_block, run_blocking=run_blocking
    )
    await channel.do_handshake()
    assert credential.contexts[0].tokens == [b"NTLMSSP\0one", b"two"]
    assert ran == ([b"NTLMSSP\0one", b"two"] if may_block else [])
    assert stream.sent == frame(b"more") + frame(b"done")


async def test_ntlm_needs_no_thread():
    async def run_blocking(step: Any, token: bytes | None) -> bytes:
        raise AssertionError("a thread for arithmetic")

    client, server = await connected_channels(run_blocking=run_blocking)
    assert client.peer
    assert server.peer


async def test_a_cancelled_handshake_does_not_wait_for_a_step_that_still_blocks():
    # A KDC that does not answer holds the Kerberos library up for a minute.
    started, release = threading.Event(), threading.Event()

    def blocked_step(token: bytes | None) -> bytes:
        started.set()
        assert release.wait(10)
        return b"too late"

    channel, credential = plain_channel(ScriptedStream([frame(b"NTLMSSP\0one")]), "accept", [b"done"], may_block=True)
    credential.contexts[0].step = blocked_step
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.do_handshake)
        assert await trio.to_thread.run_sync(started.wait, 10)
        nursery.cancel_scope.cancel()
    # Only now: the nursery has not waited for it.
    assert not release.is_set()
    release.set()
    assert isinstance((await raised_by(channel.receive)).__cause__, trio.Cancelled)


async def test_by_default_a_step_that_may_block_runs_in_a_thread():
    import threading

    stream = ScriptedStream([frame(b"NTLMSSP\0one")])
    channel, credential = plain_channel(stream, "accept", [b"done"], may_block=True)
    threads = []
    new_context = credential.new_context

    def watched(demanded: object) -> Any:
        context = new_context(demanded)
        step = context.step
        context.step = lambda token: (threads.append(threading.current_thread()), step(token))[1]
        return context

    credential.new_context = watched
    channel = SSPIChannel(stream, credential)
    await channel.do_handshake()
    assert threads[0] is not threading.main_thread()


async def test_a_handshake_without_end_is_given_up():
    stream = ScriptedStream(frame(b"NTLMSSP\0token") for _ in range(1000))
    channel, credential = plain_channel(stream, "accept", [b"more"] * 1000)
    error = await raised_by(channel.do_handshake)
    assert isinstance(error.__cause__, AuthenticationError)
    assert len(credential.contexts[0].tokens) == 10


@both_formats
async def test_an_empty_token_is_never_sent(wire):
    stream = ScriptedStream([frame(b"NTLMSSP\0token")])
    channel, _ = plain_channel(stream, "accept", [b""], wire=wire)
    await channel.do_handshake()
    assert stream.sent == b""


async def test_a_token_on_the_acceptors_last_step_is_sent():
    stream = ScriptedStream([frame(b"NTLMSSP\0token")])
    channel, _ = plain_channel(stream, "accept", [b"accept-completed"])
    await channel.do_handshake()
    assert stream.sent == frame(b"accept-completed")


@pytest.mark.parametrize(
    ("hello", "error"),
    [
        (dword(0), AuthenticationError),
        (dword(0xFFFFFFFF), FrameTooLongError),
        (frame(b"GET / HTTP/1.1"), ForeignProtocolError),
        (b"\x01", TruncatedError),
    ],
)
async def test_a_stranger_on_the_line_is_a_broken_resource(hello, error):
    channel: Channel = SSPIChannel(ScriptedStream([hello]), make_acceptor())
    broken = await raised_by(channel.do_handshake)
    assert isinstance(broken, trio.BrokenResourceError)
    assert type(broken.__cause__) is error
    assert str(broken) == str(broken.__cause__)


# ---- messages ----


@both_streams
@both_packagings
async def test_messages_go_both_ways_and_keep_their_boundaries(pair, raw):
    client, server = await connected_channels(pair, raw=raw)
    messages = [b"x" * size for size in (1, 2, 1000, 70_000, 1, 1024 * 1024)]

    async def send_all(channel: Channel) -> None:
        for message in messages:
            await channel.send(message)

    async def receive_all(channel: Channel) -> None:
        for message in messages:
            assert await channel.receive() == message

    async with trio.open_nursery() as nursery:
        for channel in (client, server):
            nursery.start_soon(send_all, channel)
            nursery.start_soon(receive_all, channel)


async def test_a_batch_is_sent_at_once_and_received_at_once():
    client, server = await connected_channels()
    before = client.transport_stream.calls.count("send_all")
    messages = [b"%d" % i for i in range(100)]
    await client.send_many(messages)
    assert client.transport_stream.calls.count("send_all") == before + 1
    assert await server.receive_many() == messages


async def test_receive_many_returns_what_receive_has_left():
    client, server = await connected_channels()
    await client.send_many([b"1", b"2", b"3"])
    assert await server.receive() == b"1"
    assert await server.receive_many() == [b"2", b"3"]


async def test_an_empty_batch_is_nothing():
    client, server = await connected_channels()
    before = list(client.transport_stream.calls)
    await client.send_many([])
    assert client.transport_stream.calls == before
    await client.send(b"next")
    assert await server.receive() == b"next"


async def test_iterating_ends_with_the_peers_goodbye():
    client, server = await connected_channels()
    await client.send_many([b"1", b"2"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.aclose)
        assert [message async for message in server] == [b"1", b"2"]
        await server.aclose()


async def test_the_record_that_comes_with_the_last_token_is_received():
    client, server = make_channels(raw=True)
    stream = client.transport_stream
    # Everything that the client says from its second token on arrives in one piece.
    held = bytearray()
    pass_on = stream.send_all

    async def hold(data: bytes) -> None:
        held.extend(data)
        await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.do_handshake)

        def hold_the_next(name: str) -> None:
            if name == "receive_some":
                stream.send_all = hold

        stream.before = hold_the_next
        await client.do_handshake()
        await client.send_many([b"pipelined", b"records"])
        await pass_on(bytes(held))
    before = server.transport_stream.calls.count("receive_some")
    assert await server.receive() == b"pipelined"
    assert await server.receive() == b"records"
    assert server.transport_stream.calls.count("receive_some") == before


async def test_one_byte_at_a_time_is_as_good_as_all_at_once():
    client, server = make_channels()
    for channel in (client, server):
        receive = channel.transport_stream.stream.receive_some
        channel.transport_stream.stream.receive_some = lambda _max=None, receive=receive: receive(1)
    await shake_hands(client, server)
    await client.send_many([b"one", b"two"])
    await server.send(b"three")
    assert [await server.receive(), await server.receive()] == [b"one", b"two"]
    assert await client.receive() == b"three"
    await close_both(client, server)


async def test_the_samples_message_reaches_the_initiator_and_then_the_channel_ends():
    client, server = await connected_channels(wire=WireFormat.SAMPLE)
    before = len(server.transport_stream.sent)
    await server.send(SERVER_MESSAGE)
    assert len(server.transport_stream.sent) - before == 48
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.aclose)
        assert await client.receive() == SERVER_MESSAGE
        for _ in range(2):
            with pytest.raises(trio.EndOfChannel):
                await client.receive()
        await client.aclose()
    assert len(server.transport_stream.sent) - before == 48


async def test_the_samples_acceptor_receives_nothing():
    client, server = await connected_channels(wire=WireFormat.SAMPLE)
    with pytest.raises(trio.EndOfChannel):
        await server.receive()
    await server.send(SERVER_MESSAGE)
    await close_both(client, server)


async def test_sealing_and_sending_are_one_step():
    # Seal order must be wire order: a checkpoint between the two would let another task in.
    log: list[str] = []
    stream = RecordingStream(ScriptedStream([frame(b"NTLMSSP\0token")]))
    channel, credential = plain_channel(stream, "accept", [b"done"])
    await channel.do_handshake()
    credential.contexts[0].on_seal = lambda: log.append("seal")
    stream.before = log.append
    running = True

    async def somebody_else() -> None:
        while running:
            log.append("somebody else")
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(somebody_else)
        for _ in range(10):
            await channel.send_many([b"a", b"b"])
        running = False
    assert log.count("send_all") == 10
    assert log.count("seal") == 20
    for event, following in itertools.pairwise(log):
        if event == "seal":
            assert following in ("seal", "send_all")
    assert "somebody else" in log[log.index("send_all") :]


async def test_tasks_that_take_turns_open_in_the_order_in_which_they_sent():
    client, server = await connected_channels(trio.testing.lockstep_stream_pair)
    turn = trio.StrictFIFOLock()
    order = []

    async def send(number: int) -> None:
        async with turn:
            order.append(b"%d" % number)
            await client.send(b"%d" % number)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(send, number)
        received = [await server.receive() for _ in range(20)]
    assert received == order


# ---- two at once ----


async def test_a_second_sender_is_told_that_the_channel_is_busy():
    client, server = await connected_channels(trio.testing.lockstep_stream_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send, b"first")
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await client.send(b"second")
        with pytest.raises(trio.BusyResourceError):
            await client.send_many([b"second"])
        assert await server.receive() == b"first"
    # Nothing was harmed by it.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send, b"third")
        assert await server.receive() == b"third"


async def test_a_second_receiver_is_told_that_the_channel_is_busy():
    client, server = await connected_channels()
    received = []

    async def receive() -> None:
        received.append(await server.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await server.receive()
        with pytest.raises(trio.BusyResourceError):
            await server.receive_many()
        await client.send(b"first")
    assert received == [b"first"]


async def test_a_second_user_is_busy_during_the_handshake_too():
    client, server = make_channels()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.receive)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await server.receive()
        await client.send(b"first")


async def test_traffic_counts_what_went_either_way_and_the_goodbye_does_not():
    client, server = make_channels()
    with pytest.raises(trio.NeedHandshakeError):
        _ = client.traffic
    await shake_hands(client, server)
    await client.send_many([b"1", b"22"])
    await server.receive_many()
    await server.send(b"four")
    await client.receive()
    assert client.traffic == Traffic(messages_sent=2, bytes_sent=3, messages_received=1, bytes_received=4)
    assert not server.peer_left
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.aclose)
        with pytest.raises(trio.EndOfChannel):
            await server.receive()
        assert server.peer_left
        await server.aclose()
    assert server.traffic == Traffic(messages_sent=1, bytes_sent=4, messages_received=2, bytes_received=3)


async def fail_and_close(channel: Channel) -> None:
    with pytest.raises(trio.BrokenResourceError):
        await channel.do_handshake()
    await trio.aclose_forcefully(channel)


async def test_a_broken_channel_is_freed_when_it_is_closed_and_let_go():
    # Its error has a traceback, whose frames have the channel: with 1,000 refused logins a second the garbage
    # collector stopped the server for 130 ms at a time.
    channels = make_channels(password="wrong")
    async with trio.open_nursery() as nursery:
        for channel in channels:
            nursery.start_soon(fail_and_close, channel)
    alive = [weakref.ref(channel) for channel in channels]
    gc.disable()
    try:
        del channel, channels
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


async def test_two_tasks_do_not_share_what_is_left_of_a_batch():
    client, server = await connected_channels()
    await client.send_many([b"1", b"2", b"3"])
    assert await server.receive() == b"1"
    outcomes: list[object] = []

    async def receive() -> None:
        try:
            outcomes.append(await server.receive())
        except trio.BusyResourceError:
            outcomes.append("busy")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        nursery.start_soon(receive)
    assert sorted(map(str, outcomes)) == ["b'2'", "busy"]
    assert await server.receive() == b"3"


async def test_one_may_send_while_another_receives():
    client, server = await connected_channels(trio.testing.lockstep_stream_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.receive)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(server.send, b"to the client")
        await trio.testing.wait_all_tasks_blocked()
        assert await client.receive() == b"to the client"
        await client.send(b"to the server")


# ---- errors of this program ----


@pytest.mark.parametrize("message", [b"", bytes(101)], ids=["empty", "too long"])
async def test_a_message_that_cannot_be_sent_is_a_value_error_and_costs_nothing(message):
    client, server = await connected_channels(max_message_size=100)
    before = list(client.transport_stream.calls)
    for call, argument in ((client.send, message), (client.send_many, [b"fits", message])):
        error = await raised_by(call, argument)
        assert isinstance(error, LocalProtocolError)
        assert isinstance(error, ValueError)
    assert client.transport_stream.calls == before
    await client.send(bytes(100))
    assert await server.receive() == bytes(100)


async def test_a_message_that_is_too_long_says_how_long_it_may_be():
    client, _ = await connected_channels(max_message_size=100)
    error = await raised_by(client.send, bytes(101))
    assert isinstance(error, MessageTooLongError)
    assert (error.length, error.limit) == (101, 100)


async def test_a_second_message_of_the_sample_is_an_error_that_leaves_the_first_alone():
    client, server = await connected_channels(wire=WireFormat.SAMPLE)
    await server.send(SERVER_MESSAGE)
    assert isinstance(await raised_by(server.send, b"again"), LocalProtocolError)
    assert isinstance(await raised_by(client.send, b"from the client"), LocalProtocolError)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.aclose)
        assert await client.receive() == SERVER_MESSAGE
        await client.aclose()


@pytest.mark.parametrize("message", ["text", 5, None], ids=lambda message: type(message).__name__)
async def test_a_message_that_is_not_bytes_leaves_the_channel_usable(message):
    client, server = await connected_channels()
    assert isinstance(await raised_by(client.send, message), (LocalProtocolError, TypeError))
    await client.send(b"next")
    assert await server.receive() == b"next"


@pytest.mark.parametrize("size", [0, -1, 2**32])
def test_a_limit_that_cannot_be_is_refused_when_the_channel_is_made(size):
    with pytest.raises(ValueError, match="max_message_size"):
        SSPIChannel(ScriptedStream([]), make_initiator(), max_message_size=size)


# ---- what breaks a channel ----


async def test_broken_is_for_ever_and_keeps_its_cause():
    client, server = await connected_channels()
    record = seal_from(client, b"hello")
    await client.transport_stream.send_all(record + record)
    assert await server.receive() == b"hello"
    first = await raised_by(server.receive)
    assert isinstance(first, trio.BrokenResourceError)
    assert isinstance(first.__cause__, UnsealError)
    for call, *args in (
        (server.receive,),
        (server.receive_many,),
        (server.send, b"x"),
        (server.send_many, [b"x"]),
        (server.do_handshake,),
    ):
        error = await raised_by(call, *args)
        assert isinstance(error, trio.BrokenResourceError)
        assert error.__cause__ is first.__cause__


async def test_messages_before_a_bad_one_are_received_first():
    client, server = await connected_channels()
    good = seal_from(client, b"1") + seal_from(client, b"2")
    bad = bytearray(seal_from(client, b"bad"))
    bad[-1] ^= 1
    await client.transport_stream.send_all(good + bytes(bad) + seal_from(client, b"3"))
    assert await server.receive_many() == [b"1", b"2"]
    assert isinstance((await raised_by(server.receive_many)).__cause__, UnsealError)


async def test_a_flipped_bit_breaks_the_channel():
    client, server = await connected_channels()
    record = bytearray(seal_from(client, b"hello"))
    record[-1] ^= 1
    await client.transport_stream.send_all(record)
    assert isinstance((await raised_by(server.receive)).__cause__, UnsealError)


async def test_an_end_between_two_messages_without_a_goodbye_is_a_truncation_at_a_boundary():
    client, server = await connected_channels()
    await client.send(b"last")
    await client.transport_stream.aclose()
    assert await server.receive() == b"last"
    error = await raised_by(server.receive)
    assert isinstance(error, trio.BrokenResourceError)
    assert isinstance(error.__cause__, TruncatedError)
    assert error.__cause__.at_boundary


async def test_an_end_within_a_message_is_a_truncation_that_is_never_ordinary():
    client, server = await connected_channels()
    await client.transport_stream.send_all(seal_from(client, b"hello")[:-1])
    await client.transport_stream.aclose()
    error = await raised_by(server.receive)
    assert isinstance(error.__cause__, TruncatedError)
    assert not error.__cause__.at_boundary


@pytest.mark.parametrize("name", ["send_all", "receive_some"])
async def test_an_error_of_the_transport_breaks_the_channel_and_is_its_cause(name):
    client, _ = await connected_channels()
    reset = ConnectionResetError("reset by peer")

    def break_it(_name: str) -> None:
        raise trio.BrokenResourceError from reset

    client.transport_stream.before = break_it
    call = client.receive if name == "receive_some" else lambda: client.send(b"x")
    for _ in range(2):
        error = await raised_by(call)
        assert isinstance(error, trio.BrokenResourceError)
        assert error.__cause__ is reset


async def test_an_error_of_the_transport_without_a_cause_is_the_cause_itself():
    client, _ = await connected_channels()
    lost = trio.BrokenResourceError()

    def break_it(_name: str) -> None:
        raise lost

    client.transport_stream.before = break_it
    error = await raised_by(client.send, b"x")
    assert error.__cause__ is lost
    assert str(error)


@pytest.mark.parametrize("name", ["send_all", "receive_some"])
async def test_no_os_error_escapes(name):
    client, _ = await connected_channels()

    def fail(_name: str) -> None:
        raise OSError(113, "No route to host")

    client.transport_stream.before = fail
    call = client.receive if name == "receive_some" else lambda: client.send(b"x")
    error = await raised_by(call)
    assert isinstance(error, trio.BrokenResourceError)
    assert isinstance(error.__cause__, OSError)


async def test_a_transport_that_somebody_else_closed_is_a_broken_resource():
    client, _ = await connected_channels()
    await client.transport_stream.aclose()
    error = await raised_by(client.send, b"x")
    assert isinstance(error, trio.BrokenResourceError)
    assert isinstance(error.__cause__, trio.ClosedResourceError)


async def test_a_bug_under_the_channel_shows_itself_and_breaks_the_channel():
    client, _ = await connected_channels()

    def fail(_name: str) -> None:
        raise ZeroDivisionError

    client.transport_stream.before = fail
    assert isinstance(await raised_by(client.receive), ZeroDivisionError)
    error = await raised_by(client.receive)
    assert isinstance(error, trio.BrokenResourceError)
    assert isinstance(error.__cause__, ZeroDivisionError)


# What a stranger's transport, tracer or runner may raise; to a channel's user the first ones would promise that
# nothing has happened, or that the peer has left as it should.
_MISLEADING = [
    LocalProtocolError("not bytes"),
    MessageTooLongError(5, 4),
    trio.EndOfChannel(),
    trio.BusyResourceError("somebody else"),
    trio.ClosedResourceError(),
    trio.BrokenResourceError(),
    triosspi.ImpersonationError("nobody"),
    triosspi.ConfigurationError("no such thing"),
    UnsealError("another channel's"),
    OSError(113, "No route to host"),
    trio.NeedHandshakeError(),
    trio.WouldBlock(),
    ValueError("nonsense"),
    ExceptionGroup("a nursery's", [LocalProtocolError("not bytes")]),
    KeyboardInterrupt(),
]
any_error = pytest.mark.parametrize("error", _MISLEADING, ids=lambda error: type(error).__name__)


async def assert_broken(channel: Channel) -> None:
    """It is of no use any more, and says so each time; closing it says nothing to the peer."""
    for call in (channel.do_handshake, channel.receive, channel.receive_many, lambda: channel.send(b"x")):
        broken = await raised_by(call)
        assert type(broken) is trio.BrokenResourceError
        # A connection that breaks before its first byte has said nothing, and is nobody's session.
    assert not is_ordinary_end(broken) or login_failure(broken).kind == "nothing_said"
    channel.transport_stream.before = lambda _name: None
    channel.transport_stream.calls.clear()
    await channel.aclose()
    assert channel.transport_stream.calls == ["aclose"]
    assert isinstance(await raised_by(channel.receive), trio.ClosedResourceError)


async def assert_breaks(channel: Channel, call: Any, error: BaseException) -> None:
    """The call fails, with nothing that says that the channel is as it was, and leaves it broken."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - the next lines look at it
        await call()
    assert not isinstance(caught.value, (triosspi.SSPIError, trio.EndOfChannel, trio.BusyResourceError, OSError))
    assert caught.value is error or isinstance(caught.value, trio.BrokenResourceError)
    await assert_broken(channel)


def raising(error: BaseException, *names: str) -> Any:
    def before(name: str) -> None:
        if name in names:
            raise error

    return before


@any_error
@pytest.mark.parametrize("method", ["send", "send_many", "receive", "receive_many"])
async def test_whatever_the_transport_raises_breaks_the_channel(method, error):
    client, _ = await connected_channels()
    client.transport_stream.before = raising(error, "send_all", "receive_some")
    arguments = {"send": [b"x"], "send_many": [[b"x", b"y"]]}.get(method, [])
    await assert_breaks(client, lambda: getattr(client, method)(*arguments), error)


@any_error
@pytest.mark.parametrize("method", ["do_handshake", "send", "receive"])
@pytest.mark.parametrize("where", ["send_all", "receive_some"])
@pytest.mark.parametrize("side", [0, 1], ids=["client", "server"])
async def test_whatever_the_transport_raises_in_a_handshake_breaks_the_channel(side, where, method, error):
    # It let a second do_handshake "succeed", and then nobody was there.
    channels = make_channels()
    channel = channels[side]
    channel.transport_stream.before = raising(error, where)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raised_by, channels[1 - side].do_handshake)
        arguments = [b"x"] if method == "send" else []
        await assert_breaks(channel, lambda: getattr(channel, method)(*arguments), error)


@any_error
async def test_whatever_runs_the_steps_may_raise_and_breaks_the_channel(error):
    async def run_blocking(_step: Any, _token: object) -> bytes:
        raise error

    stream = RecordingStream(ScriptedStream([frame(b"NTLMSSP\0token")]))
    channel, _ = plain_channel(stream, "accept", [b"done"], may_block=True, run_blocking=run_blocking)
    await assert_breaks(channel, channel.do_handshake, error)


@pytest.mark.parametrize("result", [None, "text", 5], ids=lambda result: type(result).__name__)
async def test_a_runner_that_returns_something_else_breaks_the_channel(result):
    async def run_blocking(step: Any, token: object) -> Any:
        step(token)
        return result

    stream = RecordingStream(ScriptedStream([frame(b"NTLMSSP\0token")]))
    channel, _ = plain_channel(stream, "accept", [b"done"], may_block=True, run_blocking=run_blocking)
    assert isinstance(await raised_by(channel.do_handshake), TypeError)
    await assert_broken(channel)


@any_error
@pytest.mark.parametrize("callback", ["token_received", "token_made", "message_sealed"])
async def test_whatever_a_tracer_raises_breaks_the_channel(callback, error):
    # When it is told of a sealed message, that one's sequence number is gone.
    class Tracer:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: raising(error, callback)(name)

    channels = [
        SSPIChannel(RecordingStream(stream), credential, tracer=tracer)
        for stream, credential, tracer in zip(
            trio.testing.memory_stream_pair(), (make_initiator(), make_acceptor()), (None, Tracer()), strict=True
        )
    ]
    client, server = channels
    async with trio.open_nursery() as nursery:
        if callback == "message_sealed":
            await shake_hands(client, server)
        else:
            nursery.start_soon(raised_by, client.do_handshake)
        await assert_breaks(server, lambda: server.send(b"x"), error)


@pytest.mark.parametrize("given", [None, "", "text", 0, []], ids=repr)
@pytest.mark.parametrize("shaken", [False, True], ids=["handshake", "receive"])
async def test_a_transport_that_gives_no_bytes_breaks_the_channel_and_is_no_end(given, shaken):
    client, server = make_channels()
    if shaken:
        await shake_hands(client, server)

    async def receive_some(_max_bytes: int | None = None) -> Any:
        await trio.lowlevel.checkpoint()
        return given

    server.transport_stream.receive_some = receive_some
    assert isinstance(await raised_by(server.receive), TypeError)
    await assert_broken(server)


@any_error
async def test_no_error_of_a_transports_farewell_is_told_but_bugs_and_all_is_closed(error):
    for name in ("send_all", "send_eof", "receive_some"):
        client, _ = await connected_channels()
        client.transport_stream.before = raising(error, name)
        shows_itself = isinstance(error, (trio.NeedHandshakeError, trio.WouldBlock, ExceptionGroup, KeyboardInterrupt))
        with suppress(type(error), BaseExceptionGroup) if shows_itself or type(error) is ValueError else nullcontext():
            await client.aclose()
        assert client.transport_stream.calls[-1] == "aclose"
        assert isinstance(await raised_by(client.receive), trio.ClosedResourceError)


async def test_a_tracer_that_raises_at_the_end_does_not_keep_the_goodbye_back():
    client, server = await connected_channels()
    tracer = Tracer()
    tracer.refuses = True
    client.tracer = tracer
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raised_by, client.aclose)
        with pytest.raises(trio.EndOfChannel):
            await server.receive()
        await server.aclose()
    assert client.transport_stream.calls[-1] == "aclose"


@pytest.mark.parametrize("cause", [trio.EndOfChannel(), TruncatedError("left", at_boundary=True)], ids=repr)
async def test_how_the_transports_own_peer_left_says_nothing_of_ours(cause):
    # The transport is another channel, whose peer is the hop before; ours may have been cut off by it.
    client, _ = await connected_channels()

    def lose(_name: str) -> None:
        raise trio.BrokenResourceError from cause

    client.transport_stream.before = lose
    error = await raised_by(client.receive)
    assert isinstance(error, trio.BrokenResourceError)
    assert not is_ordinary_end(error)


async def test_messages_without_a_length_are_refused_and_cost_nothing():
    client, server = await connected_channels()
    assert isinstance(await raised_by(client.send_many, iter([b"x"])), TypeError)
    await client.send(b"next")
    assert await server.receive() == b"next"


# ---- cancellation ----


async def test_a_receive_that_is_cancelled_anywhere_loses_nothing():
    client, server = await connected_channels()
    stream = server.transport_stream
    receive = stream.stream.receive_some
    stream.stream.receive_some = lambda _max=None: receive(3)
    number = 0
    for which in range(1, 100):
        number += 1
        await client.send_many([b"%d" % number, b"%d!" % number])
        calls = 0
        with trio.CancelScope() as scope:

            def cancel_at(_name: str, scope: trio.CancelScope = scope, which: int = which) -> None:
                nonlocal calls
                calls += 1
                if calls == which:
                    scope.cancel()

            stream.before = cancel_at
            assert await server.receive() == b"%d" % number
            number = -number
        stream.before = lambda _name: None
        if not scope.cancelled_caught:
            assert number < 0
            break
        assert await server.receive() == b"%d" % number
        assert await server.receive() == b"%d!" % number
    assert which > 5


async def test_a_receive_that_is_cancelled_while_it_waits_loses_nothing():
    client, server = await connected_channels()
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel_when_idle, scope, nursery)
            await server.receive()
        assert scope.cancelled_caught
    await client.send(b"hello")
    assert await server.receive() == b"hello"


async def test_a_receive_that_is_cancelled_with_messages_at_hand_loses_none():
    client, server = await connected_channels()
    await client.send_many([b"1", b"2", b"3"])
    assert await server.receive() == b"1"
    await cancelled(server.receive)
    await cancelled(server.receive_many)
    assert await server.receive() == b"2"
    await cancelled(server.receive_many)
    assert await server.receive_many() == [b"3"]


async def test_a_receive_that_is_cancelled_before_it_opened_what_came_with_the_handshake_loses_nothing():
    # These bytes are here already, so the only await is the checkpoint of the fast path.
    client, server = make_channels(raw=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send, b"early")
        await trio.testing.wait_all_tasks_blocked()
        await server.do_handshake()
    await cancelled(server.receive)
    assert await server.receive() == b"early"


async def test_a_send_that_is_cancelled_under_way_breaks_the_channel():
    client, _ = await connected_channels(trio.testing.lockstep_stream_pair)
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel_when_idle, scope, nursery)
            await client.send(b"hello")
    assert scope.cancelled_caught
    for call, *args in ((client.send, b"x"), (client.receive,)):
        error = await raised_by(call, *args)
        assert isinstance(error, trio.BrokenResourceError)
        assert isinstance(error.__cause__, trio.Cancelled)
    await client.aclose()
    # Half a message may be on the wire: a goodbye behind it would make no sense.
    assert client.transport_stream.calls[-2:] == ["send_all", "aclose"]


async def test_a_send_that_is_cancelled_before_anything_was_sealed_leaves_the_channel_usable():
    client, server = await connected_channels()
    await cancelled(client.send, b"not sent")
    await cancelled(client.send_many, [b"not sent"])
    await client.send(b"sent")
    assert await server.receive() == b"sent"


# ---- checkpoints ----


async def test_every_method_that_returns_has_executed_a_checkpoint():
    client, server = make_channels()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.do_handshake)
        with trio.testing.assert_checkpoints():
            await client.do_handshake()
    with trio.testing.assert_checkpoints():
        await client.do_handshake()
    with trio.testing.assert_checkpoints():
        await client.send(b"1")
    with trio.testing.assert_checkpoints():
        await client.send_many([b"2", b"3", b"4", b"5"])
    with trio.testing.assert_checkpoints():
        await client.send_many([])
    with trio.testing.assert_checkpoints():
        assert await server.receive() == b"1"
    for message in (b"2", b"3"):
        with trio.testing.assert_checkpoints():
            assert await server.receive() == message
    with trio.testing.assert_checkpoints():
        assert await server.receive_many() == [b"4", b"5"]


async def test_receiving_from_memory_has_executed_a_checkpoint():
    # The transport is not asked at all: the checkpoint can only be ours.
    client, server = await connected_channels()
    await client.send_many([b"1", b"2", b"3"])
    await server.receive()
    before = list(server.transport_stream.calls)
    with trio.testing.assert_checkpoints():
        await server.receive()
    with trio.testing.assert_checkpoints():
        await server.receive_many()
    assert server.transport_stream.calls == before


async def test_a_task_that_only_receives_what_is_there_lets_others_run():
    client, server = await connected_channels()
    await client.send_many([b"%d" % i for i in range(50)])
    turns = 0
    running = True

    async def somebody_else() -> None:
        nonlocal turns
        while running:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(somebody_else)
        for _ in range(50):
            await server.receive()
        running = False
    assert turns >= 45


async def test_a_handshake_whose_last_step_has_nothing_to_send_has_executed_a_checkpoint():
    class Immediate(ScriptedStream):
        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            return frame(b"NTLMSSP\0token")

    channel, _ = plain_channel(Immediate([]), "accept", [b""])
    with trio.testing.assert_checkpoints():
        await channel.do_handshake()


async def test_waiting_for_another_tasks_handshake_executes_a_checkpoint():
    client, server = make_channels()

    async def wait() -> None:
        with trio.testing.assert_checkpoints():
            await server.do_handshake()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await client.do_handshake()


# ---- the listener ----


class OneConnection(trio.abc.Listener[Any]):
    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.closed = False

    async def accept(self) -> Any:
        await trio.lowlevel.checkpoint()
        return self.stream

    async def aclose(self) -> None:
        self.closed = True
        await trio.lowlevel.checkpoint()


async def test_a_listener_only_wraps():
    client_stream, server_stream = trio.testing.memory_stream_pair()
    transport_listener = OneConnection(RecordingStream(server_stream))
    listener: SSPIListener[Any] = SSPIListener(transport_listener, make_acceptor(), max_message_size=7)
    assert listener.transport_listener is transport_listener
    with trio.testing.assert_checkpoints():
        channel = await listener.accept()
    assert isinstance(channel, SSPIChannel)
    assert channel.transport_stream is transport_listener.stream
    assert channel.transport_stream.calls == []
    with pytest.raises(trio.NeedHandshakeError):
        _ = channel.peer
    client: Channel = SSPIChannel(client_stream, make_initiator())
    await shake_hands(client, channel)
    assert channel.sizes.max_message == 7
    await listener.aclose()
    assert transport_listener.closed


async def test_a_listener_passes_its_options_on():
    async def run_blocking(step: Any, token: bytes | None) -> bytes:
        await trio.lowlevel.checkpoint()
        ran.append(token)
        return step(token)

    ran: list[Any] = []
    credential: Any = PlainCredential("accept", [b"done"], may_block=True)
    listener: SSPIListener[Any] = SSPIListener(
        OneConnection(ScriptedStream([frame(b"NTLMSSP\0token")])),
        credential,
        wire=WireFormat.SAMPLE,
        run_blocking=run_blocking,
    )
    channel = await listener.accept()
    await channel.do_handshake()
    assert ran == [b"NTLMSSP\0token"]
    assert channel.sizes.max_message == 2028


class Tracer:
    """Writes down what it is told, and refuses to go on when it is told to."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.refuses = False

    def __getattr__(self, name: str) -> Any:
        def tell(*_: object) -> None:
            self.told.append(name)
            if self.refuses:
                raise ZeroDivisionError

        return tell


async def test_a_listener_makes_a_tracer_for_each_connection_that_is_told_of_its_end_too():
    client_stream, server_stream = trio.testing.memory_stream_pair()
    listener: SSPIListener[Any] = SSPIListener(OneConnection(server_stream), make_acceptor(), make_tracer=Tracer)
    server, other = await listener.accept(), await listener.accept()
    assert server.tracer is not other.tracer
    client: Channel = SSPIChannel(client_stream, make_initiator(raw=True))
    await shake_hands(client, server)
    await server.send(SERVER_MESSAGE)
    await close_both(client, server)
    await server.aclose()
    assert server.tracer.told == [
        *("token_received", "token_made", "token_received", "token_made", "message_sealed", "closed")
    ]


async def test_a_tracer_that_raises_when_the_channel_is_closed_does_not_keep_it_open():
    # It prints, say, and standard output is gone.
    client_stream, _ = map(RecordingStream, trio.testing.memory_stream_pair())
    tracer = Tracer()
    channel: Channel = SSPIChannel(client_stream, make_initiator(), tracer=tracer)
    tracer.refuses = True
    with pytest.raises(ZeroDivisionError):
        await channel.aclose()
    assert client_stream.calls == ["aclose"]


def test_a_listener_with_a_limit_that_cannot_be_is_refused_when_it_is_made():
    # Not at the first connection, when the server has run for a week.
    with pytest.raises(ValueError, match="max_message_size"):
        SSPIListener(OneConnection(None), make_acceptor(), max_message_size=0)


def test_the_package_exports_its_names():
    assert triosspi.SSPIChannel is SSPIChannel
    assert issubclass(SSPIChannel, trio.abc.Channel)
    assert issubclass(SSPIListener, trio.abc.Listener)
