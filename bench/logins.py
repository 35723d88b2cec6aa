r"""The load of bench_workers: logins by NTLM, each with the server's one message behind it, as many as the server takes.

    echo '{"at_once": 64, "seconds": 2}' | BENCH_PASSWORD=... python bench/logins.py --port PORT

It reads commands from standard input, a line of JSON each, and answers each with a line. One thread on epoll, and of NTLM only what must be computed for each login: the server's challenge under a key that
is always the same. A client of pyspnego's or of our own would cost more than the server, and be what is measured.

With `"rate"`, clients come at random times, so many a second on average, whether those before them are served or not.
`{"number": N, "at_once": M}` only connects, and stays connected until `{}`.

The server is `triosspi serve greet --wire sample`; account DOM\alice, password in BENCH_PASSWORD. Linux only.
"""

import argparse
import hashlib
import hmac
import json
import os
import random
import select
import socket
import struct
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from cryptography.hazmat.decrepit.ciphers.algorithms import ARC4
from cryptography.hazmat.primitives.ciphers import Cipher

from triosspi.security.ntlm.primitives import nt_hash

DOMAIN, USER = "DOM", "alice"
#: Signing, sealing, extended session security, target information, version, key exchange, 128 and 56 bits.
FLAGS = 0xE2888231
VERSION = bytes.fromhex("0a00f4650000000f")
SESSION_KEY = bytes(range(16))
SILENCE = 30


class NTLM:
    """A client of [MS-NLMP] that always is the same one."""

    def __init__(self, password: str) -> None:
        name = (USER.upper() + DOMAIN).encode("utf-16-le")
        self._key = hmac.digest(nt_hash(password), name, hashlib.md5)
        message = b"NTLMSSP\0" + struct.pack("<II", 1, FLAGS) + bytes(16) + VERSION
        self._message = message
        self.negotiate = struct.pack("<I", len(message)) + message

    def authenticate(self, challenge: bytes) -> bytes:
        """The answer to a challenge, with its length."""
        length, _, offset = struct.unpack_from("<HHI", challenge, 40)
        # Without the end mark; behind it that there is a MIC.
        info = challenge[offset : offset + length - 4] + b"\6\0\4\0\2\0\0\0" + bytes(4)
        place = info.find(b"\7\0\x08\0")
        blob = b"\1\1" + bytes(6) + info[place + 4 : place + 12] + b"\xaa" * 8 + bytes(4) + info + bytes(4)
        proof = hmac.digest(self._key, challenge[24:32] + blob, hashlib.md5)
        base = hmac.digest(self._key, proof, hashlib.md5)
        encrypted = Cipher(ARC4(base), mode=None).encryptor().update(SESSION_KEY)
        payloads = (bytes(24), proof + blob, DOMAIN.encode("utf-16-le"), USER.encode("utf-16-le"), b"", encrypted)
        header, at = b"NTLMSSP\0\3\0\0\0", 88
        for payload in payloads:
            header += struct.pack("<HHI", len(payload), len(payload), at)
            at += len(payload)
        header += struct.pack("<I", FLAGS) + VERSION
        body = b"".join(payloads)
        mic = hmac.digest(SESSION_KEY, b"".join((self._message, challenge, header, bytes(16), body)), hashlib.md5)
        return b"".join((struct.pack("<I", at), header, mic, body))


@dataclass
class Run:
    """One run; times in seconds.

    Attributes:
        logins: How many were served within the time.
        seconds: How long that was.
        load_cpu: Of this process, in that time.
        all: How many with those that were under way at its end.
        all_seconds: Until they were served.
        p50: Of a login, from connecting to the server's message.
        p99: The same.
    """

    logins: int
    seconds: float
    load_cpu: float
    all: int
    all_seconds: float
    p50: float
    p99: float


class Load:
    """Drives the connections."""

    def __init__(self, port: int, password: str) -> None:
        self._address = ("127.0.0.1", port)
        self._ntlm = NTLM(password)
        self._poll = select.epoll()
        # By descriptor: the socket, when it was opened, and whether it has answered the challenge.
        self._open: dict[int, tuple[socket.socket, float, bool]] = {}
        self._took: list[float] = []
        self._random = random.Random(0)

    def _connect(self) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        now = time.perf_counter()
        sock.connect_ex(self._address)
        # Connected when the challenge comes; over loopback that is at once, and what is sent before waits.
        self._poll.register(sock.fileno(), select.EPOLLOUT)
        self._open[sock.fileno()] = (sock, now, False)

    def _advance(self, fd: int, event: int) -> bool:
        """Do what can be done on a connection; whether it is over."""
        sock, since, answered = self._open[fd]
        if event & select.EPOLLOUT:
            sock.send(self._ntlm.negotiate)
            self._poll.modify(fd, select.EPOLLIN)
            return False
        data = sock.recv(4096)
        if not data:
            if not answered:
                raise ConnectionError("the server has refused a login")
            del self._open[fd]
            sock.close()
            return True
        if not answered:
            # Over loopback a token comes in one piece.
            sock.send(self._ntlm.authenticate(data[4:]))
            self._open[fd] = (sock, since, True)
        else:
            self._took.append(time.perf_counter() - since)
        return False

    def run(self, at_once: int, seconds: float, rate: float = 0.0) -> Run:
        """One run; at its end nothing is open."""
        clock = time.perf_counter
        self._took.clear()
        begin, cpu = clock(), time.process_time()
        end, next_one = begin + seconds, begin
        done, measured, used = 0, seconds, 0.0
        while True:
            now = clock()
            if not used and now >= end:
                measured, used, done = now - begin, time.process_time() - cpu, len(self._took)
            if not used:
                if rate:
                    while next_one <= now:
                        self._connect()
                        next_one += self._random.expovariate(rate)
                else:
                    for _ in range(at_once - len(self._open)):
                        self._connect()
            elif not self._open:
                took = self._took
                return Run(
                    *(done, measured, used, len(took), now - begin), percentile(took, 0.5), percentile(took, 0.99)
                )
            wait = max(0.0, min(next_one, end) - now) if rate and not used else SILENCE
            events = self._poll.poll(wait)
            if not events and wait == SILENCE:
                raise TimeoutError(f"nothing for {SILENCE} s, {len(self._open)} logins under way")
            for fd, event in events:
                self._advance(fd, event)

    def hold(self, number: int, at_once: int) -> None:
        """Connect so often, and stay connected; the first message is sent, and no more."""
        held = len(self._open)
        while len(self._open) < held + number:
            for _ in range(min(at_once, held + number - len(self._open))):
                self._connect()
            waiting = at_once
            while waiting:
                events = self._poll.poll(SILENCE)
                if not events:
                    raise TimeoutError(f"nothing for {SILENCE} s")
                for fd, event in events:
                    if event & select.EPOLLOUT:
                        self._advance(fd, event)
                    else:
                        # The challenge: so it was accepted.
                        self._open[fd][0].recv(4096)
                        self._poll.unregister(fd)
                        waiting -= 1

    def release(self) -> None:
        """Close what is held."""
        for sock, _, _ in self._open.values():
            sock.close()
        self._open.clear()


def percentile(values: Iterable[float], share: float) -> float:
    """The time within which this share was served."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description="logins, as many as a server takes")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    load = Load(options.port, os.environ["BENCH_PASSWORD"])
    for line in sys.stdin:
        command = json.loads(line)
        answer: object = None
        if "number" in command:
            load.hold(**command)
        elif not command:
            load.release()
        else:
            answer = asdict(load.run(**command))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
