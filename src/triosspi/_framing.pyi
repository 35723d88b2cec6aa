"""Length-prefixed frames and seal buffers: the part of the wire that is bytes only.

A *frame* is ``length | payload``. A *record* is ``trailer_length | trailer | data``, the seal buffer of Microsoft's sample.
Every length is a u32, little-endian (a Windows DWORD), and counts the bytes after itself that it is about.

Nothing here is safe to call from two threads at once.
"""

from collections.abc import Iterable, Sequence
from typing import Final, final

MAX_LENGTH: Final[int]
"""The largest length that four bytes can say: 4,294,967,295."""

class LengthError(ValueError):
    """A frame announces more bytes than the limit allows. The peer's fault, and the end of the stream: where the next
    frame would begin cannot be known without reading what was refused.

    Attributes:
        length: What the header announced, in bytes.
        limit: The limit when that header was read, in bytes.
    """

    length: int
    limit: int
    def __init__(self, length: int, limit: int) -> None: ...

class LayoutError(ValueError):
    """A record that cannot be taken apart: shorter than its first four bytes, or its trailer would not fit it.

    Attributes:
        trailer_length: What the record says of its trailer, in bytes; -1 if it has no room to say it.
        record_length: The length of the whole record, in bytes.
    """

    trailer_length: int
    record_length: int
    def __init__(self, trailer_length: int, record_length: int) -> None: ...

@final
class FrameScanner:
    """Cuts a stream of bytes into frames, in whatever pieces the stream arrives.

    :meth:`feed` only stores; :meth:`next_frame` and :meth:`frames` only read. Received `bytes` are kept as they are and
    frames sliced from them; only a frame that straddles two pieces is gathered. The memory held for an unfinished frame
    is at most about twice what has arrived of it, whatever its header announces. Feeding much before reading is the
    caller's affair: each piece not yet read is an object.

    Args:
        limit: See the attribute.

    Attributes:
        limit: The longest payload that a header may announce, in bytes, 0..:data:`MAX_LENGTH`; anything else is a
            `ValueError`. It may be set at any time and applies to headers not yet read. A header is read when the frames
            before it have been returned, its four bytes are at hand, and `next_frame()` or `frames()` is called: so a
            limit set after a frame was returned by `next_frame()` applies to the next one, even if that is here already.
    """

    limit: int
    def __init__(self, limit: int) -> None: ...
    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Store received bytes. `bytes` are kept without copying; the other types are copied, once.

        Raises:
            TypeError: `data` is something else.
        """

    def next_frame(self) -> bytes | None:
        """Return the payload of the next complete frame, maybe ``b""``; None if more bytes are needed for it.

        Raises:
            LengthError: its header announces more than `limit`. Every later call raises the same, whatever `limit` then is
                and even after `take_rest()`.
            MemoryError: there was no memory for a frame. If what had come of it was lost, every later call raises it.
        """

    def frames(self) -> list[bytes]:
        """Return the payloads of all complete frames at hand, maybe none. All are read under the same `limit`.

        Raises:
            LengthError: as `next_frame()`, if the first header is the bad one. Behind good frames it is raised by the next
                call, and these are returned first.
            MemoryError: as `next_frame()`; frames read in the same call are lost.
        """

    def peek(self, size: int) -> bytes:
        """Return the first bytes of what `take_rest` would return, at most ``size`` of them, and leave all as it is."""

    def take_rest(self) -> bytes:
        """Return all bytes held, as they came, and hold none afterwards.

        That is what was fed and is not part of a frame already returned: an unfinished frame's header and payload so far
        included, and all that was not read yet. For handing over to another protocol, or to whoever reads the stream next.
        """

    @property
    def at_boundary(self) -> bool:
        """True when no bytes are held: the stream may end here without cutting a frame off."""

    @property
    def buffered(self) -> int:
        """How many bytes are held, headers included."""

def sizes_within(values: Iterable[object], least: int, most: int) -> bool:
    """Whether all are `bytes` of at least ``least`` and at most ``most`` bytes.

    Raises:
        OverflowError: a limit is negative, or larger than an object can be.
    """

def pack_frame(payload: bytes) -> bytes:
    """Return ``length | payload``.

    Raises:
        ValueError: the payload is longer than `MAX_LENGTH`.
    """

def pack_record(trailer: bytes, data: bytes) -> bytes:
    """Return ``trailer_length | trailer | data``: what Microsoft's sample sends, without an outer length.

    Raises:
        ValueError: the trailer is longer than `MAX_LENGTH`.
    """

def pack_framed_records(records: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return ``length | trailer_length | trailer | data`` for each ``(trailer, data)``, one after the other.

    `length` counts all of its record that follows it. The whole result is allocated once.

    Raises:
        TypeError: a record is not a tuple of two `bytes`.
        ValueError: a record is longer than `MAX_LENGTH`, or the result longer than an object can be.
    """

def split_record(record: bytes) -> tuple[bytes, bytes]:
    """Take ``trailer_length | trailer | data`` apart into ``(trailer, data)``: the reverse of :func:`pack_record`.

    Raises:
        LayoutError: the record is shorter than four bytes, or its trailer would be longer than what follows these.
    """
