"""`SSPIChannel`: a session over a Trio stream."""

# All the thinking about bytes and cryptography is in `_session`; what is left is when to wait.
#
# Two tasks may use a channel at once, one sending and one receiving, as with a Trio stream, and a third
# may close it. The rules that make this safe:
#
# * Seal order must be wire order. Sealing happens within the send detector's region, with no checkpoint
#   between it and `send_all`. Whatever interrupts `send_all` (Cancelled too) may have cut a record in
#   two, and has in any case used up a sequence number: the channel is broken then. So what cannot be sent
#   is refused before sealing begins, and from there on no exception is harmless, whatever its type says:
#   the transport may be a stranger's adapter, or another channel.
# * Receiving is cancel-safe: there is no await between reading the transport and storing what it gave,
#   nor between taking messages out and returning them. So the checkpoint of the fast path comes first.
# * The handshake is done once, by whoever needs it first; the others wait for its end, good or bad.
#   (Trio's own `_Once` leaves a second waiter hanging when the first one fails.)
# * CLOSED is for ever; BROKEN never overwrites it. So a task that wakes to an error asks first whether
#   that was our own closing.
#
# Closing is the subtle part. Closing a TCP socket with input that nobody has read makes the kernel send
# RST, which destroys what the peer has not read yet, replies that were sent long before included. So:
# goodbye, FIN, read until the peer's FIN, close; all of it bounded, since the peer may be hostile. The
# reading begins with the goodbye, in a task of its own: two sides that close with full buffers would each
# wait for the other to read first, until their time was up, and reset each other. A task that is blocked in `receive` at that moment keeps the transport's receiving side; it is left
# there, and wakes with the peer's FIN or when the time is up. A cancel scope around each read would wake
# it at once, and cost every read of every connection.

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, Protocol, TypeVar, TypeVarTuple, Unpack

import trio

from .. import _server_threads
from .._errors import LocalProtocolError, RemoteProtocolError, SSPIError, TruncatedError, without_frames
from ..security.credentials import Acceptor, Initiator
from ..security.identity import ContextSizes, PeerIdentity, Traffic
from ..session import Session, Tracer
from ..wire import DEFAULT_MAX_MESSAGE_SIZE, WireFormat

log = logging.getLogger("triosspi.impersonation")

#: Seconds; how long `aclose` waits for a peer that does not read the goodbye.
_GOODBYE_TIMEOUT: Final = 1.0
#: Seconds and bytes; how long `aclose` waits for the peer's end, and how much it reads meanwhile.
_DRAIN_TIMEOUT: Final = 1.0
_DRAIN_LIMIT: Final = 1024 * 1024

# One for all channels: it is replaced, never filled.
_NOTHING: Final[list[bytes]] = []

_RECEIVING: Final = "another task is receiving on this SSPIChannel"

# What a transport says when it is of no use any more, in its own words or in ours: it may be an adapter around
# another channel. Taken at its word, an EndOfChannel would be our peer's sealed goodbye, a LocalProtocolError
# would promise that nothing was sent, and a BusyResourceError that nothing has happened.
_LOST: Final = (
    SSPIError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.BusyResourceError,
    trio.EndOfChannel,
    OSError,
)

StreamT = TypeVar("StreamT", bound=trio.abc.Stream)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


_turn: Final[trio.lowlevel.RunVar[trio.Lock]] = trio.lowlevel.RunVar("triosspi login turn")


def _login_turn() -> trio.Lock:
    """One step of one login for each turn of the event loop.

    A step takes a quarter of a millisecond. A hundred that arrive together would all be taken in one turn,
    and whoever is logged in already would wait for all of them.
    """
    try:
        return _turn.get()
    except LookupError:
        lock = trio.Lock()
        _turn.set(lock)
        return lock


class RunBlocking(Protocol):
    """Runs a sync function where it may block; `run_in_thread` is one."""

    def __call__(self, sync_fn: Callable[[bytes | None], bytes], token: bytes | None, /) -> Awaitable[bytes]:
        """Run ``sync_fn(token)`` and return its result."""


