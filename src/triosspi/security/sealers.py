"""Sealers: how a finished context seals and opens, one class per way.

A sealer is chosen when the handshake ends. `seal` gives (trailer, ciphertext) in the layout of SSPI's
EncryptMessage with SECBUFFER_TOKEN and SECBUFFER_DATA; `open` takes what any peer made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from spnego import ContextProxy, UnwrapResult, WrapResult

from .._errors import UnsealError

NTLM_TRAILER_SIZE: Final = 16

#: By the number of the encryption type. AES: header, confounder, its copy and the MAC. RC4's token has a pad
#: byte behind the message besides its 45 bytes in front; cut here, ciphertext and message are equally long.
KERBEROS_TRAILER_SIZES: Final = {17: 60, 18: 60, 19: 64, 20: 72, 23: 46}

# RFC 4121 4.2.6.2: 05 04 | flags | ff | EC | RRC | sequence number
_RFC4121_WRAP: Final = b"\x05\x04"
_RRC: Final = slice(6, 8)
_WRAP_HEADER_SIZE: Final = 16
_CONFOUNDER_SIZE: Final = 16


class Sealer(Protocol):
    """Seals and opens the messages of one context, in order. Not thread-safe."""

    @property
    def trailer_size(self) -> int:
        """Bytes of the trailers that it makes."""
        ...  # pragma: no cover

    @property
    def traffic(self) -> tuple[int, int, int, int]:
        """The fields of `Traffic`."""
        ...  # pragma: no cover

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        """Seal a message: (trailer, ciphertext)."""
        ...  # pragma: no cover

    def open(self, trailer: bytes, ciphertext: bytes) -> bytes:
        """Open a sealed message.

        Raises:
          Exception: of any kind; the message did not open, and none ever will again.
        """
        ...  # pragma: no cover


class TokenSealer(Sealer, Protocol):
    """A sealer that also opens what its peer has not divided."""

    def open_token(self, token: bytes) -> bytes:
        """The same for a trailer and its ciphertext in one, in whatever order the mechanism lets them stand."""
        ...  # pragma: no cover


class BatchSealer(Sealer, Protocol):
    """A sealer that handles whole batches, in the frames of `framed` and the records of NegotiateStream."""

    def seal_frames(self, messages: Sequence[bytes]) -> bytes:
        """Seal messages into frames, ``length | trailer_length | trailer | ciphertext``, in one buffer."""
        ...  # pragma: no cover

    def open_frames(self, frames: list[bytes]) -> tuple[list[bytes], Exception | None]:
        """Open the insides of frames in order, up to and with the first empty message, or up to a bad one.

        Returns:
          The messages, and what is wrong with the frame behind the last of them, if anything.
        """
        ...  # pragma: no cover

    def seal_records(self, data: bytes | bytearray | memoryview, piece: int) -> bytes:
        """Seal a stretch of a byte stream into records, ``length | token``, in one buffer; each of at most ``piece`` bytes."""
        ...  # pragma: no cover

    def open_records(self, tokens: list[bytes]) -> tuple[bytes, Exception | None]:
        """Open tokens in order, up to a bad one.

        Returns:
          The data of all, in one, and what is wrong with the token behind the last of them, if anything.
        """
        ...  # pragma: no cover


class GSSWraps(Protocol):
    """What `GSSWrapSealer` needs of a context."""

    def wrap(self, data: bytes, encrypt: bool = True) -> WrapResult:
        """GSS_Wrap."""
        ...  # pragma: no cover

    def unwrap(self, data: bytes) -> UnwrapResult:
        """GSS_Unwrap."""
        ...  # pragma: no cover


class _Counting:
    """Counts what goes through `_seal` and `_open`, which are a subclass's."""

    def __init__(self, trailer_size: int, *, encrypt: bool) -> None:
        self.trailer_size = trailer_size
        self._encrypt = encrypt
        self._counts = [0, 0, 0, 0]

    @property
    def traffic(self) -> tuple[int, int, int, int]:
        """See `Sealer.traffic`."""
        messages_sealed, bytes_sealed, messages_opened, bytes_opened = self._counts
        return messages_sealed, bytes_sealed, messages_opened, bytes_opened

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        """See `Sealer.seal`."""
        sealed = self._seal(message)
        self._counts[0] += bool(message)
        self._counts[1] += len(message)
        return sealed

    def open(self, trailer: bytes, ciphertext: bytes) -> bytes:
        """See `Sealer.open`."""
        return self._opened(self._open(trailer, ciphertext))

    def open_token(self, token: bytes) -> bytes:
        """See `TokenSealer.open_token`."""
        return self._opened(self._open_token(token))

    def _opened(self, message: bytes) -> bytes:
        self._counts[2] += bool(message)
        self._counts[3] += len(message)
        return message

    def _seal(self, message: bytes) -> tuple[bytes, bytes]:
        raise NotImplementedError

    def _open(self, trailer: bytes, ciphertext: bytes) -> bytes:
        raise NotImplementedError

    def _open_token(self, token: bytes) -> bytes:
        raise NotImplementedError


