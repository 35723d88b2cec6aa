"""What is counted: in one process and in several, and read by Prometheus's own tool as well as by its Python library."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client import Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families

from programs import environment
from triosspi import ConfigurationError
from triosspi.security.identity import Traffic
from triosspi.service.observe import metrics as module
from triosspi.service.observe.metrics import (
    SESSION_OUTCOMES,
    Metrics,
)
from triosspi.service.observe.telemetry import Telemetry
from triosspi.service.observe.worker_files import WorkerMetrics
from triosspi.service.serving import sessions

PROMTOOL = shutil.which("promtool")

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(exposition: bytes) -> Samples:
    """Every series and its value; each only once."""
    samples: Samples = {}
    for family in text_string_to_metric_families(exposition.decode()):
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return samples


def value(exposition: bytes, name: str, **labels: str) -> float | None:
    return read(exposition).get((f"triosspi_{name}", frozenset(labels.items())))


def count_something(metrics: Metrics) -> None:
    """Everything at least once, as it is declared: what is added there is looked at here."""
    for series in module.SERIES:
        for labels in itertools.product(*series.labels.values()):
            if series.kind is Counter:
                metrics.count(series, *labels)
            elif series.kind is Gauge:
                metrics.set(series, 2, *labels)
            else:
                metrics.observe(series, 0.003, *labels)


def handshake(metrics: Metrics, mechanism: str | None, outcome: str, seconds: float) -> None:
    Telemetry(metrics)._handshake(mechanism, outcome, seconds)


# One process


def test_every_series_is_there_before_anything_is_counted_and_no_other_comes() -> None:
    metrics = Metrics()
    before = read(metrics.exposition())
    count_something(metrics)
    after = read(metrics.exposition())
    assert set(after) == set(before)
    ours = {key for key in after if key[0].startswith("triosspi_")}
    assert len(ours) > 100
    unchanged = {key for key in ours if after[key] == before[key] and "_bucket" not in key[0]}
    assert {name for name, _ in unchanged} == {"triosspi_build_info"}


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_nothing_that_a_peer_says_makes_a_series(count: int) -> None:
    metrics = Metrics()
    before = set(read(metrics.exposition()))
    rng = random.Random(5)
    for _ in range(count):
        text = "".join(chr(rng.randrange(0x300)) for _ in range(8))
        metrics.count(module.DROPPED, text)
        metrics.count(module.SESSIONS_ENDED, text)
        handshake(metrics, text, text, 0.1)
        handshake(metrics, None, "accepted", 0.1)
    exposition = metrics.exposition()
    assert set(read(exposition)) == before
    assert value(exposition, "connections_dropped_total", cause="other") == count
    assert value(exposition, "sessions_ended_total", outcome="other") == count
    assert value(exposition, "handshakes_total", mechanism="unknown", outcome="refused") == count
    assert value(exposition, "handshakes_total", mechanism="unknown", outcome="accepted") == count


def test_the_outcomes_and_causes_are_those_of_the_server() -> None:
    assert {*get_args(sessions.Outcome), "other"} == set(SESSION_OUTCOMES)


def test_handshakes_are_counted_with_how_long_they_took() -> None:
    metrics = Metrics()
    for seconds in (0.0005, 0.002, 0.002, 0.2, 20, 100):
        handshake(metrics, "ntlm", "accepted", seconds)
    handshake(metrics, "ntlm", "refused", 0.002)
    # Those that came too late took what the deadline is.
    handshake(metrics, "ntlm", "timeout", 30)
    exposition = metrics.exposition()
    assert value(exposition, "handshakes_total", mechanism="ntlm", outcome="accepted") == 6
    assert value(exposition, "handshakes_total", mechanism="ntlm", outcome="timeout") == 1
    buckets = [("0.001", 1), ("0.0025", 4), ("0.1", 4), ("0.25", 5), ("30.0", 6), ("+Inf", 7)]
    for limit, count in buckets:
        assert value(exposition, "handshake_seconds_bucket", mechanism="ntlm", le=limit) == count
    assert value(exposition, "handshake_seconds_count", mechanism="ntlm") == 7
    assert value(exposition, "handshake_seconds_count", mechanism="kerberos") == 0


def test_traffic_is_added_up_in_both_directions_and_never_decreases() -> None:
    metrics = Metrics()
    Telemetry(metrics).traffic(Traffic(messages_sent=1, bytes_sent=10, messages_received=0, bytes_received=0))
    Telemetry(metrics).traffic(Traffic(messages_sent=0, bytes_sent=0, messages_received=2, bytes_received=2**40))
    Telemetry(metrics).traffic(Traffic(messages_sent=-5, bytes_sent=-5, messages_received=1, bytes_received=-1))
    exposition = metrics.exposition()
    assert value(exposition, "messages_total", direction="sent") == 1
    assert value(exposition, "messages_total", direction="received") == 3
    assert value(exposition, "message_bytes_total", direction="sent") == 10
    assert value(exposition, "message_bytes_total", direction="received") == 2**40


def test_gauges_follow() -> None:
    metrics = Metrics()
    for pending, established, ready in ((5, 7, True), (0, 1, False)):
        metrics.set(module.CONNECTIONS, pending, "pending")
        metrics.set(module.CONNECTIONS, established, "established")
        metrics.set(module.READY, ready)
        exposition = metrics.exposition()
        assert value(exposition, "connections", state="pending") == pending
        assert value(exposition, "connections", state="established") == established
        assert value(exposition, "ready") == ready


def test_two_servers_in_one_process_do_not_share_their_numbers() -> None:
    one, two = Metrics(), Metrics()
    one.count(module.ACCEPTED)
    assert value(one.exposition(), "connections_accepted_total") == 1
    assert value(two.exposition(), "connections_accepted_total") == 0


def test_the_build_is_told() -> None:
    (labels,) = [dict(key[1]) for key in read(Metrics().exposition()) if key[0] == "triosspi_build_info"]
    assert set(labels) == {"version", "python", "trio", "pyspnego"}


def test_a_worker_that_would_count_where_nobody_looks_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="PROMETHEUS_MULTIPROC_DIR"):
        Metrics(worker=True)


# Several processes

WORKER = """
import sys
from triosspi.security.identity import Traffic
from triosspi.service.observe.metrics import Metrics
from triosspi.service.observe.telemetry import Telemetry
metrics = Metrics(worker=True)
telemetry = Telemetry(metrics)
print("made", flush=True)
for line in sys.stdin:
    eval(line)
    print("done", flush=True)
