"""The only file that touches names of pyspnego that are not its public API.

Written for pyspnego 0.12.4 to 0.12.x; ``tests/test_spnego_compat.py`` fails loudly when one of these
names changes its shape underneath. What is used, and why the public API does not do:

* `NegotiateProxy`, the initiator's, and two of its methods, because the public `spnego.client` offers
  whatever the machine has.
* `NTLMProxy` and its fields, because its acceptor reads the account file named by an environment
  variable, for the whole process, from top to bottom on each login; and because its verification of
  AUTHENTICATE is not strict (see `ntlm`).
* `GSSAPIProxy`, to hand it a credential of our own.
* the names of its loggers, which at DEBUG write whole tokens.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from spnego import ContextProxy, ContextReq, NegotiateOptions
from spnego._context import GSSMech
from spnego._gss import GSSAPIProxy
from spnego._negotiate import NegotiateProxy
from spnego._ntlm import NTLMProxy
from spnego._ntlm_raw.messages import NegotiateFlags
from spnego._sspi import SSPIProxy
from spnego.channel_bindings import GssChannelBindings

from .._errors import AuthenticationError, printable
from .identity import PAC
from .kerberos.pac import read_logon_info
from .kerberos.tickets import Ticket, reason, require_gssapi
from .names import AccountName
from .spnego.acceptor import Mechanism, SPNEGOAcceptor

if TYPE_CHECKING:
    from .ntlm.verification import Login

log = logging.getLogger("triosspi.kerberos")

__all__ = [
    "MECHANISMS",
    "AcceptorKerberos",
    "AcceptorNTLM",
    "InitiatorNegotiate",
    "Proxy",
    "allow_token_logging",
    "gssapi_context",
    "inner_context",
    "kerberos_enctype",
    "mics_exchanged",
    "ntlm_flags",
    "ntlm_without_environment",
    "reset_crypto",
    "sspi_context",
]

#: A context of pyspnego's, or our own SPNEGO acceptor around some.
Proxy = ContextProxy | SPNEGOAcceptor

#: Verifies (authenticate, negotiate, challenge), all as they crossed the wire; raises when refused.
Verifier = Callable[[bytes, bytes, bytes], "Login"]

MECHANISMS: Mapping[str, GSSMech] = {"kerberos": GSSMech.kerberos, "ntlm": GSSMech.ntlm}

_NTLM_ACCEPT_FLAGS = (
    NegotiateFlags.key_128
    | NegotiateFlags.key_56
    | NegotiateFlags.key_exch
    | NegotiateFlags.extended_session_security
    | NegotiateFlags.always_sign
    | NegotiateFlags.ntlm
    | NegotiateFlags.request_target
    | NegotiateFlags.unicode
)


_TOKEN_LOGGERS = ("spnego._gss", "spnego._negotiate", "spnego._ntlm", "spnego._sspi")
_TOKEN_TEXTS = (" step input: ", " step output: ")
_tokens_may_be_logged = False


def _hide_tokens(record: logging.LogRecord) -> bool:
    return _tokens_may_be_logged or not any(text in str(record.msg) for text in _TOKEN_TEXTS)


# From the import on: a program that turns on DEBUG for everything does not mean this by it. A filter of
# a logger sees only what is logged to it by name, so each of them gets one.
for _name in _TOKEN_LOGGERS:
    logging.getLogger(_name).addFilter(_hide_tokens)


def allow_token_logging(allow: bool = True) -> None:
    """Let pyspnego log every handshake token at DEBUG, in base64, as it does by itself.

    Off by default: whoever has a login's tokens can try passwords against them at leisure.
    """
    global _tokens_may_be_logged  # noqa: PLW0603 - loggers are global too
    _tokens_may_be_logged = allow


@functools.cache
def _fresh_ntlm_fields() -> dict[str, Any]:
    """The fields of an NTLM acceptor that has not begun. Made once: the enum arithmetic takes 40 us."""
    proxy: Any = object.__new__(NTLMProxy)
    ContextProxy.__init__(
        proxy,
        credentials=[],
        hostname=None,
        service=None,
        channel_bindings=None,
        context_req=ContextReq.default,
        usage="accept",
        protocol="ntlm",
        options=NegotiateOptions.none,
    )
    # To be spared pyspnego's log of every token, which it encodes whether anybody reads it or not.
    proxy._is_wrapped = True
    proxy._context_req = _NTLM_ACCEPT_FLAGS
    proxy._complete = False
    proxy._credential = None
    proxy._temp_negotiate = None
    proxy._temp_challenge = None
    proxy._mic_required = False
    proxy._session_key = None
    proxy._sign_key_out = proxy._sign_key_in = None
    proxy._handle_out = proxy._handle_in = None
    proxy._NTLMProxy__seq_num_in = 0
    proxy._NTLMProxy__seq_num_out = 0
    fields: dict[str, Any] = vars(proxy)
    return fields


class AcceptorNTLM(NTLMProxy):
    """pyspnego's NTLM acceptor with the verification of AUTHENTICATE replaced by ours."""

    def __init__(self, verifier: Verifier) -> None:
        # NTLMProxy's own initialiser insists on the file named by NTLM_USER_FILE.
        vars(self).update(_fresh_ntlm_fields())
        self._verifier = verifier
        self._raw_negotiate = b""
        self._raw_challenge = b""
        self.login: Login | None = None

    def _step_accept_negotiate(self, token: bytes) -> bytes:
        self._raw_negotiate = token
        self._raw_challenge = super()._step_accept_negotiate(token)
        return self._raw_challenge

    def _step_accept_authenticate(
        self,
        token: bytes,
        channel_bindings: GssChannelBindings | None,  # noqa: ARG002 - the verifier has its own
    ) -> None:
        login = self._verifier(token, self._raw_negotiate, self._raw_challenge)
        self.login = login
        self._session_key = login.session_key
        # A plain int here would do, but pyspnego's key derivation tests it against its own enum.
        self._context_attr = login.flags
        self._raw_negotiate = self._raw_challenge = b""
        self._complete = True


