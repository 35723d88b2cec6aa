"""What is demanded of a finished context, beyond the mechanism's own word that it is complete.

pyspnego is a protocol engine, not a policy: `complete` can be True where the peer has proved nothing (an
SPNEGO client that just says accept-completed). So a context counts as established only after one of
the functions here has looked at all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from .._errors import AuthenticationError
from .authorization import Authorization
from .identity import ContextFlag, PeerIdentity
from .kerberos.gssapi import KerberosAcceptor
from .kerberos.tickets import KerberosPolicy, Ticket, ask_for, check_enctype, enctype_name
from .kerberos.tickets import check as check_ticket
from .mechanism import Handshake, Mechanism
from .native import seals_kerberos
from .ntlm.acceptor import NTLMAcceptor
from .ntlm.verification import REQUIRED_FLAGS
from .proxies import NegotiateInitiator, NTLMInitiator, ProxyContext, SystemContext
from .spnego.acceptor import SPNEGOAcceptor

_SESSION_KEY_SIZES: Final = (16, 32)
# The bits that are ours, of all that GSS-API and pyspnego have.
_GSS_FLAGS: Final = sum(ContextFlag)
_MUTUAL: Final = int(ContextFlag.MUTUAL)
_ORDER: Final = int(ContextFlag.REPLAY | ContextFlag.SEQUENCE)


def _peer(mechanism: str, flags: int, principal: str, domain: str, name: str, **more: Any) -> PeerIdentity:
    return PeerIdentity(
        principal=principal,
        domain=domain,
        name=name,
        mechanism=mechanism,
        flags=ContextFlag(flags & _GSS_FLAGS),
        mutual=mechanism != "ntlm" and bool(flags & _MUTUAL),
        **{"authenticated_at": datetime.now(UTC), **more},
    )


def _check_inner(handshake: Handshake) -> Mechanism:
    inner = handshake.inner
    if inner is None or not inner.complete:
        raise AuthenticationError("the peer says that it is done, but nobody has authenticated")
    return inner


def _check_session_key(inner: Mechanism) -> None:
    """See that there is a key. Kerberos contexts of ours say more about theirs: its encryption type."""
    if len(inner.session_key) not in _SESSION_KEY_SIZES:
        raise AuthenticationError("the context has no session key")


def _order_is_ours(demanded: ContextFlag, enctype: int) -> int:
    """What is left of the demands on a Kerberos context where our own sealer will see to the order.

    It compares each message's number with the one that is due, and MIT, Heimdal, .NET and sspi-rs number their
    messages whatever was asked of them; .NET on Linux cannot ask at all. A Kerberos library that seals for us
    compares only when the client has asked, and we could not do it in its place: it does not tell the number to
    begin with, and RC4-HMAC hides them.
    """
    return int(demanded) & ~_ORDER if seals_kerberos(enctype) else int(demanded)


def _check_flags(inner: Mechanism, demanded: ContextFlag) -> None:
    """See that an initiator's context provides what is demanded. Not of NTLM, whose own flags say more."""
    missing = demanded & ~ContextFlag(inner.flags & _GSS_FLAGS)
    if missing:
        names = ", ".join(str(flag.name) for flag in missing)
        raise AuthenticationError(f"the context lacks {names}", untrusted=True)


def _check_mech_list_mic(spnego: SPNEGOAcceptor, mechanism: str | None) -> None:
    # Without it, whoever sits between could have taken the better mechanisms out of the client's
    # list. Every SPNEGO client sends it with NTLM; with Kerberos it is due when the mechanism is not
    # the client's first (RFC 4178 5).
    if (mechanism == "ntlm" or not spnego.first_offer_chosen) and not spnego.mic_verified:
        raise AuthenticationError("the client's mechListMIC is missing")


