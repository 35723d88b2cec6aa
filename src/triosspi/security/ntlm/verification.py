"""NTLM's AUTHENTICATE message: read with suspicion, verified over the bytes as they came.

Everything here is [MS-NLMP]: 2.2.1.3 for the message, 2.2.2.7 and 2.2.2.1 for the response and its AV
pairs, 3.3.2 for the proof and the session key, 3.2.5.1.2 for the server's checks.
"""

# pyspnego reads NEGOTIATE and writes CHALLENGE; the message that decides is verified here, because
#
# * it must be verified over the client's own bytes. pyspnego decodes the client's blob and encodes
#   it again, and what comes out differs for Samba's clients, which leave out four zero bytes at its
#   end: a valid login would be refused;
# * pyspnego lets in what no Windows server would: NTLMv1, no extended session security, weak keys, a
#   dropped MIC (CVE-2019-1040), and the first account of the file for the user name "\";
# * an unknown account must cost and look the same as a wrong password.

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ..._errors import AuthenticationError, printable
from ..names import simple_upper
from .accounts import Account

SIGNATURE: Final = b"NTLMSSP\0"

# NegotiateFlags, 2.2.2.5
NEGOTIATE_UNICODE: Final = 0x00000001
NEGOTIATE_SIGN: Final = 0x00000010
NEGOTIATE_SEAL: Final = 0x00000020
NEGOTIATE_EXTENDED_SESSIONSECURITY: Final = 0x00080000
NEGOTIATE_128: Final = 0x20000000
NEGOTIATE_KEY_EXCH: Final = 0x40000000

#: Flags without which the session's keys are weak or its signatures mean nothing (CVE-2016-2110).
#: SEAL is not among them: .NET's managed NTLM seals without setting it.
REQUIRED_FLAGS: Final = {
    NEGOTIATE_SIGN: "SIGN",
    NEGOTIATE_EXTENDED_SESSIONSECURITY: "EXTENDED_SESSIONSECURITY",
    NEGOTIATE_KEY_EXCH: "KEY_EXCH",
    NEGOTIATE_128: "128",
}

# AvId and AvFlags, 2.2.2.1
AV_EOL: Final = 0
AV_FLAGS: Final = 6
AV_TARGET_NAME: Final = 9
AV_CHANNEL_BINDINGS: Final = 10
AV_FLAG_MIC: Final = 0x00000002

_AUTHENTICATE: Final = 3
_HEADER_SIZE: Final = 64  # signature, type, six fields of 8 bytes, flags
_MIC_SIZE: Final = 16
_VERSION_SIZE: Final = 8
_PROOF_SIZE: Final = 16
_SESSION_KEY_SIZE: Final = 16
_V1_RESPONSE_SIZE: Final = 24
# NTLMv2_CLIENT_CHALLENGE before its AV pairs, 2.2.2.7.
_BLOB_HEADER_SIZE: Final = 28
_LONGEST_NAME: Final = 1024

_field_struct = struct.Struct("<HHI")
_av_struct = struct.Struct("<HH")


def hmac_md5(key: bytes, data: bytes) -> bytes:
    """HMAC-MD5, [MS-NLMP] 6."""
    return hmac.digest(key, data, "md5")


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
            if self.payload_offset >= offset + _MIC_SIZE:
                return offset
        return None


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
    position = _BLOB_HEADER_SIZE
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


def ntowf_v2(user: str, domain: str, nt_hash: bytes) -> tuple[bytes, ...]:
    """The keys that a client may have made of an account's NT hash (NTOWFv2, 3.3.2).

    There are two: Microsoft's upper-casing (and Samba's, and .NET's) keeps a letter whose upper case
    is two letters, while pyspnego, gss-ntlmssp and sspi-rs take Unicode's full mapping. They differ
    for ``straße`` and its like, and agree for all else.
    """
    simple, full = simple_upper(user), user.upper()
    names = (simple,) if simple == full else (simple, full)
    return tuple(hmac_md5(nt_hash, (name + domain).encode("utf-16-le")) for name in names)


@dataclass(frozen=True, slots=True)
class NTLMPolicy:
    """What is demanded of an NTLM login beyond the right password.

    Attributes:
      require_mic: refuse a client that does not say, within its signed blob, that a MIC follows.
      channel_bindings_hash: MD5 of the acceptor's channel bindings, which the client must have sent.
      target_names: SPNs of which a client must have meant one, in any case.
      require_target: "off" ignores what the client meant; "allow" refuses only another SPN than
          these; "require" refuses a client that names none, too.
    """

    require_mic: bool = True
    channel_bindings_hash: bytes | None = None
    target_names: frozenset[str] = frozenset()
    require_target: str = "off"


@dataclass(frozen=True, slots=True)
class Login:
    """A verified login."""

    account: Account
    session_key: bytes = field(repr=False)
    flags: int


# Whoever is not in the account file is verified against this, so that it takes as long.
_NOBODY: Final = Account("NOWHERE", "nobody", bytes(16), enabled=False)


