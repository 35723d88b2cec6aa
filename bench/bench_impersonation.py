"""What it costs to be somebody else for a moment, beside the worker thread that it takes anyway. As root, on Linux.

    python bench/bench_impersonation.py [--quick]

A function that does nothing is run by `trio.to_thread.run_sync` alone, by that in a thread of its own beside Trio's, and by
`Impersonation.run_as`, which does the same, as an account in one group and in 32: one call after the other, and 16 at once.
"alone, no thread" is the switch and the way back themselves.
Microseconds per call: the median of interleaved repeats, and in brackets their spread (half the distance between the
quartiles, as a share of the median); first by the clock, then the process's CPU time. `more` is the CPU time above the
thread's own, a median of differences between neighbours.

    perf record -g python bench/bench_impersonation.py --quick && perf report     # where the kernel spends it
"""

import argparse
import statistics
import sys
import threading
import time
from functools import partial

import trio

from measure import describe, interleaved, machine, versions
from triosspi import ConfigurationError, LocalAccount, _server_threads
from triosspi.impersonation import linux, own_thread

# Nobody need have these ids: the kernel does not ask.
ACCOUNTS = {
    "in 1 group": LocalAccount("somebody", 40_000, 40_000, (40_000,)),
    "in 32 groups": LocalAccount("somebody", 40_000, 40_000, tuple(range(40_000, 40_032))),
}
AT_ONCE = 16


def nothing():
    pass


def in_thread():
    return trio.to_thread.run_sync(nothing)


def in_own_thread():
    return trio.to_thread.run_sync(own_thread.call, nothing)


def as_account(account):
    # As `Impersonation.run_as` does; that wants a map of accounts first.
    return _server_threads.run_sync(own_thread.call, linux.run_as, account, nothing, ())


async def repeat(call, tasks, calls):
    async def some():
        for _ in range(calls // tasks):
            await call()

    async with trio.open_nursery() as nursery:
        for _ in range(tasks):
            nursery.start_soon(some)


def clocks(run, calls):
    """Microseconds per call: by the clock, and CPU time of the whole process."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return (time.perf_counter() - wall) / calls * 1e6, (time.process_time() - cpu) / calls * 1e6


def with_threads(call, tasks, calls):
    return clocks(partial(trio.run, repeat, call, tasks, calls), calls)


def without_threads(account, calls):
    """In a thread of its own, since the main one is nobody else's."""
    found = []

    def work():
        found.append(clocks(lambda: [linux.run_as(account, nothing, ()) for _ in range(calls)], calls))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def show(name, samples, baseline=None):
    wall, cpu = ([sample[column] for sample in samples] for column in range(2))
    line = f"{name:38}{describe(wall):>17}{describe(cpu):>17}"
    if baseline is not None:
        more = statistics.median(mine[1] - theirs[1] for mine, theirs in zip(samples, baseline, strict=True))
        line += f"{more:8.1f}"
    print(line, flush=True)


def main():
    parser = argparse.ArgumentParser(description="a switch and back beside a worker thread")
    parser.add_argument("--quick", action="store_true", help="shorter repeats")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats, at least 5 (default: 7)")
    options = parser.parse_args()
    repeats, calls = max(5, options.repeats), 1_600 if options.quick else 8_000
    print(f"machine: {machine()}")
    try:
        linux.check_privileges()
        linux.remember_server()
        _server_threads.ask_first(linux.check_thread)
    except ConfigurationError as exc:
        print(f"not measured: {exc}")
        return 0
    print(f"{versions('triosspi', 'trio')}; {repeats} interleaved repeats of {calls} calls")
    print(f"\n{'us per call':38}{'clock':>17}{'CPU':>17}{'more':>8}")
    for tasks, when in ((1, "one after the other"), (AT_ONCE, f"{AT_ONCE} at once")):
        runs = {
            "trio.to_thread.run_sync": partial(with_threads, in_thread, tasks, calls),
            "in a thread of its own": partial(with_threads, in_own_thread, tasks, calls),
        }
        for name, account in ACCOUNTS.items():
            runs[f"as an account {name}"] = partial(with_threads, partial(as_account, account), tasks, calls)
        for run in runs.values():
            run()  # warm
        samples = interleaved(runs, repeats)
        baseline = samples.pop("trio.to_thread.run_sync")
        show(f"trio.to_thread.run_sync, {when}", baseline)
        for name, values in samples.items():
            show(f"  {name}", values, baseline)
    runs = {name: partial(without_threads, account, calls) for name, account in ACCOUNTS.items()}
    for name, values in interleaved(runs, repeats).items():
        show(f"alone, no thread, {name}", values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
