"""What the tests share: an account, two sides in memory, and a context without cryptography."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import trio
import trio.testing

import triosspi
from triosspi import Acceptor, Account, Initiator, WireFormat
from triosspi.security.ntlm.accounts import AccountTable
from triosspi.security.ntlm.primitives import nt_hash
from triosspi.session import BaseSession, StreamSession
from triosspi.session.session import Session

PASSWORD = "correct horse"
SERVER_MESSAGE = b"This is your server speaking"

_ACCOUNTS = AccountTable()
_ACCOUNTS.add(Account("DOM", "alice", nt_hash(PASSWORD)))


def make_acceptor(**options: Any) -> Acceptor:
    return Acceptor(accounts=_ACCOUNTS, **options)


def make_initiator(password: str = PASSWORD, **options: Any) -> Initiator:
    return Initiator(**{"username": "DOM\\alice", "password": password, "mechanism": "ntlm", **options})


def dword(number: int) -> bytes:
    return number.to_bytes(4, "little")


def frame(payload: bytes) -> bytes:
    return dword(len(payload)) + payload


def random_pieces(data: bytes, rng: random.Random, largest: int = 40) -> list[bytes]:
    pieces = []
    while data:
        size = rng.randint(1, largest)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def reset_at_close(sock: Any) -> None:
    """Let closing a socket be a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def reset_connection(address: Any, said: bytes = b"") -> int:
    """Connect to a TCP address, say something, and reset the connection, as health checks do; returns the port that was used."""
    with socket.create_connection(address[:2]) as client:
        client.sendall(said)
        reset_at_close(client)
        port: int = client.getsockname()[1]
        return port


def has_ipv6() -> bool:
    """Whether this machine has IPv6 at all: a container may have none."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# ---- sessions, without any I/O ----


def say(session: Session, token: bytes) -> bytes:
    """Give a session its peer's token; returns its own, without the length in front."""
    session.receive_data(frame(token))
    received = session.next_token()
    assert received is not None
    return session.step(received)[4:]


def step_through(client: BaseSession, server: BaseSession) -> None:
    """The whole handshake between two sessions."""
    data = client.step(None)
    receiver: BaseSession = server
    sender: BaseSession = client
    while data:
        receiver.receive_data(data)
        token = receiver.next_token()
        assert token is not None
        data = receiver.step(token)
        receiver, sender = sender, receiver


def make_sessions(
    wire: WireFormat = WireFormat.FRAMED, *, raw: bool = False, shake: bool = True, **options: Any
) -> tuple[Session, Session]:
    """(client, server), by default with the handshake behind them."""
    client = Session(make_initiator(raw=raw), wire, **options)
    server = Session(make_acceptor(), wire, **options)
    if shake:
        step_through(client, server)
        assert client.established
        assert server.established
    return client, server


def make_stream_sessions(
    *, raw: bool = False, shake: bool = True, **options: Any
) -> tuple[StreamSession, StreamSession]:
    """The same for NegotiateStream. Raw NTLM is ProtectionLevel.None there unless the client asks for encryption, as ours does."""
    client = StreamSession(make_initiator(raw=raw), **options)
    server = StreamSession(make_acceptor(), **options)
    if shake:
        step_through(client, server)
        assert client.established
        assert server.established
    return client, server


def seal_record(session: Session, message: bytes) -> bytes:
    """One record of the framed format, sealed past every check."""
    trailer, ciphertext = session._context.seal(message)
    return frame(frame(trailer) + ciphertext)


def outcome(session: Session, pieces: Iterable[bytes]) -> list[Any]:
    """All that comes out of a session for these pieces: messages, then how it ended."""
    events: list[Any] = []
    try:
        for piece in pieces:
            session.receive_data(piece)
            events += session.next_opened()
        # Once more: an error behind good messages is told by the next call.
        events += session.next_opened()
    except triosspi.RemoteProtocolError as exc:
        events.append((type(exc), str(exc)))
    if session.receive_ended:
        events.append("end")
    return events


# ---- a context without cryptography ----


class PlainContext:
    """Takes ``answers`` one by one for its tokens and is established with the last of them.

    A sealed message is itself, behind a trailer that holds its number.
    """

    def __init__(
        self, usage: str, answers: Sequence[bytes], *, trailer_size: int = 16, may_block: bool = False
    ) -> None:
        self.usage = usage
        self.may_block = may_block
        self.established = False
        self.trailer_size = trailer_size
        self.batch_sealer = None
        self.encrypted = True
        self.raw = False
        self.package_name = "Plain"
        self.peer = SimpleNamespace(expires_at=None, impersonation_level="impersonation")
        self.tokens: list[bytes | None] = []
        self.on_seal: Callable[[], None] = lambda: None
        self._answers = list(answers)
        self._sealed = 0
        self._opened = 0

    def step(self, token: bytes | None) -> bytes:
        self.tokens.append(token)
        answer = self._answers.pop(0)
        self.established = not self._answers
        return answer

    def check_alive(self) -> None:
        pass

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        self.on_seal()
        self._sealed += 1
        return self._sealed.to_bytes(self.trailer_size, "little"), message

    def open(self, trailer: bytes, ciphertext: bytes) -> bytes:
        self._opened += 1
        if int.from_bytes(trailer, "little") != self._opened:
            raise triosspi.UnsealError("out of order")
        return ciphertext

    def open_token(self, token: bytes) -> bytes:
        return self.open(token[: self.trailer_size], token[self.trailer_size :])


