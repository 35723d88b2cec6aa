"""What each side of a session may still say, and the only ways in which that changes."""

# The two directions end separately, so each has its state, and a session is a pair of them.
#
#   Ours: what we may say              becomes
#   ---------------------------------  -----------------------------------------------------------------------------
#   HANDSHAKE  tokens                  MESSAGES   the context is established
#                                      SAID_ALL   the same, where the format leaves this side nothing to say
#   MESSAGES   sealed messages         SAID_ALL   our goodbye was sealed, or the format's one message
#   SAID_ALL   nothing                 -
#
#   Theirs: what we may hear           becomes
#   ---------------------------------  -----------------------------------------------------------------------------
#   HANDSHAKE  tokens                  UNPROVEN   established, and the peer may not have the session's key
#                                      PROVEN     established by a last token of an acceptor, which shows that it has
#                                      MUTE       established, and the format leaves the peer nothing to say
#   UNPROVEN   messages                PROVEN     the first of them has opened
#                                      LEAVING    the first of them was a goodbye, or the format's one message
#                                      MUTE       the stream has ended without one, in a format that has no goodbye
#                                      UNHEARD    it did not open, or the stream has ended without one
#   PROVEN     messages                LEAVING    a goodbye has opened, or the format's one message
#                                      ENDED      the stream has ended, in a format that has no goodbye
#                                      FAILED     one did not open, or the stream has ended without a goodbye
#   LEAVING    nothing; what came      ENDED      that was handed over
#              before it was not
#              handed over yet
#   ENDED      nothing                 -
#   MUTE       nothing                 -
#   UNHEARD    nothing                 -
#   FAILED     nothing                 -          what opened before may still be acted on
#
# A handshake that fails has no state here: the security context refuses every further step by itself.

from __future__ import annotations

import enum
from typing import Final


class Ours(enum.Enum):
    """What this side may say."""

    HANDSHAKE = enum.auto()
    MESSAGES = enum.auto()
    SAID_ALL = enum.auto()


class Theirs(enum.Enum):
    """What may be heard from the peer."""

    HANDSHAKE = enum.auto()
    UNPROVEN = enum.auto()
    PROVEN = enum.auto()
    LEAVING = enum.auto()
    ENDED = enum.auto()
    MUTE = enum.auto()
    UNHEARD = enum.auto()
    FAILED = enum.auto()


OURS_BECOMES: Final[dict[Ours, frozenset[Ours]]] = {
    Ours.HANDSHAKE: frozenset({Ours.MESSAGES, Ours.SAID_ALL}),
    Ours.MESSAGES: frozenset({Ours.SAID_ALL}),
    Ours.SAID_ALL: frozenset(),
}

THEIRS_BECOMES: Final[dict[Theirs, frozenset[Theirs]]] = {
    Theirs.HANDSHAKE: frozenset({Theirs.UNPROVEN, Theirs.PROVEN, Theirs.MUTE}),
    Theirs.UNPROVEN: frozenset({Theirs.PROVEN, Theirs.LEAVING, Theirs.MUTE, Theirs.UNHEARD}),
    Theirs.PROVEN: frozenset({Theirs.LEAVING, Theirs.ENDED, Theirs.FAILED}),
    Theirs.LEAVING: frozenset({Theirs.ENDED}),
    Theirs.ENDED: frozenset(),
    Theirs.MUTE: frozenset(),
    Theirs.UNHEARD: frozenset(),
    Theirs.FAILED: frozenset(),
}

#: In these the peer's bytes are looked at for messages.
HEARING: Final = frozenset({Theirs.UNPROVEN, Theirs.PROVEN})
#: In these there is no more to come, and nothing is wrong with that.
OVER: Final = frozenset({Theirs.ENDED, Theirs.MUTE})
#: In these something of the peer's has opened, or its last token has shown as much.
PROVED: Final = frozenset({Theirs.PROVEN, Theirs.LEAVING, Theirs.ENDED, Theirs.FAILED})
