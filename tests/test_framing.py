"""`triosspi._framing` against its reference in `framing_oracle.py`, and what only the compiled module promises."""

import gc
import inspect
import pickle
import random
import sys
import time
import tracemalloc
from collections import namedtuple
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import framing_oracle as oracle
from compiling import compile_without_a_warning
from triosspi import _framing as compiled

ROOT = Path(__file__).resolve().parent.parent
CAP = 300
HOSTILE = [CAP + 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]

both = pytest.mark.parametrize("framing", [compiled, oracle], ids=["compiled", "oracle"])


def header(length: int) -> bytes:
    return length.to_bytes(4, "little")


def length_error(framing: ModuleType, call: Any) -> Any:
    with pytest.raises(framing.LengthError) as caught:
        call()
    return caught.value


def scanner_with(framing: ModuleType, data: bytes, limit: int = CAP) -> Any:
    scanner = framing.FrameScanner(limit)
    scanner.feed(data)
    return scanner


# ---- the same events for the same bytes ----


def attempt(call: Any) -> Any:
    """What a call returned or raised, comparable between the two modules."""
    try:
        return call()
    except ValueError as error:
        return (type(error).__name__, error.args)


def events(framing: ModuleType, pieces: list[bytes], *, singly: bool) -> list[Any]:
    scanner = framing.FrameScanner(CAP)
    seen: list[Any] = []
    for piece in pieces:
        scanner.feed(piece)
        if singly:
            while True:
                event = attempt(scanner.next_frame)
                if event is None:
                    break
                seen.append(event)
                if isinstance(event, tuple):
                    break
        else:
            seen.append(attempt(scanner.frames))
        seen.append((scanner.buffered, scanner.at_boundary))
    seen.append(scanner.take_rest())
    return seen


def a_stream(rng: random.Random) -> bytes:
    parts = []
    for _ in range(rng.randrange(12)):
        length = rng.choice([0, 1, 2, 3, 4, 5, CAP - 1, CAP, rng.randrange(CAP)])
        parts.append(header(length) + rng.randbytes(length))
    end = rng.choice(["clean", "clean", "hostile", "cut header", "cut payload"])
    if end == "hostile":
        parts.append(header(rng.choice(HOSTILE)) + rng.randbytes(rng.randrange(20)))
    elif end == "cut header":
        parts.append(header(rng.randrange(CAP))[: rng.randrange(1, 4)])
    elif end == "cut payload":
        parts.append(header(40) + rng.randbytes(rng.randrange(40)))
    return b"".join(parts)


def cut(rng: random.Random, data: bytes) -> list[bytes]:
    pieces = []
    while data:
        size = rng.choice([1, 2, 3, 4, 5, 7, 60, 400])
        pieces.append(data[:size])
        data = data[size:]
    return pieces


@pytest.mark.parametrize("singly", [True, False], ids=["next_frame", "frames"])
@pytest.mark.parametrize("manner", ["whole", "byte by byte", "random pieces", "each frame's header apart"])
def test_same_events_as_the_oracle_however_the_bytes_arrive(manner: str, singly: bool) -> None:
    for seed in range(150):
        rng = random.Random(seed)
        data = a_stream(rng)
        if manner == "whole":
            pieces = [data]
        elif manner == "byte by byte":
            pieces = [data[i : i + 1] for i in range(len(data))]
        elif manner == "random pieces":
            pieces = cut(rng, data)
        else:
            pieces, at = [], 0
            while at < len(data):
                length = int.from_bytes(data[at : at + 4], "little")
                pieces += [data[at : at + 4], data[at + 4 : at + 4 + length]]
                at += 4 + length
        assert events(compiled, pieces, singly=singly) == events(oracle, pieces, singly=singly), f"seed {seed}"