class PlainCredential:
    """Stands in for an `Acceptor` or an `Initiator`; keeps the contexts that it made."""

    def __init__(self, usage: str, answers: Sequence[bytes], **options: Any) -> None:
        self.usage = usage
        self.contexts: list[PlainContext] = []
        self._answers = answers
        self._options = options

    def new_context(self, _demanded: object) -> PlainContext:
        context = PlainContext(self.usage, self._answers, **self._options)
        self.contexts.append(context)
        return context

    def with_default_host(self, _host: str) -> PlainCredential:
        return self


def plain_session(usage: str, wire: WireFormat, *, trailer_size: int = 16, **options: Any) -> Session:
    """An established session over a `PlainContext`."""
    credential: Any = PlainCredential(usage, [b"token"], trailer_size=trailer_size)
    session = Session(credential, wire, **options)
    session.step(b"token")
    return session


# ---- channels ----


class RecordingStream(trio.abc.HalfCloseableStream):
    """Passes everything on to another stream, and writes down what was asked of it.

    Attributes:
      calls: the methods called, in order.
      sent: every byte given to `send_all`.
      before: called with the method's name before it is passed on; may be replaced, and may raise.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.calls: list[str] = []
        self.sent = bytearray()
        self.before: Callable[[str], Any] = lambda _name: None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.calls.append("send_all")
        self.before("send_all")
        self.sent += data
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        raise AssertionError("nobody needs this")

    async def send_eof(self) -> None:
        self.calls.append("send_eof")
        self.before("send_eof")
        await self.stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        self.calls.append("receive_some")
        self.before("receive_some")
        data: bytes = await self.stream.receive_some(max_bytes)
        return data

    async def aclose(self) -> None:
        self.calls.append("aclose")
        await self.stream.aclose()


class ScriptedStream(trio.abc.HalfCloseableStream):
    """A peer who is a list of bytes objects: each `receive_some` gives the next, then the end.

    Attributes:
      sent: every byte given to `send_all`.
      closed: whether it was closed.
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self.received = 0
        self.sent = bytearray()
        self.closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.sent += data

    async def wait_send_all_might_not_block(self) -> None:
        raise AssertionError("nobody needs this")

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        piece = next(self._pieces, b"")
        self.received += len(piece)
        return piece

    async def aclose(self) -> None:
        self.closed = True
        await trio.lowlevel.checkpoint()


Channel = triosspi.SSPIChannel[Any]


def make_channels(
    pair: Callable[[], tuple[Any, Any]] = trio.testing.memory_stream_pair,
    *,
    raw: bool = False,
    password: str = PASSWORD,
    **options: Any,
) -> tuple[Channel, Channel]:
    """(client, server) over two `RecordingStream`; nothing has been said yet."""
    client_stream, server_stream = map(RecordingStream, pair())
    return (
        triosspi.SSPIChannel(client_stream, make_initiator(password, raw=raw), **options),
        triosspi.SSPIChannel(server_stream, make_acceptor(), **options),
    )


async def shake_hands(*channels: Channel) -> None:
    async with trio.open_nursery() as nursery:
        for channel in channels:
            nursery.start_soon(channel.do_handshake)


async def tcp_channels(*, handshake: bool = True, **options: Any) -> tuple[Channel, Channel]:
    """(client, server) over a real connection."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port = listener.socket.getsockname()[1]
        client_stream = await trio.open_tcp_stream("127.0.0.1", port)
        server_stream = await listener.accept()
    client: Channel = triosspi.SSPIChannel(client_stream, make_initiator(), **options)
    server: Channel = triosspi.SSPIChannel(server_stream, make_acceptor(), **options)
    if handshake:
        await shake_hands(client, server)
    return client, server


async def connected_channels(*args: Any, **options: Any) -> tuple[Channel, Channel]:
    """(client, server), with the handshake behind them."""
    client, server = make_channels(*args, **options)
    await shake_hands(client, server)
    return client, server


async def echo(channel: Channel) -> None:
    """Until the peer leaves: `EndOfChannel` ends it."""
    while True:
        await channel.send_many(await channel.receive_many())


async def close_both(*channels: Channel) -> None:
    async with trio.open_nursery() as nursery:
        for channel in channels:
            nursery.start_soon(channel.aclose)


def seal_from(channel: Channel, message: bytes) -> bytes:
    """The bytes of one sealed message of the framed format, not sent."""
    return seal_record(channel._session, message)
