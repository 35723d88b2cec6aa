"""What a server counts, for Prometheus: of one process, or of all workers of a supervisor together."""

# Every label's value comes from a closed set of ours, and every series is made when the process starts: nothing that a peer
# says makes a series, so the memory here does not grow; a counter is there, as 0, before it first counts, which rate()
# needs; and the files below are written in full while a full disk can still be told.
#
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
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import shutil
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, values
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from ... import __version__
from ..._errors import ConfigurationError
from ...tcp import Outcome
from ..reasons import described

log = logging.getLogger("triosspi.metrics")

#: The media type of what `Metrics.exposition` and `WorkerMetrics.exposition` return.
CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4

# The values of labels. What is not among them is counted as the last one.
MECHANISMS: Final = ("kerberos", "ntlm", "unknown")
HANDSHAKE_OUTCOMES: Final = ("accepted", "timeout", "refused")
DROP_CAUSES: Final = (
    "startups",
    "evicted",
    "source_connections",
    "connections",
    "penalty",
    "proxy_header",
    "nothing_said",
    "draining",
    "other",
)
SESSION_OUTCOMES: Final = (*get_args(Outcome), "other")

# Seconds. A login takes 0.5 ms here and some round trips; where it takes more than a second, something is slow.
_HANDSHAKE_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# From the millisecond that nobody notices to the seconds after which a supervisor thinks of killing.
_LATENCY_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, eq=False)
class Series:
    """One metric.

    Attributes:
      kind: what it is to Prometheus.
      name: its name there.
      help: what it says, in one sentence.
      labels: its labels, and the values that each may have.
      buckets: of a histogram.
    """

    kind: type[Counter | Gauge | Histogram]
    name: str
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


# All that is counted. To add one is to declare it here, and to call `Telemetry.count` (or a method of that) where it happens.
READY: Final = Series(Gauge, "triosspi_ready", "Processes that take connections: not those that start or drain.")
CONNECTIONS: Final = Series(
    Gauge,
    "triosspi_connections",
    "Open connections, before and after their login.",
    {"state": ("pending", "established")},
)
ACCEPTED: Final = Series(Counter, "triosspi_connections_accepted_total", "Connections that were accepted.")
DROPPED: Final = Series(
    Counter, "triosspi_connections_dropped_total", "Connections closed before the login began.", {"cause": DROP_CAUSES}
)
ACCEPT_ERRORS: Final = Series(Counter, "triosspi_accept_errors_total", "Failures of accept(2).")
HANDSHAKES: Final = Series(
    Counter,
    "triosspi_handshakes_total",
    "Handshakes that ended.",
    {"mechanism": MECHANISMS, "outcome": HANDSHAKE_OUTCOMES},
)
HANDSHAKE_SECONDS: Final = Series(
    Histogram,
    "triosspi_handshake_seconds",
    "How long handshakes took that were accepted or refused in time.",
    {"mechanism": MECHANISMS},
    _HANDSHAKE_BUCKETS,
)
SESSIONS_ENDED: Final = Series(
    Counter, "triosspi_sessions_ended_total", "Sessions that ended.", {"outcome": SESSION_OUTCOMES}
)
MESSAGES: Final = Series(
    Counter, "triosspi_messages_total", "Messages that were unsealed or sealed.", {"direction": ("received", "sent")}
)
MESSAGE_BYTES: Final = Series(
    Counter,
    "triosspi_message_bytes_total",
    "Bytes of those messages, in plaintext.",
    {"direction": ("received", "sent")},
)
UNSEAL_FAILURES: Final = Series(Counter, "triosspi_unseal_failures_total", "Messages that did not open.")
LOOP_LATENCY: Final = Series(
    Histogram,
    "triosspi_loop_latency_seconds",
    "How late the event loop ran what was due.",
    buckets=_LATENCY_BUCKETS,
)

#: All of these.
SERIES: Final = tuple(declared for declared in list(vars().values()) if isinstance(declared, Series))

_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
# Bytes that a worker's files take, and a little more.
_ROOM: Final = 2**19


