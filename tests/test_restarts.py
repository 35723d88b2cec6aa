"""Servers are restarted, drained and killed under load, and no client is left without a word that need not be."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing

import triosspi
from harness import make_initiator
from peers import SSPI_RS_NTLM
from peers.kerberos.realm import find_program, missing_program
from peers.requirements import require, require_nothing
from programs import PATIENCE, Running, children, environment
from steady_load import APPLICATION, PASSWORD, Load
from triosspi.service import account_editor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="systemd's protocol, and HAProxy")

# One of each matrix is left to show at once that nothing is broken altogether.
LONG = pytest.mark.long("dozens of servers are started, and stopped under load, in real time")

ROOT = Path(__file__).resolve().parent.parent
RESTARTS = 20
# systemd's protocol: the sockets are the descriptors from 3 on, and LISTEN_PID is the process that they are for.
AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With an account and the load's application."""
    account_editor.add(tmp_path / "accounts", "DOM\\alice", PASSWORD)
    (tmp_path / "load_application.py").write_text(APPLICATION)
    return tmp_path


@contextmanager
def server(folder: Path, name: str, *arguments: str, listening: socket.socket | None = None) -> Iterator[Running]:
    """One server; with the listening socket that it inherits, if there is one."""
    command = [sys.executable, "-m", "triosspi", "serve", "load_application:handler", "--wire", "framed"]
    command += ["--accounts", str(folder / "accounts"), "--log-level", "warning", "--grace", "10s", *arguments]
    descriptors: tuple[int, ...] = ()
    if listening is not None:
        descriptors = (listening.fileno(),)
        command = [sys.executable, "-c", AS_SYSTEMD, str(listening.fileno()), *command]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(SERVER_NAME=name, PYTHONPATH=os.fspath(folder)),
        pass_fds=descriptors,
    ) as process:
        program = Running(process)
        try:
            yield program
        finally:
            if process.poll() is None:
                process.kill()
            program.wait()


async def drain(program: Running) -> None:
    """Have it stop as the service manager does, and see that it did so in good order."""
    program.process.send_signal(signal.SIGTERM)
    assert await trio.to_thread.run_sync(program.wait) == 0
    # Among others, that a session was cancelled after the grace, or that a handler failed.
    assert program.err == ""


# Twenty-one processes are started beside their clients, and beside other tests: nobody knows how long that takes, only
# that it is not for ever.
@LONG
@pytest.mark.timeout(20 * PATIENCE)
async def test_twenty_restarts_under_load_leave_no_request_without_a_word(folder: Path) -> None:
    require(SSPI_RS_NTLM)
    with ExitStack() as stack, trio.fail_after(15 * PATIENCE):
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
        load = Load(*listening.getsockname(), foreign=[SSPI_RS_NTLM] * 2)

        async def start(number: int) -> Running:
            program = stack.enter_context(server(folder, f"server {number}", listening=listening))
            await trio.to_thread.run_sync(program.expect_port)
            return program

        current = await start(0)
        async with load.running():
            for number in range(RESTARTS):
                await load.answered(f"server {number}", 50)
                previous = current
                if number % 2:
                    # As systemd does it: first the old one goes. Who comes meanwhile waits in the queue.
                    await drain(previous)
                    current = await start(number + 1)
                else:
                    current = await start(number + 1)
                    await drain(previous)
            await load.answered(f"server {RESTARTS}", 50)
        await drain(current)
    assert load.failures == []
    # All the same they were told to go, again and again, and came back.
    assert load.goodbyes >= RESTARTS * load.talkers
    assert len(load.by_client) == load.talkers + load.callers + len(load.foreign)


async def to_the_first(processes: list[int]) -> None:
    os.kill(processes[0], signal.SIGTERM)


async def to_all(processes: list[int]) -> None:
    """As systemd does it."""
    for pid in processes:
        os.kill(pid, signal.SIGTERM)


async def to_all_the_first_last(processes: list[int]) -> None:
    for pid in reversed(processes):
        os.kill(pid, signal.SIGTERM)


async def to_one_worker_before(processes: list[int]) -> None:
    os.kill(processes[-1], signal.SIGTERM)
    os.kill(processes[0], signal.SIGTERM)


async def to_reload_before(processes: list[int]) -> None:
    os.kill(processes[0], signal.SIGHUP)
    os.kill(processes[0], signal.SIGTERM)


