"""One hardened pyspnego context: step, seal, open, and who is there.

This is the boundary behind which pyspnego, python-gssapi and the account source may raise anything at
all: ValueError, struct.error, KeyError, IndexError, UnicodeDecodeError, OverflowError, StopIteration
and AttributeError were all seen on hostile tokens. Nothing but `AuthenticationError` and `UnsealError`
comes out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, Literal, NoReturn, cast

from .._errors import AuthenticationError, TicketExpiredError, UnsealError, printable
from .identity import ContextFlag, PeerIdentity, Traffic
from .kerberos.gssapi import root_reason
from .mechanism import Handshake
from .native import take_over
from .pyspnego_compat import sspi_context
from .sealers import BatchSealer, ProxySealer, TokenSealer

Usage = Literal["initiate", "accept"]

_PACKAGES: Final = {"ntlm": "NTLM", "kerberos": "Kerberos"}

_NOT_SEALED: Final = "sealing failed"
_NOT_OPENED: Final = "a message did not open"


def _describe(exc: Exception) -> str:
    if (kerberos := root_reason(exc)) is not None:
        return f"Kerberos: {printable(kerberos, 200)}"
    # The text may hold what the peer sent (a KeyError's key, a name that was not found).
    return f"{type(exc).__name__} {printable(str(exc), 200)}" if str(exc) else type(exc).__name__


def _unseal_error(what: str, why: Exception | str) -> UnsealError:
    """The one error of a message that does not seal or open: made of a text, so that it leads to no key.

    Args:
      what: which of the two.
      why: an exception of any kind; as a text, a sealer's own words.
    """
    if isinstance(why, UnsealError):
        return UnsealError(str(why))
    return UnsealError(f"{what}: {why if isinstance(why, str) else _describe(why)}")


def _spent(_: object) -> NoReturn:
    """In the place of what has failed, and leads to secrets."""
    raise AssertionError("the handshake has failed before")


class SecurityContext:
    """One side of one handshake, and the sealing after it. Made by `Acceptor` and `Initiator`.

    Not thread-safe, but may be moved from thread to thread between calls.

    Attributes:
      usage: ``"accept"`` or ``"initiate"``.
      established: True once the peer is authenticated, and never otherwise.
      batch_sealer: seals whole batches; None where sealing is not native.
      raw: whether the mechanism is not wrapped in SPNEGO. Only once `established`.
      encrypted: whether messages are encrypted, and not signed only. Only once `established`.
    """

    __slots__ = (
        "_check",
        "_deadline",
        "_failed",
        "_handshake",
        "_may_block",
        "_open_handshake",
        "_peer",
        "_sealer",
        "_signing",
        "batch_sealer",
        "encrypted",
        "established",
        "raw",
        "usage",
    )

    def __init__(
        self,
        usage: Usage,
        open_handshake: Callable[[bytes | None], Handshake],
        check: Callable[[Handshake], PeerIdentity],
        *,
        demanded: ContextFlag,
        may_block: Callable[[], bool],
    ) -> None:
        self.usage: Usage = usage
        self._may_block = may_block
        self.established = False
        self.encrypted = bool(demanded & ContextFlag.CONF)
        # Of a client that may only sign, until its first word tells whether it does.
        self._signing: BatchSealer | None = None
        self._open_handshake = open_handshake
        self._check = check
        self._handshake: Handshake | None = None
        self._failed = False
        self.raw = False
        self._peer: PeerIdentity | None = None
        self._sealer: TokenSealer | BatchSealer | None = None
        self.batch_sealer: BatchSealer | None = None
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
        text, principal, untrusted = refusal
        # Here, and made of nothing but text: whatever was caught leads through its traceback to frames with the
        # account's hash and the session's keys, and "from None" only hides that. The token can be attacked offline.
        del token, answer
        raise AuthenticationError(text, mechanism=self._fail(), principal=principal, untrusted=untrusted)

    def _try_step(self, token: bytes | None) -> tuple[bytes, tuple[str, str | None, bool] | None]:
        """`step`, but a refusal is returned: what of an `AuthenticationError` is its text, principal, and untrusted."""
        try:
            if self._handshake is None:
                self._handshake = self._open_handshake(token)
            answer = self._handshake.step(token) or b""
            # Also within the boundary: python-gssapi raises a step's deferred error only here.
            if (handshake := self._handshake).complete:
                self._finish(handshake)
        except AuthenticationError as exc:
            return b"", (str(exc), exc.principal, exc.untrusted)
        except Exception as exc:  # noqa: BLE001 - see the head of the file
            return b"", (_describe(exc), None, False)
        return answer, None

    def _fail(self) -> str | None:
        """The handshake has failed, for good; by which mechanism it was, if one was chosen."""
        self._failed = True
        # An initiator knows what it has tried, and pyspnego's own SPNEGO raises anything here too.
        mechanism = None
        if self.usage == "accept" and self._handshake is not None and (inner := self._handshake.inner) is not None:
            mechanism = inner.name
        # These hold, or lead to, tokens, keys, passwords, and the account file.
        self._handshake = None
        self._open_handshake = self._check = _spent
        self._may_block = bool
        return mechanism

    def _finish(self, handshake: Handshake) -> None:
        peer = self._check(handshake)
        if peer.expires_at is not None:
            self._deadline = time.monotonic() + (peer.expires_at - peer.authenticated_at).total_seconds()
        inner = handshake.inner
        assert inner is not None
        self.raw = cast(object, inner) is handshake
        # What SPNEGO wraps seals by itself; keeping only that lets the rest go.
        self._handshake = None
        # Where that was not demanded, it is what the two sides have agreed on.
        self.encrypted = self.encrypted or bool(peer.flags & ContextFlag.CONF)
        if not self.encrypted and self.usage == "accept" and peer.mechanism == "ntlm":
            # NTLM's flags do not tell: .NET on Linux never sets SEAL, and may encrypt all the same. See `open_records`.
            self._signing = take_over(handshake, inner, initiator=False, encrypt=False)
            self.encrypted = self._signing is not None
        self.batch_sealer = take_over(handshake, inner, initiator=self.usage == "initiate", encrypt=self.encrypted)
        self._sealer = self.batch_sealer or inner.make_sealer(encrypt=self.encrypted)
        self._peer = peer
        self.established = True
        # What was for the handshake: an established context may live for days, and thousands do.
        del self._open_handshake, self._check, self._may_block

    @property
    def peer(self) -> PeerIdentity:
        """The peer. Only once `established`."""
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
            error = _unseal_error(_NOT_SEALED, exc)
        # Outside, see `step`.
        raise error

    def seal_frames(self, messages: Sequence[bytes]) -> bytes:
        """Seal a batch. Only where there is a `batch_sealer`; see `BatchSealer.seal_frames`.

        Raises:
          UnsealError: see `seal`.
        """
        assert self.batch_sealer is not None
        try:
            return self.batch_sealer.seal_frames(messages)
        except Exception as exc:  # noqa: BLE001 - see the head of the file
            error = _unseal_error(_NOT_SEALED, exc)
        raise error

    def open_frames(self, frames: list[bytes]) -> tuple[list[bytes], UnsealError | None]:
        """Open a batch. Only where there is a `batch_sealer`; see `BatchSealer.open_frames`."""
        assert self.batch_sealer is not None
        try:
            messages, refusal = self.batch_sealer.open_frames(frames)
        except Exception as exc:  # noqa: BLE001 - see the head of the file
            return [], _unseal_error(_NOT_OPENED, exc)
        return messages, None if refusal is None else _unseal_error(_NOT_OPENED, str(refusal))

    def seal_records(self, data: bytes | bytearray | memoryview, piece: int) -> bytes:
        """Seal a stretch of a byte stream. Only where there is a `batch_sealer`; see `BatchSealer.seal_records`.

        Raises:
          UnsealError: see `seal`.
        """
        assert self.batch_sealer is not None
        # Whoever speaks before the other has can only guess, and guesses the better protection.
        self._signing = None
        try:
            return self.batch_sealer.seal_records(data, piece)
        except Exception as exc:  # noqa: BLE001 - see the head of the file
            error = _unseal_error(_NOT_SEALED, exc)
        raise error

    def open_records(self, tokens: list[bytes]) -> tuple[bytes, UnsealError | None]:
        """Open tokens. Only where there is a `batch_sealer`; see `BatchSealer.open_records`."""
        assert self.batch_sealer is not None
        try:
            data, refusal = self.batch_sealer.open_records(tokens)
            if self._signing is not None and tokens:
                # The first that come from it. Nobody else can make either kind, so both may be tried.
                signing, self._signing = self._signing, None
                if refusal is not None and not data:
                    data, of_signing = signing.open_records(tokens)
                    # Only what opens shows it: else a bit changed on the way would have us answer in the clear.
                    if data:
                        refusal = of_signing
                        self._sealer = self.batch_sealer = signing
                        self.encrypted = False
        except Exception as exc:  # noqa: BLE001 - see the head of the file
            return b"", _unseal_error(_NOT_OPENED, exc)
        return data, None if refusal is None else _unseal_error(_NOT_OPENED, str(refusal))

    def open_token(self, token: bytes) -> bytes:
        """Open what the peer sealed and did not divide. Only where there is no `batch_sealer`.

        Raises:
          UnsealError: see `open`.
        """
        assert self.batch_sealer is None
        try:
            return cast(TokenSealer, self._sealer).open_token(token)
        except Exception as exc:  # noqa: BLE001 - see the head of the file
            error = _unseal_error(_NOT_OPENED, exc)
        raise error

    def open(self, trailer: bytes, ciphertext: bytes) -> bytes:
        """Open what the peer sealed.

        Raises:
          UnsealError: it was altered, replayed, reordered or reflected. The context is of no use
              after that.
        """
        assert self._sealer is not None
        try:
            return self._sealer.open(trailer, ciphertext)
        except Exception as exc:  # noqa: BLE001 - see the head of the file
            error = _unseal_error(_NOT_OPENED, exc)
        raise error
