# cython: language_level=3, boundscheck=False, wraparound=False
"""Length-prefixed frames and seal buffers: the part of the wire that is bytes only. See `_framing.pyi`."""

# What this module must achieve: turn what a transport delivers, in whatever pieces, into frames
#
#     length | payload          length is u32 little-endian and counts the payload
#
# and lay out what is sent. It is the one loop that a peer can make run a thousand times per read, so it is compiled;
# and it meets bytes before anyone is authenticated, so it is written as if each came from an attacker.
#
# Why it is hard: a frame lies anywhere across the pieces, its header too, and the obvious solutions each fail at
# something. One growing buffer from whose front frames are cut copies every byte once more than needed. Allocating a
# frame when its header says how long it is lets a peer that sends four bytes make us hold a megabyte, a thousand peers
# a gigabyte. Joining the pieces when the last has come is quadratic if looked at after each, and keeps an object for
# every byte of a trickle. So:
#
#   - The received `bytes` objects are kept as they came. A frame lying whole in one is sliced from it: one copy, which
#     cannot be avoided, since the caller gets an object of its own. (Even that falls away when a piece is one payload.)
#   - Only what straddles pieces is gathered, the header in four bytes of the scanner, the payload in a bytes object
#     that is to be the result. This grows with what has arrived, never with what is announced: at most doubled, so
#     that the copying is linear, and capped at the frame's length, so that the last byte completes it in place.
#   - A piece is let go as soon as nothing of it is unread. What is held for a frame is then at most twice what
#     arrived of it.
#
# Who owns what, and for how long:
#
#   - A piece that was fed belongs to whoever fed it; the scanner holds a reference in `chunk` or `behind`, and never
#     writes to it. `at` points into `chunk` and is set and dropped with it.
#   - `body` is the scanner's alone, with one reference that Cython does not count, from `reserve` until it is returned
#     as a frame, which hands that reference over, or until `take_rest` or `__dealloc__` drops it.
#   - What is returned belongs to the caller; the scanner keeps no reference and no pointer to it. (A piece that is
#     exactly one payload is returned itself: both are immutable.)
#   - The functions that pack and split own nothing beyond their call. They write only to objects made in the same call.
#
# Invariants, true between any two calls:
#
#   - `have_header` is what says that a length is known. Not `length != 0`: a frame of length zero is legal.
#   - `header[:header_have]` are the header's bytes so far, four of them if and only if `have_header`.
#   - `body` is NULL if and only if `body_have` is 0; it is never handed out unfinished.
#   - `chunk` has unread bytes or is None, and is None only if `behind` is empty: `unread` counts the bytes of both.
#   - A header is judged once, by the limit of that moment, when four bytes of it are at hand and the frame before it
#     has been returned; never earlier, since the caller may change the limit in between.
#
# All arithmetic is unsigned (size_t, and uint32_t for what is on the wire), compared before it is used, and written so
# that it cannot wrap: what is subtracted has just been compared, what is added is bounded by what is in memory.
#
# A cdef function that returns an object says by NULL that it raised; the others say `except` or `noexcept`.

cimport cython
from cpython.bytes cimport PyBytes_Check, PyBytes_CheckExact
from cpython.number cimport PyNumber_Index
from cpython.ref cimport Py_CLEAR
from cpython.tuple cimport PyTuple_Check, PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.string cimport memcpy

from collections import deque


include "shared/bytes.pxi"

cdef extern from "Python.h":
    Py_ssize_t size_of "PyBytes_GET_SIZE"(PyObject *object) noexcept

MAX_LENGTH = U32_MAX


class LengthError(ValueError):
    def __init__(self, length, limit):
        super().__init__(length, limit)
        self.length = length
        self.limit = limit

    def __str__(self):
        return f"a frame of {self.length} bytes is announced, and {self.limit} is the limit"


class LayoutError(ValueError):
    def __init__(self, trailer_length, record_length):
        super().__init__(trailer_length, record_length)
        self.trailer_length = trailer_length
        self.record_length = record_length

    def __str__(self):
        if self.trailer_length < 0:
            return f"a record of {self.record_length} bytes has no room for its trailer's length"
        return f"a trailer of {self.trailer_length} bytes does not fit a record of {self.record_length}"


cdef inline byte *store_bytes(byte *at, bytes value) noexcept:
    cdef size_t size = length_of(value)
    memcpy(at, start_of(value), size)
    return at + size


cdef uint32_t checked_limit(object value) except? 0:
    value = PyNumber_Index(value)  # the conversion to C alone would cut 3.5 to 3
    if not 0 <= value <= 0xFFFFFFFF:
        raise ValueError(f"a limit must be in 0..4294967295, not {value!r}")
    return value


