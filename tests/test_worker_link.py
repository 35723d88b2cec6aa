"""A worker's side: its plan, and the link to its supervisor."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from triosspi.service.workers.worker_link import (
    LONGEST_FAILURE,
    Order,
    Plan,
    Report,
    State,
    Update,
    WorkerLink,
    take_descriptors,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are for Linux")


UPDATE = Update(service=b"what")


class Supervisor:
    """The other end of a link."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.rest = b""

    def heard(self) -> list[Report]:
        """All reports so far."""
        reports: list[Report] = []
        while True:
            try:
                data = self.sock.recv(65536)
            except BlockingIOError:
                return reports
            *lines, self.rest = (self.rest + data).split(b"\n")
            reports += map(Report.read, lines)
            if not data:
                return reports

    def say(self, *orders: Order) -> None:
        for order in orders:
            self.sock.send(order.value)

    def reload(self, update: Update) -> None:
        with update.file() as file:
            socket.send_fds(self.sock, [Order.RELOAD.value], [file.fileno()])


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def supervisor(sockets: tuple[socket.socket, socket.socket]) -> Supervisor:
    return Supervisor(sockets[0])


@pytest.fixture
def link(sockets: tuple[socket.socket, socket.socket]) -> WorkerLink:
    return WorkerLink(sockets[1], UPDATE, heartbeat=1.0, max_sessions=3)


@asynccontextmanager
async def running(link: WorkerLink) -> AsyncIterator[list[str]]:
    """Runs the link; what it asks of the server stands in the list."""
    asked: list[str] = []

    def note(what: str) -> Callable[[], None]:
        return lambda: asked.append(what)

    link.on_parent_gone, link.on_stop, link.on_reload = note("go"), note("stop"), note("reload")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        await trio.testing.wait_all_tasks_blocked()
        yield asked
        nursery.cancel_scope.cancel()


# The plan


def test_a_plan_survives_its_way_and_is_nowhere_on_a_disk() -> None:
    plan = Plan(
        number=2,
        listeners=(5, 6),
        tables=(8, None),
        update=Update(generation=3, service=bytes(range(256))),
        max_sessions=7,
        alarm=60.0,
    )
    with plan.file() as file:
        assert "memfd" in os.readlink(f"/proc/self/fd/{file.fileno()}")
        assert Plan.take(os.dup(file.fileno())) == plan


def test_what_is_no_plan_is_refused() -> None:
    read, write = os.pipe()
    os.write(write, b'{"number":1}')
    os.close(write)
    with pytest.raises(ValueError, match="missing required field"):
        Plan.take(read)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(read)


def test_inherited_descriptors_are_not_inherited_again(sockets: tuple[socket.socket, socket.socket]) -> None:
    fd = os.dup(sockets[0].fileno())
    os.set_inheritable(fd, True)
    (taken,) = take_descriptors([fd])
    with taken:
        assert taken.fileno() == fd
        code = f"import os, sys; sys.exit(os.path.exists('/proc/self/fd/{fd}'))"
        assert subprocess.run([sys.executable, "-c", code], close_fds=False, check=False, timeout=30).returncode == 0


# What it tells

# An error's text may have several lines, and anything in them.
LENGTHY = "the accounts\n  are not there " + "x" * 10_000


def is_one_bounded_line(text: str | None) -> bool:
    """Whether this is what becomes of `LENGTHY`."""
    return text is not None and text.startswith("the accounts are not there xxx") and len(text) == LONGEST_FAILURE


