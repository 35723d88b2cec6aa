"""`Acceptor` and `Initiator`: what a side of a connection brings to the handshake."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, Final, Literal

import spnego
from spnego import ContextReq, NegotiateOptions
from spnego.channel_bindings import GssChannelBindings

from .._errors import AuthenticationError, ConfigurationError, handles_secrets
from .authorization import Authorization
from .context import SecurityContext
from .identity import ContextFlag
from .kerberos.gssapi import KerberosAcceptor, acceptor_credential, require_gssapi
from .kerberos.tickets import KerberosPolicy, folded_spns
from .mechanism import Handshake
from .names import simple_upper
from .ntlm.acceptor import NTLMAcceptor
from .ntlm.accounts import AccountSource
from .ntlm.primitives import channel_bindings_hash
from .ntlm.verification import NTLMPolicy
from .policy import AcceptorPolicy, check_initiator
from .proxies import NegotiateInitiator, adopt
from .pyspnego_compat import MECHANISMS, InitiatorNegotiate, ntlm_without_environment
from .rules import Rule
from .spnego.acceptor import SPNEGOAcceptor
from .spnego.tokens import first_token_kind

#: A mechanism that authenticates; Negotiate is what chooses between them.
Mechanism = Literal["kerberos", "ntlm"]

_SIGN_ONLY: Final = ContextReq.default & ~ContextReq.confidentiality

_WINDOWS = sys.platform == "win32"


def _bindings(application_data: bytes | None) -> GssChannelBindings | None:
    return None if application_data is None else GssChannelBindings(application_data=application_data)


def _keep(credential: object, name: str, value: object) -> None:
    """Put what cannot be changed any more in place of what was given, while a frozen dataclass is made."""
    object.__setattr__(credential, name, value)


def _names(credential: object, field_name: str) -> tuple[str, ...]:
    """What was given as a collection of names: a list that the caller goes on using, or a generator, once."""
    given = getattr(credential, field_name)
    if isinstance(given, (str, bytes)):
        # Else each of its letters would be a rule, and most of them harmless.
        raise ConfigurationError(f"{field_name} is a collection: write [{given!r}]")
    try:
        names = tuple(given)
    except TypeError:
        raise ConfigurationError(f"{field_name} is a collection of names, not {type(given).__name__}") from None
    if not all(isinstance(name, str) for name in names):
        raise ConfigurationError(f"{field_name} is a collection of names, and not all of these are text")
    return names


def _keep_bindings(credential: Acceptor | Initiator) -> None:
    given = credential.channel_bindings
    if given is not None:
        if not isinstance(given, (bytes, bytearray, memoryview)):
            raise ConfigurationError(f"channel_bindings are bytes, not {type(given).__name__}")
        _keep(credential, "channel_bindings", bytes(given))


# What the system's own SSPI cannot be told, and what each of these is where nothing was asked for. An option that is
# taken and does nothing is worse than none: the operator relies on it.
_ACCEPTOR_OFF_WINDOWS: Final[dict[str, object]] = {
    "accounts": None,
    "keytab": None,
    "spns": (),
    "allow_rc4": False,
    "require_groups": (),
    "require_mic": True,
    "target_names": (),
    "require_target": "off",
}
_INITIATOR_OFF_WINDOWS: Final[dict[str, object]] = {"ccache": None, "keytab": None, "allow_rc4": False}


def _refuse_unenforced(credential: object, defaults: dict[str, object]) -> None:
    if names := [name for name, default in defaults.items() if getattr(credential, name) != default]:
        raise ConfigurationError(
            f"on Windows the system's own SSPI decides, by its accounts and policies: leave out {', '.join(names)}"
        )


@dataclass(frozen=True, kw_only=True)
class Acceptor:
    r"""What a server authenticates its clients with. One serves any number of connections.

    It keeps copies of the collections that it is given, so nothing changes it afterwards (but ``accounts``,
    which look for themselves), and two with the same arguments are equal.

    On Linux at least one of ``accounts`` and ``keytab`` is needed; each enables its mechanism. On
    Windows the system does all of it (SSPI, as the service's own account): what it cannot be told is an error
    there, which is accounts, keytab, spns, allow_rc4, require_groups, SIDs, target_names, and require_mic other
    than True (whether a MIC is demanded is the system's policy).

    Args:
      accounts: who may log in by NTLM, usually an `AccountFile`.
      keytab: where the service's Kerberos keys are, as ``FILE:/etc/krb5.keytab``; read again on each
          login, so a replaced one needs no restart. Without it ``mechanisms=("kerberos",)`` takes the
          default keytab (KRB5_KTNAME, or krb5.conf's).
      spns: names of this service, as ``host/server.example``: a ticket for another name is refused,
          though the keytab has its key. Empty admits every name in the keytab.
      allow_rc4: admit Kerberos session keys of RC4-HMAC, which old domains still hand out.
      allow: who may come in, see `triosspi.security.authorization`; None is everybody who logs in.
      deny: who may not; it wins over ``allow``.
      require_groups: SIDs that the PAC of a client's ticket must all have, so Active Directory's groups.
      mechanisms: which mechanisms to accept, the preferred first; by default Kerberos and NTLM, each
          if there is something to verify it with. ``("kerberos",)`` refuses NTLM whatever the client
          offers.
      allow_raw: whether a client may begin with NTLM or Kerberos not wrapped in SPNEGO. Windows does
          so when that is all it has.
      channel_bindings: the application data of the channel bindings (RFC 5929, for instance
          ``tls-server-end-point:`` and a hash), which every client must then have sent: a login that
          was relayed from another channel has others.
      require_mic: refuse an NTLM client that sends no MIC. Without the MIC whoever sits between may
          clear flags of its messages (CVE-2019-1040); gss-ntlmssp without SPNEGO sends none.
      target_names: SPNs of this service, as ``host/server.example``, compared in any case.
      require_target: what an NTLM client must have meant to log in to. A login relayed from another
          service names that one. ``"off"`` looks at nothing; ``"allow"`` refuses a client that names
          another service than ``target_names``; ``"require"`` one that names none, too (sspi-rs,
          Samba and Wine name none).

    Raises:
      ConfigurationError: it cannot work as it is.
    """

    # It counts for equality, but need not be hashable, being anybody's.
    accounts: AccountSource | None = field(default=None, hash=False)
    keytab: str | None = None
    spns: Collection[str] = ()
    allow_rc4: bool = False
    allow: Collection[str] | None = None
    deny: Collection[str] = ()
    require_groups: Collection[str] = ()
    mechanisms: tuple[Mechanism, ...] | None = None
    allow_raw: bool = True
    channel_bindings: bytes | None = field(default=None, repr=False)
    require_mic: bool = True
    target_names: Collection[str] = ()
    require_target: Literal["off", "allow", "require"] = "off"

    usage: ClassVar[Literal["accept"]] = "accept"

    def __post_init__(self) -> None:
        for name in ("spns", "allow", "deny", "require_groups", "target_names", "mechanisms"):
            if getattr(self, name) is not None:
                _keep(self, name, _names(self, name))
        _keep_bindings(self)
        if _WINDOWS:
            _refuse_unenforced(self, _ACCEPTOR_OFF_WINDOWS)
            if any(Rule.parse(rule).is_sid for rule in (*(self.allow or ()), *self.deny)):
                raise ConfigurationError(
                    "on Windows no SID of a client is known here: leave SIDs out of allow and deny"
                )
        elif self.accounts is None and self.keytab is None and self.mechanisms is None:
            raise ConfigurationError("nobody could log in: give accounts (for NTLM), keytab (for Kerberos) or both")
        for mechanism in self.mechanisms or ():
            if mechanism not in MECHANISMS:
                raise ConfigurationError(f"unknown mechanism {mechanism!r}: one of {', '.join(MECHANISMS)}")
        if self.mechanisms is not None and not self.mechanisms:
            raise ConfigurationError("nobody could log in: mechanisms is empty")
        if self.require_target != "off" and not self.target_names:
            raise ConfigurationError("require_target needs target_names to compare with")
        self._policy  # noqa: B018 - validates its rules
        if not _WINDOWS:
            if "ntlm" in self.enabled and self.accounts is None:
                raise ConfigurationError("NTLM needs accounts: give an AccountFile")
            if "kerberos" in self.enabled:
                self._kerberos_credential  # noqa: B018 - acquired now, so that a bad keytab shows at the start

    @cached_property
    def enabled(self) -> tuple[Mechanism, ...]:
        """The mechanisms that are accepted, the preferred first."""
        if self.mechanisms is not None:
            return self.mechanisms
        if _WINDOWS:
            return ("kerberos", "ntlm")
        found: tuple[Mechanism, ...] = ()
        if self.keytab is not None:
            found += ("kerberos",)
        if self.accounts is not None:
            found += ("ntlm",)
        return found

    @cached_property
    def _kerberos_credential(self) -> object:
        return acceptor_credential(self.keytab)

    @cached_property
    def _policy(self) -> AcceptorPolicy:
        return AcceptorPolicy(
            kerberos=KerberosPolicy(
                spns=folded_spns(self.spns),
                channel_bound=self.channel_bindings is not None,
                allow_rc4=self.allow_rc4,
            ),
            authorization=Authorization(
                allow=None if self.allow is None else frozenset(self.allow),
                deny=frozenset(self.deny),
                require_groups=frozenset(self.require_groups),
            ),
        )

    @cached_property
    def _ntlm_policy(self) -> NTLMPolicy:
        bindings = _bindings(self.channel_bindings)
        return NTLMPolicy(
            require_mic=self.require_mic,
            channel_bindings_hash=None if bindings is None else channel_bindings_hash(bindings.pack()),
            target_names=frozenset(map(simple_upper, self.target_names)),
            require_target=self.require_target,
        )

    @cached_property
    def _factories(self) -> dict[str, Callable[[], NTLMAcceptor | KerberosAcceptor]]:
        makers: dict[str, Callable[[], NTLMAcceptor | KerberosAcceptor]] = {
            "kerberos": self._new_kerberos,
            "ntlm": self._new_ntlm,
        }
        return {mechanism: makers[mechanism] for mechanism in self.enabled}

    def _new_kerberos(self) -> KerberosAcceptor:
        return KerberosAcceptor(self._kerberos_credential, self.channel_bindings)

    def _new_ntlm(self) -> NTLMAcceptor:
        assert self.accounts is not None
        return NTLMAcceptor(self.accounts, self._ntlm_policy)

    def new_context(self, demanded: ContextFlag = ContextFlag.CONF) -> SecurityContext:
        """A context for one connection.

        Args:
          demanded: what a Kerberos context must provide; NTLM under this policy has all of it. Messages are encrypted if CONF
              is among it, or if the client has asked for it.
        """
        return SecurityContext(
            self.usage,
            self._open_handshake,
            partial(self._policy.check, demanded=demanded),
            demanded=demanded,
            may_block=self._may_block,
        )

    def _may_block(self) -> bool:
        # Inline where nothing can block: a thread is no gain. By bench/bench_login_threads.py (a quick run), logins
        # a second inline and with a thread for each step, and the p50 of 100 other connections meanwhile, in ms:
        # 16 NTLM logins at once 286 and 257, 10.2 and 9.7; 64 of them 371 and 361, 54 and 55; 16 of Kerberos 479
        # and 472, 8.2 and 7.6; 64 of them 454 and 451, 8.5 and 19. What may wait for a disk, an account source
        # or an account file that has changed, gets its thread.
        return _WINDOWS or bool(getattr(self.accounts, "may_block", self.accounts is not None))

    def _open_handshake(self, token: bytes | None) -> Handshake:
        kind = first_token_kind(token or b"")
        if kind != "spnego":
            if not self.allow_raw:
                raise AuthenticationError(f"raw {kind}, which is not allowed here")
            if kind not in self.enabled:
                raise AuthenticationError(f"raw {kind}, which is not enabled here")
        if _WINDOWS:  # pragma: no cover - not reachable elsewhere
            protocol = "negotiate" if len(self.enabled) > 1 else self.enabled[0]
            return adopt(spnego.server(protocol=protocol, channel_bindings=_bindings(self.channel_bindings)))
        if kind == "spnego":
            return SPNEGOAcceptor(self._factories)
        return self._factories[kind]()


@dataclass(frozen=True, kw_only=True)
class Initiator:
    r"""What a client logs in with.

    Args:
      username: ``DOM\user``, ``user@realm`` or ``user``. None takes the credentials that the system
          has: a Kerberos ticket, or on Windows the logged-on user. What else of the environment is
          obeyed, and what never, is in docs/environment.md.
      password: never shown in a repr.
      ccache: a Kerberos credential cache to take instead of a password, as ``FILE:/tmp/krb5cc_0``.
      keytab: a keytab with the user's key to take instead of a password, as ``/etc/client.keytab``.
      target: the service's SPN, ``host/server.example``. None means ``host/`` and the host that is
          connected to. Kerberos gets a ticket for it; NTLM only mentions it.
      mechanism: ``"negotiate"`` tries Kerberos, if it is installed, and falls back to NTLM; the
          others are that mechanism alone.
      raw: send the mechanism's own tokens, not wrapped in SPNEGO. Then the acceptor does not confirm
          the login, and a refused one shows only at the first message.
      allow_rc4: be content with a Kerberos session key of RC4-HMAC.
      channel_bindings: the application data of the channel bindings, see `Acceptor`.

    Raises:
      ConfigurationError: it cannot work as it is.
    """

    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ccache: str | None = None
    keytab: str | None = None
    target: str | None = None
    mechanism: Literal["negotiate", "kerberos", "ntlm"] = "negotiate"
    raw: bool = False
    allow_rc4: bool = False
    channel_bindings: bytes | None = field(default=None, repr=False)

    usage: ClassVar[Literal["initiate"]] = "initiate"

    def __post_init__(self) -> None:
        _keep_bindings(self)
        if self.mechanism not in ("negotiate", *MECHANISMS):
            known = ", ".join(("negotiate", *MECHANISMS))
            raise ConfigurationError(f"unknown mechanism {self.mechanism!r}: one of {known}")
        if self.raw and self.mechanism == "negotiate":
            raise ConfigurationError("raw needs one mechanism: kerberos or ntlm")
        if sum(option is not None for option in (self.password, self.ccache, self.keytab)) > 1:
            raise ConfigurationError("password, ccache and keytab exclude each other")
        if self.password is not None and not self.username:
            raise ConfigurationError("a password needs a username")
        if self.target is not None:
            service, _, host = self.target.partition("/")
            if not service or not host:
                raise ConfigurationError(f"{self.target!r} is no SPN: write it as 'host/server.example'")
        if _WINDOWS:
            _refuse_unenforced(self, _INITIATOR_OFF_WINDOWS)
        else:
            if self.password is None and self.mechanism != "ntlm":
                # What then logs in is a Kerberos ticket.
                require_gssapi()
            if self.mechanism == "ntlm" and self.password is None:
                raise ConfigurationError("NTLM needs a username and a password")
            if self.mechanism == "kerberos":
                require_gssapi()

    def with_default_host(self, host: str) -> Initiator:
        """The same, with the target ``host/`` and this host where no target was given."""
        return self if self.target is not None else dataclasses.replace(self, target=f"host/{host}")

    def new_context(self, demanded: ContextFlag = ContextFlag.CONF) -> SecurityContext:
        """A context for one connection; see `Acceptor.new_context`."""
        return SecurityContext(
            self.usage,
            partial(self._open_handshake, demanded=demanded),
            partial(check_initiator, demanded=demanded, allow_rc4=self.allow_rc4),
            demanded=demanded,
            # NTLM with a password is arithmetic; anything else may ask a KDC, DNS or the system.
            may_block=lambda: self.mechanism != "ntlm" or _WINDOWS,
        )

    def _credential(self) -> str | spnego.Credential | None:
        if self.ccache is not None:
            return spnego.KerberosCCache(self.ccache, principal=self.username)
        if self.keytab is not None:
            return spnego.KerberosKeytab(self.keytab, principal=self.username)
        return self.username

    def _open_handshake(self, _token: bytes | None, demanded: ContextFlag) -> Handshake:
        service, _, host = (self.target or "host/unspecified").partition("/")
        arguments: dict[str, Any] = {
            "username": self._credential(),
            "password": self.password,
            "hostname": host,
            "service": service,
            "channel_bindings": _bindings(self.channel_bindings),
            # Whoever is content with signatures asks for no more.
            "context_req": ContextReq.default if demanded & ContextFlag.CONF else _SIGN_ONLY,
        }
        if _WINDOWS:  # pragma: no cover - not reachable elsewhere
            return adopt(spnego.client(protocol=self.mechanism if self.raw else "negotiate", **arguments))
        if self.raw:
            options = NegotiateOptions.use_ntlm if self.mechanism == "ntlm" else NegotiateOptions.use_gssapi
            return adopt(ntlm_without_environment(spnego.client(protocol=self.mechanism, options=options, **arguments)))
        wanted = tuple(MECHANISMS) if self.mechanism == "negotiate" else (self.mechanism,)
        if self.password is None:
            # A ticket is meant; pyspnego would look for an NTLM account in a file that NTLM_USER_FILE names.
            wanted = ("kerberos",)
        return NegotiateInitiator(InitiatorNegotiate([MECHANISMS[name] for name in wanted], **arguments))


# Its frame holds the password.
Initiator.__init__ = handles_secrets(Initiator.__init__)  # type: ignore[method-assign]
