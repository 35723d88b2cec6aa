"""What is told of connections: audit records with stable fields and nothing secret, sums where an attacker sets the pace."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import pytest

from harness import Clock
from triosspi.security.identity import PAC, ContextFlag, PeerIdentity, Traffic
from triosspi.service.observe import logs, telemetry
from triosspi.service.observe.metrics import DROP_CAUSES, SESSION_OUTCOMES, Metrics
from triosspi.service.observe.telemetry import SUMMARY_INTERVAL, SessionEnd, Telemetry

SOURCE = "192.0.2.1:50000"
NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)

ALICE = PeerIdentity(
    principal="DOM\\alice",
    domain="DOM",
    name="alice",
    mechanism="ntlm",
    flags=ContextFlag.CONF | ContextFlag.INTEG | ContextFlag.REPLAY | ContextFlag.SEQUENCE,
    mutual=False,
    authenticated_at=NOW,
)
BOB = PeerIdentity(
    principal="bob@EXAMPLE.COM",
    domain="EXAMPLE.COM",
    name="bob",
    mechanism="kerberos",
    flags=ContextFlag(0x3F),
    mutual=True,
    authenticated_at=NOW,
    expires_at=NOW.replace(hour=22),
    enctype="aes256-cts-hmac-sha1-96",
    delegated=True,
    pac=PAC(account="bob", domain="EXAMPLE", sid="S-1-5-21-1-2-3-1104", groups=frozenset({"S-1-5-21-1-2-3-513"})),
)


class Audit(logging.Handler):
    """The audit log, read as a machine reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logs._HANDLER.format(record))

    def take(self) -> list[dict[str, Any]]:
        """The records since the last call, without what all records have."""
        records = [json.loads(line) for line in self.lines]
        self.lines.clear()
        for record in records:
            for name in ("timestamp", "pid", "logger"):
                del record[name]
        return records


@pytest.fixture
def audit() -> Iterator[Audit]:
    logs.configure("info", "json")
    logger = logging.getLogger("triosspi.audit")
    handler = Audit()
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics._registry.get_sample_value(name, labels)


def ended(**more: Any) -> SessionEnd:
    numbers = {"messages_received": 1, "messages_sent": 2, "bytes_received": 30, "bytes_sent": 40, "seconds": 5.0}
    return SessionEnd(**{"session_id": 7, "source": SOURCE, "peer": ALICE, "outcome": "goodbye", **numbers, **more})


# Audit records


def test_a_login_is_one_record_with_who_from_where_and_with_what(audit: Audit) -> None:
    told = Telemetry()
    told.login(session_id=7, source=SOURCE, peer=ALICE, wire="framed", seconds=0.0123456789)
    told.login(session_id=8, source="[2001:db8::1]:50001", peer=BOB, wire="framed", seconds=0.5)
    ntlm, kerberos = audit.take()
    assert ntlm == {
        "level": "info",
        "event": "login",
        "session_id": 7,
        "source": SOURCE,
        "principal": "DOM\\alice",
        "mechanism": "ntlm",
        "wire": "framed",
        "flags": ["REPLAY", "SEQUENCE", "CONF", "INTEG"],
        "mutual": False,
        "enctype": None,
        "delegated": False,
        "expires_at": None,
        "sid": None,
        "seconds": 0.012346,
    }
    assert kerberos == {
        "level": "info",
        "event": "login",
        "session_id": 8,
        "source": "[2001:db8::1]:50001",
        "principal": "bob@EXAMPLE.COM",
        "mechanism": "kerberos",
        "wire": "framed",
        "flags": ["DELEG", "MUTUAL", "REPLAY", "SEQUENCE", "CONF", "INTEG"],
        "mutual": True,
        "enctype": "aes256-cts-hmac-sha1-96",
        "delegated": True,
        "expires_at": "2026-11-22T22:00:00+00:00",
        "sid": "S-1-5-21-1-2-3-1104",
        "seconds": 0.5,
    }


def test_a_refused_login_is_one_record_with_the_true_reason(audit: Audit) -> None:
    told = Telemetry()
    told.login_refused(source=SOURCE, mechanism="ntlm", reason="'DOM\\\\alice': wrong password", seconds=0.25)
    told.login_refused(source=SOURCE, mechanism=None, reason="no login within 30 s", seconds=30, timed_out=True)
    refused, late = audit.take()
    assert refused == {
        "level": "warning",
        "event": "login refused",
        "source": SOURCE,
        "mechanism": "ntlm",
        "reason": "'DOM\\\\alice': wrong password",
        "timed_out": False,
        "seconds": 0.25,
    }
    assert (late["timed_out"], late["mechanism"], late["seconds"]) == (True, None, 30)


