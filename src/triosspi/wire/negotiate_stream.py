"""The wire format of .NET's NegotiateStream, [MS-NNS]."""

# Handshake:        message id, u8 | version, 2 bytes, 1.0 | size, u16 BIG-endian | payload
# Records after it: size, u32 little-endian | token
#
# The message id says how far its sender is: 0x16 that there is more to come, 0x14 that this is its last. The acceptor always
# sends 0x14, if only with an empty payload, and the initiator waits for it. 0x15 is a refusal, with a code; after it another
# handshake may begin on the same connection. A record's token is what SSPI's EncryptMessage makes, trailer and ciphertext,
# with no word about where it is to be divided. There is no goodbye: the stream ends between two records.

from __future__ import annotations

from typing import Final

from .._errors import AuthenticationError, FrameTooLongError, PeerRefusalError, RemoteProtocolError, TruncatedError
from .._framing import LengthError
from .beginnings import BEGINNING_SIZE, check_negotiate_stream
from .codecs import Codec

#: Bytes of data that a record is filled with, as .NET does it: 63 KiB. [MS-NNS] 2.2.2 has 0xFC30 for the token.
RECORD_DATA_SIZE: Final = 63 * 1024

# [MS-NNS] 2.2.1. The version is ignored on receipt, see 3.1.5.2; but not that of the very first message, see `beginnings`.
_DONE: Final = 0x14
_ERROR: Final = 0x15
_IN_PROGRESS: Final = 0x16
_VERSION: Final = b"\x01\x00"
_HEADER_SIZE: Final = 5
_TOKEN_LIMIT: Final = 0xFFFF

# The longest token that is read, as .NET has it. It refuses those of four bytes or fewer, too; here none so short opens.
_RECORD_LIMIT: Final = 64 * 1024

# [MS-NNS] 2.2.1: 8 bytes, of which the last four are a HRESULT or a Win32 code, big-endian. So does .NET Framework; .NET 8
# reads and writes the eight little-endian, takes the code from the first four, and of [MS-NNS]'s it understands "Success". Each
# looks at its own four alone, so a code is written in both, and read from those that say something.
_ERROR_SIZE: Final = 8
# SEC_E_LOGON_DENIED: what .NET shows as an InvalidCredentialException.
_LOGON_DENIED: Final = 0x8009030C
# ERROR_TRUST_FAILURE: what .NET says of an SPN, an impersonation level or a protection level that is not accepted.
_TRUST_FAILURE: Final = 1790


class NegotiateStreamCodec(Codec):
    """`WireFormat.NEGOTIATE_STREAM`."""

    __slots__ = ("_peer_done",)
    acknowledges = True
    token_limit = _TOKEN_LIMIT

    def __init__(self) -> None:
        super().__init__()
        self._peer_done = False

    # Handshake

    @property
    def peer_done(self) -> bool:
        """See `Codec.peer_done`."""
        return self._peer_done

    def pack_token(self, token: bytes, *, done: bool) -> bytes:
        """See `Codec.pack_token`."""
        self._check_token(token)
        return _message(_DONE if done else _IN_PROGRESS, token)

    def pack_refusal(self, *, untrusted: bool) -> bytes:
        """See `Codec.pack_refusal`."""
        code = _TRUST_FAILURE if untrusted else _LOGON_DENIED
        return _message(_ERROR, code.to_bytes(4, "little") + code.to_bytes(4, "big"))

    def restart(self) -> None:
        """See `Codec.restart`."""
        self._peer_done = False

    def check_beginning(self, *, initiator: bool) -> None:
        """See `Codec.check_beginning`."""
        check_negotiate_stream(self._scanner.peek(BEGINNING_SIZE), initiator=initiator)

    def next_token(self) -> bytes | None:
        """The peer's next token, or None when more bytes are needed first. Empty: it only says that it is done.

        Raises:
          PeerRefusalError: it has refused.
          TruncatedError: the stream ended instead.
          RemoteProtocolError: this is no message of a handshake, or one behind the peer's last.
        """
        header = self._scanner.peek(_HEADER_SIZE)
        if header and header[0] not in (_DONE, _ERROR, _IN_PROGRESS):
            # Before all of it has come: what is not said in a handshake would be waited for.
            raise RemoteProtocolError(f"no message of a handshake begins with {header[0]:#04x}")
        end = _HEADER_SIZE + int.from_bytes(header[3:], "big")
        if len(header) < _HEADER_SIZE or self._scanner.buffered < end:
            if self._eof:
                at_boundary = self._scanner.at_boundary
                raise TruncatedError("the peer closed during the handshake", at_boundary=at_boundary)
            return None
        held = self._scanner.take_rest()
        self._scanner.feed(held[end:])
        token = held[_HEADER_SIZE:end]
        if header[0] == _ERROR:
            raise PeerRefusalError(_code_of(token))
        if self._peer_done:
            raise RemoteProtocolError("the peer goes on with the handshake, of which it has said that it was done")
        self._peer_done = header[0] == _DONE
        if not token and not self._peer_done:
            raise AuthenticationError("the peer sent an empty token")
        return token

    # Records

    def begin_records(self, trailer_size: int) -> None:  # noqa: ARG002 - nothing is divided here
        """See `Codec.begin_records`."""
        self._scanner.limit = _RECORD_LIMIT

    def tokens(self) -> list[bytes]:
        """The tokens of all records at hand, in order; none where more bytes are needed, and at the stream's end.

        Raises:
          FrameTooLongError: the peer announced a longer record than any writer makes.
          TruncatedError: the stream ended within a record.
        """
        try:
            tokens = self._scanner.frames()
        except LengthError as exc:
            raise FrameTooLongError(exc.length, exc.limit) from None
        if not tokens and self._eof and not self._scanner.at_boundary:
            raise TruncatedError("the peer closed within a record", at_boundary=False)
        return tokens


def _code_of(payload: bytes) -> int | None:
    """The code in a refusal, if it has one."""
    if len(payload) < _ERROR_SIZE:
        return None
    # Big-endian ones have nothing in front, or the sign's bits.
    little, big = payload[:4], payload[4:_ERROR_SIZE]
    return int.from_bytes(big, "big") if little in (bytes(4), b"\xff" * 4) else int.from_bytes(little, "little")


def _message(message_id: int, payload: bytes) -> bytes:
    return bytes([message_id]) + _VERSION + len(payload).to_bytes(2, "big") + payload
