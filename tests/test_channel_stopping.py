"""`SSPIChannel.stop_receiving`: an end to the requests, while the answers still go out."""

from __future__ import annotations

from functools import partial
from socket import SO_RCVBUF, SO_SNDBUF, SOL_SOCKET

import pytest
import trio
import trio.testing

from harness import Channel, close_both, connected_channels, make_channels, tcp_channels


async def end_of(channel: Channel) -> None:
    for receive in (channel.receive, channel.receive_many):
        with pytest.raises(trio.EndOfChannel):
            await receive()


async def waits_for_the_end(channel: Channel, ended: list[str]) -> None:
    with pytest.raises(trio.EndOfChannel):
        await channel.receive()
    ended.append("ended")


async def test_a_task_that_waits_for_a_message_over_tcp_wakes_with_the_end():
    client, server = await tcp_channels()
    ended: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waits_for_the_end, server, ended)
        await trio.testing.wait_all_tasks_blocked()
        server.stop_receiving()
    assert ended
    await end_of(server)
    # Nothing was closed: answers still go out, and then the goodbye.
    await server.send(b"answer")
    assert await client.receive() == b"answer"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.aclose)
        with pytest.raises(trio.EndOfChannel):
            await client.receive()
        assert client.peer_left
        await client.aclose()


async def test_over_other_streams_a_waiting_task_ends_with_what_comes_next():
    client, server = await connected_channels()
    ended: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waits_for_the_end, server, ended)
        await trio.testing.wait_all_tasks_blocked()
        server.stop_receiving()
        await trio.testing.wait_all_tasks_blocked()
        assert not ended
        await client.send(b"never received")
    assert ended


async def test_what_was_not_received_yet_is_dropped():
    client, server = await connected_channels()
    await client.send_many([b"1", b"2", b"3"])
    assert await server.receive() == b"1"
    server.stop_receiving()
    await end_of(server)


@pytest.mark.parametrize("method", ["receive", "receive_many"])
async def test_a_receive_that_is_giving_way_to_others_ends_too(method: str):
    client, server = await connected_channels()
    await client.send_many([b"1", b"2"])
    assert await server.receive() == b"1"

    async def receive() -> None:
        with pytest.raises(trio.EndOfChannel):
            await getattr(server, method)()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        nursery.start_soon(trio.lowlevel.checkpoint)
        await trio.lowlevel.checkpoint()
        server.stop_receiving()


async def test_stopping_twice_or_after_closing_changes_nothing():
    client, server = await connected_channels()
    server.stop_receiving()
    server.stop_receiving()
    await end_of(server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.aclose)
        with pytest.raises(trio.EndOfChannel):
            await client.receive()
        await client.aclose()
    for channel in (client, server):
        channel.stop_receiving()
        with pytest.raises(trio.ClosedResourceError):
            await channel.receive()


async def test_stopped_before_the_handshake_the_channel_still_shakes_hands():
    client, server = make_channels()
    server.stop_receiving()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        with pytest.raises(trio.EndOfChannel):
            await server.receive()
    assert server.peer
    await server.send(b"answer")
    assert await client.receive() == b"answer"


async def test_a_handshake_that_waits_for_a_token_is_not_disturbed():
    client, server = await tcp_channels(handshake=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(waits_for_the_end, server, []))
        await trio.testing.wait_all_tasks_blocked()
        server.stop_receiving()
        await trio.testing.wait_all_tasks_blocked()
        await client.do_handshake()
    await server.send(b"answer")
    assert await client.receive() == b"answer"
    await close_both(client, server)


async def test_a_record_that_is_half_sent_is_sent_whole_before_the_receiver_wakes():
    # Both wait for the same socket, and what wakes one wakes the other, which would cut the record.
    client, server = await tcp_channels()
    for stream, option in ((server.transport_stream, SO_SNDBUF), (client.transport_stream, SO_RCVBUF)):
        stream.socket.setsockopt(SOL_SOCKET, option, 4096)
    # More than the two buffers hold, and not much more: through such small ones it goes at a crawl.
    message = bytes(range(256)) * 200
    ended: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waits_for_the_end, server, ended)
        nursery.start_soon(server.send, message)
        await trio.testing.wait_all_tasks_blocked()
        server.stop_receiving()
        await trio.testing.wait_all_tasks_blocked()
        assert not ended
        assert await client.receive() == message
    assert ended
    await close_both(client, server)


async def test_a_real_closing_by_another_task_is_still_told_as_such():
    client, server = await tcp_channels()

    async def receive() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await server.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        await trio.aclose_forcefully(server)
    await trio.aclose_forcefully(client)
