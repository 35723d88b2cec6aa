"""How logins fail and sessions end: what an exception means, in words that logs and counters share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import trio

from .._errors import AuthenticationError, ImpersonationError, TicketExpiredError, TruncatedError, UnsealError, linked

Outcome = Literal[
    "goodbye",
    "peer_closed",
    "finished",
    "lost",
    "handler_error",
    "idle",
    "expired",
    "age",
    "bytes",
    "messages",
    "shutdown",
]


@dataclass(frozen=True, slots=True)
class End:
    """How a session ended.

    Attributes:
      outcome: in a word.
      error: what was wrong, in words that hold nothing secret; None where nothing was.
      forged: why a message did not open, if one did not. Kept beside an error of the handler's too: an attacker must not be
        able to hide tampering behind such an error.
    """

    outcome: Outcome
    error: str | None = None
    forged: str | None = None


@dataclass(frozen=True, slots=True)
class LoginFailure:
    """Why a peer has not logged in.

    Attributes:
      kind: ``"nothing_said"``: it left before its first byte, as health checks and port scanners do, by the thousand;
        ``"left"``: it left, or the connection broke; ``"refused"``: its login was; ``"timeout"``; ``"error"``: one of ours.
      reason: for an operator; the peer is told nothing.
      error: the refusal, where it was one.
    """

    kind: Literal["nothing_said", "left", "refused", "timeout", "error"]
    reason: str
    error: AuthenticationError | None = None


def login_failure(exc: trio.BrokenResourceError | AuthenticationError) -> LoginFailure:
    """What it means that a handshake has raised this."""
    cause = exc if isinstance(exc, AuthenticationError) else exc.__cause__
    if isinstance(cause, AuthenticationError):
        return LoginFailure("refused", str(exc), cause)
    if isinstance(cause, TruncatedError) and cause.nothing_said:
        return LoginFailure("nothing_said", str(exc))
    return LoginFailure("left" if isinstance(cause, (TruncatedError, OSError)) else "refused", str(exc))


def connection_end(exc: Exception, *, closed: bool = False) -> Exception | None:
    """The end of the connection that a handler ran into, if that is all that it raised.

    Where a group holds several, it is the worst: a message that did not open before a connection that was
    lost, and that before a peer that left.

    Args:
      exc: what it raised.
      closed: whether somebody else than the handler may have closed the channel.
    """
    ends = list(_leaves(exc))
    return max(ends, key=_gravity) if all(_is_end(end, closed=closed) for end in ends) else None


def impersonation_refused(exc: Exception, *, closed: bool = False) -> ImpersonationError | None:
    """That a peer could not be impersonated, if that is all that a handler raised, but for ends of the connection."""
    refused = None
    for leaf in _leaves(exc):
        if isinstance(leaf, ImpersonationError):
            refused = refused or leaf
        elif not _is_end(leaf, closed=closed):
            return None
    return refused


def tampering(exc: BaseException) -> UnsealError | None:
    """The message that did not open, if one is behind what a handler raised, in whatever it was wrapped."""
    for found in linked(exc):
        if isinstance(found, UnsealError) and not isinstance(found, TicketExpiredError):
            return found
    return None


def is_ordinary_end(exc: Exception) -> bool:
    """Whether a peer that simply was done raises this: a goodbye, or an end between two messages.

    The latter because some peers cannot say goodbye. An application that must tell it from an attacker's cut
    looks at `TruncatedError.at_boundary`.
    """
    cause = exc.__cause__
    if isinstance(cause, TruncatedError):
        return cause.at_boundary
    return isinstance(exc, trio.EndOfChannel) or isinstance(cause, trio.EndOfChannel)


def _leaves(exc: Exception) -> Iterator[Exception]:
    """What a group holds, however deep; an exception that is none holds itself."""
    if isinstance(exc, ExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc


def _is_end(exc: Exception, *, closed: bool) -> bool:
    ended = isinstance(exc, (trio.BrokenResourceError, trio.EndOfChannel))
    return ended or (closed and isinstance(exc, trio.ClosedResourceError))


def _gravity(end: Exception) -> int:
    if tampering(end) is not None:
        return 2
    return int(not is_ordinary_end(end) and not isinstance(end, trio.ClosedResourceError))
