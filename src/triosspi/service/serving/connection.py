"""One connection of a server, from accept to close: admission, login, handler, and what is told of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Final, Literal, NoReturn, TypeAlias, cast

import trio

from ..._errors import AuthenticationError, TicketExpiredError, TruncatedError, printable
from ...channel import Impersonator, SSPIChannel
from ...security.credentials import Acceptor
from ...security.identity import PeerIdentity
from ...session import Tracer
from ...tcp import Handler, TCPChannel, connection_end, impersonation_refused, is_ordinary_end, said_nothing, tampering
from ...wire import WireFormat
from ..config.settings import Limits
from ..network.addresses import IPAddress
from ..network.admission import Admission, Dropped, Entry
from ..network.listening import source_of, tune
from ..network.login_stream import LoginStream, discard_input
from ..network.proxy_protocol import ProxyError, ProxyProtocol
from ..network.waiting import Stage
from ..observe.telemetry import SessionEnd, Telemetry
from .lifecycle import shutting_down
from .sessions import LiveSession, Outcome, Sessions

log = logging.getLogger("triosspi.server")

End: TypeAlias = tuple[Outcome, str | None]
"""How a session ended, and what went wrong, if anything."""

#: Seconds that whoever is logging in has left when the server begins to stop. Who means it needs a few round trips, for
#: which a busy machine may take seconds; who has only connected would hold up the stop for as long as a login may take.
STOPPING_HANDSHAKE: Final = 5.0
#: Seconds between two looks at who makes room, while somebody waits to be read.
TURNS_INTERVAL: Final = 0.05


class TooManySessions(AuthenticationError):
    """The peer is who it says, and there are as many sessions of it as may be. Nothing is held against it."""


def _check_principal(channel: TCPChannel, entry: Entry) -> None:
    """See that whoever has logged in may be let in; before that, nothing happens.

    Raises:
      AuthenticationError: it may not.
    """
    try:
        peer = channel.peer
    except trio.NeedHandshakeError:
        return
    why = entry.check_principal(peer.principal, guessable=peer.mechanism == "ntlm")
    who = printable(peer.principal)
    if why == "failures":
        # Not counted as one more: it is none.
        raise AuthenticationError(
            f"too many logins of {who} have failed, and nobody has logged in as it from there before",
            mechanism=peer.mechanism,
        )
    if why == "sessions":
        raise TooManySessions(f"{who} has as many sessions as may be", mechanism=peer.mechanism)


@dataclass(kw_only=True)
class Service:
    """What all connections of a server share. A reload exchanges fields of it; who is logged in keeps his.

    Attributes:
      handler: the application.
      acceptor: what clients authenticate with.
      wire: the format.
      max_message_size: bytes of plaintext.
      limits: see `Limits`.
      keepalive: seconds until the kernel asks a silent peer whether it is there; None leaves it be.
      proxies: who must send a PROXY header.
      admission: who may connect.
      sessions: who is logged in.
      telemetry: is told of everything.
      impersonation: see `SSPIChannel`.
      make_tracer: makes the tracer of each connection.
      logged_in: called for each login.
    """

    handler: Handler
    acceptor: Acceptor
    wire: WireFormat
    max_message_size: int
    limits: Limits
    keepalive: float | None
    proxies: ProxyProtocol
    admission: Admission
    sessions: Sessions
    telemetry: Telemetry
    impersonation: Impersonator | None = None
    make_tracer: Callable[[], Tracer] | None = None
    logged_in: Callable[[], None] | None = None
    _logging_in: set[trio.CancelScope] = field(default_factory=set)
    _somebody_waits: trio.Event = field(default_factory=trio.Event)

    def stop(self) -> None:
        """Let everybody finish, and begin nothing new. See the head of `server`."""
        self.sessions.stop()
        for scope in self._logging_in:
            self._hurry(scope)

    def _hurry(self, scope: trio.CancelScope) -> None:
        scope.deadline = min(scope.deadline, trio.current_time() + STOPPING_HANDSHAKE)

    async def serve(self, stream: trio.SocketStream) -> bool:
        """One connection. Raises nothing but Cancelled and its like.

        Returns:
          Whether the peer logged in, and so the handler was called.
        """
        # One coroutine for all of a connection's life, with few variables: it waits for days, thousands of times.
        self.telemetry.accepted()
        if (origin := source_of(stream)) is None:
            # Gone already. No cap knows its source; and were it a proxy, its header would be taken for a token.
            self.telemetry.dropped("nothing_said", "unknown address")
            await trio.aclose_forcefully(stream)
            return False
        if (entry := self._admit(*origin)) is None:
            discard_input(stream)
            await trio.aclose_forcefully(stream)
            return False
        try:
            if (session := await self._log_in(stream, entry, *origin)) is None:
                return False
            end: End = ("shutdown", None)
            try:
                with session.scope:
                    await self.handler(session.channel)
                end = self._finished(session), None
            except BaseException as exc:
                end = self._failed(exc, session)
                if not isinstance(exc, Exception):
                    raise
            finally:
                await self._close(session, *end)
        finally:
            entry.close()
        return True

    # Logging in

    def _admit(self, address: IPAddress | None, source: str) -> Entry | None:
        try:
            return self.admission.admit(None if self.proxies.expected_from(address) else address)
        except Dropped as exc:
            self.telemetry.dropped(exc.cause, source)
            return None

    async def _log_in(
        self, stream: trio.SocketStream, entry: Entry, address: IPAddress | None, source: str
    ) -> LiveSession | None:
        """Let the peer log in; if it does not, close the connection and tell why."""
        started = trio.current_time()
        channel: TCPChannel | None = None
        authenticated = False
        try:
            with trio.move_on_after(self.limits.handshake_timeout) as in_time:
                self._logging_in.add(in_time)
                entry.on_evicted = in_time.cancel
                if self.sessions.stopping:
                    self._hurry(in_time)
                await self._wait_for_turn(stream, entry)
                watched = LoginStream(stream, entry)
                if self.proxies.expected_from(address):
                    # From a health check it is None: the balancer speaks for itself.
                    told = await self.proxies.read_header(watched)
                    if told is not None:
                        address, source = told
                        entry.identify(address)
                        await self._wait_for_turn(stream, entry)
                channel = self._channel(stream, watched)
                # Before the last token of ours says that the password was right, and where there is none.
                watched.before_sending = partial(_check_principal, channel, entry)
                await channel.do_handshake()
                _check_principal(channel, entry)
                channel.transport_stream = stream
                authenticated = entry.evicted is None
        except Dropped as exc:
            self.telemetry.dropped(exc.cause, source)
        except ProxyError as exc:
            self.telemetry.dropped("nothing_said" if exc.nothing_said else "proxy_header", source)
        except (trio.BrokenResourceError, AuthenticationError) as exc:
            self._broken_off(exc, entry, source, started)
        except Exception:
            # Not the peer's doing, but still only this connection's end.
            log.exception("%s: the handshake failed through an error of ours", source)
            self._refused(entry, "protocol", source, "an error of the server's own", started)
        finally:
            self._logging_in.discard(in_time)
            if not authenticated:
                discard_input(stream)
                await trio.aclose_forcefully(stream if channel is None else channel)
        if in_time.cancelled_caught:
            self._out_of_time(entry, source, started)
        if channel is None or not authenticated:
            return None
        entry.authenticated(channel.peer.principal)
        session = LiveSession(channel, source, _expiry(channel.peer))
        self.sessions.add(session)
        self.telemetry.login(
            session_id=session.number, source=source, peer=channel.peer, seconds=trio.current_time() - started
        )
        if self.logged_in is not None:
            self.logged_in()
        return session

    def _out_of_time(self, entry: Entry, source: str, started: float) -> None:
        if entry.evicted is not None:
            self.telemetry.dropped(entry.evicted, source)
        elif self.sessions.stopping:
            self.telemetry.dropped("draining", source)
        elif entry.stage is Stage.QUEUED:
            # It has said all, and it was we who did not come to it.
            self.telemetry.dropped("startups", source)
        else:
            self._refused(entry, "timeout", source, f"no login within {self.limits.handshake_timeout:g} s", started)

    async def _wait_for_turn(self, stream: trio.SocketStream, entry: Entry) -> None:
        if entry.stage is Stage.SILENT:
            # Unread: what is not known to be worth it gets no memory and no place.
            await trio.lowlevel.wait_readable(stream.socket)
            entry.spoke()
        if not entry.has_turn:
            turn = trio.Event()
            entry.on_turn = turn.set
            self._somebody_waits.set()
            await turn.wait()

    async def keep_turns(self) -> NoReturn:
        """Let those who sit make room for those who wait, until cancelled."""
        while True:
            await self._somebody_waits.wait()
            self._somebody_waits = trio.Event()
            while self.admission.queued:
                await trio.sleep(TURNS_INTERVAL)
                self.admission.advance()

    def _broken_off(
        self, exc: trio.BrokenResourceError | AuthenticationError, entry: Entry, source: str, started: float
    ) -> None:
        cause = exc if isinstance(exc, AuthenticationError) else exc.__cause__
        if isinstance(exc, trio.BrokenResourceError) and said_nothing(exc):
            # Health checks and port scanners, by the thousand.
            entry.failed("no_login")
            self.telemetry.dropped("nothing_said", source)
            return
        left = isinstance(cause, (TruncatedError, OSError))
        mechanism = cause.mechanism if isinstance(cause, AuthenticationError) else None
        if isinstance(cause, AuthenticationError) and not isinstance(cause, TooManySessions):
            entry.failed("auth", cause.principal)
        self._refused(
            entry,
            None if isinstance(cause, TooManySessions) else "no_login" if left else "auth",
            source,
            str(exc),
            started,
            mechanism=mechanism,
        )

    def _channel(self, stream: trio.SocketStream, watched: LoginStream) -> TCPChannel:
        tune(stream, self.keepalive)
        return SSPIChannel(
            # For the handshake only, which asks no more of it.
            cast(trio.SocketStream, watched),
            self.acceptor,
            wire=self.wire,
            max_message_size=self.max_message_size,
            impersonation=self.impersonation,
            tracer=None if self.make_tracer is None else self.make_tracer(),
        )

    def _refused(
        self,
        entry: Entry,
        kind: Literal["auth", "no_login", "timeout", "protocol"] | None,
        source: str,
        reason: str,
        started: float,
        *,
        mechanism: str | None = None,
    ) -> None:
        if kind is not None:
            entry.failed(kind)
        self.telemetry.login_refused(
            source=source,
            mechanism=mechanism,
            reason=reason,
            seconds=trio.current_time() - started,
            timed_out=kind == "timeout",
        )

    # How it ended

    def _finished(self, session: LiveSession) -> Outcome:
        """The handler has returned."""
        if session.ended_by is not None:
            return session.ended_by
        if session.channel.peer_left:
            return "goodbye"
        return "shutdown" if shutting_down().is_set() else "finished"

    def _failed(self, exc: BaseException, session: LiveSession) -> End:
        """The handler has raised."""
        if isinstance(exc, BaseExceptionGroup) and not isinstance(exc, ExceptionGroup):
            # While the server is cancelled, a handler's nursery raises its errors together with Cancelled.
            errors = exc.subgroup(Exception)
            return ("shutdown", None) if errors is None else self._failed(errors, session)
        if not isinstance(exc, Exception):
            return "shutdown", None
        if (forged := tampering(exc)) is not None:
            # Also beside a bug: else whoever tampers needs only to meet one.
            self.telemetry.unseal_failure()
        closed = session.ended_by is not None
        if (refused := impersonation_refused(exc, closed=closed)) is not None:
            # A line missing in a map, and no bug.
            log.warning("%s: %s: cannot be impersonated: %s", session.source, session.channel.peer, refused)
            return "handler_error", type(refused).__name__
        end = connection_end(exc, closed=closed)
        if end is None:
            log.error("%s: %s: the handler failed", session.source, session.channel.peer, exc_info=exc)
            return "handler_error", type(exc).__name__
        if forged is not None:
            return "lost", str(forged)
        if isinstance(end.__cause__, TicketExpiredError):
            # Found out by the handler before the watch over all sessions came to it.
            return "expired", None
        if closed or isinstance(end, trio.EndOfChannel):
            return self._finished(session), None
        if is_ordinary_end(end):
            return "peer_closed", None
        return "lost", str(end)

    async def _close(self, session: LiveSession, outcome: Outcome, error: str | None) -> None:
        """Close the channel, in peace where there is, and tell."""
        try:
            await session.channel.aclose()
        except Exception as exc:  # noqa: BLE001 - whatever it is, the connection is over
            error = error or f"while closing: {exc}"
        finally:
            self.sessions.remove(session)
            traffic = session.channel.traffic
            self.telemetry.session_ended(
                SessionEnd(
                    session_id=session.number,
                    source=session.source,
                    peer=session.channel.peer,
                    outcome=outcome,
                    error=error,
                    messages_received=traffic.messages_received,
                    messages_sent=traffic.messages_sent,
                    bytes_received=traffic.bytes_received,
                    bytes_sent=traffic.bytes_sent,
                    seconds=trio.current_time() - session.since,
                )
            )


def _expiry(peer: PeerIdentity) -> float | None:
    """When the peer's ticket ends, on Trio's clock."""
    if peer.expires_at is None:
        return None
    return trio.current_time() + (peer.expires_at - datetime.now(UTC)).total_seconds()
