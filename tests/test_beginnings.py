"""What cannot become a handshake is refused at its first byte that shows it, and called by its name."""

from __future__ import annotations

import contextlib
import http.client
import logging
import random
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import trio

from forge import OID_NTLM, neg_token_init, negotiate
from harness import PASSWORD, make_acceptor, make_initiator, make_sessions
from peers.base import PeerError
from peers.dotnet import DOTNET_NTLM, dotnet
from peers.requirements import require
from triosspi import (
    AuthenticationError,
    ForeignProtocolError,
    FrameTooLongError,
    RemoteProtocolError,
    ServerStatistics,
    WireFormat,
    serve_sspi_over_tcp,
)
from triosspi.session.session import Session
from triosspi.wire.beginnings import BEGINNING_SIZE

NEGOTIATE = negotiate()


def client_hello() -> bytes:
    """What OpenSSL begins with."""
    to_server = ssl.MemoryBIO()
    connection = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), to_server, server_hostname="server.example")
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return to_server.read()


def negotiate_stream(token: bytes) -> bytes:
    """[MS-NNS] 2.2.1: id, version 1.0, the payload's size."""
    return b"\x16\x01\x00" + struct.pack(">H", len(token)) + token


# Whether a client's or a server's, its first bytes, and what the log is to say.
OTHERS: dict[str, tuple[bytes, str]] = {
    "TLS": (client_hello(), "TLS ClientHello"),
    "a short TLS hello": (b"\x16\x03\x01\x00\x80" + bytes(128), "TLS ClientHello"),
    "TLS alert": (b"\x15\x03\x03\x00\x02\x02\x46", "TLS alert"),
    "SSL 2.0": (b"\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10" + bytes(40), "SSL 2.0"),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: server\r\n\r\n", "an HTTP request"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "an HTTP request"),
    "HTTP response": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "an HTTP response"),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH"),
    "PROXY v1": (b"PROXY TCP4 192.0.2.1 192.0.2.2 50000 2000\r\n", "proxy_from"),
    "PROXY v2": (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c" + bytes(12), "proxy_from"),
    "SMB": (b"\0\0\0\x54\xfeSMB" + bytes(80), "SMB"),
    "RDP": (bytes.fromhex("030000130ee000000000000100080003000000"), "RDP"),
    "DCE/RPC": (bytes.fromhex("05000b0310000000") + bytes(64), "DCE/RPC"),
    "LDAP": (bytes.fromhex("300c020101600702010304008000"), "LDAP"),
    "LDAP, long form": (bytes.fromhex("30840000001002010163840000000704000a01000a0100"), "LDAP"),
    "text": (b"*1\r\n$4\r\nPING\r\n", "text: '*1"),
    "no length": (NEGOTIATE, "without its length"),
    "no length, SPNEGO": (neg_token_init(NEGOTIATE, OID_NTLM), "without its length"),
    "big-endian": (struct.pack(">I", len(NEGOTIATE)) + NEGOTIATE, "big-endian"),
    "NegotiateStream": (negotiate_stream(NEGOTIATE), "NegotiateStream"),
    "NegotiateStream, SPNEGO": (negotiate_stream(neg_token_init(NEGOTIATE, OID_NTLM)), "NegotiateStream"),
    # A NegotiateStream's token of any size: the low byte of its length is where our token's tag would be.
    **{
        f"NegotiateStream, {size} bytes": (negotiate_stream(b"\x60" + bytes(size - 1)), "NegotiateStream")
        for size in (0x4E, 0x60, 0xA0, 0xA1, 255, 256, 0x160, 1500, 0xFFFF)
    },
    "an error of NegotiateStream's": (b"\x15\x01\x00\x00\x08\x00\x00\x00\x00\x80\x09\x03\x0c", "NegotiateStream"),
}
each_other = pytest.mark.parametrize(("data", "name"), OTHERS.values(), ids=OTHERS)


def refusal(session: Session, pieces: Iterator[bytes]) -> tuple[RemoteProtocolError, int]:
    """Why, and after how many pieces."""
    for count, piece in enumerate(pieces, 1):
        session.receive_data(piece)
        try:
            assert session.next_token() is None
        except RemoteProtocolError as exc:
            return exc, count
    raise AssertionError("it waits for more")


def bytewise(data: bytes) -> Iterator[bytes]:
    return (data[i : i + 1] for i in range(len(data)))


def server_side() -> Session:
    return Session(make_acceptor(), WireFormat.FRAMED)


def client_side() -> Session:
    session = Session(make_initiator(), WireFormat.FRAMED)
    session.step(None)
    return session


@each_other
@pytest.mark.parametrize("side", [server_side, client_side])
def test_what_speaks_another_protocol_is_refused_at_once_and_named(
    side: Callable[[], Session], data: bytes, name: str
) -> None:
    exc, _ = refusal(side(), iter([data]))
    assert isinstance(exc, ForeignProtocolError)
    assert isinstance(exc, AuthenticationError)
    assert name in str(exc)
    assert exc.looks_like is not None and name in exc.looks_like
    assert "\n" not in str(exc)


