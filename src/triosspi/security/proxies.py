"""pyspnego's own contexts as `Handshake` and `Mechanism`: every initiator's, and on Windows both sides'."""

from __future__ import annotations

from typing import Any, Final

from spnego import ContextProxy

from . import pyspnego_compat
from .kerberos.gssapi import KerberosContext
from .mechanism import Mechanism, WithoutSPNEGO
from .sealers import NTLM_TRAILER_SIZE, ProxySealer


class ProxyContext:
    """What all of them have."""

    def __init__(self, proxy: ContextProxy) -> None:
        self._proxy = proxy

    @property
    def complete(self) -> bool:
        """See `Mechanism.complete`."""
        return self._proxy.complete

    @property
    def flags(self) -> int:
        """See `Mechanism.flags`."""
        return int(self._proxy.context_attr)

    @property
    def negotiated(self) -> str:
        """The mechanism, as pyspnego or the system tells it once it is `complete`."""
        return self._proxy.negotiated_protocol or "unknown"

    @property
    def target(self) -> str:
        """The SPN that an initiator has asked for."""
        return str(self._proxy.spn or "")

    def step(self, in_token: bytes | None) -> bytes | None:
        """See `Handshake.step`."""
        return self._proxy.step(in_token)


class _ByPyspnego(ProxyContext, WithoutSPNEGO):
    """What is pyspnego's after the handshake, too."""

    enctype: Final = None

    @property
    def session_key(self) -> bytes:
        """See `Mechanism.session_key`."""
        return self._proxy.session_key

    def sign(self, data: bytes) -> bytes:
        """See `Mechanism.sign`."""
        return self._proxy.sign(data)

    def verify(self, data: bytes, mic: bytes) -> None:
        """See `Mechanism.verify`."""
        self._proxy.verify(data, mic)

    def restart_rc4(self, *, outgoing: bool) -> None:
        """See `Mechanism.restart_rc4`. pyspnego's own SPNEGO, or the system's, does it."""


class SystemContext(_ByPyspnego):
    """The system's own SSPI, with or without its Negotiate: on Windows, either side's."""

    name: Final = None

    @property
    def client(self) -> str | None:
        """The client's name, on an acceptor."""
        return self._proxy.client_principal

    def make_sealer(self, *, encrypt: bool) -> ProxySealer:
        """See `Mechanism.make_sealer`."""
        return ProxySealer(self._proxy, self._proxy.query_message_sizes().header, encrypt=encrypt)


class NTLMInitiator(_ByPyspnego):
    """NTLM by pyspnego."""

    name: Final = "ntlm"

    @property
    def negotiate_flags(self) -> int:
        """NTLM's own flags, [MS-NLMP] 2.2.2.5, that both sides have agreed on."""
        return pyspnego_compat.negotiate_flags(self._proxy)

    def make_sealer(self, *, encrypt: bool) -> ProxySealer:
        """See `Mechanism.make_sealer`."""
        return ProxySealer(self._proxy, NTLM_TRAILER_SIZE, encrypt=encrypt)


class KerberosInitiator(ProxyContext, KerberosContext):
    """Kerberos, of which pyspnego makes the handshake; what comes after it is python-gssapi's own."""

    def __init__(self, proxy: ContextProxy) -> None:
        ProxyContext.__init__(self, proxy)
        KerberosContext.__init__(self)

    @property
    def library_context(self) -> Any:
        """See `KerberosContext.library_context`."""
        return pyspnego_compat.gssapi_context(self._proxy)


class NegotiateInitiator(ProxyContext):
    """SPNEGO by pyspnego, around a mechanism of its own."""

    _proxy: pyspnego_compat.InitiatorNegotiate

    @property
    def inner(self) -> Mechanism | None:
        """See `Handshake.inner`."""
        inner = self._proxy.inner
        return None if inner is None else adopt(inner)

    @property
    def mic_sent(self) -> bool:
        """See `Handshake.mic_sent`."""
        return self._proxy.mic_sent

    @property
    def mic_verified(self) -> bool:
        """See `Handshake.mic_verified`."""
        return self._proxy.mic_verified


def adopt(proxy: ContextProxy) -> NTLMInitiator | KerberosInitiator | SystemContext:
    """The context of one mechanism, or of all that the system has, which pyspnego has made."""
    mechanism = pyspnego_compat.mechanism_of(proxy)
    if mechanism == "ntlm":
        return NTLMInitiator(proxy)
    return KerberosInitiator(proxy) if mechanism == "kerberos" else SystemContext(proxy)
