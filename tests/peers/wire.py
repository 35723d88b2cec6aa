"""The two wire formats as a blocking client writes them, over any `Initiator`.

Written from the description of the formats and not from the library's own code: it is the other half of every
interoperability test, and a mistake shared by both halves would show nowhere. All integers are u32 little-endian.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

from .base import Initiator, PeerError, Sealing

TIMEOUT = 30.0  # seconds, for each single read or write; on a busy machine a peer takes ten to start its runtime

# Longer than any peer's token and any test's message; a server that announces more is broken.
_SANE = 4 * 1024 * 1024
_ROUNDS = 10


class Refused(Exception):
    """The server closed the connection where the protocol owed us bytes."""


class Closed(Exception):
    """The server closed the connection at a record's boundary (its ordinary end, if nothing was owed)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The one record of the `sample` format, opened.

    Attributes:
        plaintext: What the server said.
        raw: Every byte that came after the handshake.
    """

    plaintext: bytes
    raw: bytes


def connect(host: str, port: int) -> socket.socket:
    """Connect, with the time-out of everything here."""
    sock = socket.create_connection((host, port), timeout=TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def recv_exact(sock: socket.socket, length: int) -> bytes:
    """Read exactly so many bytes.

    Raises:
        Closed: the end came before the first of them.
        Refused: the end came between, or the connection was reset.
    """
    chunks = bytearray()
    while len(chunks) < length:
        try:
            chunk = sock.recv(length - len(chunks))
        except ConnectionError as exc:
            raise Refused(str(exc)) from exc
        if not chunk:
            if not chunks:
                raise Closed("closed")
            raise Refused(f"closed after {len(chunks)} of {length} bytes")
        chunks += chunk
    return bytes(chunks)


def recv_to_eof(sock: socket.socket) -> bytes:
    """Read all that is left."""
    chunks = bytearray()
    while True:
        try:
            chunk = sock.recv(65536)
        except ConnectionError as exc:
            raise Refused(f"reset after {len(chunks)} bytes") from exc
        if not chunk:
            return bytes(chunks)
        chunks += chunk


def send_all(sock: socket.socket, data: bytes) -> None:
    """Write all of it.

    Raises:
        Refused: the server has closed already.
    """
    try:
        sock.sendall(data)
    except ConnectionError as exc:
        raise Refused(str(exc)) from exc


def send_prefixed(sock: socket.socket, body: bytes) -> None:
    """Write `length | body`."""
    send_all(sock, struct.pack("<I", len(body)) + body)


def recv_prefixed(sock: socket.socket) -> bytes:
    """Read `length | body`.

    Raises:
        Closed: the server closed before the length.
        Refused: the server closed within the record.
    """
    (length,) = struct.unpack("<I", recv_exact(sock, 4))
    if length > _SANE:
        raise PeerError(f"the server announced {length} bytes")
    try:
        return recv_exact(sock, length)
    except Closed as exc:
        raise Refused("closed after the length") from exc


def login(sock: socket.socket, initiator: Initiator) -> None:
    """Shake hands: `length | token` in both directions, initiator first, until the initiator is done.

    With SPNEGO the last token is the server's. With raw NTLM it is ours, so a refused login looks finished
    here, and the end of the stream is all that follows.

    Raises:
        Refused: the server closed in the middle.
        PeerError: the initiator refuses a token.
    """
    token: bytes | None = None
    for _ in range(_ROUNDS):
        reply = initiator.step(token)
        if reply:
            send_prefixed(sock, reply)
        if initiator.complete:
            return
        if not reply and token is not None:
            raise PeerError("the initiator is not done and has nothing to say")
        try:
            token = recv_prefixed(sock)
        except Closed as exc:
            raise Refused("closed during the handshake") from exc
    raise PeerError(f"no end of the handshake after {_ROUNDS} rounds")


def split_sealed(record: bytes) -> tuple[bytes, bytes]:
    """Split `trailer_length | trailer | ciphertext` into its trailer and ciphertext."""
    if len(record) < 4:
        raise PeerError(f"a sealed record of {len(record)} bytes")
    (length,) = struct.unpack_from("<I", record)
    if length > len(record) - 4:
        raise PeerError(f"a trailer of {length} bytes in a record of {len(record)}")
    return record[4 : 4 + length], record[4 + length :]


def join_sealed(trailer: bytes, ciphertext: bytes) -> bytes:
    """The inverse of `split_sealed`."""
    return struct.pack("<I", len(trailer)) + trailer + ciphertext


def read_sample(sock: socket.socket, side: Sealing) -> Sample:
    """Read the one sealed record of the `sample` format, which ends with the stream, and open it.

    Raises:
        Refused: nothing came: to a raw NTLM initiator this is how a refused login looks.
        PeerError: what came does not open.
    """
    raw = recv_to_eof(sock)
    if not raw:
        raise Refused("closed without a word")
    return Sample(plaintext=side.open(*split_sealed(raw)), raw=raw)


def frame(side: Sealing, message: bytes) -> bytes:
    """Seal one message into a whole record of the `framed` format."""
    body = join_sealed(*side.seal(message))
    return struct.pack("<I", len(body)) + body


def send_message(sock: socket.socket, side: Sealing, message: bytes) -> None:
    """Send one message in the `framed` format."""
    send_all(sock, frame(side, message))


def send_goodbye(sock: socket.socket, side: Sealing) -> None:
    """Say the authenticated goodbye: a sealed empty message (see `PeerKind.seals_empty`)."""
    send_message(sock, side, b"")


def receive_message(sock: socket.socket, side: Sealing) -> bytes:
    """Receive one message in the `framed` format; an empty one is the server's goodbye.

    Raises:
        Closed: the stream ended at a record's boundary.
        Refused: it ended elsewhere.
        PeerError: the record does not open.
    """
    return side.open(*split_sealed(recv_prefixed(sock)))
