"""What hostile clients cost honest ones: the time of a login and one echo, quiet and among 200 hostile clients.

    python bench/bench_crowd.py [--quick]

The hostile ones are half-open, resetting, trickling, lying about lengths, raving, guessing passwords, leaving (see
tests/crowd.py). Quiet and crowded runs alternate against one server; medians of the repeats.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import trio

from measure import machine, versions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from crowd import honest_crowd, hostile_crowd, serve

HOSTILE = 200


async def measure(port: int, logins: int, repeats: int) -> dict[str, list[tuple[float, float]]]:
    samples: dict[str, list[tuple[float, float]]] = {"quiet": [], "crowded": []}
    await honest_crowd(port, 50, at_once=10)
    for _ in range(repeats):
        crowd = await honest_crowd(port, logins, at_once=10)
        samples["quiet"].append((crowd.percentile(0.5), crowd.percentile(0.99)))
        async with hostile_crowd(port, HOSTILE):
            await trio.sleep(1.0)
            crowd = await honest_crowd(port, logins, at_once=10)
        samples["crowded"].append((crowd.percentile(0.5), crowd.percentile(0.99)))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description="honest logins among hostile clients")
    parser.add_argument("--quick", action="store_true", help="fewer logins")
    parser.add_argument("--repeats", type=int, default=5, help="at least 5 (default: 5)")
    options = parser.parse_args()
    repeats = max(5, options.repeats)
    logins = 200 if options.quick else 1_000
    print(f"machine: {machine()}")
    print(
        f"{versions('triosspi', 'trio')}; {repeats} repeats of {logins} logins, 10 at once, {HOSTILE} hostile clients"
    )
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder), Path(folder) / "log") as server:
        samples = trio.run(measure, server.port, logins, repeats)
        print(f"\n{'ms for login and echo':24}{'p50':>10}{'p99':>10}")
        medians = {}
        for name, pairs in samples.items():
            medians[name] = [statistics.median(column) * 1e3 for column in zip(*pairs, strict=True)]
            print(f"{name:24}{medians[name][0]:10.1f}{medians[name][1]:10.1f}")
        ratios = [crowded / quiet for crowded, quiet in zip(medians["crowded"], medians["quiet"], strict=True)]
        print(f"{'ratio':24}{ratios[0]:10.2f}{ratios[1]:10.2f}")


if __name__ == "__main__":
    sys.exit(main())
