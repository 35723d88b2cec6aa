"""What sessions of messages and of byte streams have in common: the handshake, and who is there."""

# What has to be right here, and why it is not obvious:
#
# A session is a wire format times a security context. Bytes go in (`receive_data` only stores them)
# and come out (`step`, and what a subclass seals); nothing here waits, so all of it can be tested byte by byte, and
# whoever owns the session has nothing left to do but await.
#
# What SSPI (and GSS-API) guarantee about sealed messages: who made them, that they are whole, and
# their order. Each is numbered inside its signature, so a replayed, dropped, reordered or reflected
# one does not open. The price is that a context is poisoned by the first bad message: both sides'
# counters, and NTLM's running RC4 state, have moved. So the first failure is final, and everything
# that is sealed must also be sent, in that order.
#
# What they do not guarantee is the end. No signature covers the closing of a TCP connection. The framed format has a
# goodbye, a sealed empty message; without one an end may be an attacker's cut. NegotiateStream has none.
#
# When the handshake ends, the two sides need not agree that it has. The side that speaks last is done
# before the other has judged that token: a raw NTLM client, whose third token is refused, believes
# itself logged in, and then sees the connection close. Until that acceptor has sealed something that
# opens, it has proved nothing: the state UNPROVEN, see `states`. And the other way round: an NTLM login
# that an acceptor has accepted may have been relayed by somebody who does not have its key. In NegotiateStream the acceptor
# always speaks last, and so tells that it has accepted; whoever sits between can say that, too, so it proves no more.
#
# Errors come after what was good: what opened before a bad record, or before a goodbye, is handed
# over first, whatever the pieces in which the bytes arrived.

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

from .._errors import (
    AuthenticationError,
    ForeignProtocolError,
    ImpersonationError,
    LocalProtocolError,
    PeerRefusalError,
    RemoteProtocolError,
    TruncatedError,
)
from ..security.context import SecurityContext
from ..security.credentials import Acceptor, Initiator
from ..security.identity import ContextFlag, PeerIdentity, Traffic
from ..wire import Codec, WireFormat
from .states import HEARING, OURS_BECOMES, OVER, PROVED, THEIRS_BECOMES, Ours, Theirs

#: Tokens of the peer; Kerberos needs 1 or 2, NTLM 2, SPNEGO around them at most 2 more.
MAX_ROUNDS: Final = 10
#: Handshakes on one connection, where the format lets a client whose login was refused try again; `MAX_ROUNDS` is for all
#: of them together.
MAX_ATTEMPTS: Final = 3


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