class ProxySealer(_Counting):
    """pyspnego's own, for NTLM and for the system's SSPI.

    Args:
      proxy: the context.
      trailer_size: bytes.
      encrypt: False: messages are signed only.
    """

    def __init__(self, proxy: ContextProxy, trailer_size: int, *, encrypt: bool) -> None:
        super().__init__(trailer_size, encrypt=encrypt)
        self._proxy = proxy

    @property
    def proxy(self) -> ContextProxy:
        """The context."""
        return self._proxy

    def _seal(self, message: bytes) -> tuple[bytes, bytes]:
        if not self._encrypt:
            return self._proxy.sign(message), message
        sealed = self._proxy.wrap_winrm(message)
        return sealed.header, sealed.data

    def _open(self, trailer: bytes, ciphertext: bytes) -> bytes:
        # Checked here because pyspnego compares whatever bytes it is given: an NTLM signature of
        # another length would only fail after the RC4 state has moved.
        if len(trailer) != self.trailer_size:
            raise UnsealError(f"a trailer of {len(trailer)} bytes where {self.trailer_size} are due")
        if not self._encrypt:
            self._proxy.verify(ciphertext, trailer)
            return ciphertext
        return self._proxy.unwrap_winrm(trailer, ciphertext)

    def _open_token(self, token: bytes) -> bytes:
        return self._open(token[: self.trailer_size], token[self.trailer_size :])


class GSSWrapSealer(_Counting):
    """Kerberos with an AES encryption type over a GSS-API library.

    `gss_wrap` makes header | ciphertext, not rotated; SSPI's buffers are the same token rotated right
    so that exactly the message's own bytes stand at its end (RFC 4121 4.2.5 leaves the rotation to the
    sender). Rotating here costs a quarter of gss_wrap_iov, which would give it directly.

    Args:
      context: what wraps.
      trailer_size: bytes, of messages that are encrypted.
      encrypt: False: messages are signed only. Then what `seal` gives is not divided as SSPI does it.
    """

    def __init__(self, context: GSSWraps, trailer_size: int, *, encrypt: bool) -> None:
        super().__init__(trailer_size, encrypt=encrypt)
        self._context = context
        self._rotation = trailer_size - _WRAP_HEADER_SIZE - _CONFOUNDER_SIZE

    def _seal(self, message: bytes) -> tuple[bytes, bytes]:
        token = self._context.wrap(message, encrypt=self._encrypt).data
        if not self._encrypt:
            return token[:_WRAP_HEADER_SIZE], token[_WRAP_HEADER_SIZE:]
        if not token.startswith(_RFC4121_WRAP):
            # RC4-HMAC: no rotation, and no layout in SSPI's buffers that would be ours to give.
            return token[: self.trailer_size], token[self.trailer_size :]
        turn = self._rotation
        header = token[: _RRC.start] + turn.to_bytes(2, "big") + token[_RRC.stop : _WRAP_HEADER_SIZE]
        cut = self.trailer_size - _WRAP_HEADER_SIZE - turn
        return header + token[-turn:] + token[_WRAP_HEADER_SIZE : _WRAP_HEADER_SIZE + cut], token[
            _WRAP_HEADER_SIZE + cut : -turn
        ]

    def _open(self, trailer: bytes, ciphertext: bytes) -> bytes:
        message = self._open_token(trailer + ciphertext)
        # Nor is the cut under a signature: one place is taken, where the ciphertext is as long as the message, which is SSPI's,
        # and that of peers which cut gss_wrap's tokens.
        if len(message) != len(ciphertext):
            raise UnsealError(f"a ciphertext of {len(ciphertext)} bytes for a message of {len(message)}")
        return message

    def _open_token(self, token: bytes) -> bytes:
        # The rotation is under no signature, and the library takes one that is a whole turn more for the same.
        if token.startswith(_RFC4121_WRAP) and int.from_bytes(token[_RRC], "big") >= len(token) - _WRAP_HEADER_SIZE:
            raise UnsealError("a rotation that is longer than what it turns")
        # unwrap_iov(stream + data) would take any cut, and aborts the process on some tokens.
        opened = self._context.unwrap(token)
        if opened.encrypted != self._encrypt:
            # A wrap token that is only signed is valid to GSS-API, too.
            raise UnsealError(f"a message that was {'' if opened.encrypted else 'signed but not '}encrypted")
        return opened.data
