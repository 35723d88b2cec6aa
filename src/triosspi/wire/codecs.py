"""The wire formats: which bytes go where, and how many of them are accepted.

A codec takes bytes in any pieces and gives tokens and records, and the other way round. It knows no
cryptography: a record is a pair (trailer, ciphertext), whatever they hold.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

from .._errors import (
    AuthenticationError,
    FrameTooLongError,
    LocalProtocolError,
    MessageTooLongError,
    RemoteProtocolError,
    TruncatedError,
)
from .._framing import (
    FrameScanner,
    LayoutError,
    LengthError,
    pack_frame,
    pack_framed_records,
    pack_record,
    sizes_within,
    split_record,
)
from .beginnings import BEGINNING_SIZE, check_beginning

# The layouts. All integers are u32 little-endian, Windows's DWORD.
#
# Handshake, these two:      length | token          either way, the initiator first
# SAMPLE, after it:          trailer_length | trailer | ciphertext       once, acceptor to initiator
# FRAMED, after it:          length | trailer_length | trailer | ciphertext     any number, either way
#
# SAMPLE is Microsoft's "Using SSPI with a Windows Sockets Server", byte for byte. Its record has no
# length around it: the receiver reads until the end of the stream, into a buffer of 2048 bytes.
#
# FRAMED is ours. A sealed empty message is its goodbye, so that an end can be told from a cut.
#
# The third is .NET's, a byte stream: `negotiate_stream`. The first bytes of a connection tell it from these two,
# `beginnings.wire_of`.

Record: TypeAlias = tuple[bytes, bytes]
"""(trailer, ciphertext), as SSPI's EncryptMessage lays out SECBUFFER_TOKEN and SECBUFFER_DATA."""

#: Bytes; the longest handshake token accepted. Windows's own MaxTokenSize is 48,000.
MAX_TOKEN_SIZE: Final = 64 * 1024

#: Bytes; the longest message (plaintext) sent or accepted unless a channel is told otherwise.
DEFAULT_MAX_MESSAGE_SIZE: Final = 1024 * 1024

#: Bytes; the most that fits a u32 record length with any trailer.
LARGEST_MAX_MESSAGE_SIZE: Final = 0xFFFFFFFF - 4 - 1024

#: Bytes; the sample's buffer for the record, `ReceiveBytes(..., 2048, ...)` of its client.
SAMPLE_RECORD_SIZE: Final = 2048

#: Bytes; the sample's token buffers have cbMaxToken bytes (12,000 then) and are not checked: a longer
#: token would be written past their end.
SAMPLE_TOKEN_SIZE: Final = 12_000

_DWORD: Final = 4


def check_max_message_size(size: int) -> None:
    """Refuse a limit on messages that the wire formats cannot keep.

    Raises:
      LocalProtocolError: it is not between 1 and `LARGEST_MAX_MESSAGE_SIZE`.
    """
    if not 0 < size <= LARGEST_MAX_MESSAGE_SIZE:
        raise LocalProtocolError(f"max_message_size must lie between 1 and {LARGEST_MAX_MESSAGE_SIZE}")


class WireFormat(enum.Enum):
    """What is said on the connection around and after the handshake."""

    SAMPLE = "sample"
    """Microsoft's sample: the acceptor sends one sealed message and closes."""

    FRAMED = "framed"
    """Any number of sealed messages in both directions, and an authenticated goodbye."""

    NEGOTIATE_STREAM = "negotiate-stream"
    """.NET's NegotiateStream, [MS-NNS]: a sealed byte stream."""


