"""Clients that always have a request under way, while servers come and go; what became of each request is written down.

A request is done when it has its reply. A client that hears the server's goodbye instead knows that its request was not
looked at: it connects again and sends the same. A request has failed when neither came: the connection was refused, ended or
was reset. Used by ``test_restarts.py``, and by ``bench/soak.py`` for its honest clients.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from functools import partial

import trio

from peers import PeerError, PeerKind, wire
from triosspi import Initiator, SSPIChannel, open_sspi_over_tcp_channel

PASSWORD = "a password of the load"
# Requests of a session of the foreign clients, and of ours where they are short.
_FEW = 5
# Seconds after a failure: a server that is gone is not asked a thousand times.
_PAUSE = 0.05

#: An application for `triosspi serve`: its replies say which server it is, and it works on each for a moment.
APPLICATION = """
import os
import trio

NAME = os.environ["SERVER_NAME"].encode()


async def handler(channel):
    async for request in channel:
        await trio.sleep(0.01)
        await channel.send(NAME + b": " + request)
"""


@dataclass(frozen=True, slots=True)
class Failure:
    """A request with neither a reply nor a goodbye.

    Attributes:
      server: which one had answered on this connection before; None where the connection was too young.
      error: what the client saw.
    """

    client: str
    server: str | None
    error: str


@dataclass
class Load:
    """A number of clients of one address; see the head of this file.

    Attributes:
      host: where they connect to.
      port: where they connect to.
      talkers: how many of ours stay connected.
      callers: how many of ours log in anew for every few requests.
      foreign: kinds of clients that nobody of this project wrote; one thread each.
      replies: how many requests were answered, by server.
      goodbyes: how often a session was ended by the server in good order.
      failures: what went wrong.
    """

    host: str
    port: int
    talkers: int = 6
    callers: int = 3
    foreign: Sequence[PeerKind] = ()
    replies: Counter[str] = field(default_factory=Counter)
    by_client: Counter[str] = field(default_factory=Counter)
    goodbyes: int = 0
    failures: list[Failure] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stopping = threading.Event()
        # Awaited by `answered`; exchanged with each reply.
        self._news = trio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep all of them busy; in the end each finishes its last request."""
        async with trio.open_nursery() as nursery:
            for index in range(self.talkers):
                nursery.start_soon(self._client, f"talker {index}", None)
            for index in range(self.callers):
                nursery.start_soon(self._client, f"caller {index}", _FEW)
            for index, kind in enumerate(self.foreign):
                token = trio.lowlevel.current_trio_token()
                nursery.start_soon(trio.to_thread.run_sync, partial(self._foreign, kind, f"{kind} {index}", token))
            try:
                yield
            finally:
                self._stopping.set()

    async def answered(self, server: str, number: int) -> None:
        """Wait until a server has answered so many more requests."""
        wanted = self.replies[server] + number
        while self.replies[server] < wanted:
            await self._news.wait()

    def _done(self, client: str, request: bytes, reply: bytes) -> str:
        server, _, echoed = reply.partition(b": ")
        assert echoed == request, f"{reply!r} is no reply to {request!r}"
        name = server.decode()
        self.replies[name] += 1
        self.by_client[client] += 1
        return name

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    # Ours

    async def _client(self, name: str, requests: int | None) -> None:
        numbers = itertools.count()
        number = next(numbers)
        initiator = Initiator(username="DOM\\alice", password=PASSWORD, mechanism="ntlm", raw=True)
        while not self._stopping.is_set():
            channel: SSPIChannel[trio.SocketStream] | None = None
            server: str | None = None
            try:
                async with await open_sspi_over_tcp_channel(self.host, self.port, initiator) as channel:
                    for done in itertools.count(1):
                        request = f"{name}, request {number}".encode()
                        await channel.send(request)
                        server = self._done(name, request, await channel.receive())
                        self._tell()
                        number = next(numbers)
                        if done == requests or self._stopping.is_set():
                            break
            except trio.EndOfChannel:
                self.goodbyes += 1
            except (OSError, trio.BrokenResourceError) as exc:
                cause = exc.__cause__ or exc
                self.failures.append(Failure(name, server, f"{type(cause).__name__}: {cause}"))
                await trio.sleep(_PAUSE)

    # Others

    def _foreign(self, kind: PeerKind, name: str, token: trio.lowlevel.TrioToken) -> None:
        number = 0
        while not self._stopping.is_set():
            server: str | None = None
            try:
                with (
                    closing(kind.new("alice", PASSWORD, "DOM")) as initiator,
                    wire.connect(self.host, self.port) as sock,
                ):
                    wire.login(sock, initiator)
                    for _ in range(_FEW):
                        request = f"{name}, request {number}".encode()
                        wire.send_message(sock, initiator, request)
                        reply = wire.receive_message(sock, initiator)
                        if not reply:
                            self.goodbyes += 1
                            break
                        server = self._done(name, request, reply)
                        token.run_sync_soon(self._tell)
                        number += 1
                    else:
                        wire.send_goodbye(sock, initiator)
            except (OSError, PeerError, wire.Refused, wire.Closed) as exc:
                self.failures.append(Failure(name, server, f"{type(exc).__name__}: {exc}"))
                self._stopping.wait(_PAUSE)
