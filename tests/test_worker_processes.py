"""A supervisor and workers that are real processes, some of which do what they should not (see stub_worker)."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

import stub_worker
from programs import PATIENCE, Running, running, terminal
from stub_worker import Stub, listen, make_supervisor, supervise_pool
from triosspi import ConfigurationError
from triosspi.service.workers.processes import Timing, Work, spawn
from triosspi.service.workers.supervisor import Supervisor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are for Linux")

#: Of workers that do well: nobody is killed because the machine is busy.
PATIENT = Timing(heartbeat=0.05, start=PATIENCE, heartbeat_timeout=PATIENCE, first_pause=0.01)
#: Of workers that do not.
STRICT = Timing(heartbeat=0.05, start=PATIENCE, heartbeat_timeout=2.0, margin=0.2, first_pause=0.01)
SERVE = (sys.executable, stub_worker.__file__)


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    return Stub(str(tmp_path), secret="ten little secrets")


class Service:
    """A running supervisor, in this process."""

    def __init__(self, supervisor: Supervisor, sock: socket.socket) -> None:
        self.supervisor = supervisor
        self.address = sock.getsockname()
        self.stopping = False
        self.over = trio.Event()

    async def stop(self) -> None:
        self.stopping = True
        self.supervisor.stop()
        await self.over.wait()

    def pids(self) -> set[int]:
        """Of the workers that serve."""
        return {worker.pid for worker in self.supervisor.workers if worker.ready.is_set()}

    async def ask(self) -> int:
        """Connect; which worker has answered."""
        async with await trio.open_tcp_stream(*self.address) as stream:
            return int(b"".join([data async for data in stream]))


async def until(condition: Callable[[], object]) -> None:
    """Wait for other processes, which tell nobody."""
    with trio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110 - they have no events
            await trio.sleep(0.01)


@asynccontextmanager
async def serving(stub: Stub, number: int = 2, *, timing: Timing = PATIENT, **options: Any) -> AsyncIterator[Service]:
    """A supervisor that has started; stopped in the end, and nothing may be left of it."""
    before = descriptors(os.getpid())
    sock = listen()
    options = {"grace": 0.2 if timing is STRICT else PATIENCE, **options}
    service = Service(make_supervisor(stub, sock, number, timing=timing, **options), sock)
    started = trio.Event()

    async def run() -> None:
        await service.supervisor.run(started.set)
        service.over.set()

    with trio.fail_after(2 * PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await started.wait()
            yield service
            if not service.stopping:
                service.supervisor.stop()
    assert service.supervisor.workers == []
    assert descriptors(os.getpid()) == before


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def links_of(pid: int) -> list[str]:
    """What its descriptors are of."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def children() -> set[int]:
    """Of this process, zombies too; a session's fixtures have some."""
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == os.getpid():
                    found.add(int(entry))
    return found


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() == before


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and no zombie of it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


# How a worker is started


async def test_a_worker_has_its_sockets_its_link_and_nothing_else_of_the_parents(stub: Stub) -> None:
    # What is open here and inheritable would be open there.
    read, write = os.pipe()
    os.set_inheritable(read, True)
    try:
        async with serving(stub, 1) as service:
            (pid,) = service.pids()
            links = links_of(pid)
            shared = set(links) & set(links_of(os.getpid()))
            # Standard output and error may be anything.
            shared -= {os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)}
            # What workers know together of each other, of sources and of accounts; its plan is read and closed.
            common = {"/memfd:triosspi-tables (deleted)"}
            assert {link for link in links if "memfd" in link} == common
            shared -= common
            assert len([link for link in shared if not link.startswith("anon_inode")]) == 1
            assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
    finally:
        os.close(read)
        os.close(write)