class Codec:
    """Bytes to tokens, and back: what all formats have in common."""

    #: Can this format say goodbye?
    has_goodbye: bool = False
    #: Does the acceptor say in any case that the handshake is over, and the initiator wait for it?
    acknowledges: bool = False
    #: Bytes; the longest token that may be sent.
    token_limit: int = MAX_TOKEN_SIZE

    __slots__ = ("_eof", "_scanner")

    def __init__(self) -> None:
        self._scanner = FrameScanner(MAX_TOKEN_SIZE)
        self._eof = False

    def feed(self, data: bytes | bytearray) -> None:
        """Store bytes from the transport; an empty ``data`` is the end of the stream.

        Raises:
          TypeError: it is no bytes; None is no end.
        """
        if data:
            self._scanner.feed(data)
        elif isinstance(data, (bytes, bytearray)):
            self._eof = True
        else:
            raise TypeError(f"a transport gives bytes, not {type(data).__name__}")

    @property
    def ended(self) -> bool:
        """The stream has ended."""
        return self._eof

    def discard(self) -> None:
        """Forget whatever was received and not looked at."""
        self._scanner.take_rest()

    # Handshake

    @property
    def peer_done(self) -> bool:
        """Whether the peer has said that its side of the handshake is over. Only a format that acknowledges knows."""
        return False

    def pack_token(self, token: bytes, *, done: bool) -> bytes:  # noqa: ARG002 - of formats that tell
        """The bytes on the wire for a handshake token.

        Args:
          token: empty only where the format acknowledges.
          done: whether it is this side's last.

        Raises:
          AuthenticationError: the token is longer than a peer of this format can take.
        """
        self._check_token(token)
        return pack_frame(token)

    def _check_token(self, token: bytes) -> None:
        if len(token) > self.token_limit:
            raise AuthenticationError(
                f"our token of {len(token)} bytes is longer than the {self.token_limit} bytes that the peer can take"
            )

    def pack_refusal(self, *, untrusted: bool) -> bytes:  # noqa: ARG002 - the same
        """The bytes that tell the peer that the handshake has failed; none where the format cannot say it.

        Args:
          untrusted: see `AuthenticationError.untrusted`.
        """
        return b""

    def restart(self) -> None:
        """The handshake has failed; what follows may be another one."""

    def check_beginning(self, *, initiator: bool) -> None:
        """See that what has come of the peer's first token can become one; see `beginnings`.

        Args:
          initiator: whether the peer is the initiator.

        Raises:
          ForeignProtocolError: it cannot.
        """
        check_beginning(self._scanner.peek(BEGINNING_SIZE), MAX_TOKEN_SIZE, initiator=initiator)

    def next_token(self) -> bytes | None:
        """The peer's next handshake token, or None when more bytes are needed first.

        Raises:
          FrameTooLongError: it is longer than `MAX_TOKEN_SIZE`.
          TruncatedError: the stream ended instead.
          AuthenticationError: it is empty, which no mechanism ever sends.
        """
        try:
            token = self._scanner.next_frame()
        except LengthError as exc:
            raise FrameTooLongError(exc.length, exc.limit) from None
        if token is None and self._eof:
            raise TruncatedError("the peer closed during the handshake", at_boundary=self._scanner.at_boundary)
        if token is not None and not token:
            # pyspnego answers an empty token with a hint (NegTokenInit2) instead of an error.
            raise AuthenticationError("the peer sent an empty token")
        return token

    def begin_records(self, trailer_size: int) -> None:
        """The handshake is over: what follows are records with trailers of ``trailer_size`` bytes."""


class MessageCodec(Codec):
    """A format of messages. See `make_codec`."""

    __slots__ = ("_max_message_size", "_trailer_size")

    def __init__(self, max_message_size: int) -> None:
        super().__init__()
        self._max_message_size = max_message_size
        self._trailer_size = 0

    def begin_records(self, trailer_size: int) -> None:
        """See `Codec.begin_records`."""
        self._trailer_size = trailer_size

    @property
    def message_limit(self) -> int:
        """Bytes; the longest message that may be sent. Known once `begin_records` was called."""
        return self._max_message_size

    def check_messages(self, messages: Sequence[bytes]) -> None:
        """Refuse what must not be sent, before sealing spends the context's state on it.

        Raises:
          MessageTooLongError: longer than `message_limit`.
          LocalProtocolError: it is empty, which would be the goodbye, or is not bytes.
        """
        limit = self.message_limit
        if sizes_within(messages, 1, limit):
            return
        for message in messages:
            if not isinstance(message, bytes):
                # Found out later, by the cipher, it would have cost a sequence number.
                raise LocalProtocolError(f"a message must be bytes, not {type(message).__name__}")
            if not message:
                raise LocalProtocolError("an empty message cannot be sent: sealed, it would say goodbye")
            if len(message) > limit:
                raise MessageTooLongError(len(message), limit)

    def pack_records(self, records: Sequence[Record]) -> bytes:
        """The bytes on the wire for sealed messages, in one buffer."""
        raise NotImplementedError

    def records(self) -> Iterator[Record]:
        """The records at hand, in order; ends where more bytes are needed.

        Raises:
          FrameTooLongError: the peer announced a longer record than a message of the limit can make.
          TruncatedError: nothing more can come.
          RemoteProtocolError: a record that cannot be split.
        """
        raise NotImplementedError


