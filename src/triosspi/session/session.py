"""One connection without its I/O: the handshake, then sealed messages."""

# What has to be right here, and why it is not obvious:
#
# A session is a wire format times a security context. Bytes go in (`receive_data` only stores them)
# and come out (`step`, `seal` and `goodbye` return what must be sent); nothing here waits, so all of
# it can be tested byte by byte, and the channel above has nothing left to do but await.
#
# What SSPI (and GSS-API) guarantee about sealed messages: who made them, that they are whole, and
# their order. Each is numbered inside its signature, so a replayed, dropped, reordered or reflected
# one does not open. The price is that a context is poisoned by the first bad message: both sides'
# counters, and NTLM's running RC4 state, have moved. So the first failure is final, and everything
# that is sealed must also be sent, in that order.
#
# What they do not guarantee is the end. No signature covers the closing of a TCP connection, so the framed
# format has a goodbye, a sealed empty message. Without one an end may be an attacker's cut.
#
# When the handshake ends, the two sides need not agree that it has. The side that speaks last is done
# before the other has judged that token: a raw NTLM client, whose third token is refused, believes
# itself logged in, and then sees the connection close. Until that acceptor has sealed something that
# opens, it has proved nothing: the state UNPROVEN, see `states`. And the other way round: an NTLM login
# that an acceptor has accepted may have been relayed by somebody who does not have its key.
#
# Errors come after what was good: the messages before a bad record, or before a goodbye, are handed
# over first, whatever the pieces in which the bytes arrived.

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from .._errors import AuthenticationError, LocalProtocolError, RemoteProtocolError, TruncatedError
from ..security.context import SecurityContext
from ..security.credentials import Acceptor, Initiator
from ..security.identity import ContextFlag, ContextSizes, PeerIdentity, Traffic
from ..wire import DEFAULT_MAX_MESSAGE_SIZE, FramedCodec, WireFormat, check_max_message_size, make_codec
from .states import HEARING, OURS_BECOMES, OVER, PROVED, THEIRS_BECOMES, Ours, Theirs

#: Tokens of the peer; Kerberos needs 1 or 2, NTLM 2, SPNEGO around them at most 2 more.
MAX_ROUNDS: Final = 10

# What a Kerberos context must provide. The sample's client asks for confidentiality and nothing else;
# where messages go back and forth, a missing, repeated or exchanged one must be noticed: by the Kerberos library,
# where it is what seals (see `security.policy`).
_DEMANDED: Final = {
    WireFormat.SAMPLE: ContextFlag.CONF,
    WireFormat.FRAMED: ContextFlag.CONF | ContextFlag.INTEG | ContextFlag.REPLAY | ContextFlag.SEQUENCE,
}


class Tracer(Protocol):
    """Sees what a session does, as it does it. For diagnosis: tokens can be attacked offline."""

    def token_received(self, token: bytes) -> None:
        """A handshake token has come from the peer."""

    def token_made(self, token: bytes, established: bool) -> None:
        """A step has ended; ``token``, if not empty, goes to the peer."""

    def message_sealed(self, message: bytes, trailer: bytes, ciphertext: bytes) -> None:
        """A message was sealed, and goes to the peer."""

    def closed(self) -> None:
        """The connection is over."""


