"""The end of a server, as its handlers can see it."""

from __future__ import annotations

import trio

_shutdown: trio.lowlevel.RunVar[trio.Event] = trio.lowlevel.RunVar("triosspi.service.shutting_down")


def shutting_down() -> trio.Event:
    """The event that is set when this server begins to stop.

    A handler that only answers needs none of this: while the server stops, its next `receive` raises
    `trio.EndOfChannel`. One that sends by itself, or works long, looks at ``shutting_down().is_set()``
    or awaits ``shutting_down().wait()``; when the server's grace is over it is cancelled.

    Raises:
      RuntimeError: outside of `trio.run`.
    """
    try:
        return _shutdown.get()
    except LookupError:
        event = trio.Event()
        _shutdown.set(event)
        return event
