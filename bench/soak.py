"""Soak: honest and hostile clients in random mixture for minutes, over two workers; what a server must not do is grow.

    python bench/soak.py --minutes 10 [--seed N] [--clients 120] [--workers 2]

Each client does one thing after another, by lot: logs in and echoes, stays, drops the connection, sends what it should not
at any stage of its life, or sends and does not read. They come from two networks, of which one is exempt from penalties:
otherwise most of what is hostile would be shut out, and the server would have an easy life. SIGHUP reloads the
configuration between.

Every 10 seconds all hold still, until the server has no connection left; then its processes are measured. So what is seen is
not the load of that moment, and descriptors must be exactly as many as before: one that leaked would stay. Memory of a
long-lived process goes up and down by what its allocator keeps; so the judgement is on medians, of the last quarter of
the time after the first minute against its first quarter. Exit status 1: it has grown, an honest client was failed, a worker
has died or the log has an error.
"""

import argparse
import os
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from measure import machine, versions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from crowd import MISCHIEF, PASSWORD
from triosspi import Initiator, SSPIChannel
from triosspi.service import account_editor

#: Seconds between two measurements, and until the first that counts.
INTERVAL, WARM_UP = 10.0, 60.0
#: What the median may grow by: the larger of the two. An allocator's own doings are below it; at some hundred connections
#: a second for ten minutes, a leak of 50 bytes for each is above.
GROWTH, GROWTH_SHARE = 2.0, 0.04
#: Descriptors and threads that come and go: a log rotated, a worker thread that Trio keeps for ten seconds.
SLACK_DESCRIPTORS = 2
EXEMPT, PENALISED = "127.0.2", "127.0.3"
HOST = "127.0.0.1"
# Seconds that one deed may take, and that the server gives a handshake.
DEED, HANDSHAKE = 6.0, 4.0

Channel = SSPIChannel[trio.SocketStream]


# ---- what clients do once they are logged in ----


async def echo(channel: Channel, rng: random.Random) -> None:
    """What a client is there for."""
    for _ in range(rng.randint(1, 10)):
        message = rng.randbytes(rng.choice([1, 32, 1000, 70_000]))
        await channel.send(message)
        assert await channel.receive() == message


async def stay(channel: Channel, rng: random.Random) -> None:
    """Be there for a while, and then echo."""
    await trio.sleep(rng.uniform(0, 3))
    await echo(channel, rng)


async def pipeline(channel: Channel, rng: random.Random) -> None:
    """Many messages at once."""
    messages = [rng.randbytes(rng.randint(1, 2000)) for _ in range(100)]
    await channel.send_many(messages)
    received: list[bytes] = []
    while len(received) < len(messages):
        received += await channel.receive_many()
    assert received == messages


async def drop(channel: Channel, rng: random.Random) -> None:
    """Be gone without a goodbye, in the middle of something or not."""
    await channel.send_many([rng.randbytes(1000)] * rng.randint(1, 50))
    _reset(channel.transport_stream, rng)
    await trio.aclose_forcefully(channel)


async def deaf(channel: Channel, rng: random.Random) -> None:
    """Send and do not read, until nothing goes any more."""
    with trio.move_on_after(rng.uniform(0.5, 2)):
        for _ in range(1000):
            await channel.send(bytes(50_000))
    await drop_now(channel, rng)


async def forge(channel: Channel, rng: random.Random) -> None:
    """A record that does not open, or lies about its length."""
    length = rng.choice([0, 1, 20, 40, 100, 1 << 21, 0xFFFFFFFF])
    await channel.transport_stream.send_all(struct.pack("<I", length) + rng.randbytes(min(length, 100)))
    with suppress(trio.EndOfChannel, trio.BrokenResourceError):
        await channel.receive()
    await drop_now(channel, rng)


async def drop_now(channel: Channel, rng: random.Random) -> None:
    """Be gone."""
    _reset(channel.transport_stream, rng)
    await trio.aclose_forcefully(channel)


def _reset(stream: trio.SocketStream, rng: random.Random) -> None:
    if rng.random() < 0.5:
        stream.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, struct.pack("ii", 1, 0))


Deed = Callable[[Channel, random.Random], Awaitable[None]]
HONEST: tuple[Deed, ...] = (echo, stay, pipeline)
RUDE: tuple[Deed, ...] = (drop, deaf, forge)


# ---- the server ----