def _split(record: bytes) -> Record:
    try:
        return split_record(record)
    except LayoutError as exc:
        raise RemoteProtocolError(f"a record that cannot be split: {exc}") from None


class FramedCodec(MessageCodec):
    """`WireFormat.FRAMED`."""

    __slots__ = ()
    has_goodbye = True

    def begin_records(self, trailer_size: int) -> None:
        """See `Codec.begin_records`."""
        super().begin_records(trailer_size)
        # Set before any header behind the last token is looked at: that header is a record's.
        self._scanner.limit = _DWORD + trailer_size + self._max_message_size

    def pack_records(self, records: Sequence[Record]) -> bytes:
        """See `MessageCodec.pack_records`."""
        return pack_framed_records(records)

    def frames(self) -> list[bytes]:
        """The records at hand, whole: ``trailer_length | trailer | ciphertext``. See `records` for details."""
        try:
            frames = self._scanner.frames()
        except LengthError as exc:
            raise FrameTooLongError(exc.length, exc.limit) from None
        if self._eof and not frames:
            raise self._truncated()
        return frames

    def records(self) -> Iterator[Record]:
        """See `MessageCodec.records`."""
        while True:
            try:
                record = self._scanner.next_frame()
            except LengthError as exc:
                raise FrameTooLongError(exc.length, exc.limit) from None
            if record is None:
                break
            yield _split(record)
        if self._eof:
            raise self._truncated()

    def _truncated(self) -> TruncatedError:
        at_boundary = self._scanner.at_boundary
        where = "between two records" if at_boundary else "within a record"
        return TruncatedError(f"the peer closed {where}, without a goodbye", at_boundary=at_boundary)


class SampleCodec(MessageCodec):
    """`WireFormat.SAMPLE`."""

    __slots__ = ("_delivered", "_received")
    token_limit = SAMPLE_TOKEN_SIZE

    def __init__(self, max_message_size: int) -> None:
        super().__init__(max_message_size)
        self._delivered = False
        self._received = bytearray()

    @property
    def message_limit(self) -> int:
        """See `MessageCodec.message_limit`."""
        # With NTLM's 16 bytes of trailer 2028, with Kerberos AES's 60 it is 1984.
        return min(self._max_message_size, SAMPLE_RECORD_SIZE - _DWORD - self._trailer_size)

    def discard(self) -> None:
        """See `Codec.discard`."""
        super().discard()
        self._received.clear()

    def pack_records(self, records: Sequence[Record]) -> bytes:
        """See `MessageCodec.pack_records`."""
        return b"".join(pack_record(trailer, data) for trailer, data in records)

    def records(self) -> Iterator[Record]:
        """See `MessageCodec.records`."""
        self._received += self._scanner.take_rest()
        if len(self._received) > SAMPLE_RECORD_SIZE:
            raise FrameTooLongError(len(self._received), SAMPLE_RECORD_SIZE)
        if self._eof and not self._delivered:
            if len(self._received) <= _DWORD:
                at_boundary = not self._received
                raise TruncatedError("the peer closed before its message was whole", at_boundary=at_boundary)
            self._delivered = True
            yield _split(bytes(self._received))


def make_codec(wire: WireFormat, max_message_size: int) -> MessageCodec:
    """A codec for one connection.

    Args:
      wire: the format, one of messages.
      max_message_size: bytes of plaintext, for sending and receiving.

    Raises:
      LocalProtocolError: the format is a byte stream's.
    """
    if wire is WireFormat.NEGOTIATE_STREAM:
        raise LocalProtocolError("negotiate-stream is a byte stream, not messages: it takes an SSPIStream")
    return SampleCodec(max_message_size) if wire is WireFormat.SAMPLE else FramedCodec(max_message_size)