def ntlm_without_environment(proxy: ContextProxy) -> ContextProxy:
    """Have an NTLM initiator that has not begun speak NTLMv2, and nothing weaker; returns it.

    pyspnego obeys LM_COMPAT_LEVEL: up to 2 it sends NTLMv1, of which the password's hash is a matter of hours
    to whoever records it. The user name is upper-cased as Windows, Samba and .NET do; pyspnego takes Unicode's
    full mapping, by which ``straße`` could not log in to any of these.
    """
    if isinstance(proxy, NTLMProxy):
        proxy._lm = proxy._nt_v1 = False
        proxy._nt_v2 = True
        proxy._context_req = _ntlmv2_request(proxy._context_req)
        if proxy._credential is not None and proxy._credential.username:
            proxy._credential.username = AccountName(proxy._credential.username)
    return proxy


def _ntlmv2_request(flags: int) -> Any:
    return (NegotiateFlags(flags) | NegotiateFlags.extended_session_security) & ~NegotiateFlags.lm_key


class InitiatorNegotiate(NegotiateProxy):
    """pyspnego's SPNEGO initiator, offering just the mechanisms that it is given."""

    @property
    def mic_sent(self) -> bool:
        """Has a mechListMIC been sent?"""
        return self._mic_sent

    @property
    def mic_verified(self) -> bool:
        """Has the acceptor's mechListMIC been verified?"""
        return self._mic_recv

    def __init__(self, mechanisms: list[GSSMech], **kwargs: Any) -> None:
        super().__init__(usage="initiate", protocol="negotiate", **kwargs)
        self._mechanisms = mechanisms

    @property
    def inner(self) -> ContextProxy | None:
        """The context of the chosen mechanism."""
        return self._context if self._context_list else None

    def _preferred_mech_list(self) -> list[GSSMech]:
        available = super()._preferred_mech_list()
        return [mech for mech in available if mech in self._mechanisms]

    def _rebuild_context_list(
        self,
        mech_types: list[str] | None = None,
        channel_bindings: GssChannelBindings | None = None,
    ) -> list[str]:
        mechanisms = super()._rebuild_context_list(mech_types, channel_bindings)
        for mech, (context, _) in self._context_list.items():
            if isinstance(context, NTLMProxy):
                weak = context._context_req != _ntlmv2_request(context._context_req)
                ntlm_without_environment(context)
                if weak:
                    # Its first message is made already, and asks for less.
                    context._temp_negotiate = None
                    self._context_list[mech] = context, context.step(channel_bindings=channel_bindings)
        return mechanisms


