"""`triosspi._sealing` where messages are signed and not encrypted: all that holds for encrypted ones must hold here, too."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable

import pytest
from spnego._ntlm_raw.crypto import RC4Handle, sealkey, signkey
from spnego._ntlm_raw.messages import NegotiateFlags
from spnego._ntlm_raw.security import sign as pyspnego_sign

import sealing_reference as reference
from test_sealing import (
    FLAGS,
    KEY,
    RELEASED,
    MitContexts,
    divided,
    each_enctype,
    each_kind,
    each_side,
    frame,
    make,
    mit,
    refused,
    run_all,
    split_frames,
    split_large,
    turned,
)
from test_sealing_records import pieces
from triosspi._sealing import KerberosSealer, NTLMSealer, SealingError
from triosspi.wire import RECORD_DATA_SIZE

__all__ = ["mit"]  # a fixture

Sealer = NTLMSealer | KerberosSealer
split_records = split_large
TRAILERS = {"ntlm": 16, "17": 28, "18": 28, "19": 32, "20": 40}


def signer(kind: str, initiator: bool = True) -> Sealer:
    if kind == "ntlm":
        return NTLMSealer(KEY[:16], initiator=initiator, send_sequence=0, receive_sequence=0, encrypt=False)
    return KerberosSealer(
        KEY[: reference.ENCTYPES[int(kind)].key_size],
        int(kind),
        initiator=initiator,
        acceptor_subkey=True,
        send_sequence=0,
        receive_sequence=0,
        encrypt=False,
    )


def signed_pair(kind: str) -> tuple[Sealer, Sealer]:
    return signer(kind), signer(kind, False)


@each_kind
def test_the_message_is_in_the_clear_behind_a_trailer_of_its_size(kind: str) -> None:
    ours, peer = signed_pair(kind)
    assert ours.trailer_size == TRAILERS[kind]
    for size in (0, 1, 15, 16, 17, 1000):
        message = random.Random(size).randbytes(size)
        trailer, rest = ours.seal(message)
        assert len(trailer) == TRAILERS[kind]
        assert rest == message
        assert peer.open(trailer, rest) == message


@each_kind
@pytest.mark.parametrize("size", [0, 1, 7, 16, 40])
def test_every_bit_counts(kind: str, size: int) -> None:
    token = b"".join(signer(kind, False).seal(bytes(range(size))))
    # An empty Kerberos message is all MAC, and peers send it turned by the whole of that or by nothing, which are the same
    # bytes. Where the MAC has 16, that is one bit of the rotation, under no signature, and it changes nothing.
    same = 8 * 7 + 4 if (kind, size) == ("19", 0) else None
    for bit in range(8 * len(token)):
        changed = bytearray(token)
        changed[bit // 8] ^= 1 << bit % 8
        opened, error = signer(kind).open_records([bytes(changed)])
        assert opened == b""
        assert (error is None) is (bit == same), bit
    for wrong in (*(token[:cut] for cut in range(len(token))), token + b"\0", b"\0" + token):
        opened, error = signer(kind).open_records([wrong])
        assert opened == b"" and isinstance(error, SealingError)
    assert signer(kind).open_records([token]) == (bytes(range(size)), None)


@each_kind
def test_a_replayed_reordered_missing_or_reflected_one_is_refused_and_nothing_opens_after_it(kind: str) -> None:
    one, two, three = split_records(signer(kind, False).seal_records(b"onetwo3", 3))
    for tokens, good in [
        ([one, one], b"one"),
        ([two], b""),
        ([one, three], b"one"),
        ([one, two, two, three], b"onetwo"),
    ]:
        ours = signer(kind)
        opened, error = ours.open_records(tokens)
        assert opened == good
        assert isinstance(error, SealingError)
        for way in (ours.open_records, ours.open_frames):
            found, again = way([])
            assert not found and "before" in str(again)
        refused(ours, *divided(two, 3))
    reflected = signer(kind)
    opened, error = reflected.open_records(split_records(reflected.seal_records(b"mine", 9)))
    assert opened == b"" and isinstance(error, SealingError)


@each_kind
def test_what_was_good_before_a_bad_one_can_still_be_answered(kind: str) -> None:
    ours, peer = signed_pair(kind)
    (question,) = split_records(peer.seal_records(b"question", 99))
    assert ours.open_records([question, b"rubbish"])[0] == b"question"
    assert peer.open_records(split_records(ours.seal_records(b"answer", 4))) == (b"answer", None)


@each_kind
def test_what_is_encrypted_is_no_signed_message_and_the_reverse(kind: str) -> None:
    for sealer, opener in ((make(kind, False), signer(kind)), (signer(kind, False), make(kind))):
        token = b"".join(sealer.seal(b"message"))
        opened, error = opener.open_records([token])
        assert opened == b"" and isinstance(error, SealingError)
        # Nor is the right kind after it: the opener is spent.
        refused(opener, *divided(token, len(b"message")))


@each_kind
def test_messages_frames_and_records_have_their_numbers_in_common(kind: str) -> None:
    ours, peer = signed_pair(kind)
    for _ in range(3):
        assert peer.open(*ours.seal(b"alone")) == b"alone"
        assert peer.open_records(split_records(ours.seal_records(memoryview(b"in three"), 3))) == (b"in three", None)
        assert peer.open_frames(split_frames(ours.seal_frames([b"a", b"b"]))) == ([b"a", b"b"], None)
        assert peer.open_frames([frame(*ours.seal(b""))]) == ([b""], None)
        assert peer.open_records([b"".join(ours.seal(message)) for message in (b"", b"c", b"")]) == (b"c", None)
    assert ours.traffic == (21, 3 * (5 + 8 + 2 + 1), 0, 0)
    assert peer.traffic == (0, 0, 21, 3 * (5 + 8 + 2 + 1))


@each_kind
def test_what_is_not_in_one_piece_is_refused_before_a_number_is_spent(kind: str) -> None:
    ours, peer = signed_pair(kind)
    with pytest.raises(BufferError, match="contiguous"):
        ours.seal_records(memoryview(bytes(range(200)))[::2], 16)
    assert peer.open_records(split_records(ours.seal_records(bytearray(b"unharmed"), 3))) == (b"unharmed", None)


@each_kind
def test_no_shape_of_rubbish_opens(kind: str) -> None:
    rng = random.Random(kind)
    start = signer(kind, False).seal(b"")[0]
    for _ in range(3000):
        rubbish = start[: rng.choice([0, 4, 8, 15])] + rng.randbytes(rng.randint(0, 100))
        opened, error = signer(kind).open_records([rubbish])
        assert opened == b"" and isinstance(error, SealingError)


@each_kind
def test_large_stretches_are_signed_and_opened_side_by_side_in_threads(kind: str) -> None:
    def exchange(seed: int) -> None:
        ours, peer = signed_pair(kind)
        data = random.Random(seed).randbytes(2 * RELEASED + seed)
        for _ in range(10):
            assert peer.open_records(split_records(ours.seal_records(data, 63 * 1024))) == (data, None)

    run_all([functools.partial(exchange, seed) for seed in range(3)])


def test_what_is_signed_cannot_be_resized_by_another_thread_meanwhile() -> None:
    ours = signer("18")
    data = bytearray(64 * RELEASED)
    refusals: list[BufferError] = []
    over = threading.Event()

    def sign() -> None:
        for _ in range(1000):
            ours.seal_records(data, 63 * 1024)
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

    run_all([sign, resize])
    # Only while the other signs, and so only if it has let go of the GIL.
    assert refusals


# ---- Kerberos and MIT ----


@each_enctype
@each_side
def test_mit_refuses_what_was_altered_and_is_refused_so(
    mit: Callable[[int], MitContexts], enctype: int, initiator: bool
) -> None:
    """That the two agree where nothing was altered is no accident of a peer that checks nothing."""
    from gssapi.raw import unwrap, wrap
    from gssapi.raw.misc import GSSError

    ours, peer = mit(enctype).halves(initiator, encrypt=False)
    (token,) = split_records(ours.seal_records(b"message", 99))
    with pytest.raises(GSSError):
        unwrap(peer, token[:-1] + bytes([token[-1] ^ 1]))
    theirs = wrap(peer, b"message", False, None).message
    opened, error = ours.open_records([theirs[:16] + bytes([theirs[16] ^ 1]) + theirs[17:]])
    assert opened == b"" and isinstance(error, SealingError)


@each_enctype
@each_side
def test_an_encrypted_token_of_mits_is_refused_where_signed_ones_are_due_and_the_reverse(
    mit: Callable[[int], MitContexts], enctype: int, initiator: bool
) -> None:
    from gssapi.raw import wrap

    for encrypt in (True, False):
        ours, peer = mit(enctype).halves(initiator, encrypt=encrypt)
        opened, error = ours.open_records([wrap(peer, b"message", not encrypt, None).message])
        assert opened == b""
        assert "encrypted" in str(error)


@each_enctype
def test_tokens_of_mits_open_turned_or_not_with_the_cut_where_the_message_begins(
    mit: Callable[[int], MitContexts], enctype: int
) -> None:
    from gssapi.raw import wrap

    ours, peer = mit(enctype).halves(initiator=True, encrypt=False)
    for size in (0, 1, 16, 1000):
        message = random.Random(size).randbytes(size)
        for rotation in (0, reference.ENCTYPES[enctype].mac_size):
            token = turned(wrap(peer, message, False, None).message, rotation)
            assert ours.open(*divided(token, size)) == message


@each_enctype
@each_side
def test_mit_opens_what_is_signed_only_and_the_reverse(
    mit: Callable[[int], MitContexts], enctype: int, initiator: bool
) -> None:
    from gssapi.raw import IOV, IOVBufferType, unwrap, wrap, wrap_iov

    rng = random.Random(enctype)
    ours, peer = mit(enctype).halves(initiator, encrypt=False)
    for piece in (1, 16, 17, 1000, RECORD_DATA_SIZE):
        for size in (1, piece + 1, 3 * piece + 5):
            data = rng.randbytes(size)
            made = [unwrap(peer, token) for token in split_records(ours.seal_records(data, piece))]
            assert b"".join(each.message for each in made) == data
            assert not any(each.encrypted for each in made)
            tokens = [wrap(peer, each, False, None).message for each in pieces(data, piece)]
            assert ours.open_records(tokens) == (data, None)
    for message in (b"turned as SSPI does it", b""):
        sent = IOV(IOVBufferType.header, message, IOVBufferType.padding, std_layout=False)
        wrap_iov(peer, sent, False, None)
        assert ours.open_records([b"".join(each.value or b"" for each in sent)]) == (message, None)


@each_side
def test_ntlm_signs_as_pyspnego_does(initiator: bool) -> None:
    key, side = bytes(range(16)), "initiate" if initiator else "accept"
    flags = NegotiateFlags(FLAGS)
    handle, signing_key = RC4Handle(sealkey(flags, key, side)), signkey(flags, key, side)
    ours, peer = (
        NTLMSealer(key, initiator=which, send_sequence=0, receive_sequence=0, encrypt=False)
        for which in (initiator, not initiator)
    )
    for number, size in enumerate((0, 1, 16, 1000, RECORD_DATA_SIZE)):
        data = random.Random(size).randbytes(size)
        expected = pyspnego_sign(FLAGS, handle, signing_key, number, data) + data  # type: ignore[arg-type, unused-ignore]
        assert b"".join(ours.seal(data)) == expected
        assert peer.open_records([expected]) == (data, None)
