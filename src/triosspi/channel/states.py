"""The life of a channel, and the only ways in which it goes on."""

#   State                                                      becomes
#   ---------------------------------------------------------  ---------------------------------------------------------
#   NEW        nothing has been done yet                       HANDSHAKE  somebody needs it
#                                                              BROKEN     it was given up
#   HANDSHAKE  a task does it; all others wait for its end     OPEN       it has succeeded
#                                                              STOPPED    the same, and `stop_receiving` was called before
#                                                              BROKEN     it has failed, or was cancelled
#   OPEN       messages, both ways                             STOPPED    `stop_receiving`
#                                                              BROKEN     the peer, the transport or the cryptography
#   STOPPED    messages, our way only                          BROKEN     the same
#   BROKEN     nothing; every use tells the cause              -
#   CLOSED     nothing                                         -
#
# And everything but CLOSED becomes CLOSED, by `aclose`. CLOSED is for ever, and BROKEN never overwrites it: so a task that
# wakes to an error asks first whether that was our own closing.

from __future__ import annotations

import enum
from typing import Final


class State(enum.Enum):
    """See the head of the file."""

    NEW = enum.auto()
    HANDSHAKE = enum.auto()
    OPEN = enum.auto()
    STOPPED = enum.auto()
    BROKEN = enum.auto()
    CLOSED = enum.auto()


# Bound here because looking a member up in its class takes a tenth of a microsecond, and each message asks.
NEW, HANDSHAKE, OPEN, STOPPED, BROKEN, CLOSED = State

BECOMES: Final[dict[State, frozenset[State]]] = {
    NEW: frozenset({HANDSHAKE, BROKEN, CLOSED}),
    HANDSHAKE: frozenset({OPEN, STOPPED, BROKEN, CLOSED}),
    OPEN: frozenset({STOPPED, BROKEN, CLOSED}),
    STOPPED: frozenset({BROKEN, CLOSED}),
    BROKEN: frozenset({CLOSED}),
    CLOSED: frozenset(),
}
