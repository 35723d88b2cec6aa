"""`Endpoint`: what channels and streams have in common, which is a session over a Trio stream."""

# All the thinking about bytes and cryptography is in `session`; what is left is when to wait.
#
# Two tasks may use one at once, one sending and one receiving, as with a Trio stream, and a third
# may close it. The rules that make this safe:
#
# * Seal order must be wire order. Sealing happens within the send detector's region, with no checkpoint
#   between it and `send_all`. Whatever interrupts `send_all` (Cancelled too) may have cut a record in
#   two, and has in any case used up a sequence number: all is broken then. So what cannot be sent
#   is refused before sealing begins, and from there on no exception is harmless, whatever its type says:
#   the transport may be a stranger's adapter, or another channel.
# * Receiving is cancel-safe: there is no await between reading the transport and storing what it gave,
#   nor between taking out what was opened and returning it. So the checkpoint of the fast path comes first.
# * The handshake is done once, by the task that needs it first; the others wait for its end, good or bad.
#   (Trio's own `_Once` leaves a second waiter hanging when the first one fails.)
#
# What it may do when is in `states`, and how it is closed in `farewell`.

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar, TypeVarTuple, Unpack

import trio

from .._errors import (
    AuthenticationError,
    LocalProtocolError,
    RemoteProtocolError,
    SSPIError,
    TruncatedError,
    without_frames,
)
from ..security.credentials import Acceptor, Initiator
from ..security.identity import PeerIdentity, Traffic
from ..session import BaseSession, Tracer
from ..wire import WireFormat
from .farewell import LOST, part
from .handshake import shake_hands
from .options import ConnectionOptions
from .states import BECOMES, BROKEN, CLOSED, HANDSHAKE, NEW, OPEN, STOPPED, State

log = logging.getLogger("triosspi.impersonation")

# One for all: it is replaced, never filled.
_NOTHING: Final[tuple[()]] = ()

