"""Kerberos by python-gssapi: the service's keys, our acceptor, and what a finished context can do.

python-gssapi is optional, so it is imported where it is first needed. What is demanded of a ticket is in `tickets`.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any, Final

from spnego import UnwrapResult, WrapResult

from ..._errors import AuthenticationError, ConfigurationError, printable
from ..identity import PAC
from ..mechanism import WithoutSPNEGO
from ..sealers import KERBEROS_TRAILER_SIZES, GSSWrapSealer
from .pac import read_logon_info
from .tickets import Ticket

log = logging.getLogger("triosspi.kerberos")

_KERBEROS_OID: Final = "1.2.840.113554.1.2.2"
# GSS_C_INQ_SSPI_SESSION_KEY: gives the session key, and an OID that ends in its encryption type.
_SESSION_KEY_OID: Final = "1.2.840.113554.1.2.2.5.5"
# What that OID begins with, 1.2.840.113554.1.2.2.4, in DER; one number more follows.
_ENCTYPE_OID: Final = bytes.fromhex("2a864886f71201020204")

# KRB5KRB_AP_ERR_BAD_INTEGRITY.
_BAD_INTEGRITY: Final = -1765328353

# What MIT's minor status says where there is none, which is of no use to anybody.
_NO_REASON: Final = ("Success", "Unknown error", "No error")

_LOGON_INFO: Final = b"urn:mspac:logon-info"

_TARGET_NAME_ONLY: Final = {
    "target_name": True,
    **dict.fromkeys(("initiator_name", "lifetime", "mech", "flags", "locally_init", "complete"), False),
}


def require_gssapi() -> Any:
    """python-gssapi.

    Raises:
      ConfigurationError: it is not installed, or pykrb5, which pyspnego wants beside it, is not.
    """
    try:
        import gssapi  # noqa: PLC0415 - see the head of the file
        import krb5  # noqa: F401, PLC0415
    except ImportError:
        raise ConfigurationError("Kerberos needs python-gssapi and krb5: pip install 'triosspi[kerberos]'") from None
    return gssapi


def acceptor_credential(keytab: str | None) -> object:
    """The service's keys, for any number of contexts; the file is read again on each login.

    Args:
      keytab: as ``FILE:/etc/krb5.keytab``; None is what the environment's KRB5_KTNAME or krb5.conf names.

    Raises:
      ConfigurationError: there are none, or python-gssapi is not installed.
    """
    gssapi = require_gssapi()
    if os.environ.get("KRB5RCACHENAME", "").startswith("none") or os.environ.get("KRB5RCACHETYPE") == "none":
        log.warning("Kerberos: the environment's KRB5RCACHENAME or KRB5RCACHETYPE turns the replay cache off: unset it")
    store = None if keytab is None else {"keytab": keytab}
    try:
        return gssapi.Credentials(usage="accept", mechs=[gssapi.OID.from_int_seq(_KERBEROS_OID)], store=store)
    except gssapi.exceptions.GSSError as exc:
        where = keytab or "the default keytab"
        raise ConfigurationError(f"no Kerberos keys in {where}: {reason(exc)}") from None


# Errors in words


def reason(exc: BaseException) -> str:
    """What a Kerberos library says went wrong, without what a GSS-API status wraps around it."""
    if getattr(exc, "err_code", None) == _BAD_INTEGRITY:
        # Without pre-authentication the KDC answers anybody; that the password is wrong shows only here.
        return "Password incorrect (the KDC's answer does not decrypt with it)"
    messages = []
    maj_code, min_code = getattr(exc, "maj_code", None), getattr(exc, "min_code", None)
    if maj_code is not None and min_code is not None:
        for code, is_major in ((min_code, False), (maj_code, True)):
            messages += exc.get_all_statuses(code, is_major)  # type: ignore[attr-defined]
    for message in messages:
        if message and not message.startswith(_NO_REASON):
            return str(message)
    return str(exc)


def root_reason(exc: BaseException) -> str | None:
    """The same for an exception of pyspnego's, if a Kerberos library is behind it."""
    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        module = type(current).__module__.partition(".")[0]
        if module in {"gssapi", "krb5"}:
            return reason(current)
        current = getattr(current, "base_error", None) or current.__cause__ or current.__context__
    return None


# Contexts


class KerberosContext(WithoutSPNEGO):
    """What a finished context of the library's can do, whoever has made it."""

    name: Final = "kerberos"

    def __init__(self) -> None:
        self._raw = require_gssapi().raw

    @property
    def library_context(self) -> Any:
        """The library's own context, once there is one."""
        raise NotImplementedError

    @property
    def session_key(self) -> bytes:
        """See `Mechanism.session_key`."""
        key: bytes = self._ask_for_session_key()[0]
        return key

    @property
    def enctype(self) -> int:
        """See `Mechanism.enctype`.

        Raises:
          AuthenticationError: it is none that there is.
        """
        number = self._ask_for_session_key()[1].removeprefix(_ENCTYPE_OID)
        if len(number) != 1:
            raise AuthenticationError("Kerberos: a session key of an unknown encryption type")
        return number[0]

    def _ask_for_session_key(self) -> tuple[bytes, bytes]:
        found: tuple[bytes, bytes] = self._raw.inquire_sec_context_by_oid(self.library_context, _session_key_oid())
        return found

    def sign(self, data: bytes) -> bytes:
        """See `Mechanism.sign`."""
        mic: bytes = self._raw.get_mic(self.library_context, data)
        return mic

    def verify(self, data: bytes, mic: bytes) -> None:
        """See `Mechanism.verify`."""
        self._raw.verify_mic(self.library_context, data, mic)

    def restart_rc4(self, *, outgoing: bool) -> None:
        """See `Mechanism.restart_rc4`."""

    def wrap(self, data: bytes, encrypt: bool = True) -> WrapResult:
        """GSS_Wrap, for `GSSWrapSealer`."""
        wrapped = self._raw.wrap(self.library_context, data, confidential=encrypt)
        return WrapResult(data=wrapped.message, encrypted=wrapped.encrypted)

    def unwrap(self, data: bytes) -> UnwrapResult:
        """GSS_Unwrap, for `GSSWrapSealer`."""
        opened = self._raw.unwrap(self.library_context, data)
        return UnwrapResult(data=opened.message, encrypted=opened.encrypted, qop=opened.qop)

    def make_sealer(self, *, encrypt: bool) -> GSSWrapSealer:
        """See `Mechanism.make_sealer`."""
        return GSSWrapSealer(self, KERBEROS_TRAILER_SIZES[self.enctype], encrypt=encrypt)

    def export_lucid(self) -> Any:
        """The keys and numbers of the context, which is of no use any more then."""
        return self._raw.krb5_export_lucid_sec_context(self.library_context, 1)


class KerberosAcceptor(KerberosContext):
    """One login, by a step that says what went wrong.

    pyspnego's own step goes through `gssapi.SecurityContext`, which keeps a refusal for later; what
    surfaces then is an AttributeError.

    Args:
      credential: from `acceptor_credential`; shared by all contexts.
      channel_bindings: their application data, or None.

    Attributes:
      ticket: what has been accepted.
    """

    def __init__(self, credential: object, channel_bindings: bytes | None) -> None:
        super().__init__()
        self._credential = credential
        self._channel_bindings = channel_bindings
        self._context: Any = None
        self.ticket: Ticket | None = None

    @property
    def library_context(self) -> Any:
        """See `KerberosContext.library_context`."""
        return self._context

    @property
    def complete(self) -> bool:
        """See `Mechanism.complete`."""
        return self.ticket is not None

    @property
    def flags(self) -> int:
        """See `Mechanism.flags`."""
        return 0 if self.ticket is None else self.ticket.flags

    @property
    def enctype(self) -> int:
        """See `Mechanism.enctype`."""
        # Known since the step; asking again costs.
        assert self.ticket is not None
        return self.ticket.enctype

    def step(self, in_token: bytes | None) -> bytes | None:
        """See `Handshake.step`.

        Raises:
          AuthenticationError: the ticket was refused; the text is the library's own reason.
        """
        raw = self._raw
        bindings = None
        if self._channel_bindings is not None:
            bindings = raw.ChannelBindings(application_data=self._channel_bindings)
        try:
            accepted = raw.accept_sec_context(in_token, self._credential, channel_bindings=bindings)
        except raw.GSSError as exc:
            raise AuthenticationError(f"Kerberos: {printable(reason(exc), 200)}") from None
        if accepted.more_steps:
            raise AuthenticationError("Kerberos: the client wants more tokens (DCE style, or user to user)")
        # The raw context: python-gssapi's own class around it does nothing here but cost 40 us.
        self._context = accepted.context
        self.ticket = Ticket(
            client=_display(raw, accepted.initiator_name),
            flags=int(accepted.flags),
            lifetime=accepted.lifetime,
            enctype=super().enctype,
            delegated=accepted.delegated_creds is not None,
            pac=_read_pac(raw, accepted.initiator_name),
        )
        token: bytes | None = accepted.token
        return token

    def service(self) -> str:
        """The service's principal that the ticket is for. Only before the context is handed over."""
        return _display(self._raw, self._raw.inquire_context(self._context, **_TARGET_NAME_ONLY).target_name)


@cache
def _session_key_oid() -> Any:
    return require_gssapi().OID.from_int_seq(_SESSION_KEY_OID)


def _display(raw: Any, name: Any) -> str:
    # The library's text may end in the NUL of its own strings. What is not UTF-8 is not equal to anything.
    text: bytes = raw.display_name(name, name_type=False).name
    return text.rstrip(b"\0").decode(errors="backslashreplace")


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
        # A login without a PAC is still one; where groups are demanded, or SIDs denied, it is refused later.
        log.warning("Kerberos: %s; it is ignored", exc)
        return None
