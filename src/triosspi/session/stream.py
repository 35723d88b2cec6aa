"""One connection of .NET's NegotiateStream without its I/O: the handshake, then a sealed byte stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal, TypeAlias

from .._errors import AuthenticationError, LocalProtocolError, RemoteProtocolError
from .._framing import pack_frame
from ..security.credentials import Acceptor, Initiator
from ..security.identity import ContextFlag
from ..wire import RECORD_DATA_SIZE, NegotiateStreamCodec, WireFormat
from .base import BaseSession, Tracer
from .states import Ours, Theirs

Protection: TypeAlias = Literal["encrypt", "sign"]
"""How data is protected at least: .NET's ProtectionLevel.EncryptAndSign or Sign."""

_DEMANDED: Final[dict[Protection, ContextFlag]] = {
    "encrypt": ContextFlag.CONF | ContextFlag.INTEG | ContextFlag.REPLAY | ContextFlag.SEQUENCE,
    "sign": ContextFlag.INTEG | ContextFlag.REPLAY | ContextFlag.SEQUENCE,
}


def check_protection(protection: Protection) -> None:
    """Refuse a protection that there is not.

    Raises:
      LocalProtocolError: it is none.
    """
    if protection not in _DEMANDED:
        raise LocalProtocolError(f"protection is one of {', '.join(_DEMANDED)}, not {protection!r}")


class StreamSession(BaseSession):
    """The state of one connection of a byte stream.

    Args:
      credential: see `BaseSession`.
      protection: what is demanded at least.
      tracer: is told of each step.

    Raises:
      LocalProtocolError: there is no such protection.
    """

    __slots__ = ()

    _codec: NegotiateStreamCodec

    def __init__(
        self, credential: Acceptor | Initiator, *, protection: Protection = "encrypt", tracer: Tracer | None = None
    ) -> None:
        check_protection(protection)
        super().__init__(credential, NegotiateStreamCodec(), _DEMANDED[protection], tracer)

    @property
    def wire(self) -> WireFormat:
        """See `BaseSession.wire`."""
        return WireFormat.NEGOTIATE_STREAM

    @property
    def protection(self) -> Protection:
        """How data is protected. Only once `established`."""
        return "encrypt" if self._context.encrypted else "sign"

    @property
    def said_all(self) -> bool:
        """Whether `end` was called."""
        return self._said_all

    def end(self) -> None:
        """Nothing more will be sent."""
        self._say(Ours.SAID_ALL)

    def _begin_messages(self, *, unproven: bool) -> None:
        context = self._context
        if (
            self.accepts
            and context.raw
            and context.peer.mechanism == "ntlm"
            and not context.peer.flags & ContextFlag.CONF
        ):
            # ProtectionLevel.None: .NET takes bare NTLM for it, and nothing else does; and then data comes without any framing.
            # The flags do not always tell: on Linux it sets SIGN even so.
            raise AuthenticationError(
                "NTLM: the client asks for no protection of its data", mechanism="ntlm", untrusted=True
            )
        super()._begin_messages(unproven=unproven)

    def check_sending(self, values: bytes | memoryview) -> None:
        """See `BaseSession.check_sending`. All can be sent."""

    def seal_checked(self, values: bytes | memoryview) -> bytes:
        """See `BaseSession.seal_checked`."""
        self._context.check_alive()
        if self._context.batch_sealer is not None and self._tracer is None:
            return self._context.seal_records(values, RECORD_DATA_SIZE)
        return b"".join(self._records(values))

    def _records(self, data: bytes | memoryview) -> Iterator[bytes]:
        for start in range(0, len(data), RECORD_DATA_SIZE):
            piece = bytes(data[start : start + RECORD_DATA_SIZE])
            trailer, ciphertext = self._context.seal(piece)
            if self._tracer is not None:
                self._tracer.message_sealed(piece, trailer, ciphertext)
            yield pack_frame(trailer + ciphertext)

    def next_opened(self) -> bytes:
        """Open everything at hand. Empty: more bytes are needed, or `receive_ended`.

        Raises:
          RemoteProtocolError: nothing more can come.
        """
        if self._unread and self._hearing:
            self._unread = self._codec.ended
            if data := self._open_tokens():
                return data
        if self._error is not None:
            raise self._error
        return b""

    def _open_tokens(self) -> bytes:
        """Open all that is at hand; what follows it, the end or an error, is the state from now on."""
        data = b""
        error: RemoteProtocolError | None = None
        try:
            self._context.check_alive()
            tokens = self._codec.tokens()
            if self._context.batch_sealer is not None:
                data, error = self._context.open_records(tokens)
            else:
                for token in tokens:
                    data += self._context.open_token(token)
        except RemoteProtocolError as exc:
            tokens, error = [], exc
        if data and not self._proved:
            self._hear(Theirs.PROVEN)
        if error is not None:
            self._error = error
            self._hear(Theirs.FAILED if self._proved else Theirs.UNHEARD)
        elif not tokens and self._codec.ended:
            # Between two records; whoever has said nothing by now has proved nothing.
            self._hear(Theirs.ENDED if self._proved else Theirs.MUTE)
        return data