"""


class Worker:
    """A process that counts what it is told to."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(**metrics.environment),
        )
        assert self._answer() == "made\n"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def do(self, call: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{call}\n")
        self.process.stdin.flush()
        assert self._answer() == "done\n"

    def end(self, kill: bool = False) -> int:
        """Returns its process id."""
        if kill:
            self.process.kill()
        self.process.communicate()
        return self.process.pid


@pytest.fixture
def gathered() -> Iterator[WorkerMetrics]:
    with WorkerMetrics() as metrics:
        yield metrics


@pytest.fixture
def start(gathered: WorkerMetrics) -> Iterator[Callable[[], Worker]]:
    workers: list[Worker] = []

    def start_one() -> Worker:
        workers.append(Worker(gathered))
        return workers[-1]

    yield start_one
    for worker in workers:
        worker.end(kill=True)


def test_what_the_workers_count_is_shown_as_one(gathered: WorkerMetrics, start: Callable[[], Worker]) -> None:
    one, two = start(), start()
    for worker, pending in ((one, 3), (two, 4)):
        worker.do("telemetry.accepted()")
        worker.do(f"telemetry.connections({pending}, 10)")
        worker.do("telemetry.ready(True)")
        worker.do("telemetry.traffic(Traffic(1, 100, 2, 200))")
        worker.do("telemetry._handshake('kerberos', 'accepted', 0.002)")
        worker.do("telemetry.loop_latency(0.02)")
    exposition = gathered.exposition()
    assert value(exposition, "connections_accepted_total") == 2
    assert value(exposition, "connections", state="pending") == 7
    assert value(exposition, "connections", state="established") == 20
    assert value(exposition, "ready") == 2
    assert value(exposition, "message_bytes_total", direction="received") == 400
    assert value(exposition, "handshake_seconds_bucket", mechanism="kerberos", le="0.001") == 0
    assert value(exposition, "handshake_seconds_bucket", mechanism="kerberos", le="0.0025") == 2
    assert value(exposition, "handshake_seconds_count", mechanism="kerberos") == 2
    assert value(exposition, "loop_latency_seconds_count") == 2
    (build,) = [number for (name, _), number in read(exposition).items() if name == "triosspi_build_info"]
    assert build == 1
    # The same series as of one process: a dashboard need not know how many there are.
    assert set(read(exposition)) == {*read(Metrics().exposition()), ("triosspi_workers_ended_total", frozenset())}


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_a_workers_end_takes_its_gauges_and_leaves_its_counts(
    gathered: WorkerMetrics, start: Callable[[], Worker], kill: bool
) -> None:
    one, two = start(), start()
    for worker in (one, two):
        worker.do("telemetry.accepted()")
        worker.do("telemetry.connections(1, 10)")
        worker.do("telemetry.ready(True)")
        worker.do("telemetry.loop_latency(0.02)")
    gathered.worker_died(one.end(kill))
    for _ in range(2):
        exposition = gathered.exposition()
        assert value(exposition, "connections", state="established") == 10
        assert value(exposition, "ready") == 1
        assert value(exposition, "connections_accepted_total") == 2
        assert value(exposition, "loop_latency_seconds_bucket", le="0.025") == 2
        assert value(exposition, "loop_latency_seconds_sum") == pytest.approx(0.04)
        assert value(exposition, "workers_ended_total") == 1
    # And the one that takes its place adds to that.
    start().do("telemetry.accepted()")
    assert value(gathered.exposition(), "connections_accepted_total") == 3


def test_however_many_workers_have_ended_the_files_are_as_many_as_for_one(
    gathered: WorkerMetrics, start: Callable[[], Worker]
) -> None:
    sizes = []
    for number in range(1, 4):
        worker = start()
        worker.do("telemetry.accepted()")
        worker.do("telemetry.loop_latency(0.5)")
        gathered.worker_died(worker.end(kill=number == 2))
        assert value(gathered.exposition(), "connections_accepted_total") == number
        assert value(gathered.exposition(), "loop_latency_seconds_count") == number
        sizes.append(sorted(path.name for path in gathered.directory.iterdir()))
    assert sizes == [["counter_departed.db", "histogram_departed.db"]] * 3


def test_a_death_that_is_told_twice_or_of_nobody_changes_nothing(
    gathered: WorkerMetrics, start: Callable[[], Worker]
) -> None:
    worker = start()
    worker.do("telemetry.accepted()")
    pid = worker.end()
    for one in (pid, pid, 999_999_999):
        gathered.worker_died(one)
        assert value(gathered.exposition(), "connections_accepted_total") == 1


def entry(key: bytes) -> bytes:
    """A file of values with one in it."""
    padded = key + b" " * (8 - (len(key) + 4) % 8)
    body = struct.pack(f"<i{len(padded)}sdd", len(key), padded, 1.0, 0.0)
    return struct.pack("<ii", 8 + len(body), 0) + body


@pytest.mark.parametrize(
    "rubbish",
    [
        b"",
        b"\0" * 65536,
        b"\xff" * 65536,
        b"\x40\0\0\0\0\0\0\0\xff\xff\xff\x7f" + b"x" * 99,
        entry(b"not JSON"),
        entry(b"\xff\xfe"),
        entry(b"[1, 2]"),
        entry(b"{}"),
        entry(b'["a", "a_total", {}, "help"]')[:-8],
    ],
)
def test_a_file_that_a_dead_worker_has_left_half_written_is_given_up(
    rubbish: bytes, gathered: WorkerMetrics, start: Callable[[], Worker]
) -> None:
    start().do("telemetry.accepted()")
    for kind in ("counter", "histogram", "gauge_livesum"):
        (gathered.directory / f"{kind}_1.db").write_bytes(rubbish)
    gathered.worker_died(1)
    assert value(gathered.exposition(), "connections_accepted_total") == 1


def test_a_file_that_a_worker_has_just_made_is_passed_over(gathered: WorkerMetrics) -> None:
    (gathered.directory / "counter_1.db").touch()
    assert value(gathered.exposition(), "workers_ended_total") == 0


def test_the_directory_is_the_servers_own_and_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path}:/nowhere")
    with WorkerMetrics() as metrics:
        assert metrics.directory.parent == tmp_path
        assert metrics.directory.stat().st_mode & 0o077 == 0
        assert metrics.environment == {"PROMETHEUS_MULTIPROC_DIR": str(metrics.directory)}
        os.environ.update(metrics.environment)
        # Not for this process, which counts in memory already.
        one = Metrics()
        one.count(module.ACCEPTED)
        assert value(one.exposition(), "connections_accepted_total") == 1
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "missing"))
    with pytest.raises(ConfigurationError, match="workers' metrics"):
        WorkerMetrics()


