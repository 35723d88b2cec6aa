"""What `triosspi._framing` must do, said in Python as plainly as possible. The tests compare the two; the benchmark too.

It is honest, not fast: one buffer, frames cut from its front. (Cutting the front of a bytearray does not move the rest.)
It has none of the compiled module's promises about memory.
"""

from collections.abc import Iterable, Sequence

MAX_LENGTH = 0xFFFFFFFF


class LengthError(ValueError):
    def __init__(self, length: int, limit: int) -> None:
        super().__init__(length, limit)
        self.length = length
        self.limit = limit


class LayoutError(ValueError):
    def __init__(self, trailer_length: int, record_length: int) -> None:
        super().__init__(trailer_length, record_length)
        self.trailer_length = trailer_length
        self.record_length = record_length


class FrameScanner:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray()
        self._length: int | None = None  # of the frame at the buffer's front, once its header was judged
        self._bad: tuple[int, int] | None = None

    @property
    def limit(self) -> int:
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        if not 0 <= value <= MAX_LENGTH:
            raise ValueError(f"limit out of range: {value}")
        self._limit = value

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"not bytes: {type(data)}")
        self._buffer += data

    def next_frame(self) -> bytes | None:
        if self._bad is not None:
            raise LengthError(*self._bad)
        if self._length is None:
            if len(self._buffer) < 4:
                return None
            length = int.from_bytes(self._buffer[:4], "little")
            if length > self._limit:
                self._bad = (length, self._limit)
                raise LengthError(*self._bad)
            self._length = length
        end = 4 + self._length
        if len(self._buffer) < end:
            return None
        frame = bytes(self._buffer[4:end])
        del self._buffer[:end]
        self._length = None
        return frame

    def frames(self) -> list[bytes]:
        found: list[bytes] = []
        try:
            while (frame := self.next_frame()) is not None:
                found.append(frame)
        except LengthError:
            if not found:
                raise
        return found

    def peek(self, size: int) -> bytes:
        return bytes(self._buffer[:size])

    def take_rest(self) -> bytes:
        rest = bytes(self._buffer)
        self._buffer.clear()
        self._length = None
        return rest

    @property
    def at_boundary(self) -> bool:
        return not self._buffer

    @property
    def buffered(self) -> int:
        return len(self._buffer)


def _u32(length: int) -> bytes:
    if length > MAX_LENGTH:
        raise ValueError(f"{length} does not fit four bytes")
    return length.to_bytes(4, "little")


def pack_frame(payload: bytes) -> bytes:
    return _u32(len(payload)) + payload


def pack_record(trailer: bytes, data: bytes) -> bytes:
    return _u32(len(trailer)) + trailer + data


def pack_framed_records(records: Sequence[tuple[bytes, bytes]]) -> bytes:
    return b"".join(pack_frame(pack_record(trailer, data)) for trailer, data in records)


def sizes_within(values: Iterable[object], least: int, most: int) -> bool:
    return all(isinstance(value, bytes) and least <= len(value) <= most for value in values)


def split_record(record: bytes) -> tuple[bytes, bytes]:
    if len(record) < 4:
        raise LayoutError(-1, len(record))
    trailer_length = int.from_bytes(record[:4], "little")
    if trailer_length > len(record) - 4:
        raise LayoutError(trailer_length, len(record))
    return record[4 : 4 + trailer_length], record[4 + trailer_length :]