@each_other
@pytest.mark.parametrize("side", [server_side, client_side])
def test_it_is_refused_as_soon_as_it_can_be_known_in_whatever_pieces_it_comes(
    side: Callable[[], Session], data: bytes, name: str
) -> None:
    exc, count = refusal(side(), bytewise(data))
    # A length that is beyond all bounds is refused with its fourth byte, the rest with what must be a tag and a length.
    assert count <= 4 + 4
    assert isinstance(exc, (ForeignProtocolError, FrameTooLongError))


@pytest.mark.parametrize("length", [1, 2, 40, 278, 64 * 1024])
def test_a_length_and_a_byte_that_begins_no_token_is_all_that_is_waited_for(length: int) -> None:
    for first in range(256):
        session = server_side()
        session.receive_data(struct.pack("<IB", length, first))
        possible = first in b"N\x60\xa0\xa1" and length > 1
        try:
            waits = session.next_token() is None
        except AuthenticationError:
            waits = False
        assert waits is possible or (first == ord("N") and length == 1), first


def test_the_length_within_a_token_must_be_that_in_front_of_it() -> None:
    token = neg_token_init(NEGOTIATE, OID_NTLM)
    for length in (len(token) - 1, len(token) + 1, 278, 64 * 1024):
        session = server_side()
        session.receive_data(struct.pack("<I", length) + token[:6])
        with pytest.raises(ForeignProtocolError, match="does not begin with a handshake token"):
            session.next_token()


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "spnego"])
def test_every_beginning_of_a_real_handshake_is_waited_for(raw: bool) -> None:
    client, server = make_sessions(raw=raw, shake=False)
    sender, receiver = client, server
    token: bytes | None = None
    while data := sender.step(token):
        *before, last = bytewise(data)
        for piece in before:
            receiver.receive_data(piece)
            assert receiver.next_token() is None
        receiver.receive_data(last)
        token = receiver.next_token()
        sender, receiver = receiver, sender
    assert client.established
    assert server.established


def test_a_token_in_very_small_pieces_costs_no_more_for_what_is_looked_at() -> None:
    # What is looked at is a few bytes, however much of the token is there.
    session = server_side()
    session.receive_data(struct.pack("<I", 64 * 1024) + b"NTLMSSP\0")
    for _ in range(1000):
        session.receive_data(b"x")
        assert session.next_token() is None
    assert len(session._codec._scanner.peek(BEGINNING_SIZE)) == BEGINNING_SIZE


def test_any_beginning_gives_a_refusal_of_ours_or_is_waited_for() -> None:
    rng = random.Random(4)
    for _ in range(5000):
        side = rng.choice([server_side, client_side])
        session = side()
        start = rng.choice([b"", *(data[: rng.randint(1, 12)] for data, _ in OTHERS.values())])
        session.receive_data(start + rng.randbytes(rng.randint(0, 40)))
        # Any other error ends the test.
        with contextlib.suppress(RemoteProtocolError):
            session.next_token()


# ---- foreign programs, and what the operator reads ----


def speak_tls(port: int) -> None:
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as sock,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        ssl.create_default_context().wrap_socket(sock, server_hostname="server.example")


def speak_http(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        with pytest.raises((http.client.HTTPException, OSError)):
            connection.request("GET", "/")
            connection.getresponse()
    finally:
        connection.close()


def speak_negotiate_stream(port: int) -> None:
    require(DOTNET_NTLM)
    with pytest.raises(PeerError, match="IOException|AuthenticationException"):
        dotnet.ask(do="negotiate_stream", port=port, username="alice", password=PASSWORD, domain="DOM")


@pytest.mark.parametrize(
    ("speak", "name"),
    [
        (speak_tls, "a TLS ClientHello"),
        (speak_http, "an HTTP request"),
        (speak_negotiate_stream, "a .NET NegotiateStream"),
    ],
    ids=["TLS", "HTTP", "NegotiateStream"],
)
@pytest.mark.parametrize("wire", [WireFormat.SAMPLE, WireFormat.FRAMED], ids=lambda wire: wire.value)
async def test_the_log_says_what_it_was(
    speak: Callable[[int], None], name: str, wire: WireFormat, caplog: pytest.LogCaptureFixture
) -> None:
    counts = ServerStatistics()

    async def handler(_: object) -> None:
        raise AssertionError("nobody has logged in")

    with caplog.at_level(logging.INFO, "triosspi"):
        async with trio.open_nursery() as nursery:
            serve = partial(
                serve_sspi_over_tcp,
                # A deadline that would be waited for in vain: the test's own is shorter.
                handshake_timeout=3600,
                host="127.0.0.1",
                wire=wire,
                statistics=counts,
            )
            (listener,) = await nursery.start(serve, handler, 0, make_acceptor())
            await trio.to_thread.run_sync(speak, listener.transport_listener.socket.getsockname()[1])
            nursery.cancel_scope.cancel()
    assert counts.refused == 1
    assert f"it looks like {name}" in caplog.text
    assert PASSWORD not in caplog.text
