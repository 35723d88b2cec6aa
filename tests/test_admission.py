"""Who may connect: caps, random early drop, penalties; against a model that remembers everything."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triosspi import ConfigurationError
from triosspi.service.network.addresses import IPAddress, IPNetwork, unmapped
from triosspi.service.network.admission import Admission, Dropped, Entry, MaxStartups, source_key
from triosspi.service.network.penalties import PenaltyPolicy

ALICE = IPv4Address("192.0.2.1")
BOB = IPv4Address("192.0.2.2")
CAROL = IPv6Address("2001:db8:0:1::1")
CAROL_TOO = IPv6Address("2001:db8:0:1:ffff::2")
DAVE = IPv6Address("2001:db8:0:2::1")


NO_EARLY_DROP = MaxStartups(1000, 100, 1000)


@dataclass(frozen=True)
class Limits:
    max_connections: int = 1000
    max_connections_per_source: int | None = None
    max_unauthenticated: MaxStartups = NO_EARLY_DROP
    max_unauthenticated_per_source: int | None = None
    penalties: bool = True
    penalty_exempt: tuple[IPNetwork, ...] = ()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class NoDice:
    def random(self) -> float:
        raise AssertionError("no dice were to be thrown")


@dataclass
class Bench:
    """An admission with what it was given."""

    limits: Limits = field(default_factory=Limits)
    dice: Any = field(default_factory=NoDice)
    policy: PenaltyPolicy | None = None

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.admission = Admission(self.limits, clock=self.clock, random=self.dice, policy=self.policy)

    def admit(self, *addresses: IPAddress | None) -> list[Entry]:
        return [self.admission.admit(address) for address in addresses]

    def cause(self, address: IPAddress | None) -> str | None:
        """Why a newcomer is dropped; one that is not is gone again at once."""
        try:
            entry = self.admission.admit(address)
        except Dropped as exc:
            return exc.cause
        entry.close()
        return None

    def fail(self, address: IPAddress, failure: Any = "auth", times: int = 1) -> None:
        for _ in range(times):
            entry = self.admission.admit(address)
            entry.failed(failure)
            entry.close()


# ---- start:rate:full ----


@pytest.mark.parametrize("text", ["100:30:500", "1:1:1", "10:100:10"])
def test_a_limit_with_early_drop_is_read_and_written_as_openssh_does(text: str) -> None:
    assert str(MaxStartups.parse(text)) == text


def test_a_lone_number_is_a_limit_without_early_drop() -> None:
    limit = MaxStartups.parse("7")
    assert limit == MaxStartups(7, 100, 7)
    assert [limit.percentage(pending) for pending in (0, 6, 7, 8)] == [0, 0, 100, 100]


@pytest.mark.parametrize(
    "text",
    ["", "x", "10:30", "10:30:", "10:30:60:1", "-1:30:60", "+1:30:60", " 10:30:60", "10:30:60\n", "1_0:30:60", "\N{ARABIC-INDIC DIGIT ONE}:30:60",
     "0", "0:30:60", "10:0:60", "10:101:60", "60:30:10", "9" * 5000, "10:30.5:60"],
)  # fmt: skip
def test_what_is_not_start_rate_full_is_an_error(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        MaxStartups.parse(text)
    assert len(str(caught.value)) < 200


def test_the_chance_of_a_drop_grows_evenly_from_the_rate_at_start_to_certainty_at_full() -> None:
    limit = MaxStartups(100, 30, 500)
    assert [limit.percentage(pending) for pending in (0, 99, 100, 300, 499, 500, 9999)] == [
        *(0, 0, 30, 65, pytest.approx(99.825), 100, 100),
    ]


@dataclass
class Dice:
    """Throws what it is told to."""

    throws: Iterator[float]

    def random(self) -> float:
        return next(self.throws)


def test_newcomers_are_dropped_at_random_between_start_and_full() -> None:
    # Two are let in without dice. Then it is 50 % with two pending, 75 % with three; with four nobody throws.
    bench = Bench(Limits(max_unauthenticated=MaxStartups(2, 50, 4)), Dice(iter([0.49, 0.5, 0.74, 0.75])))
    bench.admit(None, ALICE)
    for _ in range(2):
        assert bench.cause(BOB) == "startups"
        bench.admit(BOB)
    assert [bench.cause(BOB), bench.cause(None)] == ["startups", "startups"]
    assert bench.admission.pending == 4


def test_early_drops_come_as_often_as_they_should() -> None:
    bench = Bench(Limits(max_unauthenticated=MaxStartups(10, 30, 20)), random.Random(7))
    bench.admit(*[None] * 9)
    entries: list[Entry] = []
    while len(entries) < 6:
        try:
            entries += bench.admit(None)
        except Dropped:
            continue
    # Fifteen are pending: 65 %.
    dropped = sum(bench.cause(ALICE) == "startups" for _ in range(10_000))
    assert 6300 < dropped < 6700


def test_who_has_logged_in_is_not_pending_any_more() -> None:
    bench = Bench(Limits(max_unauthenticated=MaxStartups.parse("2")))
    first, second = bench.admit(ALICE, BOB)
    assert bench.cause(CAROL) == "startups"
    first.authenticated()
    assert (bench.admission.pending, bench.admission.established) == (1, 1)
    assert bench.cause(CAROL) is None
    second.close()
    first.close()
    assert (bench.admission.pending, bench.admission.established) == (0, 0)


# ---- caps ----


def test_there_are_never_more_connections_than_allowed_whoever_they_are() -> None:
    bench = Bench(Limits(max_connections=3))
    entries = bench.admit(ALICE, None, CAROL)
    entries[0].authenticated()
    assert [bench.cause(None), bench.cause(BOB)] == ["connections", "connections"]
    entries[0].close()
    assert bench.cause(BOB) is None


def test_one_source_cannot_take_all_connections() -> None:
    bench = Bench(Limits(max_connections_per_source=2))
    first, second = bench.admit(ALICE, ALICE)
    first.authenticated()
    second.authenticated()
    assert [bench.cause(ALICE), bench.cause(BOB)] == ["source_connections", None]
    first.close()
    assert bench.cause(ALICE) is None


def test_one_source_cannot_take_all_handshakes() -> None:
    bench = Bench(Limits(max_unauthenticated_per_source=2))
    first, _ = bench.admit(ALICE, ALICE)
    assert [bench.cause(ALICE), bench.cause(BOB)] == ["source_unauthenticated", None]
    first.authenticated()
    assert bench.cause(ALICE) is None


def test_who_leaves_after_a_login_does_not_make_room_for_handshakes() -> None:
    bench = Bench(Limits(max_unauthenticated_per_source=1))
    (first,) = bench.admit(ALICE)
    first.authenticated()
    bench.admit(ALICE)
    first.close()
    assert bench.cause(ALICE) == "source_unauthenticated"


def test_an_ipv6_source_is_a_whole_64_and_an_ipv4_source_one_address() -> None:
    bench = Bench(Limits(max_unauthenticated_per_source=1))
    bench.admit(CAROL, ALICE)
    assert bench.cause(CAROL_TOO) == "source_unauthenticated"
    assert bench.cause(DAVE) is None
    assert bench.cause(BOB) is None


def test_an_ipv4_mapped_address_is_the_ipv4_address() -> None:
    # A listener for both families shows all of IPv4 so. As IPv6 they would be one source.
    bench = Bench(Limits(max_unauthenticated_per_source=1))
    bench.admit(IPv6Address("::ffff:192.0.2.1"))
    assert bench.cause(ALICE) == "source_unauthenticated"
    assert bench.cause(IPv6Address("::ffff:192.0.2.2")) is None
    assert unmapped(IPv6Address("::192.0.2.1")) == IPv6Address("::192.0.2.1")


def test_no_two_sources_share_a_key() -> None:
    texts = ["0.0.0.0", "0.0.0.1", "255.255.255.255", "::", "::1:0:0:0:0", "0:0:0:1::", "ffff:ffff:ffff:ffff::"]
    keys = [source_key(ip_address(text)) for text in texts]
    assert len(set(keys)) == len({*texts}) - 1  # two of them are one /64
    assert source_key(IPv6Address("fe80::1%eth0")) == source_key(IPv6Address("fe80::2"))


def test_a_unix_socket_is_only_under_the_caps_on_all() -> None:
    bench = Bench(Limits(max_unauthenticated_per_source=1, max_connections_per_source=1, max_connections=50))
    for entry in bench.admit(*[None] * 50):
        entry.failed("auth")
    assert bench.cause(None) == "connections"
    assert bench.admission.penalised == 0


# ---- the entry ----


def test_an_entry_is_closed_once_however_often_it_is_asked_and_nothing_else_happens_after() -> None:
    bench = Bench(Limits(max_unauthenticated_per_source=5))
    first, second = bench.admit(ALICE, ALICE)
    for _ in range(3):
        first.close()
        first.authenticated()
        first.failed("protocol")
    assert (bench.admission.pending, bench.admission.established, bench.admission.penalised) == (1, 0, 0)
    second.authenticated()
    second.authenticated()
    assert (bench.admission.pending, bench.admission.established) == (0, 1)
    second.close()
    second.close()
    assert (bench.admission.pending, bench.admission.established) == (0, 0)


def test_one_connection_fails_once_and_who_has_logged_in_does_not_fail() -> None:
    bench = Bench(policy=PenaltyPolicy(least=5))
    first, second = bench.admit(ALICE, BOB)
    first.failed("auth")
    first.failed("protocol")
    assert bench.cause(ALICE) is None
    second.authenticated()
    second.failed("protocol")
    assert bench.cause(BOB) is None
    assert bench.admission.penalised == 1


def test_a_connection_through_a_proxy_belongs_to_its_source_once_that_is_known() -> None:
    bench = Bench(Limits(max_unauthenticated_per_source=1))
    first, second, third = bench.admit(None, None, None)
    first.identify(IPv6Address("::ffff:192.0.2.1"))
    with pytest.raises(Dropped) as caught:
        second.identify(ALICE)
    assert caught.value.cause == "source_unauthenticated"
    second.close()
    third.identify(None)
    third.identify(BOB)
    first.failed("protocol")
    first.close()
    assert bench.cause(ALICE) == "penalty"
    assert bench.admission.pending == 1
    with pytest.raises(ValueError, match="known already"):
        third.identify(BOB)


def test_a_penalty_also_holds_for_who_comes_through_a_proxy() -> None:
    bench = Bench()
    bench.fail(ALICE, "protocol")
    (entry,) = bench.admit(None)
    with pytest.raises(Dropped, match="penalty"):
        entry.identify(ALICE)
    entry.close()
    assert bench.admission.pending == 0


def test_identifying_a_connection_that_is_gone_or_logged_in_leaves_the_counters_right() -> None:
    bench = Bench(Limits(max_connections_per_source=1, max_unauthenticated_per_source=1))
    gone, there = bench.admit(None, None)
    gone.close()
    gone.identify(ALICE)
    there.authenticated()
    there.identify(ALICE)
    assert bench.cause(ALICE) == "source_connections"
    there.close()
    assert bench.cause(ALICE) is None


# ---- penalties ----


@pytest.mark.parametrize(
    ("failure", "free", "seconds"), [("auth", 3, 20), ("no_login", 15, 16), ("timeout", 1, 20), ("protocol", 0, 90)]
)
def test_so_many_failures_at_once_are_free_and_the_next_costs_so_long(failure: str, free: int, seconds: float) -> None:
    # OpenSSH 10's figures: authfail 5 s, noauth 1 s, grace-exceeded 10 s, crash 90 s; none below more than 15 s.
    bench = Bench()
    bench.fail(ALICE, failure, free)
    assert bench.cause(ALICE) is None
    bench.fail(ALICE, failure)
    assert bench.cause(ALICE) == "penalty"
    assert bench.cause(BOB) is None
    bench.clock.now += seconds - 0.25
    assert bench.cause(ALICE) == "penalty"
    bench.clock.now += 0.25
    assert bench.cause(ALICE) is None


def test_failures_that_come_slowly_cost_nothing() -> None:
    bench = Bench()
    for _ in range(50):
        bench.fail(ALICE)
        bench.clock.now += 5
    assert bench.cause(ALICE) is None


def test_penalties_add_up_to_ten_minutes_and_no_further() -> None:
    bench = Bench()
    for entry in bench.admit(*[ALICE] * 50):
        entry.failed("protocol")
    bench.clock.now += 599.75
    assert bench.cause(ALICE) == "penalty"
    bench.clock.now += 0.25
    assert bench.cause(ALICE) is None


def test_a_source_that_was_refused_begins_anew_when_its_time_is_over() -> None:
    bench = Bench()
    bench.fail(ALICE, "auth", 4)
    bench.clock.now += 20
    bench.fail(ALICE, "auth", 3)
    assert bench.cause(ALICE) is None


def test_a_penalty_is_for_the_whole_64() -> None:
    bench = Bench()
    bench.fail(CAROL, "protocol")
    assert [bench.cause(CAROL_TOO), bench.cause(DAVE)] == ["penalty", None]


@pytest.mark.parametrize("exempt", ["192.0.2.0/24", "::ffff:192.0.2.0/120"])
def test_exempt_networks_have_no_penalties_whether_they_are_written_as_ipv4_or_mapped(exempt: str) -> None:
    bench = Bench(Limits(penalty_exempt=(ip_network("2001:db8::/32"), ip_network(exempt))))
    for address in (ALICE, CAROL, IPv6Address("::ffff:192.0.2.7")):
        bench.fail(address, "protocol", 3)
        assert bench.cause(address) is None
    bench.fail(IPv4Address("198.51.100.1"), "protocol")
    assert bench.cause(IPv4Address("198.51.100.1")) == "penalty"
    assert bench.admission.penalised == 1


def test_a_source_that_fails_again_just_when_its_penalty_is_over_is_remembered_once() -> None:
    bench = Bench(policy=PenaltyPolicy(no_login=0.25, least=0.5))
    bench.fail(ALICE, "no_login")
    bench.clock.now += 0.5
    # In the same second: the old penalty has not been swept away.
    bench.fail(ALICE, "auth")
    bench.clock.now += 4.75
    assert bench.cause(ALICE) == "penalty"
    bench.clock.now += 1
    assert [bench.cause(ALICE), bench.admission.penalised] == [None, 0]


def test_penalties_can_be_switched_off() -> None:
    bench = Bench(Limits(penalties=False))
    bench.fail(ALICE, "protocol", 5)
    assert bench.cause(ALICE) is None
    assert bench.admission.penalised == 0


def test_when_too_many_sources_are_penalised_who_would_be_free_soonest_is_forgotten() -> None:
    bench = Bench(policy=PenaltyPolicy(max_sources=2, least=0.5))
    bench.fail(ALICE, "protocol")
    bench.fail(BOB, "auth")
    bench.fail(IPv4Address("198.51.100.1"), "timeout")
    bench.fail(CAROL, "no_login")
    assert bench.admission.penalised == 3
    assert [bench.cause(address) for address in (ALICE, BOB, CAROL)] == ["penalty", None, "penalty"]


def test_who_would_be_free_soonest_is_found_also_when_it_came_after_longer_penalties() -> None:
    bench = Bench(policy=PenaltyPolicy(max_sources=2, least=0.5))
    long = [IPv4Address(f"198.51.100.{number}") for number in range(3)]
    for address in long:
        bench.fail(address, "protocol")
    bench.fail(ALICE, "auth")
    assert [bench.cause(address) for address in (*long, ALICE)] == ["penalty", "penalty", None, None]


def test_when_too_many_sources_are_penalised_all_of_their_family_may_be_refused() -> None:
    bench = Bench(policy=PenaltyPolicy(max_sources=2, overflow="deny"))
    late, _ = bench.admit(DAVE, ALICE)
    bench.fail(ALICE, "auth")
    bench.fail(BOB, "auth")
    assert bench.cause(IPv4Address("198.51.100.1")) == "penalty"
    late.failed("auth")
    assert [bench.cause(DAVE), bench.admission.penalised] == [None, 3]
    bench.clock.now += 6
    assert bench.cause(IPv4Address("198.51.100.1")) is None


def test_a_failure_that_finds_the_table_full_is_not_remembered_where_all_are_refused() -> None:
    bench = Bench(policy=PenaltyPolicy(max_sources=1, overflow="deny"))
    first, second = bench.admit(ALICE, BOB)
    first.failed("auth")
    second.failed("auth")
    assert bench.admission.penalised == 1


def test_a_failure_can_cost_nothing() -> None:
    bench = Bench(policy=PenaltyPolicy(no_login=0, least=0))
    bench.fail(ALICE, "no_login", 50)
    assert [bench.cause(ALICE), bench.admission.penalised] == [None, 0]


# ---- reload ----


def test_new_limits_hold_for_newcomers_and_nobody_who_is_there_is_sent_away() -> None:
    bench = Bench()
    entries = bench.admit(ALICE, ALICE, None)
    bench.admission.reconfigure(Limits(max_unauthenticated_per_source=1))
    assert bench.admission.pending == 3
    assert [bench.cause(ALICE), bench.cause(BOB)] == ["source_unauthenticated", None]
    entries[0].close()
    assert bench.cause(ALICE) == "source_unauthenticated"
    entries[1].close()
    assert bench.cause(ALICE) is None
    bench.admission.reconfigure(Limits(max_connections=1))
    assert bench.cause(None) == "connections"


def test_penalties_stand_over_a_reload_unless_they_are_switched_off() -> None:
    bench = Bench()
    bench.fail(ALICE, "protocol")
    bench.admission.reconfigure(Limits(max_connections=5))
    assert bench.cause(ALICE) == "penalty"
    bench.admission.reconfigure(Limits(penalty_exempt=(ip_network("192.0.2.1/32"),)))
    assert bench.cause(ALICE) is None
    bench.admission.reconfigure(Limits(penalties=False))
    bench.admission.reconfigure(Limits())
    assert [bench.cause(ALICE), bench.admission.penalised] == [None, 0]


# ---- nothing grows ----


def test_the_table_of_penalties_is_bounded_and_empties_by_itself() -> None:
    bench = Bench()
    rng = random.Random(3)
    for number in range(70_000):
        bench.fail(IPv6Address((0x20010DB8 << 96) + (number << 64)), rng.choice(["auth", "timeout", "no_login"]))
        bench.clock.now += 1 / 65_536
    assert bench.admission.penalised == 65_536
    bench.clock.now += 700
    # Each call forgets some; none of them all.
    before = bench.admission.penalised
    while bench.admission.penalised:
        assert bench.cause(CAROL) is None
        assert 0 < before - bench.admission.penalised <= 32
        before = bench.admission.penalised
    table = bench.admission._ledger.penalties[6]
    assert not table._by_source
    assert not table._by_second


def test_a_long_quiet_time_is_stepped_over_at_once() -> None:
    bench = Bench()
    bench.fail(ALICE)
    bench.clock.now += 1e9
    assert bench.cause(ALICE) is None
    # The empty seconds between are not walked through.
    assert bench.admission._ledger.penalties[4]._first < 1100
    assert bench.cause(ALICE) is None
    assert bench.admission._ledger.penalties[4]._first > 1e9


def test_a_source_is_counted_only_while_it_is_connected() -> None:
    bench = Bench()
    entries = bench.admit(*[IPv4Address(number) for number in range(500)])
    assert len(bench.admission._ledger._sources) == 500
    for entry in entries:
        entry.close()
    assert not bench.admission._ledger._sources


# ---- against a model that remembers everything and counts anew each time ----


class Model:
    """The same rules without any cleverness."""

    def __init__(self, limits: Limits, policy: PenaltyPolicy) -> None:
        self.limits = limits
        self.policy = policy
        self.alive: list[dict[str, Any]] = []
        self.penalties: dict[tuple[int, int], dict[str, Any]] = {}
        self.order = 0

    def source(self, address: IPAddress) -> tuple[int, int]:
        mapped = getattr(address, "ipv4_mapped", None)
        address = mapped or address
        return (address.version, int(ip_network((address, 32 if address.version == 4 else 64), strict=False)[0]))

    def remembered(self, version: int, now: float) -> list[tuple[int, int]]:
        return [
            key
            for key, penalty in self.penalties.items()
            if key[0] == version and math.floor(penalty["end"]) >= math.floor(now)
        ]

    def full(self, version: int, now: float) -> bool:
        return self.policy.overflow == "deny" and len(self.remembered(version, now)) >= self.policy.max_sources

    def exempt(self, address: IPAddress) -> bool:
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self.limits.penalty_exempt)

    def refusal(self, address: IPAddress, now: float) -> str | None:
        source = self.source(address)
        if self.limits.penalties and not self.exempt(address):
            penalty = self.penalties.get(source)
            if self.full(source[0], now) or (penalty is not None and penalty["active"] and now < penalty["end"]):
                return "penalty"
        return None

    def crowded(self, address: IPAddress) -> str | None:
        mine = [entry for entry in self.alive if entry["source"] == self.source(address)]
        limits = self.limits
        if limits.max_connections_per_source is not None and len(mine) >= limits.max_connections_per_source:
            return "source_connections"
        pending = sum(entry["pending"] for entry in mine)
        if limits.max_unauthenticated_per_source is not None and pending >= limits.max_unauthenticated_per_source:
            return "source_unauthenticated"
        return None

    def pending(self) -> int:
        return sum(entry["pending"] for entry in self.alive)

    def counts(self) -> list[tuple[int, int]]:
        sources = [entry["source"] for entry in self.alive if entry["source"] is not None]
        pending = [entry["source"] for entry in self.alive if entry["pending"]]
        return sorted((sources.count(source), pending.count(source)) for source in set(sources))

    def admit(self, address: IPAddress | None, now: float, throw: float) -> str | None:
        if address is not None and (cause := self.refusal(address, now)):
            return cause
        if len(self.alive) >= self.limits.max_connections:
            return "connections"
        if address is not None and (cause := self.crowded(address)):
            return cause
        startups, pending = self.limits.max_unauthenticated, self.pending()
        if pending >= startups.full:
            return "startups"
        if pending >= startups.start:
            slope = (100 - startups.rate) / (startups.full - startups.start)
            if throw * 100 < startups.rate + slope * (pending - startups.start):
                return "startups"
        return None

    def penalise(self, address: IPAddress, failure: str, now: float) -> None:
        source = self.source(address)
        if not self.limits.penalties or self.exempt(address) or self.full(source[0], now):
            return
        old = self.penalties.get(source)
        if old is not None and old["end"] <= now:
            del self.penalties[source]
            old = None
        seconds = getattr(self.policy, failure)
        end = min(now + seconds if old is None else old["end"] + seconds, now + self.policy.most)
        self.order += 1
        self.penalties[source] = {
            "end": end,
            "active": (old is not None and old["active"]) or end - now > self.policy.least,
            "order": self.order,
        }
        remembered = self.remembered(source[0], now)
        if len(remembered) > self.policy.max_sources:
            del self.penalties[
                min(remembered, key=lambda key: (math.floor(self.penalties[key]["end"]), -self.penalties[key]["order"]))
            ]


ADDRESSES = st.sampled_from(
    [None, ALICE, BOB, CAROL, CAROL_TOO, DAVE, IPv6Address("::ffff:192.0.2.1"), IPv4Address("198.51.100.9")]
    + [IPv6Address((0x20010DB9 << 96) + (number << 64)) for number in range(4)]
)
FAILURES = st.sampled_from(["auth", "no_login", "timeout", "protocol"])
# Quarters of seconds are exact in binary: the model and the real thing agree to the last bit.
STEPS = st.one_of(
    st.tuples(st.just("admit"), ADDRESSES, st.integers(0, 99)),
    st.tuples(st.just("admit"), ADDRESSES, st.integers(0, 99)),
    st.tuples(st.just("identify"), st.integers(0, 30), ADDRESSES),
    st.tuples(st.just("failed"), st.integers(0, 30), FAILURES),
    st.tuples(st.just("come and fail"), ADDRESSES, FAILURES),
    st.tuples(st.just("come and fail"), ADDRESSES, FAILURES),
    st.tuples(st.just("authenticated"), st.integers(0, 30), st.none()),
    st.tuples(st.just("close"), st.integers(0, 30), st.none()),
    st.tuples(st.just("wait"), st.sampled_from([0.25, 1, 3.75, 10, 45, 700]), st.none()),
    st.tuples(st.just("reconfigure"), st.integers(0, 3), st.none()),
)
CAPS = st.none() | st.integers(0, 4)
LIMITS = st.builds(
    Limits,
    max_connections=st.integers(0, 12),
    max_connections_per_source=CAPS,
    max_unauthenticated=st.sampled_from([MaxStartups(1, 20, 6), MaxStartups(3, 50, 9), MaxStartups(12, 100, 12)]),
    max_unauthenticated_per_source=CAPS,
    penalties=st.booleans() | st.just(True),
    penalty_exempt=st.sampled_from([(), (ip_network("192.0.2.2/32"), ip_network("2001:db8:0:2::/64"))]),
)
POLICIES = st.builds(
    PenaltyPolicy,
    no_login=st.sampled_from([0.25, 1.0]),
    least=st.sampled_from([0.25, 4.75, 15.0]),
    most=st.sampled_from([12.0, 600.0]),
    max_sources=st.integers(1, 4),
    overflow=st.sampled_from(["permissive", "deny"]),
)


@settings(derandomize=True, max_examples=500, deadline=None)
@given(st.lists(LIMITS, min_size=4, max_size=4), POLICIES, st.lists(STEPS, max_size=80))
def test_every_decision_is_the_one_of_a_model_that_counts_anew_each_time(
    configurations: list[Limits], policy: PenaltyPolicy, steps: list[tuple[str, Any, Any]]
) -> None:
    throws: list[float] = []
    bench = Bench(configurations[0], Dice(iter(throws.pop, None)), policy)
    model = Model(configurations[0], policy)
    entries: list[tuple[Entry, dict[str, Any]]] = []

    def attempt(call: Any) -> Any:
        try:
            return call()
        except Dropped as exc:
            return exc.cause

    for kind, what, detail in steps:
        now = bench.clock.now
        entry, mirror = entries[what % len(entries)] if entries and isinstance(what, int) else (None, None)
        if kind == "admit":
            throws[:] = [detail / 100]
            result = attempt(lambda address=what: bench.admission.admit(address))
            expected = model.admit(what, now, detail / 100)
            assert (None if isinstance(result, Entry) else result) == expected
            if isinstance(result, Entry):
                source = None if what is None else model.source(what)
                mirror = {"source": source, "address": what, "pending": True, "failed": False}
                model.alive.append(mirror)
                entries.append((result, mirror))
        elif kind == "come and fail":
            throws[:] = [0.999]
            expected = model.admit(what, now, 0.999)
            assert attempt(lambda address=what, how=detail: bench.fail(address, how)) == expected
            if expected is None and what is not None:
                model.penalise(what, detail, now)
        elif kind == "wait":
            bench.clock.now += what
        elif kind == "reconfigure":
            model.limits = configurations[what]
            bench.admission.reconfigure(configurations[what])
            if not model.limits.penalties:
                model.penalties.clear()
        elif entry is None or mirror is None:
            continue
        elif kind == "identify" and mirror["source"] is None and any(mirror is other for other in model.alive):
            result = attempt(lambda entry=entry, address=detail: entry.identify(address))
            expected = None if detail is None else model.refusal(detail, now) or model.crowded(detail)
            assert result == expected
            if detail is not None and expected is None:
                mirror |= {"source": model.source(detail), "address": detail}
        elif kind == "failed":
            entry.failed(detail)
            there = any(mirror is other for other in model.alive)
            if there and mirror["pending"] and not mirror["failed"]:
                mirror["failed"] = True
                if mirror["address"] is not None:
                    model.penalise(mirror["address"], detail, now)
        elif kind == "authenticated":
            entry.authenticated()
            if any(mirror is other for other in model.alive):
                mirror["pending"] = False
        elif kind == "close":
            entry.close()
            model.alive = [other for other in model.alive if other is not mirror]
        assert bench.admission.pending == model.pending()
        assert bench.admission.pending + bench.admission.established == len(model.alive)
        assert bench.admission.penalised <= 2 * policy.max_sources
        counted = bench.admission._ledger._sources.values()
        assert sorted((source.connections, source.pending) for source in counted) == model.counts()
    check_nothing_is_left(bench, entries)


def check_nothing_is_left(bench: Bench, entries: list[tuple[Entry, dict[str, Any]]]) -> None:
    for entry, _ in entries:
        entry.close()
    assert (bench.admission.pending, bench.admission.established) == (0, 0)
    assert not bench.admission._ledger._sources
    for table in bench.admission._ledger.penalties.values():
        assert sorted(key for bucket in table._by_second.values() for key in bucket) == sorted(table._by_source)
        assert all(table._by_second.values())


def test_limits_may_be_any_object_with_these_attributes() -> None:
    assert Bench(replace(Limits(), max_connections=0)).cause(None) == "connections"