#: SPNEGO, on either side; what it has chosen is its ``inner``.
Negotiation = SPNEGOAcceptor | InitiatorNegotiate


def inner_context(proxy: Proxy) -> ContextProxy | None:
    """The mechanism's own context: of an SPNEGO context the chosen one, otherwise itself."""
    if isinstance(proxy, Negotiation):
        # An acceptor's mechanisms are the contexts that this file has made.
        return cast("ContextProxy | None", proxy.inner)
    return proxy


def mechanism_of(proxy: Proxy) -> str | None:
    """The mechanism that a context is about, ``"ntlm"`` or ``"kerberos"``, however far it has come."""
    inner = inner_context(proxy)
    if isinstance(inner, NTLMProxy):
        return "ntlm"
    return "kerberos" if isinstance(inner, GSSAPIProxy) else None


def reset_crypto(context: Mechanism, outgoing: bool) -> None:
    """Begin RC4 anew in one direction, after a mechListMIC; nothing where the mechanism is not NTLM."""
    if isinstance(context, NTLMProxy):
        context._reset_ntlm_crypto_state(outgoing=outgoing)


def ntlm_flags(proxy: ContextProxy) -> int | None:
    """The NegotiateFlags of a finished NTLM context; None where NTLM is the system's own."""
    return int(proxy._context_attr) if isinstance(proxy, NTLMProxy) else None


# GSS_C_INQ_SSPI_SESSION_KEY: gives the session key, and an OID that ends in its encryption type.
_SESSION_KEY_OID = "1.2.840.113554.1.2.2.5.5"


@functools.cache
def _fresh_kerberos_fields() -> dict[str, Any]:
    """The fields of a Kerberos acceptor that has not begun. See `_fresh_ntlm_fields`."""
    proxy = GSSAPIProxy(usage="accept", protocol="kerberos", _gssapi_credential=object())
    proxy._is_wrapped = True
    return vars(proxy)


class AcceptorKerberos(GSSAPIProxy):
    """pyspnego's Kerberos acceptor over python-gssapi, with a step that says what went wrong.

    pyspnego's own step goes through `gssapi.SecurityContext`, which keeps a refusal for later; what
    surfaces then is an AttributeError.

    Args:
      credential: from `kerberos.acceptor_credential`; shared by all contexts.
      channel_bindings: the acceptor's.
    """

    def __init__(self, credential: object, channel_bindings: GssChannelBindings | None) -> None:
        vars(self).update(_fresh_kerberos_fields())
        self._credential = credential
        self.channel_bindings = channel_bindings
        self._gssapi = require_gssapi()
        self.ticket: Ticket | None = None

    @property
    def complete(self) -> bool:
        """See `ContextProxy.complete`."""
        return self.ticket is not None

    @property
    def client_principal(self) -> str | None:
        """See `ContextProxy.client_principal`."""
        return None if self.ticket is None else self.ticket.client

    def step(
        self,
        in_token: bytes | None = None,
        *,
        channel_bindings: GssChannelBindings | None = None,  # noqa: ARG002 - they were given before
    ) -> bytes | None:
        """See `ContextProxy.step`.

        Raises:
          AuthenticationError: the ticket was refused; the text is the library's own reason.
        """
        raw = self._gssapi.raw
        try:
            accepted = raw.accept_sec_context(in_token, self._credential, channel_bindings=self._raw_bindings())
        except raw.GSSError as exc:
            raise AuthenticationError(f"Kerberos: {printable(reason(exc), 200)}") from None
        if accepted.more_steps:
            raise AuthenticationError("Kerberos: the client wants more tokens (DCE style, or user to user)")
        # The raw context: python-gssapi's own class around it does nothing here but cost 40 us.
        self._context = accepted.context
        self._context_attr = flags = int(accepted.flags)
        self.ticket = Ticket(
            client=_display(raw, accepted.initiator_name),
            flags=flags,
            lifetime=accepted.lifetime,
            enctype=_enctype(raw, accepted.context),
            delegated=accepted.delegated_creds is not None,
            pac=_read_pac(raw, accepted.initiator_name),
        )
        token: bytes | None = accepted.token
        return token

    def service(self) -> str:
        """The service's principal that the ticket is for. Only before the context is handed over."""
        raw = self._gssapi.raw
        return _display(raw, raw.inquire_context(self._context, **_TARGET_NAME_ONLY).target_name)

    def _raw_bindings(self) -> Any:
        if self.channel_bindings is None:
            return None
        return self._gssapi.raw.ChannelBindings(application_data=self.channel_bindings.application_data)


