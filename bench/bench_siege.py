"""What honest clients notice of a siege: those who are logged in, and those who want to.

    python bench/bench_siege.py [--quick]

First, those who are logged in, among 2,000 half-open connections, and 1,000 logins a second that fail: 50 clients send 20 messages a second each, at times that were fixed before: a reply that is late makes the next one late, too,
and the latency is counted from when a message should have been sent. Quiet time and siege take turns against one server.
It is on one core, the clients and the attackers on the other, of which the attackers take what the clients leave
(`attackers.py`).

Two servers: one with the penalties that are there by default, which shut out an address after a few failed logins, so that most
of the attackers' are closed when they come; and one without, which has to look at every one of them. Both let the half-open
ones sit for as long as they like.

Then, newcomers: 20 a second on average, each from an address where nobody has logged in before, log in and have a message echoed
by a server whose configuration is the default. Meanwhile 400 or 2,000 half-open connections sit there, each from an address of
its own, and come back at once when they are thrown out; they have said nothing, one byte, or a first message. Counted are those
that have their echo within a second.
"""

import heapq
import json
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import load as clients
import newcomers
from baselines import servers
from baselines.servers import Kind, Server, Setting, core
from measure import versions
from report import Advance, Figure, Goal, Outcome, run_alone

ESTABLISHED, PERIOD, SIZE = 50, 0.05, 32
HALF_OPEN, RATE = 2_000, 1_000

_ROOM = (
    # The half-open ones are to sit there, and not to be thrown out and to come back: that is what the others do.
    *("--handshake-timeout", "1h", "--penalty-exempt", "127.1.0.0/16", "--log-level", "error"),
)
_OURS = servers.OURS_NTLM
KINDS = (
    replace(_OURS, name="with penalties", command=(*_OURS.command, *_ROOM)),
    replace(_OURS, name="without", command=(*_OURS.command, *_ROOM, "--no-penalties")),
)
DEFAULTS = replace(_OURS, name="newcomers", command=(*_OURS.command, "--log-level", "error"))
SITTERS = tuple((number, says) for number in (400, 2_000) for says in ("nothing", "a byte", "a token"))
SETTLING = 8.0
NEWCOMERS, WITHIN = 20, "newcomers with their echo within 1 s, %"
NEW_P50, NEW_P99 = "p50 of newcomers who got in, ms", "p99 of newcomers who got in, ms"
P50, P99 = "p50 of those who are logged in, ms", "p99 of those who are logged in, ms"
ATTACK = "the attackers', per second"
QUIET, HALF, ALL = "quiet", "half-open ones", "and logins that fail"
STAGES = {QUIET: (0, 0), HALF: (HALF_OPEN, 0), ALL: (HALF_OPEN, RATE)}


class Paced:
    """Clients that send at fixed times, and the latencies of their messages."""

    def __init__(self, connections: list[clients.Connection]) -> None:
        self._connections = connections
        self._by_fd = {connection.sock.fileno(): connection for connection in connections}
        self._poll = select.epoll()
        for fd in self._by_fd:
            self._poll.register(fd, select.EPOLLIN)
        self._reply_size = SIZE + connections[0].wire.overhead
        self._buffer = bytearray(clients.RECEIVE_SIZE)

    def run(self, seconds: float, rng: random.Random) -> list[float]:
        """Seconds until each reply."""
        message = os.urandom(SIZE)
        begin = time.perf_counter() + 0.01
        due = [(begin + rng.random() * PERIOD, fd) for fd in self._by_fd]
        heapq.heapify(due)
        latencies: list[float] = []
        under_way = 0
        while due or under_way:
            now = time.perf_counter()
            while due and due[0][0] <= now:
                when, fd = heapq.heappop(due)
                connection = self._by_fd[fd]
                connection.sent.append([when, 1])
                connection.send(connection.wire.pack([message]))
                under_way += 1
                if when + PERIOD < begin + seconds:
                    heapq.heappush(due, (when + PERIOD, fd))
            # epoll sleeps for whole milliseconds, so the last part is looked at without sleeping.
            left = due[0][0] - time.perf_counter() if due else clients.SILENCE
            for fd, _ in self._poll.poll(max(0.0, left - 0.001)):
                under_way -= self._receive(self._by_fd[fd], latencies)
        return latencies

    def _receive(self, connection: clients.Connection, latencies: list[float]) -> int:
        got = connection.receive_into(self._buffer)
        if got == 0:
            raise ConnectionError("the server has closed a connection of those who are logged in")
        now = time.perf_counter()
        done, connection.partial = divmod(connection.partial + max(0, got), self._reply_size)
        latencies.extend(now - connection.sent.popleft()[0] for _ in range(done))
        return done


class Siege:
    """The attackers' process."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def set(self, half_open: int, rate: float, says: str = "nothing") -> dict[str, int]:
        """How many there are to be from now on; returns what was done until now."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"half_open": half_open, "says": says, "rate": rate}) + "\n")
        self._process.stdin.flush()
        done: dict[str, int] = json.loads(self._process.stdout.readline())
        return done


