"""What worker processes know together: caps, penalties and known sources that hold for the whole server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from test_admission import ALICE, BOB, Bench, Clock, Limits, speak
from triosspi.service.admission.tables import COUNTS, WAYS, Columns, Tables

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers need Linux")

SERVED_ONLY = {"penalties": False}


@pytest.fixture
def tables() -> Iterator[Tables]:
    made = Tables.make(4)
    yield made
    made.close()


def workers(tables: Tables, number: int, limits: Limits | None = None) -> list[Bench]:
    """The admissions of so many processes, which share a clock and the tables."""
    clock = Clock()
    return [
        Bench(limits or Limits(), tables=Tables.of(os.dup(tables.fileno()), column), clock=clock)
        for column in range(number)
    ]


@pytest.mark.parametrize("number", [1, 2, 4])
def test_wrong_passwords_of_one_source_are_looked_at_as_often_with_any_number_of_workers(
    tables: Tables, number: int
) -> None:
    benches = workers(tables, number)
    looked_at = 0
    for attempt in range(200):
        bench = benches[attempt % number]
        if bench.cause(ALICE) is None:
            bench.fail(ALICE)
            looked_at += 1
    # Three are free, and the fourth is one too many.
    assert looked_at == 4
    assert all(bench.cause(ALICE) == "penalty" and bench.cause(BOB) is None for bench in benches)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_source_has_as_many_connections_as_it_may_over_all_workers(tables: Tables, number: int) -> None:
    benches = workers(tables, number, Limits(max_connections_per_source=10))
    entries = [benches[index % number].admit(ALICE)[0] for index in range(10)]
    assert all(bench.cause(ALICE) == "source_connections" for bench in benches)
    entries[0].close()
    assert all(bench.cause(ALICE) is None for bench in benches)


def test_a_source_is_served_in_as_many_places_as_it_may_over_all_workers(tables: Tables) -> None:
    one, other = workers(tables, 2, Limits(max_unauthenticated_per_source=3))
    here, there = one.admit(*[ALICE] * 3), other.admit(*[ALICE] * 3)
    assert speak(*here[:2], *there) == [True, True, True, False, False]
    here[0].authenticated()
    # The other process hears of it when it looks.
    other.admission.advance()
    assert [entry.has_turn for entry in there] == [True, True, False]


def test_a_wide_prefix_is_counted_over_all_workers(tables: Tables) -> None:
    one, other = workers(tables, 2, Limits(max_connections_per_source=1))
    addresses = [IPv6Address((0x20010DB8 << 96) + (number << 64)) for number in range(5)]
    one.admit(*addresses[:2])
    other.admit(*addresses[2:4])
    assert [bench.cause(addresses[4]) for bench in (one, other)] == ["source_connections"] * 2


def test_a_login_with_one_worker_speaks_for_its_source_with_all(tables: Tables) -> None:
    one, other = workers(tables, 2)
    one.admit(ALICE)[0].authenticated()
    assert [entry.favoured for entry in other.admit(ALICE, BOB)] == [True, False]


def test_sessions_of_a_principal_are_counted_over_all_workers(tables: Tables) -> None:
    one, other = workers(tables, 2, Limits(max_sessions_per_principal=2))
    (first,), (second,), (third,) = one.admit(ALICE), other.admit(BOB), other.admit(BOB)
    for entry in (first, second):
        assert entry.check_principal("alice", guessable=True) is None
        entry.authenticated("alice")
    assert third.check_principal("alice", guessable=True) == "sessions"
    assert third.check_principal("bob", guessable=True) is None
    first.close()
    assert third.check_principal("alice", guessable=True) is None


def test_what_a_dead_worker_had_is_forgotten_and_its_penalties_stand(tables: Tables) -> None:
    columns = Columns(tables, 2)
    mine, its = columns.take(), columns.take()
    assert (mine, its, columns.take()) == (0, 1, None)
    limits = Limits(max_connections_per_source=1)
    one, other = workers(tables, 2, limits)
    other.admit(ALICE)
    other.admission.sources.penalise(BOB, "protocol")
    assert one.cause(ALICE) == "source_connections"
    columns.give_back(its)
    assert [one.cause(ALICE), one.cause(BOB)] == [None, "penalty"]
    assert columns.take() == 1


def test_who_finds_no_cell_is_counted_by_its_own_process_only() -> None:
    made = Tables.make(2)
    full, other = (Tables.of(os.dup(made.fileno()), column) for column in range(2))
    for number in range(COUNTS * 2):
        full.publish(number.to_bytes(8, "little"), 3, 2)
    seen = [other.others(number.to_bytes(8, "little")) for number in range(COUNTS * 2)]
    assert set(seen) == {(3, 2), (0, 0)}
    assert seen.count((3, 2)) <= COUNTS
    assert seen.count((3, 2)) > COUNTS * 0.9
    made.close()


def test_nobody_can_foresee_whose_cells_an_address_falls_on() -> None:
    one, other = Tables.alone(), Tables.alone()
    assert one.hash(b"x") == one.hash(b"x") != other.hash(b"x")
    assert len(one.penalties) % WAYS == 0


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 70_000), st.integers(0, 70_000)), max_size=60
    )
)
def test_every_process_sees_the_sum_of_what_the_others_have_said_last(moves: list[tuple[int, int, int, int]]) -> None:
    made = Tables.make(3)
    processes = [Tables.of(os.dup(made.fileno()), column) for column in range(3)]
    said: dict[tuple[int, int], tuple[int, int]] = {}
    for process, key, first, second in moves:
        processes[process].publish(bytes([key]), first, second)
        # Beyond that they are as many.
        said[process, key] = min(first, 65_535), min(second, 65_535)
        for looking, tables in enumerate(processes):
            others = [said.get((other, key), (0, 0)) for other in range(3) if other != looking]
            assert tables.others(bytes([key])) == (sum(one for one, _ in others), sum(two for _, two in others))
    made.close()


ATTACKER = """
import sys
from ipaddress import IPv4Address
import time
sys.path.insert(0, sys.argv[3])
from test_admission import Limits
from triosspi.service.admission.admission import Admission, Dropped
from triosspi.service.admission.tables import Tables
admission = Admission(Limits(), clock=time.monotonic, tables=Tables.of(int(sys.argv[1]), int(sys.argv[2])))
looked_at = 0
for _ in range(50):
    try:
        entry = admission.admit(IPv4Address("192.0.2.1"))
    except Dropped:
        continue
    entry.failed("auth")
    entry.close()
    looked_at += 1
print(looked_at)
"""


def test_processes_that_do_so_at_the_same_moment_lose_at_most_what_they_do_at_the_same_moment(tables: Tables) -> None:
    command = [sys.executable, "-c", ATTACKER, str(tables.fileno())]
    tests = os.path.dirname(__file__)
    running = [
        subprocess.Popen([*command, str(column), tests], pass_fds=[tables.fileno()], stdout=subprocess.PIPE, text=True)
        for column in range(4)
    ]
    looked_at = sum(int(process.communicate()[0]) for process in running)
    # Four in turns; each of the four may have been in the middle of one when each of those was counted.
    assert 4 <= looked_at <= 4 * 4
    assert workers(tables, 1)[0].clock.now < time.monotonic() + 1e9


def test_a_process_that_shares_with_nobody_needs_no_file() -> None:
    bench = Bench(tables=Tables.alone())
    assert Tables.alone().fileno() == -1
    bench.fail(IPv4Address(1), "protocol")
    assert bench.cause(IPv4Address(1)) == "penalty"
