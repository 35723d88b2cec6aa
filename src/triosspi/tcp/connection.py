"""The life of a server's connection, from accept to close. There is one, and each server fills in its own hooks."""

# accept ─ admit ─ open ─ handshake ─ check ─ handler ─ close
#
#   admit      may the connection be here at all
#   open       what stands before the first token on the wire: a PROXY header, TLS, which wire format; then the channel, or
#              the stream, which is called a channel here, too
#   handshake  the channel's own; where the wire format lets a client whose login was refused try again, several
#   check      may the peer that has logged in be here
#   handler    the application, in the session's cancel scope where something may end it from outside
#   close      goodbye, FIN, the peer's last bytes; or, without a login, at once
#
# What must hold for each of thousands of them, for days:
#
# * `serve` raises nothing but Cancelled and its like: one connection's end is never another's.
# * From `admit` to the login the deadline counts, for all of it and not for each read.
# * Whatever happens, each connection is accounted for once: turned away, or failed, or logged in and ended.
# * It is one coroutine that waits, with few variables: an idle connection costs this, a channel and a session.
#
# A server is a `ConnectionServer` and its `Attempt`. The library's are in `server`; the service's, with admission,
# telemetry and a watch over its sessions, in `service.serving.connection`.

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from typing import Any, Final, Generic, TypeAlias, TypeVar

import trio

from .._errors import AuthenticationError, TicketExpiredError
from ..channel import Endpoint, SSPIChannel, SSPIStream
from .endings import (
    End,
    LoginFailure,
    Outcome,
    connection_end,
    impersonation_refused,
    is_ordinary_end,
    login_failure,
    tampering,
)

log = logging.getLogger("triosspi.server")

TCPChannel: TypeAlias = SSPIChannel[trio.SocketStream]
TCPStream: TypeAlias = SSPIStream[trio.SocketStream]
TCPEndpoint: TypeAlias = Endpoint[trio.SocketStream]
Handler: TypeAlias = Callable[[TCPChannel], Awaitable[object]]
StreamHandler: TypeAlias = Callable[[TCPStream], Awaitable[object]]
#: Of whatever its server opens.
AnyHandler: TypeAlias = Callable[[Any], Awaitable[object]]

ArrivedT = TypeVar("ArrivedT", bound=trio.abc.AsyncResource)

_NO_SCOPE: Final = nullcontext()
# What a session has that was cancelled with its server; one for all, since each holds it while it lives.
_SHUTDOWN: Final = End("shutdown")
# How much is thrown away of what has come and was not read, at most.
_PIECES: Final = 4
_PIECE: Final = 65_536


class Attempt:
    """A connection whose peer has not logged in: what a server asks and tells meanwhile.

    Args:
      source: where the peer connects from, for people.

    Attributes:
      source: see above.
      started: when it was admitted, on Trio's clock.
      refusals: how many logins were refused, told of, and perhaps followed by another.
      given_up: the last of these is followed by none.
    """

    __slots__ = ("given_up", "refusals", "source", "started")

    def __init__(self, source: str) -> None:
        self.source = source
        self.started = trio.current_time()
        self.refusals = 0
        self.given_up = False

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return trio.current_time() - self.started

    def begin(self, deadline: trio.CancelScope) -> None:
        """The time of the login has begun. Cancelling the scope ends the attempt."""

    async def open(self) -> TCPEndpoint | None:
        """Read what stands before the handshake, and make the channel.

        Returns:
          None: the connection is not to be served, which was told already.

        Raises:
          Exception: whatever reading from the peer raises.
        """
        raise NotImplementedError

    def refused(self, error: AuthenticationError) -> bool:
        """A login was refused, and the wire format lets the peer try again on this connection; returns whether it may."""
        self.refusals += 1
        self.failed(LoginFailure("refused", str(error), error))
        self.given_up = not self.may_try_again()
        return not self.given_up

    def may_try_again(self) -> bool:
        """Whether a peer whose login was refused may try again on this connection."""
        return True

    def check(self, channel: TCPEndpoint) -> bool:  # noqa: ARG002 - a subclass looks at it
        """The peer has shown who it is: may it be here?

        Returns:
          False: it came too late, see `out_of_time`.

        Raises:
          AuthenticationError: it may not.
        """
        return True

    def out_of_time(self, timeout: float) -> LoginFailure | None:
        """The deadline has passed, or its scope was cancelled. None: there is nothing more to tell of it."""
        return LoginFailure("timeout", f"no login within {timeout:g} s")

    def failed(self, failure: LoginFailure) -> None:
        """The peer has not logged in, or not this time."""

    def logged_in(self, channel: TCPEndpoint) -> LiveSession:
        """The peer has logged in. From here on `ConnectionServer.closed` is due."""
        raise NotImplementedError

    def over(self) -> None:
        """Its time is not counted any more, whatever becomes of it."""

    def leave(self) -> None:
        """The connection is closed, without a login."""


