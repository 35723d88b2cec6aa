"""What the rest of security knows of a handshake and of the mechanism in it, whichever module makes them.

An acceptor's are made by `ntlm.acceptor`, `kerberos.gssapi` and `spnego.acceptor`; an initiator's, and on Windows
both, by pyspnego (`proxies`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, Self

if TYPE_CHECKING:
    from .sealers import TokenSealer


class Handshake(Protocol):
    """One side of a handshake: a mechanism's own tokens, or SPNEGO around them."""

    @property
    def complete(self) -> bool:
        """Whether it calls itself finished. Only `policy` decides whether it is."""
        ...  # pragma: no cover

    @property
    def inner(self) -> Mechanism | None:
        """The context of the mechanism: itself, or the one that SPNEGO has chosen, if it has."""
        ...  # pragma: no cover

    @property
    def mic_sent(self) -> bool:
        """Whether our mechListMIC has gone."""
        ...  # pragma: no cover

    @property
    def mic_verified(self) -> bool:
        """Whether the peer's mechListMIC has been verified."""
        ...  # pragma: no cover

    def step(self, in_token: bytes | None) -> bytes | None:
        """Take the peer's token, give the answer.

        Raises:
          Exception: of any kind.
        """
        ...  # pragma: no cover


class Mechanism(Protocol):
    """A mechanism's own context. All but `complete`, `name` and `step` only once `complete`."""

    @property
    def complete(self) -> bool:
        """Whether the mechanism calls itself finished."""
        ...  # pragma: no cover

    @property
    def name(self) -> str | None:
        """``"ntlm"`` or ``"kerberos"``; None where the system chooses."""
        ...  # pragma: no cover

    @property
    def flags(self) -> int:
        """What the context provides, as bits of `ContextFlag`, and maybe others above them."""
        ...  # pragma: no cover

    @property
    def session_key(self) -> bytes:
        """The key that both sides have now, or nothing."""
        ...  # pragma: no cover

    @property
    def enctype(self) -> int | None:
        """The encryption type of a Kerberos session key; None with NTLM, and where the system does not say."""
        ...  # pragma: no cover

    def step(self, in_token: bytes | None) -> bytes | None:
        """See `Handshake.step`."""
        ...  # pragma: no cover

    def sign(self, data: bytes) -> bytes:
        """GSS_GetMIC."""
        ...  # pragma: no cover

    def verify(self, data: bytes, mic: bytes) -> None:
        """GSS_VerifyMIC; raises when it is wrong."""
        ...  # pragma: no cover

    def restart_rc4(self, *, outgoing: bool) -> None:
        """Begin RC4 anew in one direction, which is due after a mechListMIC ([MS-SPNG] 3.3.5.1); only NTLM has one."""
        ...  # pragma: no cover

    def make_sealer(self, *, encrypt: bool) -> TokenSealer:
        """What seals by the mechanism's own library, where it is not done natively.

        Args:
          encrypt: False: messages are signed only.
        """
        ...  # pragma: no cover


class WithoutSPNEGO:
    """What of a `Handshake` is the same for all mechanisms that are not wrapped in SPNEGO."""

    __slots__ = ()

    mic_sent: Final = False
    mic_verified: Final = False

    @property
    def inner(self) -> Self:
        """See `Handshake.inner`."""
        return self