# What the OID begins with, 1.2.840.113554.1.2.2.4, in DER; one number more follows.
_ENCTYPE_OID = bytes.fromhex("2a864886f71201020204")


@functools.cache
def _session_key_oid() -> Any:
    return require_gssapi().OID.from_int_seq(_SESSION_KEY_OID)


def _enctype(raw: Any, context: Any) -> int:
    """The encryption type of a context's session key."""
    oid: bytes = raw.inquire_sec_context_by_oid(context, _session_key_oid())[1]
    number = oid.removeprefix(_ENCTYPE_OID)
    if len(number) != 1:
        raise AuthenticationError("Kerberos: a session key of an unknown encryption type")
    return number[0]


def kerberos_enctype(proxy: ContextProxy) -> int | None:
    """The encryption type of a finished Kerberos context; None where it is the system's own."""
    if isinstance(proxy, AcceptorKerberos) and proxy.ticket is not None:
        return proxy.ticket.enctype
    return _enctype(require_gssapi().raw, proxy._context) if isinstance(proxy, GSSAPIProxy) else None


def gssapi_context(proxy: ContextProxy) -> Any:
    """The library's own context of a finished Kerberos context."""
    assert isinstance(proxy, GSSAPIProxy)
    return proxy._context


def sspi_context(proxy: ContextProxy) -> object | None:
    """The system's own context, where SSPI is the system's: on Windows."""
    return proxy._context if isinstance(proxy, SSPIProxy) else None


def mics_exchanged(proxy: Proxy) -> tuple[int, int]:
    """How many mechListMICs a finished context has sent, and how many verified."""
    if isinstance(proxy, Negotiation):
        return int(proxy.mic_sent), int(proxy.mic_verified)
    return 0, 0


def _display(raw: Any, name: Any) -> str:
    # The library's text may end in the NUL of its own strings. What is not UTF-8 is not equal to anything.
    text: bytes = raw.display_name(name, name_type=False).name
    return text.rstrip(b"\0").decode(errors="backslashreplace")


_TARGET_NAME_ONLY = {
    "target_name": True,
    **dict.fromkeys(("initiator_name", "lifetime", "mech", "flags", "locally_init", "complete"), False),
}


_LOGON_INFO = b"urn:mspac:logon-info"


def _read_pac(raw: Any, name: Any) -> PAC | None:
    """The PAC of a client's name, if it has one that the library has verified."""
    try:
        # Asked first: MIT's KDC makes PACs without it, and an exception of python-gssapi's costs 15 us.
        if _LOGON_INFO not in raw.inquire_name(name, mech_name=False).attrs:
            return None
        attribute = raw.get_name_attribute(name, _LOGON_INFO)
    except raw.GSSError:
        return None
    if not (attribute.authenticated and attribute.values):
        return None
    try:
        return read_logon_info(attribute.values[0])
    except AuthenticationError as exc:
        # Who needs groups refuses whoever has none.
        log.warning("Kerberos: %s; it is ignored", exc)
        return None
