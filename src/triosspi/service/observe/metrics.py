"""What a server counts, for Prometheus."""

# Every label's value comes from a closed set of ours, and every series is made when the process starts: nothing that a peer
# says makes a series, so the memory here does not grow; a counter is there, as 0, before it first counts, which rate()
# needs; and the files of workers are written in full while a full disk can still be told.
#
# Where several processes count, they do so in files: see `worker_files`.

from __future__ import annotations

import importlib.metadata
import itertools
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from ... import __version__
from ..._errors import ConfigurationError
from ...tcp import Outcome
from ..reasons import described
from .worker_files import VARIABLE, Files, check_room, in_files, render

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
            raise ConfigurationError(f"a worker counts in files, and {VARIABLE} was not set when it started")
        self._registry = CollectorRegistry()
        try:
            if worker:
                check_room(Path(os.environ[VARIABLE]))
            self._make()
        except OSError as exc:
            raise ConfigurationError(f"{VARIABLE}: {exc}") from None
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
        return render(Files(lambda: Path(os.environ[VARIABLE])) if in_files() else self._registry)


def worker_metrics() -> Metrics | None:
    """A worker's `Metrics`; or None, with a word about it: that nobody counts is no reason not to serve."""
    try:
        return Metrics(worker=True)
    except Exception as exc:  # noqa: BLE001 - a directory that is gone, a full disk, what prometheus_client makes of them
        log.warning("this worker serves without metrics: %s", described(exc))
        return None
