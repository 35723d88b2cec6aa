"""Honest clients among hostile ones, against a server in a process of its own.

Used by ``test_crowd.py``, which asks whether every honest login succeeds and whether memory stays flat, and
by ``bench/bench_crowd.py``, which asks how long they took.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from forge import Client
from triosspi import Initiator, open_negotiate_stream, open_sspi_over_tcp_channel
from triosspi.service import account_editor

PASSWORD = "a password of the crowd"


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    port: int

    def resident(self) -> int:
        """Its memory in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]

    def descriptors(self) -> int:
        """How many files it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextmanager
def serve(folder: Path, log: Path, *, wire: str = "framed") -> Iterator[Server]:
    """An echo server with one account, its log in a file."""
    accounts = folder / "accounts"
    account_editor.add(accounts, "DOM\\alice", PASSWORD)
    command = [sys.executable, "-m", "triosspi", "serve", "--wire", wire, "--host", "127.0.0.1", "--port", "0"]
    # All come from one address, and the server is to bear the hostile ones, not to shut them out.
    command += ["--no-penalties", "--max-unauthenticated-per-source", "off", "--max-unauthenticated", "1000:30:2000"]
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [*command, "--accounts", str(accounts)], stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            yield Server(process, int(re.search(r":(\d+)$", line.strip())[1]))  # type: ignore[index]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)


# Honest


async def log_in_and_echo(port: int, *, stream: bool = False) -> float:
    """Connect, log in, have one message (or a NegotiateStream) echoed, leave; returns the seconds until the echo."""
    initiator = Initiator(username="DOM\\alice", password=PASSWORD, mechanism="ntlm")
    start = trio.current_time()
    if stream:
        async with await open_negotiate_stream("127.0.0.1", port, initiator) as talk:
            await talk.send_all(b"hello")
            assert await talk.receive_some() == b"hello"
            return trio.current_time() - start
    async with await open_sspi_over_tcp_channel("127.0.0.1", port, initiator) as channel:
        await channel.send(b"hello")
        assert await channel.receive() == b"hello"
        return trio.current_time() - start


@dataclass
class Crowd:
    """What became of a crowd of honest clients."""

    seconds: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """Seconds within which this share of the logins was done."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def honest_crowd(port: int, number: int, at_once: int, *, streams: bool = False) -> Crowd:
    """Log in ``number`` times, every other one with a NegotiateStream if there are streams; any failure is an exception."""
    crowd = Crowd()
    limit = trio.CapacityLimiter(at_once)

    async def one(stream: bool) -> None:
        async with limit:
            crowd.seconds.append(await log_in_and_echo(port, stream=stream))

    async with trio.open_nursery() as nursery:
        for index in range(number):
            nursery.start_soon(one, streams and index % 2 == 0)
    return crowd


# Hostile: each comes, does its mischief, and goes

Mischief = Callable[[trio.SocketStream, random.Random], Awaitable[None]]


async def half_open(stream: trio.SocketStream, rng: random.Random) -> None:
    """Says nothing, and waits to be thrown out."""
    await stream.receive_some()


async def resetting(stream: trio.SocketStream, rng: random.Random) -> None:
    """Cuts a token in two by a reset."""
    await stream.send_all(struct.pack("<I", 100) + bytes(rng.randrange(100)))
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def trickling(stream: trio.SocketStream, rng: random.Random) -> None:
    """Sends a token byte by byte."""
    token = Client().negotiate()
    for byte in struct.pack("<I", len(token)) + token:
        await stream.send_all(bytes([byte]))
        await trio.sleep(0.05)


