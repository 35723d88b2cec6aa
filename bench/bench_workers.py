"""What a second worker brings: logins per second with 1 and 2 processes, and how evenly connections come to them.

    python bench/bench_workers.py [--quick]

Logins are NTLM's, each a connection of its own with the sample's one message behind it. There are two servers: one process, and
two workers, which accept from one socket; they are measured in turns.

Where two cores are free for two workers, logins per second are what is asked for. This machine may have two cores, and the load
needs a part of them. So there are three answers:

- *all cores*: workers and load take what they get. The load's part is in the table; it is missing to the second worker.
- *half a core each*: the workers have the first core, one worker shares it with a process that only wants the other half. So two
  workers have twice of what one has, and the load has a core of its own. (From four cores on: a core for each worker.)
- *by CPU per login*: what two cores would do if both were the workers', as the CPU for a login says.

Where the time of a worker goes: `py-spy top --pid` of one of `triosspi serve`'s children.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from baselines.servers import BENCH, CORES, PASSWORD
from load import cpu_of
from measure import versions
from report import Advance, Figure, Goal, Outcome, run_alone
from triosspi.service import account_editor

AT_ONCE = 64
CONNECTIONS = 1_000
BURST = 100
ENOUGH_CORES = 4
ONE, TWO = "1 worker", "2 workers"
OPTIONS = {ONE: ("--workers", "1"), TWO: ("--workers", "2")}
ALL_CORES = "all cores"
APART = "a core each" if len(CORES) >= ENOUGH_CORES else "half a core each"
BY_CPU = "by CPU per login"
RATE, CPU, SERVER, LOAD = "logins/s", "server's CPU, us per login", "cores of the server", "cores of the load"
RATIO = "logins per second, to 1 worker"
BALANCE = f"of {CONNECTIONS:,} connections, how many the busier worker got"
LATENCY = "ms for a login, at half of what 2 workers can"
HOG = "while True: pass"


class Server:
    """A running server, its workers, and the load on it."""

    def __init__(self, process: "subprocess.Popen[str]", load: "subprocess.Popen[str]") -> None:
        self.parent = process.pid
        children = [
            int(child)
            for task in Path(f"/proc/{process.pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
        self.workers = children or [process.pid]
        self._load = load

    def pin(self, cores: Sequence[set[int]], load: set[int]) -> None:
        """Bind each worker to cores, and the load."""
        for index, worker in enumerate(self.workers):
            for thread in os.listdir(f"/proc/{worker}/task"):
                os.sched_setaffinity(int(thread), cores[index % len(cores)])
        os.sched_setaffinity(self._load.pid, load)

    def cpu(self) -> float:
        """Seconds of CPU so far, of all its processes."""
        return sum(cpu_of(pid) for pid in {self.parent, *self.workers})

    def ask(self, **command: Any) -> Any:
        """Let the load do something; see `bench/logins.py`."""
        assert self._load.stdin is not None
        assert self._load.stdout is not None
        self._load.stdin.write(json.dumps(command) + "\n")
        self._load.stdin.flush()
        line = self._load.stdout.readline()
        if not line:
            raise RuntimeError("the load has failed; its reason stands above")
        return json.loads(line)

    def run(self, seconds: float, rate: float = 0.0) -> dict[str, float]:
        """One run: the load's figures, and the server's."""
        before = self.cpu()
        answer = self.ask(at_once=AT_ONCE, seconds=seconds, rate=rate)
        used = self.cpu() - before
        return {
            RATE: answer["logins"] / answer["seconds"],
            CPU: used / answer["all"] * 1e6,
            SERVER: used / answer["all_seconds"],
            LOAD: answer["load_cpu"] / answer["seconds"],
            "p50": answer["p50"] * 1e3,
            "p99": answer["p99"] * 1e3,
        }

    def descriptors(self) -> list[int]:
        """How many each worker has."""
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in self.workers]

    def busier(self, at_once: int) -> float:
        """Of `CONNECTIONS`, how many the busier worker has got."""
        before = self._idle()
        self.ask(number=CONNECTIONS, at_once=at_once)
        got = [now - then for now, then in zip(self.descriptors(), before, strict=True)]
        self.ask()
        return max(got)

    def _idle(self) -> list[int]:
        """The same, once those who have left are seen to have left."""
        before = self.descriptors()
        while True:
            time.sleep(0.1)
            now = self.descriptors()
            if now == before:
                return now
            before = now


@contextmanager
def serve(folder: Path, name: str) -> Iterator[Server]:
    """Run a server and its load."""
    command = [
        sys.executable,
        "-m",
        "triosspi",
        "serve",
        "greet",
        "--wire",
        "sample",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    command += ["--accounts", str(folder / "accounts"), *OPTIONS[name]]
    # All come from one address, and 1,000 at once that never log in.
    command += ["--max-unauthenticated", "5000", "--max-unauthenticated-per-source", "off", "--no-penalties"]
    environment = {**os.environ, "PYTHONPATH": str(BENCH), "BENCH_PASSWORD": PASSWORD}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, **pipes) as process:
        try:
            assert process.stdout is not None
            port = re.search(r":(\d+)\s*$", process.stdout.readline())
            if port is None:
                raise RuntimeError(f"it has not started: {' '.join(command)}")
            load = [sys.executable, str(BENCH / "logins.py"), "--port", port[1]]
            with subprocess.Popen(load, stdin=subprocess.PIPE, **pipes) as loading:
                yield Server(process, loading)
                assert loading.stdin is not None
                loading.stdin.close()
        finally:
            process.terminate()


@contextmanager
def hog(core: set[int]) -> Iterator[None]:
    """A process that takes its share of a core."""
    with subprocess.Popen([sys.executable, "-c", HOG]) as process:
        os.sched_setaffinity(process.pid, core)
        try:
            yield
        finally:
            process.kill()


def run_apart(server: Server, seconds: float) -> dict[str, float]:
    """Workers that have equal shares, and a load that takes nothing of theirs."""
    cores = [{core} for core in CORES]
    with ExitStack() as stack:
        if len(CORES) >= ENOUGH_CORES:
            server.pin(cores[:2], set(CORES[2:]))
        else:
            server.pin(cores[:1], cores[-1])
            if len(server.workers) == 1:
                stack.enter_context(hog(cores[0]))
        return server.run(seconds)


def run_on_all(server: Server, seconds: float, rate: float = 0.0) -> dict[str, float]:
    """The scheduler decides."""
    server.pin([set(CORES)], set(CORES))
    return server.run(seconds, rate)


def steps(quick: bool, repeats: int) -> int:
    """How often `measure` advances."""
    del quick
    return len(OPTIONS) + repeats * (2 * len(OPTIONS) + 2)


Samples = dict[str, dict[str, list[dict[str, float]]]]


def measure(quick: bool, repeats: int, advance: Advance) -> Outcome:
    """Run it all."""
    seconds = 1.0 if quick else 3.0
    outcome = Outcome(
        f"{versions('triosspi', 'trio', 'pyspnego')}; {repeats} repeats of {seconds:g} s in turns, {AT_ONCE} clients at once; "
        f"{len(CORES)} cores; median [spread]"
    )
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    busy: Samples = {name: {ALL_CORES: [], APART: []} for name in OPTIONS}
    calm: list[dict[str, float]] = []
    balance: dict[str, list[float]] = {"one by one": [], f"{BURST} at once": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        account_editor.add(Path(folder) / "accounts", "DOM\\alice", PASSWORD)
        servers = {name: stack.enter_context(serve(Path(folder), name)) for name in OPTIONS}
        rates = {}
        for name, server in servers.items():
            rates[name] = run_on_all(server, seconds)[RATE]
            advance(f"{name}, warming up")
        for _ in range(repeats):
            for name, server in servers.items():
                busy[name][ALL_CORES].append(run_on_all(server, seconds))
                advance(f"{name}, {ALL_CORES}")
                busy[name][APART].append(run_apart(server, seconds))
                advance(f"{name}, {APART}")
            calm.append(run_on_all(servers[TWO], seconds, rates[TWO] / 2))
            advance(f"{TWO}, at half of the rate")
            for how, at_once in zip(balance, (1, BURST), strict=True):
                balance[how].append(servers[TWO].busier(at_once))
            advance(f"{TWO}, balance")
    tell(outcome, busy, calm, balance)
    return outcome


def tell(outcome: Outcome, busy: Samples, calm: list[dict[str, float]], balance: dict[str, list[float]]) -> None:
    """Make tables and goals of samples."""

    def figure(name: str, where: str, what: str) -> Figure:
        return Figure(tuple(sample[what] for sample in busy[name][where]))

    for where in (ALL_CORES, APART):
        outcome.figures[f"logins, {where}"] = {
            name: {what: figure(name, where, what) for what in (RATE, CPU, SERVER, LOAD)} for name in OPTIONS
        }
    ratios = {where: figure(TWO, where, RATE).ratio_to(figure(ONE, where, RATE)) for where in (ALL_CORES, APART)}
    by_cpu = figure(ONE, ALL_CORES, CPU).ratio_to(figure(TWO, ALL_CORES, CPU))
    ratios[BY_CPU] = Figure(tuple(2 * ratio for ratio in by_cpu.samples))
    outcome.figures[RATIO] = {TWO: ratios}
    outcome.figures[LATENCY] = {TWO: {what: Figure(tuple(sample[what] for sample in calm)) for what in ("p50", "p99")}}
    outcome.figures[BALANCE] = {TWO: {how: Figure(tuple(values)) for how, values in balance.items()}}
    for where in (APART, BY_CPU):
        outcome.goals.append(Goal(f"{TWO}, {where}: logins per second, to 1 worker", ratios[where], 1.8, "at least"))


def main() -> None:
    run_alone("what a second worker brings", steps, measure)


if __name__ == "__main__":
    sys.exit(main())
