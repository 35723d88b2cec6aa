"""Connections that begin with another protocol: recognised early, and named for the operator."""

# A handshake token comes behind its length, so a reader of lengths takes any bytes for the beginning of a token. The first
# bytes of most other protocols make a length beyond the limit, but not all: .NET's NegotiateStream begins with what reads as a
# small one (16 01 00 00: 278 bytes), and both sides would wait until the deadline. So the first bytes of the first token are
# looked at as soon as they come: only NTLM's signature can be there, or the tag and length of SPNEGO or Kerberos, and
# that length must agree with the one in front of it. A token that passes here may still be anything; one that does not
# pass cannot become a token, whatever follows.
#
# A NegotiateStream says what it is by its own first bytes, so one port can serve it and ours: but for one length of ours, which
# begins as it does, and then it is the token that tells them apart (`is_negotiate_stream`).
#
# The reader of the error is an operator who has connected two things that do not fit, so the name of the protocol matters.

from __future__ import annotations

import re
from typing import Final

from .._errors import ForeignProtocolError, printable

#: Bytes; more need not be at hand for anything here.
BEGINNING_SIZE: Final = 32

_NTLM: Final = b"NTLMSSP\0"
_PREFIX: Final = 4
_LONG_FORM: Final = 0x80
_LONGEST_LENGTH: Final = 4

# SPNEGO's NegTokenInit and Kerberos's AP-REQ in their GSS-API wrapper, and a bare NegTokenInit. A NegTokenResp does not belong
# there either, but is the acceptor's to refuse, by its right name.
_INITIATOR_TAGS: Final = frozenset(b"\x60\xa0\xa1")
# NegTokenResp, Kerberos's AP-REP and KRB-ERROR, wrapped or bare.
_ACCEPTOR_TAGS: Final = frozenset(b"\xa1\x60\x6f\x7e")

# [MS-NNS] 2.2.1: message id, version, size.
_NNS_MESSAGES: Final = b"\x14\x15\x16"
_NNS_ERROR: Final = 0x15
_NNS_HEADER: Final = 5
_NNS_BEGINNING: Final = b"\x16\x01\x00"
#: Bytes; see `is_negotiate_stream`.
NEGOTIATE_STREAM_KNOWN_BY: Final = 6

_HTTP_METHOD: Final = rb"(?:GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH|PRI) "

# In this order; each is matched at the very beginning.
_KNOWN: Final = tuple(
    (re.compile(pattern, re.DOTALL), name)
    for pattern, name in (
        # The handshake's record of NegotiateStream, [MS-NNS] 2.2.1: message id, version 1.0.
        (rb"[\x14-\x16]\x01\x00", "a .NET NegotiateStream, another wire format than this one"),
        # RFC 8446 5.1: content type, then the version of a record, 3.x. In an SSL 2.0 hello it stands further behind.
        (rb"\x16\x03[\x00-\x04]", "a TLS ClientHello; TLS is not spoken here"),
        (rb"\x15\x03[\x00-\x04]", "a TLS alert, so its sender speaks TLS"),
        (rb"[\x80-\xff].\x01\x03[\x00-\x04]", "an SSL 2.0 ClientHello; TLS is not spoken here"),
        (rb"PROXY |\r\n\r\n\0\r\nQ", "a PROXY header; name its sender in proxy_from"),
        (_HTTP_METHOD, "an HTTP request"),
        (rb"HTTP/", "an HTTP response"),
        (rb"SSH-", "SSH"),
        (rb"\0...[\xfe\xff]SMB", "SMB"),
        (rb"\x03\0..[\x02-\x7f]\xe0", "RDP"),
        (rb"\x05\0[\x0b\x0e]", "DCE/RPC"),
        (rb"\x30(?:[\x05-\x7f]|[\x81-\x84].{1,4})\x02\x01", "LDAP"),
        (rb"NTLMSSP\0", "an NTLM token without its length in front"),
        (rb"[\x60\xa0\xa1](?:.|\x81.|\x82..)[\x06\x30]", "an SPNEGO or Kerberos token without its length in front"),
        (rb"\0\0..(?:NTLM|[\x60\xa0\xa1])", "a token behind a length in big-endian order, which here is little-endian"),
    )
)
# A length of ours, and what may stand behind it.
_OURS: Final = re.compile(rb"..\0\0(?:NTLM|[\x60\xa0\xa1\x6f\x7e])", re.DOTALL)
_TEXT: Final = re.compile(rb"[\t\r\n -~]{4,}")