StreamT = TypeVar("StreamT", bound=trio.abc.Stream)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Endpoint(trio.abc.AsyncResource, Generic[StreamT]):
    """One side of a connection that is authenticated by SSPI's Negotiate: an `SSPIChannel` or an `SSPIStream`.

    Args:
      transport_stream: the stream to speak over; it is owned and closed. Where it can
          half-close (`trio.abc.HalfCloseableStream`) what is in flight survives a close.
      session: over it.
      credential: what the session was made with.
      options: of all kinds of connections.
      tracer: what the session tells.

    Attributes:
      transport_stream: see above.
      tracer: see above.
    """

    # Each idle connection holds one of these, a session, a sealer and a task; each field is paid thousands of times.
    __slots__ = (
        "__weakref__",
        "_cause",
        "_handshake_over",
        "_impersonation",
        "_leads_to",
        "_left",
        "_receiver_gone",
        "_receiving",
        "_relayable",
        "_run_blocking",
        "_sending",
        "_session",
        "_state",
        "_taken",
        "tracer",
        "transport_stream",
    )

    _session: BaseSession

    def __init__(
        self,
        transport_stream: StreamT,
        session: BaseSession,
        credential: Acceptor | Initiator,
        options: ConnectionOptions,
        tracer: Tracer | None,
    ) -> None:
        self.transport_stream: StreamT = transport_stream
        self._session = session
        self.tracer = tracer
        self._run_blocking = options.run_blocking
        self._impersonation = options.impersonation
        # Whether an NTLM login that was meant for another service is let in.
        self._relayable = isinstance(credential, Acceptor) and credential.require_target != "require"
        self._state: State = NEW
        # What a handshake that succeeds makes of it.
        self._leads_to: State = OPEN
        # Why it is BROKEN.
        self._cause: BaseException | None = None
        # During HANDSHAKE, what other tasks wait for.
        self._handshake_over: trio.Event | None = None
        # Whether a task is in there. Flags, looked after by hand: a context manager is two calls for each message.
        self._sending = False
        self._receiving = False
        # What `aclose` waits for when a task is receiving.
        self._receiver_gone: trio.Event | None = None
        # Opened, and but for the first so many not returned yet: messages, or a stretch of a stream.
        self._left: Any = _NOTHING
        self._taken = 0

    # What the handshake found

    def _established(self) -> BaseSession:
        if not self._session.established:
            raise trio.NeedHandshakeError("call do_handshake() first")
        return self._session

    @property
    def peer(self) -> PeerIdentity:
        """Who is there.

        Raises:
          trio.NeedHandshakeError: before the handshake.
        """
        return self._established().peer

    @property
    def package_name(self) -> str:
        """``"NTLM"`` or ``"Kerberos"``: SSPI's SECPKG_ATTR_NEGOTIATION_INFO.

        Raises:
          trio.NeedHandshakeError: before the handshake.
        """
        return self._established().package_name

    @property
    def wire(self) -> WireFormat:
        """The wire format."""
        return self._session.wire

    @property
    def traffic(self) -> Traffic:
        """What was sent and received so far.

        Raises:
          trio.NeedHandshakeError: before the handshake.
        """
        return self._established().traffic

    @property
    def peer_left(self) -> bool:
        """Whether the peer has said goodbye, and the goodbye was received."""
        return self._session.peer_left

    # State

    def _become(self, state: State) -> None:
        assert state in BECOMES[self._state], f"{self._state} cannot become {state}"
        self._state = state

    @property
    def _stopped(self) -> bool:
        return self._state is STOPPED

    def _check_usable(self) -> None:
        if self._state is CLOSED:
            raise trio.ClosedResourceError(f"this {type(self).__name__} is closed")
        if self._state is BROKEN:
            raise trio.BrokenResourceError(str(self._cause) or type(self._cause).__name__) from self._cause

    def _check_receiving(self) -> None:
        self._check_usable()
        if self._stopped:
            raise trio.EndOfChannel

    def give_up(self, exc: BaseException) -> None:
        """Break it, unless it is broken or closed already: what it was made for has failed.

        Args:
          exc: the cause, which every later use tells.
        """
        if self._state is BROKEN or self._state is CLOSED:
            return
        self._become(BROKEN)
        self._cause = exc
        if isinstance(exc, trio.BrokenResourceError):
            # The stream's own error says only that; what it was is behind it. And an acceptor that
            # refuses a login may well reset the connection where another one would end it. Where the stream is
            # another channel's, how that one's peer left says nothing of ours.
            foreign = isinstance(exc.__cause__, (SSPIError, trio.EndOfChannel))
            self._cause = self._session.explain_end() or (None if foreign else exc.__cause__) or exc
        elif isinstance(exc, trio.EndOfChannel):
            self._cause = TruncatedError("the transport raised EndOfChannel, which is no goodbye", at_boundary=False)

    def _translate(self, exc: BaseException, *, cancel_breaks: bool) -> None:
        """Turn what the transport and the session raise into a state, and raise Trio's error for it.

        Returns where the error is to go on as it is.
        """
        if isinstance(exc, trio.EndOfChannel) and self._stopped and not cancel_breaks:
            # Our own, from `stop_receiving`.
            return
        if cancel_breaks or not isinstance(exc, trio.Cancelled):
            self.give_up(exc)
        if isinstance(exc, LOST):
            self._check_usable()

    # Handshake

    async def do_handshake(self, *, refused: Callable[[AuthenticationError], bool] | None = None) -> None:
        """Authenticate, unless that was done or is being done by another task, which is waited for.

        Not cancel-safe: a cancelled handshake breaks the connection. There is no time limit; use
        `trio.fail_after`.

        Args:
          refused: called with why a login was refused, where the wire format lets the client try again on this connection,
              which is `negotiate-stream`, and twice; returns whether it may. None lets it.

        Raises:
          trio.BrokenResourceError: it failed; the cause is an `AuthenticationError` if the peer's
              login (or ours) was refused.
          trio.ClosedResourceError: it was closed.
        """
        self._check_usable()
        await self._ensure_handshake(checkpoint=True, refused=refused)

    async def _ensure_handshake(
        self, *, checkpoint: bool, refused: Callable[[AuthenticationError], bool] | None = None
    ) -> None:
        if self._state is HANDSHAKE:
            assert self._handshake_over is not None
            await self._handshake_over.wait()
        elif self._state is NEW:
            self._become(HANDSHAKE)
            self._handshake_over = trio.Event()
            try:
                await shake_hands(self._session, self.transport_stream, self._run_blocking, refused)
                # Somebody may have closed it meanwhile, or given it up.
                self._check_usable()
                self._become(self._leads_to)
            except BaseException as exc:
                if isinstance(exc, LOST):
                    # They hold tokens, against which passwords can be tried.
                    without_frames(exc)
                self._translate(exc, cancel_breaks=True)
                raise
            finally:
                # In any case, or other tasks that wait for the handshake would wait for ever.
                self._handshake_over.set()
                self._handshake_over = None
        elif checkpoint:
            await trio.lowlevel.checkpoint()
        self._check_usable()

    # Sending

    async def _send(self, values: Any) -> None:
        """Seal and send, at once: one buffer, one `send_all`. Where one of the values cannot be sent, none is."""
        self._enter_send()
        try:
            if self._state is not OPEN:
                self._check_usable()
                await self._ensure_handshake(checkpoint=False)
            # Here a cancellation costs nothing yet.
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._state is not OPEN:
                self._check_usable()
            session = self._session
            if session.peer_left:
                await trio.lowlevel.cancel_shielded_checkpoint()
                # The cause tells it from a lost connection.
                raise trio.BrokenResourceError(
                    "the peer has said goodbye, and reads nothing more"
                ) from trio.EndOfChannel()
            # Not its truth: what has no length, as a generator, would be used up by the check, and nothing be sent.
            if len(values) == 0:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return
            # What is refused here costs nothing; what fails from here on has used up a sequence number.
            session.check_sending(values)
            try:
                await self.transport_stream.send_all(session.seal_checked(values))
            except BaseException as exc:
                self._translate(exc, cancel_breaks=True)
                raise
        finally:
            self._leave_send()

    def _enter_send(self) -> None:
        if self._sending:
            raise trio.BusyResourceError(f"another task is sending on this {type(self).__name__}")
        self._sending = True

    def _leave_send(self) -> None:
        self._sending = False
        if self._stopped or self._state is BROKEN:
            # It waits for what it would not return any more.
            self._wake_receiver()

    # Receiving

    async def _receive_opened(self) -> Any:
        """All that is at hand, and at least something, as the session gives it.

        Raises:
          trio.EndOfChannel: no more can come, and nothing is wrong with that; or `stop_receiving` was called.
          trio.BrokenResourceError: see `SSPIChannel.receive`.
          trio.BusyResourceError: the same.
          trio.ClosedResourceError: the same.
        """
        # All in one coroutine: each further one costs every message a tenth of a microsecond, and every idle
        # connection a third of a KiB.
        self._enter_receive()
        try:
            if self._state is not OPEN:
                self._check_usable()
                await self._ensure_handshake(checkpoint=False)
                if self._stopped:
                    await trio.lowlevel.checkpoint()
                    raise trio.EndOfChannel
            session = self._session
            try:
                if not self._left:
                    # It may have come together with the handshake's end.
                    self._left = session.next_opened()
                if self._left:
                    # Not taken before the checkpoint: a cancellation would lose it.
                    await trio.lowlevel.checkpoint()
                    self._check_receiving()
                    return self._take_left(len(self._left))
                while not session.receive_ended:
                    session.receive_data(await self.transport_stream.receive_some())
                    if self._state is not OPEN:
                        # Closed meanwhile? Then the peer's end is not ours to tell.
                        self._check_receiving()
                    if opened := session.next_opened():
                        return opened
            except BaseException as exc:
                if self._stopped and isinstance(exc, trio.ClosedResourceError):
                    # `_wake_receiver`: nothing is closed.
                    raise trio.EndOfChannel from None
                self._translate(exc, cancel_breaks=False)
                raise
            raise trio.EndOfChannel
        finally:
            self._leave_receive()

    async def _receive_left(self, most: int) -> Any:
        """The next of what was opened before, and not returned yet."""
        self._enter_receive()
        try:
            await trio.lowlevel.checkpoint()
            self._check_receiving()
            return self._take_left(most)
        finally:
            self._leave_receive()

    def _leave(self, opened: Any, taken: int) -> None:
        """Keep what was opened but for its beginning, which is returned now."""
        self._left, self._taken = opened, taken

    def _take_left(self, most: int) -> Any:
        left, start = self._left, self._taken
        end = start + most
        if end < len(left):
            self._taken = end
        else:
            self._left, self._taken = _NOTHING, 0
        return left if start == 0 and end >= len(left) else left[start:end]

    def stop_receiving(self) -> None:
        """Take no more from the peer, as a server does that is about to stop.

        From now on receiving ends as if the peer had said goodbye (`SSPIChannel.receive` raises `trio.EndOfChannel`,
        `SSPIStream.receive_some` returns nothing), also in a task that waits in it; sending goes on. So a handler that answers what it receives answers the last
        it has got, ends, and closes, which tells the peer. What has come and was not
        received is dropped: to the peer that is a request without an answer before our goodbye, which it
        may send again elsewhere.

        May be called at any time, and again. A task that waits in it wakes at once over a
        socket; over any other stream only when the peer sends something.
        """
        self._leads_to = STOPPED
        if self._state is OPEN:
            self._become(STOPPED)
            self._leave(_NOTHING, 0)
            self._wake_receiver()

    def _wake_receiver(self) -> None:
        # `notify_closing` wakes tasks that wait to write the socket, too, and would cut a record in two. So it is not called
        # while a task is sending, which calls this when it is done.
        if self._receiving and not self._sending and isinstance(self.transport_stream, trio.SocketStream):
            trio.lowlevel.notify_closing(self.transport_stream.socket)

    def _enter_receive(self) -> None:
        if self._receiving:
            raise trio.BusyResourceError(f"another task is receiving on this {type(self).__name__}")
        self._receiving = True

    def _leave_receive(self) -> None:
        self._receiving = False
        if self._receiver_gone is not None:
            self._receiver_gone.set()

    # Impersonation

    async def run_as_peer(self, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run ``function(*args)``, which is not async, in a thread of its own that is the peer meanwhile.

        An acceptor's only, with an `Impersonation`: see there what the function may count on and what
        not. But in the `sample` format something of the peer's must have been received before: a login
        alone may have been relayed by somebody who does not have its key. In the `sample` format a peer
        says nothing, so there an NTLM login is taken at its word, and a warning is logged unless the
        acceptor demands that it was meant for this service (``require_target="require"``).

        Waits for the function's end also when it is cancelled.

        Returns:
          What the function returns. What it raises is raised.

        Raises:
          ImpersonationError: the peer has no account here, or allows only to be identified
              (`PeerIdentity.impersonation_level`); the function was not called.
          LocalProtocolError: there is no `Impersonation`, this is an initiator's, or the peer has
              not proved its key yet.
          trio.NeedHandshakeError: before the handshake.
          trio.BrokenResourceError: the connection is gone, or the peer's Kerberos ticket has ended.
          trio.ClosedResourceError: it is closed.
        """
        self._check_usable()
        session = self._established()
        if self._impersonation is None:
            raise LocalProtocolError("impersonation is off: it needs impersonation=Impersonation(...)")
        try:
            session.check_may_act_as_peer()
        except RemoteProtocolError as exc:
            self._translate(exc, cancel_breaks=False)
        if not session.peer_proved and session.peer.mechanism == "ntlm" and self._relayable:
            log.warning(
                "%s: to be impersonated, though the NTLM login may be relayed from another service: "
                "require_target='require' refuses those",
                session.peer,
            )
        return await self._impersonation.run_as_peer(session.peer, function, *args, native=session.native)

    # Closing

    async def aclose(self) -> None:
        """Say goodbye and close, losing nothing of what was sent.

        Takes at most two seconds, whatever the peer does, and next to none with a peer that closes
        when it is told to: the goodbye is sent, then the transport's end, and meanwhile and afterwards
        what the peer still sends is read and dropped until its end. When this is cancelled, or another task is sending
        meanwhile, the transport is closed at once. Always leaves everything closed.
        """
        if self._state is CLOSED:
            await trio.lowlevel.checkpoint()
            return
        polite = self._state in (OPEN, STOPPED) and not self._sending
        self._become(CLOSED)
        # Its traceback leads back here: a cycle, which only the garbage collector would find.
        self._cause = None
        self._leave(_NOTHING, 0)
        try:
            try:
                if self.tracer is not None:
                    self.tracer.closed()
            finally:
                if polite:
                    await self._part()
        finally:
            await self.transport_stream.aclose()

    async def _part(self) -> None:
        try:
            goodbye = self._session.goodbye()
        except RemoteProtocolError:
            # The context can seal nothing any more, as after the end of the peer's ticket.
            return
        if self._receiving:
            self._receiver_gone = trio.Event()
        await part(self.transport_stream, goodbye, self._receiver_gone)