frame_bytes = st.one_of(
    st.binary(max_size=40).map(compiled.pack_frame),
    st.sampled_from([header(length) for length in [0, CAP, *HOSTILE]]),
    st.binary(max_size=6),
)
operations = st.one_of(
    st.tuples(
        st.just("feed"),
        st.lists(frame_bytes, max_size=4).map(b"".join),
        st.sampled_from([bytes, bytearray, memoryview]),
    ),
    st.tuples(st.just("feed"), st.binary(max_size=3), st.just(bytes)),
    st.tuples(st.just("next_frame")),
    st.tuples(st.just("next_frame")),
    st.tuples(st.just("frames")),
    st.tuples(st.just("take_rest")),
    st.tuples(st.just("limit"), st.sampled_from([0, 1, 10, CAP, 0x7FFFFFFF, 0xFFFFFFFF])),
)


@settings(derandomize=True, max_examples=600, deadline=None)
@given(st.lists(operations, max_size=30))
def test_same_events_as_the_oracle_for_any_order_of_calls(program: list[tuple[Any, ...]]) -> None:
    ours, theirs = compiled.FrameScanner(CAP), oracle.FrameScanner(CAP)
    for name, *arguments in program:
        if name == "feed":
            data, kind = arguments
            ours.feed(kind(data))
            theirs.feed(kind(data))
        elif name == "limit":
            ours.limit = theirs.limit = arguments[0]
        else:
            assert attempt(getattr(ours, name)) == attempt(getattr(theirs, name))
        assert (ours.buffered, ours.at_boundary) == (theirs.buffered, theirs.at_boundary)
    assert ours.take_rest() == theirs.take_rest()


# ---- lengths ----


@both
@pytest.mark.parametrize("length", [0, 1, CAP])
def test_a_length_up_to_the_limit_is_a_frame(framing: ModuleType, length: int) -> None:
    payload = b"x" * length
    scanner = scanner_with(framing, header(length) + payload)
    assert scanner.next_frame() == payload
    assert scanner.next_frame() is None
    assert scanner.at_boundary


@both
@pytest.mark.parametrize("length", HOSTILE)
def test_a_length_over_the_limit_is_refused_at_its_header(framing: ModuleType, length: int) -> None:
    scanner = scanner_with(framing, header(length)[:3])
    assert scanner.next_frame() is None
    scanner.feed(header(length)[3:])
    with pytest.raises(framing.LengthError) as caught:
        scanner.next_frame()
    assert (caught.value.length, caught.value.limit) == (length, CAP)


