"""Handing a finished context over to a native sealer, where there is one for it.

pyspnego and the Kerberos library own the handshake and its keys. Afterwards they seal a message at 15 to 20
microseconds, nearly all of it spent around the cryptography; `triosspi._sealing` spends less than one.
"""

# What must be right when the keys change hands, or the two sides disagree from the first message on:
#
# * NTLM: the policy has left one shape only (extended session security, key exchange, 128 bit), so the keys
#   follow from the session key ([MS-NLMP] 3.4.5). Each side's RC4 begins anew after a mechListMIC, but the
#   MIC has taken number 0: after SPNEGO messages are numbered from 1, after raw NTLM from 0 ([MS-SPNG]).
# * Kerberos: the lucid export gives the key and both numbers, and ends the context: everything else that is
#   wanted of it, name, PAC, encryption type, has been asked before. The number to be received is the one
#   from the handshake; MICs verified since then are not counted in it, and must be added.
#
# There is no way back after either, so it is decided first.

from __future__ import annotations

from types import ModuleType

from .kerberos.gssapi import KerberosContext
from .kerberos.tickets import AES_ENCTYPES
from .mechanism import Handshake, Mechanism
from .ntlm.acceptor import NTLMAcceptor
from .proxies import NTLMInitiator
from .sealers import BatchSealer

_sealing: ModuleType | None
try:
    from .. import _sealing
except ImportError:  # pragma: no cover - built without OpenSSL's headers
    _sealing = None


def available() -> dict[str, bool]:
    """For each mechanism, whether it is sealed natively here.

    Not where the extension could not be built, nor NTLM where OpenSSL has no RC4 (its legacy provider is
    missing, or FIPS is on).
    """
    found: dict[str, bool] = {} if _sealing is None else _sealing.available()
    return {mechanism: found.get(mechanism, False) for mechanism in ("ntlm", "kerberos")}


def seals_kerberos(enctype: int | None) -> bool:
    """Whether a Kerberos context with a session key of this encryption type is sealed natively here.

    Then each message must have the number after the last one's, whatever the peer has asked its own library for.
    """
    return enctype in AES_ENCTYPES and available()["kerberos"]


def take_over(handshake: Handshake, inner: Mechanism, *, initiator: bool, encrypt: bool) -> BatchSealer | None:
    """A native sealer for a finished context, which is of no use any more then; None if there is none.

    Args:
      handshake: what has finished, SPNEGO's if there is one around it.
      inner: the mechanism's own context.
      initiator: which side this is.
      encrypt: False: messages are signed only.
    """
    sent, verified = int(handshake.mic_sent), int(handshake.mic_verified)
    if isinstance(inner, (NTLMAcceptor, NTLMInitiator)):
        if not available()["ntlm"]:
            return None
        assert _sealing is not None
        ntlm: BatchSealer = _sealing.NTLMSealer(
            inner.session_key, initiator=initiator, send_sequence=sent, receive_sequence=verified, encrypt=encrypt
        )
        return ntlm
    if isinstance(inner, KerberosContext) and seals_kerberos(enctype := inner.enctype):
        return _take_over_kerberos(inner, enctype, verified, initiator=initiator, encrypt=encrypt)
    return None


def _take_over_kerberos(
    context: KerberosContext, enctype: int, mics_verified: int, *, initiator: bool, encrypt: bool
) -> BatchSealer:
    assert _sealing is not None
    lucid = context.export_lucid()
    keys = lucid.cfx_kd
    subkey = keys.acceptor_subkey is not None
    sealer: BatchSealer = _sealing.KerberosSealer(
        keys.acceptor_subkey if subkey else keys.ctx_key,
        enctype,
        initiator=initiator,
        acceptor_subkey=subkey,
        send_sequence=lucid.send_seq,
        receive_sequence=lucid.recv_seq + mics_verified,
        encrypt=encrypt,
    )
    return sealer
