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
import functools
import importlib.metadata
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
from pathlib import Path
from typing import Final, Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, values
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from ... import __version__
from ..._errors import ConfigurationError
from ...security.identity import Traffic
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
SESSION_OUTCOMES: Final = (
    "goodbye",
    "peer_closed",
    "finished",
    "lost",
    "handler_error",
    "idle",
    "expired",
    "age",
    "bytes",
    "messages",
    "shutdown",
    "other",
)

# Seconds. A login takes 0.5 ms here and some round trips; where it takes more than a second, something is slow.
_HANDSHAKE_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# From the millisecond that nobody notices to the seconds after which a supervisor thinks of killing.
_LATENCY_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

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
        """Make every series, and keep each one's method: looking it up takes longer than counting."""
        counter = functools.partial(Counter, registry=self._registry)
        gauge = functools.partial(Gauge, registry=self._registry, multiprocess_mode="livesum")
        histogram = functools.partial(Histogram, registry=self._registry)

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

        self._ready = gauge("triosspi_ready", "Processes that take connections: not those that start or drain.")
        connections = gauge("triosspi_connections", "Open connections, before and after their login.", ["state"])
        self._pending, self._established = connections.labels("pending"), connections.labels("established")
        self._accepted = counter("triosspi_connections_accepted_total", "Connections that were accepted.")
        dropped = counter("triosspi_connections_dropped_total", "Connections closed before the login began.", ["cause"])
        self._dropped = {cause: dropped.labels(cause) for cause in DROP_CAUSES}
        self._accept_errors = counter("triosspi_accept_errors_total", "Failures of accept(2).")

        shakes = counter("triosspi_handshakes_total", "Handshakes that ended.", ["mechanism", "outcome"])
        self._handshakes = {
            (mechanism, outcome): shakes.labels(mechanism, outcome)
            for mechanism in MECHANISMS
            for outcome in HANDSHAKE_OUTCOMES
        }
        took = histogram(
            "triosspi_handshake_seconds",
            "How long handshakes took that were accepted or refused in time.",
            ["mechanism"],
            buckets=_HANDSHAKE_BUCKETS,
        )
        self._handshake_seconds = {mechanism: took.labels(mechanism) for mechanism in MECHANISMS}

        ended = counter("triosspi_sessions_ended_total", "Sessions that ended.", ["outcome"])
        self._ended = {outcome: ended.labels(outcome) for outcome in SESSION_OUTCOMES}
        messages = counter("triosspi_messages_total", "Messages that were unsealed or sealed.", ["direction"])
        self._messages_received, self._messages_sent = messages.labels("received"), messages.labels("sent")
        size = counter("triosspi_message_bytes_total", "Bytes of those messages, in plaintext.", ["direction"])
        self._bytes_received, self._bytes_sent = size.labels("received"), size.labels("sent")
        self._unseal_failures = counter("triosspi_unseal_failures_total", "Messages that did not open.")

        self._latency = histogram(
            "triosspi_loop_latency_seconds", "How late the event loop ran what was due.", buckets=_LATENCY_BUCKETS
        )

    def accepted(self) -> None:
        """A connection was accepted."""
        self._accepted.inc()

    def dropped(self, cause: str) -> None:
        """A connection was closed before its login began."""
        (self._dropped.get(cause) or self._dropped["other"]).inc()

    def accept_error(self) -> None:
        """accept(2) has failed."""
        self._accept_errors.inc()

    def handshake(self, mechanism: str | None, outcome: str, seconds: float) -> None:
        """A handshake has ended.

        Args:
          mechanism: ``"kerberos"``, ``"ntlm"``, or None where it is not known.
          outcome: one of `HANDSHAKE_OUTCOMES`.
          seconds: how long it took.
        """
        if mechanism not in self._handshake_seconds:
            mechanism = "unknown"
        (self._handshakes.get((mechanism, outcome)) or self._handshakes[mechanism, "refused"]).inc()
        if outcome != "timeout":
            # They all take the same, and would hide the others.
            self._handshake_seconds[mechanism].observe(seconds)

    def session_ended(self, outcome: str) -> None:
        """A session has ended; what went over it is `traffic`'s."""
        (self._ended.get(outcome) or self._ended["other"]).inc()

    def traffic(self, news: Traffic) -> None:
        """Count what has gone over channels since the last call."""
        # Most sessions that are looked at have nothing to tell, or nothing in one direction.
        if news.messages_received > 0:
            self._messages_received.inc(news.messages_received)
            self._bytes_received.inc(max(0, news.bytes_received))
        if news.messages_sent > 0:
            self._messages_sent.inc(news.messages_sent)
            self._bytes_sent.inc(max(0, news.bytes_sent))

    def unseal_failure(self) -> None:
        """A message did not open."""
        self._unseal_failures.inc()

    def connections(self, pending: int, established: int) -> None:
        """How many connections are open now, before and after their login."""
        self._pending.set(pending)
        self._established.set(established)

    def loop_latency(self, seconds: float) -> None:
        """The event loop ran something so late."""
        self._latency.observe(seconds)

    def ready(self, ready: bool) -> None:
        """Whether this process takes connections."""
        self._ready.set(ready)

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