@pytest.mark.parametrize("length", [0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_the_largest_lengths_are_read_unsigned_and_waited_for(length: int) -> None:
    """Read as signed, the last two would be negative: smaller than any limit, and a disaster to allocate."""
    scanner = scanner_with(compiled, header(length) + b"begun", limit=compiled.MAX_LENGTH)
    assert scanner.next_frame() is None
    assert scanner.buffered == 9
    assert scanner.take_rest() == header(length) + b"begun"


@both
def test_zero_length_frames_are_returned_wherever_they_lie(framing: ModuleType) -> None:
    scanner = scanner_with(framing, bytes(12) + header(1))
    assert scanner.frames() == [b"", b"", b""]
    scanner.feed(b"a" + bytes(2))
    assert scanner.frames() == [b"a"]
    scanner.feed(bytes(2))
    assert scanner.next_frame() == b""
    assert scanner.at_boundary


@both
def test_a_limit_of_zero_allows_only_empty_frames(framing: ModuleType) -> None:
    scanner = scanner_with(framing, header(0) + header(1), limit=0)
    assert scanner.next_frame() == b""
    with pytest.raises(framing.LengthError):
        scanner.next_frame()


@both
@pytest.mark.parametrize("limit", [-1, 1 << 32, 1 << 64, -(1 << 64)])
def test_a_limit_that_no_length_can_mean_is_refused(framing: ModuleType, limit: int) -> None:
    with pytest.raises(ValueError, match=str(limit)):
        framing.FrameScanner(limit)
    scanner = framing.FrameScanner(CAP)
    with pytest.raises(ValueError, match=str(limit)):
        scanner.limit = limit
    assert scanner.limit == CAP


def test_a_limit_must_be_an_integer() -> None:
    for limit in ("300", None, 3.5):
        with pytest.raises(TypeError):
            compiled.FrameScanner(limit)  # type: ignore[arg-type]


@both
def test_limits_at_both_ends_are_accepted(framing: ModuleType) -> None:
    assert framing.MAX_LENGTH == 0xFFFFFFFF
    for limit in (0, framing.MAX_LENGTH):
        assert framing.FrameScanner(limit).limit == limit


# ---- errors that stay ----


@both
def test_a_bad_header_is_raised_for_ever(framing: ModuleType) -> None:
    scanner = scanner_with(framing, header(CAP + 1) + b"x" * (CAP + 1) + header(1) + b"y")
    first = length_error(framing, scanner.next_frame)
    scanner.limit = framing.MAX_LENGTH
    scanner.feed(header(0))
    for call in (scanner.next_frame, scanner.frames, scanner.next_frame):
        again = length_error(framing, call)
        assert (again.length, again.limit) == (first.length, first.limit) == (CAP + 1, CAP)
    scanner.take_rest()
    scanner.feed(header(0))
    with pytest.raises(framing.LengthError):
        scanner.next_frame()


@both
def test_good_frames_before_a_bad_header_come_first(framing: ModuleType) -> None:
    scanner = scanner_with(framing, header(1) + b"a" + header(0) + header(CAP + 1) + b"rest")
    assert scanner.frames() == [b"a", b""]
    assert not scanner.at_boundary
    with pytest.raises(framing.LengthError):
        scanner.frames()
    assert scanner.take_rest() == header(CAP + 1) + b"rest"
    assert scanner.at_boundary


def test_each_raised_error_is_a_new_object() -> None:
    """One exception object raised again and again collects a traceback entry, and the frames in it, each time."""
    scanner = scanner_with(compiled, header(CAP + 1))
    first = length_error(compiled, scanner.next_frame)
    assert length_error(compiled, scanner.next_frame) is not first


def test_errors_say_what_happened_and_survive_pickling() -> None:
    for error, fields, text in [
        (compiled.LengthError(5, 4), {"length": 5, "limit": 4}, "a frame of 5 bytes is announced, and 4 is the limit"),
        (
            compiled.LayoutError(9, 8),
            {"trailer_length": 9, "record_length": 8},
            "a trailer of 9 bytes does not fit a record of 8",
        ),
        (
            compiled.LayoutError(-1, 3),
            {"trailer_length": -1, "record_length": 3},
            "a record of 3 bytes has no room for its trailer's length",
        ),
    ]:
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert vars(copy) == vars(error) == fields
        assert str(copy) == str(error) == text
        assert isinstance(error, ValueError)


# ---- a limit changed between frames ----


@both
def test_a_limit_set_between_frames_applies_to_a_frame_already_here(framing: ModuleType) -> None:
    """The handshake's last token and the first record may come in one segment, and their limits differ."""
    scanner = scanner_with(framing, header(2) + b"ab" + header(CAP + 1) + b"x" * (CAP + 1))
    assert scanner.next_frame() == b"ab"
    scanner.limit = CAP + 1
    assert scanner.next_frame() == b"x" * (CAP + 1)


@both
def test_a_lowered_limit_applies_to_the_next_header_and_not_to_the_frame_begun(framing: ModuleType) -> None:
    scanner = scanner_with(framing, header(5) + b"ab")
    assert scanner.next_frame() is None
    scanner.limit = 4
    scanner.feed(b"cde" + header(5))
    assert scanner.next_frame() == b"abcde"
    with pytest.raises(framing.LengthError) as caught:
        scanner.next_frame()
    assert caught.value.limit == 4


@both
def test_a_header_not_whole_is_judged_by_the_limit_at_its_completion(framing: ModuleType) -> None:
    scanner = scanner_with(framing, header(5)[:3])
    assert scanner.next_frame() is None
    scanner.limit = 4
    scanner.feed(header(5)[3:])
    with pytest.raises(framing.LengthError):
        scanner.next_frame()


# ---- what is left ----


@both
@pytest.mark.parametrize("looked", [False, True], ids=["unread", "looked at"])
@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b"\x05"],
        [b"\x05\x00", b"\x00"],
        [header(5)],
        [header(5), b"ab"],
        [header(5) + b"a", b"b", b"c"],
        [header(5)[:2], header(5)[2:] + b"ab", b"cd"],
        [header(CAP + 1), b"much", b"more"],
    ],
    ids=["nothing", "1 byte", "3 bytes", "header", "header|body", "gathering", "header gathered", "bad header"],
)
def test_take_rest_returns_every_byte_not_returned_yet(framing: ModuleType, pieces: list[bytes], looked: bool) -> None:
    scanner = scanner_with(framing, compiled.pack_frame(b"first"))
    assert scanner.next_frame() == b"first"
    bad = False
    for piece in pieces:
        scanner.feed(piece)
        if looked:
            outcome = attempt(scanner.next_frame)
            bad = isinstance(outcome, tuple)
            assert bad or outcome is None
    held = b"".join(pieces)
    assert scanner.buffered == len(held)
    assert scanner.at_boundary == (not held)
    assert scanner.take_rest() == held
    assert (scanner.buffered, scanner.at_boundary) == (0, True)
    assert scanner.take_rest() == b""
    if not bad:
        scanner.feed(compiled.pack_frame(b"anew"))
        assert scanner.next_frame() == b"anew"


