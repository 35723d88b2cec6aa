"""What is demanded of a finished context, beyond the mechanism's own word that it is complete.

pyspnego is a protocol engine, not a policy: `complete` can be True where nobody proved anything (an
SPNEGO client that just says accept-completed). So a context counts as established only after one of
the functions here has looked at all of it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from spnego import ContextProxy

from .._errors import AuthenticationError
from .identity import ContextFlag, PeerIdentity
from .ntlm import REQUIRED_FLAGS
from .spnego_compat import AcceptorNegotiate, AcceptorNTLM, InitiatorNegotiate, inner_context, ntlm_flags

_SESSION_KEY_SIZES: Final = (16, 32)
# The bits of pyspnego's ContextReq that are GSS-API's own.
_GSS_FLAGS: Final = 0x3F


def _peer(proxy: ContextProxy, principal: str, domain: str, name: str) -> PeerIdentity:
    flags = ContextFlag(int(proxy.context_attr) & _GSS_FLAGS)
    mechanism = proxy.negotiated_protocol or "unknown"
    return PeerIdentity(
        principal=principal,
        domain=domain,
        name=name,
        mechanism=mechanism,
        flags=flags,
        mutual=mechanism != "ntlm" and ContextFlag.MUTUAL in flags,
        authenticated_at=datetime.now(UTC),
    )


def _check_inner(proxy: ContextProxy) -> ContextProxy:
    inner = inner_context(proxy)
    if inner is None or not inner.complete:
        raise AuthenticationError("the peer says that it is done, but nobody has authenticated")
    if len(inner.session_key) not in _SESSION_KEY_SIZES:
        raise AuthenticationError("the context has no session key")
    return inner


def _check_flags(proxy: ContextProxy, demanded: ContextFlag) -> None:
    """Kerberos and native SSPI; NTLM's own flags say more, and are looked at instead."""
    missing = demanded & ~ContextFlag(int(proxy.context_attr) & _GSS_FLAGS)
    if missing:
        names = ", ".join(str(flag.name) for flag in missing)
        raise AuthenticationError(f"the context lacks {names}")


def _check_mech_list_mic(proxy: AcceptorNegotiate, mechanism: str) -> None:
    # Without it, whoever sits between could have taken the better mechanisms out of the client's
    # list. Every SPNEGO client sends it with NTLM; with Kerberos it is due when the mechanism is not
    # the client's first (RFC 4178 5).
    if (mechanism == "ntlm" or not proxy.first_offer_chosen) and not proxy.mic_verified:
        raise AuthenticationError("the client's mechListMIC is missing")


def check_acceptor(proxy: ContextProxy, demanded: ContextFlag) -> PeerIdentity:
    """Decide whether an acceptor's context that calls itself complete is; and whose it is.

    Args:
      proxy: the context.
      demanded: what a Kerberos context must provide.

    Raises:
      AuthenticationError: it is not.
    """
    inner = _check_inner(proxy)
    if isinstance(proxy, AcceptorNegotiate):
        _check_mech_list_mic(proxy, inner.negotiated_protocol or "")
    if isinstance(inner, AcceptorNTLM):
        if inner.login is None:
            raise AuthenticationError("the NTLM login was not verified")
        account = inner.login.account
        return _peer(inner, account.principal, account.domain, account.name)
    _check_flags(inner, demanded)
    principal = inner.client_principal
    if not principal:
        raise AuthenticationError("the context names no client")
    if "\\" in principal:
        domain, _, name = principal.partition("\\")
    else:
        name, _, domain = principal.rpartition("@")
    return _peer(inner, principal, domain, name)


def check_initiator(proxy: ContextProxy, demanded: ContextFlag) -> PeerIdentity:
    """The same for an initiator's context.

    Raises:
      AuthenticationError: see `check_acceptor`.
    """
    inner = _check_inner(proxy)
    flags = ntlm_flags(inner)
    if flags is None:
        # Ours asks for mutual authentication, so an acceptor without it is not the one meant.
        _check_flags(inner, demanded | ContextFlag.MUTUAL)
    else:
        if isinstance(proxy, InitiatorNegotiate) and not proxy.mic_verified:
            # pyspnego takes the acceptor's word that it is done. The MIC proves that it knows the key.
            raise AuthenticationError("the acceptor's mechListMIC is missing")
        missing = [name for flag, name in REQUIRED_FLAGS.items() if not flags & flag]
        if missing:
            raise AuthenticationError(f"NTLM: the acceptor left out {', '.join(missing)}")
    target = str(proxy.spn or "")
    return _peer(inner, target, "", target)