class LiveSession:
    """A peer that has logged in.

    Args:
      channel: its channel or stream.
      source: where it connects from, for people.
      expires: when its ticket ends, on Trio's clock; None if it has none.

    Attributes:
      channel: see above.
      source: see above.
      expires: see above.
      ended_by: why the server has ended it, if it has.
      scope: its handler runs in it; None where nothing ends it from outside.
    """

    # Part of the memory of each idle connection.
    __slots__ = ("channel", "ended_by", "expires", "scope", "source")

    def __init__(self, channel: TCPEndpoint, source: str, expires: float | None) -> None:
        self.channel = channel
        self.source = source
        self.expires = expires
        self.ended_by: Outcome | None = None
        self.scope: trio.CancelScope | None = None


class ConnectionServer(Generic[ArrivedT]):
    """Serves connections, one call of `serve` each.

    Attributes:
      handler: the application, which takes what its attempts open; a subclass sets it.
    """

    handler: AnyHandler

    # The hooks

    @property
    def handshake_timeout(self) -> float:
        """Seconds for everything up to the login."""
        raise NotImplementedError

    @property
    def stopping(self) -> bool:
        """Whether the server is about to stop, so that its sessions' ends are its doing."""
        return False

    def admit(self, arrived: ArrivedT) -> Attempt | None:
        """A connection was accepted. None: it is turned away, which was told already."""
        raise NotImplementedError

    def ended(self, session: LiveSession, end: End) -> None:
        """The handler has ended; the channel is about to be closed, which may take seconds."""

    def closing_failed(self) -> None:
        """Closing a channel has raised what it should not have."""

    def closed(self, session: LiveSession, end: End) -> None:
        """The channel is closed, and the session over."""

    # The life

    async def serve(self, arrived: ArrivedT) -> bool:
        """One connection, from accept to close. Raises nothing but Cancelled and its like.

        Returns:
          Whether the peer logged in, and so the handler was called.
        """
        try:
            attempt = self.admit(arrived)
            if attempt is None:
                await _drop(arrived, arrived)
                return False
            session = await self._log_in(arrived, attempt)
            # A session lasts for days; what was for the login is not kept for so long.
            del attempt
            if session is None:
                return False
            end = _SHUTDOWN
            try:
                with session.scope or _NO_SCOPE:
                    await self.handler(session.channel)
                end = End(self._finished(session))
            except BaseException as exc:
                end = self._failed(exc, session)
                if not isinstance(exc, Exception):
                    raise
            finally:
                await self._close(session, end)
        except Exception:
            # A bug in a hook. It must not reach the nursery, which would cancel all other connections.
            log.exception("a connection was given up for an error of the server's own")
            await trio.aclose_forcefully(arrived)
            return False
        return True

    async def _log_in(self, arrived: ArrivedT, attempt: Attempt) -> LiveSession | None:
        """Let the peer log in; if it does not, close the connection and tell why."""
        channel: TCPEndpoint | None = None
        session: LiveSession | None = None
        failure: LoginFailure | None = None
        accepted = False
        try:
            with trio.move_on_after(self.handshake_timeout) as deadline:
                attempt.begin(deadline)
                channel = await attempt.open()
                if channel is not None:
                    await channel.do_handshake(refused=attempt.refused)
                    accepted = attempt.check(channel)
            if channel is not None and accepted:
                session = attempt.logged_in(channel)
            elif channel is not None or deadline.cancelled_caught:
                failure = attempt.out_of_time(self.handshake_timeout)
        except (trio.BrokenResourceError, AuthenticationError) as exc:
            failure = login_failure(exc)
            if attempt.given_up or (attempt.refusals and failure.kind == "nothing_said"):
                # It was told, and nothing has happened since.
                failure = None
        except Exception:
            # Not the peer's doing, but still only this connection's end.
            log.exception("%s: the handshake failed through an error of ours", attempt.source)
            failure = LoginFailure("error", "an error of the server's own")
        finally:
            attempt.over()
            if session is None:
                try:
                    if failure is not None:
                        attempt.failed(failure)
                finally:
                    await _drop(arrived, arrived if channel is None else channel)
                    attempt.leave()
        return session

    def _finished(self, session: LiveSession) -> Outcome:
        """The handler has returned."""
        if session.ended_by is not None:
            return session.ended_by
        if session.expires is not None and trio.current_time() >= session.expires:
            return "expired"
        if session.channel.peer_left:
            return "goodbye"
        return "shutdown" if self.stopping else "finished"

    def _failed(self, exc: BaseException, session: LiveSession) -> End:
        """The handler has raised."""
        if isinstance(exc, BaseExceptionGroup) and not isinstance(exc, ExceptionGroup):
            # While the server is cancelled, a handler's nursery raises its errors together with Cancelled.
            errors = exc.subgroup(Exception)
            return _SHUTDOWN if errors is None else self._failed(errors, session)
        if not isinstance(exc, Exception):
            return _SHUTDOWN
        forgery = tampering(exc)
        forged = None if forgery is None else str(forgery)
        closed = session.ended_by is not None
        if (refused := impersonation_refused(exc, closed=closed)) is not None:
            # A line missing in a map, and no bug.
            log.warning("%s: %s: cannot be impersonated: %s", session.source, session.channel.peer, refused)
            return End("handler_error", type(refused).__name__, forged)
        end = connection_end(exc, closed=closed)
        if end is None:
            log.error("%s: %s: the handler failed", session.source, session.channel.peer, exc_info=exc)
            return End("handler_error", type(exc).__name__, forged)
        if forged is not None:
            return End("lost", forged, forged)
        if isinstance(end.__cause__, TicketExpiredError):
            # Found out by the handler before the watch over the tickets came to it.
            return End("expired")
        if closed or isinstance(end, trio.EndOfChannel):
            outcome = self._finished(session)
            # A handler that raises EndOfChannel by itself says that the peer has left.
            return End("peer_closed" if outcome == "finished" else outcome)
        if is_ordinary_end(end):
            return End("peer_closed")
        return End("lost", str(end))

    async def _close(self, session: LiveSession, end: End) -> None:
        """Close the channel, in peace where there is, and tell."""
        try:
            try:
                # Before closing, which takes its time, and when cancelled replaces what was raised.
                self.ended(session, end)
            finally:
                await session.channel.aclose()
        except Exception as exc:
            log.exception("%s: %s: closing failed", session.source, session.channel.peer)
            end = End(end.outcome, end.error or f"while closing: {exc}", end.forged)
            self.closing_failed()
        finally:
            self.closed(session, end)


async def _drop(arrived: trio.abc.AsyncResource, resource: trio.abc.AsyncResource) -> None:
    """Close a connection whose peer has not logged in, at once and without a word.

    Args:
      arrived: what was accepted, to find its socket.
      resource: what is closed, that or a channel over it.
    """
    stream = arrived.transport_stream if isinstance(arrived, Endpoint) else arrived
    if isinstance(stream, trio.SocketStream) and os.name == "posix":
        # With unread input the kernel would send RST, and the peer would see a reset in place of an end.
        with suppress(OSError):
            for _ in range(_PIECES):
                if not os.read(stream.socket.fileno(), _PIECE):
                    break
    await trio.aclose_forcefully(resource)
