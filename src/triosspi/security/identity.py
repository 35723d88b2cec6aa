"""The authenticated peer, as the application sees it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple


class ContextFlag(enum.IntFlag):
    """What a security context provides, or its initiator allows; names and values of RFC 2744, and RFC 4757 7.1."""

    DELEG = 0x01
    MUTUAL = 0x02
    REPLAY = 0x04
    SEQUENCE = 0x08
    CONF = 0x10
    INTEG = 0x20
    IDENTIFY = 0x2000


ImpersonationLevel = Literal["identification", "impersonation", "delegation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PAC:
    """What Active Directory says of a user in a Kerberos ticket ([MS-PAC] 2.5), signed by the KDC.

    Attributes:
      account: the account's name in the domain.
      domain: the domain's NetBIOS name.
      sid: the user's own SID, as ``S-1-5-21-...``.
      groups: the SIDs of the groups that the user is in, directly or through others.
    """

    account: str
    domain: str
    sid: str
    groups: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerIdentity:
    r"""Who is at the other end of a finished handshake.

    Attributes:
      principal: the whole name, as it should be authorised and logged. On the acceptor: for NTLM the
          account's own spelling in the account file (``DOM\alice`` or ``alice``, whatever case the
          client chose), for Kerberos ``alice@REALM``. On the initiator: the target that was asked
          for (``host/server.example``); only `mutual` says that it was proved.
      domain: NTLM's domain or Kerberos's realm; empty where there is none.
      name: the principal without its domain.
      mechanism: ``"ntlm"`` or ``"kerberos"``: what authenticated the peer, not what was asked for.
      flags: what the context provides, in GSS-API's terms. With Kerberos REPLAY and SEQUENCE say whether the
          client has its own library look at the order of what it receives; we always do.
      mutual: whether the acceptor has proved itself to the initiator too. NTLM never does.
      authenticated_at: when the handshake ended, with time zone (UTC).
      expires_at: when the peer's ticket ends, clock skew included, and the connection with it; None
          with NTLM.
      enctype: the encryption type of the Kerberos session key, as ``aes256-cts-hmac-sha1-96``.
      delegated: whether the client has delegated its Kerberos credentials.
      pac: what Active Directory says of the client; None without a PAC, or with one whose signature the
          Kerberos library has not verified.
    """

    principal: str
    domain: str
    name: str
    mechanism: str
    flags: ContextFlag
    mutual: bool
    authenticated_at: datetime
    expires_at: datetime | None = None
    enctype: str | None = None
    delegated: bool = False
    pac: PAC | None = None

    @property
    def realm(self) -> str:
        """The Kerberos realm; empty with NTLM."""
        return self.domain if self.mechanism == "kerberos" else ""

    @property
    def impersonation_level(self) -> ImpersonationLevel:
        """What a client lets its server do in its name, in .NET's words: only look who it is; act as it on this machine; or
        act as it on others, too, with credentials that it has delegated. Only an acceptor's peer says anything by it.
        """
        if self.delegated:
            return "delegation"
        return "identification" if self.flags & ContextFlag.IDENTIFY else "impersonation"

    def __str__(self) -> str:
        return self.principal


class Traffic(NamedTuple):
    """What has gone over a channel so far, in plaintext; the goodbye does not count.

    Attributes:
      messages_sent: how many messages were sealed.
      bytes_sent: of how many bytes in all.
      messages_received: how many messages were opened.
      bytes_received: of how many bytes in all.
    """

    messages_sent: int
    bytes_sent: int
    messages_received: int
    bytes_received: int


@dataclass(frozen=True, slots=True)
class ContextSizes:
    """The sizes that a finished context and its wire format imply (SSPI's SecPkgContext_Sizes).

    Attributes:
      security_trailer: bytes that sealing adds to a message, cbSecurityTrailer: 16 with NTLM, 60
          with Kerberos's AES-SHA1 encryption types.
      max_message: bytes of the longest message that `SSPIChannel.send` takes.
    """

    security_trailer: int
    max_message: int