class Metrics:
    """Counts what happens in this process. Every call takes microseconds at most, and any thread may call.

    Args:
      worker: whether this is one process of several, of which a supervisor shows the sum; see `WorkerMetrics`.

    Raises:
      ConfigurationError: as a worker, without the environment that `WorkerMetrics` gives; or its directory cannot be
          written to.
    """

    def __init__(self, *, worker: bool = False) -> None:
        if worker and not in_files():
            raise ConfigurationError(f"a worker counts in files, and {_VARIABLE} was not set when it started")
        self._registry = CollectorRegistry()
        try:
            if worker:
                _check_room(Path(os.environ[_VARIABLE]))
            self._make()
        except OSError as exc:
            raise ConfigurationError(f"{_VARIABLE}: {exc}") from None
        if not in_files():
            ProcessCollector(registry=self._registry)

    def _make(self) -> None:
        """Make every series, with each of its labels' values."""
        build = Gauge(
            "triosspi_build_info",
            "Always 1; the labels say what runs.",
            ["version", "python", "trio", "pyspnego"],
            registry=self._registry,
            multiprocess_mode="livemax",
        )
        build.labels(
            __version__, platform.python_version(), *map(importlib.metadata.version, ("trio", "pyspnego"))
        ).set(1)
        # Kept by their labels' values: looking one up in prometheus_client takes longer than counting.
        self._children: dict[Series, dict[tuple[str | None, ...], Any]] = {}
        for series in SERIES:
            options: dict[str, Any] = {"registry": self._registry}
            if series.kind is Gauge:
                options["multiprocess_mode"] = "livesum"
            elif series.kind is Histogram:
                options["buckets"] = series.buckets
            metric = series.kind(series.name, series.help, list(series.labels), **options)
            self._children[series] = {
                values: metric.labels(*values) if values else metric
                for values in itertools.product(*series.labels.values())
            }

    def count(self, series: Series, *labels: str | None, by: float = 1) -> None:
        """So many more of something have happened.

        Args:
          series: a counter that is declared here.
          labels: the values of its labels. What is not among those that one may have counts as the last of them.
          by: how many.
        """
        self._child(series, labels).inc(by)

    def observe(self, series: Series, value: float, *labels: str | None) -> None:
        """Something that a histogram is kept of had this value; see `count`."""
        self._child(series, labels).observe(value)

    def set(self, series: Series, value: float, *labels: str | None) -> None:
        """A gauge stands at this value now; see `count`."""
        self._child(series, labels).set(value)

    def _child(self, series: Series, labels: tuple[str | None, ...]) -> Any:
        children = self._children[series]
        if (child := children.get(labels)) is None:
            sets = zip(labels, series.labels.values(), strict=True)
            child = children[tuple(label if label in values else values[-1] for label, values in sets)]
        return child

    def exposition(self) -> bytes:
        """All of it, in Prometheus's text format (`CONTENT_TYPE`).

        Where somebody else has set PROMETHEUS_MULTIPROC_DIR, it is what all processes with that directory count.
        """
        return _render(_Files(lambda: Path(os.environ[_VARIABLE])) if in_files() else self._registry)


def in_files() -> bool:
    """Whether what this process counts is in files: PROMETHEUS_MULTIPROC_DIR was set when it started."""
    return values.ValueClass is not values.MutexValue and _VARIABLE in os.environ


def worker_metrics() -> Metrics | None:
    """A worker's `Metrics`; or None, with a word about it: that nobody counts is no reason not to serve."""
    try:
        return Metrics(worker=True)
    except Exception as exc:  # noqa: BLE001 - a directory that is gone, a full disk, what prometheus_client makes of them
        log.warning("this worker serves without metrics: %s", described(exc))
        return None


def _check_room(directory: Path) -> None:
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
        self._registry.register(_Files(lambda: self.directory))
        self._ended = _Total("triosspi_workers_ended", "Workers that have ended, for whatever reason.")
        self._registry.register(self._ended)
        ProcessCollector(registry=self._registry)

    @property
    def environment(self) -> Mapping[str, str]:
        """What must be in the environment of a worker from its start on."""
        return {_VARIABLE: str(self.directory)}

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
            return _render(self._registry)

    def close(self) -> None:
        """Remove the files. Workers that still live go on counting, for nobody."""
        if os.environ.get(_VARIABLE) == str(self.directory):
            # A process that started with it now would look for the directory.
            del os.environ[_VARIABLE]
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Files(Collector):
    """Collects what is in the files of a directory."""

    def __init__(self, directory: Callable[[], Path]) -> None:
        self._directory = directory
        self._told = False

    def collect(self) -> Iterable[Metric]:
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


def _render(registry: Collector | CollectorRegistry) -> bytes:
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