class Session:
    """The state of one connection. See the head of the file.

    Args:
      credential: an `Acceptor` or an `Initiator`: which of the two decides the side.
      wire: the format.
      max_message_size: bytes of plaintext, for both directions.
      tracer: is told of each step.

    Attributes:
      receive_ended (bool): every message was handed over and no more can come: the peer has said
          goodbye, or the format lets it say nothing more.
    """

    __slots__ = (
        "_batches",
        "_codec",
        "_context",
        "_error",
        "_hearing",
        "_ours",
        "_proved",
        "_rounds",
        "_said_all",
        "_sample",
        "_theirs",
        "_tracer",
        "_unread",
        "receive_ended",
    )

    def __init__(
        self,
        credential: Acceptor | Initiator,
        wire: WireFormat,
        *,
        max_message_size: int = DEFAULT_MAX_MESSAGE_SIZE,
        tracer: Tracer | None = None,
    ) -> None:
        check_max_message_size(max_message_size)
        self._context: SecurityContext = credential.new_context(_DEMANDED[wire])
        self._codec = make_codec(wire, max_message_size)
        self._sample = wire is WireFormat.SAMPLE
        self._tracer = tracer
        # The codec again, where the sealer handles whole batches of its frames.
        self._batches: FramedCodec | None = None
        self._rounds = 0
        self._ours = Ours.HANDSHAKE
        self._theirs = Theirs.HANDSHAKE
        # Derived from these, by `_say` and `_hear` alone: every message asks them, and a member of an enum is slow to get.
        self._said_all = False
        self._proved = False
        self._hearing = False
        self.receive_ended = False
        # Why it is FAILED or UNHEARD; it comes behind the messages already opened.
        self._error: RemoteProtocolError | None = None
        # Bytes have come that were not looked at for messages.
        self._unread = False

    def _say(self, state: Ours) -> None:
        assert state in OURS_BECOMES[self._ours], f"{self._ours} cannot become {state}"
        self._ours = state
        self._said_all = state is Ours.SAID_ALL

    def _hear(self, state: Theirs) -> None:
        assert state in THEIRS_BECOMES[self._theirs], f"{self._theirs} cannot become {state}"
        self._theirs = state
        self._proved = state in PROVED
        self._hearing = state in HEARING
        self.receive_ended = state in OVER

    @property
    def accepts(self) -> bool:
        """Whether this is the acceptor's side; the initiator speaks first."""
        return self._context.usage == "accept"

    @property
    def may_block(self) -> bool:
        """Whether `step` may wait for a KDC, DNS or the disk."""
        return self._context.may_block

    @property
    def established(self) -> bool:
        """Whether the handshake is over and the peer authenticated."""
        return self._context.established

    @property
    def peer(self) -> PeerIdentity:
        """Who is there. Only once `established`."""
        return self._context.peer

    @property
    def package_name(self) -> str:
        """See `SecurityContext.package_name`. Only once `established`."""
        return self._context.package_name

    @property
    def sizes(self) -> ContextSizes:
        """See `ContextSizes`. Only once `established`."""
        return ContextSizes(self._context.trailer_size, self._codec.message_limit)

    @property
    def traffic(self) -> Traffic:
        """What was sealed and opened. Only once `established`."""
        return self._context.traffic

    @property
    def peer_proved(self) -> bool:
        """Whether the peer has shown that it has the session's key: to an acceptor, by a message of its that opened.

        A login alone may have been relayed by somebody who has no key. In the sample's format, where the
        initiator says nothing, an acceptor never knows.
        """
        return self._proved

    @property
    def native(self) -> object | None:
        """See `SecurityContext.native`. Only once `established`."""
        return self._context.native

    def check_may_act_as_peer(self) -> None:
        """See that this side may do something in its peer's name. Only once `established`.

        Raises:
          LocalProtocolError: this is the initiator, or the peer could prove its key and has not yet.
          UnsealError: the peer's Kerberos ticket has ended.
        """
        if not self.accepts:
            raise LocalProtocolError("only an acceptor can impersonate its peer")
        if not self.peer_proved and not self._sample:
            raise LocalProtocolError("the peer has not proved its key: receive its first message, then impersonate it")
        self._context.check_alive()

    def receive_data(self, data: bytes | bytearray) -> None:
        """Store what the transport gave; empty is the end of the stream."""
        self._unread = True
        self._codec.feed(data)

    def next_token(self) -> bytes | None:
        """The peer's next handshake token, to be given to `step`; None: more bytes are needed.

        Raises:
          RemoteProtocolError: there can be none.
        """
        if self._rounds == 0:
            # Before it is whole: what can never be would be waited for.
            self._codec.check_beginning(initiator=self.accepts)
        try:
            token = self._codec.next_token()
        except TruncatedError as exc:
            exc.nothing_said = self._rounds == 0 and exc.at_boundary
            raise self.explain_end() or exc from None
        if token is not None:
            self._rounds += 1
            if self._rounds > MAX_ROUNDS:
                raise AuthenticationError(f"no end after {MAX_ROUNDS} tokens")
            if self._tracer is not None:
                self._tracer.token_received(token)
        return token

    def step(self, token: bytes | None) -> bytes:
        """Take the peer's token (None at an initiator's start); returns the bytes to send, maybe none.

        May block, see `may_block`. What it returns must be sent even if `established` is now True.

        Raises:
          AuthenticationError: the handshake has failed.
        """
        answer = self._context.step(token)
        data = self._codec.pack_token(answer) if answer else b""
        if self._tracer is not None:
            self._tracer.token_made(answer, self.established)
        if self.established:
            self._codec.begin_records(self._context.trailer_size)
            if isinstance(self._codec, FramedCodec) and self._context.frame_sealer is not None:
                self._batches = self._codec
            # In the sample's format only the acceptor speaks.
            self._say(Ours.SAID_ALL if self._sample and not self.accepts else Ours.MESSAGES)
            if self._sample and self.accepts:
                self._hear(Theirs.MUTE)
            else:
                self._hear(Theirs.UNPROVEN if answer or self.accepts else Theirs.PROVEN)
        elif not answer and token is not None and not self.accepts:
            raise AuthenticationError("the mechanism has nothing more to say, and is not done")
        return data

    def check_messages(self, messages: Sequence[bytes]) -> None:
        """Refuse what cannot be sent, before sealing it costs anything.

        Raises:
          LocalProtocolError: one of them cannot be sent.
        """
        if self._said_all:
            raise LocalProtocolError("nothing more can be sent: the sample's format has one message, the acceptor's")
        self._codec.check_messages(messages)
        if self._sample and len(messages) > 1:
            raise LocalProtocolError("the sample's format has one message only")

    def seal(self, messages: Sequence[bytes]) -> bytes:
        """Seal messages, in order, into the bytes to send. These must be sent, before any others.

        Raises:
          LocalProtocolError: one of them cannot be sent; then none was sealed.
          UnsealError: the context is of no use any more.
        """
        self.check_messages(messages)
        return self.seal_checked(messages)

    def seal_checked(self, messages: Sequence[bytes]) -> bytes:
        """The same, for messages that `check_messages` has let through.

        Whatever this raises, a tracer's own too, may have cost a sequence number.

        Raises:
          UnsealError: the context is of no use any more.
        """
        if self._sample:
            self._say(Ours.SAID_ALL)
        self._context.check_alive()
        if self._batches is not None and self._tracer is None:
            return self._context.seal_frames(messages)
        seal = self._context.seal
        records = [seal(message) for message in messages]
        if self._tracer is not None:
            for message, (trailer, ciphertext) in zip(messages, records, strict=True):
                self._tracer.message_sealed(message, trailer, ciphertext)
        return self._codec.pack_records(records)

    @property
    def peer_left(self) -> bool:
        """Whether the peer has said goodbye, and so reads nothing more."""
        return self.receive_ended and self._codec.has_goodbye

    def goodbye(self) -> bytes:
        """The bytes that say goodbye, once; none where it was said, cannot be said, or the peer has left."""
        if self._ours is not Ours.MESSAGES or self.peer_left or not self._codec.has_goodbye:
            return b""
        self._say(Ours.SAID_ALL)
        return self._codec.pack_records([self._context.seal(b"")])

    def next_messages(self) -> list[bytes]:
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

    def explain_end(self) -> RemoteProtocolError | None:
        """What it means that the connection ends now: to an initiator maybe that it was refused.

        To an acceptor, that nobody has said anything, where it breaks before its first byte; behind that, nothing.
        """
        if self.accepts:
            if self.established or self._unread:
                return None
            text = "the connection broke before its first byte"
            return TruncatedError(text, at_boundary=True, nothing_said=True)
        if not self.established:
            return AuthenticationError(
                "the acceptor closed the connection during the handshake: login probably refused"
            )
        if self._theirs is Theirs.UNPROVEN:
            return AuthenticationError("the acceptor closed without a word: login probably refused")
        return None
