r"""Attackers for `bench_siege.py`: half-open connections that sit there, and logins that fail, by one thread on epoll.

    python bench/attackers.py --port PORT

Reads commands from standard input, a line of JSON each: ``{"half_open": N, "says": WHAT, "rate": R}`` sets how many
connections sit there, what each has said ("nothing", "a byte", "a token": the first message, and then nothing), and how many
logins a second are tried; each is answered, once that is so, by a line of what was done since the last one. They come from
many addresses of 127.0.0.0/8, as attackers do: penalties and caps go by the address. Of those that sit there each has one of
its own; one that is thrown out comes back at once. A login is a NEGOTIATE, and on the challenge an AUTHENTICATE whose proof is wrong: made once and sent again and again, since an
attacker spends as little as possible. Linux only.
"""

import argparse
import json
import os
import resource
import select
import socket
import struct
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from forge import Client

#: Addresses that logins come from.
GUESSERS = 250
# Logins under way at most: beyond that the server is slower than the rate, and it shows in what is reported.
MOST_UNDER_WAY = 300
#: Half-open connections that are made in one turn.
SIT_AT_ONCE = 200
# Seconds in which as many are to sit as wanted; a server that throws them out at once does not let them.
SETTLING = 1.0
# Seconds from which on a slot that was missed is given up.
BEHIND = 0.1
# Python 3.11 has no name for it.
_IP_BIND_ADDRESS_NO_PORT = 24


class Login:
    """One that fails.

    Attributes:
        challenged: Whether the server has answered the first message.
    """

    __slots__ = ("challenged", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.challenged = False


class Attackers:
    """All of them."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._poll = select.epoll()
        self._poll.register(sys.stdin.fileno(), select.EPOLLIN)
        # By descriptor: the socket, and the number of its address.
        self._half_open: dict[int, tuple[socket.socket, int]] = {}
        self._free: list[int] = []
        self._says = b""
        self._logins: dict[int, Login] = {}
        self._number = 0
        self._wanted = 0
        self._rate = 0.0
        self._counts: Counter[str] = Counter()
        client = Client(user="alice", password="not this one")
        self._negotiate = _framed(client.negotiate())
        self._client = client
        self._authenticate = b""

    def run(self) -> None:
        """Until standard input ends."""
        due = time.monotonic()
        waited_for, asked = False, due
        while True:
            now = time.monotonic()
            if self._rate:
                due = max(due, now - BEHIND)
                while due <= now and len(self._logins) < MOST_UNDER_WAY:
                    self._begin_login()
                    due += 1 / self._rate
            else:
                due = now
            self._sit_down()
            if waited_for and (len(self._half_open) >= self._wanted or now > asked + SETTLING):
                waited_for = False
                self._answer()
            timeout = min(0.05, max(0.0, due - now)) if self._rate else 0.05
            if len(self._half_open) < self._wanted:
                timeout = 0.0
            for fd, event in self._poll.poll(timeout):
                if fd == sys.stdin.fileno():
                    line = sys.stdin.buffer.readline() if event & select.EPOLLIN else b""
                    if not line:
                        return
                    command = json.loads(line)
                    self._wanted, self._rate = command["half_open"], command["rate"]
                    self._change_to(command.get("says", "nothing"))
                    waited_for, asked = True, now
                elif fd in self._half_open and not (event == select.EPOLLIN and self._challenged(fd)):
                    # The server has had enough of it; the next one takes its place.
                    self._counts["half-open ones closed by the server"] += 1
                    sock, number = self._half_open.pop(fd)
                    sock.close()
                    self._free.append(number)
                elif fd in self._logins:
                    self._go_on(fd)

    def _answer(self) -> None:
        self._counts["half-open now"] = len(self._half_open)
        sys.stdout.write(json.dumps(self._counts) + "\n")
        sys.stdout.flush()
        self._counts.clear()

    def _connect(self, source: str) -> socket.socket:
        sock = socket.socket()
        # Else each address would have only the ports that no other uses.
        sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((source, 0))
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", self._port))
        return sock

    def _change_to(self, says: str) -> None:
        new = {"nothing": b"", "a byte": b"x", "a token": self._negotiate}[says]
        while self._half_open and (new != self._says or len(self._half_open) > self._wanted):
            self._half_open.popitem()[1][0].close()
        if not self._half_open:
            self._free = list(range(self._wanted))
        self._says = new

    def _sit_down(self) -> None:
        # Not all at once: logins are to be answered in between.
        for _ in range(min(SIT_AT_ONCE, self._wanted - len(self._half_open))):
            number = self._free.pop() if self._free else len(self._half_open)
            sock = self._connect(f"127.1.{number // 250}.{1 + number % 250}")
            self._half_open[sock.fileno()] = (sock, number)
            self._poll.register(sock.fileno(), select.EPOLLIN | select.EPOLLRDHUP)
            with suppress(OSError):
                if self._says:
                    sock.send(self._says)

    def _challenged(self, fd: int) -> bool:
        """Whether what came is the server's answer, and no end."""
        try:
            return bool(self._half_open[fd][0].recv(4096))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _begin_login(self) -> None:
        self._number += 1
        sock = self._connect(f"127.2.0.{1 + self._number % GUESSERS}")
        self._logins[sock.fileno()] = Login(sock)
        self._poll.register(sock.fileno(), select.EPOLLIN | select.EPOLLRDHUP)
        self._counts["logins tried"] += 1
        try:
            sock.send(self._negotiate)
        except OSError:
            # Not connected yet, which on the loopback means: the queue is full.
            self._end(sock.fileno(), "logins that found the queue full")

    def _go_on(self, fd: int) -> None:
        login = self._logins[fd]
        try:
            data = login.sock.recv(4096)
            if not data:
                self._end(fd, "logins refused" if login.challenged else "logins shut out")
            elif not login.challenged:
                login.challenged = True
                if not self._authenticate:
                    self._authenticate = _framed(self._client.authenticate(data[4:]))
                login.sock.send(self._authenticate)
        except BlockingIOError:
            pass
        except OSError:
            self._end(fd, "logins refused" if login.challenged else "logins shut out")

    def _end(self, fd: int, how: str) -> None:
        self._counts[how] += 1
        self._logins.pop(fd).sock.close()


def _framed(token: bytes) -> bytes:
    return struct.pack("<I", len(token)) + token


def main() -> None:
    parser = argparse.ArgumentParser(description="half-open connections, and logins that fail")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # What is measured runs on the same core, and must not wait for these.
    os.nice(19)
    Attackers(options.port).run()


if __name__ == "__main__":
    main()
