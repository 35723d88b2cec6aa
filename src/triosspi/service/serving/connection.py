"""One connection of the service: what it adds to the life of a connection, which is admission, PROXY, sessions, telemetry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal, NoReturn

import trio

from ..._errors import AuthenticationError, printable
from ...security.credentials import Acceptor
from ...session import Tracer
from ...tcp import Attempt, ConnectionServer, End, Handler, LiveSession, LoginFailure, TCPEndpoint, ticket_end
from ..admission.admission import Admission, Dropped, Entry
from ..admission.waiting import Stage
from ..config.settings import Limits
from ..network.listening import source_of, tune
from ..network.proxy_protocol import ProxyError, ProxyProtocol
from ..observe.telemetry import SessionEnd, Telemetry
from .lifecycle import shutting_down
from .login_stream import LoginStream
from .sessions import Sessions, WatchedSession
from .wires import Wires

#: Seconds that are left for logins under way when the server begins to stop. An honest client needs a few round trips, for
#: which a busy machine may take seconds; a client that only connects would hold up the stop for a whole login's time.
STOPPING_HANDSHAKE: Final = 5.0
#: Seconds between two looks at which connections make room, while others wait to be read.
TURNS_INTERVAL: Final = 0.05


class TooManySessions(AuthenticationError):
    """The peer has authenticated, and its principal has as many sessions as it may have. That is no failed login."""


@dataclass(kw_only=True, eq=False)
class Service(ConnectionServer[trio.SocketStream]):
    """What all connections of a server share. A reload exchanges some of it; open channels keep what they were made with.

    Args:
      handler: the application.
      acceptor: what clients authenticate with.
      wires: what is spoken.
      limits: see `Limits`.
      keepalive: seconds until the kernel asks a silent peer whether it is there; None leaves it be.
      proxies: who must send a PROXY header.
      admission: who may connect.
      sessions: who is logged in.
      telemetry: is told of everything.
      make_tracer: makes the tracer of each connection.
      logged_in: called for each login.
    """

    handler: Handler
    acceptor: Acceptor
    wires: Wires
    limits: Limits
    keepalive: float | None
    proxies: ProxyProtocol
    admission: Admission
    sessions: Sessions
    telemetry: Telemetry
    make_tracer: Callable[[], Tracer] | None = None
    logged_in: Callable[[], None] | None = None
    _deadlines: set[trio.CancelScope] = field(default_factory=set)
    _somebody_waits: trio.Event = field(default_factory=trio.Event)

    # What the life of a connection asks

    @property
    def handshake_timeout(self) -> float:
        """Seconds for everything up to the login."""
        return self.limits.handshake_timeout

    @property
    def stopping(self) -> bool:
        """Whether the server is about to stop."""
        return shutting_down().is_set()

    def admit(self, arrived: trio.SocketStream) -> ServiceAttempt | None:
        """See `ConnectionServer.admit`."""
        self.telemetry.accepted()
        if (origin := source_of(arrived)) is None:
            # Gone already. No cap knows its source; and were it a proxy, its header would be taken for a token.
            self.telemetry.dropped("nothing_said", "unknown address")
            return None
        address, source = origin
        expects_header = self.proxies.expected_from(address)
        try:
            entry = self.admission.admit(None if expects_header else address)
        except Dropped as exc:
            self.telemetry.dropped(exc.cause, source)
            return None
        return ServiceAttempt(self, arrived, entry, source, expects_header=expects_header)

    def ended(self, session: LiveSession, end: End) -> None:  # noqa: ARG002 - the session is told of when it is closed
        """See `ConnectionServer.ended`."""
        if end.forged is not None:
            self.telemetry.unseal_failure()

    def closed(self, session: LiveSession, end: End) -> None:
        """See `ConnectionServer.closed`."""
        assert isinstance(session, WatchedSession)
        self.sessions.remove(session)
        traffic = session.channel.traffic
        self.telemetry.session_ended(
            SessionEnd(
                session_id=session.number,
                source=session.source,
                peer=session.channel.peer,
                outcome=end.outcome,
                error=end.error,
                messages_received=traffic.messages_received,
                messages_sent=traffic.messages_sent,
                bytes_received=traffic.bytes_received,
                bytes_sent=traffic.bytes_sent,
                seconds=trio.current_time() - session.since,
            )
        )
        session.entry.close()

    # Stopping

    def stop(self) -> None:
        """Let everybody finish, and begin nothing new. See the head of `server`."""
        self.sessions.stop()
        for deadline in self._deadlines:
            self._hurry(deadline)

    def count_deadline(self, deadline: trio.CancelScope) -> None:
        """A login is under way, with this deadline."""
        self._deadlines.add(deadline)
        if self.sessions.stopping:
            self._hurry(deadline)

    def forget_deadline(self, deadline: trio.CancelScope) -> None:
        """It is over."""
        self._deadlines.discard(deadline)

    def _hurry(self, deadline: trio.CancelScope) -> None:
        deadline.deadline = min(deadline.deadline, trio.current_time() + STOPPING_HANDSHAKE)

    # Turns

    def turns_are_wanted(self) -> None:
        """A connection waits to be read."""
        self._somebody_waits.set()

    async def keep_turns(self) -> NoReturn:
        """Let silent connections make room for waiting ones, until cancelled."""
        while True:
            await self._somebody_waits.wait()
            self._somebody_waits = trio.Event()
            while self.admission.queued:
                await trio.sleep(TURNS_INTERVAL)
                self.admission.advance()


class ServiceAttempt(Attempt):
    """One connection before its login, with its entry in the admission."""

    __slots__ = ("_deadline", "_entry", "_expects_header", "_service", "_stream")

    def __init__(
        self, service: Service, stream: trio.SocketStream, entry: Entry, source: str, *, expects_header: bool
    ) -> None:
        super().__init__(source)
        self._service = service
        self._stream = stream
        self._entry = entry
        self._expects_header = expects_header
        self._deadline: trio.CancelScope | None = None

    def begin(self, deadline: trio.CancelScope) -> None:
        """See `Attempt.begin`."""
        self._deadline = deadline
        self._entry.on_evicted = deadline.cancel
        self._service.count_deadline(deadline)

    def over(self) -> None:
        """See `Attempt.over`."""
        if self._deadline is not None:
            self._service.forget_deadline(self._deadline)

    async def open(self) -> TCPEndpoint | None:
        """See `Attempt.open`."""
        service, entry = self._service, self._entry
        try:
            await self._wait_for_turn()
            watched = LoginStream(self._stream, entry)
            if self._expects_header:
                # From a health check it is None: the balancer speaks for itself.
                told = await service.proxies.read_header(watched)
                if told is not None:
                    address, self.source = told
                    entry.identify(address)
                    await self._wait_for_turn()
        except Dropped as exc:
            service.telemetry.dropped(exc.cause, self.source)
            return None
        except ProxyError as exc:
            service.telemetry.dropped("nothing_said" if exc.nothing_said else "proxy_header", self.source)
            return None
        tune(self._stream, service.keepalive)
        tracer = None if service.make_tracer is None else service.make_tracer()
        channel = await service.wires.open(watched, service.acceptor, tracer)
        # Asked before our last token, which would tell the peer that its password was right. Where the mechanism has no such
        # token, `check` asks.
        watched.before_sending = partial(self._check_principal, channel)
        return channel

    def check(self, channel: TCPEndpoint) -> bool:
        """See `Attempt.check`."""
        self._check_principal(channel)
        channel.transport_stream = self._stream
        return self._entry.evicted is None

    def out_of_time(self, timeout: float) -> LoginFailure | None:
        """See `Attempt.out_of_time`."""
        dropped = self._service.telemetry.dropped
        if self._entry.evicted is not None:
            dropped(self._entry.evicted, self.source)
        elif self._service.sessions.stopping:
            dropped("draining", self.source)
        elif self._entry.stage is Stage.QUEUED:
            # The peer has done its part; the server did not come to it.
            dropped("startups", self.source)
        else:
            return super().out_of_time(timeout)
        return None

    def may_try_again(self) -> bool:
        """See `Attempt.may_try_again`."""
        return self._entry.may_try_again()

    def failed(self, failure: LoginFailure) -> None:
        """See `Attempt.failed`."""
        if failure.kind == "nothing_said":
            # Health checks and port scanners, by the thousand.
            self._entry.failed("no_login")
            self._service.telemetry.dropped("nothing_said", self.source)
            return
        error = failure.error
        if not isinstance(error, TooManySessions):
            self._entry.failed(_PENALTIES[failure.kind], None if error is None else error.principal)
        self._service.telemetry.login_refused(
            source=self.source,
            mechanism=None if error is None else error.mechanism,
            reason=failure.reason,
            seconds=self.seconds,
            timed_out=failure.kind == "timeout",
        )

    def logged_in(self, channel: TCPEndpoint) -> WatchedSession:
        """See `Attempt.logged_in`."""
        service = self._service
        self._entry.authenticated(channel.peer.principal)
        session = WatchedSession(channel, self.source, ticket_end(channel.peer), self._entry)
        service.sessions.add(session)
        service.telemetry.login(
            session_id=session.number,
            source=self.source,
            peer=channel.peer,
            wire=channel.wire.value,
            seconds=self.seconds,
        )
        if service.logged_in is not None:
            service.logged_in()
        return session

    def leave(self) -> None:
        """See `Attempt.leave`."""
        self._entry.close()

    async def _wait_for_turn(self) -> None:
        entry = self._entry
        if entry.stage is Stage.SILENT:
            # Nothing is read yet: until it speaks, a connection gets neither memory nor a place among those that are served.
            await trio.lowlevel.wait_readable(self._stream.socket)
            entry.spoke()
        if not entry.has_turn:
            turn = trio.Event()
            entry.on_turn = turn.set
            self._service.turns_are_wanted()
            await turn.wait()

    def _check_principal(self, channel: TCPEndpoint) -> None:
        """See that the principal may have one more session. Before the login, do nothing.

        Raises:
          AuthenticationError: it may not.
        """
        try:
            peer = channel.peer
        except trio.NeedHandshakeError:
            return
        why = self._entry.check_principal(peer.principal, guessable=peer.mechanism == "ntlm")
        who = printable(peer.principal)
        if why == "failures":
            # Not counted as one more: it is none.
            raise AuthenticationError(
                f"too many logins of {who} have failed, and nobody has logged in as it from there before",
                mechanism=peer.mechanism,
            )
        if why == "sessions":
            raise TooManySessions(f"{who} has as many sessions as may be", mechanism=peer.mechanism)


# What a failed login counts for in the admission, see `PenaltyPolicy`.
_PENALTIES: Final[dict[str, Literal["auth", "no_login", "timeout", "protocol"]]] = {
    "left": "no_login",
    "refused": "auth",
    "timeout": "timeout",
    "error": "protocol",
}
