"""What a supervisor does with its workers, which are tasks here: time is virtual. test_worker_processes has real ones."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from stub_worker import supervise_pool
from triosspi import ConfigurationError
from triosspi.service.observe.notify import Notifier
from triosspi.service.workers.pool import Pauses
from triosspi.service.workers.processes import Process, Timing, Work
from triosspi.service.workers.supervisor import Supervisor
from triosspi.service.workers.worker_link import Plan, Update, WorkerLink

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are for Linux")

TIMING = Timing()


# Workers that are tasks


class Worker:
    """Stands in for a process: a task with the worker's end of a link.

    Attributes:
      plan: what it was given.
      told: orders and signals.
      born: when it was started.
      died: when it ended.
      stacks: whether it has the handler for SIGQUIT.
    """

    numbers = itertools.count(10_000)

    def __init__(self, plan: Plan, link: WorkerLink) -> None:
        self.pid = next(self.numbers)
        self.plan = plan
        self.link = link
        self.told: list[str] = []
        self.born = trio.current_time()
        self.died: float | None = None
        self._status: int | None = None
        self._ended = trio.Event()
        self.scope = trio.CancelScope()
        link.on_parent_gone = lambda: self.told.append("drain")
        link.on_stop = lambda: self.told.append("stop")
        link.on_reload = lambda: self.told.append("reload")
        link.on_last = lambda: self.told.append("last")
        link.on_retire = lambda: (self.told.append("retire"), link.retired())

    async def wait(self) -> int:
        await self._ended.wait()
        assert self._status is not None
        return self._status

    def send_signal(self, number: signal.Signals | int) -> None:
        if self._status is None:
            self.told.append(signal.Signals(number).name)
            if number != signal.SIGQUIT:
                self.end(-number)

    def end(self, status: int) -> None:
        if self._status is None:
            self._status = status
            self.died = trio.current_time()
            self.scope.cancel()
            self.link.close()
            self._ended.set()

    async def live(self, life: Callable[[Worker], Awaitable[object]]) -> None:
        with self.scope:
            await life(self)
        self.end(0)


async def serving(worker: Worker) -> None:
    """Ready, until it is told to go."""
    go = trio.Event()
    told, worker.link.on_parent_gone = worker.link.on_parent_gone, lambda: (told(), go.set())
    retire, worker.link.on_retire = worker.link.on_retire, lambda: (retire(), go.set())

    def reload() -> None:
        worker.told.append("reload")
        worker.link.reloaded(worker.link.newest.generation)

    worker.link.on_reload = reload
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.link.run)
        worker.link.ready()
        await go.wait()
        nursery.cancel_scope.cancel()


async def deaf(worker: Worker) -> None:
    """Ready, and for ever."""
    worker.link.ready()
    await worker.link.run()


async def silent(worker: Worker) -> None:
    """Ready, and then stands still."""
    worker.link.ready()
    await trio.sleep_forever()


async def never_ready(worker: Worker) -> None:
    await worker.link.run()


def failing(reason: str) -> Callable[[Worker], Awaitable[None]]:
    async def life(worker: Worker) -> None:
        worker.link.failed(reason)
        worker.end(1)

    return life


def dying_after(seconds: float, status: int = -signal.SIGSEGV) -> Callable[[Worker], Awaitable[None]]:
    async def life(worker: Worker) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.link.run)
            worker.link.ready()
            await trio.sleep(seconds)
            worker.end(status)

    return life


class Recorder(Notifier):
    """A service manager that remembers."""

    def __init__(self, watchdog: float | None = None) -> None:
        super().__init__("/nowhere", watchdog)
        self.told: list[str] = []

    def _tell(self, *lines: str, status: str | None = None, patience: float = 0.0) -> None:
        self.told += [line for line in lines if not line.startswith("MONOTONIC")]
        if status is not None:
            self.told.append(f"STATUS={status}")

    @property
    def states(self) -> list[str]:
        return [line for line in self.told if not line.startswith(("STATUS", "WATCHDOG"))]


@dataclass
class Scene:
    """A supervisor and all workers that it has started.

    Attributes:
      lives: of the workers to come; when there is none left: `serving`. An OSError is one that does not start.
    """

    lives: list[Callable[[Worker], Awaitable[object]] | OSError] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    notifier: Recorder = field(default_factory=Recorder)
    supervisor: Supervisor = field(init=False)
    error: ConfigurationError | None = None
    address: Any = None
    started: trio.Event = field(default_factory=trio.Event)
    over: trio.Event = field(default_factory=trio.Event)

    def alive(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.died is None]

    async def run(self, started: Callable[[], object] | None) -> None:
        try:
            await self.supervisor.run(started or self.started.set)
        except ConfigurationError as exc:
            self.error = exc
        finally:
            self.over.set()


@asynccontextmanager
async def scene(
    *lives: Any,
    number: int = 2,
    timing: Timing = TIMING,
    grace: float = 30.0,
    started: Callable[[], object] | None = None,
    **options: Any,
) -> AsyncIterator[Scene]:
    """A supervisor that runs; in the end it is cancelled, and must leave nobody behind."""
    it = Scene(list(lives))
    if "watchdog" in options:
        it.notifier = Recorder(options.pop("watchdog"))
    before = len(os.listdir("/proc/self/fd"))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        it.address = sock.getsockname()
        async with trio.open_nursery() as processes, trio.open_nursery() as nursery:

            async def spawn(link: int, plan: int, listeners: Sequence[int]) -> Process:
                life = it.lives.pop(0) if it.lives else serving
                if isinstance(life, OSError):
                    raise life
                given = Plan.take(os.dup(plan))
                assert (*given.listeners, given.tables[0]) == tuple(listeners)
                assert given.listeners == (sock.fileno(),)
                end = WorkerLink(
                    socket.socket(fileno=os.dup(link)), given.update, heartbeat=1.0, max_sessions=given.max_sessions
                )
                worker = Worker(given, end)
                it.workers.append(worker)
                processes.start_soon(worker.live, life)
                return worker

            it.supervisor = supervise_pool(
                [sock],
                Work(service=b"what", grace=grace),
                number=number,
                timing=timing,
                notifier=it.notifier,
                spawn=spawn,
                **options,
            )
            nursery.start_soon(it.run, started)
            yield it
            nursery.cancel_scope.cancel()
        assert it.alive() == []
        assert it.supervisor.workers == []
        # The supervisor has closed it.
        assert sock.fileno() == -1
    assert len(os.listdir("/proc/self/fd")) <= before


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


# Starting


async def test_it_is_ready_when_all_workers_are(autojump_clock: trio.testing.MockClock) -> None:
    late = trio.Event()

    async def slow(worker: Worker) -> None:
        await late.wait()
        await serving(worker)

    async with scene(serving, slow) as it:
        await settle()
        assert len(it.workers) == 2
        assert it.notifier.states == []
        assert not it.started.is_set()
        late.set()
        await it.started.wait()
        assert "READY=1" in it.notifier.told
        assert it.notifier.told[-1] == "STATUS=2 of 2 workers ready"
        assert [worker.plan.number for worker in it.workers] == [1, 2]
        assert {worker.plan.update for worker in it.workers} == {Update(service=b"what")}


async def test_the_reason_of_a_worker_that_cannot_start_is_the_starts(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(serving, failing("accounts: no such file")) as it:
        await it.over.wait()
        assert str(it.error) == "accounts: no such file"
        assert it.notifier.states == []
        assert len(it.workers) == 2
        assert it.alive() == []


async def test_a_worker_that_ends_without_a_word_when_all_start_ends_the_start(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def leaving(worker: Worker) -> None:
        worker.end(3)

    async with scene(serving, leaving) as it:
        await it.over.wait()
        assert str(it.error) == "worker 2 ended before it was ready (exit status 3); the log may have its reason"


async def test_a_worker_that_is_never_ready_is_not_waited_for_for_ever(autojump_clock: trio.testing.MockClock) -> None:
    start = trio.current_time()
    async with scene(never_ready) as it:
        await it.over.wait()
        assert str(it.error) == "worker 1 was not ready after 60 s"
        assert 60 <= trio.current_time() - start <= 63
        assert it.workers[0].told == ["SIGKILL"]


async def test_a_system_that_starts_no_process_is_a_plain_error(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(OSError(11, "x")) as it:
        await it.over.wait()
        assert str(it.error) == "cannot start worker 1: Resource temporarily unavailable"


async def test_a_signal_during_the_start_ends_it_without_an_error(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(serving, never_ready) as it:
        await settle()
        signal.raise_signal(signal.SIGTERM)
        await it.over.wait()
        assert it.error is None
        ready, starting = it.workers
        assert ready.told == ["drain"]
        # It does not listen yet.
        assert starting.told == ["SIGTERM"]


# Replacing


def test_pauses_double_up_to_a_bound_and_begin_anew_after_a_good_while() -> None:
    pauses = Pauses(Timing(first_pause=0.5, longest_pause=10, stable=60))
    assert [pauses.after(0) for _ in range(7)] == [0.5, 1, 2, 4, 8, 10, 10]
    assert pauses.after(59.9) == 10
    assert [pauses.after(60), pauses.after(0), pauses.after(1)] == [0, 0.5, 1]
    assert max(pauses.after(0) for _ in range(2000)) == 10


async def test_a_worker_that_dies_is_replaced_after_pauses_that_grow(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async with scene(dying_after(100), *[dying_after(1)] * 7, number=1) as it:
        await it.started.wait()
        await trio.sleep(300)
        lives = [(worker.born, worker.died) for worker in it.workers]
        gaps = [born - died for (_, died), (born, _) in itertools.pairwise(lives) if died is not None]
        # The first had lived for long: it is replaced at once.
        assert gaps == pytest.approx([0, 0.5, 1, 2, 4, 8, 10, 10], abs=0.01)
        assert len(it.alive()) == 1
        assert not it.over.is_set()
    assert f"worker 1 (process {it.workers[0].pid}) has ended: killed by SIGSEGV" in caplog.text
    assert "worker 1 is started again in 0.5 s" in caplog.text


async def test_one_workers_death_does_not_touch_another(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(dying_after(1), serving) as it:
        await it.started.wait()
        other = it.workers[1]
        await trio.sleep(100)
        assert other.told == []
        assert other.died is None
        assert [worker.plan.number for worker in it.workers] == [1, 2, 1]


async def test_a_worker_that_cannot_start_any_more_is_tried_again_while_others_serve(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    broken = [failing("accounts: no such file"), OSError(12, "x"), never_ready]
    async with scene(dying_after(100), serving, *broken) as it:
        await it.started.wait()
        await trio.sleep(300)
        assert it.error is None
        assert len(it.workers) == 5
        assert len(it.alive()) == 2
        assert it.supervisor.well
    assert "has ended: exit status 1: accounts: no such file" in caplog.text
    assert "cannot start worker 1: Cannot allocate memory" in caplog.text


async def test_a_worker_that_leaves_by_itself_is_replaced_before_it_has_ended(
    autojump_clock: trio.testing.MockClock,
) -> None:
    # An administrator has sent it SIGTERM.
    async def leaving(worker: Worker) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deaf, worker)
            await trio.sleep(100)
            worker.link.draining()
            await trio.sleep(20)
            nursery.cancel_scope.cancel()

    async with scene(leaving, number=1) as it:
        await it.started.wait()
        await trio.sleep(101)
        assert len(it.alive()) == 2
        assert "STATUS=1 of 1 workers ready, 1 draining" in it.notifier.told
        await trio.sleep(20)
        first, second = it.workers
        assert first.told == []
        assert second.died is None


async def test_the_caller_hears_of_every_end(autojump_clock: trio.testing.MockClock) -> None:
    ended: list[int] = []
    async with scene(dying_after(1), number=1, on_end=ended.append) as it:
        await it.started.wait()
        await trio.sleep(10)
        assert ended == [it.workers[0].pid]
        it.supervisor.stop()
        await it.over.wait()
        assert ended == [worker.pid for worker in it.workers]


# Silence


async def test_a_silent_worker_is_killed_and_replaced_having_shown_where_it_stands(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scene(silent, number=1) as it:
        await it.started.wait()
        await trio.sleep(40)
        first, second = it.workers
        assert first.told == ["SIGQUIT", "SIGKILL"]
        assert first.died is not None
        assert 30 <= first.died - first.born <= 33
        assert second.died is None


async def test_a_supervisor_that_was_stopped_itself_takes_nobody_for_silent(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scene(silent, number=1) as it:
        await it.started.wait()
        for _ in range(5):
            autojump_clock.jump(3600)
            await settle()
        assert it.alive() == it.workers
        # But one that stays silent is.
        await trio.sleep(30)
        assert it.workers[0].told == ["SIGQUIT", "SIGKILL"]


@pytest.mark.parametrize(
    "nonsense", [b"\n", b"x\n", b'{"state":"ready","sessions":-1}\n', b"[" * 100_000, b"{" * 20_000]
)
async def test_a_worker_that_talks_nonsense_is_killed(nonsense: bytes, autojump_clock: trio.testing.MockClock) -> None:
    async def raving(worker: Worker) -> None:
        worker.link.ready()
        with trio.move_on_after(1):
            await worker.link.run()
        stream = trio.socket.from_stdlib_socket(worker.link._sock)
        while nonsense:
            sent = await stream.send(nonsense)
            if sent == len(nonsense):
                break
        await trio.sleep_forever()

    async with scene(raving, number=1) as it:
        await it.started.wait()
        await trio.sleep(5)
        assert it.workers[0].told == ["SIGQUIT", "SIGKILL"]
        assert len(it.alive()) == 1


async def test_a_worker_that_hangs_up_and_stays_is_killed(autojump_clock: trio.testing.MockClock) -> None:
    async def hanging_up(worker: Worker) -> None:
        worker.link.ready()
        worker.link.close()
        await trio.sleep_forever()

    async with scene(hanging_up, number=1) as it:
        await it.started.wait()
        await trio.sleep(40)
        assert it.workers[0].told == ["SIGQUIT", "SIGKILL"]
        assert len(it.alive()) == 1


async def test_the_watchdog_is_fed_only_while_somebody_serves_and_nobody_hangs(
    autojump_clock: trio.testing.MockClock,
) -> None:
    unkillable = trio.Event()

    async def waiting_for_a_disk(worker: Worker) -> None:
        worker.send_signal = lambda number: worker.told.append(signal.Signals(number).name)  # type: ignore[method-assign]
        worker.link.ready()
        await unkillable.wait()

    async with scene(waiting_for_a_disk, watchdog=4.0, number=1) as it:
        await it.started.wait()
        await trio.sleep(29)
        fed = it.notifier.told.count("WATCHDOG=1")
        assert fed == 15
        await trio.sleep(30)
        # There is another in its place, but something is wrong with the machine.
        assert len(it.alive()) == 2
        assert it.notifier.told.count("WATCHDOG=1") in {fed, fed + 1, fed + 2}
        unkillable.set()
        await settle()
        before = it.notifier.told.count("WATCHDOG=1")
        await trio.sleep(20)
        assert it.notifier.told.count("WATCHDOG=1") == before + 10


# Recycling


def serving_sessions(number: int) -> Callable[[Worker], Awaitable[None]]:
    async def clients(worker: Worker) -> None:
        await trio.sleep(10)
        for _ in range(number):
            worker.link.session_started()

    async def life(worker: Worker) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clients, worker)
            await serving(worker)

    return life


async def test_a_worker_that_has_had_its_sessions_goes_when_another_is_ready_one_at_a_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def slow(worker: Worker) -> None:
        await trio.sleep(5)
        await serving(worker)

    async with scene(serving_sessions(7), serving_sessions(8), slow, slow, max_sessions=7) as it:
        await it.started.wait()
        await trio.sleep(14)
        assert len(it.alive()) == 3
        assert [worker.told for worker in it.workers] == [[]] * 3
        await trio.sleep(30)
        first, second, third, fourth = sorted(it.workers, key=lambda worker: worker.born)
        assert first.told == second.told == ["retire"]
        assert fourth.born >= third.born + 5
        assert it.alive() == [third, fourth]


async def test_a_worker_stays_though_it_has_had_its_sessions_while_no_other_can_start(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scene(serving_sessions(7), failing("no"), OSError(12, "x"), never_ready, max_sessions=7, number=1) as it:
        await it.started.wait()
        first = it.workers[0]
        await trio.sleep(60)
        assert first.died is None
        await trio.sleep(60)
        assert first.told == ["retire"]
        assert len(it.workers) == 4
        assert len(it.alive()) == 1


async def test_who_is_with_a_worker_that_is_replaced_may_stay_until_the_next_one_is(
    autojump_clock: trio.testing.MockClock,
) -> None:
    def staying(after: float) -> Callable[[Worker], Awaitable[None]]:
        async def life(worker: Worker) -> None:
            go = trio.Event()
            told, worker.link.on_parent_gone = worker.link.on_parent_gone, lambda: (told(), go.set())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(worker.link.run)
                worker.link.ready()
                await trio.sleep(after)
                for _ in range(7):
                    worker.link.session_started()
                await go.wait()
                nursery.cancel_scope.cancel()

        return life

    async with scene(staying(10), staying(1000), staying(1000), max_sessions=7, number=1) as it:
        await it.started.wait()
        await trio.sleep(900)
        first, second = it.workers
        assert (first.told, first.died, second.told) == (["retire"], None, [])
        assert it.supervisor.ready
        assert it.notifier.told[-1] == "STATUS=1 of 1 workers ready, 1 retired"
        await trio.sleep(200)
        assert first.told == ["retire", "drain"]
        assert first.died is not None
        assert second.told == ["retire"]
        assert len(it.alive()) == 2
        it.supervisor.stop()
        await it.over.wait()
        assert second.told == ["retire", "drain"]


# Stopping


async def test_to_stop_is_to_let_all_finish(autojump_clock: trio.testing.MockClock) -> None:
    finish = trio.Event()

    async def busy(worker: Worker) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deaf, worker)
            await finish.wait()
            nursery.cancel_scope.cancel()

    async with scene(busy) as it:
        await it.started.wait()
        signal.raise_signal(signal.SIGINT)
        await trio.sleep(29)
        assert it.notifier.states == ["READY=1", "STOPPING=1"]
        assert it.workers[0].died is None
        assert it.workers[0].told == it.workers[1].told == ["drain"]
        finish.set()
        await it.over.wait()
        assert it.error is None
        assert it.workers[0].told == ["drain"]
        assert len(it.workers) == 2


async def test_whoever_does_not_finish_in_the_grace_and_a_little_is_killed(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async with scene(deaf, timing=Timing(margin=3), grace=10) as it:
        await it.started.wait()
        start = trio.current_time()
        it.supervisor.stop()
        await it.over.wait()
        assert trio.current_time() - start == pytest.approx(13, abs=0.1)
        assert it.workers[0].told == ["drain", "SIGKILL"]
        assert it.workers[1].told == ["drain"]
    assert "is killed: it was told to end, and did not" in caplog.text


async def test_a_second_signal_stops_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(deaf, deaf) as it:
        await it.started.wait()
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep(5)
        start = trio.current_time()
        signal.raise_signal(signal.SIGTERM)
        await it.over.wait()
        assert trio.current_time() - start <= 2.1
        assert [worker.told for worker in it.workers] == [["drain", "stop", "SIGKILL"]] * 2


async def test_two_signals_in_one_moment_are_one(autojump_clock: trio.testing.MockClock) -> None:
    # timeout(1) signals its child, and then the group that it is in.
    async with scene(deaf) as it:
        await it.started.wait()
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        await trio.sleep(20)
        assert it.workers[0].told == ["drain"]


async def test_a_third_one_kills(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(deaf, deaf) as it:
        await it.started.wait()
        for _ in range(3):
            await trio.sleep(0.3)
            start = trio.current_time()
            signal.raise_signal(signal.SIGTERM)
        await it.over.wait()
        assert trio.current_time() == start
        assert [worker.told for worker in it.workers] == [["drain", "stop", "SIGKILL"]] * 2


async def test_a_worker_that_dies_while_all_stop_is_not_replaced(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(deaf, deaf) as it:
        await it.started.wait()
        it.supervisor.stop()
        await settle()
        it.workers[0].end(-signal.SIGSEGV)
        await it.over.wait()
        assert len(it.workers) == 2


async def test_a_worker_that_is_just_being_replaced_ends_with_the_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scene(dying_after(100), serving, never_ready) as it:
        await it.started.wait()
        await trio.sleep(110)
        assert len(it.alive()) == 2
        it.supervisor.stop()
        await it.over.wait()
        assert it.workers[2].told == ["SIGTERM"]


async def test_a_supervisor_that_is_cancelled_kills_and_reaps(autojump_clock: trio.testing.MockClock) -> None:
    # The scene itself looks.
    async with scene(serving, deaf) as it:
        await it.started.wait()
    assert it.workers[1].told == ["SIGKILL"]


async def test_nobody_is_left_by_an_error_in_the_supervisor_itself(autojump_clock: trio.testing.MockClock) -> None:
    def wrong() -> None:
        raise RuntimeError("a bug")

    workers: list[Worker] = []
    with pytest.raises(ExceptionGroup) as caught:
        async with scene(started=wrong) as it:
            workers = it.workers
            await it.over.wait()
    assert caught.group_contains(RuntimeError, match="a bug")
    assert [worker.told for worker in workers] == [["SIGKILL"]] * 2


# The last one


def closing_late(seconds: float) -> Callable[[Worker], Awaitable[None]]:
    """Told to go, it takes so long until its sockets are closed, and as long again to end."""

    async def life(worker: Worker) -> None:
        go = trio.Event()
        told, worker.link.on_parent_gone = worker.link.on_parent_gone, lambda: (told(), go.set())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.link.run)
            worker.link.ready()
            await go.wait()
            await trio.sleep(seconds)
            worker.link.draining()
            await trio.sleep(seconds)
            nursery.cancel_scope.cancel()

    return life


async def test_one_worker_is_told_that_it_is_the_last_and_goes_when_the_others_have_closed_their_sockets(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scene(closing_late(0.1), closing_late(1), closing_late(2), number=3, sole=True) as it:
        await it.started.wait()
        sock = it.supervisor._pool.sockets[0]
        open_then: list[int] = []
        last = it.workers[0].link
        told, last.on_parent_gone = last.on_parent_gone, lambda: (open_then.append(sock.fileno()), told())
        start = trio.current_time()
        it.supervisor.stop()
        await it.over.wait()
        assert [worker.told for worker in it.workers] == [["last", "drain"], ["drain"], ["drain"]]
        # By then this process had closed its own, too.
        assert open_then == [-1]
        assert it.workers[0].died == pytest.approx(start + 2.2, abs=0.1)


async def test_where_another_process_has_the_sockets_nobody_is_told_to_be_the_last(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scene(serving, serving) as it:
        await it.started.wait()
        it.supervisor.stop()
        await it.over.wait()
        assert [worker.told for worker in it.workers] == [["drain"]] * 2


async def test_the_last_one_is_not_one_that_hangs_or_dies_meanwhile(autojump_clock: trio.testing.MockClock) -> None:
    async def dying(worker: Worker) -> None:
        worker.link.on_last = lambda: worker.end(-signal.SIGSEGV)
        await deaf(worker)

    async with scene(dying, silent, serving, number=3, sole=True) as it:
        await it.started.wait()
        start = trio.current_time()
        it.supervisor.stop()
        await it.over.wait()
        assert it.workers[2].told == ["last", "drain"]
        assert it.workers[2].died == pytest.approx(start + 2 + 5, abs=0.1)
        assert len(it.workers) == 3


@pytest.mark.parametrize("queued", [True, False])
async def test_where_all_were_told_to_go_by_somebody_else_another_is_started_if_anybody_is_queued(
    queued: bool, autojump_clock: trio.testing.MockClock
) -> None:
    go = trio.Event()

    async def leaving(worker: Worker) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deaf, worker)
            await go.wait()
            worker.link.draining()
            await trio.sleep(1)
            nursery.cancel_scope.cancel()

    async with AsyncExitStack() as stack:
        it = await stack.enter_async_context(scene(leaving, leaving, sole=True))
        await it.started.wait()
        if queued:
            address = it.address
            stack.enter_context(socket.create_connection(address))
        go.set()
        it.supervisor.stop()
        await it.over.wait()
        assert [worker.told for worker in it.workers[:2]] == [[]] * 2
        assert [worker.told for worker in it.workers[2:]] == ([["last", "drain"]] if queued else [])


async def test_a_second_signal_does_not_wait_for_the_last_one(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(silent, deaf, sole=True) as it:
        await it.started.wait()
        it.supervisor.stop()
        await trio.sleep(1)
        start = trio.current_time()
        it.supervisor.stop()
        await it.over.wait()
        assert trio.current_time() - start <= 2.1


# Reloading


async def test_to_reload_is_done_when_all_workers_have_done_it(autojump_clock: trio.testing.MockClock) -> None:
    slow = trio.Event()

    async def reading(worker: Worker) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deaf, worker)
            await slow.wait()
            worker.link.reloaded(worker.link.newest.generation)

    new = [Work(service=b"new")]
    async with scene(reading, reload=new.pop) as it:
        await it.started.wait()
        signal.raise_signal(signal.SIGHUP)
        await settle()
        assert it.notifier.states == ["READY=1", "RELOADING=1"]
        slow.set()
        await settle()
        assert it.notifier.states == ["READY=1", "RELOADING=1", "READY=1"]
        assert [worker.told for worker in it.workers] == [["reload"]] * 2
        # And whoever comes later has the new one from the beginning.
        it.workers[1].end(1)
        await trio.sleep(1)
        assert it.workers[2].plan.update == Update(generation=1, service=b"new")


async def test_requests_to_reload_that_come_together_do_not_make_later_ones_late(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    count = itertools.count(1)
    async with scene(reload=lambda: Work(service=b"%d" % next(count))) as it:
        await it.started.wait()
        for _ in range(5):
            for _ in range(3):
                signal.raise_signal(signal.SIGHUP)
            start = trio.current_time()
            await settle()
            assert it.notifier.states[-2:] == ["RELOADING=1", "READY=1"]
            assert trio.current_time() - start < 1
            newest = [worker.link.newest for worker in it.workers]
            assert newest[0] == newest[1]
        assert newest[0].generation == int(newest[0].service) > 1
    assert "not reloaded" not in caplog.text


async def test_what_a_worker_cannot_use_is_told_with_its_reason_and_the_others_have_it(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async def refusing(worker: Worker) -> None:
        worker.link.on_reload = lambda: worker.link.reloaded(worker.link.newest.generation, "no\naccounts")
        await deaf(worker)

    async with scene(refusing, serving, reload=lambda: Work(service=b"new")) as it:
        await it.started.wait()
        start = trio.current_time()
        signal.raise_signal(signal.SIGHUP)
        await settle()
        assert it.notifier.states == ["READY=1", "RELOADING=1", "READY=1"]
        assert trio.current_time() - start < 1
        assert [worker.report.generation for worker in it.supervisor.workers] == [0, 1]
    assert f"worker 1 (process {it.workers[0].pid}) keeps the configuration that it has: no accounts" in caplog.text


async def test_a_worker_that_does_not_read_has_the_newest_and_no_half_of_it_when_it_reads_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    reads = trio.Event()

    async def busy(worker: Worker) -> None:
        # Its heart beats, and it is told to reload until there is no room.
        worker.link._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        worker.link.ready()
        while not reads.is_set():
            worker.link._tell()
            await trio.sleep(0.5)
        await serving(worker)

    count = itertools.count(1)
    async with scene(busy, number=1, reload=lambda: Work(service=b"%d" % next(count) * 100_000)) as it:
        await it.started.wait()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(300):
            signal.raise_signal(signal.SIGHUP)
            await trio.sleep(6)
        assert len(os.listdir("/proc/self/fd")) == before
        reads.set()
        await trio.sleep(3)
        (worker,) = it.supervisor.workers
        assert worker.report.generation == 300
        assert it.workers[0].link.newest.service == b"300" * 100_000


async def test_the_supervisor_takes_over_its_own_part_and_waits_as_long_as_the_worker_may_take(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def refusing(worker: Worker) -> None:
        worker.link.on_reload = lambda: worker.link.reloaded(worker.link.newest.generation, "no")
        await deaf(worker)

    async def taking(worker: Worker) -> None:
        worker.link.on_reload = lambda: worker.link.reloaded(worker.link.newest.generation)
        await deaf(worker)

    taken: list[str] = []
    new = Work(service=b"new", grace=600, taken_over=lambda: taken.append("here, too"))
    async with scene(refusing, taking, timing=Timing(margin=3), grace=10, reload=lambda: new) as it:
        await it.started.wait()
        signal.raise_signal(signal.SIGHUP)
        await settle()
        assert taken == ["here, too"]
        start = trio.current_time()
        it.supervisor.stop()
        await it.over.wait()
        ends = [worker.died - start for worker in it.workers if worker.died is not None]
        assert ends == pytest.approx([13, 603], abs=0.1)


async def test_the_supervisor_watches_the_files_for_all(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    file = tmp_path / "triosspi.toml"
    file.write_text("one")
    async with scene(reload=lambda: Work(service=b"new", files=(file,))) as it:
        await it.started.wait()
        signal.raise_signal(signal.SIGHUP)
        await trio.sleep(10)
        assert [worker.told for worker in it.workers] == [["reload"]] * 2
        file.write_text("two, and longer")
        await trio.sleep(10)
        assert [worker.told for worker in it.workers] == [["reload"] * 2] * 2


async def test_a_configuration_that_cannot_be_is_told_to_nobody(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    def broken() -> Work:
        raise ConfigurationError("triosspi.toml: limits.max_conections: no such key")

    async with scene(reload=broken) as it:
        await it.started.wait()
        signal.raise_signal(signal.SIGHUP)
        await settle()
        assert it.notifier.states == ["READY=1", "RELOADING=1", "READY=1"]
        assert [worker.told for worker in it.workers] == [[]] * 2
        it.workers[1].end(1)
        await trio.sleep(1)
        assert it.workers[2].plan.update == Update(service=b"what")
    assert "the old configuration stays: triosspi.toml: limits.max_conections: no such key" in caplog.text


async def test_a_worker_that_does_not_answer_delays_a_reload_but_for_a_while(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async with scene(deaf, serving, reload=lambda: Work(service=b"new")) as it:
        await it.started.wait()
        start = trio.current_time()
        signal.raise_signal(signal.SIGHUP)
        await trio.sleep(4.9)
        assert it.notifier.states == ["READY=1", "RELOADING=1"]
        await trio.sleep(0.2)
        assert it.notifier.states == ["READY=1", "RELOADING=1", "READY=1"]
        assert trio.current_time() - start < 6
    assert "not reloaded after 5 s: worker 1 (process " in caplog.text


async def test_a_worker_that_dies_does_not_delay_a_reload(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(deaf, number=1, reload=lambda: Work(service=b"new")) as it:
        await it.started.wait()
        signal.raise_signal(signal.SIGHUP)
        await settle()
        it.workers[0].end(1)
        await settle()
        assert it.notifier.states == ["READY=1", "RELOADING=1", "READY=1"]


async def test_a_worker_that_is_starting_reloads_when_it_has_started(autojump_clock: trio.testing.MockClock) -> None:
    began = trio.Event()

    async def late(worker: Worker) -> None:
        await began.wait()
        await serving(worker)

    async with scene(dying_after(100), late, number=1, reload=lambda: Work(service=b"new")) as it:
        await it.started.wait()
        await trio.sleep(101)
        signal.raise_signal(signal.SIGHUP)
        await settle()
        # It is not waited for.
        assert it.notifier.states == ["READY=1", "RELOADING=1", "READY=1"]
        began.set()
        await settle()
        assert it.workers[1].told == ["reload"]


async def test_a_signal_to_reload_before_all_is_ready_is_not_lost_and_kills_nobody(
    autojump_clock: trio.testing.MockClock,
) -> None:
    began = trio.Event()

    async def late(worker: Worker) -> None:
        await began.wait()
        await serving(worker)

    async with scene(late, number=1, reload=lambda: Work(service=b"new")) as it:
        await settle()
        signal.raise_signal(signal.SIGHUP)
        await settle()
        began.set()
        await it.started.wait()
        await settle()
        assert it.workers[0].told == ["reload"]


async def test_to_stop_ends_a_reload_that_nobody_answers(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(deaf, number=1, reload=lambda: Work(service=b"new")) as it:
        await it.started.wait()
        signal.raise_signal(signal.SIGHUP)
        await settle()
        it.supervisor.stop()
        await settle()
        assert it.workers[0].told == ["reload", "drain"]
        assert it.notifier.states == ["READY=1", "RELOADING=1", "STOPPING=1"]


@pytest.mark.parametrize("error", [ValueError("x" * 10_000), RecursionError("x"), MemoryError(), OSError(5, "x")])
async def test_nothing_that_a_reload_meets_ends_the_service(
    error: Exception, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    def broken() -> Work:
        raise error

    async with scene(reload=broken) as it:
        await it.started.wait()
        signal.raise_signal(signal.SIGHUP)
        await settle()
        assert it.notifier.states == ["READY=1", "RELOADING=1", "READY=1"]
        assert [worker.told for worker in it.workers] == [[]] * 2
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "the old configuration stays: the configuration cannot be used: " + type(error).__name__ in line
    assert len(line) < 500


async def test_a_reload_that_hangs_holds_up_neither_the_service_nor_its_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async def hang(*_: object, **options: Any) -> None:
        assert options["abandon_on_cancel"]
        await trio.sleep_forever()

    monkeypatch.setattr(trio.to_thread, "run_sync", hang)
    async with scene(watchdog=4.0, reload=lambda: Work(service=b"new")) as it:
        await it.started.wait()
        signal.raise_signal(signal.SIGHUP)
        await trio.sleep(20)
        assert it.notifier.told.count("WATCHDOG=1") >= 10
        await trio.sleep(20)
        assert it.notifier.states == ["READY=1", "RELOADING=1", "READY=1"]
        signal.raise_signal(signal.SIGHUP)
        await settle()
        start = trio.current_time()
        signal.raise_signal(signal.SIGTERM)
        await it.over.wait()
        assert trio.current_time() - start < 1
    assert "the old configuration stays: it could not be read within 30 s" in caplog.text


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    async def inline(function: Callable[..., Any], *args: Any, **_options: Any) -> Any:
        # The clock would jump over a wait for a thread.
        await trio.lowlevel.checkpoint()
        return function(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", inline)


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "triosspi.server")
