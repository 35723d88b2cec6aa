"""The files in which workers count, and what a supervisor shows of them: all workers together."""

# prometheus_client decides once, when it is imported, where values live: in memory, or, if PROMETHEUS_MULTIPROC_DIR is
# set, in mapped files of that directory, some for each process. So a supervisor makes `WorkerMetrics`, sets its
# `environment` for the workers it starts, and shows what is in all files; each worker makes `Metrics(worker=True)`, which
# refuses to count where nobody would see it. The supervisor itself has imported prometheus_client before, and has no files.
#
# The files of a worker that has ended must go: gauges, because it has no connections any more, and the others, because a
# server that exchanges its workers every hour would have thousands of files after some weeks and read all for each scrape.
# But counters never decrease, so what it has counted is added to one file that belongs to nobody.

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, Self

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, values
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from ..._errors import ConfigurationError
from ..reasons import described

log = logging.getLogger("triosspi.metrics")

#: Where the files are, for prometheus_client.
VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
# Bytes that a worker's files take, and a little more.
_ROOM: Final = 2**19


def in_files() -> bool:
    """Whether what this process counts is in files: PROMETHEUS_MULTIPROC_DIR was set when it started."""
    return values.ValueClass is not values.MutexValue and VARIABLE in os.environ


def check_room(directory: Path) -> None:
    """See that a directory has room for a process's files.

    Raises:
      OSError: it has not.
    """
    # The files are mapped with holes in them; where the disk is full, filling one is SIGBUS, and no error.
    with tempfile.TemporaryFile(dir=directory) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, _ROOM)


class WorkerMetrics:
    """What all workers of a supervisor count, together. Made by the supervisor; used as a context manager, or closed.

    The files are in a directory of their own in RUNTIME_DIRECTORY, which systemd gives to a service that asks for one, or
    else where temporary files are.

    Attributes:
      directory: where the files are.

    Raises:
      ConfigurationError: no directory can be made there.
    """

    def __init__(self) -> None:
        try:
            self.directory = _make_directory()
        except OSError as exc:
            raise ConfigurationError(f"no directory for the workers' metrics: {exc}") from None
        # So that nobody counts a dead worker's file twice, or not at all, while it is being moved.
        self._lock = threading.Lock()
        self._registry = CollectorRegistry()
        self._registry.register(Files(lambda: self.directory))
        self._ended = _Total("triosspi_workers_ended", "Workers that have ended, for whatever reason.")
        self._registry.register(self._ended)
        ProcessCollector(registry=self._registry)

    @property
    def environment(self) -> Mapping[str, str]:
        """What must be in the environment of a worker from its start on."""
        return {VARIABLE: str(self.directory)}

    def restore(self) -> None:
        """Make another directory where this one is gone: called before a worker starts, which would have none.

        What was counted there is lost, and who had begun to count there counts for nobody.

        Raises:
          OSError: it cannot be made.
        """
        if _is_ours(self.directory):
            return
        with self._lock:
            gone, self.directory = self.directory, _make_directory()
        log.warning("somebody has removed %s, where workers counted: those that start now count elsewhere", gone)
        os.environ.update(self.environment)

    def worker_died(self, pid: int) -> None:
        """Forget the gauges of a worker that has ended, and keep what it has counted."""
        with self._lock:
            self._ended.count += 1
            for kind in ("counter", "histogram"):
                left = self.directory / f"{kind}_{pid}.db"
                if left.exists():
                    try:
                        _add(left, self.directory / f"{kind}_departed.db")
                    except (OSError, RuntimeError, ValueError, struct.error) as exc:
                        # Without it the counters step back, once; with it no scrape would ever succeed again.
                        log.warning("what worker %d has counted cannot be read: %s", pid, exc)
                    left.unlink(missing_ok=True)
            if _is_ours(self.directory):
                mark_process_dead(pid, str(self.directory))  # type: ignore[no-untyped-call]

    def exposition(self) -> bytes:
        """All of it, in Prometheus's text format (`CONTENT_TYPE`). Takes milliseconds."""
        with self._lock:
            return render(self._registry)

    def close(self) -> None:
        """Remove the files. Workers that still live go on counting, for nobody."""
        if os.environ.get(VARIABLE) == str(self.directory):
            # A process that started with it now would look for the directory.
            del os.environ[VARIABLE]
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Files(Collector):
    """Collects what is in the files of a directory."""

    def __init__(self, directory: Callable[[], Path]) -> None:
        self._directory = directory
        self._told = False

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        try:
            # A file is empty for a moment after a worker has made it, which the reader would take for a broken one.
            files = [str(path) for path in sorted(self._directory().glob("*.db")) if path.stat().st_size]
            metrics: Iterable[Metric] = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
        except Exception as exc:  # noqa: BLE001 - it may be anybody's doing, and the others' numbers are right
            if not self._told:
                self._told = True
                log.warning("what the workers have counted cannot be read, and is not shown: %s", described(exc))
            return []
        return metrics


def _make_directory() -> Path:
    where = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or None
    return Path(tempfile.mkdtemp(prefix="triosspi-metrics-", dir=where))


def _is_ours(directory: Path) -> bool:
    # Whoever may write beside it may have put another in its place.
    try:
        status = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


class _Total(Collector):
    """A counter that is in memory, wherever prometheus_client has its own."""

    def __init__(self, name: str, documentation: str) -> None:
        self._name = name
        self._documentation = documentation
        self.count = 0

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily(self._name, self._documentation, value=self.count)


class _WithoutTimes:
    """Leaves out the series that say since when another one counts: they are as many again, and nobody asks."""

    def __init__(self, registry: Collector | CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


def render(registry: Collector | CollectorRegistry) -> bytes:
    """All of it, in Prometheus's text format."""
    return generate_latest(_WithoutTimes(registry))


def _add(source: Path, target: Path) -> None:
    """Add the values of one file to those of another."""
    found = list(MmapedDict.read_all_values_from_file(str(source)))  # type: ignore[no-untyped-call]
    for key, _, _, _ in found:
        # Metric, series, labels, help. Anything else would be found at each scrape from now on.
        match json.loads(key):
            case [str(), str(), dict(), str()]:
                pass
            case _:
                raise ValueError("its names are not those of metrics")
    with contextlib.closing(MmapedDict(str(target))) as sums:  # type: ignore[no-untyped-call]
        for key, value, _, _ in found:
            sums.write_value(key, sums.read_value(key)[0] + value, 0.0)  # type: ignore[no-untyped-call]
