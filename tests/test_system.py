"""What the system lets a server have: processor cores, and descriptors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from triosspi.service.config import system
from triosspi.service.config.system import descriptor_limit, raise_descriptor_limit, usable_cores

if sys.platform == "win32":
    pytest.skip("Windows has no limit on descriptors", allow_module_level=True)

import resource


def place_group(root: Path, group: str, **limits: str) -> None:
    """Control groups under a made-up root: what each level's cpu.max says."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"1:name=systemd:/old\n0::{group}\n")
    for name, limit in limits.items():
        directory = root / "sys/fs/cgroup" / name.replace("_", "/")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cpu.max").write_text(limit)


@pytest.mark.parametrize(
    ("group", "limits", "expected"),
    [
        ("/a/b", {}, 8),
        ("/a/b", {"a_b": "max 100000"}, 8),
        ("/a/b", {"a_b": "150000 100000\n"}, 2),
        ("/a/b", {"a_b": "max 100000", "a": "300000 100000"}, 3),
        ("/a/b", {"a_b": "1000 100000"}, 1),
        ("/a/b", {"a_b": "1600000 100000"}, 8),
        ("/a/b", {"a_b": "rubbish"}, 8),
        ("/a/b", {"a_b": "1 0"}, 8),
        # A container's own group, and one from outside of its view.
        ("/", {"": "200000 100000"}, 2),
        ("/../../x", {"x": "100000 100000"}, 8),
    ],
)
def test_a_process_has_no_more_cores_than_its_control_groups_give_it_time(
    group: str, limits: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system.os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    place_group(tmp_path, group, **limits)
    assert usable_cores(tmp_path) == expected


def test_without_control_groups_the_scheduler_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system.os, "sched_getaffinity", lambda _pid: {1, 5}, raising=False)
    assert usable_cores(tmp_path) == 2
    monkeypatch.delattr(system.os, "sched_getaffinity")
    monkeypatch.setattr(system.os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path) == 1


# Descriptors


@pytest.mark.parametrize(
    ("limits", "refused", "expected"),
    [
        ((1024, 4096), [], (4096, 4096)),
        ((4096, 4096), [], (4096, 4096)),
        ((256, resource.RLIM_INFINITY), [], (resource.RLIM_INFINITY, resource.RLIM_INFINITY)),
        # macOS takes no soft limit without a number.
        ((256, resource.RLIM_INFINITY), [resource.RLIM_INFINITY], (10240, resource.RLIM_INFINITY)),
        ((20000, resource.RLIM_INFINITY), [resource.RLIM_INFINITY], (20000, resource.RLIM_INFINITY)),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), [], (resource.RLIM_INFINITY, resource.RLIM_INFINITY)),
        # A sandbox lets nobody change it.
        ((1024, 4096), [4096, 10240], (1024, 4096)),
    ],
)
def test_the_soft_limit_becomes_as_much_as_the_system_lets_it(
    limits: tuple[int, int], refused: list[int], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [limits]

    def set_limit(_: int, wanted: tuple[int, int]) -> None:
        if wanted[0] in refused or (wanted[1] != resource.RLIM_INFINITY and wanted[0] > wanted[1]):
            raise ValueError("not allowed to raise maximum limit")
        now.append(wanted)

    monkeypatch.setattr(resource, "getrlimit", lambda _: now[-1])
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    raise_descriptor_limit()
    assert now[-1] == expected
    soft, hard = (None if limit == resource.RLIM_INFINITY else limit for limit in expected)
    assert (descriptor_limit(), descriptor_limit(hard=True)) == (soft, hard)