def test_a_session_is_one_record_at_its_end(audit: Audit) -> None:
    Telemetry().session_ended(ended())
    assert audit.take() == [
        {
            "level": "info",
            "event": "session ended",
            "session_id": 7,
            "source": SOURCE,
            "principal": "DOM\\alice",
            "mechanism": "ntlm",
            "flags": ["REPLAY", "SEQUENCE", "CONF", "INTEG"],
            "enctype": None,
            "sid": None,
            "outcome": "goodbye",
            "error": None,
            "messages_received": 1,
            "messages_sent": 2,
            "bytes_received": 30,
            "bytes_sent": 40,
            "seconds": 5.0,
        }
    ]


@pytest.mark.parametrize("outcome", SESSION_OUTCOMES)
def test_only_ends_that_somebody_should_look_at_are_warnings(outcome: str, audit: Audit) -> None:
    Telemetry().session_ended(ended(outcome=outcome, error="a reason"))
    (record,) = audit.take()
    assert record["level"] == ("warning" if outcome in {"lost", "handler_error"} else "info")
    assert record["error"] == "a reason"


def test_the_documented_fields_are_those_of_the_records(audit: Audit) -> None:
    told = Telemetry()
    told.login(session_id=7, source=SOURCE, peer=BOB, wire="framed", seconds=1)
    told.login_refused(source=SOURCE, mechanism=None, reason="", seconds=1)
    told.session_ended(ended())
    told.dropped("penalty", SOURCE)
    told.accept_error(OSError(24, "Too many open files"))
    documented = Telemetry.__doc__ or ""
    for record in audit.take():
        assert f"``{record['event']}``" in documented
        for name in set(record) - {"level", "event"}:
            assert f"``{name}``" in documented
    assert {field.name for field in fields(SessionEnd)} > {"messages_received", "bytes_sent", "outcome", "error"}


def test_hostile_names_stay_within_their_record(audit: Audit, caplog: pytest.LogCaptureFixture) -> None:
    told = Telemetry()
    evil = 'x\n{"event": "login"}\x1b[2J'
    told.login_refused(source=evil, mechanism=evil, reason=evil, seconds=0)
    told.dropped("penalty", evil)
    assert all("\n" not in line and line.isascii() and line.isprintable() for line in audit.lines)
    assert [record["event"] for record in audit.take()] == ["login refused", "connections dropped"]
    assert told.failures == 0


# Numbers


def test_everything_is_counted(audit: Audit) -> None:
    metrics = Metrics()
    told = Telemetry(metrics)
    told.accepted()
    told.dropped("penalty", SOURCE)
    told.dropped("startups", SOURCE)
    told.dropped("a cause of the future", SOURCE)
    told.accept_error(OSError(24, "Too many open files"))
    told.connections(3, 4)
    told.login(session_id=1, source=SOURCE, peer=BOB, wire="framed", seconds=0.002)
    told.login_refused(source=SOURCE, mechanism="ntlm", reason="no", seconds=0.002)
    told.login_refused(source=SOURCE, mechanism=None, reason="late", seconds=30, timed_out=True)
    told.session_ended(ended(outcome="idle"))
    told.traffic(Traffic(messages_sent=1, bytes_sent=10, messages_received=2, bytes_received=20))
    told.traffic(Traffic(messages_sent=0, bytes_sent=0, messages_received=1, bytes_received=5))
    told.unseal_failure()
    told.loop_latency(0.002)
    told.ready(True)
    for name, labels, expected in [
        ("connections_accepted_total", {}, 1),
        ("connections_dropped_total", {"cause": "penalty"}, 1),
        ("connections_dropped_total", {"cause": "other"}, 1),
        ("accept_errors_total", {}, 1),
        ("connections", {"state": "pending"}, 3),
        ("connections", {"state": "established"}, 4),
        ("handshakes_total", {"mechanism": "kerberos", "outcome": "accepted"}, 1),
        ("handshakes_total", {"mechanism": "ntlm", "outcome": "refused"}, 1),
        ("handshakes_total", {"mechanism": "unknown", "outcome": "timeout"}, 1),
        ("sessions_ended_total", {"outcome": "idle"}, 1),
        ("messages_total", {"direction": "sent"}, 1),
        ("messages_total", {"direction": "received"}, 3),
        ("message_bytes_total", {"direction": "sent"}, 10),
        ("message_bytes_total", {"direction": "received"}, 25),
        ("unseal_failures_total", {}, 1),
        ("loop_latency_seconds_count", {}, 1),
        ("ready", {}, 1),
    ]:
        assert value(metrics, f"triosspi_{name}", **labels) == expected, name
    assert told.failures == 0