@dataclass(frozen=True, slots=True)
class AcceptorPolicy:
    """What one acceptor demands of every context.

    Attributes:
      kerberos: of tickets.
      authorization: of whoever has authenticated, by either mechanism.
    """

    kerberos: KerberosPolicy
    authorization: Authorization

    def check(self, handshake: Handshake, demanded: ContextFlag) -> PeerIdentity:
        """Decide whether a handshake that calls itself complete is; who the peer is; and whether they may come in.

        Args:
          handshake: the handshake.
          demanded: what a Kerberos context must provide. Replay and sequence detection only where the system or its
              Kerberos library seals.

        Raises:
          AuthenticationError: it is not, or they may not.
        """
        inner = _check_inner(handshake)
        if isinstance(handshake, SPNEGOAcceptor):
            _check_mech_list_mic(handshake, inner.name)
        peer = self._identify(inner, demanded)
        self.authorization.check(peer)
        return peer

    def _identify(self, inner: Mechanism, demanded: ContextFlag) -> PeerIdentity:
        if isinstance(inner, NTLMAcceptor):
            if inner.login is None:
                raise AuthenticationError("the NTLM login was not verified")
            _check_session_key(inner)
            account = inner.login.account
            return _peer("ntlm", inner.flags, account.principal, account.domain, account.name)
        if isinstance(inner, KerberosAcceptor):
            assert inner.ticket is not None
            demands = _order_is_ours(demanded, inner.ticket.enctype)
            check_ticket(inner.ticket, self.kerberos, demands, inner.service)
            return _ticket_peer(inner.ticket)
        assert isinstance(inner, SystemContext)
        return _system_peer(inner, demanded)


def _ticket_peer(ticket: Ticket) -> PeerIdentity:
    name, _, realm = ticket.client.rpartition("@")
    now = datetime.now(UTC)
    return _peer(
        "kerberos",
        ticket.flags,
        ticket.client,
        realm,
        name,
        authenticated_at=now,
        expires_at=now + timedelta(seconds=ticket.lifetime),
        enctype=enctype_name(ticket.enctype),
        delegated=ticket.delegated,
        pac=ticket.pac,
    )


def _system_peer(inner: SystemContext, demanded: ContextFlag) -> PeerIdentity:
    """What Windows's own SSPI says."""
    _check_session_key(inner)
    if missing := int(demanded) & ~inner.flags:
        raise AuthenticationError(f"the context lacks {ask_for(missing)}", untrusted=True)
    principal = inner.client
    if not principal:
        raise AuthenticationError("the context names no client")
    if "\\" in principal:
        domain, _, name = principal.partition("\\")
    else:
        name, _, domain = principal.rpartition("@")
    return _peer(inner.negotiated, inner.flags, principal, domain, name)


def check_initiator(handshake: Handshake, demanded: ContextFlag, *, allow_rc4: bool = False) -> PeerIdentity:
    """The same for an initiator's handshake.

    Args:
      handshake: the handshake.
      demanded: what a Kerberos context must provide, besides mutual authentication.
      allow_rc4: whether a Kerberos session key of RC4-HMAC will do.

    Raises:
      AuthenticationError: it is not what it calls itself, or is too weak.
    """
    inner = _check_inner(handshake)
    _check_session_key(inner)
    if isinstance(inner, NTLMInitiator):
        if isinstance(handshake, NegotiateInitiator) and not handshake.mic_verified:
            # pyspnego takes the acceptor's word that it is done. The MIC proves that it knows the key.
            raise AuthenticationError("the acceptor's mechListMIC is missing")
        missing = [name for flag, name in REQUIRED_FLAGS.items() if not inner.negotiate_flags & flag]
        if missing:
            raise AuthenticationError(f"NTLM: the acceptor left out {', '.join(missing)}")
    else:
        # Ours asks for mutual authentication, so an acceptor without it is not the one meant.
        _check_flags(inner, demanded | ContextFlag.MUTUAL)
        if (enctype := inner.enctype) is not None:
            check_enctype(enctype, allow_rc4)
    assert isinstance(inner, ProxyContext)
    return _peer(inner.negotiated, inner.flags, inner.target, "", inner.target)
