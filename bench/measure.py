"""What every benchmark here needs: the machine's name, repeats with their spread, a fair order."""

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path


def machine() -> str:
    """The processor, how many of it, and the system."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}"


def versions(*packages: str) -> str:
    """Python and the named packages."""
    return ", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])


def describe(samples: Sequence[float]) -> str:
    """The median and in brackets the spread: half the distance between the quartiles, as a share of it."""
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4)
    return f"{median:10.1f} [{(high - low) / 2 / median:4.0%}]"


def interleaved(runs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Samples of each run, taken in turns: what slows the machine for a while slows them all."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            samples[name].append(run())
    return samples