@dataclass
class Process:
    """One process of the server, and what was measured of it at each stop.

    Attributes:
        resident: MiB.
        descriptors: How many.
        threads: How many.
    """

    name: str
    pid: int
    resident: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def measure(self) -> None:
        """Once more."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        self.resident.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024)  # type: ignore[index]
        self.threads.append(int(re.search(r"Threads:\s+(\d+)", status)[1]))  # type: ignore[index]
        self.descriptors.append(len(os.listdir(f"/proc/{self.pid}/fd")))

    def latest(self) -> str:
        """The last measurement."""
        return f"{self.resident[-1]:9.1f}{self.descriptors[-1]:6}{self.threads[-1]:5}"

    def growth(self, warm_up: int) -> tuple[float, list[str]]:
        """MiB from the first quarter after the warming up to the last, and what was wrong."""
        resident = self.resident[warm_up:]
        quarter = max(1, len(resident) // 4)
        first, last = statistics.median(resident[:quarter]), statistics.median(resident[-quarter:])
        wrong = []
        if last - first > max(GROWTH, GROWTH_SHARE * first):
            wrong.append(f"{self.name}: memory has grown from {first:.1f} to {last:.1f} MiB")
        return last - first, wrong + self.held(warm_up)

    def held(self, warm_up: int) -> list[str]:
        """Which descriptors and threads it has more of in the end than it ever had in the first half."""
        wrong = []
        for what, measured in (("descriptors", self.descriptors), ("threads", self.threads)):
            numbers = measured[warm_up:]
            half = max(1, len(numbers) // 2)
            before, after = max(numbers[:half]), min(numbers[half:] or numbers)
            if after > before + SLACK_DESCRIPTORS:
                wrong.append(f"{self.name}: {what} have grown from {before} to {after}")
        return wrong


def children(pid: int) -> list[int]:
    """The processes that it has started, in the order of their numbers."""
    return sorted(int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


CONFIGURATION = """
[serve]
app = "echo"
wire = "framed"
[listen]
hosts = ["{host}"]
port = 0
[accept]
accounts = "accounts"
[limits]
handshake_timeout = "{handshake:g}s"
idle_timeout = "5s"
# Half-open connections are a good part of all here; no honest client is to be dropped at random for it.
max_unauthenticated = "1000:100:1000"
max_unauthenticated_per_source = "off"
penalty_exempt = ["{host}/32", "{exempt}.0/24"]
[workers]
workers = {workers}
[log]
log_level = "warning"
[metrics]
metrics = "{host}:{status}"
"""


class Server:
    """`triosspi serve` with a configuration of its own, and what is known of it.

    Attributes:
        process: The one that was started; the supervisor, where there are workers.
        port: Where it listens.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        account_editor.add(folder / "accounts", "DOM\\alice", PASSWORD)
        with socket.create_server((HOST, 0)) as probe:
            self._status = probe.getsockname()[1]
        configuration = folder / "triosspi.toml"
        values = {"host": HOST, "exempt": EXEMPT, "handshake": HANDSHAKE, "workers": workers, "status": self._status}
        configuration.write_text(CONFIGURATION.format(**values))
        self._log = folder / "log"
        command = [sys.executable, "-m", "triosspi", "serve", "--config", str(configuration)]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.log)
        self.port = int(re.search(r":(\d+)\s*$", line)[1])  # type: ignore[index]

    @property
    def log(self) -> str:
        """Its log so far."""
        return self._log.read_text()

    def processes(self) -> list[Process]:
        """The first one and its workers."""
        pid = self.process.pid
        # Each thread has its own children.
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        children = sorted(int(child) for task in tasks for child in task.read_text().split())
        workers = [Process(f"worker {number}", child) for number, child in enumerate(children, 1)]
        return [Process("supervisor" if workers else "server", pid), *workers]

    def stop(self) -> int:
        """As the service manager does; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    async def wait_until_empty(self) -> None:
        """Wait until it has no connection."""
        with trio.fail_after(30):
            while await self._connections():  # noqa: ASYNC110 - another process's
                await trio.sleep(0.2)

    async def _connections(self) -> float:
        async with await trio.open_tcp_stream(HOST, self._status) as stream:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            shown = b"".join([chunk async for chunk in stream]).decode()
        return sum(float(number) for number in re.findall(r"^triosspi_connections\{.*\} (\S+)$", shown, re.MULTILINE))


# ---- the clients ----


class Crowd:
    """All clients.

    Args:
        port: The server's.
        number: How many at a time.
        seed: Of all lots.

    Attributes:
        done: How often each thing was done.
        failed: What honest clients met that they must not.
    """

    def __init__(self, port: int, number: int, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self.failed: list[str] = []
        self._port = port
        self._number = number
        self._seed = seed
        self._initiator = Initiator(username="DOM\\alice", password=PASSWORD, mechanism="ntlm")
        self._go = trio.Event()
        self._busy = 0
        self._hostile: set[trio.CancelScope] = set()

    async def run(self) -> None:
        """Until cancelled; they begin with `go`."""
        async with trio.open_nursery() as nursery:
            for index in range(self._number):
                nursery.start_soon(self._client, random.Random(self._seed * 1000 + index))

    def go(self) -> None:
        """Let them loose."""
        self._go.set()

    async def hold(self) -> None:
        """Have them all go, and stay away."""
        self._go = trio.Event()
        for scope in self._hostile:
            scope.cancel()
        while self._busy:  # noqa: ASYNC110 - for a moment, and nobody measures
            await trio.sleep(0.05)

    async def _client(self, rng: random.Random) -> None:
        while True:
            await self._go.wait()
            self._busy += 1
            try:
                if rng.random() < 0.5:
                    await self._honest(rng)
                else:
                    with trio.move_on_after(DEED) as scope:
                        self._hostile.add(scope)
                        await self._misbehave(rng)
                    self._hostile.discard(scope)
            finally:
                self._busy -= 1
            # Not as fast as they can: what is to be seen is the server, and not a queue.
            await trio.sleep(rng.uniform(0, 0.1))

    async def _honest(self, rng: random.Random) -> None:
        deed = rng.choice(HONEST)
        try:
            with trio.fail_after(4 * DEED):
                stream = await trio.open_tcp_stream(HOST, self._port, local_address=HOST)
                async with SSPIChannel(stream, self._initiator) as channel:
                    await channel.do_handshake()
                    await deed(channel, rng)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is the finding
            self.failed.append(f"{deed.__name__}: {type(exc).__name__}: {exc}, {exc.__cause__}")
        self.done[deed.__name__] += 1

    async def _misbehave(self, rng: random.Random) -> None:
        network = EXEMPT if rng.random() < 0.6 else PENALISED
        source = f"{network}.{rng.randint(1, 254)}"
        # Whatever the server does to them is fine, as long as it does not hurt itself.
        with suppress(trio.BrokenResourceError, trio.EndOfChannel, AssertionError, OSError):
            stream = await trio.open_tcp_stream(HOST, self._port, local_address=source)
            async with stream:
                if rng.random() < 0.5:
                    mischief = rng.choice(MISCHIEF)
                    self.done[mischief.__name__] += 1
                    await mischief(stream, rng)
                else:
                    deed = rng.choice(RUDE)
                    self.done[deed.__name__] += 1
                    channel = SSPIChannel(stream, self._initiator)
                    await channel.do_handshake()
                    await deed(channel, rng)


# ---- the whole ----


async def soak(server: Server, minutes: float, clients: int, seed: int) -> list[str]:
    """Run it, and print; returns what was wrong."""
    interval = min(INTERVAL, minutes * 60 / 6)
    crowd = Crowd(server.port, clients, seed)
    processes = server.processes()
    print(f"{'':>8}{'':>8}" + "".join(f"{process.name:>20}" for process in processes))
    print(f"{'seconds':>8}{'deeds':>8}" + "".join(f"{'MiB':>9}{'files':>6}{'thr.':>5}" for _ in processes))
    begin, warm_up = time.monotonic(), 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(crowd.run)
        while (elapsed := time.monotonic() - begin) < minutes * 60:
            crowd.go()
            await trio.sleep(interval)
            server.process.send_signal(signal.SIGHUP)
            await crowd.hold()
            await server.wait_until_empty()
            elapsed = time.monotonic() - begin
            for process in processes:
                process.measure()
            columns = "".join(process.latest() for process in processes)
            print(f"{elapsed:8.0f}{crowd.done.total():8}{columns}", flush=True)
            if elapsed <= min(WARM_UP, minutes * 20):
                warm_up = len(processes[0].resident)
        nursery.cancel_scope.cancel()
    print(", ".join(f"{number} x {name}" for name, number in sorted(crowd.done.items())))
    wrong = crowd.failed[:10]
    for process in processes:
        growth, found = process.growth(warm_up)
        print(f"{process.name}: {growth:+.2f} MiB from the first quarter after {WARM_UP:g} s to the last")
        # What the allocator has at the beginning is no growth: too short a run does not tell.
        wrong += found if minutes * 60 > 3 * WARM_UP else process.held(warm_up)
    if [process.pid for process in server.processes()] != [process.pid for process in processes]:
        wrong.append("a worker has died")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="honest and hostile clients for minutes; the server must not grow")
    parser.add_argument("--minutes", type=float, default=10.0, help="default: 10")
    parser.add_argument("--clients", type=int, default=120, help="at a time (default: 120)")
    parser.add_argument("--workers", type=int, default=2, help="of the server (default: 2)")
    parser.add_argument("--seed", type=int, default=1, help="of all lots (default: 1)")
    options = parser.parse_args()
    print(f"machine: {machine()}")
    print(f"{versions('triosspi', 'trio')}; {options.clients} clients, {options.workers} workers, seed {options.seed}")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), options.workers)
        try:
            wrong = trio.run(soak, server, options.minutes, options.clients, options.seed)
            if status := server.stop():
                wrong.append(f"the server's exit status is {status}")
        finally:
            server.process.kill()
        # Errors, and what it held against honest clients.
        wrong += [
            line for line in server.log.splitlines() if re.search(rf" ERROR | CRITICAL |Traceback|\b{HOST}:", line)
        ]
    for line in wrong:
        print(f"WRONG: {line}")
    print("nothing wrong" if not wrong else "see above")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