@contextmanager
def siege(server: Server, where: Setting) -> Iterator[Siege]:
    """Attackers of a server; they do nothing yet."""
    command = [sys.executable, str(servers.BENCH / "attackers.py"), "--port", str(server.port)]
    process = subprocess.Popen(command, env=where.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            os.sched_setaffinity(process.pid, core(1))
            yield Siege(process)
        finally:
            process.kill()


def steps(_quick: bool, repeats: int) -> int:
    """How often `measure` advances."""
    return repeats * (len(KINDS) * len(STAGES) + len(SITTERS) + 1)


def one_server(
    kind: Kind, where: Setting, repeats: int, seconds: float, advance: Advance
) -> tuple[dict[str, dict[str, Figure]], dict[str, Figure]]:
    """p50 and p99 by stage, and what the attackers have done."""
    latencies: dict[str, dict[str, list[float]]] = {P50: {}, P99: {}}
    attacks: dict[str, list[float]] = {}
    rng = random.Random(7)
    with servers.serve(kind, where) as server, siege(server, where) as attackers:
        established = Paced(clients.connect(server.port, "ntlm", ESTABLISHED))
        # The first addresses are shut out after some logins each; a siege is longer than that.
        attackers.set(HALF_OPEN, RATE)
        established.run(2.0 + seconds, rng)
        for _ in range(repeats):
            for stage, (half_open, rate) in STAGES.items():
                attackers.set(half_open, rate)
                # Until it has settled.
                established.run(1.0, rng)
                attackers.set(half_open, rate)
                begin = time.perf_counter()
                found = [(seconds, 1) for seconds in established.run(seconds, rng)]
                done, took = attackers.set(half_open, rate), time.perf_counter() - begin
                for unit, share in ((P50, 0.5), (P99, 0.99)):
                    latencies[unit].setdefault(stage, []).append(clients.percentile(found, share) * 1e3)
                if stage == ALL:
                    for what in (
                        "logins tried",
                        "logins refused",
                        "logins shut out",
                        "logins that found the queue full",
                    ):
                        attacks.setdefault(what, []).append(done.get(what, 0) / took)
                    attacks.setdefault("half-open now (not per second)", []).append(done["half-open now"])
                advance(f"{kind.name}: {stage}")
    return (
        {unit: {stage: Figure(tuple(found)) for stage, found in stages.items()} for unit, stages in latencies.items()},
        {what: Figure(tuple(found)) for what, found in attacks.items()},
    )


def newcomers_of(where: Setting, repeats: int, seconds: float, advance: Advance) -> dict[str, dict[str, Figure]]:
    """Who gets in, and how fast, by unit and by who sits there."""
    found: dict[str, dict[str, list[float]]] = {WITHIN: {}, NEW_P50: {}, NEW_P99: {}}
    rng = random.Random(7)
    with servers.serve(DEFAULTS, where) as server, siege(server, where) as attackers:
        for _ in range(repeats):
            for number, says in ((0, "nothing"), *SITTERS):
                what = f"{number:,} with {says}" if number else QUIET
                attackers.set(number, 0, says)
                # Until all of them have been accepted, and those before them have gone.
                time.sleep(SETTLING)
                took = newcomers.come(server.port, seconds, NEWCOMERS, rng)
                good = [(seconds, 1) for seconds in took if seconds is not None]
                found[WITHIN].setdefault(what, []).append(100 * len(good) / len(took))
                for unit, share in ((NEW_P50, 0.5), (NEW_P99, 0.99)):
                    # Nobody: as if it had been a whole second.
                    value = clients.percentile(good, share) if good else newcomers.PATIENCE
                    found[unit].setdefault(what, []).append(value * 1e3)
                advance(f"newcomers: {what}")
    return {unit: {row: Figure(tuple(values)) for row, values in rows.items()} for unit, rows in found.items()}


def measure(quick: bool, repeats: int, advance: Advance) -> Outcome:
    """Run it all."""
    seconds = 1.0 if quick else 4.0
    outcome = Outcome(
        f"{versions('triosspi', 'trio', 'pyspnego')}; {ESTABLISHED} clients with {1 / PERIOD:g} messages of {SIZE} B a second "
        f"each; {HALF_OPEN:,} half-open connections, {RATE:,} logins a second that fail; "
        f"{repeats} repeats of {seconds:g} s of each, in turns; median [spread]"
    )
    with tempfile.TemporaryDirectory() as folder, servers.setting(Path(folder)) as where:
        os.environ["BENCH_PASSWORD"] = servers.PASSWORD
        for kind in KINDS:
            latencies, attacks = one_server(kind, where, repeats, seconds, advance)
            for unit, stages in latencies.items():
                outcome.figures.setdefault(unit, {})[kind.name] = stages
            outcome.figures.setdefault(ATTACK, {})[kind.name] = attacks
            for stage in (HALF, ALL):
                ratio = latencies[P99][stage].ratio_to(latencies[P99][QUIET])
                outcome.goals.append(Goal(f"p99, {kind.name}: {stage} to quiet", ratio, 1.5))
        for unit, rows in newcomers_of(where, repeats, seconds, advance).items():
            outcome.figures[unit] = {DEFAULTS.name: rows}
            if unit == WITHIN:
                outcome.goals += [Goal(f"{unit}: {row}", figure, 99, "at least") for row, figure in rows.items()]
    return outcome


if __name__ == "__main__":
    sys.exit(run_alone(__doc__ or "", steps, measure))