def verify(
    message: Authenticate,
    account: Account | None,
    policy: NTLMPolicy,
    *,
    negotiate: bytes,
    challenge: bytes,
    rc4k: Callable[[bytes, bytes], bytes],
) -> Login:
    """Verify a login.

    Args:
      message: the client's AUTHENTICATE_MESSAGE.
      account: what was found under its name, if anything.
      policy: what else is demanded.
      negotiate: the client's NEGOTIATE_MESSAGE, as it came.
      challenge: our CHALLENGE_MESSAGE, as it went.
      rc4k: one-shot RC4 of (key, data), 6 "RC4K".

    Raises:
      AuthenticationError: with the true reason, for the log only.
    """
    _check_form(message, challenge)
    proof, blob = message.nt_response[:_PROOF_SIZE], message.nt_response[_PROOF_SIZE:]
    pairs = read_av_pairs(blob)

    # Unknown, disabled and wrong password do the same work, and are told apart only afterwards.
    known = account or _NOBODY
    server_challenge = challenge[24:32]
    session_base_key = None
    for key in ntowf_v2(message.user, message.domain, known.nt_hash):
        expected = hmac_md5(key, server_challenge + blob)
        base_key = hmac_md5(key, proof)
        if hmac.compare_digest(expected, proof):
            session_base_key = base_key
    who = printable(f"{message.domain}\\{message.user}" if message.domain else message.user)
    # As whom it is counted: whoever guesses at one account spells its name in many ways.
    spelled, named = simple_upper(f"{message.domain}\\{message.user}"), known.principal
    principal = spelled if account is None else named
    if account is None:
        raise AuthenticationError(f"NTLM: no account {who}", principal=principal)
    if session_base_key is None:
        raise AuthenticationError(f"NTLM: wrong password for {who}", principal=principal)
    if not account.enabled:
        raise AuthenticationError(f"NTLM: the account {who} is disabled", principal=principal)

    session_key = rc4k(session_base_key, message.encrypted_session_key)
    if promises_mic(pairs):
        _check_mic(message, session_key, negotiate + challenge, who)
    elif policy.require_mic:
        raise AuthenticationError(f"NTLM: the client of {who} sends no MIC")
    _check_channel_bindings(pairs, policy, who)
    _check_target(pairs, policy, who)
    return Login(account, session_key, message.flags)


def _check_form(message: Authenticate, challenge: bytes) -> None:
    if not message.user:
        raise AuthenticationError("NTLM: an anonymous login")
    challenge_flags = int.from_bytes(challenge[20:24], "little")
    missing = [name for flag, name in REQUIRED_FLAGS.items() if not message.flags & challenge_flags & flag]
    if missing:
        raise AuthenticationError(f"NTLM: the client left out {', '.join(missing)}")
    if len(message.nt_response) <= _V1_RESPONSE_SIZE:
        raise AuthenticationError("NTLM: an LM or NTLMv1 response")
    if len(message.nt_response) < _PROOF_SIZE + _BLOB_HEADER_SIZE:
        raise AuthenticationError("NTLM: an NTLMv2 response that is too short")
    if len(message.encrypted_session_key) != _SESSION_KEY_SIZE:
        raise AuthenticationError("NTLM: the exchanged session key is not 16 bytes")


def promises_mic(pairs: dict[int, bytes]) -> bool:
    """Whether the client says, within what its password signed, that a MIC stands in its message.

    Nobody can have cleared that on the way: a MIC that was dropped (CVE-2019-1040) is still promised.
    """
    return bool(int.from_bytes(pairs.get(AV_FLAGS, b""), "little") & AV_FLAG_MIC)


def _check_mic(message: Authenticate, session_key: bytes, before: bytes, who: str) -> None:
    """Verify the MIC, which covers both messages ``before`` as they crossed the wire, and this one."""
    offset = message.mic_offset
    if offset is None:
        raise AuthenticationError(f"NTLM: the MIC of {who} was taken out")
    raw = message.raw
    zeroed = raw[:offset] + bytes(_MIC_SIZE) + raw[offset + _MIC_SIZE :]
    expected = hmac_md5(session_key, before + zeroed)
    if not hmac.compare_digest(expected, raw[offset : offset + _MIC_SIZE]):
        raise AuthenticationError(f"NTLM: the MIC of {who} is wrong: a message was changed on the way")


def _check_channel_bindings(pairs: dict[int, bytes], policy: NTLMPolicy, who: str) -> None:
    if policy.channel_bindings_hash is None:
        return
    # 16 zero bytes are what a client without a channel sends: here they are as wrong as any other.
    if not hmac.compare_digest(pairs.get(AV_CHANNEL_BINDINGS, b""), policy.channel_bindings_hash):
        raise AuthenticationError(f"NTLM: the channel bindings of {who} are missing or wrong")


def _check_target(pairs: dict[int, bytes], policy: NTLMPolicy, who: str) -> None:
    if policy.require_target == "off":
        return
    meant = pairs.get(AV_TARGET_NAME, b"").decode("utf-16-le", errors="replace")
    if not meant and policy.require_target == "allow":
        return
    if simple_upper(meant) not in policy.target_names:
        raise AuthenticationError(f"NTLM: the client of {who} meant {printable(meant)}, not this server")


def channel_bindings_hash(packed: bytes) -> bytes:
    """MsvAvChannelBindings: MD5 of a gss_channel_bindings_struct, 2.2.2.1 and RFC 2744 3.11."""
    return hashlib.md5(packed, usedforsecurity=False).digest()
