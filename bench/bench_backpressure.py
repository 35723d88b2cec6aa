"""Peers that send and do not read: what they hold of a server's memory, and what they do to others.

    python bench/bench_backpressure.py [--quick]

Each has logged in, and sends messages to be echoed without ever reading a reply, until nothing goes any more: then the
kernel's buffers are full in both directions, and the server must have stopped reading. What it holds by then, for as long as
they please, is the batch that it has read last, opened and sealed again; it must not depend on how much they would send.
Memory is what the server's resident set grows by. The kernel's buffers come on top, and in a container they count as its
memory, too; net.ipv4.tcp_rmem, tcp_wmem and tcp_mem bound them. Shown is what all of TCP has more of on this machine, of which the
peers have made their own ends small. Meanwhile others are served: their p99 beside that of the time before.

Linux only. Every repeat has a server of its own.
"""

import os
import re
import resource
import socket
import sys
import tempfile
import time
from pathlib import Path

import load as clients
from baselines import servers
from baselines.servers import Setting
from measure import versions
from report import Advance, Figure, Goal, Outcome, run_alone

KIND = servers.OURS_NTLM
#: Peers, and bytes of each message that they send.
CASES = ((500, 1024), (500, 65536), (100, 1 << 20))
QUICK_CASES = ((500, 65536),)
#: Served meanwhile, with a message of so many bytes each.
OTHERS, SIZE = 20, 32
# Seconds without any progress after which everything is full, and for which nothing may grow any more.
STILL, LONGER = 0.5, 3.0
# What a server reads at a time; one message of a batch may have begun in the one before.
CHUNK = 65536
# What the peers let their own kernel keep.
PEERS_BUFFER = 65536

MEMORY = "KiB of the server's memory for each peer that does not read"
KERNEL = "KiB of the kernel's memory for each of them"
LATER = f"MiB that all of them together take in {LONGER:g} s more of trying"
LATENCY = "p99 of others, ratio to before"


class Sender:
    """One peer that does not read."""

    def __init__(self, connection: clients.Connection, size: int) -> None:
        self._connection = connection
        self._message = os.urandom(size)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.sock.setsockopt(socket.SOL_SOCKET, option, PEERS_BUFFER)
        self.sent = 0

    def push(self) -> bool:
        """Send what goes; whether anything went."""
        before = self.sent
        while True:
            connection = self._connection
            if not connection.to_send:
                connection.send(connection.wire.pack([self._message]))
                self.sent += 1
            left = len(connection.to_send)
            connection.flush()
            if connection.to_send:
                return self.sent > before or len(connection.to_send) < left


def kernel_memory() -> int:
    """Bytes that the kernel has in TCP's buffers."""
    sockets = Path("/proc/net/sockstat").read_text()
    return int(re.search(r"^TCP: .*mem (\d+)", sockets, re.MULTILINE)[1]) * resource.getpagesize()  # type: ignore[index]


def push_until_full(senders: list[Sender]) -> None:
    """Send until nothing goes for a while."""
    last = time.monotonic()
    while time.monotonic() - last < STILL:
        # All of them, not only until one has.
        if sum(sender.push() for sender in senders):
            last = time.monotonic()
        else:
            time.sleep(0.02)


def one_repeat(where: Setting, number: int, size: int, seconds: float) -> dict[str, float]:
    """Figures of a fresh server, by their names."""
    with servers.serve(KIND, where) as server, servers.load(server, where, OTHERS) as others:
        for connection in clients.connect(server.port, "ntlm", 50):
            connection.sock.close()
        before = others.run(SIZE, 1, seconds)
        senders = [Sender(connection, size) for connection in clients.connect(server.port, "ntlm", number)]
        idle, kernel = server.resident(), kernel_memory()
        push_until_full(senders)
        full, kernel = server.resident(), kernel_memory() - kernel
        meanwhile = others.run(SIZE, 1, seconds)
        deadline = time.monotonic() + LONGER
        while time.monotonic() < deadline:
            for sender in senders:
                sender.push()
            time.sleep(0.05)
        return {
            MEMORY: (full - idle) / number / 1024,
            KERNEL: kernel / number / 1024,
            LATER: (server.resident() - full) / (1 << 20),
            LATENCY: meanwhile["p99"] / before["p99"],
        }


def steps(quick: bool, repeats: int) -> int:
    """How often `measure` advances."""
    return repeats * len(QUICK_CASES if quick else CASES)


def measure(quick: bool, repeats: int, advance: Advance) -> Outcome:
    """Run it all."""
    outcome = Outcome(
        f"{versions('triosspi', 'trio', 'pyspnego')}; {repeats} repeats, a fresh server for each; "
        f"p99 of {OTHERS} connections with 1 message of {SIZE} B outstanding; median [spread]"
    )
    with tempfile.TemporaryDirectory() as folder, servers.setting(Path(folder)) as where:
        os.environ["BENCH_PASSWORD"] = servers.PASSWORD
        for number, size in QUICK_CASES if quick else CASES:
            name = f"{number} peers, messages of {size // 1024} KiB"
            samples = []
            for _ in range(repeats):
                samples.append(one_repeat(where, number, size, 0.3 if quick else 1.0))
                advance(name)
            for unit in samples[0]:
                figure = Figure(tuple(sample[unit] for sample in samples))
                outcome.figures.setdefault(unit, {})[name] = {"triosspi, NTLM": figure}
            memory = outcome.figures[MEMORY][name]["triosspi, NTLM"]
            # Received, opened and sealed again.
            limit = Figure(tuple(held / (3 * (size + CHUNK) / 1024) for held in memory.samples))
            outcome.goals.append(Goal(f"memory to 3 x (a message + {CHUNK // 1024} KiB), {name}", limit, 1.0))
    return outcome


if __name__ == "__main__":
    sys.exit(run_alone(__doc__ or "", steps, measure))