def name_of(data: bytes) -> str | None:
    """What the first bytes of a connection look like, where that can be told and is no token of ours.

    Args:
      data: the first bytes, as many as there are, up to `BEGINNING_SIZE`.
    """
    for pattern, name in _KNOWN:
        if pattern.match(data):
            return name
    if text := _TEXT.match(data):
        return f"text: {printable(text[0].decode('ascii'), BEGINNING_SIZE)}"
    return None


def check_beginning(data: bytes, limit: int, *, initiator: bool) -> None:
    """See that the first bytes of a connection can become a handshake token.

    Args:
      data: the first bytes, as many as there are, up to `BEGINNING_SIZE`.
      limit: bytes; the longest token that is accepted.
      initiator: whether they are an initiator's.

    Raises:
      ForeignProtocolError: they cannot; or their length is beyond the limit, and it is known what they are instead.
    """
    if len(data) < _PREFIX:
        return
    length = int.from_bytes(data[:_PREFIX], "little")
    if length > limit:
        if (name := name_of(data)) is not None:
            raise ForeignProtocolError(name)
        # The reader of lengths says how long it is.
        return
    if length and not _may_begin_token(data[_PREFIX:], length, _INITIATOR_TAGS if initiator else _ACCEPTOR_TAGS):
        raise ForeignProtocolError(name_of(data))


def check_negotiate_stream(data: bytes, *, initiator: bool) -> None:
    """The same for the first message of a NegotiateStream's handshake.

    Raises:
      ForeignProtocolError: the first bytes cannot become one.
    """
    if not data:
        return
    # Its version is ignored, [MS-NNS] 3.1.5.2; but 3 is TLS's, whose first bytes are the same otherwise.
    if data[0] not in _NNS_MESSAGES or data[1:2] == b"\x03":
        ours = "the sample's or the framed wire format" if _OURS.match(data) else None
        raise ForeignProtocolError(ours or name_of(data))
    size = int.from_bytes(data[3:_NNS_HEADER], "big")
    tags = _INITIATOR_TAGS if initiator else _ACCEPTOR_TAGS
    if data[0] != _NNS_ERROR and len(data) > _NNS_HEADER and not _may_begin_token(data[_NNS_HEADER:], size, tags):
        raise ForeignProtocolError(name_of(data[_NNS_HEADER:]))


def is_negotiate_stream(data: bytes) -> bool | None:
    """Whether an initiator speaks .NET's NegotiateStream, where it may also be the sample's format or `framed`.

    Args:
      data: the first bytes, as many as there are.

    Returns:
      None: more bytes are needed, at most `NEGOTIATE_STREAM_KNOWN_BY`.
    """
    if not data.startswith(_NNS_BEGINNING):
        return None if _NNS_BEGINNING.startswith(data) else False
    if len(data) == len(_NNS_BEGINNING):
        return None
    if data[len(_NNS_BEGINNING)]:
        # As a length of ours it would be one of 16 MiB and more.
        return True
    # Or a token of 278 bytes behind its length; its second byte is then another than that of a token one byte later.
    if len(data) < NEGOTIATE_STREAM_KNOWN_BY:
        return None
    length = int.from_bytes(data[:_PREFIX], "little")
    return not _may_begin_token(data[_PREFIX:NEGOTIATE_STREAM_KNOWN_BY], length, _INITIATOR_TAGS)


def _may_begin_token(body: bytes, length: int, tags: frozenset[int]) -> bool:
    """Whether a token of so many bytes can begin like this."""
    body = body[:length]
    if not body or _NTLM.startswith(body[: len(_NTLM)]):
        return True
    if body[0] not in tags:
        return False
    # The tag's length, as DER has it, must be that of all that follows in the token.
    if length < 2:
        return False
    if len(body) < 2:
        return True
    size = body[1]
    if size < _LONG_FORM:
        return size == length - 2
    count = size - _LONG_FORM
    if not 0 < count <= _LONGEST_LENGTH:
        return False
    octets = body[2 : 2 + count]
    return len(octets) < count or int.from_bytes(octets, "big") == length - 2 - count
