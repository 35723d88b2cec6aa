"""How many processor cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """The cores that the scheduler gives this process, at least 1.

    A container or a unit with ``CPUQuota=`` sees all cores of the machine and may use the time of a few: as
    many processes as cores would then stop each other, so Linux's control groups (version 2) are asked too.

    Args:
      root: where ``proc`` and ``sys`` are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota(root)))


def _quota(root: Path) -> int:
    """Cores' worth of time, rounded up, that the control groups allow; more than there are where they set no limit."""
    unlimited = 2**31
    try:
        own = (root / "proc/self/cgroup").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return unlimited
    # "0::/system.slice/triosspi.service"; other numbers are version 1's.
    names = [line.removeprefix("0::") for line in own.splitlines() if line.startswith("0::/")]
    if not names or ".." in names[0]:
        return unlimited
    group = (root / "sys/fs/cgroup" / names[0].lstrip("/")).absolute()
    top = (root / "sys/fs/cgroup").absolute()
    found = unlimited
    for directory in (group, *group.parents):
        found = min(found, _cores_of(directory / "cpu.max", unlimited))
        if directory == top:
            break
    return found


def _cores_of(file: Path, unlimited: int) -> int:
    try:
        # Microseconds of each period, or "max".
        quota, period = file.read_text(encoding="ascii").split()
        return unlimited if quota == "max" else math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return unlimited
