"""The wire formats: every byte that goes out, and every byte that may come in."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

from harness import (
    SERVER_MESSAGE,
    PlainCredential,
    dword,
    frame,
    make_sessions,
    outcome,
    plain_session,
    random_pieces,
    seal_record,
    step_through,
)
from triosspi import (
    AuthenticationError,
    FrameTooLongError,
    LocalProtocolError,
    MessageTooLongError,
    RemoteProtocolError,
    TruncatedError,
    UnsealError,
    WireFormat,
)
from triosspi.session.session import Session
from triosspi.wire.codecs import (
    LARGEST_MAX_MESSAGE_SIZE,
    MAX_TOKEN_SIZE,
    SAMPLE_RECORD_SIZE,
    SAMPLE_TOKEN_SIZE,
    Codec,
    MessageCodec,
    make_codec,
)

CAP = 1000
TRAILER = 16
FRAME_CAP = CAP + 4 + TRAILER
HUGE = [0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]

both_formats = pytest.mark.parametrize("wire", [WireFormat.SAMPLE, WireFormat.FRAMED])


def framed_codec(data: bytes = b"", *, eof: bool = False) -> Codec:
    """A codec of the framed format past its handshake, with these bytes received."""
    codec = make_codec(WireFormat.FRAMED, CAP)
    codec.begin_records(TRAILER)
    if data:
        codec.feed(data)
    if eof:
        codec.feed(b"")
    return codec


def token_events(wire: WireFormat, pieces: list[bytes]) -> list[Any]:
    codec = make_codec(wire, CAP)
    events: list[Any] = []
    try:
        for piece in pieces:
            codec.feed(piece)
            while (token := codec.next_token()) is not None:
                events.append(token)
    except RemoteProtocolError as exc:
        events.append((type(exc), str(exc)))
    return events


def record_events(pieces: list[bytes]) -> list[Any]:
    codec = framed_codec()
    events: list[Any] = []
    try:
        for piece in pieces:
            codec.feed(piece)
            events.extend(codec.records())
    except RemoteProtocolError as exc:
        events.append((type(exc), str(exc)))
    return events


# ---- the handshake ----


@both_formats
def test_a_token_goes_behind_its_length_as_a_little_endian_dword(wire):
    assert make_codec(wire, CAP).pack_token(b"abc" * 100, done=False) == b"\x2c\x01\x00\x00" + b"abc" * 100


@both_formats
def test_real_tokens_go_behind_their_length_in_both_directions(wire):
    client, server = make_sessions(wire, raw=True, shake=False)
    negotiate = client.step(None)
    assert negotiate[:12] == dword(len(negotiate) - 4) + b"NTLMSSP\0"
    server.receive_data(negotiate)
    challenge = server.step(server.next_token())
    assert challenge[:12] == dword(len(challenge) - 4) + b"NTLMSSP\0"


@both_formats
def test_the_initiator_speaks_first(wire):
    client, server = make_sessions(wire, shake=False)
    assert server.next_token() is None
    assert client.step(None)


@both_formats
def test_an_empty_token_from_the_peer_is_refused(wire):
    codec = make_codec(wire, CAP)
    codec.feed(dword(0) + b"more")
    with pytest.raises(AuthenticationError, match="empty token"):
        codec.next_token()


@both_formats
def test_an_empty_token_is_never_sent(wire):
    credential: Any = PlainCredential("accept", [b""])
    session = Session(credential, wire)
    assert session.step(b"the only token") == b""
    assert session.established


def test_a_raw_ntlm_acceptor_has_nothing_to_send_on_its_last_step():
    client, server = make_sessions(raw=True, shake=False)
    server.receive_data(client.step(None))
    client.receive_data(server.step(server.next_token()))
    server.receive_data(client.step(client.next_token()))
    assert server.step(server.next_token()) == b""
    assert server.established


def test_a_token_that_the_acceptor_makes_on_its_last_step_is_sent():
    client, server = make_sessions(shake=False)
    data = client.step(None)
    while not server.established:
        server.receive_data(data)
        data = server.step(server.next_token())
        if not server.established:
            client.receive_data(data)
            data = client.step(client.next_token())
    assert len(data) > 4
    assert data[:4] == dword(len(data) - 4)
    # The initiator is not done without it.
    assert not client.established
    client.receive_data(data)
    assert client.step(client.next_token()) == b""
    assert client.established


def test_the_sample_is_never_sent_a_token_longer_than_its_buffer_of_12000_bytes():
    codec = make_codec(WireFormat.SAMPLE, CAP)
    assert SAMPLE_TOKEN_SIZE == 12_000
    assert len(codec.pack_token(bytes(12_000), done=False)) == 12_004
    with pytest.raises(AuthenticationError, match="12001 bytes"):
        codec.pack_token(bytes(12_001), done=False)


def test_a_session_of_the_sample_fails_rather_than_send_a_longer_token():
    credential: Any = PlainCredential("accept", [bytes(12_001)])
    session = Session(credential, WireFormat.SAMPLE)
    with pytest.raises(AuthenticationError, match="12001 bytes"):
        session.step(b"token")


def test_the_framed_format_may_send_tokens_of_up_to_64_kib():
    codec = make_codec(WireFormat.FRAMED, CAP)
    assert len(codec.pack_token(bytes(64 * 1024), done=False)) == 64 * 1024 + 4
    with pytest.raises(AuthenticationError):
        codec.pack_token(bytes(64 * 1024 + 1), done=False)


@both_formats
@pytest.mark.parametrize("length", [1, MAX_TOKEN_SIZE])
def test_a_token_of_up_to_64_kib_is_accepted(wire, length):
    assert MAX_TOKEN_SIZE == 64 * 1024
    assert token_events(wire, [frame(bytes(length))]) == [bytes(length)]


@both_formats
@pytest.mark.parametrize("length", [MAX_TOKEN_SIZE + 1, *HUGE])
def test_a_longer_token_is_refused_by_its_announcement_alone(wire, length):
    codec = make_codec(wire, CAP)
    codec.feed(dword(length))
    with pytest.raises(FrameTooLongError) as caught:
        codec.next_token()
    assert (caught.value.length, caught.value.limit) == (length, MAX_TOKEN_SIZE)


@both_formats
def test_the_same_tokens_come_out_of_any_pieces(wire):
    rng = random.Random(1)
    for data in [
        frame(b"first") + frame(bytes(500)) + frame(b"3"),
        frame(b"first") + dword(0) + b"never seen",
        frame(b"first") + dword(MAX_TOKEN_SIZE + 1) + b"never seen",
    ]:
        whole = token_events(wire, [data])
        assert whole[0] == b"first"
        assert token_events(wire, [data[i : i + 1] for i in range(len(data))]) == whole
        for _ in range(20):
            assert token_events(wire, random_pieces(data, rng)) == whole


@both_formats
@pytest.mark.parametrize(
    ("received", "at_boundary"),
    [(b"", True), (b"\x05", False), (dword(5), False), (dword(5) + b"1234", False)],
    ids=["between", "in the prefix", "behind the prefix", "in the body"],
)
def test_an_end_during_the_handshake_says_whether_it_cut_a_token(wire, received, at_boundary):
    codec = make_codec(wire, CAP)
    if received:
        codec.feed(received)
    assert codec.next_token() is None
    codec.feed(b"")
    with pytest.raises(TruncatedError) as caught:
        codec.next_token()
    assert caught.value.at_boundary is at_boundary


@both_formats
def test_a_whole_token_before_the_end_is_still_taken(wire):
    assert token_events(wire, [frame(b"token"), b""])[0] == b"token"


# ---- the sample's record ----


def test_the_samples_message_is_48_bytes_on_the_wire_with_ntlm():
    _, server = make_sessions(WireFormat.SAMPLE)
    assert len(SERVER_MESSAGE) == 28
    data = server.seal([SERVER_MESSAGE])
    assert len(data) == 48
    assert data[:4] == dword(16)
    assert data[4:8] == dword(1)  # the version within NTLM's signature: the trailer comes first
    assert server.sizes.security_trailer == 16


def test_the_samples_message_is_92_bytes_on_the_wire_with_a_trailer_of_60():
    session = plain_session("accept", WireFormat.SAMPLE, trailer_size=60)
    data = session.seal([SERVER_MESSAGE])
    assert len(data) == 92
    assert data[:4] == dword(60)
    assert data[64:] == SERVER_MESSAGE


@pytest.mark.parametrize(("trailer_size", "limit"), [(16, 2028), (60, 1984)])
def test_a_message_that_does_not_fit_the_samples_2048_bytes_is_refused_at_the_sender(trailer_size, limit):
    session = plain_session("accept", WireFormat.SAMPLE, trailer_size=trailer_size)
    assert session.sizes.max_message == limit
    with pytest.raises(MessageTooLongError) as caught:
        session.seal([bytes(limit + 1)])
    assert (caught.value.length, caught.value.limit) == (limit + 1, limit)
    # Refused is not sent: the one message is still to be said.
    assert len(session.seal([bytes(limit)])) == 2048


def test_the_samples_limit_holds_with_real_ntlm():
    client, server = make_sessions(WireFormat.SAMPLE)
    with pytest.raises(MessageTooLongError):
        server.seal([bytes(2029)])
    data = server.seal([b"x" * 2028])
    assert len(data) == SAMPLE_RECORD_SIZE == 2048
    assert outcome(client, [data, b""]) == [b"x" * 2028, "end"]


def test_a_smaller_limit_of_ours_holds_in_the_sample_too():
    session = plain_session("accept", WireFormat.SAMPLE, max_message_size=100)
    assert session.sizes.max_message == 100


def test_the_sample_has_one_message_and_it_is_the_acceptors():
    client, server = make_sessions(WireFormat.SAMPLE)
    with pytest.raises(LocalProtocolError, match="one message"):
        server.seal([b"one", b"two"])
    server.seal([b"one"])
    with pytest.raises(LocalProtocolError, match="nothing more"):
        server.seal([b"two"])
    with pytest.raises(LocalProtocolError, match="nothing more"):
        client.seal([b"from the initiator"])


def test_the_sample_has_no_goodbye():
    client, server = make_sessions(WireFormat.SAMPLE)
    assert client.goodbye() == b""
    assert server.goodbye() == b""
    assert not make_codec(WireFormat.SAMPLE, CAP).has_goodbye


def test_an_empty_message_cannot_be_sent_in_the_sample_either():
    _, server = make_sessions(WireFormat.SAMPLE)
    with pytest.raises(LocalProtocolError, match="empty"):
        server.seal([b""])


def test_the_samples_acceptor_expects_nothing_after_the_handshake():
    _, server = make_sessions(WireFormat.SAMPLE)
    assert outcome(server, [b"whatever the client still says"]) == ["end"]


def test_the_samples_receiver_takes_what_came_before_the_end_in_any_pieces():
    rng = random.Random(2)
    for pieces_of in (
        lambda data: [data],
        lambda data: [data[i : i + 1] for i in range(len(data))],
        lambda data: random_pieces(data, rng),
    ):
        client, server = make_sessions(WireFormat.SAMPLE)
        data = server.seal([SERVER_MESSAGE])
        pieces = pieces_of(data)
        for piece in pieces:
            client.receive_data(piece)
            # There is no length around the record: before the end nobody can know that it is whole.
            assert client.next_opened() == []
            assert not client.receive_ended
        assert outcome(client, [b""]) == [SERVER_MESSAGE, "end"]


def test_the_samples_receiver_refuses_more_than_2048_bytes_without_waiting_for_the_end():
    client, server = make_sessions(WireFormat.SAMPLE)
    client.receive_data(server.seal([b"x" * 2028]))
    assert client.next_opened() == []
    client.receive_data(b"!")
    with pytest.raises(FrameTooLongError) as caught:
        client.next_opened()
    assert (caught.value.length, caught.value.limit) == (2049, 2048)


@pytest.mark.parametrize(
    ("received", "at_boundary"), [(b"", True), (b"\x10", False), (dword(16), False)], ids=["nothing", "1", "4"]
)
def test_an_end_before_the_samples_record_is_a_truncation(received, at_boundary):
    client, _ = make_sessions(WireFormat.SAMPLE)
    client.receive_data(received)
    client.receive_data(b"")
    with pytest.raises(TruncatedError) as caught:
        client.next_opened()
    assert caught.value.at_boundary is at_boundary


def test_a_cut_record_of_the_sample_is_refused_wherever_it_was_cut():
    for size in range(1, 48):
        client, server = make_sessions(WireFormat.SAMPLE)
        events = outcome(client, [server.seal([SERVER_MESSAGE])[:size], b""])
        assert len(events) == 1
        assert issubclass(events[0][0], RemoteProtocolError)


@pytest.mark.parametrize("trailer_length", [0, 15, 17, 45, *HUGE])
def test_a_trailer_length_that_is_not_the_records_is_refused_in_the_sample(trailer_length):
    client, server = make_sessions(WireFormat.SAMPLE)
    data = dword(trailer_length) + server.seal([SERVER_MESSAGE])[4:]
    (error,) = outcome(client, [data, b""])
    assert issubclass(error[0], RemoteProtocolError)
    assert not issubclass(error[0], TruncatedError)


# ---- the framed format ----


def test_a_framed_record_counts_all_after_its_own_length():
    _, server = make_sessions()
    data = server.seal([b"hello"])
    assert struct.unpack_from("<II", data) == (4 + 16 + 5, 16)
    assert len(data) == 4 + 4 + 16 + 5


def test_any_number_of_records_goes_in_both_directions():
    client, server = make_sessions()
    for i in range(5):
        messages = [b"%d.%d" % (i, j) for j in range(i + 1)]
        assert outcome(server, [client.seal(messages)]) == messages
        assert outcome(client, [server.seal(messages)]) == messages


def test_a_batch_is_the_same_bytes_as_its_messages_one_by_one():
    one, other = (plain_session("accept", WireFormat.FRAMED) for _ in range(2))
    messages = [b"a", b"bc", b"def"]
    assert one.seal(messages) == b"".join(other.seal([message]) for message in messages)


@pytest.mark.parametrize("length", [1, CAP - 1, CAP])
def test_a_message_of_up_to_the_limit_goes_through(length):
    client, server = make_sessions(max_message_size=CAP)
    assert client.sizes.max_message == CAP
    data = client.seal([b"x" * length])
    assert outcome(server, [data]) == [b"x" * length]


def test_a_message_over_the_limit_is_refused_at_the_sender_and_costs_nothing():
    client, server = make_sessions(max_message_size=CAP)
    with pytest.raises(MessageTooLongError) as caught:
        client.seal([b"fits", bytes(CAP + 1)])
    assert (caught.value.length, caught.value.limit) == (CAP + 1, CAP)
    # Had the first of the two been sealed, a number would be missing now.
    assert outcome(server, [client.seal([b"next"])]) == [b"next"]


def test_a_message_over_the_limit_is_refused_at_the_receiver():
    client, server = make_sessions(max_message_size=CAP)
    (error,) = outcome(server, [seal_record(client, bytes(CAP + 1))])
    assert error[0] is FrameTooLongError


def test_the_default_limit_is_one_mebibyte_of_plaintext():
    client, server = make_sessions()
    assert client.sizes.max_message == 1024 * 1024
    with pytest.raises(MessageTooLongError):
        client.seal([bytes(1024 * 1024 + 1)])
    server.receive_data(dword(1024 * 1024 + 4 + 16))
    assert server.next_opened() == []
    _, other = make_sessions()
    (error,) = outcome(other, [dword(1024 * 1024 + 4 + 16 + 1)])
    assert error[0] is FrameTooLongError


def test_the_frames_limit_is_the_messages_and_four_and_the_trailer():
    with pytest.raises(FrameTooLongError) as caught:
        list(framed_codec(dword(FRAME_CAP + 1)).records())
    assert (caught.value.length, caught.value.limit) == (FRAME_CAP + 1, FRAME_CAP)
    assert list(framed_codec(dword(FRAME_CAP)).records()) == []
    record = frame(b"t" * TRAILER) + b"x" * CAP
    assert list(framed_codec(frame(record)).records()) == [(b"t" * TRAILER, b"x" * CAP)]


@pytest.mark.parametrize("length", [FRAME_CAP + 1, *HUGE])
def test_a_record_over_the_limit_is_refused_by_its_announcement_alone(length):
    codec = framed_codec(dword(length))
    with pytest.raises(FrameTooLongError) as caught:
        list(codec.records())
    assert caught.value.length == length


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_a_record_too_short_for_a_trailer_length_is_refused(length):
    with pytest.raises(RemoteProtocolError, match="cannot be split"):
        list(framed_codec(frame(bytes(length))).records())


@pytest.mark.parametrize("trailer_length", [22, 1000, *HUGE])
def test_a_trailer_larger_than_its_record_is_refused(trailer_length):
    with pytest.raises(RemoteProtocolError, match="cannot be split"):
        list(framed_codec(frame(dword(trailer_length) + bytes(21))).records())


@pytest.mark.parametrize("trailer_length", [0, 1, 15, 17, 21])
def test_a_trailer_of_another_length_than_ntlms_is_refused(trailer_length):
    client, server = make_sessions()
    sealed = seal_record(client, b"hello")
    (error,) = outcome(server, [sealed[:4] + dword(trailer_length) + sealed[8:]])
    assert error[0] is UnsealError


@pytest.mark.parametrize(
    ("received", "at_boundary"),
    [
        (b"", True),
        (b"\x05\x00", False),
        (dword(20), False),
        (frame(frame(b"t") + b"d")[:-1], False),
    ],
    ids=["between", "in the prefix", "behind the prefix", "in the body"],
)
def test_an_end_without_a_goodbye_says_whether_it_cut_a_record(received, at_boundary):
    good = frame(frame(b"t") + b"d")
    codec = framed_codec(good + received, eof=True)
    records = codec.records()
    assert next(records) == (b"t", b"d")
    with pytest.raises(TruncatedError) as caught:
        next(records)
    assert caught.value.at_boundary is at_boundary


def test_the_same_records_come_out_of_any_pieces():
    rng = random.Random(3)
    good = b"".join(frame(frame(bytes([i]) * TRAILER) + bytes([i]) * i) for i in range(30))
    for tail in [b"", frame(b"abc") + good, dword(FRAME_CAP + 1) + good, frame(dword(5) + b"1234") + good]:
        data = good + tail
        whole = record_events([data])
        assert len(whole) == 30 + bool(tail)
        assert record_events([data[i : i + 1] for i in range(len(data))]) == whole
        for _ in range(20):
            assert record_events(random_pieces(data, rng)) == whole


def test_the_same_messages_and_the_same_error_come_out_of_any_pieces():
    rng = random.Random(4)
    for spoil in (None, 60, 100):
        seen = []
        for how in ("whole", "trickle", "random"):
            client, server = make_sessions()
            data = bytearray(client.seal([b"%d" % i * i for i in range(1, 12)]) + client.goodbye())
            if spoil is not None:
                data[spoil] ^= 1
            if how == "whole":
                pieces = [bytes(data)]
            elif how == "trickle":
                pieces = [bytes([byte]) for byte in data]
            else:
                pieces = random_pieces(bytes(data), rng)
            seen.append(outcome(server, pieces))
        assert seen[0] == seen[1] == seen[2]
        assert (seen[0][-1] == "end") is (spoil is None)


def test_an_empty_message_cannot_be_sent_since_sealed_it_says_goodbye():
    client, server = make_sessions()
    with pytest.raises(LocalProtocolError, match="empty"):
        client.seal([b"fits", b""])
    assert issubclass(LocalProtocolError, ValueError)
    assert outcome(server, [client.seal([b"next"])]) == [b"next"]


def test_a_goodbye_is_a_sealed_empty_message():
    client, server = make_sessions()
    data = client.goodbye()
    assert struct.unpack_from("<II", data) == (4 + 16, 16)
    assert len(data) == 24
    assert server._context.open(data[8:24], b"") == b""


def test_bytes_after_a_goodbye_are_discarded_and_never_parsed():
    for more in (dword(0xFFFFFFFF), b"\x00", frame(b""), bytes(5000)):
        client, server = make_sessions()
        data = client.seal([b"last"]) + client.goodbye() + more
        assert outcome(server, [data]) == [b"last", "end"]
        assert server._codec._scanner.buffered == 0
        # Nor when they come later, nor is the end of the stream a truncation any more.
        assert outcome(server, [more, b""]) == ["end"]


def test_messages_after_a_goodbye_are_discarded_too():
    client, server = make_sessions()
    data = client.goodbye() + seal_record(client, b"too late")
    assert outcome(server, [data]) == ["end"]


@pytest.mark.parametrize("size", [0, -1, LARGEST_MAX_MESSAGE_SIZE + 1])
def test_a_limit_that_no_record_length_can_hold_is_refused(size):
    with pytest.raises(LocalProtocolError, match="max_message_size"):
        make_sessions(max_message_size=size)


def test_the_largest_limit_still_fits_the_records_length_with_any_trailer():
    session = plain_session("accept", WireFormat.FRAMED, trailer_size=1024, max_message_size=LARGEST_MAX_MESSAGE_SIZE)
    assert session.sizes.max_message + 4 + 1024 == 0xFFFFFFFF


# ---- where the handshake ends and the records begin ----


def test_a_record_in_the_same_segment_as_the_initiators_last_token_is_a_record():
    client, server = make_sessions(raw=True, shake=False)
    server.receive_data(client.step(None))
    client.receive_data(server.step(server.next_token()))
    last_token = client.step(client.next_token())
    server.receive_data(last_token + client.seal([b"pipelined", b"x" * (MAX_TOKEN_SIZE + 1)]))
    server.step(server.next_token())
    assert server.established
    # Longer than a token may be: its header is judged by the records' limit.
    assert server.next_opened() == [b"pipelined", b"x" * (MAX_TOKEN_SIZE + 1)]


@both_formats
def test_a_record_in_the_same_segment_as_the_acceptors_last_token_is_a_record(wire):
    client, server = make_sessions(wire, shake=False)
    data = client.step(None)
    while True:
        server.receive_data(data)
        data = server.step(server.next_token())
        if server.established:
            data += server.seal([SERVER_MESSAGE])
        client.receive_data(data)
        data = client.step(client.next_token())
        if client.established:
            break
    client.receive_data(b"")
    assert client.next_opened() == [SERVER_MESSAGE]


def test_a_record_longer_than_ours_may_be_is_refused_even_when_it_came_with_the_last_token():
    client, server = make_sessions(raw=True, shake=False, max_message_size=CAP)
    server.receive_data(client.step(None))
    client.receive_data(server.step(server.next_token()))
    server.receive_data(client.step(client.next_token()) + dword(FRAME_CAP + 1))
    server.step(server.next_token())
    with pytest.raises(FrameTooLongError):
        server.next_opened()


@both_formats
def test_both_formats_have_the_same_handshake(wire):
    client = make_sessions(wire, shake=False)[0]
    server = make_sessions(shake=False)[1]
    step_through(client, server)
    assert client.established
    assert server.established


def test_the_base_of_the_formats_is_none_of_them():
    codec = MessageCodec(CAP)
    with pytest.raises(NotImplementedError):
        codec.pack_records([])
    with pytest.raises(NotImplementedError):
        codec.records()
