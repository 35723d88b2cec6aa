"""Honest clients that come one by one, each from an address of its own, and log in: `bench_siege.py` counts who gets in."""

import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import load

#: Seconds that a client waits before it says that it did not get in.
PATIENCE = 1.0
#: At most so many are waited for at a time.
AT_ONCE = 64
_MESSAGE = b"hello"


def log_in(port: int, address: str) -> float | None:
    """Connect, log in, have a message echoed; seconds until then, None if it was refused or took too long."""
    begin = time.perf_counter()
    try:
        with socket.socket() as sock:
            sock.settimeout(PATIENCE)
            sock.bind((address, 0))
            sock.connect(("127.0.0.1", port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire = load.log_in_by_ntlm(sock)
            sock.sendall(wire.pack([_MESSAGE]))
            left = len(_MESSAGE) + wire.overhead
            while left > 0:
                got = len(sock.recv(4096))
                if not got:
                    return None
                left -= got
    except OSError:
        return None
    took = time.perf_counter() - begin
    return took if took <= PATIENCE else None


def come(port: int, seconds: float, rate: float, rng: random.Random) -> list[float | None]:
    """Let them come at random times, whether those before them have got in or not."""
    futures = []
    begin = due = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while due < begin + seconds:
            time.sleep(max(0.0, due - time.perf_counter()))
            # Nobody has logged in from there before.
            address = f"127.{rng.randrange(10, 250)}.{rng.randrange(256)}.{rng.randrange(1, 255)}"
            futures.append(pool.submit(log_in, port, address))
            due += rng.expovariate(rate)
    return [future.result() for future in futures]


def come_together(port: int, number: int, address: str) -> list[float | None]:
    """Let so many come at the same moment, from one address, as behind a NAT."""
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(lambda _: log_in(port, address), range(number)))
