"""The exceptions of triosspi.

There are two culprits, and the class says which: `LocalProtocolError` when *this* program asked for
something that the wire format or the state does not allow, `RemoteProtocolError` when the peer (or
whoever sits between) sent something that cannot be accepted. `ConfigurationError` comes before any
connection exists. All are `SSPIError`.

Channels translate, as Trio's streams do: what the peer did surfaces as
`trio.BrokenResourceError` whose ``__cause__`` is the `RemoteProtocolError`. So a caller who only wants
to know *that* a connection is gone catches Trio's exception, and one who wants to know *why* looks at
its cause; fields, not texts, carry what a program may want to decide by.

Nothing in these texts is secret: no token, key, hash or password, and no text that a peer chose
except through `printable`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


def printable(text: object, limit: int = 64) -> str:
    """Quote text that a peer may have chosen, for a log line: one line, short, no control characters.

    Without this a user name with a line feed in it could forge a second log line.
    """
    quoted = ascii(text)
    return quoted if len(quoted) <= limit else quoted[:limit] + "...'"


def linked(exc: BaseException) -> Iterator[BaseException]:
    """An exception, and all that hangs on it: causes, contexts, and what groups hold; each once."""
    seen: set[int] = set()
    left: list[BaseException | None] = [exc]
    while left:
        current = left.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        left += [current.__cause__, current.__context__]
        if isinstance(current, BaseExceptionGroup):
            left += current.exceptions


def without_frames(exc: E) -> E:
    """Take from an exception, and from all that is chained to it, the frames that it came through.

    Frames hold arguments and locals, of which some error reporters show all. ``raise ... from None`` is
    no help: it hides the context and keeps it.
    """
    for found in linked(exc):
        found.__traceback__ = None
    return exc


def handles_secrets(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function whose arguments or locals are secret: its `ConfigurationError` shows none of them."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except ConfigurationError as exc:
            error = without_frames(exc)
        # This frame will be in the traceback too.
        del args, kwargs
        error.__cause__ = error.__context__ = None
        raise error

    return wrapper


class SSPIError(Exception):
    """The root of every exception that is triosspi's own."""


class ConfigurationError(SSPIError, ValueError):
    """An option or a file that cannot be used as it is; the text says what to change."""


class LocalProtocolError(SSPIError, ValueError):
    """This program asked for what the wire format or the channel's state does not allow.

    Nothing was sealed or sent, and the channel is as usable as before.
    """


class MessageTooLongError(LocalProtocolError):
    """A message is longer than the wire format or the channel's limit allows.

    Attributes:
      length (int): the message's length in bytes.
      limit (int): the most that could be sent, in bytes.
    """

    def __init__(self, length: int, limit: int) -> None:
        super().__init__(f"a message of {length} bytes is longer than the {limit} bytes allowed here")
        self.length = length
        self.limit = limit


class ImpersonationError(SSPIError):
    """A peer could not be impersonated: it has no account here, or none that it may have, or the switch failed.

    The function was not called, and the channel is as usable as before.
    """


class RemoteProtocolError(SSPIError):
    """The peer, or the network between, did something that cannot be accepted."""


class FrameTooLongError(RemoteProtocolError):
    """The peer announced a token or a record longer than the limit; nothing was allocated for it.

    Attributes:
      length (int): the announced length in bytes.
      limit (int): the most that would have been accepted, in bytes.
    """

    def __init__(self, length: int, limit: int) -> None:
        super().__init__(f"the peer announced {length} bytes where at most {limit} are accepted")
        self.length = length
        self.limit = limit


class TruncatedError(RemoteProtocolError):
    """The connection ended where it should not have.

    Attributes:
      at_boundary (bool): True when it ended between two records. Some peers cannot say goodbye
          (gss-ntlmssp cannot seal an empty message), so this alone is an ordinary end to many
          programs; but it is not authenticated, and may be an attacker's cut. An end within a
          record (False) is never ordinary.
      nothing_said (bool): True when the peer had not sent a single byte, as a health check does that
          only connects, whether it then ends the connection or resets it.
    """

    def __init__(self, text: str, *, at_boundary: bool, nothing_said: bool = False) -> None:
        super().__init__(text)
        self.at_boundary = at_boundary
        self.nothing_said = nothing_said


