"""What a server tells of its connections: one audit record for each login and each end of a session, and the numbers."""

# The audit log answers which principal was here, when, from where, with which GSS-API flags, and how it ended; and which
# was refused, and why. So there is a record for each login, not for a sample of them, and the reason of a refusal is the true one,
# which the client is never told. Texts in it come from the library, which quotes what a peer chose, or are the principal's.
#
# Any client can cause log lines. A dropped connection costs an attacker a packet or two, so those are only summed up. A
# refused login costs a handshake, and penalties slow down each source; but there are many sources, so beyond a rate that
# honest clients do not reach (100 a second for long, 1000 at once) refusals are summed up too. The numbers stay exact.

from __future__ import annotations

import errno
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, Final, ParamSpec

from ...security.identity import ContextFlag, PeerIdentity, Traffic
from . import metrics as series
from .logs import get_logger
from .metrics import DROP_CAUSES, Metrics, Series
from .status import Health

log = logging.getLogger("triosspi.telemetry")

#: Seconds between two lines that sum up the same thing.
SUMMARY_INTERVAL: Final = 5.0

# How many refused logins are told one by one: so many each second, and so many more at once.
_REFUSALS_PER_SECOND: Final = 100.0
_REFUSALS_AT_ONCE: Final = 1000.0

# Sessions of which an operator wants to read although all others went well.
_UNPLEASANT: Final = frozenset({"lost", "handler_error"})

P = ParamSpec("P")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionEnd:
    """How a session ended.

    Attributes:
      session_id: the one of its login.
      source: where the peer connects from, as ``192.0.2.1:50000``.
      peer: who it is.
      outcome: one of `metrics.SESSION_OUTCOMES`.
      error: what was wrong, in words that hold nothing secret; None where nothing was.
      messages_received: how many messages were unsealed.
      messages_sent: how many were sealed.
      bytes_received: of how many bytes.
      bytes_sent: of how many bytes.
      seconds: how long it was, from the login on.
    """

    session_id: int
    source: str
    peer: PeerIdentity
    outcome: str
    error: str | None = None
    messages_received: int
    messages_sent: int
    bytes_received: int
    bytes_sent: int
    seconds: float


