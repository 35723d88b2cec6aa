"""Echo: what a message costs each server, and how many it echoes per second. Ours beside plain Trio, TLS, asyncio, C.

    python bench/bench_echo.py [--quick]

64 connections, 1 or 16 messages outstanding on each; servers on one core, the load on another (README.md beside this
file says how to read it). All servers run at once and are measured in turns; a ratio is that of the same repeat.

To see where our server spends its time, start one and a load, and look:

    triosspi serve echo --wire framed --port 2000 --accounts accounts &
    BENCH_PASSWORD=... python bench/load.py --port 2000 --wire ntlm --seconds 20 &
    py-spy record --native --duration 10 -o echo.svg --pid $!      # or: perf record -g --pid ...
"""

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from baselines import servers
from baselines.servers import Kind, Load
from measure import versions
from report import Advance, Figure, Goal, Outcome, columns_of, run_alone

CONNECTIONS = 64
#: Messages outstanding on each connection, and bytes of a message.
CASES = ((1, 32), (1, 1024), (1, 16384), (16, 32), (16, 1024), (16, 16384))
QUICK_CASES = ((1, 32), (16, 32), (16, 1024), (16, 16384))

CPU = "server CPU, us per message"
RATE = "messages per second"
P50, P99 = "p50, ms", "p99, ms"
SERVER_SHARE, LOAD_SHARE = "the server's share of its core", "the load's share of its core (at 1 it was the limit)"

NTLM, KERBEROS = servers.OURS_NTLM, servers.OURS_KERBEROS
GOALS: list[tuple[str, Kind, Kind, tuple[int, int], Literal["at most", "at least"], float]] = [
    (CPU, NTLM, servers.PLAIN, (1, 32), "at most", 1.2),
    (CPU, KERBEROS, servers.PLAIN, (1, 32), "at most", 1.2),
    (CPU, NTLM, servers.PLAIN, (16, 32), "at most", 1.9),
    (CPU, NTLM, servers.PLAIN, (16, 1024), "at most", 3.8),
    (CPU, KERBEROS, servers.C_KERBEROS, (16, 32), "at most", 0.95),
    (CPU, KERBEROS, servers.C_KERBEROS, (16, 1024), "at most", 0.5),
    (CPU, KERBEROS, servers.C_KERBEROS, (16, 16384), "at most", 0.45),
    (RATE, NTLM, servers.ASYNCIO_NTLM, (16, 32), "at least", 9),
    (RATE, NTLM, servers.ASYNCIO_NTLM, (16, 1024), "at least", 4),
    (RATE, KERBEROS, servers.ASYNCIO_KERBEROS, (16, 32), "at least", 9),
    (RATE, KERBEROS, servers.ASYNCIO_KERBEROS, (16, 1024), "at least", 4),
    (CPU, NTLM, servers.TLS, (1, 32), "at most", 0.65),
    (CPU, KERBEROS, servers.TLS, (1, 32), "at most", 0.65),
    (CPU, NTLM, servers.TLS, (16, 1024), "at most", 1.35),
    (CPU, KERBEROS, servers.TLS, (16, 1024), "at most", 1.2),
]


def case_name(window: int, size: int) -> str:
    """A column's head."""
    return f"{window} x {size} B" if size < 1024 else f"{window} x {size // 1024} KiB"


def one_run(load: Load, window: int, size: int, seconds: float) -> dict[str, float]:
    """A run's figures by their names."""
    run = load.run(size, window, seconds)
    return {
        CPU: run["server_cpu"] / run["messages"] * 1e6,
        RATE: run["messages"] / run["seconds"],
        P50: run["p50"] * 1e3,
        P99: run["p99"] * 1e3,
        SERVER_SHARE: run["server_cpu"] / run["seconds"],
        LOAD_SHARE: run["load_cpu"] / run["seconds"],
    }


def steps(quick: bool, repeats: int) -> int:
    """How often `measure` advances."""
    return len(servers.KINDS) * (1 + repeats * len(QUICK_CASES if quick else CASES))


def measure(quick: bool, repeats: int, advance: Advance) -> Outcome:
    """Run it all."""
    cases = QUICK_CASES if quick else CASES
    seconds = 0.3 if quick else 1.0
    samples: dict[tuple[str, str], list[dict[str, float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        where = stack.enter_context(servers.setting(folder))
        loads: dict[str, Load] = {}
        for kind in where.available():
            server = stack.enter_context(servers.serve(kind, where))
            # A first client comes and goes: an asyncio server that has had none is slower by half.
            with servers.load(server, where, 4, verify=True) as load:
                for window, size in cases:
                    load.run(size, window, 0.05)
            loads[kind.name] = stack.enter_context(servers.load(server, where, CONNECTIONS))
            advance(f"{kind.name}: logins")
        for window, size in cases:
            case = case_name(window, size)
            for load in loads.values():
                load.run(size, window, 0.1)
            for _ in range(repeats):
                for name, load in loads.items():
                    samples.setdefault((name, case), []).append(one_run(load, window, size, seconds))
                    advance(f"{name}, {case}")
        sealing = next(iter(loads.values())).sealing
    outcome = Outcome(
        f"{versions('triosspi', 'trio', 'pyspnego')}; {CONNECTIONS} connections, {repeats} interleaved repeats of "
        f"{seconds:g} s; messages outstanding x bytes; median [spread]; the load seals by {sealing}"
    )
    for (name, case), repeated in samples.items():
        for unit, figure in columns_of(repeated).items():
            outcome.figures.setdefault(unit, {}).setdefault(name, {})[case] = figure
    outcome.goals = goals(outcome.figures)
    return outcome


def goals(figures: dict[str, dict[str, dict[str, Figure]]]) -> list[Goal]:
    """The ratios to named baselines, where both were measured."""
    found = []
    for unit, ours, other, (window, size), side, limit in GOALS:
        case = case_name(window, size)
        mine, its = (figures[unit].get(kind.name, {}) for kind in (ours, other))
        if case in mine and case in its:
            what = f"{case}: {'CPU' if unit == CPU else 'messages/s'} of {ours.name} to {other.name}"
            found.append(Goal(what, mine[case].ratio_to(its[case]), limit, side))
    return found


def main() -> None:
    run_alone("what an echoed message costs each server", steps, measure)


if __name__ == "__main__":
    sys.exit(main())