async def test_heartbeats_come_from_the_event_loop_and_say_all_there_is(
    link: WorkerLink, supervisor: Supervisor, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(link):
        assert supervisor.heard() == [Report()]
        link.ready()
        link.session_started()
        assert supervisor.heard() == [Report(state=State.READY)]
        await trio.sleep(3.5)
        assert supervisor.heard() == [Report(state=State.READY, sessions=1)] * 3
        link.reloaded(1)
        link.reloaded(2, LENGTHY)
        told, refusal = supervisor.heard()
        assert told == Report(state=State.READY, sessions=1, generation=1)
        assert (refusal.generation, refusal.refused) == (1, 2)
        assert is_one_bounded_line(refusal.refusal)


async def test_the_session_with_which_it_is_outworn_is_told_at_once(link: WorkerLink, supervisor: Supervisor) -> None:
    link.ready()
    supervisor.heard()
    for _ in range(5):
        link.session_started()
    assert [report.sessions for report in supervisor.heard()] == [3]


def test_a_failure_is_one_bounded_line(link: WorkerLink, supervisor: Supervisor) -> None:
    link.failed(LENGTHY)
    (report,) = supervisor.heard()
    assert is_one_bounded_line(report.failure)


async def test_once_draining_it_is_not_ready_again(link: WorkerLink, supervisor: Supervisor) -> None:
    link.draining()
    link.ready()
    assert [report.state for report in supervisor.heard()] == [State.DRAINING]


async def test_a_supervisor_that_does_not_read_is_neither_waited_for_nor_taken_for_dead(
    link: WorkerLink, supervisor: Supervisor, autojump_clock: trio.testing.MockClock
) -> None:
    # It was stopped by Ctrl-Z and continued an hour later.
    async with running(link) as asked:
        link.ready()
        await trio.sleep(3600)
        link.session_started()
        assert asked == []
        assert len(supervisor.heard()) < 3600
        await trio.sleep(1.5)
        assert supervisor.heard()[-1] == Report(state=State.READY, sessions=1)


async def test_a_line_that_was_cut_by_a_full_buffer_is_completed_before_the_next() -> None:
    class Narrow(socket.socket):
        room = 0

        def send(self, data: bytes, *_flags: int) -> int:
            if not self.room:
                raise BlockingIOError
            size, self.room = min(self.room, len(data)), 0
            return super().send(data[:size])

    ours, theirs = socket.socketpair()
    with ours, Narrow(fileno=theirs.detach()) as narrow:
        supervisor, link = Supervisor(ours), WorkerLink(narrow, UPDATE)
        for number, room in enumerate((10, 0, 5, 3, 1000, 0, 70, 1, 1000), 1):
            narrow.room = room
            link.reloaded(number)
        told = supervisor.heard()
        assert supervisor.rest == b""
        assert told[-1].generation == 9
        assert [report.generation for report in told] == sorted({report.generation for report in told})


# What it is told


async def test_an_order_to_go_is_passed_on_once(link: WorkerLink, supervisor: Supervisor) -> None:
    async with running(link) as asked:
        supervisor.say(Order.RELOAD, Order.DRAIN, Order.DRAIN, Order.RELOAD)
        await trio.testing.wait_all_tasks_blocked()
        assert asked == ["reload", "go", "reload"]


async def test_an_order_to_reload_brings_what_to_serve_and_leaves_no_descriptor(
    link: WorkerLink, supervisor: Supervisor
) -> None:
    async with running(link) as asked:
        before = len(os.listdir("/proc/self/fd"))
        assert link.newest == UPDATE
        # Several may come before one look at the link, with other orders between them.
        for number in range(1, 20):
            supervisor.reload(Update(generation=number, service=b"x" * 1_000_000))
            supervisor.say(Order.RELOAD)
        await trio.testing.wait_all_tasks_blocked()
        assert link.newest.generation == 19
        assert asked == ["reload"] * 38
        assert len(os.listdir("/proc/self/fd")) == before


async def test_the_last_one_says_that_it_has_heard_and_not_when_it_goes_already(
    link: WorkerLink, supervisor: Supervisor
) -> None:
    async with running(link) as asked:
        link.on_last = lambda: asked.append("last")
        supervisor.say(Order.LAST)
        await trio.testing.wait_all_tasks_blocked()
        assert asked == ["last"]
        assert supervisor.heard()[-1].last
    theirs, ours = socket.socketpair()
    with ours, theirs:
        link, supervisor = WorkerLink(theirs, UPDATE), Supervisor(ours)
        async with running(link) as asked:
            link.draining()
            supervisor.say(Order.LAST)
            await trio.testing.wait_all_tasks_blocked()
            assert not supervisor.heard()[-1].last


async def test_an_order_to_go_means_nothing_to_a_worker_that_goes_already(
    link: WorkerLink, supervisor: Supervisor
) -> None:
    # systemd has sent SIGTERM to every process of the service.
    async with running(link) as asked:
        link.draining()
        supervisor.say(Order.DRAIN)
        await trio.testing.wait_all_tasks_blocked()
        assert asked == []
        supervisor.say(Order.STOP)
        await trio.testing.wait_all_tasks_blocked()
        assert asked == ["stop"]


async def test_an_order_to_stop_at_once_is_one_to_go_as_well(link: WorkerLink, supervisor: Supervisor) -> None:
    async with running(link) as asked:
        supervisor.say(Order.STOP)
        await trio.testing.wait_all_tasks_blocked()
        assert asked == ["go", "stop"]


async def test_an_order_that_nobody_knows_is_ignored(link: WorkerLink, supervisor: Supervisor) -> None:
    async with running(link) as asked:
        supervisor.sock.send(b"?\0\n")
        await trio.testing.wait_all_tasks_blocked()
        assert asked == []


async def test_the_supervisors_death_is_an_order_to_go_and_the_worker_lives_on(
    link: WorkerLink, supervisor: Supervisor, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(link) as asked:
        supervisor.sock.close()
        await trio.testing.wait_all_tasks_blocked()
        assert asked == ["go"]
        link.session_started()
        link.draining()
        await trio.sleep(10)
        assert asked == ["go"]


async def test_unread_reports_at_the_supervisors_death_change_nothing(link: WorkerLink, supervisor: Supervisor) -> None:
    # Then the end is ECONNRESET.
    async with running(link) as asked:
        link.ready()
        supervisor.sock.close()
        await trio.testing.wait_all_tasks_blocked()
        assert asked == ["go"]


async def test_orders_are_signals_to_a_server_that_knows_nothing_of_links(supervisor: Supervisor) -> None:
    theirs, ours = socket.socketpair()
    with ours, theirs:
        link = WorkerLink(theirs, UPDATE)
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        with trio.open_signal_receiver(*numbers) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.run)
                for order, number in (
                    (Order.RELOAD, signal.SIGHUP),
                    (Order.DRAIN, signal.SIGTERM),
                    (Order.STOP, signal.SIGINT),
                ):
                    ours.send(order.value)
                    assert await anext(aiter(signals)) == number
                nursery.cancel_scope.cancel()


# The kernel's alarm

STANDS_STILL = """
import socket, sys, threading, trio
from triosspi.service.workers.worker_link import Update, WorkerLink

async def main():
    ours, theirs = socket.socketpair()
    link = WorkerLink(theirs, Update(service=b""), heartbeat=0.01, alarm=0.2)
    link.on_parent_gone = lambda: None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        await trio.sleep(0.05)
        ours.close()
        await trio.sleep(0.05)
        {}

trio.run(main)
"""


@pytest.mark.parametrize("standing", ["while True: pass", "threading.Event().wait()"])
def test_an_event_loop_that_stands_still_is_ended_by_the_kernel_if_there_is_no_supervisor(standing: str) -> None:
    command = [sys.executable, "-c", STANDS_STILL.format(standing)]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGALRM
