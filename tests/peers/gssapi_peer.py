"""gss-ntlmssp (Red Hat's NTLM as a GSS-API mechanism) through python-gssapi, raw and under MIT Kerberos's own SPNEGO.

Two foreign implementations in one: the NTLM is gss-ntlmssp's, the SPNEGO is libgssapi_krb5's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import NTLM_TRAILER, PeerError, PeerKind, missing_module

if TYPE_CHECKING:
    import gssapi
    import gssapi.raw

# What python-gssapi calls a credential store (its dict is invariant).
Store = dict[bytes | str, bytes | str]

NTLM = "1.3.6.1.4.1.311.2.2.10"
SPNEGO = "1.3.6.1.5.5.2"
KERBEROS = "1.2.840.113554.1.2.2"


def oid(dotted: str) -> gssapi.OID:
    """The OID object of python-gssapi."""
    import gssapi

    return gssapi.OID.from_int_seq(dotted)


def _display(name: gssapi.raw.Name) -> str:
    import gssapi

    # gss-ntlmssp counts the terminating NUL.
    return gssapi.raw.display_name(name).name.decode().rstrip("\0")


class _Sealing:
    """Message security of a context, the same on both sides."""

    _context: Any  # python-gssapi's own annotations disagree on which SecurityContext the raw calls take

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        import gssapi

        try:
            sealed = gssapi.raw.wrap(self._context, message, True, None)
        except gssapi.raw.GSSError as exc:
            raise PeerError(str(exc)) from exc
        # gss_wrap's one token is signature and ciphertext, in this order: TOKEN and DATA without a seam.
        return sealed.message[:NTLM_TRAILER], sealed.message[NTLM_TRAILER:]

    def open(self, trailer: bytes, data: bytes) -> bytes:
        import gssapi

        try:
            opened = gssapi.raw.unwrap(self._context, trailer + data)
        except gssapi.raw.GSSError as exc:
            raise PeerError(str(exc)) from exc
        if not opened.encrypted:
            raise PeerError("the message was signed and not sealed")
        return opened.message

    def close(self) -> None:
        self._context = None


class GSSAPIInitiator(_Sealing):
    """A login by a GSS-API mechanism.

    Args:
        mechanism: NTLM or SPNEGO, dotted.
        offer: With SPNEGO, the mechanisms to offer, preferred first.
        store: The credential store of gss_acquire_cred_from.
        username: As in the account.
        domain: As in the account; may be empty.
    """

    def __init__(self, mechanism: str, offer: list[str], store: Store, username: str, domain: str) -> None:
        import gssapi

        name = f"{domain}\\{username}" if domain else username
        try:
            self._credential = gssapi.Credentials(
                name=gssapi.Name(name.encode(), gssapi.NameType.user),
                usage="initiate",
                mechs=[oid(mechanism)],
                store=store,
            )
            if mechanism == SPNEGO:
                gssapi.raw.set_neg_mechs(self._credential, [oid(m) for m in offer])
        except gssapi.raw.GSSError as exc:
            raise PeerError(str(exc)) from exc
        self._target = gssapi.Name(b"host@localhost", gssapi.NameType.hostbased_service)
        self._mechanism = oid(mechanism)
        self._context = None
        self._complete = False

    @property
    def complete(self) -> bool:
        return self._complete

    def step(self, token: bytes | None) -> bytes | None:
        import gssapi

        flag = gssapi.RequirementFlag
        # The raw call and not SecurityContext.step, which keeps an error to itself when there is a token to send.
        try:
            result = gssapi.raw.init_sec_context(
                self._target,
                creds=self._credential,
                context=self._context,
                mech=self._mechanism,
                flags=[
                    flag.mutual_authentication,
                    flag.replay_detection,
                    flag.out_of_sequence_detection,
                    flag.confidentiality,
                    flag.integrity,
                ],
                input_token=token,
            )
        except gssapi.raw.GSSError as exc:
            raise PeerError(str(exc)) from exc
        self._context = result.context
        self._complete = not result.more_steps
        return result.token or None


class GSSAPIAcceptor(_Sealing):
    """The other side, for NTLM. Who may log in stands in the file that NTLM_USER_FILE names.

    Args:
        mechanism: NTLM or SPNEGO, dotted.
    """

    def __init__(self, mechanism: str) -> None:
        import gssapi

        try:
            self._credential = gssapi.Credentials(usage="accept", mechs=[oid(mechanism)])
            if mechanism == SPNEGO:
                gssapi.raw.set_neg_mechs(self._credential, [oid(NTLM)])
        except gssapi.raw.GSSError as exc:
            raise PeerError(str(exc)) from exc
        self._context = None
        self.complete = False
        self.client: str | None = None

    def step(self, token: bytes) -> bytes | None:
        import gssapi

        try:
            result = gssapi.raw.accept_sec_context(token, acceptor_creds=self._credential, context=self._context)
        except gssapi.raw.GSSError as exc:
            raise PeerError(str(exc)) from exc
        self._context = result.context
        self.complete = not result.more_steps
        if self.complete:
            self.client = _display(result.initiator_name)
        return result.token or None


def ntlm_store(password: str) -> Store:
    """A credential store with a password that only gss-ntlmssp reads.

    A SPNEGO credential is made for every mechanism that the library has, whatever is offered later. By the general
    name, "password", Kerberos would take it for its own and ask the DNS for the KDC of whatever realm
    /etc/krb5.conf names.
    """
    return {"ntlmssp_password": password}


def _raw(username: str, password: str, domain: str) -> GSSAPIInitiator:
    return GSSAPIInitiator(NTLM, [], ntlm_store(password), username, domain)


def _under_spnego(username: str, password: str, domain: str) -> GSSAPIInitiator:
    return GSSAPIInitiator(SPNEGO, [NTLM], ntlm_store(password), username, domain)


def available() -> str | None:
    """Whether python-gssapi and the mechanism are there."""
    reason = missing_module("gssapi", "python-gssapi (pip gssapi, built with apt gcc, python3-dev and libkrb5-dev)")
    if reason is not None:
        return reason
    import gssapi

    if NTLM not in {mechanism.dotted_form for mechanism in gssapi.raw.indicate_mechs()}:
        return "gss-ntlmssp is not installed (apt gss-ntlmssp)"
    return None


GSS_NTLMSSP = PeerKind(
    name="gss-ntlmssp-raw",
    mechanism="ntlm",
    spnego=False,
    sends_mic=False,  # only under SPNEGO, which asks for it
    sets_seal=True,
    eszett="SS",
    blob_tail=True,
    seals_empty=False,
    splits_upn=True,
    probe=available,
    make=_raw,
)
MIT_SPNEGO_NTLM = PeerKind(
    name="mit-spnego-gss-ntlmssp",
    mechanism="ntlm",
    spnego=True,
    sends_mic=True,
    sets_seal=True,
    eszett="SS",
    blob_tail=True,
    seals_empty=False,
    splits_upn=True,
    probe=available,
    make=_under_spnego,
)
