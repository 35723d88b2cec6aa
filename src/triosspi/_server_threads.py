"""The worker threads in which the server does its own work, and that they are the server."""

# Trio's worker threads come from one cache for the whole process: what other libraries and the application do in threads
# is done there too. Where some of the process's threads are somebody else for a while (see `triosspi.impersonation`), a
# thread that such a one had started would be that somebody for ever, and might be the next that the server reads its keys,
# its accounts or its configuration with. So that is asked in the thread itself, before the work.
#
# Who asks is set from below, by the first `Impersonation`: what knows of ids stands under the channels. Without one there
# is nobody else to be, nothing is asked, and it costs nothing.

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple, Unpack

import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_check: Callable[[], None] | None = None


def ask_first(check: Callable[[], None]) -> None:
    """Have every thread be looked at before it does anything here.

    Args:
      check: is called in the thread; it does not return if that is not the server.
    """
    global _check  # noqa: PLW0603 - the process's threads are the process's
    _check = check


async def run_sync(
    function: Callable[[Unpack[Ts]], T],
    *args: *Ts,
    abandon_on_cancel: bool = False,
    limiter: trio.CapacityLimiter | None = None,
) -> T:
    """Run ``function(*args)`` in a worker thread that is the server. See `trio.to_thread.run_sync` for details."""
    if _check is None:
        return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=abandon_on_cancel, limiter=limiter)
    return await trio.to_thread.run_sync(
        _checked, _check, function, args, abandon_on_cancel=abandon_on_cancel, limiter=limiter
    )


def _checked(check: Callable[[], None], function: Callable[[Unpack[Ts]], T], args: tuple[*Ts]) -> T:
    check()
    return function(*args)