@both
def test_take_rest_includes_frames_complete_but_not_taken(framing: ModuleType) -> None:
    data = compiled.pack_frame(b"a") + compiled.pack_frame(b"b")
    scanner = scanner_with(framing, data)
    assert scanner.next_frame() == b"a"
    scanner.feed(b"tail")
    assert not scanner.at_boundary
    assert scanner.take_rest() == compiled.pack_frame(b"b") + b"tail"


# ---- what is fed ----


@both
def test_anything_but_bytes_is_refused(framing: ModuleType) -> None:
    scanner = framing.FrameScanner(CAP)
    for wrong in ("text", 5, None, [1, 2], object()):
        with pytest.raises(TypeError):
            scanner.feed(wrong)
    assert scanner.at_boundary


def test_a_mutable_buffer_is_copied_when_fed() -> None:
    data = bytearray(compiled.pack_frame(b"kept"))
    scanner = compiled.FrameScanner(CAP)
    scanner.feed(data)
    scanner.feed(memoryview(data)[::-1])
    data[:] = bytes(len(data))
    assert scanner.next_frame() == b"kept"
    assert scanner.take_rest() == compiled.pack_frame(b"kept")[::-1]


def test_a_subclass_of_bytes_is_taken_as_bytes() -> None:
    class Odd(bytes):
        pass

    scanner = compiled.FrameScanner(CAP)
    scanner.feed(Odd(header(3)))
    scanner.feed(Odd(b"odd"))
    frame = scanner.next_frame()
    assert frame == b"odd"
    assert type(frame) is bytes


def test_feeding_does_not_copy_and_reading_lets_go() -> None:
    piece = header(3) + b"abc" + header(9) + b"def"
    before = sys.getrefcount(piece)
    scanner = scanner_with(compiled, piece)
    assert sys.getrefcount(piece) == before + 1
    assert scanner.frames() == [b"abc"]
    assert sys.getrefcount(piece) == before  # what is unfinished was copied out: a small rest pins no large piece


def test_a_payload_that_came_in_one_piece_is_that_piece() -> None:
    payload = b"x" * 100
    scanner = scanner_with(compiled, header(100))
    assert scanner.next_frame() is None
    scanner.feed(payload)
    assert scanner.next_frame() is payload


