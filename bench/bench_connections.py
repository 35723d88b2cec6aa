"""Idle connections: the memory of each, and what 9,000 of them do to 100 busy ones. Ours beside Trio, TLS, asyncio, C.

    python bench/bench_connections.py [--quick]

Memory is what the server's resident set grows by, divided by the connections: each logged in, one message echoed, then
idle; before them some others have come and gone. Every repeat has a server of its own.

Latency is that of 100 connections which send a message of 32 bytes, wait for its reply and send the next. There are two
servers, one with nothing else and one with the idle connections; they are measured in turns.

To see what an idle connection of ours consists of, run the server under `memray run --native` or look at
`gc.get_objects()` from an application of your own (`triosspi serve module:function`).
"""

import resource
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from baselines import servers
from baselines.servers import Kind, Setting
from measure import versions
from report import Advance, Figure, Goal, Outcome, run_alone

SIZE = 32
BUSY = 100
WARM = 50
MEMORY = "KiB of the server's memory per idle connection"
LATENCY = "p99 of the busy, ms"
ALONE, RATIO = "alone", "ratio"

MEMORY_KINDS = (
    servers.PLAIN,
    servers.TLS,
    servers.ASYNCIO_NTLM,
    servers.ASYNCIO_KERBEROS,
    servers.C_KERBEROS,
    servers.OURS_NTLM,
    servers.OURS_KERBEROS,
)
CROWD_KINDS = (servers.PLAIN, servers.OURS_NTLM, servers.OURS_KERBEROS)
GOALS: list[tuple[Kind, str, str, Literal["at most", "at least"], float]] = [
    (servers.OURS_NTLM, MEMORY, "KiB", "at most", 11),
    (servers.OURS_KERBEROS, MEMORY, "KiB", "at most", 10),
    (servers.OURS_NTLM, LATENCY, RATIO, "at most", 1.3),
    (servers.OURS_KERBEROS, LATENCY, RATIO, "at most", 1.3),
]


def idle_number(quick: bool) -> int:
    """How many idle connections to measure the memory with."""
    return 500 if quick else 2000


def crowd_number(quick: bool) -> int:
    """How many beside the busy ones: as many as there may be files."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(1000 if quick else 9000, files - 2 * BUSY)


def memory(kind: Kind, where: Setting, number: int) -> float:
    """KiB per idle connection."""
    with servers.serve(kind, where) as server:
        with servers.load(server, where, WARM) as load:
            load.run(SIZE, 1, 0)
        time.sleep(0.1)
        before = server.resident()
        with servers.load(server, where, number) as load:
            load.run(SIZE, 1, 0)
            time.sleep(0.1)
            return (server.resident() - before) / number / 1024


def latencies(kind: Kind, where: Setting, crowd: int, seconds: float, repeats: int) -> dict[str, Figure]:
    """p99 of the busy ones alone and beside the crowd, and the ratio."""
    with ExitStack() as stack:
        quiet, crowded = (stack.enter_context(servers.serve(kind, where)) for _ in range(2))
        stack.enter_context(servers.load(crowded, where, crowd)).run(SIZE, 1, 0)
        runs = {
            name: stack.enter_context(servers.load(server, where, BUSY)).run
            for name, server in ((ALONE, quiet), (f"beside {crowd:,} idle", crowded))
        }
        for run in runs.values():
            run(SIZE, 1, 0.3)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                samples[name].append(run(SIZE, 1, seconds)["p99"] * 1e3)
    alone, beside = (Figure(tuple(values)) for values in samples.values())
    return {**dict(zip(samples, (alone, beside), strict=True)), RATIO: beside.ratio_to(alone)}


def steps(quick: bool, repeats: int) -> int:
    """How often `measure` advances."""
    del quick
    return len(MEMORY_KINDS) * repeats + len(CROWD_KINDS)


def measure(quick: bool, repeats: int, advance: Advance) -> Outcome:
    """Run it all."""
    idle, crowd = idle_number(quick), crowd_number(quick)
    seconds = 0.5 if quick else 2.0
    outcome = Outcome(
        f"{versions('triosspi', 'trio', 'pyspnego')}; {repeats} repeats, memory with {idle:,} connections, latency with "
        f"{BUSY} busy ones; median [spread]"
    )
    with tempfile.TemporaryDirectory() as folder, servers.setting(Path(folder)) as where:
        samples: dict[str, list[float]] = {}
        for _ in range(repeats):
            for kind in where.available(MEMORY_KINDS):
                samples.setdefault(kind.name, []).append(memory(kind, where, idle))
                advance(f"memory, {kind.name}")
        outcome.figures[MEMORY] = {name: {"KiB": Figure(tuple(values))} for name, values in samples.items()}
        outcome.figures[LATENCY] = {}
        for kind in where.available(CROWD_KINDS):
            outcome.figures[LATENCY][kind.name] = latencies(kind, where, crowd, seconds, repeats)
            advance(f"latency, {kind.name}")
    for kind, unit, column, side, limit in GOALS:
        if kind.name in outcome.figures[unit]:
            what = f"{kind.name}: {unit}" if unit == MEMORY else f"{kind.name}: p99 beside {crowd:,} idle to alone"
            outcome.goals.append(Goal(what, outcome.figures[unit][kind.name][column], limit, side))
    return outcome


def main() -> None:
    run_alone("what idle connections cost", steps, measure)


if __name__ == "__main__":
    sys.exit(main())