async def test_what_a_worker_is_told_is_not_to_be_seen_in_its_command_line_or_environment(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1000000", "LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    async with serving(stub, 1) as service:
        (pid,) = service.pids()
        proc = trio.Path(f"/proc/{pid}")
        shown = await (proc / "cmdline").read_bytes() + await (proc / "environ").read_bytes()
        assert b"secret" not in shown
        assert not [name for name in mine if f"{name}=".encode() in shown]


async def test_a_terminals_signals_do_not_reach_workers(stub: Stub) -> None:
    async with serving(stub, 2) as service:
        groups = {os.getpgid(pid) for pid in service.pids()}
        assert len(groups) == 2
        assert os.getpgid(0) not in groups


async def test_every_worker_serves(stub: Stub) -> None:
    async with serving(stub, 2) as service:
        answered: set[int] = set()
        # Goes on for ever where one of them never gets a connection.
        while answered != service.pids():
            answered.add(await service.ask())


# How it ends


async def test_a_worker_that_crashes_is_replaced_and_the_other_serves_on(stub: Stub) -> None:
    stub.first = "crash"
    async with serving(stub, 2) as service:
        before = service.pids()
        while len(before & service.pids()) == 2:
            await service.ask()
        await until(lambda: len(service.pids()) == 2)
        assert len(before & service.pids()) == 1
        assert await service.ask() in service.pids()


async def test_who_waits_for_a_dead_worker_is_served_by_its_replacement(stub: Stub) -> None:
    # With a socket of its own for each worker, no other worker could accept it.
    stub.first = "hang"
    async with serving(stub, 1, timing=STRICT) as service:
        (hanging,) = service.pids()
        async with await trio.open_tcp_stream(*service.address) as last:
            assert int(await last.receive_some()) == hanging
            # From now on it accepts nobody.
            await until(lambda: f"{hanging} hangs" in stub.said())
            answers = []

            async def wait_in_the_queue() -> None:
                answers.append(await service.ask())

            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(wait_in_the_queue)
            assert hanging not in answers
            assert len(answers) == 5


async def test_a_worker_that_hangs_is_killed_and_replaced_having_shown_where(
    stub: Stub, capfd: pytest.CaptureFixture[str]
) -> None:
    stub.first = "hang"
    async with serving(stub, 1, timing=STRICT) as service:
        (hanging,) = service.pids()
        async with await trio.open_tcp_stream(*service.address) as stream:
            assert int(await stream.receive_some()) == hanging
            await until(lambda: not is_alive(hanging))
        await until(lambda: service.pids() - {hanging})
    assert "in answer" in capfd.readouterr().err


async def test_a_worker_that_listens_to_nobody_is_killed_after_the_grace(stub: Stub) -> None:
    stub.first = "deaf"
    async with serving(stub, 2, timing=STRICT) as service:
        deaf = next(int(line.split()[0]) for line in stub.said() if line.endswith("started deaf"))
        await service.stop()
        assert not is_alive(deaf)
    assert f"{deaf} told to stop by the supervisor" in stub.said()
    assert f"{deaf} ended" not in "\n".join(stub.said())


async def test_all_workers_finish_when_told_to_and_are_told_once(stub: Stub) -> None:
    async with serving(stub, 2) as service:
        pids = service.pids()
        # As systemd does it: everybody gets it.
        service.stopping = True
        for pid in (*pids, os.getpid(), *pids):
            os.kill(pid, signal.SIGTERM)
        await service.over.wait()
    assert sorted(line for line in stub.said() if "ended" in line) == sorted(f"{pid} ended" for pid in pids)


async def test_a_worker_that_was_sent_sigterm_alone_is_replaced(stub: Stub) -> None:
    async with serving(stub, 2) as service:
        gone = min(service.pids())
        os.kill(gone, signal.SIGTERM)
        await until(lambda: gone not in service.pids() and len(service.pids()) == 2)
    assert f"{gone} ended" in stub.said()


async def test_the_start_fails_with_the_reason_of_the_worker_that_fails(stub: Stub) -> None:
    stub.first = "fail"
    with pytest.raises(ConfigurationError, match=r"^the accounts are not there$"):
        await make_supervisor(stub, listen(), 2, timing=PATIENT).run()


async def test_the_start_fails_when_a_worker_ends_without_a_word(stub: Stub) -> None:
    stub.mode = stub.first = "leave"
    with pytest.raises(ConfigurationError, match=r"ended before it was ready \(exit status 4\)"):
        await make_supervisor(stub, listen(), 2, timing=PATIENT).run()


async def test_the_start_fails_when_a_worker_is_never_ready(stub: Stub) -> None:
    stub.first = "never ready"
    with pytest.raises(ConfigurationError, match=r"was not ready after 1 s"):
        await make_supervisor(stub, listen(), 2, timing=Timing(heartbeat=0.05, start=1.0)).run()


async def test_a_program_that_cannot_be_started_is_a_plain_error() -> None:
    supervisor = supervise_pool([listen()], Work(service=b""), number=2, spawn=partial(spawn, ["/nowhere/at/all"]))
    before = descriptors(os.getpid())
    with pytest.raises(ConfigurationError, match="^cannot start worker 1: No such file or directory$"):
        await supervisor.run()
    assert descriptors(os.getpid()) < before


async def test_a_worker_that_has_had_its_sessions_is_replaced_and_no_client_notices(stub: Stub) -> None:
    async with serving(stub, 2, max_sessions=10) as service:
        first = service.pids()
        served = 0
        with trio.fail_after(PATIENCE):
            while first & service.pids():
                await service.ask()
                served += 1
        assert served >= 19
    ended = [line for line in stub.said() if "ended" in line]
    assert all(line.endswith("ended") for line in ended)


async def test_a_supervisor_that_is_cancelled_leaves_nobody_behind(stub: Stub) -> None:
    stub.first = stub.mode = "deaf"
    sock = listen()
    before = descriptors(os.getpid())
    supervisor = make_supervisor(stub, sock, 2, timing=PATIENT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.run, nursery.cancel_scope.cancel)
    assert descriptors(os.getpid()) == before - 1


# The supervisor as a process


@contextmanager
def supervising(stub: Stub, timing: Timing = PATIENT) -> Iterator[Running]:
    """One with two workers."""
    arguments = ("supervise", "2", stub.encode().decode(), json.dumps(asdict(timing)))
    with running(*arguments, program=SERVE) as program:
        program.expect(r"^port \d+$")
        yield program


def workers_of(stub: Stub) -> set[int]:
    return {int(line.split()[0]) for line in stub.said() if "started" in line}


def ends_of(stub: Stub) -> list[str]:
    return sorted(line for line in stub.said() if "ended" in line)


async def test_the_supervisors_death_ends_its_workers(stub: Stub) -> None:
    with supervising(stub) as program:
        pids = workers_of(stub)
        program.process.kill()
        await until(lambda: not any(map(is_alive, pids)))
    assert ends_of(stub) == sorted(f"{pid} ended" for pid in pids)


async def test_not_even_a_worker_that_hangs_outlives_its_supervisor(stub: Stub) -> None:
    stub.first = stub.mode = "hang"
    timing = Timing(heartbeat=0.05, heartbeat_timeout=1.0)
    with supervising(stub, timing) as program:
        port = int(program.expect(r"^port (\d+)$")[1])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            hanging = int(await stream.receive_some())
            program.process.kill()
            # Well before, the supervisor would have done it.
            await until(lambda: not is_alive(hanging))
    assert f"{hanging} ended" not in "\n".join(stub.said())


def test_ctrl_c_is_one_request_to_stop(stub: Stub) -> None:
    arguments = ("supervise", "2", stub.encode().decode(), json.dumps(asdict(PATIENT)))
    with terminal(*arguments, program=SERVE) as screen:
        screen.expect("port ")
        pids = workers_of(stub)
        screen.type("\x03")
        assert screen.wait() == 0
        assert "Traceback" not in screen.shown
    assert ends_of(stub) == sorted(f"{pid} ended" for pid in pids)


def test_sighup_reloads_every_worker(stub: Stub) -> None:
    with supervising(stub) as program:
        pids = workers_of(stub)
        program.process.send_signal(signal.SIGHUP)
        # Read in a thread, which may be later than the order to stop.
        while sum("reloaded" in line for line in stub.said()) < len(pids):
            pass
        assert program.stop() == 0
    # Orders are not overtaken by others.
    assert sorted(line for line in stub.said() if "reloaded" in line) == sorted(f"{pid} reloaded" for pid in pids)


def test_a_supervisor_stops_with_exit_status_0_and_a_start_that_fails_is_one_line(stub: Stub) -> None:
    with supervising(stub) as program:
        assert program.stop(signal.SIGINT) == 0
        assert "Traceback" not in program.err
    stub.mode = "fail"
    arguments = ("supervise", "2", stub.encode().decode(), json.dumps(asdict(PATIENT)))
    with running(*arguments, program=SERVE) as program:
        assert program.wait() == 1
        assert program.err.endswith("\nthe accounts are not there\n")
