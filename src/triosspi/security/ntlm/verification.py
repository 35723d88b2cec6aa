"""Whether an AUTHENTICATE message proves what it says: [MS-NLMP] 3.3.2 for the proof and the session key, 3.2.5.1.2
for the server's checks.
"""

# pyspnego lets in what no Windows server would: NTLMv1, no extended session security, weak keys, a dropped MIC
# (CVE-2019-1040), and the first account of the file for the user name "\". And an unknown account must cost, and look,
# the same as a wrong password. So all that decides is here.

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from typing import Final

from ..._errors import AuthenticationError, printable
from ..names import simple_upper
from .accounts import Account
from .messages import (
    AV_CHANNEL_BINDINGS,
    AV_TARGET_NAME,
    BLOB_HEADER_SIZE,
    MIC_SIZE,
    NEGOTIATE_128,
    NEGOTIATE_EXTENDED_SESSIONSECURITY,
    NEGOTIATE_KEY_EXCH,
    NEGOTIATE_SIGN,
    PROOF_SIZE,
    Authenticate,
    promises_mic,
    read_av_pairs,
)
from .primitives import hmac_md5, ntowf_v2, rc4k

#: Flags without which the session's keys are weak or its signatures mean nothing (CVE-2016-2110).
#: SEAL is not among them: .NET's managed NTLM seals without setting it.
REQUIRED_FLAGS: Final = {
    NEGOTIATE_SIGN: "SIGN",
    NEGOTIATE_EXTENDED_SESSIONSECURITY: "EXTENDED_SESSIONSECURITY",
    NEGOTIATE_KEY_EXCH: "KEY_EXCH",
    NEGOTIATE_128: "128",
}

_SESSION_KEY_SIZE: Final = 16
_V1_RESPONSE_SIZE: Final = 24


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


# Where there is no account, a login is verified against this one, so that it takes as long.
_NOBODY: Final = Account("NOWHERE", "nobody", bytes(16), enabled=False)


def verify(
    message: Authenticate,
    account: Account | None,
    policy: NTLMPolicy,
    *,
    negotiate: bytes,
    challenge: bytes,
) -> Login:
    """Verify a login.

    Args:
      message: the client's AUTHENTICATE_MESSAGE.
      account: what was found under its name, if anything.
      policy: what else is demanded.
      negotiate: the client's NEGOTIATE_MESSAGE, as it came.
      challenge: our CHALLENGE_MESSAGE, as it went.

    Raises:
      AuthenticationError: with the true reason, for the log only.
    """
    _check_form(message, challenge)
    proof, blob = message.nt_response[:PROOF_SIZE], message.nt_response[PROOF_SIZE:]
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
    # What the failure is counted under: those who guess at one account spell its name in many ways.
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
        raise AuthenticationError(f"NTLM: the client left out {', '.join(missing)}", untrusted=True)
    if len(message.nt_response) <= _V1_RESPONSE_SIZE:
        raise AuthenticationError("NTLM: an LM or NTLMv1 response")
    if len(message.nt_response) < PROOF_SIZE + BLOB_HEADER_SIZE:
        raise AuthenticationError("NTLM: an NTLMv2 response that is too short")
    if len(message.encrypted_session_key) != _SESSION_KEY_SIZE:
        raise AuthenticationError("NTLM: the exchanged session key is not 16 bytes")


def _check_mic(message: Authenticate, session_key: bytes, before: bytes, who: str) -> None:
    """Verify the MIC, which covers both messages ``before`` as they crossed the wire, and this one."""
    offset = message.mic_offset
    if offset is None:
        raise AuthenticationError(f"NTLM: the MIC of {who} was taken out")
    raw = message.raw
    zeroed = raw[:offset] + bytes(MIC_SIZE) + raw[offset + MIC_SIZE :]
    expected = hmac_md5(session_key, before + zeroed)
    if not hmac.compare_digest(expected, raw[offset : offset + MIC_SIZE]):
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
        raise AuthenticationError(
            f"NTLM: the client of {who} meant {printable(meant)}, not this server", untrusted=True
        )