def test_where_somebody_else_has_set_the_directory_one_process_shows_what_is_in_it(tmp_path: Path) -> None:
    code = "from triosspi.service.observe.metrics import ACCEPTED, Metrics\nm = Metrics()\nm.count(ACCEPTED)\nprint(m.exposition().decode())"
    for number in (1, 2):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            env=environment(PROMETHEUS_MULTIPROC_DIR=str(tmp_path)),
            check=True,
        )
        assert value(done.stdout, "connections_accepted_total") == number


def test_a_directory_that_is_missing_is_a_configuration_error(tmp_path: Path) -> None:
    code = "from triosspi.service.observe.metrics import Metrics\ntry: Metrics()\nexcept ValueError as exc: print(exc)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env=environment(PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "missing")),
        check=True,
    )
    assert done.stdout.startswith(b"PROMETHEUS_MULTIPROC_DIR: ")


# Prometheus's own opinion


@pytest.mark.skipif(PROMTOOL is None, reason="promtool, from Prometheus, is not here")
@pytest.mark.parametrize("across", [False, True], ids=["one process", "workers"])
def test_promtool_finds_nothing_to_complain_of(
    across: bool, gathered: WorkerMetrics, start: Callable[[], Worker]
) -> None:
    assert PROMTOOL is not None
    if across:
        start().do("telemetry.accepted()")
        exposition = gathered.exposition()
    else:
        metrics = Metrics()
        count_something(metrics)
        exposition = metrics.exposition()
    assert b"triosspi_connections_accepted_total 1.0" in exposition
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=exposition, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool, from Prometheus, is not here")
def test_promtool_would_find_something(tmp_path: Path) -> None:
    # So that the test above means something.
    assert PROMTOOL is not None
    spoiled = Metrics().exposition().replace(b"triosspi_accept_errors_total", b"triosspi_accept_errors")
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=spoiled, capture_output=True, check=False)
    assert done.returncode != 0


def test_the_media_type_is_that_of_the_text_format() -> None:
    assert module.CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"
