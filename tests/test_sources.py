"""Sources from which somebody has logged in: remembered for a month, in a table that never grows."""

from __future__ import annotations

import random

from harness import Clock
from triosspi.service.admission.sources import HOURS, KnownSources
from triosspi.service.admission.tables import KNOWN, Tables

HOUR = 3600.0


def test_a_source_is_known_from_its_first_login_for_a_month_after_its_last() -> None:
    clock = Clock()
    known = KnownSources(Tables.alone(), clock)
    assert not known.knows(b"7")
    for _ in range(3):
        known.remember(b"7")
        clock.now += (HOURS - 1) * HOUR
        assert known.knows(b"7")
    clock.now += HOUR
    assert not known.knows(b"7")
    assert not known.knows(b"8")


def test_a_server_that_runs_for_years_still_tells_new_from_old() -> None:
    clock = Clock()
    known = KnownSources(Tables.alone(), clock)
    # The hour has 16 bits.
    for _ in range(20):
        known.remember(b"7")
        clock.now += 65_535 / 7 * HOUR
        assert not known.knows(b"7")
    clock.now += 65_535 * HOUR * 3 - 30 * HOUR
    known.remember(b"7")
    assert known.knows(b"7")


def test_many_more_sources_than_there_is_room_for_leave_it_full_of_the_latest() -> None:
    clock = Clock()
    known = KnownSources(Tables.alone(), clock)
    rng = random.Random(5)
    size = known._cells.nbytes
    early, late = ([rng.randbytes(8) for _ in range(KNOWN // 4)] for _ in range(2))
    for crowd in (early, [rng.randbytes(8) for _ in range(KNOWN)], late):
        for source in crowd:
            known.remember(source)
        clock.now += 2 * HOUR
    assert known._cells.nbytes == size == 8 * KNOWN
    assert sum(map(known.knows, late)) > 0.95 * len(late)
    assert sum(map(known.knows, early)) < 0.5 * len(early)
    assert sum(known.knows(rng.randbytes(8)) for _ in range(10_000)) == 0