@cython.final
cdef class FrameScanner:
    cdef bytes chunk  # the received piece being read; None when all is read
    cdef const byte *at  # the first unread byte of `chunk`
    cdef size_t ahead  # how many bytes of `chunk` are unread
    cdef size_t unread  # how many bytes are unread in `chunk` and all of `behind`
    cdef object behind  # deque of the pieces after `chunk`, none empty; None until there is need of one
    cdef byte[4] header  # the header of the unfinished frame, as it came
    cdef unsigned int header_have  # how many bytes of `header` have come
    cdef bint have_header  # `length` is known and judged (or found bad)
    cdef uint32_t length  # what `header` announces
    cdef PyObject *body  # bytes object, ours alone, in which the unfinished frame's payload gathers; or NULL
    cdef size_t body_have  # how many bytes of `body` have come
    cdef uint32_t max_length  # what the next header may announce
    cdef tuple failure  # (class, *arguments) of what every call raises from now on; None while all is well

    def __init__(self, limit):
        self.max_length = checked_limit(limit)

    def __dealloc__(self):
        Py_CLEAR(self.body)

    @property
    def limit(self):
        return self.max_length

    @limit.setter
    def limit(self, value):
        self.max_length = checked_limit(value)

    @property
    def buffered(self):
        return self.held()

    @property
    def at_boundary(self):
        return self.held() == 0

    def feed(self, data not None):
        cdef bytes piece
        if PyBytes_CheckExact(data):
            piece = <bytes> data
        elif isinstance(data, (bytes, bytearray, memoryview)):
            piece = bytes(data)
        else:
            # Not left to bytes(): bytes(5) is five zeros.
            raise TypeError(f"bytes, bytearray or memoryview expected, not {type(data).__name__}")
        cdef size_t size = length_of(piece)
        if size == 0:
            return
        if self.chunk is None:
            self.start(piece)
        else:
            if self.behind is None:
                self.behind = deque()
            self.behind.append(piece)
        self.unread += size

    def next_frame(self):
        return self.next()

    def frames(self):
        cdef list found = []
        cdef bytes frame
        try:
            frame = self.next()
            while frame is not None:
                found.append(frame)
                frame = self.next()
        except LengthError:
            # It will be raised again: those before it were sent in good faith and come first.
            if not found:
                raise
        return found

    def peek(self, size):
        # Rare, and for a few bytes: what has come of the header, then of the payload, then the pieces behind.
        cdef bytes beginning = <bytes> self.header[:self.header_have]
        if self.body is not NULL:
            beginning += cut(<const byte *> bytes_of(self.body), min(self.body_have, <size_t> size))
        if self.chunk is not None:
            beginning += cut(self.at, min(self.ahead, <size_t> size))
        for piece in self.behind or ():
            if length_of(beginning) >= <size_t> size:
                break
            beginning += <bytes> piece
        return beginning[:size]

    def take_rest(self):
        cdef bytes rest = cut(NULL, self.held())
        cdef byte *to = start_of(rest)
        memcpy(to, self.header, self.header_have)
        to += self.header_have
        if self.body is not NULL:
            memcpy(to, bytes_of(self.body), self.body_have)
            to += self.body_have
        if self.chunk is not None:
            memcpy(to, self.at, self.ahead)
            to += self.ahead
        if self.behind is not None:
            for piece in self.behind:
                to = store_bytes(to, <bytes> piece)
            self.behind = None
        self.chunk = None
        self.ahead = 0
        self.unread = 0
        self.forget_frame()
        Py_CLEAR(self.body)
        return rest

    cdef size_t held(self) noexcept:
        return self.header_have + self.body_have + self.unread

    cdef void start(self, bytes piece) noexcept:
        """Make this the piece being read."""
        self.chunk = piece
        self.at = start_of(piece)
        self.ahead = length_of(piece)

    cdef int advance(self, size_t count) except -1:
        """Count bytes of `chunk` are read, at most `ahead`: let it go if they were its last."""
        self.at += count
        self.ahead -= count
        self.unread -= count
        if self.ahead == 0:
            if self.behind:
                self.start(self.behind.popleft())
            else:
                self.chunk = None
        return 0

    cdef void forget_frame(self) noexcept:
        """The unfinished frame is finished, or given away."""
        self.header_have = 0
        self.have_header = False
        self.body_have = 0

    cdef bytes next(self):
        """The next complete frame, or None."""
        cdef bytes frame
        cdef uint32_t length
        if self.failure is not None:
            self.fail()
        if self.header_have == 0 and self.ahead >= 4:
            # Nearly every frame goes this way: header and payload whole within the chunk.
            length = load_u32(self.at)
            if length <= self.max_length and length <= self.ahead - 4:
                frame = cut(self.at + 4, length)
                self.advance(<size_t> 4 + length)
                return frame
        if not self.have_header and not self.gather_header():
            return None
        if self.body_have == 0 and self.length <= self.ahead:
            # The header came apart from the payload, and the payload in one piece.
            if self.length == 0:
                self.forget_frame()  # no advance(): there may be no chunk
                return b""
            if self.length == length_of(self.chunk):
                frame = self.chunk
            else:
                frame = cut(self.at, self.length)
            self.advance(self.length)
            self.forget_frame()
            return frame
        return self.gather_body()

    cdef int fail(self) except -1:
        # A new exception each time: one raised again and again would gather tracebacks, and keep their frames alive.
        raise self.failure[0](*self.failure[1:])

    cdef bint gather_header(self) except -1:
        """Read what there is of the header; True when it is whole, and within the limit."""
        cdef size_t count
        while self.header_have < 4:
            if self.chunk is None:
                return False
            count = min(<size_t> (4 - self.header_have), self.ahead)
            memcpy(self.header + self.header_have, self.at, count)
            self.header_have += <unsigned int> count
            self.advance(count)
        self.have_header = True
        self.length = load_u32(self.header)
        if self.length > self.max_length:
            self.failure = (LengthError, self.length, self.max_length)
            self.fail()
        return True

    cdef bytes gather_body(self):
        """Move what there is of the payload, never empty, to `body`; the frame when that was the last of it."""
        cdef size_t count
        cdef bytes frame
        while self.body_have < self.length:
            if self.chunk is None:
                return None
            count = min(self.length - self.body_have, self.ahead)
            self.reserve(count)
            memcpy(bytes_of(self.body) + self.body_have, self.at, count)
            self.body_have += count
            self.advance(count)
        frame = <bytes> self.body  # a second reference; the next line drops ours
        Py_CLEAR(self.body)
        self.forget_frame()
        return frame

    cdef int reserve(self, size_t count) except -1:
        """Make room in `body` for count more bytes, which are at hand: at most twice what has then arrived."""
        cdef size_t needed = self.body_have + count
        cdef size_t room = 0 if self.body is NULL else <size_t> size_of(self.body)
        if needed <= room:
            return 0
        # All that is at hand is room well spent: more of this frame may wait in `behind`.
        room = min(<size_t> self.length, max(2 * room, self.body_have + self.unread))
        if room > OBJECT_MAX:
            room = needed
        if self.body is NULL:
            self.body = new_bytes(NULL, <Py_ssize_t> room)
            return 0
        try:
            resize_bytes(&self.body, <Py_ssize_t> room)
        except MemoryError:
            # The old body is gone too, and with it the place in the stream: reading on would take payload for headers.
            self.body_have = 0
            self.failure = (MemoryError,)
            raise
        return 0


