"""The options of channels and streams: described, with their defaults, in this file and nowhere else."""

# They are keywords of everything that makes channels, as Trio has it, and mean the same everywhere: of `SSPIChannel`,
# `SSPIListener`, and of the functions that open and serve them; and likewise those of streams. Those take them as
# `**options`, which type checkers read as the keywords of `ChannelKeywords`, and `takes_options` shows as keywords to
# `help()` and `inspect.signature`.
#
# To add one, add it to a class of options and to its keywords here, and use it where a channel or a stream is made of it.

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypedDict, TypeVar, TypeVarTuple, Unpack, cast

from .. import _server_threads
from ..security.identity import PeerIdentity
from ..session import Protection, check_protection
from ..wire import DEFAULT_MAX_MESSAGE_SIZE, WireFormat, check_max_message_size

T = TypeVar("T")
FunctionT = TypeVar("FunctionT", bound=Callable[..., object])
Ts = TypeVarTuple("Ts")


class RunBlocking(Protocol):
    """Runs a sync function where it may block; `run_in_thread` is one."""

    def __call__(self, sync_fn: Callable[[bytes | None], bytes], token: bytes | None, /) -> Awaitable[bytes]:
        """Run ``sync_fn(token)`` and return its result."""


async def run_in_thread(sync_fn: Callable[[bytes | None], bytes], token: bytes | None, /) -> bytes:
    """Run a handshake's step in one of Trio's worker threads, after a look that it is the server's own.

    A cancelled one is left to itself: a KDC that does not answer may hold it up for a minute, and the
    session of a broken channel is not used again.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionOptions:
    """What channels and streams have in common.

    Args:
      run_blocking: where handshake steps run that may wait for a KDC, DNS or the disk.
      impersonation: what `Endpoint.run_as_peer` runs functions with; None is off. An acceptor's only.
    """

    run_blocking: RunBlocking = run_in_thread
    impersonation: Impersonator | None = None


class ConnectionKeywords(TypedDict, total=False):
    """The same as keywords, for type checkers."""

    run_blocking: RunBlocking
    impersonation: Impersonator | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelOptions(ConnectionOptions):
    """How a channel speaks with its peer.

    Args:
      wire: the format, one of messages; both sides must use the same.
      max_message_size: bytes of plaintext; a peer that announces more is cut off before anything is
          allocated.
      run_blocking: see `ConnectionOptions`.
      impersonation: see `ConnectionOptions`.

    Raises:
      LocalProtocolError: ``max_message_size`` cannot be.
    """

    wire: WireFormat = WireFormat.FRAMED
    max_message_size: int = DEFAULT_MAX_MESSAGE_SIZE

    def __post_init__(self) -> None:
        check_max_message_size(self.max_message_size)

    def keywords(self) -> ChannelKeywords:
        """The same, to be handed on."""
        return cast("ChannelKeywords", _as_keywords(self))


class ChannelKeywords(ConnectionKeywords, total=False):
    """The same as keywords, for type checkers."""

    wire: WireFormat
    max_message_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions(ConnectionOptions):
    """How a stream speaks with its peer.

    Args:
      protection: how data is protected at least: ``"encrypt"``, .NET's EncryptAndSign, or ``"sign"``, its Sign. An acceptor
          refuses a client that asks for less, and encrypts if the client asks for it; an initiator asks for what is said here.
      run_blocking: see `ConnectionOptions`.
      impersonation: see `ConnectionOptions`.

    Raises:
      LocalProtocolError: there is no such protection.
    """

    protection: Protection = "encrypt"

    def __post_init__(self) -> None:
        check_protection(self.protection)

    def keywords(self) -> StreamKeywords:
        """The same, to be handed on."""
        return cast("StreamKeywords", _as_keywords(self))


class StreamKeywords(ConnectionKeywords, total=False):
    """The same as keywords, for type checkers."""

    protection: Protection


def _as_keywords(options: ConnectionOptions) -> dict[str, object]:
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}


def takes_options(kind: type[ConnectionOptions]) -> Callable[[FunctionT], FunctionT]:
    """Decorate what takes ``**options``: `help()` and `inspect.signature` show them as the keywords that they are.

    Args:
      kind: the class of options.
    """
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in dataclasses.fields(kind)
    ]

    def show(function: FunctionT) -> FunctionT:
        signature = inspect.signature(function)
        named = [
            parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD
        ]
        function.__signature__ = signature.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
        return function

    return show
