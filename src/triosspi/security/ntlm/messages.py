"""NTLM's AUTHENTICATE message, read with suspicion: [MS-NLMP] 2.2.1.3, and 2.2.2.7 and 2.2.2.1 for its AV pairs.

NEGOTIATE and CHALLENGE are pyspnego's, see `acceptor`. This message decides, and is read here, because it must be
verified over the client's own bytes. pyspnego decodes the client's blob and encodes it again, and what comes out
differs for Samba's clients, which leave out four zero bytes at its end: a valid login would be refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

from ..._errors import AuthenticationError, printable

SIGNATURE: Final = b"NTLMSSP\0"

# NegotiateFlags, 2.2.2.5
NEGOTIATE_UNICODE: Final = 0x00000001
NEGOTIATE_SIGN: Final = 0x00000010
NEGOTIATE_SEAL: Final = 0x00000020
NEGOTIATE_EXTENDED_SESSIONSECURITY: Final = 0x00080000
NEGOTIATE_IDENTIFY: Final = 0x00100000
NEGOTIATE_128: Final = 0x20000000
NEGOTIATE_KEY_EXCH: Final = 0x40000000

# AvId and AvFlags, 2.2.2.1
AV_EOL: Final = 0
AV_FLAGS: Final = 6
AV_TARGET_NAME: Final = 9
AV_CHANNEL_BINDINGS: Final = 10
AV_FLAG_MIC: Final = 0x00000002

MIC_SIZE: Final = 16
PROOF_SIZE: Final = 16
#: NTLMv2_CLIENT_CHALLENGE before its AV pairs, 2.2.2.7.
BLOB_HEADER_SIZE: Final = 28

_AUTHENTICATE: Final = 3
_HEADER_SIZE: Final = 64  # signature, type, six fields of 8 bytes, flags
_VERSION_SIZE: Final = 8
_LONGEST_NAME: Final = 1024

_field_struct = struct.Struct("<HHI")
_av_struct = struct.Struct("<HH")


@dataclass(frozen=True, slots=True)
class Authenticate:
    """An AUTHENTICATE_MESSAGE whose every offset and length lies within it."""

    raw: bytes = field(repr=False)
    flags: int
    domain: str
    user: str
    lm_response: bytes = field(repr=False)
    nt_response: bytes = field(repr=False)
    encrypted_session_key: bytes = field(repr=False)
    payload_offset: int

    @property
    def mic_offset(self) -> int | None:
        """Where the MIC stands if there is one; None if there is no room for one.

        Room is no proof that it is there: other bytes may stand in its place. Only the MIC flag
        within the signed blob tells.
        """
        for offset in (_HEADER_SIZE + _VERSION_SIZE, _HEADER_SIZE):
            if self.payload_offset >= offset + MIC_SIZE:
                return offset
        return None


def asks_to_identify(negotiate: bytes) -> bool:
    """Whether the client of a NEGOTIATE lets itself be identified only, [MS-NLMP] 2.2.2.5; of any bytes."""
    return bool(int.from_bytes(negotiate[12:16], "little") & NEGOTIATE_IDENTIFY)


def read_authenticate(raw: bytes) -> Authenticate:
    """Read an AUTHENTICATE_MESSAGE.

    Raises:
      AuthenticationError: it is malformed, is not in Unicode, or has a user or domain name that
          cannot be an account's.
    """
    if len(raw) < _HEADER_SIZE or raw[:8] != SIGNATURE or int.from_bytes(raw[8:12], "little") != _AUTHENTICATE:
        raise AuthenticationError("not an NTLM AUTHENTICATE message")
    payload_offset = len(raw)
    payloads = []
    for position in range(12, 60, 8):
        length, _, offset = _field_struct.unpack_from(raw, position)
        # Python's integers do not wrap: CVE-2023-25563 was a sum of these two in 32 bits.
        if length and (offset < _HEADER_SIZE or offset + length > len(raw)):
            raise AuthenticationError("NTLM AUTHENTICATE: a field lies outside the message")
        if length:
            payload_offset = min(payload_offset, offset)
        payloads.append(raw[offset : offset + length])
    lm_response, nt_response, domain, user, _workstation, encrypted_session_key = payloads
    flags = int.from_bytes(raw[60:64], "little")
    if not flags & NEGOTIATE_UNICODE:
        # The OEM code page is not named in the message, so such a name means nothing for certain.
        raise AuthenticationError("NTLM AUTHENTICATE: names in an OEM code page")
    return Authenticate(
        raw=raw,
        flags=flags,
        domain=_read_name(domain, "domain"),
        user=_read_name(user, "user"),
        lm_response=lm_response,
        nt_response=nt_response,
        encrypted_session_key=encrypted_session_key,
        payload_offset=payload_offset,
    )


def _read_name(data: bytes, what: str) -> str:
    if len(data) > 2 * _LONGEST_NAME:
        raise AuthenticationError(f"NTLM AUTHENTICATE: a {what} name of {len(data)} bytes")
    try:
        name = data.decode("utf-16-le")
    except UnicodeDecodeError:
        raise AuthenticationError(f"NTLM AUTHENTICATE: the {what} name is not UTF-16") from None
    # A backslash or a colon would be read as the account file's own punctuation.
    if not {"\\", ":", "\0"}.isdisjoint(name):
        raise AuthenticationError(f"NTLM AUTHENTICATE: {printable(name)} can be no {what} name")
    return name


def read_av_pairs(blob: bytes) -> dict[int, bytes]:
    """The AV pairs of an NTLMv2_CLIENT_CHALLENGE, 2.2.2.7; what follows them is left alone.

    Raises:
      AuthenticationError: it ends within a pair or without MsvAvEOL, or has the same pair twice.
    """
    pairs: dict[int, bytes] = {}
    position = BLOB_HEADER_SIZE
    while True:
        if position + _av_struct.size > len(blob):
            raise AuthenticationError("NTLM AUTHENTICATE: the AV pairs have no end")
        av_id, length = _av_struct.unpack_from(blob, position)
        position += _av_struct.size
        if av_id == AV_EOL:
            return pairs
        if position + length > len(blob):
            raise AuthenticationError("NTLM AUTHENTICATE: an AV pair lies outside the message")
        if av_id in pairs:
            raise AuthenticationError("NTLM AUTHENTICATE: an AV pair stands twice")
        pairs[av_id] = blob[position : position + length]
        position += length


def promises_mic(pairs: dict[int, bytes]) -> bool:
    """Whether the client says, within what its password signed, that a MIC stands in its message.

    That cannot have been cleared on the way: a MIC that was dropped (CVE-2019-1040) is still promised.
    """
    return bool(int.from_bytes(pairs.get(AV_FLAGS, b""), "little") & AV_FLAG_MIC)
