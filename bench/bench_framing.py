"""The compiled framing against its pure-Python reference (tests/framing_oracle.py), side by side.

    python bench/bench_framing.py [--quick]

Every number is nanoseconds per frame: the median of interleaved repeats, and in brackets their spread (half the distance
between the quartiles, as a share of the median). `ratio` is reference / compiled.

To see where the compiled module spends its time, build it with symbols and profile it (Linux, `perf`):

    CFLAGS='-O2 -g' python setup.py build_ext --inplace --force
    perf record --call-graph dwarf python bench/bench_framing.py --only compiled && perf report
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from measure import describe, interleaved, machine, versions
from triosspi import _framing as compiled

FRAMES = 1_000  # to a read
SIZES = (16, 64, 256, 1024, 16384)
LIMIT = 1 << 20
TCP_SEGMENT = 1460  # what arrives when nothing coalesces


def load_oracle() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "tests" / "framing_oracle.py"
    spec = importlib.util.spec_from_file_location("framing_oracle", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def scan(module: ModuleType, pieces: Sequence[bytes], frames: int) -> Callable[[], None]:
    """Feed each piece and take what is complete, as a channel does after each read."""

    def run() -> None:
        scanner = module.FrameScanner(LIMIT)
        count = 0
        for piece in pieces:
            scanner.feed(piece)
            count += len(scanner.frames())
        assert count == frames

    return run


def scan_singly(module: ModuleType, data: bytes, frames: int) -> Callable[[], None]:
    """Take the frames one by one, as `receive()` does."""

    def run() -> None:
        scanner = module.FrameScanner(LIMIT)
        scanner.feed(data)
        next_frame = scanner.next_frame
        for _ in range(frames):
            next_frame()

    return run


def pack(module: ModuleType, records: Sequence[tuple[bytes, bytes]]) -> Callable[[], None]:
    def run() -> None:
        module.pack_framed_records(records)

    return run


def split(module: ModuleType, record: bytes, times: int) -> Callable[[], None]:
    def run() -> None:
        split_record = module.split_record
        for _ in range(times):
            split_record(record)

    return run


def workloads(module: ModuleType, size: int) -> dict[str, Callable[[], None]]:
    payload = os.urandom(size)
    trailer, data = payload[:16], payload[16:]
    whole = compiled.pack_frame(payload) * FRAMES
    return {
        f"scan, {FRAMES} frames to a read": scan(module, [whole], FRAMES),
        f"scan, in pieces of {TCP_SEGMENT}": scan(module, cut(whole, TCP_SEGMENT), FRAMES),
        # Each piece is one frame long and begins in the middle of one: every frame straddles.
        "scan, every frame straddling": scan(module, [whole[: size // 2], *cut(whole[size // 2 :], size + 4)], FRAMES),
        "scan, header and payload apart": scan(module, [whole[:4], payload] * FRAMES, FRAMES),
        f"next_frame, {FRAMES} to a read": scan_singly(module, whole, FRAMES),
        f"pack_framed_records of {FRAMES}": pack(module, [(trailer, data)] * FRAMES),
        "split_record": split(module, compiled.pack_record(trailer, data), FRAMES),
    }


def time_once(run: Callable[[], None], loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        run()
    return (time.perf_counter() - start) / loops / FRAMES * 1e9


def loops_for(run: Callable[[], None], seconds: float) -> int:
    run()  # warm
    return max(1, int(seconds / (time_once(run, 1) * FRAMES / 1e9)))


def main() -> None:
    parser = argparse.ArgumentParser(description="the compiled framing against its pure-Python reference")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, shorter repeats")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats, at least 5 (default: 7)")
    parser.add_argument("--only", choices=["compiled", "oracle"], help="run one of the two, for a profiler")
    options = parser.parse_args()
    repeats = max(5, options.repeats)
    seconds = 0.01 if options.quick else 0.03  # of one repeat of one workload
    sizes = (64, 1024) if options.quick else SIZES

    oracle = load_oracle()
    modules = {"oracle": oracle, "compiled": compiled}
    if options.only:
        modules = {options.only: modules[options.only]}

    print(f"machine: {machine()}")
    print(f"{versions('triosspi')}, extension {Path(str(compiled.__file__)).name}; {repeats} interleaved repeats")
    print(f"\n{'ns per frame':34}{'bytes':>6}" + "".join(f"{name:>17}" for name in modules) + f"{'ratio':>8}")
    for size in sizes:
        runs = {name: workloads(module, size) for name, module in modules.items()}
        for workload in next(iter(runs.values())):
            loops = {name: loops_for(runs[name][workload], seconds) for name in modules}
            samples = interleaved(
                {name: partial(time_once, runs[name][workload], loops[name]) for name in modules}, repeats
            )
            line = f"{workload:34}{size:6}" + "".join(f"{describe(samples[name]):>17}" for name in modules)
            if len(modules) == 2:
                line += f"{statistics.median(samples['oracle']) / statistics.median(samples['compiled']):8.1f}"
            print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
