"""SPNEGO's tokens, RFC 4178 4.2, read with suspicion and written; and what the first token of a handshake is."""

from __future__ import annotations

from typing import Final, NamedTuple

from ..._errors import AuthenticationError

# DER contents of the mechanisms' OIDs. Windows lists Kerberos first under a number that was once a typing
# error, and wants it back in the answer.
OID_KERBEROS: Final = bytes.fromhex("2a864886f712010202")
OID_MS_KERBEROS: Final = bytes.fromhex("2a864882f712010202")
OID_NTLM: Final = bytes.fromhex("2b06010401823702020a")
_OID_SPNEGO: Final = bytes.fromhex("2b0601050502")

#: negState, 4.2.2.
ACCEPT_COMPLETED, ACCEPT_INCOMPLETE, REJECT, REQUEST_MIC = range(4)

# More than anybody offers; Windows has five.
_MOST_MECHANISMS: Final = 32

_APPLICATION_0: Final = 0x60
_CONTEXT: Final = 0xA0  # + the number of the field
_SEQUENCE: Final = 0x30
_OCTET_STRING: Final = 0x04
_OID: Final = 0x06
_ENUMERATED: Final = 0x0A
_LONG_LENGTH: Final = 0x80
_MOST_LENGTH_BYTES: Final = 4

_NTLMSSP: Final = b"NTLMSSP\0"


# DER, as far as it is used here: definite, shortest lengths, nothing left over.


def _malformed() -> AuthenticationError:
    return AuthenticationError("SPNEGO: a malformed token")


def _read(data: bytes, at: int, end: int) -> tuple[int, int, int]:
    """The tag of the value at a position, and where its contents begin and end."""
    if at + 2 > end:
        raise _malformed()
    tag, length = data[at], data[at + 1]
    at += 2
    if length >= _LONG_LENGTH:
        size = length - _LONG_LENGTH
        if not 0 < size <= _MOST_LENGTH_BYTES or at + size > end or data[at] == 0:
            raise _malformed()
        length = int.from_bytes(data[at : at + size], "big")
        at += size
        if length < _LONG_LENGTH:
            raise _malformed()
    if length > end - at:
        raise _malformed()
    return tag, at, at + length


def _enter(data: bytes, tag: int, at: int, end: int) -> tuple[int, int]:
    """The contents of a value that must have this tag, and must be all that there is."""
    found, start, stop = _read(data, at, end)
    if found != tag or stop != end:
        raise _malformed()
    return start, stop


def _fields(data: bytes, at: int, end: int) -> dict[int, tuple[int, int]]:
    """The fields [0], [1], ... of a sequence, in their order, each at most once."""
    at, end = _enter(data, _SEQUENCE, at, end)
    fields: dict[int, tuple[int, int]] = {}
    last = _CONTEXT - 1
    while at < end:
        tag, start, stop = _read(data, at, end)
        if tag <= last:
            raise _malformed()
        fields[tag - _CONTEXT] = (start, stop)
        last, at = tag, stop
    return fields


def _octets(data: bytes, field: tuple[int, int] | None) -> bytes | None:
    if field is None:
        return None
    start, stop = _enter(data, _OCTET_STRING, *field)
    return data[start:stop]


def _write(tag: int, contents: bytes) -> bytes:
    size = len(contents)
    if size < _LONG_LENGTH:
        return bytes((tag, size)) + contents
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, _LONG_LENGTH | len(length))) + length + contents


# The tokens


class NegTokenInit(NamedTuple):
    """An initiator's first token, 4.2.1, without its hints.

    Attributes:
      mech_types: the list of mechanisms in DER as it came, which the mechListMIC is over.
      offered: the contents of its OIDs, the preferred first; at least one.
      mech_token: the guess, which is the first token of the first mechanism.
    """

    mech_types: bytes
    offered: list[bytes]
    mech_token: bytes | None


