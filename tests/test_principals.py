"""Who logs in, whatever the source: failures of one account, and sessions of one principal."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

import pytest
import trio

from harness import make_initiator
from test_admission import ALICE, BOB, Bench, Limits, penalised, stranger
from test_server import PASSWORD, Running, serving
from triosspi import open_sspi_over_tcp_channel
from triosspi.service.admission.principals import WINDOW
from triosspi.service.config.settings import Limits as Options

LIMITS = Limits(max_failures_per_principal=10, penalties=False)


def guess(bench: Bench, times: int, principal: str = "alice", start: int = 0) -> None:
    """From so many addresses, one wrong password each."""
    for number in range(start, start + times):
        (entry,) = bench.admit(stranger(number))
        entry.failed("auth", principal)
        entry.close()


def may(bench: Bench, address: Any, principal: str = "alice", *, guessable: bool = True) -> bool:
    (entry,) = bench.admit(address)
    why = entry.check_principal(principal, guessable=guessable)
    entry.close()
    return why is None


def log_in(bench: Bench, address: Any, principal: str = "alice") -> None:
    (entry,) = bench.admit(address)
    entry.authenticated(principal)
    entry.close()


def test_an_account_that_is_guessed_at_from_everywhere_is_open_to_where_it_has_logged_in_before() -> None:
    bench = Bench(LIMITS)
    log_in(bench, ALICE)
    log_in(bench, BOB, "bob")
    guess(bench, 9)
    assert may(bench, BOB)
    guess(bench, 1, start=9)
    assert [may(bench, ALICE), may(bench, BOB)] == [True, False]
    # Other accounts, and who needs no password, notice nothing of it.
    assert may(bench, BOB, "bob")
    assert may(bench, BOB, guessable=False)


def test_it_is_open_to_all_when_the_failures_are_forgotten() -> None:
    bench = Bench(LIMITS)
    guess(bench, 10)
    assert not may(bench, BOB)
    bench.clock.now += WINDOW / 10
    assert may(bench, BOB)
    guess(bench, 1000)
    bench.clock.now += WINDOW
    assert not may(bench, BOB)
    bench.clock.now += WINDOW / 10
    assert may(bench, BOB)


def test_failures_that_come_slowly_do_nothing() -> None:
    bench = Bench(LIMITS)
    for number in range(100):
        guess(bench, 1, start=number)
        bench.clock.now += WINDOW / 10
    assert may(bench, BOB)


def test_it_can_be_switched_off_and_on_by_a_reload() -> None:
    bench = Bench(Limits())
    guess(bench, 100)
    assert may(bench, BOB)
    bench.admission.reconfigure(LIMITS)
    guess(bench, 10)
    assert not may(bench, BOB)
    bench.admission.reconfigure(Limits())
    assert may(bench, BOB)


def test_made_up_names_are_held_in_a_table_that_does_not_grow() -> None:
    bench = Bench(LIMITS)
    failures = bench.admission.principals._failures
    size = failures._cells.nbytes
    for number in range(5_000):
        guess(bench, 1, "x" * 1024 + chr(0xD800 + number % 1000) + str(number), start=number)
    assert failures._cells.nbytes == size
    assert not bench.admission.principals._sessions


def test_sessions_are_counted_until_they_end() -> None:
    bench = Bench(Limits(max_sessions_per_principal=1))
    (entry,) = bench.admit(ALICE)
    entry.authenticated("alice")
    assert not may(bench, BOB)
    assert may(bench, BOB, "bob")
    entry.close()
    entry.close()
    assert may(bench, BOB)
    assert not bench.admission.principals._sessions


# ---- live ----


async def refused(running: Running, password: str = PASSWORD) -> list[str]:
    """What a client sees that is refused."""
    with pytest.raises(trio.BrokenResourceError) as caught:
        await running.client(password)
    return [type(caught.value.__cause__).__name__, str(caught.value)]


async def test_a_right_password_of_a_stranger_is_refused_like_a_wrong_one() -> None:
    limits = Options(max_failures_per_principal=2, penalties=False)
    async with serving(limits=limits) as running:
        wrong = [await refused(running, "wrong") for _ in range(2)]
        right = await refused(running)
        assert [*wrong, right] == [wrong[0]] * 3
    reasons = [event[-1]["reason"] for event in running.told.all("login_refused")]
    assert "wrong password" in reasons[0]
    assert "nobody has logged in as it from there before" in reasons[2]
    assert not running.told.outcomes()


async def test_an_account_is_one_however_its_name_is_spelled() -> None:
    async with serving(limits=Options(max_failures_per_principal=2, penalties=False)) as running:
        for name in ("DOM\\ALICE", "dom\\alice"):
            initiator = make_initiator("wrong", username=name)
            channel = await open_sspi_over_tcp_channel(*running.addresses[0][:2], initiator)
            with pytest.raises(trio.BrokenResourceError):
                await channel.do_handshake()
            await trio.aclose_forcefully(channel)
        await refused(running)
    assert "have failed" in running.told.all("login_refused")[-1][-1]["reason"]


async def test_where_an_account_has_logged_in_before_it_may_however_often_it_is_guessed_at() -> None:
    limits = Options(max_failures_per_principal=2, penalties=False)
    async with serving(limits=limits) as running:
        first = await running.client()
        for _ in range(4):
            await refused(running, "wrong")
        second = await running.client()
        for client in (first, second):
            await client.aclose()
    assert running.told.outcomes() == ["goodbye"] * 2


async def test_one_session_too_many_is_refused_and_nothing_is_held_against_its_source() -> None:
    async with serving(limits=Options(max_sessions_per_principal=1)) as running:
        client = await running.client()
        for _ in range(5):
            await refused(running)
        await client.aclose()
        await running.told.until(lambda: running.told.ends)
        again = await running.client()
        await again.aclose()
    assert penalised(running.server._service.admission) == 0
    assert "has as many sessions as may be" in running.told.all("login_refused")[0][-1]["reason"]


def test_who_comes_from_an_unknown_source_is_counted_too() -> None:
    bench = Bench(LIMITS)
    for _ in range(10):
        (entry,) = bench.admit(None)
        entry.failed("auth", "alice")
        entry.close()
    assert not may(bench, IPv4Address(1))