class UnsealError(RemoteProtocolError):
    """A sealed message did not open: altered, replayed, out of order, or not encrypted at all.

    The security context is poisoned by it (both NTLM and Kerberos count messages), so the
    connection is broken for good.
    """


class TicketExpiredError(UnsealError):
    """The peer's Kerberos ticket has ended, and with it the session. Nobody has tampered with anything."""


class AuthenticationError(RemoteProtocolError):
    """The handshake failed.

    The text is for the operator's log. Nothing of it may be told to the peer, who could tell from
    it a wrong password from an unknown account.

    Attributes:
      mechanism (str | None): ``"ntlm"`` or ``"kerberos"``, where the handshake had come to one.
      principal (str | None): as whom the peer tried to log in by NTLM, where it came to that: an account's own name, or
          the name that the peer chose, of any length and whatever is in it, if there is none. To count by, not to be shown.
      untrusted (bool): not the login was refused, but what it was for: another service, or messages less protected than is
          demanded here. Some wire formats tell the peer that much, see `triosspi.wire.negotiate_stream`.
    """

    def __init__(
        self, text: str = "", *, mechanism: str | None = None, principal: str | None = None, untrusted: bool = False
    ) -> None:
        super().__init__(text)
        self.mechanism = mechanism
        self.principal = principal
        self.untrusted = untrusted


# What NegotiateStream peers say, by the codes of winerror.h.
_REFUSALS = {
    5: "ERROR_ACCESS_DENIED: not allowed",
    1326: "ERROR_LOGON_FAILURE: unknown user or wrong password",
    1790: "ERROR_TRUST_FAILURE: the target name, the impersonation level or the protection level is not accepted there",
    0x80090302: "SEC_E_UNSUPPORTED_FUNCTION: what was asked for is not supported there",
    0x80090303: "SEC_E_TARGET_UNKNOWN: the target name is not known there",
    0x80090304: "SEC_E_INTERNAL_ERROR: an error of the peer's own",
    0x80090305: "SEC_E_SECPKG_NOT_FOUND: the mechanism is not supported there",
    0x80090308: "SEC_E_INVALID_TOKEN: our token was not understood",
    0x8009030C: "SEC_E_LOGON_DENIED: unknown user or wrong password",
    0x8009030D: "SEC_E_UNKNOWN_CREDENTIALS: the credentials were not recognised",
    0x8009030E: "SEC_E_NO_CREDENTIALS: the peer has no credentials of its own",
    0x8009030F: "SEC_E_MESSAGE_ALTERED: our token was altered on its way",
    0x80090311: "SEC_E_NO_AUTHENTICATING_AUTHORITY: the peer reaches no domain controller",
    0x80090322: "SEC_E_WRONG_PRINCIPAL: the target name is not the peer's",
    0x80090324: "SEC_E_TIME_SKEW: the clocks are too far apart",
    0x80090346: "SEC_E_BAD_BINDINGS: the channel bindings do not match",
}


class PeerRefusalError(AuthenticationError):
    """The peer has said that the handshake has failed, where the wire format lets it ([MS-NNS] 2.2.1).

    Attributes:
      code (int | None): the HRESULT or Win32 code that it gave, unsigned; None where it gave none.
    """

    def __init__(self, code: int | None) -> None:
        if code is None:
            why = "it gave no reason"
        else:
            # Small numbers are Win32's, and written as such.
            number = str(code) if code <= 0xFFFF else f"{code:#010x}"
            why = _REFUSALS.get(code, "no code that is known here") + f" ({number})"
        super().__init__(f"the peer refuses the login: {why}")
        self.code = code


class ForeignProtocolError(AuthenticationError):
    """The connection began with what cannot become a handshake: the peer speaks another protocol, or another wire format.

    Attributes:
      looks_like (str | None): what it looked like, in words for an operator: ``"an HTTP request"``; None where that cannot
          be told.
    """

    def __init__(self, looks_like: str | None) -> None:
        what = "" if looks_like is None else f": it looks like {looks_like}"
        super().__init__(f"the connection does not begin with a handshake token{what}")
        self.looks_like = looks_like