class Told:
    """A `Health` that only writes down."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def heartbeat(self) -> None:
        self.calls.append("heartbeat")

    def set_ready(self, ready: bool) -> None:
        self.calls.append(ready)


def test_the_health_is_told_of_each_turn_and_of_being_ready(audit: Audit) -> None:
    health = Told()
    told = Telemetry(health=health)
    told.loop_latency(0.1)
    told.ready(True)
    told.ready(False)
    assert health.calls == ["heartbeat", True, False]


# What an attacker can make us write


def dropped_lines(audit: Audit) -> list[tuple[str, int, str]]:
    records = audit.take()
    assert {record["event"] for record in records} <= {"connections dropped"}
    return [(record["cause"], record["count"], record["last_source"]) for record in records]


def test_dropped_connections_are_summed_up_in_one_line_per_cause_and_interval(audit: Audit, clock: Clock) -> None:
    told = Telemetry(clock=clock)
    for number in range(38):
        told.dropped("penalty", f"192.0.2.{number}:1")
    told.dropped("startups", SOURCE)
    # The first of each is told at once.
    assert dropped_lines(audit) == [("penalty", 1, "192.0.2.0:1"), ("startups", 1, SOURCE)]
    clock.now += SUMMARY_INTERVAL - 0.001
    told.loop_latency(0)
    assert dropped_lines(audit) == []
    clock.now += 0.001
    told.loop_latency(0)
    assert dropped_lines(audit) == [("penalty", 37, "192.0.2.37:1")]
    # And then again: at once, where nothing was said for so long.
    clock.now += SUMMARY_INTERVAL
    told.loop_latency(0)
    assert dropped_lines(audit) == []
    told.dropped("penalty", SOURCE)
    assert dropped_lines(audit) == [("penalty", 1, SOURCE)]


def test_a_flood_writes_a_line_per_cause_and_interval_and_counts_every_connection(audit: Audit, clock: Clock) -> None:
    metrics = Metrics()
    told = Telemetry(metrics, clock=clock)
    for number in range(30_000):
        clock.now += 0.001
        told.dropped(DROP_CAUSES[number % 3], SOURCE)
    told.close()
    lines = dropped_lines(audit)
    assert len(lines) <= 3 * (30 / SUMMARY_INTERVAL + 2)
    for cause in DROP_CAUSES[:3]:
        assert sum(count for one, count, _ in lines if one == cause) == 10_000
        assert value(metrics, "triosspi_connections_dropped_total", cause=cause) == 10_000


def test_who_says_nothing_is_no_reason_for_a_warning(audit: Audit, clock: Clock) -> None:
    # Health checks: they would be one every few seconds for ever.
    Telemetry(clock=clock).dropped("nothing_said", SOURCE)
    (record,) = audit.take()
    assert (record["level"], record["cause"]) == ("info", "nothing_said")


def test_what_is_not_told_yet_is_told_at_the_end(audit: Audit, clock: Clock) -> None:
    told = Telemetry(clock=clock)
    for _ in range(3):
        told.dropped("draining", SOURCE)
        told.accept_error(OSError(24, "Too many open files"))
    audit.take()
    told.close()
    told.close()
    assert audit.take() == [
        {"level": "warning", "event": "connections dropped", "cause": "draining", "count": 2, "last_source": SOURCE},
        {"level": "error", "event": "accept failed", "cause": "Too many open files", "errno": "EMFILE", "count": 2},
    ]


def test_accept_errors_are_summed_up_too(audit: Audit, clock: Clock) -> None:
    told = Telemetry(clock=clock)
    for _ in range(100):
        told.accept_error(OSError(24, "Too many open files"))
        clock.now += 0.125
        told.loop_latency(0)
    assert [record["count"] for record in audit.take()] == [1, 39, 40]


def test_refused_logins_are_told_one_by_one_unless_they_are_very_many(audit: Audit, clock: Clock) -> None:
    metrics = Metrics()
    told = Telemetry(metrics, clock=clock)

    def refuse(count: int, seconds: float) -> list[dict[str, Any]]:
        for _ in range(count):
            told.login_refused(source=SOURCE, mechanism="ntlm", reason="wrong password", seconds=0.001)
            clock.now += seconds / count
        told.loop_latency(0)
        return audit.take()

    # A hundred a second, for as long as they like.
    assert [record["event"] for record in refuse(2000, 20)] == ["login refused"] * 2000
    # A crowd at once, after a power cut, say.
    assert [record["event"] for record in refuse(900, 0.1)] == ["login refused"] * 900
    clock.now += 60
    # An attack: 10,000 a second.
    records = refuse(100_000, 10)
    one_by_one = [record for record in records if record["event"] == "login refused"]
    sums = [record for record in records if record["event"] == "more logins refused"]
    assert 1900 <= len(one_by_one) <= 2100
    assert 2 <= len(sums) <= 4
    clock.now += SUMMARY_INTERVAL
    told.loop_latency(0)
    sums += audit.take()
    assert len(one_by_one) + sum(record["count"] for record in sums) == 100_000
    assert sums[0] == {"level": "warning", "event": "more logins refused", "count": 1, "last_source": SOURCE}
    assert value(metrics, "triosspi_handshakes_total", mechanism="ntlm", outcome="refused") == 102_900


def test_a_clock_that_steps_back_gives_nothing_away(audit: Audit, clock: Clock) -> None:
    told = Telemetry(clock=clock)
    for _ in range(1500):
        clock.now -= 10
        told.login_refused(source=SOURCE, mechanism=None, reason="no", seconds=0)
    assert len([record for record in audit.take() if record["event"] == "login refused"]) == 1000


# Whatever happens


def test_no_failure_reaches_the_server_and_only_the_first_is_told(
    audit: Audit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    told = Telemetry(metrics, health=Told())

    def broken(*_: object, **__: object) -> None:
        raise OSError("a full disk")

    for name in ("count", "observe", "set"):
        monkeypatch.setattr(metrics, name, broken)
    told.accepted()
    told.dropped("penalty", SOURCE)
    told.accept_error(OSError(24, "Too many open files"))
    told.connections(1, 1)
    told.login(session_id=1, source=SOURCE, peer=ALICE, wire="framed", seconds=1)
    told.login_refused(source=SOURCE, mechanism=None, reason="", seconds=1)
    told.session_ended(ended())
    told.traffic(Traffic(1, 1, 1, 1))
    told.unseal_failure()
    told.loop_latency(1)
    told.ready(True)
    monkeypatch.setattr(told, "_clock", broken)
    told.close()
    assert told.failures == 12
    (failure,) = [record for record in caplog.records if record.name == "triosspi.telemetry"]
    assert "a full disk" in str(failure.exc_info)


def test_a_telemetry_that_nobody_listens_to_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    told = Telemetry()
    told.login(session_id=1, source=SOURCE, peer=ALICE, wire="framed", seconds=1)
    told.session_ended(ended())
    assert capsys.readouterr() == ("", "")


def test_with_the_log_at_warning_only_what_went_wrong_is_recorded(audit: Audit) -> None:
    logs.configure("warning", "json")
    told = Telemetry()
    told.login(session_id=1, source=SOURCE, peer=ALICE, wire="framed", seconds=1)
    told.login_refused(source=SOURCE, mechanism=None, reason="no", seconds=1)
    told.session_ended(ended())
    told.session_ended(ended(outcome="lost", error="no"))
    assert [record["event"] for record in audit.take()] == ["login refused", "session ended"]


def test_on_the_console_a_person_reads_a_sentence() -> None:
    logs.configure("info", "console")
    handler = Audit()
    logger = logging.getLogger("triosspi.audit")
    logger.addHandler(handler)
    told = Telemetry()
    told.login_refused(source=SOURCE, mechanism="ntlm", reason="wrong password for 'alice'", seconds=0.25)
    told.session_ended(ended(outcome="lost", error="the peer closed the connection within a record"))
    told.dropped("penalty", SOURCE)
    logger.removeHandler(handler)
    refused, lost, dropped = (line.split("Z ", 1)[1] for line in handler.lines)
    assert refused == (
        f"WARNING {SOURCE}: login refused: wrong password for 'alice' (mechanism=ntlm timed_out=False seconds=0.25)"
    )
    assert lost == (
        f"WARNING {SOURCE}: DOM\\alice: session ended: the peer closed the connection within a record (session_id=7"
        " mechanism=ntlm flags=REPLAY,SEQUENCE,CONF,INTEG outcome=lost messages_received=1 messages_sent=2"
        " bytes_received=30 bytes_sent=40 seconds=5)"
    )
    assert dropped == f"WARNING connections dropped: penalty (count=1 last_source={SOURCE})"


def test_the_interval_is_some_seconds() -> None:
    assert 1 <= telemetry.SUMMARY_INTERVAL <= 10
