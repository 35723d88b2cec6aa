"""`triosspi._sealing` on a byte stream: records, and messages that are signed only."""

from __future__ import annotations

import functools
import mmap
import random
import threading
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from spnego._ntlm_raw.crypto import RC4Handle, sealkey, signkey
from spnego._ntlm_raw.messages import NegotiateFlags
from spnego._ntlm_raw.security import seal as pyspnego_seal

from test_sealing import (
    FLAGS,
    NTLM_LAST,
    RELEASED,
    MitContexts,
    divided,
    each_enctype,
    each_kind,
    each_side,
    kerberos,
    make,
    mit,
    ntlm,
    pair,
    reference_token,
    refused,
    run_all,
    split_frames,
    split_large,
    turned,
)
from triosspi._sealing import SealingError

__all__ = ["mit"]  # a fixture

split_records = split_large


def record(trailer: bytes, ciphertext: bytes) -> bytes:
    return (len(trailer) + len(ciphertext)).to_bytes(4, "little") + trailer + ciphertext


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


# Of a record's data, as .NET's NegotiateStream cuts it.
NNS_PIECE = 63 * 1024


@each_kind
def test_records_are_what_seal_makes_of_each_piece_with_its_size_before_it(kind: str) -> None:
    data = random.Random(kind).randbytes(1000)
    for piece in (1, 15, 16, 17, 499, 500, 501, 999, 1000, 1001, 2**62):
        streaming, singly = pair(kind)[0], make(kind)
        made = streaming.seal_records(data, piece)
        expected = [singly.seal(each) for each in pieces(data, min(piece, 1000))]
        if kind == "ntlm":
            assert made == b"".join(record(*each) for each in expected)  # no randomness in it
        assert [len(each) for each in split_records(made)] == [len(trailer + rest) for trailer, rest in expected]
        one_by_one = make(kind, False)
        trailer = streaming.trailer_size
        opened = [one_by_one.open(each[:trailer], each[trailer:]) for each in split_records(made)]
        assert opened == pieces(data, min(piece, 1000))
        assert make(kind, False).open_records([trailer + rest for trailer, rest in expected]) == (data, None)