class NegTokenResp(NamedTuple):
    """A later token, 4.2.2.

    Attributes:
      state: a negState, or any other number.
      names_mechanism: whether it says which mechanism was chosen.
      token: the mechanism's.
      mic: the mechListMIC.
    """

    state: int | None
    names_mechanism: bool
    token: bytes | None
    mic: bytes | None


def read_neg_token_init(data: bytes) -> NegTokenInit:
    """Read an initiator's first token, in the frame of RFC 2743 3.1 or without it.

    Raises:
      AuthenticationError: it is malformed.
    """
    at, end = 0, len(data)
    if data[:1] == bytes((_APPLICATION_0,)):
        at, end = _enter(data, _APPLICATION_0, at, end)
        tag, start, at = _read(data, at, end)
        if tag != _OID or data[start:at] != _OID_SPNEGO:
            raise _malformed()
    fields = _fields(data, *_enter(data, _CONTEXT, at, end))
    if 0 not in fields:
        raise _malformed()
    start, stop = fields[0]
    return NegTokenInit(data[start:stop], _read_oids(data, start, stop), _octets(data, fields.get(2)))


def _read_oids(data: bytes, at: int, end: int) -> list[bytes]:
    at, end = _enter(data, _SEQUENCE, at, end)
    oids: list[bytes] = []
    while at < end:
        tag, start, at = _read(data, at, end)
        if tag != _OID or len(oids) == _MOST_MECHANISMS:
            raise _malformed()
        oids.append(data[start:at])
    if not oids:
        raise _malformed()
    return oids


def read_neg_token_resp(data: bytes) -> NegTokenResp:
    """Read an initiator's later token.

    Raises:
      AuthenticationError: it is malformed.
    """
    fields = _fields(data, *_enter(data, _CONTEXT + 1, 0, len(data)))
    state = None
    if 0 in fields:
        start, stop = _enter(data, _ENUMERATED, *fields[0])
        state = int.from_bytes(data[start:stop], "big")
    return NegTokenResp(state, 1 in fields, _octets(data, fields.get(2)), _octets(data, fields.get(3)))


def write_neg_token_resp(
    state: int, *, mechanism: bytes | None = None, token: bytes | None = None, mic: bytes | None = None
) -> bytes:
    """Write an acceptor's token, 4.2.2."""
    contents = _write(_CONTEXT, _write(_ENUMERATED, bytes((state,))))
    if mechanism is not None:
        contents += _write(_CONTEXT + 1, _write(_OID, mechanism))
    if token:
        contents += _write(_CONTEXT + 2, _write(_OCTET_STRING, token))
    if mic is not None:
        contents += _write(_CONTEXT + 3, _write(_OCTET_STRING, mic))
    return _write(_CONTEXT + 1, _write(_SEQUENCE, contents))


# As they stand in an InitialContextToken, RFC 2743 3.1.
_SPNEGO_ELEMENT: Final = _write(_OID, _OID_SPNEGO)
_KERBEROS_ELEMENT: Final = _write(_OID, OID_KERBEROS)


def first_token_kind(token: bytes) -> str:
    """What an initiator begins with: ``"spnego"``, ``"ntlm"`` or ``"kerberos"``.

    Windows sends raw NTLM when that is all it has, and raw Kerberos to a server that it asked for
    by that name; both are as normal as SPNEGO.

    Raises:
      AuthenticationError: none of these.
    """
    if token.startswith(_NTLMSSP):
        return "ntlm"
    if token[:1] == bytes((_CONTEXT,)):
        return "spnego"
    if token[:1] == bytes((_APPLICATION_0,)) and len(token) > 1:
        length, body = token[1], 2
        if length & _LONG_LENGTH:
            body += length & ~_LONG_LENGTH
            length = int.from_bytes(token[2:body], "big")
        # A Kerberos library takes what is there, whatever the length says.
        if length == len(token) - body:
            if token.startswith(_SPNEGO_ELEMENT, body):
                return "spnego"
            if token.startswith(_KERBEROS_ELEMENT, body):
                return "kerberos"
    raise AuthenticationError("the first token is neither SPNEGO, nor NTLM, nor Kerberos")