# ---- memory and time ----


# Bytes; what the interpreter and the test runner's threads may allocate meanwhile. All that is looked for is larger.
NOISE = 20_000


def held_by(action: Any) -> tuple[Any, int, int]:
    """An action's result, how many bytes remain allocated after it, and the most that were during it."""
    tracer = sys.gettrace()
    sys.settrace(None)  # a coverage tool's own notes are memory too
    gc.collect()
    tracemalloc.start()
    try:
        result = action()
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        sys.settrace(tracer)
    return result, now, peak


def test_no_memory_is_held_for_a_length_only_announced() -> None:
    def announce() -> Any:
        scanner = compiled.FrameScanner(compiled.MAX_LENGTH)
        scanner.feed(header(0x40000000))
        assert scanner.next_frame() is None
        scanner.feed(b"0123456789")
        assert scanner.next_frame() is None
        return scanner

    _, _, peak = held_by(announce)
    assert peak < NOISE


@pytest.mark.parametrize("piece_size", [100, 1460, 65536])
def test_memory_for_an_unfinished_frame_is_at_most_twice_what_arrived(piece_size: int) -> None:
    scanner = scanner_with(compiled, header(1 << 30), limit=1 << 30)
    pieces = 300_000 // piece_size

    def arrive() -> None:
        for count in range(1, pieces + 1):
            scanner.feed(bytes(piece_size))
            assert scanner.next_frame() is None
            now, _ = tracemalloc.get_traced_memory()
            assert now < 2 * count * piece_size + NOISE

    _, now, _ = held_by(arrive)
    assert now >= pieces * piece_size
    assert scanner.buffered == 4 + pieces * piece_size


def test_a_gathered_frame_takes_no_more_memory_than_its_length() -> None:
    size = 200_000
    scanner = scanner_with(compiled, header(size), limit=size)

    def gather() -> bytes:
        for _ in range(size // 1000):
            assert scanner.next_frame() is None
            scanner.feed(b"x" * 1000)
        frame = scanner.next_frame()
        assert frame is not None
        return frame

    frame, now, _ = held_by(gather)
    assert frame == b"x" * size
    assert sys.getsizeof(frame) == sys.getsizeof(b"") + size
    assert now < size + NOISE


@pytest.mark.parametrize("look", ["after every byte", "at the end"])
def test_a_trickle_of_single_bytes_takes_linear_time(look: str) -> None:
    """Quadratic, a megabyte would copy half a terabyte: minutes. Linear it is well under a second."""
    size = 1 << 20
    scanner = scanner_with(compiled, header(size), limit=size)
    start = time.process_time()
    for _ in range(size - 1):
        scanner.feed(b"x")
        if look == "after every byte":
            scanner.next_frame()
    scanner.feed(b"x")
    assert scanner.next_frame() == b"x" * size
    assert time.process_time() - start < 15


def test_running_out_of_memory_while_gathering_does_not_lose_the_place_unnoticed() -> None:
    """Growing the buffer may lose it. Reading on as if nothing were missing would take payload for headers."""
    testcapi = pytest.importorskip("_testcapi", reason="this Python has no _testcapi, which makes allocations fail")
    scanner = scanner_with(compiled, header(1 << 20) + b"x" * 1000, limit=1 << 20)
    assert scanner.next_frame() is None
    scanner.feed(b"y" * 1000)
    next_frame = scanner.next_frame
    failed = False
    tracer = sys.gettrace()
    sys.settrace(None)  # or it is a coverage tool's allocation that fails
    try:
        testcapi.set_nomemory(0, 1)
        next_frame()
    except MemoryError:
        failed = True
    finally:
        testcapi.remove_mem_hooks()
        sys.settrace(tracer)
    assert failed
    for _ in range(2):
        with pytest.raises(MemoryError):
            scanner.next_frame()
        with pytest.raises(MemoryError):
            scanner.frames()
    assert scanner.take_rest() == header(1 << 20) + b"y" * 1000
    scanner.feed(header(0))
    with pytest.raises(MemoryError):
        scanner.next_frame()


def test_a_scanner_dropped_with_an_unfinished_frame_frees_it() -> None:
    def drop() -> None:
        for _ in range(100):
            scanner = scanner_with(compiled, header(100_000) + bytes(10_000), limit=100_000)
            scanner.feed(bytes(10_000))
            assert scanner.next_frame() is None
            scanner.feed(b"behind")
            scanner.feed(b"behind")

    _, now, _ = held_by(drop)
    assert now < NOISE


# ---- packing and splitting ----

chunks = st.binary(max_size=70)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(st.tuples(chunks, chunks), max_size=8))
def test_packing_agrees_with_the_oracle_and_splitting_reverses_it(records: list[tuple[bytes, bytes]]) -> None:
    packed = compiled.pack_framed_records(records)
    assert packed == oracle.pack_framed_records(records)
    assert packed == b"".join(compiled.pack_frame(compiled.pack_record(*record)) for record in records)
    frames = scanner_with(compiled, packed).frames()
    assert [compiled.split_record(frame) for frame in frames] == records


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    st.one_of(st.binary(max_size=20), st.builds(bytes.__add__, st.integers(0, 12).map(header), st.binary(max_size=10)))
)
def test_splitting_agrees_with_the_oracle_on_any_bytes(record: bytes) -> None:
    assert attempt(lambda: compiled.split_record(record)) == attempt(lambda: oracle.split_record(record))