cdef uint32_t checked_u32(size_t size, str what) except? 0:
    if size > U32_MAX:
        raise ValueError(f"{what} of {size} bytes does not fit a length of four bytes")
    return <uint32_t> size


def sizes_within(values, size_t least, size_t most):
    cdef object value
    cdef size_t size
    for value in values:
        if not PyBytes_Check(value):
            return False
        size = length_of(<bytes> value)
        if size < least or size > most:
            return False
    return True


def pack_frame(bytes payload not None):
    cdef uint32_t length = checked_u32(length_of(payload), "a payload")
    cdef bytes packed = cut(NULL, checked_sum(4, length_of(payload)))
    store_bytes(store_u32(start_of(packed), length), payload)
    return packed


def pack_record(bytes trailer not None, bytes data not None):
    cdef uint32_t trailer_length = checked_u32(length_of(trailer), "a trailer")
    cdef bytes packed = cut(NULL, checked_sum(checked_sum(4, length_of(trailer)), length_of(data)))
    store_bytes(store_bytes(store_u32(start_of(packed), trailer_length), trailer), data)
    return packed


cdef int check_record(object record) except -1:
    if not PyTuple_Check(record) or PyTuple_GET_SIZE(record) != 2:
        raise TypeError("each record must be a tuple of two: (trailer, data)")
    if not PyBytes_CheckExact(<object> PyTuple_GET_ITEM(record, 0)):
        raise TypeError("a record's trailer must be bytes")
    if not PyBytes_CheckExact(<object> PyTuple_GET_ITEM(record, 1)):
        raise TypeError("a record's data must be bytes")
    return 0


def pack_framed_records(records):
    # A tuple of our own: the records measured first must be the records written afterwards.
    cdef tuple pairs = tuple(records)
    cdef object pair
    cdef bytes trailer, data, packed
    cdef size_t total = 0, size
    cdef byte *to
    for pair in pairs:
        check_record(pair)
        trailer = <bytes> PyTuple_GET_ITEM(pair, 0)
        data = <bytes> PyTuple_GET_ITEM(pair, 1)
        size = checked_sum(checked_sum(4, length_of(trailer)), length_of(data))
        checked_u32(size, "a record")
        total = checked_sum(checked_sum(total, 4), size)
    packed = cut(NULL, total)
    to = start_of(packed)
    for pair in pairs:
        trailer = <bytes> PyTuple_GET_ITEM(pair, 0)
        data = <bytes> PyTuple_GET_ITEM(pair, 1)
        # Neither narrowing loses anything: the whole record's size was found to fit above.
        to = store_u32(to, <uint32_t> (4 + length_of(trailer) + length_of(data)))
        to = store_u32(to, <uint32_t> length_of(trailer))
        to = store_bytes(to, trailer)
        to = store_bytes(to, data)
    return packed


def split_record(bytes record not None):
    cdef size_t size = length_of(record)
    if size < 4:
        raise LayoutError(-1, size)
    cdef const byte *start = start_of(record)
    cdef uint32_t trailer_length = load_u32(start)
    if trailer_length > size - 4:
        raise LayoutError(trailer_length, size)
    return cut(start + 4, trailer_length), cut(start + 4 + trailer_length, size - 4 - trailer_length)