def _unfailing(
    method: Callable[Concatenate[Telemetry, P], None],
) -> Callable[Concatenate[Telemetry, P], None]:
    """A method that is called where an exception would end the server: what it raises is logged instead."""

    @functools.wraps(method)
    def guarded(self: Telemetry, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception:
            self.failures += 1
            if self.failures == 1:
                # Once: it would be one for each connection.
                log.exception("telemetry has failed; it is not said again")

    return guarded


class Telemetry:
    r"""Is told by the server what happens, and tells the audit log and Prometheus.

    No method raises, and none takes more than some tens of microseconds. All are called from the event loop's thread.

    The audit log is the logger ``triosspi.audit``. Its events and their fields are stable:

    ``login`` (info)
      ``session_id``, ``source``, ``principal``, ``mechanism`` (``ntlm`` or ``kerberos``), ``wire``, ``flags`` (names of
      `ContextFlag`), ``mutual``, ``enctype``, ``delegated``, ``expires_at`` (ISO 8601), ``sid`` (from the PAC) and
      ``seconds`` that the handshake took. What does not apply is null.
    ``login refused`` (warning)
      ``source``, ``mechanism`` (null where it is not known), ``reason``, ``timed_out``, ``seconds``. Where very many are
      refused at once, the rest are summed up as ``more logins refused``, with ``count``.
    ``session ended`` (info; warning where the connection was lost or the handler failed)
      ``session_id``, ``source``, ``principal``, ``mechanism``, ``flags``, ``enctype``, ``sid``, ``outcome``, ``error``,
      ``messages_received``, ``messages_sent``, ``bytes_received``, ``bytes_sent`` (plaintext) and ``seconds``.
    ``connections dropped`` (warning; info for ``nothing_said``, which health checks are)
      ``cause``, ``count`` since the last such line, and ``last_source``: one line per cause every few seconds at most.
    ``accept failed`` (error)
      ``cause`` and ``errno`` (such as ``EMFILE``) of the last failure, and ``count``: one line every few seconds at most.

    Args:
      metrics: counts it all; None counts nothing.
      health: is told by `loop_latency` and `ready`; None for nobody.
      clock: seconds, as `time.monotonic`.

    Attributes:
      failures: how often a method has failed, which should be never.
    """

    def __init__(
        self,
        metrics: Metrics | None = None,
        *,
        health: Health | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failures = 0
        self._metrics = metrics
        self._health = health
        self._clock = clock
        self._audit = get_logger("triosspi.audit")
        self._dropped = {cause: _Tally(functools.partial(self._tell_dropped, cause)) for cause in DROP_CAUSES}
        self._accept_errors = _Tally(self._tell_accept_errors)
        self._accept_errno: str | None = None
        self._refused = _Tally(self._tell_refused)
        self._refusals_left = _REFUSALS_AT_ONCE
        self._refusals_at = clock()

    @_unfailing
    def count(self, what: Series) -> None:
        """Something has happened that only a counter is kept of; `what` is declared in `metrics`."""
        self._count(what)

    def _count(self, what: Series, *labels: str | None, by: float = 1) -> None:
        if self._metrics is not None:
            self._metrics.count(what, *labels, by=by)

    def _handshake(self, mechanism: str | None, outcome: str, seconds: float) -> None:
        self._count(series.HANDSHAKES, mechanism, outcome)
        if self._metrics is not None and outcome != "timeout":
            # They all take the same, and would hide the others.
            self._metrics.observe(series.HANDSHAKE_SECONDS, seconds, mechanism)

    # Connections

    @_unfailing
    def accepted(self) -> None:
        """A connection was accepted."""
        self._count(series.ACCEPTED)

    @_unfailing
    def dropped(self, cause: str, source: str) -> None:
        """A connection was closed before its login began; `cause` is one of `metrics.DROP_CAUSES`."""
        self._count(series.DROPPED, cause)
        (self._dropped.get(cause) or self._dropped["other"]).add(source, self._clock())

    @_unfailing
    def accept_error(self, error: OSError) -> None:
        """accept(2) has failed; what it said."""
        self._count(series.ACCEPT_ERRORS)
        self._accept_errno = errno.errorcode.get(error.errno or 0)
        self._accept_errors.add(error.strerror or str(error), self._clock())

    @_unfailing
    def connections(self, pending: int, established: int) -> None:
        """How many connections are open now, before and after their login."""
        if self._metrics is not None:
            self._metrics.set(series.CONNECTIONS, pending, "pending")
            self._metrics.set(series.CONNECTIONS, established, "established")

    # Logins and sessions

    @_unfailing
    def login_refused(
        self, *, source: str, mechanism: str | None, reason: str, seconds: float, timed_out: bool = False
    ) -> None:
        """A handshake has failed.

        Args:
          source: where the peer connects from.
          mechanism: what it tried, where that is known.
          reason: the true one, with what the peer chose in it quoted.
          seconds: how long it took.
          timed_out: whether its time was over.
        """
        self._handshake(mechanism, "timeout" if timed_out else "refused", seconds)
        now = self._clock()
        left = self._refusals_left + max(0.0, now - self._refusals_at) * _REFUSALS_PER_SECOND
        self._refusals_left, self._refusals_at = min(left, _REFUSALS_AT_ONCE), now
        if self._refusals_left < 1:
            self._refused.add(source, now)
            return
        self._refusals_left -= 1
        self._audit.warning(
            "login refused",
            source=source,
            mechanism=mechanism,
            reason=reason,
            timed_out=timed_out,
            seconds=round(seconds, 6),
        )

    @_unfailing
    def login(self, *, session_id: int, source: str, peer: PeerIdentity, wire: str, seconds: float) -> None:
        """A peer has logged in.

        Args:
          session_id: what its `SessionEnd` will have.
          source: where it connects from.
          peer: who it is.
          wire: the wire format's name.
          seconds: how long the handshake took.
        """
        self._handshake(peer.mechanism, "accepted", seconds)
        self._audit.info(
            "login",
            session_id=session_id,
            source=source,
            principal=peer.principal,
            mechanism=peer.mechanism,
            wire=wire,
            flags=_flag_names(peer.flags),
            mutual=peer.mutual,
            enctype=peer.enctype,
            delegated=peer.delegated,
            expires_at=None if peer.expires_at is None else peer.expires_at.isoformat(),
            sid=None if peer.pac is None else peer.pac.sid,
            seconds=round(seconds, 6),
        )

    @_unfailing
    def session_ended(self, end: SessionEnd) -> None:
        """A session has ended. What went over it is only recorded: it is counted by `traffic`."""
        self._count(series.SESSIONS_ENDED, end.outcome)
        peer = end.peer
        tell = self._audit.warning if end.outcome in _UNPLEASANT else self._audit.info
        tell(
            "session ended",
            session_id=end.session_id,
            source=end.source,
            principal=peer.principal,
            mechanism=peer.mechanism,
            flags=_flag_names(peer.flags),
            enctype=peer.enctype,
            sid=None if peer.pac is None else peer.pac.sid,
            outcome=end.outcome,
            error=end.error,
            messages_received=end.messages_received,
            messages_sent=end.messages_sent,
            bytes_received=end.bytes_received,
            bytes_sent=end.bytes_sent,
            seconds=round(end.seconds, 6),
        )

    @_unfailing
    def traffic(self, news: Traffic) -> None:
        """What has gone over channels since the last call: now and then while sessions live, and when they end."""
        # Most sessions that are looked at have nothing to tell, or nothing in one direction.
        if news.messages_received > 0:
            self._count(series.MESSAGES, "received", by=news.messages_received)
            self._count(series.MESSAGE_BYTES, "received", by=max(0, news.bytes_received))
        if news.messages_sent > 0:
            self._count(series.MESSAGES, "sent", by=news.messages_sent)
            self._count(series.MESSAGE_BYTES, "sent", by=max(0, news.bytes_sent))

    @_unfailing
    def unseal_failure(self) -> None:
        """A message did not open."""
        self._count(series.UNSEAL_FAILURES)

    # The server itself

    @_unfailing
    def loop_latency(self, seconds: float) -> None:
        """The event loop turns, and ran what was due so late. Called about every second, or sums are told late."""
        if self._health is not None:
            self._health.heartbeat()
        if self._metrics is not None:
            self._metrics.observe(series.LOOP_LATENCY, seconds)
        self._tell_sums(self._clock())

    @_unfailing
    def ready(self, ready: bool) -> None:
        """Whether the server takes connections: not yet, or no more."""
        if self._health is not None:
            self._health.set_ready(ready)
        if self._metrics is not None:
            self._metrics.set(series.READY, ready)

    @_unfailing
    def close(self) -> None:
        """The server ends: what is only counted so far is told."""
        self._tell_sums(self._clock(), at_once=True)

    # Sums

    def _tell_sums(self, now: float, *, at_once: bool = False) -> None:
        for tally in (*self._dropped.values(), self._accept_errors, self._refused):
            if tally.count and (at_once or tally.next_at <= now):
                tally.tell(now)

    def _tell_dropped(self, cause: str, tally: _Tally) -> None:
        # A load balancer's health checks would be a warning every few seconds for ever.
        tell = self._audit.info if cause == "nothing_said" else self._audit.warning
        tell("connections dropped", cause=cause, count=tally.count, last_source=tally.last)

    def _tell_accept_errors(self, tally: _Tally) -> None:
        self._audit.error("accept failed", cause=tally.last, errno=self._accept_errno, count=tally.count)

    def _tell_refused(self, tally: _Tally) -> None:
        self._audit.warning("more logins refused", count=tally.count, last_source=tally.last)


class _Tally:
    """Counts what is told in sums.

    Args:
      say: tells it.

    Attributes:
      count: how many since they were told.
      last: what is told of the last one.
      next_at: from when on they may be told.
    """

    __slots__ = ("_say", "count", "last", "next_at")

    def __init__(self, say: Callable[[_Tally], None]) -> None:
        self._say = say
        self.count = 0
        self.last = ""
        self.next_at = float("-inf")

    def add(self, last: str, now: float) -> None:
        """One more; told at once, if the last telling is long enough ago."""
        self.count += 1
        self.last = last
        if self.next_at <= now:
            self.tell(now)

    def tell(self, now: float) -> None:
        """Tell how many there were."""
        self._say(self)
        self.count = 0
        self.next_at = now + SUMMARY_INTERVAL


@functools.lru_cache(maxsize=64)
def _flag_names(flags: ContextFlag) -> tuple[str, ...]:
    return tuple(flag.name for flag in flags if flag.name is not None)