async def to_all_after_one_was_killed(processes: list[int]) -> None:
    if len(processes) > 1:
        os.kill(processes[-1], signal.SIGKILL)
    await to_all(processes[:-1] or processes)


STOPS = (
    to_all,
    pytest.param(to_the_first, marks=LONG),
    pytest.param(to_all_the_first_last, marks=LONG),
    pytest.param(to_one_worker_before, marks=LONG),
    pytest.param(to_reload_before, marks=LONG),
    pytest.param(to_all_after_one_was_killed, marks=LONG),
)
WORKERS = (
    "2",
    pytest.param("1", marks=LONG),
    pytest.param("4", marks=LONG),
)
each_way_to_stop = pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.__name__)
with_workers = pytest.mark.parametrize("workers", WORKERS)


@with_workers
@each_way_to_stop
async def test_who_waits_in_the_queue_of_a_server_that_stops_is_not_left_without_a_word(
    folder: Path, workers: str, stop: Callable[[list[int]], Awaitable[None]]
) -> None:
    # The kernel resets whatever is queued on a listening socket when its last descriptor is closed; who was there had a
    # connection, had sent its first token, and was owed an answer.
    clients = 20
    told = []
    arguments = ["--host", "127.0.0.1", "--port", "0", "--log-level", "error", "--workers", workers]
    with server(folder, "server", *arguments) as program, trio.fail_after(4 * PATIENCE):
        port = await trio.to_thread.run_sync(program.expect_port)
        # Nobody accepts now.
        processes = [program.process.pid, *children(program.process.pid)]
        assert len(processes) == (1 if workers == "1" else 1 + int(workers))
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)

        async def log_in(stream: trio.SocketStream) -> None:
            channel = triosspi.SSPIChannel(stream, make_initiator(PASSWORD))
            async with channel:
                await channel.do_handshake()
                with pytest.raises(trio.EndOfChannel):
                    await channel.receive()
            told.append(stream)

        async with trio.open_nursery() as nursery:
            for _ in range(clients):
                nursery.start_soon(log_in, await trio.open_tcp_stream("127.0.0.1", port))
            await trio.testing.wait_all_tasks_blocked()
            await stop(processes)
            for pid in reversed(processes):
                os.kill(pid, signal.SIGCONT)
        assert await trio.to_thread.run_sync(program.wait) == 0
    assert len(told) == clients
    assert program.err == ""


@with_workers
@pytest.mark.parametrize("stop", [STOPS[0], STOPS[1], STOPS[3]], ids=lambda stop: stop.__name__)
async def test_a_server_that_stops_under_load_refuses_who_comes_late_and_resets_nobody(
    folder: Path, workers: str, stop: Callable[[list[int]], Awaitable[None]]
) -> None:
    arguments = ["--host", "127.0.0.1", "--port", "0", "--log-level", "error", "--workers", workers]
    with server(folder, "server", *arguments) as program, trio.fail_after(4 * PATIENCE):
        port = await trio.to_thread.run_sync(program.expect_port)
        processes = [program.process.pid, *children(program.process.pid)]
        load = Load("127.0.0.1", port, talkers=6, callers=6)
        async with load.running():
            await load.answered("server", 100)
            await stop(processes)
            assert await trio.to_thread.run_sync(program.wait) == 0
    # Whoever had a connection has heard a goodbye on it.
    lost = [failure for failure in load.failures if "all attempts to connect" not in failure.error]
    assert lost == []
    assert program.err == ""


# ---- several machines behind HAProxy ----

HAPROXY = find_program("haproxy")
# Machines of a fleet; all of 127.0.0.0/8 is this one.
MACHINES = {"a": "127.0.0.11", "b": "127.0.0.12"}


def free_port(*addresses: str) -> int:
    """A port that is free on all of them."""
    while True:
        with ExitStack() as stack:
            port = stack.enter_context(socket.create_server((addresses[0], 0))).getsockname()[1]
            try:
                for address in addresses[1:]:
                    stack.enter_context(socket.create_server((address, port)))
            except OSError:
                continue
            return port