@each_kind
def test_a_stream_comes_out_as_it_went_in(kind: str) -> None:
    rng = random.Random(kind)
    ours, peer = pair(kind)
    stream, received = bytearray(), bytearray()
    for size in (1, NNS_PIECE - 1, NNS_PIECE, NNS_PIECE + 1, 5 * NNS_PIECE, 5 * NNS_PIECE + 7, 10 << 20, 1):
        data = rng.randbytes(size)
        tokens = split_records(ours.seal_records(data, NNS_PIECE))
        assert len(tokens) == -(-size // NNS_PIECE)
        opened, error = peer.open_records(tokens)
        assert error is None
        stream += data
        received += opened
    assert received == stream


@each_kind
def test_a_record_for_each_byte_opens(kind: str) -> None:
    ours, peer = pair(kind)
    data = random.Random(kind).randbytes(100_000)
    tokens = split_records(ours.seal_records(data, 1))
    assert len(tokens) == len(data)
    assert peer.open_records(tokens) == (data, None)


@each_kind
def test_messages_frames_and_records_have_their_numbers_in_common(kind: str) -> None:
    ours, peer = pair(kind)
    for _ in range(3):
        assert peer.open(*ours.seal(b"alone")) == b"alone"
        assert peer.open_records(split_records(ours.seal_records(b"in three", 3))) == (b"in three", None)
        assert peer.open_frames(split_frames(ours.seal_frames([b"a", b"b"]))) == ([b"a", b"b"], None)
        assert peer.open_records([b"".join(ours.seal(b"a")), b"".join(ours.seal(b"b"))]) == (b"ab", None)
    assert ours.traffic == (24, 3 * (5 + 8 + 2 + 2), 0, 0)
    assert peer.traffic == (0, 0, 24, 3 * (5 + 8 + 2 + 2))


@each_kind
def test_records_of_whatever_has_bytes_in_one_piece(kind: str) -> None:
    ours, peer = pair(kind)
    data = bytes(range(200))
    for given in (
        data,
        bytearray(data),
        memoryview(data),
        memoryview(bytearray(b"before" + data + b"after"))[6:206],
        memoryview(data).cast("I"),
        memoryview(data).cast("B", (10, 20)),
    ):
        assert peer.open_records(split_records(ours.seal_records(given, 99))) == (data, None)
    for nothing in (b"", bytearray(), memoryview(data)[5:5]):
        assert ours.seal_records(nothing, 99) == b""
    assert peer.open_records(split_records(ours.seal_records(b"unharmed", 99))) == (b"unharmed", None)


@each_kind
def test_what_cannot_be_sealed_as_records_is_refused_before_anything_is_spent(kind: str) -> None:
    ours, peer = pair(kind)
    scattered = memoryview(bytes(range(200)))[::2]
    with pytest.raises(BufferError, match="contiguous"):
        ours.seal_records(scattered, 16)
    for wrong in ("text", 5, None, [b"list"]):
        any_wrong: Any = wrong
        with pytest.raises(TypeError):
            ours.seal_records(any_wrong, 16)
    for piece in (0, -1, -(2**62)):
        with pytest.raises(ValueError, match="at least one byte"):
            ours.seal_records(b"data", piece)
    for wrong in (1.5, "1", None):
        any_wrong = wrong
        with pytest.raises(TypeError):
            ours.seal_records(b"data", any_wrong)
    assert peer.open_records(split_records(ours.seal_records(b"unharmed", 99))) == (b"unharmed", None)


def test_a_stretch_with_more_records_than_numbers_is_refused_whole_and_its_memory_let_go() -> None:
    sealer = ntlm(sends=NTLM_LAST - 1)
    data = bytearray(b"abc")
    with pytest.raises(SealingError, match="number"):
        sealer.seal_records(data, 1)
    data.append(0)  # would be refused if it were still held
    opener = ntlm(False, receives=NTLM_LAST - 1)
    assert opener.open_records(split_records(sealer.seal_records(data[:3], 2))) == (b"abc", None)
    with pytest.raises(SealingError, match="number"):
        sealer.seal_records(b"d", 1)
    assert sealer.seal_records(b"", 1) == b""


@each_kind
def test_a_piece_too_large_for_a_record_is_refused_before_anything_is_spent(kind: str) -> None:
    ours, peer = pair(kind)
    # Of the system's zeros: read by nobody, they take no memory.
    zeros = memoryview(mmap.mmap(-1, 2**32, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))
    with pytest.raises(ValueError, match="four bytes"):
        ours.seal_records(zeros, 2**32 - ours.trailer_size)
    assert peer.open(*ours.seal(b"unharmed")) == b"unharmed"


@each_kind
def test_empty_records_are_no_end_and_add_nothing(kind: str) -> None:
    ours, peer = pair(kind)
    tokens = [b"".join(ours.seal(message)) for message in (b"", b"one", b"", b"", b"two", b"")]
    assert peer.open_records(tokens) == (b"onetwo", None)
    assert peer.open_records([b"".join(ours.seal(b""))]) == (b"", None)
    assert peer.open_records([]) == (b"", None)
    assert peer.traffic == (0, 0, 2, 6)


@each_kind
def test_every_bit_of_a_small_record_counts(kind: str) -> None:
    token = b"".join(make(kind, False).seal(b"small!!"))
    for bit in range(8 * len(token)):
        flipped = bytearray(token)
        flipped[bit // 8] ^= 1 << bit % 8
        opened, error = make(kind).open_records([bytes(flipped)])
        assert opened == b"" and isinstance(error, SealingError), bit
    for wrong in (*(token[:size] for size in range(len(token))), token + b"\0", b"\0" + token):
        opened, error = make(kind).open_records([wrong])
        assert opened == b"" and isinstance(error, SealingError)
    assert make(kind).open_records([token]) == (b"small!!", None)


@each_kind
def test_a_bit_of_a_later_record_leaves_those_before_it_and_ends_it_there(kind: str) -> None:
    rng = random.Random(kind)
    data = rng.randbytes(600)
    tokens = split_records(make(kind, False).seal_records(data, 100))
    for _ in range(300):
        ours, bad = make(kind), rng.randrange(6)
        flipped = bytearray(tokens[bad])
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        opened, error = ours.open_records([*tokens[:bad], bytes(flipped), *tokens[bad + 1 :]])
        assert opened == data[: 100 * bad]
        assert isinstance(error, SealingError)
        assert ours.traffic == (0, 0, bad, 100 * bad)
        # For ever, and for each way in.
        assert ours.open_records(tokens[bad:])[0] == b""
        assert "before" in str(ours.open_records([])[1])
        assert ours.open_frames([])[0] == []
        refused(ours, *divided(tokens[bad], 100))


@each_kind
def test_a_record_too_short_to_be_one_leaves_those_before_it(kind: str) -> None:
    for bad in (b"", b"\0", bytes(15), b"\xff" * 16):
        ours, peer = pair(kind)
        tokens = split_records(peer.seal_records(b"onetwo", 3))
        opened, error = ours.open_records([tokens[0], bad, tokens[1]])
        assert opened == b"one"
        assert isinstance(error, SealingError)
        # Sealing goes on.
        assert peer.open(*ours.seal(b"answer")) == b"answer"


@each_kind
def test_a_replayed_reordered_missing_or_reflected_record_is_refused(kind: str) -> None:
    one, two, three = split_records(make(kind, False).seal_records(b"onetwo3", 3))
    for tokens, good in [
        ([one, one], b"one"),
        ([two], b""),
        ([one, three], b"one"),
        ([one, two, two, three], b"onetwo"),
    ]:
        opened, error = make(kind).open_records(tokens)
        assert opened == good
        assert isinstance(error, SealingError)
    reflected = make(kind)
    opened, error = reflected.open_records(split_records(reflected.seal_records(b"mine", 9)))
    assert opened == b"" and isinstance(error, SealingError)


@each_kind
def test_no_shape_of_rubbish_is_a_record(kind: str) -> None:
    rng = random.Random(kind)
    start = make(kind, False).seal(b"")[0]
    for _ in range(3000):
        rubbish = rng.randbytes(rng.randint(0, 150))
        if rng.random() < 0.7:
            rubbish = start[: rng.randint(0, 15)] + rubbish
        opened, error = make(kind).open_records([rubbish])
        assert opened == b"" and isinstance(error, SealingError)


@each_kind
def test_records_that_are_not_bytes_in_a_list_are_refused_before_anything_is_opened(kind: str) -> None:
    ours, peer = pair(kind)
    one, two = split_records(peer.seal_records(b"onetwo", 3))
    for wrong in ([one, bytearray(two)], [one, None], (one, two), one, None, iter([one])):
        any_wrong: Any = wrong
        with pytest.raises(TypeError):
            ours.open_records(any_wrong)
    assert ours.open_records([one, two]) == (b"onetwo", None)


@each_kind
def test_records_are_made_and_opened_in_one_piece_of_memory(kind: str) -> None:
    ours, peer = pair(kind)
    data = bytes(4 << 20)
    room = len(data) + 256 * 1024  # records' headers; what a record is opened by way of
    tracemalloc.start()
    try:
        made = ours.seal_records(memoryview(data), NNS_PIECE)
        assert len(data) < tracemalloc.get_traced_memory()[1] < room
        tokens = split_records(made)
        del made
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        opened, error = peer.open_records(tokens)
        assert error is None
        assert len(data) < tracemalloc.get_traced_memory()[1] - before < room
        assert opened == data
    finally:
        tracemalloc.stop()


@each_enctype
def test_kerberos_records_may_be_turned_by_every_number_there_is_and_have_any_filler(enctype: int) -> None:
    message = b"turned by every number there is"
    for filler in (b"", b"\xa5" * 5):
        token = reference_token(enctype, message, filler)
        for rotation in range(len(token) - 16):
            assert kerberos(enctype).open_records([turned(token, rotation)]) == (message, None)
        for rotation in (len(token) - 16, len(token) - 15, 65535):
            opened, error = kerberos(enctype).open_records([turned(token, rotation)])
            assert opened == b"" and isinstance(error, SealingError)


@each_enctype
@each_side
def test_mit_opens_records_and_its_own_tokens_are_records(
    mit: Callable[[int], MitContexts], enctype: int, initiator: bool
) -> None:
    from gssapi.raw import unwrap, wrap

    rng = random.Random(enctype)
    ours, peer = mit(enctype).halves(initiator)
    for piece in (1, 16, 17, 1000, NNS_PIECE):
        for size in (1, piece - 1, piece, piece + 1, 3 * piece + 5):
            data = rng.randbytes(size)
            made = [unwrap(peer, token) for token in split_records(ours.seal_records(data, piece))]
            assert b"".join(each.message for each in made) == data
            assert all(each.encrypted for each in made)
            # Not turned, and cut nowhere.
            tokens = [wrap(peer, each, True, None).message for each in pieces(data, piece)]
            assert ours.open_records(tokens) == (data, None)


@each_side
def test_ntlm_records_are_what_pyspnego_seals(initiator: bool) -> None:
    rng = random.Random(f"records {initiator}")
    key, side = rng.randbytes(16), "initiate" if initiator else "accept"
    flags = NegotiateFlags(FLAGS)
    handle, signing_key = RC4Handle(sealkey(flags, key, side)), signkey(flags, key, side)
    ours, peer, number = ntlm(initiator, 3, key=key), ntlm(not initiator, receives=3, key=key), 3
    for size in (1, 15, 16, 17, 100, NNS_PIECE, NNS_PIECE + 1, 300_000):
        data = rng.randbytes(size)
        expected = []
        for each in pieces(data, NNS_PIECE):
            ciphertext, signature = pyspnego_seal(FLAGS, handle, signing_key, number, each)  # type: ignore[arg-type, unused-ignore]
            expected.append(signature + ciphertext)
            number += 1
        assert split_records(ours.seal_records(data, NNS_PIECE)) == expected
        assert peer.open_records(expected) == (data, None)


# ---- threads ----


@each_kind
def test_frames_and_records_by_two_threads_are_refused_to_one_of_them(kind: str) -> None:
    ours, peer = pair(kind)
    made: list[bytes] = []

    def seal(way: Callable[[], bytes]) -> None:
        for _ in range(30):
            with suppress(RuntimeError):
                made.append(way())

    records = functools.partial(ours.seal_records, bytearray(RELEASED), RELEASED)
    run_all([functools.partial(seal, records), functools.partial(seal, lambda: ours.seal_frames([bytes(RELEASED)]))])
    tokens = [each[4:] if len(each) == 4 + ours.trailer_size + RELEASED else each[8:] for each in made]
    number = (slice(12, 16), "little") if kind == "ntlm" else (slice(8, 16), "big")
    tokens.sort(key=lambda each: int.from_bytes(each[number[0]], number[1]))  # type: ignore[arg-type, unused-ignore]
    assert peer.open_records(tokens) == (bytes(RELEASED * len(tokens)), None)


def test_what_is_sealed_cannot_be_resized_by_another_thread_meanwhile_but_afterwards() -> None:
    ours = make("ntlm")
    data = bytearray(16 * RELEASED)
    refusals: list[BufferError] = []
    over = threading.Event()

    def seal() -> None:
        for _ in range(1000):
            ours.seal_records(data, NNS_PIECE)
            if refusals:
                break
        over.set()

    def resize() -> None:
        while not (refusals or over.is_set()):
            try:
                data.append(1)
                data.pop()
            except BufferError as exc:
                refusals.append(exc)

    run_all([seal, resize])
    assert refusals
    data.append(1)
