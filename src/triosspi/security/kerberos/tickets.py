"""What is demanded of an accepted Kerberos ticket."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from ..._errors import AuthenticationError, ConfigurationError, printable
from ..identity import PAC, ContextFlag
from ..names import simple_upper

#: Encryption types of RFC 3962 and RFC 8009: AES. Numbers are IANA's.
AES_ENCTYPES: Final = {
    17: "aes128-cts-hmac-sha1-96",
    18: "aes256-cts-hmac-sha1-96",
    19: "aes128-cts-hmac-sha256-128",
    20: "aes256-cts-hmac-sha384-192",
}
#: RFC 4757, with a layout of its own and MD5: only where it is asked for.
RC4_ENCTYPE: Final = 23

# GSS_C_CHANNEL_BOUND_FLAG: the initiator has sent channel bindings too, and they are the acceptor's.
_CHANNEL_BOUND: Final = 0x800
_DCE_STYLE: Final = 0x1000

_SSPI_NAMES: Final = {
    ContextFlag.DELEG: "ISC_REQ_DELEGATE",
    ContextFlag.MUTUAL: "ISC_REQ_MUTUAL_AUTH",
    ContextFlag.REPLAY: "ISC_REQ_REPLAY_DETECT",
    ContextFlag.SEQUENCE: "ISC_REQ_SEQUENCE_DETECT",
    ContextFlag.CONF: "ISC_REQ_CONFIDENTIALITY",
    ContextFlag.INTEG: "ISC_REQ_INTEGRITY",
    ContextFlag.IDENTIFY: "ISC_REQ_IDENTIFY",
}


@dataclass(frozen=True, slots=True)
class Ticket:
    """What accepting an AP-REQ has found.

    Attributes:
      client: the client's principal, ``alice@REALM``.
      flags: GSS-API's flags, as bits.
      lifetime: seconds that the context may still live, the library's clock skew included.
      enctype: the number of the session key's encryption type.
      delegated: whether the client has delegated its credentials.
      pac: what the ticket's PAC says, if it has one.
    """

    client: str
    flags: int
    lifetime: int
    enctype: int
    delegated: bool
    pac: PAC | None


@dataclass(frozen=True, slots=True)
class KerberosPolicy:
    """What is demanded of a ticket beyond that it decrypts.

    Attributes:
      spns: names of this service, upper-cased, of which the ticket must be for one; empty is any name
          in the keytab.
      channel_bound: whether the client must have sent our channel bindings. GSS-API refuses others,
          but completes where the client sent none.
      allow_rc4: whether RC4-HMAC will do.
    """

    spns: frozenset[str] = frozenset()
    channel_bound: bool = False
    allow_rc4: bool = False


def ask_for(missing: int) -> str:
    """The flags that a context lacks, and how a client asks for them: by GSS-API, by SSPI."""
    flags = [flag for flag in ContextFlag if missing & flag]
    names = ", ".join(str(flag.name) for flag in flags)
    gss = ", ".join(f"GSS_C_{flag.name}_FLAG" for flag in flags)
    sspi = ", ".join(_SSPI_NAMES[flag] for flag in flags)
    return f"{names}: its client must ask for {gss} (SSPI: {sspi})"


def check(ticket: Ticket, policy: KerberosPolicy, demanded: int, service: Callable[[], str]) -> None:
    """Decide whether an accepted ticket is enough.

    Args:
      ticket: what was accepted.
      policy: what is demanded of tickets.
      demanded: what the context must provide, as bits of `ContextFlag`.
      service: gives the service's principal that the ticket is for, ``host/server.example@REALM``. Only
          called where that matters: finding it out is a tenth of a login.

    Raises:
      AuthenticationError: it is not.
    """
    who = printable(ticket.client)
    if ticket.flags & _DCE_STYLE:
        raise AuthenticationError(f"Kerberos: {who} asks for DCE style")
    # In plain numbers: an enum's operators take a microsecond each.
    missing = int(demanded) & ~ticket.flags
    if missing:
        raise AuthenticationError(f"Kerberos: the context of {who} lacks {ask_for(missing)}", untrusted=True)
    if policy.channel_bound and not ticket.flags & _CHANNEL_BOUND:
        raise AuthenticationError(f"Kerberos: {who} sent no channel bindings")
    check_enctype(ticket.enctype, policy.allow_rc4)
    if policy.spns:
        name = service().rpartition("@")[0]
        if simple_upper(name) not in policy.spns:
            raise AuthenticationError(
                f"Kerberos: {who} has a ticket for {printable(name)}, not for this service", untrusted=True
            )


def check_enctype(number: int, allow_rc4: bool) -> None:
    """Decide whether a session key is strong enough.

    Raises:
      AuthenticationError: it is not.
    """
    if number not in AES_ENCTYPES and not (allow_rc4 and number == RC4_ENCTYPE):
        raise AuthenticationError(f"Kerberos: the session key has encryption type {number}, not AES")


def enctype_name(number: int) -> str:
    """The name of an encryption type as krb5.conf writes it."""
    return AES_ENCTYPES.get(number, "arcfour-hmac" if number == RC4_ENCTYPE else f"enctype {number}")


def folded_spns(spns: Iterable[str]) -> frozenset[str]:
    """SPNs in the form that `KerberosPolicy` compares.

    Raises:
      ConfigurationError: one is not of the form ``host/server.example``.
    """
    for spn in spns:
        service, slash, host = spn.partition("/")
        if not (service and slash and host) or "@" in spn:
            raise ConfigurationError(f"{spn!r} is no SPN: write it as 'host/server.example', without a realm")
    return frozenset(map(simple_upper, spns))
