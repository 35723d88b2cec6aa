"""The watch over all sessions: whose time is over, and what has gone over the wire."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from triosspi import Traffic
from triosspi.service.serving.sessions import NOTICE, STUBBORN, WATCH_INTERVAL, Sessions, WatchedSession

NOTHING = Traffic(0, 0, 0, 0)


class FakeChannel:
    """As much of a channel as the watch looks at."""

    def __init__(self, mechanism: str = "ntlm") -> None:
        self.traffic = NOTHING
        self.peer = SimpleNamespace(mechanism=mechanism)
        self.closed = trio.Event()
        self.stopped = False

    def stop_receiving(self) -> None:
        self.stopped = True

    async def aclose(self) -> None:
        self.closed.set()


def limits(**given: Any) -> Any:
    nothing = dict.fromkeys(("idle_timeout", "max_session_age", "max_session_bytes", "max_session_messages"))
    return SimpleNamespace(**{**nothing, "session_caps": "ntlm", **given})


# The watch over sessions does not look at it.
NO_ENTRY: Any = None


class Watched:
    """Sessions under watch, with what the watch has told."""

    def __init__(self, nursery: trio.Nursery, **given: Any) -> None:
        self.limits = limits(**given)
        self.told: list[Traffic] = []
        self.sessions = Sessions(lambda: self.limits, self.told.append)
        nursery.start_soon(self.sessions.watch, nursery)

    def add(self, mechanism: str = "ntlm", expires: float | None = None) -> tuple[WatchedSession, Any]:
        channel: Any = FakeChannel(mechanism)
        session = WatchedSession(channel, "somewhere", expires, NO_ENTRY)
        self.sessions.add(session)
        return session, channel


@pytest.mark.parametrize(
    ("given", "outcome"), [({"idle_timeout": 30.0}, "idle"), ({"max_session_age": 30.0}, "age")], ids=["idle", "age"]
)
async def test_a_session_ends_when_its_time_is_over(autojump_clock, given, outcome):
    async with trio.open_nursery() as nursery:
        watched = Watched(nursery, **given)
        session, channel = watched.add()
        await channel.closed.wait()
        assert session.ended_by == outcome
        assert 30 <= trio.current_time() - session.since <= 30 + WATCH_INTERVAL
        nursery.cancel_scope.cancel()


async def test_whoever_says_something_is_not_idle(autojump_clock):
    async with trio.open_nursery() as nursery:
        watched = Watched(nursery, idle_timeout=10.0)
        session, channel = watched.add()
        for number in range(1, 10):
            await trio.sleep(9)
            channel.traffic = Traffic(0, 0, number, number)
        assert session.ended_by is None
        await channel.closed.wait()
        assert session.ended_by == "idle"
        nursery.cancel_scope.cancel()


async def test_a_session_ends_with_its_ticket_and_without_one_lives_on(autojump_clock):
    async with trio.open_nursery() as nursery:
        watched = Watched(nursery)
        session, channel = watched.add("kerberos", expires=trio.current_time() + 100)
        other, _ = watched.add("kerberos")
        await channel.closed.wait()
        assert session.ended_by == "expired"
        assert 100 <= trio.current_time() - session.since <= 100 + WATCH_INTERVAL
        await trio.sleep(10_000)
        assert other.ended_by is None
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("direction", [0, 2], ids=["sent", "received"])
@pytest.mark.parametrize(("field", "outcome"), [("max_session_messages", "messages"), ("max_session_bytes", "bytes")])
async def test_the_caps_of_rc4_end_ntlm_sessions_and_no_kerberos_ones(autojump_clock, direction, field, outcome):
    async with trio.open_nursery() as nursery:
        watched = Watched(nursery, **{field: 1000})
        session, channel = watched.add()
        kerberos, kerberos_channel = watched.add("kerberos")
        column = direction + (outcome == "bytes")
        channel.traffic = NOTHING._replace(**{Traffic._fields[column]: 999})
        await trio.sleep(10)
        assert session.ended_by is None
        channel.traffic = kerberos_channel.traffic = NOTHING._replace(**{Traffic._fields[column]: 1000})
        await channel.closed.wait()
        assert session.ended_by == outcome
        assert kerberos.ended_by is None
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("caps", "outcome"), [("ntlm", None), ("all", "age")])
async def test_whether_kerberos_sessions_age_is_to_be_chosen(autojump_clock, caps, outcome):
    async with trio.open_nursery() as nursery:
        watched = Watched(nursery, max_session_age=60.0, session_caps=caps)
        session, _ = watched.add("kerberos")
        await trio.sleep(100)
        assert session.ended_by == outcome
        nursery.cancel_scope.cancel()


async def test_new_limits_hold_for_old_sessions(autojump_clock):
    async with trio.open_nursery() as nursery:
        watched = Watched(nursery)
        session, channel = watched.add()
        await trio.sleep(1000)
        assert session.ended_by is None
        watched.limits = limits(idle_timeout=5.0)
        await channel.closed.wait()
        assert session.ended_by == "idle"
        nursery.cancel_scope.cancel()


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("given", "expires", "outcome"),
    [
        ({"idle_timeout": 30.0}, None, "idle"),
        ({"max_session_age": 30.0}, None, "age"),
        ({"max_session_bytes": 1000}, None, "bytes"),
        ({"max_session_messages": 1000}, None, "messages"),
        ({}, 30.0, "expired"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_handler_that_does_not_look_at_its_channel_is_cancelled_after_a_notice(
    autojump_clock, caplog, given, expires, outcome
):
    # It kept its place for ever, uncounted.
    async with trio.open_nursery() as nursery:
        watched = Watched(nursery, **given)
        session, channel = watched.add(expires=None if expires is None else trio.current_time() + expires)
        with session.scope:
            if outcome in ("bytes", "messages"):
                channel.traffic = Traffic(1000, 1000, 1000, 1000)
            nursery.start_soon(channel.closed.wait)
            await trio.sleep_forever()
        assert session.scope.cancelled_caught
        assert channel.closed.is_set()
        assert session.ended_by == outcome
        earliest = NOTICE if outcome in ("bytes", "messages") else NOTICE + 30
        assert earliest <= trio.current_time() - session.since <= earliest + 2 * WATCH_INTERVAL
        watched.sessions.remove(session)
        assert len(watched.sessions) == 0
        nursery.cancel_scope.cancel()
    assert len(warnings(caplog)) == 1


async def test_a_handler_that_ends_at_the_notice_is_not_cancelled(autojump_clock, caplog):
    async with trio.open_nursery() as nursery:
        watched = Watched(nursery, idle_timeout=30.0)
        session, channel = watched.add()
        with session.scope:
            await channel.closed.wait()
            # It has something to put away.
            await trio.sleep(NOTICE - 1)
        watched.sessions.remove(session)
        await trio.sleep(1000)
        assert not session.scope.cancel_called
        nursery.cancel_scope.cancel()
    assert warnings(caplog) == []


async def test_a_handler_that_is_not_to_be_cancelled_is_told_once(autojump_clock, caplog):
    async with trio.open_nursery() as nursery:
        watched = Watched(nursery, idle_timeout=30.0)
        session, _ = watched.add()
        with session.scope, trio.CancelScope(shield=True):
            await trio.sleep(30 + NOTICE + 10 * STUBBORN)
        assert len(watched.sessions) == 1
        nursery.cancel_scope.cancel()
    cancelled, stubborn = warnings(caplog)
    assert "cancelled" in cancelled
    assert "keeps its place" in stubborn


async def test_all_traffic_is_told_once(autojump_clock):
    async with trio.open_nursery() as nursery:
        watched = Watched(nursery)
        session, channel = watched.add()
        channel.traffic = Traffic(1, 10, 2, 20)
        await trio.sleep(5)
        channel.traffic = Traffic(2, 15, 2, 20)
        await trio.sleep(5)
        channel.traffic = Traffic(2, 15, 7, 90)
        watched.sessions.remove(session)
        await trio.sleep(5)
        assert Traffic(*map(sum, zip(*watched.told, strict=True))) == (2, 15, 7, 90)
        assert len(watched.sessions) == 0
        nursery.cancel_scope.cancel()


async def test_stopping_is_for_all_sessions_and_for_those_to_come(autojump_clock):
    async with trio.open_nursery() as nursery:
        watched = Watched(nursery)
        _, early = watched.add()
        watched.sessions.stop()
        _, late = watched.add()
        assert early.stopped
        assert late.stopped
        nursery.cancel_scope.cancel()


async def test_a_channel_that_fails_to_close_does_not_end_the_watch(autojump_clock):
    async with trio.open_nursery() as nursery:
        watched = Watched(nursery, idle_timeout=5.0)
        _, bad = watched.add()

        async def fail() -> None:
            raise RuntimeError("cannot close")

        bad.aclose = fail
        _, good = watched.add()
        # Were the watch over, nobody would close this one.
        await good.closed.wait()
        nursery.cancel_scope.cancel()


async def test_a_long_list_is_looked_at_in_pieces_while_others_run(autojump_clock):
    async with trio.open_nursery() as nursery:
        watched = Watched(nursery, idle_timeout=1.0)
        channels = [watched.add()[1] for _ in range(1000)]
        turns = 0
        await trio.sleep(WATCH_INTERVAL)
        while not all(channel.closed.is_set() for channel in channels):
            await trio.lowlevel.checkpoint()
            turns += 1
        assert turns > 5
        nursery.cancel_scope.cancel()
