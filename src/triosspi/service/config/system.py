"""What the system lets this program have: processor cores, descriptors, connections that wait."""

# The soft limit on descriptors is 1,024 on most systems for the sake of programs that use select(2), which knows no more. Trio
# does not. What a handler starts inherits the limit.

from __future__ import annotations

import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

if sys.platform != "win32":
    import resource

# macOS has no hard limit, and takes no soft one that is greater (OPEN_MAX).
_OPEN_MAX: Final = 10240
_SOMAXCONN: Final = Path("/proc/sys/net/core/somaxconn")


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


def raise_descriptor_limit() -> None:
    """Let this process, and what it starts, open as many files as it may."""
    if sys.platform == "win32":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (hard, _OPEN_MAX):
        if soft == resource.RLIM_INFINITY or (limit != resource.RLIM_INFINITY and limit <= soft):
            return
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return


def descriptor_limit(*, hard: bool = False) -> int | None:
    """How many files this process may open, or could let itself open; None where there is no limit."""
    if sys.platform == "win32":
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[hard]
    return None if limit == resource.RLIM_INFINITY else limit


def longest_backlog() -> int | None:
    """How many connections the kernel lets wait at one socket; None where it does not say."""
    try:
        return int(_SOMAXCONN.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