@dataclass
class Fleet:
    """Two servers behind HAProxy, which has deploy/haproxy.cfg but for addresses and ports.

    Attributes:
      servers: those that were started, by name.
    """

    folder: Path
    stack: ExitStack
    servers: dict[str, Running] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ports = {"serve": free_port(*MACHINES.values()), "status": free_port(*MACHINES.values())}
        self.admin = self.folder / "admin.sock"

    async def start(self, name: str) -> None:
        """Start one server, and wait until it serves."""
        address = MACHINES[name]
        arguments = ["--host", address, "--port", str(self.ports["serve"]), "--proxy-from", "127.0.0.0/8"]
        arguments += ["--metrics", f"{address}:{self.ports['status']}"]
        self.servers[name] = self.stack.enter_context(server(self.folder, f"server {name}", *arguments))
        await trio.to_thread.run_sync(self.servers[name].expect_port)

    async def balance(self) -> tuple[str, int]:
        """Start HAProxy; returns where it listens."""
        address, process = self._start_haproxy()
        while not self.admin.exists():
            # A process that nobody here has written: there is nothing but to look again.
            await trio.sleep(0.02)
            assert process.poll() is None, (self.folder / "haproxy.log").read_text()
        return address

    def _start_haproxy(self) -> tuple[tuple[str, int], subprocess.Popen[bytes]]:
        assert HAPROXY is not None
        text = (ROOT / "deploy" / "haproxy.cfg").read_text()
        listening = self.stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
        for pattern, replacement in (
            (r"#stats socket \S+", f"stats socket {self.admin}"),
            # It wants two descriptors for each.
            (r"maxconn 50000", "maxconn 1000"),
            (r"bind :2000", f"bind fd@{listening.fileno()}"),
            (r"check port 9464", f"check port {self.ports['status']}"),
            *((rf"server {name} \S+", f"server {name} {MACHINES[name]}:{self.ports['serve']}") for name in MACHINES),
        ):
            text, count = re.subn(pattern, replacement, text)
            assert count == 1, f"{pattern} is there {count} times"
        configuration = self.folder / "haproxy.cfg"
        configuration.write_text(text)
        log = self.stack.enter_context((self.folder / "haproxy.log").open("wb"))
        command = [HAPROXY, "-db", "-f", configuration]
        process = self.stack.enter_context(
            subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[listening.fileno()])
        )
        self.stack.callback(process.kill)
        return listening.getsockname()[:2], process

    async def wait_until_up(self, name: str) -> None:
        """Wait until HAProxy sends clients to a server (again)."""
        pattern = rf"^triosspi,{name},.*,UP,"
        while not re.search(pattern, await self._statistics(), re.MULTILINE):  # noqa: ASYNC110 - see above
            await trio.sleep(0.05)

    async def _statistics(self) -> str:
        shown = b""
        async with await trio.open_unix_socket(self.admin) as stream:
            await stream.send_all(b"show stat\n")
            async for chunk in stream:
                shown += chunk
        return shown.decode()


@pytest.mark.long("HAProxy looks every few seconds whether a server is there")
async def test_behind_haproxy_a_drained_server_fails_no_request_and_a_killed_one_only_those_it_had(
    folder: Path,
) -> None:
    require_nothing(missing_program({"haproxy": "haproxy"}))
    require(SSPI_RS_NTLM)
    with ExitStack() as stack, trio.fail_after(PATIENCE):
        fleet = Fleet(folder, stack)
        await fleet.start("a")
        await fleet.start("b")
        load = Load(*await fleet.balance(), foreign=[SSPI_RS_NTLM] * 2)
        async with load.running():
            await load.answered("server a", 100)
            await load.answered("server b", 100)

            fleet.servers["a"].process.kill()
            await load.answered("server b", 300)
            killed, load.failures = load.failures, []

            await fleet.start("a")
            await fleet.wait_until_up("a")
            await load.answered("server a", 100)
            goodbyes = load.goodbyes

            await drain(fleet.servers["b"])
            await load.answered("server a", 300)
        await drain(fleet.servers["a"])
    print(f"failed by SIGKILL: {killed}, by draining: {load.failures}")
    assert load.failures == []
    assert load.goodbyes > goodbyes
    # Of those that were killed none was served by the other server; some had not been answered by any yet.
    assert {failure.server for failure in killed} <= {"server a", None}
    assert killed


# ---- for a while ----


@pytest.mark.long("a soak is a while")
def test_a_short_soak_finds_nothing_wrong() -> None:
    # Twelve seconds; for memory that is too short to judge. At full length: bench/soak.py --minutes 10.
    command = [sys.executable, str(ROOT / "bench" / "soak.py"), "--minutes", "0.2", "--clients", "40"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=3 * PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "nothing wrong"