@both
def test_the_layouts_are_these_bytes(framing: ModuleType) -> None:
    assert framing.pack_frame(b"abc") == b"\x03\0\0\0abc"
    assert framing.pack_frame(b"") == bytes(4)
    assert framing.pack_record(b"TT", b"data") == b"\x02\0\0\0TTdata"
    assert framing.pack_record(b"", b"") == bytes(4)
    assert (
        framing.pack_framed_records([(b"TT", b"data"), (b"", b"")]) == b"\x0a\0\0\0\x02\0\0\0TTdata\x04\0\0\0\0\0\0\0"
    )
    assert framing.pack_framed_records([]) == b""
    assert framing.pack_frame(bytes(0x010203))[:4] == b"\x03\x02\x01\0"
    assert framing.split_record(b"\x02\0\0\0TTdata") == (b"TT", b"data")
    assert framing.split_record(b"\x02\0\0\0TT") == (b"TT", b"")


@both
@pytest.mark.parametrize("trailer_length", [1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFC, 0xFFFFFFFF])
def test_a_trailer_longer_than_its_record_is_refused(framing: ModuleType, trailer_length: int) -> None:
    with pytest.raises(framing.LayoutError) as caught:
        framing.split_record(header(trailer_length))
    assert (caught.value.trailer_length, caught.value.record_length) == (trailer_length, 4)


@both
@pytest.mark.parametrize("length", range(4))
def test_a_record_too_short_to_say_its_trailers_length_is_refused(framing: ModuleType, length: int) -> None:
    with pytest.raises(framing.LayoutError) as caught:
        framing.split_record(bytes(length))
    assert (caught.value.trailer_length, caught.value.record_length) == (-1, length)


def test_records_may_be_named_tuples_in_any_sequence() -> None:
    Record = namedtuple("Record", "trailer data")  # noqa: PYI024  # the tuple is what is tested
    records = [Record(b"t", b"d"), (b"", b"e")]
    assert compiled.pack_framed_records(tuple(records)) == compiled.pack_framed_records(records)


