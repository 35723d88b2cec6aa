"""The end of a connection that both sides were content with: goodbye, FIN, and the peer's last bytes."""

# Closing a TCP socket with unread input makes the kernel send RST, which destroys what the peer has not read
# yet, replies that were sent long before included. So: goodbye, FIN, read until the peer's FIN, close; all of it bounded,
# since the peer may be hostile. The reading begins with the goodbye, in a task of its own: two sides that close with full
# buffers would each wait for the other to read first, until their time was up, and reset each other.
#
# A task that is blocked in `receive` at that moment keeps the transport's receiving side; it is left there, and wakes with
# the peer's FIN or when the time is up. A cancel scope around each read would wake it at once, and cost every read of every
# connection.

from __future__ import annotations

from typing import Final

import trio

from .._errors import SSPIError

#: Seconds that are given to a peer that does not read the goodbye.
GOODBYE_TIMEOUT: Final = 1.0
#: Seconds and bytes: how long the peer's end is waited for, and how much is read meanwhile.
DRAIN_TIMEOUT: Final = 1.0
DRAIN_LIMIT: Final = 1024 * 1024

# What a transport raises when it is of no use any more, in its own words or in ours: it may be an adapter around another
# channel. Taken literally, an EndOfChannel would be our peer's sealed goodbye, a LocalProtocolError would promise that
# nothing was sent, and a BusyResourceError that nothing has happened.
LOST: Final = (
    SSPIError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.BusyResourceError,
    trio.EndOfChannel,
    OSError,
)


async def part(stream: trio.abc.Stream, goodbye: bytes, receiver_gone: trio.Event | None) -> None:
    """Send the goodbye and the end of the stream, and read until the peer's end.

    Args:
      stream: the transport; closing it is left to the caller.
      goodbye: may be empty, where the wire format has none.
      receiver_gone: where a task is reading, it is set when that task has left.

    Raises:
      Exception: what the transport should not have raised; that it is lost is no error here.
    """
    failures: list[Exception] = []
    # One scope for both: as long as the goodbye is not out, until its time is up, and from then on the drain's.
    async with trio.open_nursery() as nursery:
        scope = nursery.cancel_scope
        scope.deadline = trio.current_time() + GOODBYE_TIMEOUT
        nursery.start_soon(_drain, stream, receiver_gone, scope, failures)
        try:
            if goodbye:
                await stream.send_all(goodbye)
            if isinstance(stream, trio.abc.HalfCloseableStream):
                await stream.send_eof()
        except LOST:
            scope.cancel()
        except Exception as exc:  # noqa: BLE001 - raised below, in no group
            failures.append(exc)
            scope.cancel()
        else:
            scope.deadline = trio.current_time() + DRAIN_TIMEOUT
    if failures:
        raise failures[0]


async def _drain(
    stream: trio.abc.Stream, receiver_gone: trio.Event | None, scope: trio.CancelScope, failures: list[Exception]
) -> None:
    try:
        if receiver_gone is not None:
            await receiver_gone.wait()
        drained = 0
        while drained < DRAIN_LIMIT and (data := await stream.receive_some()):
            drained += len(data)
    except LOST:
        # What is still to be sent may get through, or finds out itself.
        pass
    except Exception as exc:  # noqa: BLE001 - raised by `part`, in no group
        failures.append(exc)
        scope.cancel()