class BaseSession:
    """The state of one connection. See the head of the file.

    Args:
      credential: an `Acceptor` or an `Initiator`: which of the two decides the side.
      codec: of the wire format.
      demanded: what a Kerberos context must provide; without CONF, messages may be signed only.
      tracer: is told of each step.

    Attributes:
      established (bool): the handshake is over, and the peer authenticated.
      receive_ended (bool): everything was handed over and no more can come, and nothing is wrong with that.
    """

    __slots__ = (
        "_attempts",
        "_codec",
        "_context",
        "_error",
        "_hearing",
        "_new_context",
        "_ours",
        "_proved",
        "_rounds",
        "_rounds_before",
        "_said_all",
        "_theirs",
        "_tracer",
        "_unread",
        "established",
        "receive_ended",
    )

    def __init__(
        self, credential: Acceptor | Initiator, codec: Codec, demanded: ContextFlag, tracer: Tracer | None
    ) -> None:
        self._new_context: Callable[[], SecurityContext] | None = partial(credential.new_context, demanded)
        self._context = self._new_context()
        self._codec = codec
        self._tracer = tracer
        self._rounds = 0
        self._attempts = 0
        # Why it is FAILED or UNHEARD; it comes behind what was already opened.
        self._error: RemoteProtocolError | None = None
        self._begin()

    def _begin(self) -> None:
        """The handshake begins, for the first time or once more."""
        self._attempts += 1
        self._ours = Ours.HANDSHAKE
        self._theirs = Theirs.HANDSHAKE
        # Derived from these, by `_say` and `_hear` alone: every message asks them, and a member of an enum is slow to get.
        self._said_all = False
        self._proved = False
        self._hearing = False
        self.receive_ended = False
        # Bytes have come that were not looked at.
        self._unread = False
        self.established = False
        # How many tokens had come before.
        self._rounds_before = self._rounds

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
    def wire(self) -> WireFormat:
        """The wire format."""
        raise NotImplementedError

    @property
    def accepts(self) -> bool:
        """Whether this is the acceptor's side; the initiator speaks first."""
        return self._context.usage == "accept"

    @property
    def may_block(self) -> bool:
        """Whether `step` may wait for a KDC, DNS or the disk."""
        return not self._context.established and self._context.may_block

    @property
    def peer(self) -> PeerIdentity:
        """Who is there. Only once `established`."""
        return self._context.peer

    @property
    def package_name(self) -> str:
        """See `SecurityContext.package_name`. Only once `established`."""
        return self._context.package_name

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
    def _peer_speaks(self) -> bool:
        """Whether the format lets the peer say anything, by which it would show that it has the session's key."""
        return True

    @property
    def peer_left(self) -> bool:
        """Whether the peer has said goodbye, and so reads nothing more."""
        return self.receive_ended and self._codec.has_goodbye

    @property
    def native(self) -> object | None:
        """See `SecurityContext.native`. Only once `established`."""
        return self._context.native

    def check_may_act_as_peer(self) -> None:
        """See that this side may do something in its peer's name. Only once `established`.

        Raises:
          LocalProtocolError: this is the initiator, or the peer could prove its key and has not yet.
          ImpersonationError: the peer does not allow it.
          UnsealError: the peer's Kerberos ticket has ended.
        """
        if not self.accepts:
            raise LocalProtocolError("only an acceptor can impersonate its peer")
        if self.peer.impersonation_level == "identification":
            raise ImpersonationError(f"{self.peer} has logged in to be identified, and does not allow more")
        if not self._proved and self._peer_speaks:
            raise LocalProtocolError("the peer has not proved its key: receive its first message, then impersonate it")
        self._context.check_alive()

    def receive_data(self, data: bytes | bytearray) -> None:
        """Store what the transport gave; empty is the end of the stream."""
        self._unread = True
        self._codec.feed(data)

    # Handshake

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
            exc.nothing_said = exc.at_boundary and self._rounds == self._rounds_before
            raise self.explain_end() or exc from None
        if token is not None:
            self._rounds += 1
            if self._rounds > MAX_ROUNDS:
                raise AuthenticationError(f"no end after {MAX_ROUNDS} tokens")
            if self._tracer is not None and token:
                self._tracer.token_received(token)
        return token

    def step(self, token: bytes | None) -> bytes:
        """Take the peer's token (None at an initiator's start); returns the bytes to send, maybe none.

        May block, see `may_block`. What it returns must be sent even if `established` is now True.

        Raises:
          AuthenticationError: the handshake has failed.
        """
        if self._context.established:
            # All is said by us, and the peer acknowledges it.
            if token:
                raise AuthenticationError("the peer sent one more token behind the end of the handshake")
            self._establish()
            return b""
        context, codec = self._context, self._codec
        answer = context.step(token)
        done = context.established
        silent = not answer and not (done and self.accepts and codec.acknowledges)
        data = b"" if silent else codec.pack_token(answer, done=done)
        if self._tracer is not None:
            self._tracer.token_made(answer, done)
        if done:
            codec.begin_records(context.trailer_size)
            self._begin_messages(unproven=bool(answer) or self.accepts)
            if self.accepts or codec.peer_done or not codec.acknowledges:
                self._establish()
        elif codec.peer_done:
            raise AuthenticationError("the peer says that the handshake is over, and it is not")
        elif not answer and token is not None and not self.accepts:
            raise AuthenticationError("the mechanism has nothing more to say, and is not done")
        return data

    def _begin_messages(self, *, unproven: bool) -> None:
        """Both sides may speak as the format lets them.

        Args:
          unproven: the peer has not shown that it has the session's key.
        """
        self._say(Ours.MESSAGES)
        self._hear(Theirs.UNPROVEN if unproven else Theirs.PROVEN)

    def _establish(self) -> None:
        self.established = True
        # It leads to the credential's secrets.
        self._new_context = None

    def refuse(self, error: AuthenticationError) -> bytes:
        """This side has refused its peer: the bytes that tell it so, none where the format has none or it is no use."""
        self.established = False
        if isinstance(error, (ForeignProtocolError, PeerRefusalError)) or self._codec.ended:
            return b""
        return self._codec.pack_refusal(untrusted=error.untrusted)

    def try_again(self, error: AuthenticationError) -> bool:
        """Begin a handshake anew behind one that has failed, if this side, the format and the peer's tries so far allow it.

        Returns:
          Whether they do; if not, the session is of no use any more.
        """
        may = self.accepts and self._codec.acknowledges and not isinstance(error, ForeignProtocolError)
        if not may or self._attempts >= MAX_ATTEMPTS or self._new_context is None:
            return False
        self._context = self._new_context()
        self._codec.restart()
        self._begin()
        return True

    # Messages

    def check_sending(self, values: Any) -> None:
        """Refuse what cannot be sent, before sealing it costs anything.

        Args:
          values: messages, or a stretch of a byte stream.

        Raises:
          LocalProtocolError: some of it cannot be sent.
        """
        raise NotImplementedError

    def seal_checked(self, values: Any) -> bytes:
        """Seal what `check_sending` has let through into the bytes to send. These must be sent, before any others.

        Whatever this raises, a tracer's own too, may have cost a sequence number.

        Raises:
          UnsealError: the context is of no use any more.
        """
        raise NotImplementedError

    def goodbye(self) -> bytes:
        """The bytes that say goodbye, once; none where it was said, or cannot be."""
        return b""

    def next_opened(self) -> Any:
        """Open everything at hand. Empty: more bytes are needed, or `receive_ended`.

        Raises:
          RemoteProtocolError: nothing more can come.
        """
        raise NotImplementedError

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
        if self._theirs is Theirs.UNPROVEN and not self._codec.acknowledges:
            return AuthenticationError("the acceptor closed without a word: login probably refused")
        return None
