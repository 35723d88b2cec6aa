"""Honest clients of a server that is full of others who sit there."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network
from typing import Any

import pytest
import trio

from forge import Client
from test_admission import penalised
from test_server import Running, serving
from triosspi.service.admission import admission
from triosspi.service.admission.waiting import Stage
from triosspi.service.config.settings import Connections, Limits


def first_token() -> bytes:
    token = Client().negotiate()
    return struct.pack("<I", len(token)) + token


NOTHING, A_BYTE, A_TOKEN = b"", b"\x30", first_token()


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is too young to be dropped: the tests wait for nothing."""
    for stage in Stage:
        monkeypatch.setitem(admission.PATIENCE, stage, 0.0)


@asynccontextmanager
async def sitters(running: Running, number: int, says: bytes) -> AsyncIterator[list[trio.SocketStream]]:
    """Clients that say so much and then nothing; they are there when this begins."""
    streams = [await trio.open_tcp_stream(*running.addresses[0][:2]) for _ in range(number)]
    for stream in streams:
        if says:
            await stream.send_all(says)
    await running.told.until(lambda: len(running.told.all("accepted")) >= number)
    if says == A_TOKEN:
        for stream in streams:
            # Its challenge, or nobody has read its token yet.
            with trio.move_on_after(0.1):
                await stream.receive_some()
    try:
        yield streams
    finally:
        for stream in streams:
            await trio.aclose_forcefully(stream)


async def echoes(running: Running, number: int = 1) -> None:
    """So many honest clients, all at once; any failure is an exception."""

    async def one() -> None:
        client = await running.client()
        await client.send(b"hello")
        assert await client.receive() == b"hello"
        await client.aclose()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for _ in range(number):
                nursery.start_soon(one)


def dropped(running: Running) -> list[str]:
    return [event[0] for event in running.told.all("dropped")]


async def test_64_that_connect_together_from_one_address_are_all_served_by_default() -> None:
    async with serving() as running:
        await echoes(running, 64)
    assert running.told.outcomes() == ["goodbye"] * 64
    assert not dropped(running)


async def test_one_address_is_served_a_few_at_a_time_until_all_are() -> None:
    async with serving(limits=Limits(max_unauthenticated_per_source=2)) as running:
        await echoes(running, 20)
    assert running.told.outcomes() == ["goodbye"] * 20
    assert not dropped(running)


@pytest.mark.parametrize("says", [NOTHING, A_BYTE, A_TOKEN], ids=["nothing", "a byte", "a token"])
async def test_honest_clients_log_in_however_many_sit_there_and_whatever_those_have_said(says: bytes) -> None:
    limits = Limits(max_unauthenticated=3, max_waiting=5, penalties=False)
    async with serving(limits=limits) as running, sitters(running, 8, says):
        for _ in range(6):
            await echoes(running)
    assert running.told.outcomes() == ["goodbye"] * 6
    # Those that were not dropped have gone by themselves.
    assert "evicted" in dropped(running) and "startups" not in dropped(running)


async def test_the_silent_ones_take_no_place_from_anybody_while_there_is_room() -> None:
    async with serving(limits=Limits(max_unauthenticated=1, max_waiting=50)) as running, sitters(running, 40, NOTHING):
        for _ in range(5):
            await echoes(running)
        assert not dropped(running)


async def test_who_is_dropped_hears_an_end_and_no_reset() -> None:
    async with serving(limits=Limits(max_unauthenticated=1, max_waiting=1)) as running:
        async with sitters(running, 1, NOTHING) as (silent,):
            await echoes(running)
            assert await silent.receive_some() == b""
        # Nobody is dropped for the next one, who has said all that a client says at first.
        running.server._service.admission.reconfigure(Limits(max_connections=1))
        async with running_client(running):
            refused = await trio.open_tcp_stream(*running.addresses[0][:2])
            await refused.send_all(A_TOKEN)
            assert await refused.receive_some() == b""
            await refused.aclose()


@asynccontextmanager
async def running_client(running: Running) -> AsyncIterator[None]:
    client = await running.client()
    yield
    await client.aclose()


async def test_who_waits_unread_until_the_deadline_is_not_held_to_have_failed() -> None:
    async with serving(limits=Limits(max_unauthenticated=1, handshake_timeout=0.2)) as running:
        running.server._service.admission.served = 1  # somebody who is being worked on, and has long to go
        async with sitters(running, 1, A_TOKEN) as (stream,):
            await running.told.until(lambda: dropped(running))
            assert await stream.receive_some() == b""
        running.server._service.admission.served = 0
    assert dropped(running) == ["startups"]
    assert penalised(running.server._service.admission) == 0


async def test_clients_behind_a_proxy_have_turns_by_their_own_addresses() -> None:
    proxies = Connections(proxy_from=(ip_network("127.0.0.0/8"),))
    limits = Limits(max_unauthenticated_per_source=1)
    async with serving(connections=proxies, limits=limits) as running:
        sitting = [await _proxied(running, "192.0.2.1", A_TOKEN) for _ in range(3)]
        assert await sitting[0].receive_some()
        other = await _proxied(running, "192.0.2.2", A_TOKEN)
        assert await other.receive_some()
        # The second one of that address is read when the first has gone.
        await sitting[0].aclose()
        assert await sitting[1].receive_some()
        for stream in (*sitting, other):
            await trio.aclose_forcefully(stream)


async def _proxied(running: Running, source: str, says: bytes) -> Any:
    stream = await trio.open_tcp_stream(*running.addresses[0][:2])
    await stream.send_all(f"PROXY TCP4 {source} 192.0.2.9 1000 2000\r\n".encode() + says)
    return stream
