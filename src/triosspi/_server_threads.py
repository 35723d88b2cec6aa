"""The worker threads in which the server does its own work; each is checked to have the server's credentials."""

# Trio's worker threads come from one cache for the whole process, which other libraries and the application use too. While
# a thread impersonates a peer (see `triosspi.impersonation`), a thread that it starts has the peer's credentials for ever,
# and if that one got into the cache, the server might read its keys, its accounts or its configuration with it. That is
# prevented elsewhere; here it is checked, in the thread itself, before the work.
#
# The check is set by the first `Impersonation`, since the rooms that know of credentials stand below the channels in the
# order of imports. Without one no thread has other credentials: nothing is checked, and it costs nothing.

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple, Unpack

import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_check: Callable[[], None] | None = None


def ask_first(check: Callable[[], None]) -> None:
    """Have every thread checked before it does anything here.

    Args:
      check: is called in the thread; it does not return if the thread has other credentials than the server.
    """
    global _check  # noqa: PLW0603 - the process's threads are the process's
    _check = check


async def run_sync(
    function: Callable[[Unpack[Ts]], T],
    *args: *Ts,
    abandon_on_cancel: bool = False,
    limiter: trio.CapacityLimiter | None = None,
) -> T:
    """Run ``function(*args)`` in a worker thread with the server's credentials. See `trio.to_thread.run_sync` for details."""
    if _check is None:
        return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=abandon_on_cancel, limiter=limiter)
    return await trio.to_thread.run_sync(
        _checked, _check, function, args, abandon_on_cancel=abandon_on_cancel, limiter=limiter
    )


def _checked(check: Callable[[], None], function: Callable[[Unpack[Ts]], T], args: tuple[*Ts]) -> T:
    check()
    return function(*args)