async def lying(stream: trio.SocketStream, rng: random.Random) -> None:
    """Announces more than it sends."""
    length = rng.choice([0, 65_536, 65_537, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    await stream.send_all(struct.pack("<I", length) + rng.randbytes(50))
    await stream.receive_some()


async def raving(stream: trio.SocketStream, rng: random.Random) -> None:
    """Sends noise that begins like a token."""
    start = rng.choice([b"NTLMSSP\0\1\0\0\0", b"\x60\x48\x06\x06\x2b\x06\x01\x05\x05\x02", b""])
    token = start + rng.randbytes(rng.randrange(1, 200))
    await stream.send_all(struct.pack("<I", len(token)) + token)
    await stream.receive_some()


async def guessing(stream: trio.SocketStream, rng: random.Random) -> None:
    """Tries a password."""
    client = Client(user="alice", password=str(rng.random()))
    token = client.negotiate()
    await stream.send_all(struct.pack("<I", len(token)) + token)
    answer = b""
    while len(answer) < 4 or len(answer) < 4 + struct.unpack("<I", answer[:4])[0]:
        answer += (await stream.receive_some()) or bytes(4)
    token = client.authenticate(answer[4:])
    await stream.send_all(struct.pack("<I", len(token)) + token)
    assert not await stream.receive_some()


async def leaving(stream: trio.SocketStream, rng: random.Random) -> None:
    """Goes in the middle of the handshake."""
    token = Client().negotiate()
    await stream.send_all(struct.pack("<I", len(token)) + token)


MISCHIEF: list[Mischief] = [half_open, resetting, trickling, lying, raving, guessing, leaving]


# The same of .NET's NegotiateStream


def stream_message(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BHH", kind, 0x0100, len(payload)) + payload


async def receive_stream_message(stream: trio.SocketStream) -> bytes:
    """Its id and payload; nothing where the server has closed."""
    said = b""
    while len(said) < 5 or len(said) < 5 + int.from_bytes(said[3:5], "big"):
        if not (more := await stream.receive_some()):
            return b""
        said += more
    return said[:1] + said[5:]


async def stopping(stream: trio.SocketStream, rng: random.Random) -> None:
    """Begins a message, and says no more."""
    await stream.send_all(stream_message(0x16, Client().negotiate())[: rng.randrange(1, 30)])
    await stream.receive_some()


async def ambiguous(stream: trio.SocketStream, rng: random.Random) -> None:
    """Begins as both wire formats do, and goes on as neither."""
    await stream.send_all(b"\x16\x01\x00\x00" + rng.randbytes(rng.randrange(100)))
    await stream.receive_some()


async def confusing(stream: trio.SocketStream, rng: random.Random) -> None:
    """Says that it is done, that it refuses, or what no message is."""
    await stream.send_all(stream_message(0x16, Client().negotiate()))
    await receive_stream_message(stream)
    await stream.send_all(stream_message(rng.choice([0x14, 0x15, 0x16, 0x17]), rng.randbytes(rng.randrange(20))))
    await stream.receive_some()


async def guessing_thrice(stream: trio.SocketStream, rng: random.Random) -> None:
    """Tries passwords until the server has had enough."""
    answer = b"\x15"
    tries = 0
    while answer[:1] == b"\x15":
        client = Client(user="alice", password=str(rng.random()))
        await stream.send_all(stream_message(0x16, client.negotiate()))
        if not (answer := await receive_stream_message(stream)):
            break
        await stream.send_all(stream_message(0x14, client.authenticate(answer[1:])))
        answer = await receive_stream_message(stream)
        tries += 1
    assert tries <= 3


STREAM_MISCHIEF: list[Mischief] = [stopping, ambiguous, confusing, guessing_thrice]


@asynccontextmanager
async def hostile_crowd(port: int, number: int, *, streams: bool = False) -> AsyncIterator[list[int]]:
    """Keep ``number`` hostile clients busy; yields a list in which one number counts their visits."""
    visits = [0]
    kinds = MISCHIEF + (STREAM_MISCHIEF if streams else [])

    async def one(index: int) -> None:
        rng = random.Random(index)
        mischief = kinds[index % len(kinds)]
        while True:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            async with stream:
                visits[0] += 1
                with trio.move_on_after(1.0):
                    with suppress(trio.BrokenResourceError):
                        await mischief(stream, rng)
            # As fast as this, and not faster: one core must serve them all, and the clients have the other.
            await trio.sleep(rng.uniform(0.5, 1.5))

    async with trio.open_nursery() as nursery:
        for index in range(number):
            nursery.start_soon(one, index)
        yield visits
        nursery.cancel_scope.cancel()
