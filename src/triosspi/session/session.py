"""One connection of messages without its I/O: the handshake, then sealed messages. See `base` for all that is not obvious."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from .._errors import LocalProtocolError, RemoteProtocolError, TruncatedError
from ..security.credentials import Acceptor, Initiator
from ..security.identity import ContextFlag, ContextSizes
from ..wire import DEFAULT_MAX_MESSAGE_SIZE, FramedCodec, MessageCodec, WireFormat, check_max_message_size, make_codec
from .base import BaseSession, Tracer
from .states import Ours, Theirs

# What a Kerberos context must provide. The sample's client asks for confidentiality and nothing else;
# where messages go back and forth, a missing, repeated or exchanged one must be noticed: by the Kerberos library,
# where it is what seals (see `security.policy`).
_DEMANDED: Final = {
    WireFormat.SAMPLE: ContextFlag.CONF,
    WireFormat.FRAMED: ContextFlag.CONF | ContextFlag.INTEG | ContextFlag.REPLAY | ContextFlag.SEQUENCE,
}


class Session(BaseSession):
    """The state of one connection of messages.

    Args:
      credential: see `BaseSession`.
      wire: the format, one of messages.
      max_message_size: bytes of plaintext, for both directions.
      tracer: is told of each step.

    Raises:
      LocalProtocolError: ``max_message_size`` cannot be, or the format is a byte stream's.
    """

    __slots__ = ("_batches", "_sample")

    _codec: MessageCodec

    def __init__(
        self,
        credential: Acceptor | Initiator,
        wire: WireFormat,
        *,
        max_message_size: int = DEFAULT_MAX_MESSAGE_SIZE,
        tracer: Tracer | None = None,
    ) -> None:
        check_max_message_size(max_message_size)
        codec = make_codec(wire, max_message_size)
        super().__init__(credential, codec, _DEMANDED[wire], tracer)
        self._sample = wire is WireFormat.SAMPLE
        # The codec again, where the sealer handles whole batches of its frames.
        self._batches: FramedCodec | None = None

    @property
    def wire(self) -> WireFormat:
        """See `BaseSession.wire`."""
        return WireFormat.SAMPLE if self._sample else WireFormat.FRAMED

    @property
    def sizes(self) -> ContextSizes:
        """See `ContextSizes`. Only once `established`."""
        return ContextSizes(self._context.trailer_size, self._codec.message_limit)

    @property
    def _peer_speaks(self) -> bool:
        return not self._sample

    def _begin_messages(self, *, unproven: bool) -> None:
        if isinstance(self._codec, FramedCodec) and self._context.batch_sealer is not None:
            self._batches = self._codec
        if not self._sample:
            super()._begin_messages(unproven=unproven)
        elif self.accepts:
            # In the sample's format only the acceptor speaks.
            self._say(Ours.MESSAGES)
            self._hear(Theirs.MUTE)
        else:
            self._say(Ours.SAID_ALL)
            self._hear(Theirs.UNPROVEN if unproven else Theirs.PROVEN)

    def check_sending(self, values: Sequence[bytes]) -> None:
        """See `BaseSession.check_sending`."""
        if self._said_all:
            raise LocalProtocolError("nothing more can be sent: the sample's format has one message, the acceptor's")
        self._codec.check_messages(values)
        if self._sample and len(values) > 1:
            raise LocalProtocolError("the sample's format has one message only")

    def seal(self, messages: Sequence[bytes]) -> bytes:
        """Seal messages, in order, into the bytes to send. These must be sent, before any others.

        Raises:
          LocalProtocolError: one of them cannot be sent; then none was sealed.
          UnsealError: the context is of no use any more.
        """
        self.check_sending(messages)
        return self.seal_checked(messages)

    def seal_checked(self, values: Sequence[bytes]) -> bytes:
        """See `BaseSession.seal_checked`."""
        if self._sample:
            self._say(Ours.SAID_ALL)
        self._context.check_alive()
        if self._batches is not None and self._tracer is None:
            return self._context.seal_frames(values)
        seal = self._context.seal
        records = [seal(message) for message in values]
        if self._tracer is not None:
            for message, (trailer, ciphertext) in zip(values, records, strict=True):
                self._tracer.message_sealed(message, trailer, ciphertext)
        return self._codec.pack_records(records)

    def goodbye(self) -> bytes:
        """See `BaseSession.goodbye`. None to a peer that has left."""
        if self._ours is not Ours.MESSAGES or self.peer_left or not self._codec.has_goodbye:
            return b""
        self._say(Ours.SAID_ALL)
        return self._codec.pack_records([self._context.seal(b"")])

    def next_opened(self) -> list[bytes]:
        """Open everything at hand. Empty: more bytes are needed, or `receive_ended`.

        Raises:
          RemoteProtocolError: nothing more can come.
        """
        if self._unread and self._hearing:
            # All that is whole is opened now, so nothing is left to see before the next `receive_data` but,
            # behind it, the end.
            self._unread = self._codec.ended
            if messages := self._open_records():
                return messages
        if self._hearing:
            return []
        if self._theirs is Theirs.LEAVING:
            self._hear(Theirs.ENDED)
        elif self._error is not None:
            raise self._error
        return []

    def _open_records(self) -> list[bytes]:
        """Open all that is at hand; what follows it, a good end or an error, is the state from now on."""
        messages: list[bytes] = []
        error: RemoteProtocolError | None = None
        try:
            self._context.check_alive()
            if self._batches is not None:
                messages, error = self._context.open_frames(self._batches.frames())
            else:
                for trailer, ciphertext in self._codec.records():
                    messages.append(self._context.open(trailer, ciphertext))
                    if not messages[-1]:
                        break
        except RemoteProtocolError as exc:
            error = exc
        if messages:
            goodbye = not messages[-1] and self._codec.has_goodbye
            if goodbye:
                messages.pop()
            if goodbye or self._sample:
                # What follows is discarded, never parsed.
                self._codec.discard()
                self._hear(Theirs.LEAVING)
                return messages
            if not self._proved:
                self._hear(Theirs.PROVEN)
        if error is not None:
            unexplained = isinstance(error, TruncatedError)
            self._error = (self.explain_end() if unexplained else None) or error
            self._hear(Theirs.UNHEARD if self._theirs is Theirs.UNPROVEN else Theirs.FAILED)
        return messages
