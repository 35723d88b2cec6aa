"""Workers that accept from one socket, and how they share."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from triosspi.service.admission.tables import Tables
from triosspi.service.workers.balance import MOMENT, MOMENTS, PAUSE, BalancedListener, OwnLoad

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are for Linux")


@pytest.fixture
def tables() -> Iterator[Tables]:
    tables = Tables.make(0, 2)
    yield tables
    tables.close()


@pytest.fixture
def loads(tables: Tables) -> memoryview:
    """Of two workers, of whom none is there: of each, how many connections it has, and one more."""
    return tables.loads


class Workers:
    """Some that accept from one socket, each with a number of connections."""

    def __init__(self, loads: memoryview, number: int = 2) -> None:
        first = socket.create_server(("127.0.0.1", 0))
        self.address = first.getsockname()
        self.shares = [OwnLoad(loads, place) for place in range(1, number + 1)]
        sockets = [first, *(first.dup() for _ in range(number - 1))]
        self.listeners = [BalancedListener(sock, share) for sock, share in zip(sockets, self.shares, strict=True)]
        self.accepted = [0] * number
        self.streams: list[trio.SocketStream] = []

    def begin(self, place: int, number: int = 0) -> None:
        """Come to work, with so many connections."""
        share = self.shares[place - 1]
        share.count = lambda: number + self.accepted[place - 1]
        share.tell()

    async def work(self, place: int) -> None:
        while True:
            self.streams.append(await self.listeners[place - 1].accept())
            # A server does so in a task of its own.
            await trio.lowlevel.checkpoint()
            self.accepted[place - 1] += 1

    async def connect(self) -> None:
        self.streams.append(await trio.open_tcp_stream(*self.address))

    async def close(self) -> None:
        for stream in self.streams:
            await stream.aclose()
        for listener in self.listeners:
            await listener.aclose()


# The loads


def test_what_one_process_writes_the_other_reads(tables: Tables) -> None:
    other = Tables.of(os.dup(tables.fileno()), None)
    share = OwnLoad(tables.loads, 1)
    share.count = lambda: 7
    assert share.others_if_more() is None
    OwnLoad(other.loads, 2).tell()
    other.close()
    assert share.others_if_more() == [0]


def test_who_has_more_than_another_is_told_so_and_an_empty_place_is_not_another(loads: memoryview) -> None:
    share = OwnLoad(loads, 1)
    share.count = lambda: 5
    assert share.others_if_more() is None
    loads[1] = 1 + 5
    assert share.others_if_more() is None
    loads[1] = 1 + 4
    assert share.others_if_more() == [4]
    assert OwnLoad(loads, 2).others_if_more() is None


def test_a_worker_that_does_not_say_how_many_it_has_counts_what_it_has_accepted(loads: memoryview) -> None:
    share = OwnLoad(loads, 1)
    share.tell()
    assert loads[0] == 1
    share.took_one()
    share.took_one()
    share.tell()
    assert loads[0] == 1 + 2


def test_the_loads_are_inherited_by_nobody_who_is_not_given_them(tables: Tables) -> None:
    assert not os.get_inheritable(tables.fileno())
    fd = os.dup(tables.fileno())
    other = Tables.of(fd, None)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    other.close()


# Accepting


async def test_clients_that_come_one_by_one_are_shared_evenly(
    loads: memoryview, autojump_clock: trio.testing.MockClock
) -> None:
    workers = Workers(loads)
    async with trio.open_nursery() as nursery:
        for place in (1, 2):
            workers.begin(place)
            nursery.start_soon(workers.work, place)
        for number in range(1, 101):
            await workers.connect()
            await trio.sleep(1)
            assert sum(workers.accepted) == number
        assert workers.accepted == [50, 50]
        # And whoever has lost some gets the next ones.
        workers.begin(1, -10)
        for _ in range(10):
            await workers.connect()
            await trio.sleep(1)
        assert workers.accepted == [60, 50]
        nursery.cancel_scope.cancel()
    await workers.close()


async def test_nobody_waits_longer_than_a_moment_for_one_that_does_not_come(
    loads: memoryview, autojump_clock: trio.testing.MockClock
) -> None:
    # It hangs: its load stays as it is, and it accepts nothing.
    workers = Workers(loads)
    workers.begin(1, 5)
    workers.begin(2)
    for _ in range(100):
        await workers.connect()
    start = trio.current_time()
    with trio.move_on_after(PAUSE / 2):
        await workers.work(1)
    assert workers.accepted == [100, 0]
    assert loads[0] == 1 + 105
    # And when it has been waited for in vain, it is not waited for again at once.
    assert trio.current_time() - start < MOMENT + PAUSE
    await workers.close()


async def test_one_that_comes_and_takes_is_given_time_but_not_for_ever(
    loads: memoryview, autojump_clock: trio.testing.MockClock
) -> None:
    workers = Workers(loads)
    workers.begin(1, 500)
    workers.begin(2)
    for _ in range(100):
        await workers.connect()

    async def slow() -> None:
        while True:
            workers.streams.append(await workers.listeners[1].accept())
            workers.accepted[1] += 1
            await trio.sleep(MOMENT / 2)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(slow)
        nursery.start_soon(workers.work, 1)
        await trio.sleep(MOMENT * (MOMENTS - 1))
        assert workers.accepted[0] == 0
        assert workers.accepted[1] > 10
        await trio.sleep(MOMENT * 2)
        # There was enough for both, as it turned out.
        assert sum(workers.accepted) == 100
        nursery.cancel_scope.cancel()
    await workers.close()


async def test_nobody_waits_for_a_place_that_is_empty(
    loads: memoryview, autojump_clock: trio.testing.MockClock
) -> None:
    workers = Workers(loads)
    workers.begin(1, 5)
    await workers.connect()
    start = trio.current_time()
    workers.streams.append(await workers.listeners[0].accept())
    assert trio.current_time() == start
    await workers.close()


async def test_a_cancelled_accept_loses_nobody(loads: memoryview, autojump_clock: trio.testing.MockClock) -> None:
    workers = Workers(loads)
    workers.begin(1, 5)
    workers.begin(2)
    await workers.connect()
    with trio.move_on_after(MOMENT / 2):
        await workers.listeners[0].accept()
    # Would wait for ever if who had connected had gone with the accept that was cancelled.
    workers.begin(1)
    workers.streams.append(await workers.listeners[0].accept())
    await workers.close()


async def test_a_listener_that_is_closed_wakes_who_waits_and_leaves_the_socket_to_the_others(loads: memoryview) -> None:
    workers = Workers(loads)
    mine, other = workers.listeners
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await mine.accept()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await mine.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await mine.accept()
    await mine.aclose()
    await workers.connect()
    workers.streams.append(await other.accept())
    await workers.close()


async def test_an_accept_is_a_checkpoint(loads: memoryview) -> None:
    workers = Workers(loads)
    await workers.connect()
    with trio.testing.assert_checkpoints():
        workers.streams.append(await workers.listeners[0].accept())
    await workers.close()
