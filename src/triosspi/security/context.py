"""One hardened pyspnego context: step, seal, open, and who is there.

This is the boundary behind which pyspnego, python-gssapi and the account source may raise anything at
all: ValueError, struct.error, KeyError, IndexError, UnicodeDecodeError, OverflowError, StopIteration
and AttributeError were all seen on hostile tokens. Nothing but `AuthenticationError` and `UnsealError`
comes out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, Literal, NoReturn

from .._errors import AuthenticationError, TicketExpiredError, UnsealError, printable
from .identity import PeerIdentity, Traffic
from .kerberos.tickets import root_reason
from .native import take_over
from .pyspnego_compat import Proxy, inner_context, kerberos_enctype, mechanism_of, sspi_context
from .sealers import KERBEROS_TRAILER_SIZES, NTLM_TRAILER_SIZE, FrameSealer, GSSWrapSealer, ProxySealer, Sealer

Usage = Literal["initiate", "accept"]

_PACKAGES: Final = {"ntlm": "NTLM", "kerberos": "Kerberos"}

_NTLMSSP: Final = b"NTLMSSP\0"
# DER of the mechanism's OID, as it stands in an InitialContextToken (RFC 2743 3.1).
_OID_SPNEGO: Final = bytes.fromhex("06062b0601050502")
_OID_KERBEROS: Final = bytes.fromhex("06092a864886f712010202")
_INITIAL_CONTEXT_TOKEN: Final = b"\x60"
_NEG_TOKEN_INIT: Final = b"\xa0"
_LONG_LENGTH: Final = 0x80


def first_token_kind(token: bytes) -> str:
    """What an initiator begins with: ``"spnego"``, ``"ntlm"`` or ``"kerberos"``.

    Windows sends raw NTLM when that is all it has, and raw Kerberos to a server that it asked for
    by that name; both are as normal as SPNEGO.

    Raises:
      AuthenticationError: none of these.
    """
    if token.startswith(_NTLMSSP):
        return "ntlm"
    if token[:1] == _NEG_TOKEN_INIT:
        return "spnego"
    if token[:1] == _INITIAL_CONTEXT_TOKEN and len(token) > 1:
        length, body = token[1], 2
        if length & _LONG_LENGTH:
            body += length & ~_LONG_LENGTH
            length = int.from_bytes(token[2:body], "big")
        # pyspnego takes what is there, whatever the length says.
        if length == len(token) - body:
            if token.startswith(_OID_SPNEGO, body):
                return "spnego"
            if token.startswith(_OID_KERBEROS, body):
                return "kerberos"
    raise AuthenticationError("the first token is neither SPNEGO, nor NTLM, nor Kerberos")


def _describe(exc: Exception) -> str:
    if (kerberos := root_reason(exc)) is not None:
        return f"Kerberos: {printable(kerberos, 200)}"
    # The text may hold what the peer sent (a KeyError's key, a name that was not found).
    return f"{type(exc).__name__} {printable(str(exc), 200)}" if str(exc) else type(exc).__name__


def _spent(_: object) -> NoReturn:
    """In the place of what has failed, and leads to secrets."""
    raise AssertionError("the handshake has failed before")


class SecurityContext:
    """One side of one handshake, and the sealing after it. Made by `Acceptor` and `Initiator`.

    Not thread-safe, but may be moved from thread to thread between calls.

    Attributes:
      usage: ``"accept"`` or ``"initiate"``.
      established: True once the peer is authenticated, and never otherwise.
      frame_sealer: seals whole batches; None where sealing is not native.
    """

    __slots__ = (
        "_check",
        "_deadline",
        "_failed",
        "_may_block",
        "_open_proxy",
        "_peer",
        "_proxy",
        "_sealer",
        "established",
        "frame_sealer",
        "usage",
    )

    def __init__(
        self,
        usage: Usage,
        open_proxy: Callable[[bytes | None], Proxy],
        check: Callable[[Proxy], PeerIdentity],
        *,
        may_block: Callable[[], bool],
    ) -> None:
        self.usage: Usage = usage
        self._may_block = may_block
        self.established = False
        self._open_proxy = open_proxy
        self._check = check
        self._proxy: Proxy | None = None
        self._failed = False
        self._peer: PeerIdentity | None = None
        self._sealer: Sealer | None = None
        self.frame_sealer: FrameSealer | None = None
        self._deadline: float | None = None

    @property
    def may_block(self) -> bool:
        """Whether the next `step` may talk to a KDC or DNS, or read files; then it belongs in a thread."""
        return self._may_block()

    def step(self, token: bytes | None) -> bytes:
        """Take the peer's token (None at an initiator's start) and give the next one, maybe empty.

        Raises:
          AuthenticationError: the handshake has failed, for good.
        """
        if self._failed:
            raise AuthenticationError("the handshake has failed before")
        answer, refusal = self._try_step(token)
        if refusal is None:
            return answer
        text, principal = refusal
        # Here, and made of nothing but text: whatever was caught leads through its traceback to frames with the
        # account's hash and the session's keys, and "from None" only hides that. The token can be attacked offline.
        del token, answer
        raise AuthenticationError(text, mechanism=self._fail(), principal=principal)

    def _try_step(self, token: bytes | None) -> tuple[bytes, tuple[str, str | None] | None]:
        """`step`, but a refusal is returned: its text, and as whom the peer tried to log in, where it came to that."""
        try:
            if self._proxy is None:
                self._proxy = self._open_proxy(token)
            answer = self._proxy.step(token) or b""
            # Also within the boundary: python-gssapi raises a step's deferred error only here.
            if (proxy := self._proxy).complete:
                self._finish(proxy)
        except AuthenticationError as exc:
            return b"", (str(exc), exc.principal)
        except Exception as exc:  # noqa: BLE001 - see the head of the file
            return b"", (_describe(exc), None)
        return answer, None

    def _fail(self) -> str | None:
        """The handshake has failed, for good; by which mechanism it was, if one was chosen."""
        self._failed = True
        # An initiator knows what it has tried, and pyspnego's own SPNEGO raises anything here too.
        mechanism = None
        if self.usage == "accept" and self._proxy is not None:
            mechanism = mechanism_of(self._proxy)
        # These hold, or lead to, tokens, keys, passwords, and the account file.
        self._proxy = None
        self._open_proxy = self._check = _spent
        self._may_block = bool
        return mechanism

    def _finish(self, proxy: Proxy) -> None:
        peer = self._check(proxy)
        if peer.expires_at is not None:
            self._deadline = time.monotonic() + (peer.expires_at - peer.authenticated_at).total_seconds()
        # What SPNEGO wraps seals by itself; keeping only that lets the rest go.
        inner = inner_context(proxy)
        assert inner is not None
        self._proxy = None
        self.frame_sealer = take_over(proxy, inner, initiator=self.usage == "initiate")
        if self.frame_sealer is not None:
            self._sealer = self.frame_sealer
        elif peer.mechanism == "ntlm":
            self._sealer = ProxySealer(inner, NTLM_TRAILER_SIZE)
        elif (enctype := kerberos_enctype(inner)) is not None:
            self._sealer = GSSWrapSealer(inner, KERBEROS_TRAILER_SIZES[enctype])
        else:
            self._sealer = ProxySealer(inner, inner.query_message_sizes().header)
        self._peer = peer
        self.established = True
        # What was for the handshake: an established context may live for days, and thousands do.
        del self._open_proxy, self._check, self._may_block

    @property
    def peer(self) -> PeerIdentity:
        """Who is there. Only once `established`."""
        assert self._peer is not None
        return self._peer

    @property
    def package_name(self) -> str:
        """The mechanism by SSPI's name for it: ``"NTLM"`` or ``"Kerberos"``. Only once `established`."""
        return _PACKAGES.get(self.peer.mechanism, self.peer.mechanism)

    @property
    def trailer_size(self) -> int:
        """Bytes that sealing adds. Only once `established`."""
        assert self._sealer is not None
        return self._sealer.trailer_size

    @property
    def traffic(self) -> Traffic:
        """What was sealed and opened. Only once `established`."""
        assert self._sealer is not None
        return Traffic(*self._sealer.traffic)

    @property
    def native(self) -> object | None:
        """The system's own context, on Windows; None elsewhere. Only once `established`."""
        return sspi_context(self._sealer.proxy) if isinstance(self._sealer, ProxySealer) else None

    def check_alive(self) -> None:
        """See that the peer's ticket has not ended.

        Raises:
          TicketExpiredError: it has.
        """
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise TicketExpiredError("the peer's Kerberos ticket has ended")

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        """Seal: (trailer, ciphertext). Messages open in the order in which they were sealed.

        Raises:
          UnsealError: the context can seal nothing (any more).
        """
        assert self._sealer is not None
        try:
            return self._sealer.seal(message)
        except Exception as exc:  # noqa: BLE001 - see the head of the file
            error = _describe(exc)
        # Outside, see `step`.
        raise UnsealError(f"sealing failed: {error}")

    def seal_frames(self, messages: Sequence[bytes]) -> bytes:
        """Seal a batch. Only where there is a `frame_sealer`; see `FrameSealer.seal_frames`.

        Raises:
          UnsealError: see `seal`.
        """
        assert self.frame_sealer is not None
        try:
            return self.frame_sealer.seal_frames(messages)
        except Exception as exc:  # noqa: BLE001 - see the head of the file
            error = _describe(exc)
        raise UnsealError(f"sealing failed: {error}")

    def open_frames(self, frames: list[bytes]) -> tuple[list[bytes], UnsealError | None]:
        """Open a batch. Only where there is a `frame_sealer`; see `FrameSealer.open_frames`."""
        assert self.frame_sealer is not None
        try:
            messages, exc = self.frame_sealer.open_frames(frames)
        except Exception as unexpected:  # noqa: BLE001 - see the head of the file
            return [], UnsealError(f"a message did not open: {_describe(unexpected)}")
        return messages, None if exc is None else UnsealError(f"a message did not open: {exc}")

    def open(self, trailer: bytes, ciphertext: bytes) -> bytes:
        """Open what the peer sealed.

        Raises:
          UnsealError: it was altered, replayed, reordered or reflected. The context is of no use
              after that.
        """
        assert self._sealer is not None
        try:
            return self._sealer.open(trailer, ciphertext)
        except UnsealError as exc:
            error = str(exc)
        except Exception as exc:  # noqa: BLE001 - see the head of the file
            error = f"a message did not open: {_describe(exc)}"
        raise UnsealError(error)