def test_packing_anything_but_bytes_is_a_type_error() -> None:
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (compiled.pack_frame, ("text",)),
        (compiled.pack_frame, (None,)),
        (compiled.pack_frame, (bytearray(b"x"),)),
        (compiled.pack_record, (b"", None)),
        (compiled.pack_record, (None, b"")),
        (compiled.split_record, (None,)),
        (compiled.split_record, (bytearray(4),)),
        (compiled.pack_framed_records, (None,)),
        (compiled.pack_framed_records, ([b"ab"],)),
        (compiled.pack_framed_records, ([[b"a", b"b"]],)),
        (compiled.pack_framed_records, ([(b"a",)],)),
        (compiled.pack_framed_records, ([(b"a", b"b", b"c")],)),
        (compiled.pack_framed_records, ([(b"a", b"b"), (b"a", None)],)),
        (compiled.pack_framed_records, ([(bytearray(b"a"), b"b")],)),
    ]
    for call, arguments in calls:
        with pytest.raises(TypeError):
            call(*arguments)


@pytest.mark.skipif(sys.maxsize < 1 << 33, reason="no object of more than 4 GiB on a 32-bit system")
def test_what_does_not_fit_a_length_of_four_bytes_is_refused() -> None:
    try:
        huge = bytes(1 << 32)  # zeros that nobody touches: address space, no memory
    except MemoryError:
        pytest.skip("this system gives no 4 GiB of address space")
    with pytest.raises(ValueError, match="4294967296 bytes"):
        compiled.pack_frame(huge)
    with pytest.raises(ValueError, match="4294967296 bytes"):
        compiled.pack_record(huge, b"")
    with pytest.raises(ValueError, match="4294967300 bytes"):
        compiled.pack_framed_records([(b"", b""), (b"", huge)])
    with pytest.raises(ValueError, match="4294967300 bytes"):
        compiled.pack_framed_records([(huge, b"")])


# ---- sizes ----


@pytest.mark.parametrize("make", [list, tuple, iter])
@pytest.mark.parametrize(
    ("values", "good"),
    [
        ([], True),
        ([b"a"], True),
        ([b"a", b"abc"], True),
        ([b""], False),
        ([b"abcd"], False),
        ([b"a", b""], False),
        ([b"a", "a"], False),
        ([bytearray(b"a")], False),
        ([None], False),
    ],
)
def test_sizes_within_agrees_with_the_oracle(make: Any, values: list[Any], good: bool) -> None:
    assert compiled.sizes_within(make(values), 1, 3) is good
    assert oracle.sizes_within(make(values), 1, 3) is good


def test_sizes_within_refuses_limits_that_no_object_can_have() -> None:
    for least, most in ((-1, 3), (1, -1), (1, 2**64)):
        with pytest.raises(OverflowError):
            compiled.sizes_within([b"a"], least, most)
    with pytest.raises(TypeError):
        compiled.sizes_within(None, 1, 3)  # type: ignore[arg-type]


# ---- the module ----


def test_the_stub_and_the_oracle_have_the_modules_names() -> None:
    names = {name for name in vars(compiled) if not name.startswith("_")} - {"deque"}
    stub = (ROOT / "src" / "triosspi" / "_framing.pyi").read_text()
    assert names >= {"FrameScanner", "pack_frame", "pack_record", "pack_framed_records", "split_record", "MAX_LENGTH"}
    for name in names:
        assert name in stub
        assert hasattr(oracle, name)
    for name in dir(oracle.FrameScanner):
        if not name.startswith("_"):
            assert hasattr(compiled.FrameScanner, name)
            assert name in stub
    for name in ("pack_frame", "pack_record", "pack_framed_records", "split_record"):
        assert [*inspect.signature(getattr(compiled, name)).parameters] == [
            *inspect.signature(getattr(oracle, name)).parameters
        ]


@pytest.mark.long("compiles the extension, optimised")
def test_the_extension_compiles_without_a_warning(tmp_path: Path) -> None:
    """Signed against unsigned, and narrowing, are how a length becomes an overflow: the compiler must see none."""
    compile_without_a_warning("_framing", tmp_path)
