"""sspi-rs (Devolutions' SSPI in Rust: its own NTLM and SPNEGO) through the `sspilib` package, which bundles it.

It speaks the API of the Microsoft sample (InitializeSecurityContext, EncryptMessage with SECBUFFER_TOKEN and
SECBUFFER_DATA), so it is as near to the sample's own client as Linux has.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from .base import PeerError, PeerKind, missing_module

if TYPE_CHECKING:
    import sspilib


class _Context:
    """A security context; sspilib makes stepping and sealing the same on both sides."""

    def __init__(self, context: sspilib.SecurityContext) -> None:
        self._context: sspilib.SecurityContext | None = context
        self._trailer = 0
        self._sequence = 0

    @property
    def complete(self) -> bool:
        return self._live.complete

    def step(self, token: bytes | None) -> bytes | None:
        import sspilib

        try:
            return self._live.step(token) or None
        except sspilib.WindowsError as exc:
            raise PeerError(str(exc)) from exc

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        from sspilib import WindowsError, raw

        try:
            if not self._trailer:
                sizes = raw.query_context_attributes(self._live, raw.SecPkgContextSizes)
                self._trailer = sizes.security_trailer
            buffers = raw.SecBufferDesc(
                [
                    raw.SecBuffer(bytearray(self._trailer), raw.SecBufferType.SECBUFFER_TOKEN),
                    raw.SecBuffer(bytearray(message), raw.SecBufferType.SECBUFFER_DATA),
                ]
            )
            raw.encrypt_message(self._live, 0, buffers, self._next_sequence())
        except WindowsError as exc:
            raise PeerError(str(exc)) from exc
        return buffers[0].data, buffers[1].data

    def open(self, trailer: bytes, data: bytes) -> bytes:
        from sspilib import WindowsError, raw

        buffers = raw.SecBufferDesc(
            [
                raw.SecBuffer(bytearray(trailer), raw.SecBufferType.SECBUFFER_TOKEN),
                raw.SecBuffer(bytearray(data), raw.SecBufferType.SECBUFFER_DATA),
            ]
        )
        try:
            raw.decrypt_message(self._live, buffers, self._next_sequence())
        except WindowsError as exc:
            raise PeerError(str(exc)) from exc
        return buffers[1].data

    def close(self) -> None:
        self._context = None

    @property
    def _live(self) -> sspilib.SecurityContext:
        if self._context is None:
            raise PeerError("closed")
        return self._context

    def _next_sequence(self) -> int:
        # SSPI's MessageSeqNo argument: sspi-rs counts by itself and ignores it, as Windows does.
        self._sequence += 1
        return self._sequence - 1


class SspiRsInitiator(_Context):
    """A login by sspi-rs. `package` is an SSPI package name, NTLM or Negotiate."""

    def __init__(self, package: str, username: str, password: str, domain: str) -> None:
        import sspilib

        # Without the list Negotiate asks the DNS for the domain's KDC (SRV records): it blocks, and may even find one.
        # One entry only: sspilib joins several with a colon, which sspi-rs does not split, and then none holds.
        protocols = ["ntlm"] if package == "Negotiate" else None
        try:
            credential = sspilib.UserCredential(
                username, password, domain or None, protocol=package, protocol_list=protocols
            )
            super().__init__(sspilib.ClientSecurityContext(credential, "host/localhost"))
        except sspilib.WindowsError as exc:
            raise PeerError(str(exc)) from exc


class SspiRsAcceptor(_Context):
    """The other side, raw NTLM only, for one account.

    Under Negotiate sspi-rs's acceptor wants a KDC: it answers the AUTHENTICATE message with SEC_E_INTERNAL_ERROR.
    """

    def __init__(self, username: str, password: str, domain: str) -> None:
        import sspilib

        try:
            credential = sspilib.UserCredential(username, password, domain or None, protocol="NTLM", usage="accept")
            super().__init__(sspilib.ServerSecurityContext(credential))
        except sspilib.WindowsError as exc:
            raise PeerError(str(exc)) from exc

    @property
    def client(self) -> str | None:
        from sspilib import raw

        return raw.query_context_attributes(self._live, raw.SecPkgContextNames).username


available = partial(missing_module, "sspilib", "sspilib")

SSPI_RS_NTLM = PeerKind(
    name="sspi-rs-ntlm",
    mechanism="ntlm",
    spnego=False,
    sends_mic=True,
    sets_seal=True,
    eszett="SS",
    blob_tail=True,
    seals_empty=True,
    probe=available,
    make=partial(SspiRsInitiator, "NTLM"),
)
SSPI_RS_NEGOTIATE = PeerKind(
    name="sspi-rs-negotiate",
    mechanism="ntlm",
    spnego=True,
    sends_mic=True,
    sets_seal=True,
    eszett="SS",
    blob_tail=True,
    seals_empty=True,
    probe=available,
    make=partial(SspiRsInitiator, "Negotiate"),
)