async def run_in_thread(sync_fn: Callable[[bytes | None], bytes], token: bytes | None, /) -> bytes:
    """Run a handshake's step in one of Trio's worker threads, which is the server.

    A cancelled one is left to itself: a KDC that does not answer may hold it up for a minute, and nobody
    will look at a broken channel's session again.
    """
    return await _server_threads.run_sync(sync_fn, token, abandon_on_cancel=True)


class Impersonator(Protocol):
    """Runs functions as a peer; `Impersonation` is one."""

    async def run_as_peer(
        self,
        peer: PeerIdentity,
        function: Callable[[Unpack[Ts]], T],
        *args: *Ts,
        native: object | None = None,
    ) -> T:
        """See `Impersonation.run_as_peer`."""
        ...  # pragma: no cover


class _State(enum.Enum):
    OK = enum.auto()
    BROKEN = enum.auto()
    CLOSED = enum.auto()


class SSPIChannel(trio.abc.Channel[bytes], Generic[StreamT]):
    r"""Sealed messages over a byte stream, with a peer authenticated by SSPI's Negotiate.

    A message that is sent arrives whole or not at all, once, and in order; nobody but the two sides
    can read or change it. The handshake runs when it is first needed, or in `do_handshake`. Like a
    Trio stream, a channel may be used by one sending and one receiving task at a time.

    Anything that the peer, the network or the cryptography does wrong raises
    `trio.BrokenResourceError`, now and on every later use; its ``__cause__`` tells what it was, a
    `RemoteProtocolError` or the transport's own error.

    Args:
      transport_stream: the stream to speak over; the channel owns and closes it. Where it can
          half-close (`trio.abc.HalfCloseableStream`) replies in flight survive a close.
      credential: an `Acceptor` makes this the server's side, an `Initiator` the client's.
      wire: the format; both sides must use the same.
      max_message_size: bytes of plaintext; a peer that announces more is cut off before anything is
          allocated.
      run_blocking: where handshake steps run that may wait for a KDC, DNS or the disk.
      tracer: is told of each handshake step and each sealed message.
      impersonation: what `run_as_peer` runs functions with; None is off.

    Attributes:
      transport_stream: see above.
      tracer: see above.
    """

    # An idle connection is this, a session, a sealer and a task: each field counts, thousands of times.
    __slots__ = (
        "__weakref__",
        "_cause",
        "_handshake_ended",
        "_handshake_over",
        "_impersonation",
        "_left",
        "_ready",
        "_receiver_gone",
        "_receiving",
        "_relayable",
        "_run_blocking",
        "_sending",
        "_session",
        "_state",
        "_stopped",
        "tracer",
        "transport_stream",
    )

    def __init__(
        self,
        transport_stream: StreamT,
        credential: Acceptor | Initiator,
        *,
        wire: WireFormat = WireFormat.FRAMED,
        max_message_size: int = DEFAULT_MAX_MESSAGE_SIZE,
        run_blocking: RunBlocking = run_in_thread,
        tracer: Tracer | None = None,
        impersonation: Impersonator | None = None,
    ) -> None:
        self.transport_stream: StreamT = transport_stream
        self._session = Session(credential, wire, max_message_size=max_message_size, tracer=tracer)
        self.tracer = tracer
        self._run_blocking = run_blocking
        self._impersonation = impersonation
        # Whether an NTLM login that was meant for another service is let in.
        self._relayable = isinstance(credential, Acceptor) and credential.require_target != "require"
        self._state = _State.OK
        # OK, the handshake over, nothing stopped: what every message asks first.
        self._ready = False
        self._stopped = False
        self._cause: BaseException | None = None
        # While the handshake runs, what other tasks wait for.
        self._handshake_over: trio.Event | None = None
        self._handshake_ended = False
        # Whether a task is in there. Flags, looked after by hand: a context manager is two calls for each message.
        self._sending = False
        self._receiving = False
        # What `aclose` waits for when a task is in `receive`.
        self._receiver_gone: trio.Event | None = None
        # Opened and not returned yet, the next one last.
        self._left = _NOTHING

    # What the handshake found

    def _established(self) -> Session:
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
    def sizes(self) -> ContextSizes:
        """Bytes of the trailer and of the longest message: SSPI's SECPKG_ATTR_SIZES.

        Raises:
          trio.NeedHandshakeError: before the handshake.
        """
        return self._established().sizes

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

    def _check_usable(self) -> None:
        if self._state is _State.CLOSED:
            raise trio.ClosedResourceError("this SSPIChannel is closed")
        if self._state is _State.BROKEN:
            raise trio.BrokenResourceError(str(self._cause) or type(self._cause).__name__) from self._cause

    def _check_receiving(self) -> None:
        self._check_usable()
        if self._stopped:
            raise trio.EndOfChannel

    def give_up(self, exc: BaseException) -> None:
        """Break the channel, unless it is broken or closed already: what it was made for has failed.

        Args:
          exc: the cause, which every later use tells.
        """
        self._break(exc)

    def _break(self, exc: BaseException) -> None:
        if self._state is not _State.OK:
            return
        self._state = _State.BROKEN
        self._ready = False
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
        """Turn what the transport and the session raise into the channel's state, and raise Trio's error for it.

        Returns where the error is to go on as it is.
        """
        if isinstance(exc, trio.EndOfChannel) and self._stopped and not cancel_breaks:
            # Our own, from `stop_receiving`.
            return
        if not self._handshake_ended and isinstance(exc, _LOST):
            # They hold tokens, against which passwords can be tried.
            without_frames(exc)
        if cancel_breaks or not isinstance(exc, trio.Cancelled):
            self._break(exc)
        if isinstance(exc, _LOST):
            self._check_usable()

    # Handshake

    async def do_handshake(self) -> None:
        """Authenticate, unless that was done or is being done by another task, which is waited for.

        Not cancel-safe: a cancelled handshake breaks the channel. There is no time limit; use
        `trio.fail_after`.

        Raises:
          trio.BrokenResourceError: it failed; the cause is an `AuthenticationError` if the peer's
              login (or ours) was refused.
          trio.ClosedResourceError: the channel was closed.
        """
        self._check_usable()
        await self._ensure_handshake(checkpoint=True)

    async def _ensure_handshake(self, *, checkpoint: bool) -> None:
        if self._handshake_ended:
            if checkpoint:
                await trio.lowlevel.checkpoint()
        elif self._handshake_over is not None:
            await self._handshake_over.wait()
        else:
            self._handshake_over = trio.Event()
            try:
                await self._handshake()
            except BaseException as exc:
                self._translate(exc, cancel_breaks=True)
                raise
            finally:
                # In any case, or whoever else waits for the handshake waits for ever.
                self._handshake_over.set()
                self._handshake_over = None
                self._handshake_ended = True
        self._check_usable()
        self._ready = not self._stopped

    async def _handshake(self) -> None:
        session = self._session
        token = await self._receive_token() if session.accepts else None
        while True:
            if session.may_block:
                data = await self._run_blocking(session.step, token)
                if not isinstance(data, bytes):
                    # Else the handshake would wait for the answer to a token that was never sent.
                    raise TypeError(f"run_blocking must return what the step returns, not {type(data).__name__}")
            elif session.accepts:
                async with _login_turn():
                    data = session.step(token)
            else:
                data = session.step(token)
            if data:
                await self.transport_stream.send_all(data)
            if session.established:
                break
            token = await self._receive_token()
        if not data:
            await trio.lowlevel.checkpoint()

    async def _receive_token(self) -> bytes:
        session = self._session
        while (token := session.next_token()) is None:
            session.receive_data(await self.transport_stream.receive_some())
        return token

    # Sending

    async def send(self, value: bytes) -> None:
        """Seal one message and send it.

        Not cancel-safe: a cancelled `send` breaks the channel, since nobody knows how much of the
        message has gone.

        Args:
          value: the message: 1 to ``sizes.max_message`` bytes.

        Raises:
          LocalProtocolError: (a ValueError) the message is empty or too long; nothing was sent, and
              the channel is as it was.
          trio.BrokenResourceError: the connection is gone, or the peer has said goodbye.
          trio.BusyResourceError: another task is sending.
          trio.ClosedResourceError: the channel is closed.
        """
        await self.send_many((value,))

    async def send_many(self, messages: Sequence[bytes]) -> None:
        """Seal messages in order and send them at once: one buffer, one `send_all`.

        See `send` for details. When one message cannot be sent, none is.
        """
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this SSPIChannel")
        self._sending = True
        try:
            if not self._ready:
                self._check_usable()
                await self._ensure_handshake(checkpoint=False)
            # Here a cancellation costs nothing yet.
            await trio.lowlevel.checkpoint_if_cancelled()
            if not self._ready:
                self._check_usable()
            session = self._session
            if session.peer_left:
                await trio.lowlevel.cancel_shielded_checkpoint()
                # The cause tells it from a lost connection.
                raise trio.BrokenResourceError(
                    "the peer has said goodbye, and reads nothing more"
                ) from trio.EndOfChannel()
            # Not its truth: what has no length, as a generator, would be used up by the check, and nothing be sent.
            if len(messages) == 0:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return
            # What is refused here costs nothing; what fails from here on has used up a sequence number.
            session.check_messages(messages)
            try:
                await self.transport_stream.send_all(session.seal_checked(messages))
            except BaseException as exc:
                self._translate(exc, cancel_breaks=True)
                raise
        finally:
            self._sending = False
            if self._stopped:
                self._wake_receiver()

    # Receiving

    async def receive(self) -> bytes:
        """The next message.

        Cancel-safe: a cancelled `receive` loses nothing (but during the handshake it breaks the
        channel, see `do_handshake`).

        Raises:
          trio.EndOfChannel: the peer has said goodbye.
          trio.BrokenResourceError: a message did not open, or the connection is gone. Its cause is a
              `TruncatedError` with ``at_boundary`` true when the peer closed between two messages
              without a goodbye, which some peers cannot say.
          trio.BusyResourceError: another task is receiving.
          trio.ClosedResourceError: the channel is closed.
        """
        if not self._left:
            messages = await self.receive_many()
            # No await from here on, or a cancellation would lose them.
            message = messages[0]
            if len(messages) > 1:
                messages.reverse()
                messages.pop()
                self._left = messages
            return message
        if self._receiving:
            raise trio.BusyResourceError(_RECEIVING)
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            self._check_receiving()
            return self._left.pop()
        finally:
            self._leave_receive()

    async def receive_many(self) -> list[bytes]:
        """Every message at hand, at least one.

        See `receive` for details. One wake-up of a task costs many times what a message costs, so a
        peer that sends without waiting is served best by this and `send_many`.
        """
        # All in one coroutine: each further one costs every message a tenth of a microsecond, and every idle
        # connection a third of a KiB.
        if self._receiving:
            raise trio.BusyResourceError(_RECEIVING)
        self._receiving = True
        try:
            if not self._ready:
                self._check_usable()
                await self._ensure_handshake(checkpoint=False)
                if self._stopped:
                    await trio.lowlevel.checkpoint()
                    raise trio.EndOfChannel
            session = self._session
            try:
                if not self._left and (messages := session.next_messages()):
                    # They came together with the handshake's end.
                    messages.reverse()
                    self._left = messages
                if self._left:
                    # Not taken before the checkpoint: a cancellation would lose them.
                    await trio.lowlevel.checkpoint()
                    self._check_receiving()
                    messages, self._left = self._left, _NOTHING
                    messages.reverse()
                    return messages
                while not session.receive_ended:
                    session.receive_data(await self.transport_stream.receive_some())
                    if not self._ready:
                        # Closed meanwhile? Then the peer's end is not ours to tell.
                        self._check_receiving()
                    if messages := session.next_messages():
                        return messages
            except BaseException as exc:
                if self._stopped and self._state is _State.OK and isinstance(exc, trio.ClosedResourceError):
                    # `_wake_receiver`: nothing is closed.
                    raise trio.EndOfChannel from None
                self._translate(exc, cancel_breaks=False)
                raise
            raise trio.EndOfChannel
        finally:
            self._leave_receive()

    def stop_receiving(self) -> None:
        """Take no more messages, as a server does that is about to stop.

        From now on `receive` raises `trio.EndOfChannel` as if the peer had said goodbye, also in a task
        that waits in it; sending goes on. So a handler that answers what it receives answers the last
        it has got, ends, and closes the channel, which tells the peer. What has come and was not
        received is dropped: to the peer that is a request without an answer before our goodbye, which it
        may send again elsewhere.

        May be called at any time, and again. A task that waits for a message wakes at once over a
        socket; over any other stream only when the peer sends something.
        """
        if self._state is _State.OK:
            self._stopped = True
            self._ready = False
            self._left = _NOTHING
            self._wake_receiver()

    def _wake_receiver(self) -> None:
        # What wakes one who waits to read a socket wakes one who waits to write it too, half-way through a record:
        # so not while a task is sending. It calls this when it is done.
        waits = self._receiving and self._handshake_ended and not self._sending
        if waits and isinstance(self.transport_stream, trio.SocketStream):
            trio.lowlevel.notify_closing(self.transport_stream.socket)

    def _leave_receive(self) -> None:
        self._receiving = False
        if self._receiver_gone is not None:
            self._receiver_gone.set()

    # Impersonation

    async def run_as_peer(self, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run ``function(*args)``, which is not async, in a thread of its own that is the peer meanwhile.

        An acceptor's only, with an `Impersonation`: see there what the function may count on and what
        not. With the `framed` format a message of the peer's must have been received before: a login
        alone may have been relayed by somebody who does not have its key. In the `sample` format a peer
        says nothing, so there an NTLM login is taken at its word, and a warning is logged unless the
        acceptor demands that it was meant for this service (``require_target="require"``).

        Waits for the function's end also when it is cancelled.

        Returns:
          What the function returns. What it raises is raised.

        Raises:
          ImpersonationError: the peer has no account here; the function was not called.
          LocalProtocolError: the channel has no `Impersonation`, is an initiator's, or the peer has
              not proved its key yet.
          trio.NeedHandshakeError: before the handshake.
          trio.BrokenResourceError: the connection is gone, or the peer's Kerberos ticket has ended.
          trio.ClosedResourceError: the channel is closed.
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
        if self._state is _State.CLOSED:
            await trio.lowlevel.checkpoint()
            return
        established = self._session.established and self._handshake_ended
        polite = self._state is _State.OK and established and not self._sending
        self._state = _State.CLOSED
        self._ready = False
        # Its traceback leads back here: a cycle, which only the garbage collector would find.
        self._cause = None
        self._left = _NOTHING
        try:
            try:
                if self.tracer is not None:
                    self.tracer.closed()
            finally:
                if polite:
                    await self._farewell()
        finally:
            await self.transport_stream.aclose()

    async def _farewell(self) -> None:
        # The peer may be gone already, or its transport broken: then there is nobody to be polite to.
        try:
            goodbye = self._session.goodbye()
        except RemoteProtocolError:
            return
        failures: list[Exception] = []
        # One scope for both: as long as the goodbye is not out, until its time is up, and from then on the drain's.
        async with trio.open_nursery() as nursery:
            scope = nursery.cancel_scope
            scope.deadline = trio.current_time() + _GOODBYE_TIMEOUT
            nursery.start_soon(self._drain, scope, failures)
            try:
                if goodbye:
                    await self.transport_stream.send_all(goodbye)
                if isinstance(self.transport_stream, trio.abc.HalfCloseableStream):
                    await self.transport_stream.send_eof()
            except _LOST:
                scope.cancel()
            except Exception as exc:  # noqa: BLE001 - raised below, in no group
                failures.append(exc)
                scope.cancel()
            else:
                scope.deadline = trio.current_time() + _DRAIN_TIMEOUT
        if failures:
            raise failures[0]

    async def _drain(self, scope: trio.CancelScope, failures: list[Exception]) -> None:
        try:
            if self._receiving:
                self._receiver_gone = trio.Event()
                await self._receiver_gone.wait()
            drained = 0
            while drained < _DRAIN_LIMIT and (data := await self.transport_stream.receive_some()):
                drained += len(data)
        except _LOST:
            # What is still to be sent may get through, or finds out itself.
            pass
        except Exception as exc:  # noqa: BLE001 - raised by `_farewell`, in no group
            failures.append(exc)
            scope.cancel()
