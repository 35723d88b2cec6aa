"""The wire of .NET's NegotiateStream, byte by byte: its codec, how it is told from ours, and sessions over it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from harness import PASSWORD, make_acceptor, make_initiator, make_stream_sessions
from triosspi import (
    AuthenticationError,
    ForeignProtocolError,
    FrameTooLongError,
    PeerRefusalError,
    RemoteProtocolError,
    TruncatedError,
    UnsealError,
)
from triosspi.session import StreamSession
from triosspi.session.base import MAX_ATTEMPTS
from triosspi.wire import NEGOTIATE_STREAM_KNOWN_BY, NegotiateStreamCodec, is_negotiate_stream

DONE, ERROR, IN_PROGRESS = 0x14, 0x15, 0x16
SPNEGO = b"\x60\x03\x06\x01\x01"


def message(kind: int, payload: bytes = b"", version: int = 0x0100) -> bytes:
    return struct.pack(">BHH", kind, version, len(payload)) + payload


def codec(data: bytes = b"", *, eof: bool = False) -> NegotiateStreamCodec:
    it = NegotiateStreamCodec()
    if data:
        it.feed(data)
    if eof:
        it.feed(b"")
    return it


# The codec


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("size", [1, 255, 256, 0xFFFF])
def test_a_token_goes_behind_an_id_a_version_and_its_size_in_big_endian(size: int, done: bool) -> None:
    assert codec().pack_token(bytes(size), done=done) == message(DONE if done else IN_PROGRESS, bytes(size))


def test_a_token_of_more_than_two_bytes_can_say_is_not_sent() -> None:
    with pytest.raises(AuthenticationError, match="65536"):
        codec().pack_token(bytes(0x10000), done=False)


@pytest.mark.parametrize("piece", [1, 2, 4, 5, 6, 100])
def test_the_same_tokens_come_out_of_any_pieces(piece: int) -> None:
    it = codec()
    said = message(IN_PROGRESS, b"one") + message(IN_PROGRESS, bytes(300)) + message(DONE)
    heard = []
    for start in range(0, len(said), piece):
        it.feed(said[start : start + piece])
        while (token := it.next_token()) is not None:
            heard.append((token, it.peer_done))
    assert heard == [(b"one", False), (bytes(300), False), (b"", True)]


@pytest.mark.parametrize("kind", [*range(0x14), *range(0x17, 0x100)])
def test_whatever_is_no_message_is_refused_by_its_first_byte(kind: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"{kind:#04x}"):
        codec(bytes([kind])).next_token()


def test_the_version_is_not_looked_at() -> None:
    assert codec(message(IN_PROGRESS, b"token", version=0x7F99)).next_token() == b"token"


def test_nothing_follows_what_was_said_to_be_the_last() -> None:
    it = codec(message(DONE, b"last") + message(IN_PROGRESS, b"more"))
    assert it.next_token() == b"last"
    with pytest.raises(RemoteProtocolError, match="said that it was done"):
        it.next_token()


def test_an_empty_token_is_only_an_acknowledgement() -> None:
    with pytest.raises(AuthenticationError, match="empty"):
        codec(message(IN_PROGRESS)).next_token()


@pytest.mark.parametrize("cut", range(1, 12))
def test_an_end_within_a_message_is_no_end_between_two(cut: int) -> None:
    with pytest.raises(TruncatedError) as caught:
        codec(message(IN_PROGRESS, b"seven b")[:cut], eof=True).next_token()
    assert not caught.value.at_boundary


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (bytes.fromhex("00000000 8009030c"), 0x8009030C),  # [MS-NNS], .NET Framework
        (bytes.fromhex("ffffffff 8009030c"), 0x8009030C),
        (bytes.fromhex("0c030980 ffffffff"), 0x8009030C),  # .NET 8
        (bytes.fromhex("fe060000 00000000"), 1790),
        (bytes.fromhex("00000000 000006fe"), 1790),
        (bytes.fromhex("0c030980 8009030c"), 0x8009030C),  # ours
        (bytes(7), None),
        (b"", None),
    ],
)
def test_a_refusal_has_its_code_in_either_byte_order(payload: bytes, code: int | None) -> None:
    with pytest.raises(PeerRefusalError) as caught:
        codec(message(ERROR, payload)).next_token()
    assert caught.value.code == code


@pytest.mark.parametrize("size", [0xFC30, 0xFC31, 0xFFFF, 0x10000])
def test_records_of_up_to_64_kib_are_read(size: int) -> None:
    it = codec(struct.pack("<I", size) + bytes(size))
    it.begin_records(16)
    assert it.tokens() == [bytes(size)]


@pytest.mark.parametrize("size", [0x10001, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_longer_record_is_refused_by_its_size_alone(size: int) -> None:
    it = codec(struct.pack("<I", 3) + b"one" + struct.pack("<I", size))
    it.begin_records(16)
    # What was good comes first.
    assert it.tokens() == [b"one"]
    with pytest.raises(FrameTooLongError) as caught:
        it.tokens()
    assert caught.value.length == size


@pytest.mark.parametrize("size", [0, 1, 4, 5, 15])
@pytest.mark.parametrize("natively", [True, False])
def test_a_record_that_is_too_short_to_be_one_does_not_open(
    size: int, natively: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not natively:
        monkeypatch.setattr("triosspi.security.context.take_over", lambda *_, **__: None)
    client, server = make_stream_sessions()
    server.receive_data(client.seal_checked(b"good") + struct.pack("<I", size) + bytes(size))
    assert server.next_opened() == b"good"
    with pytest.raises(UnsealError):
        server.next_opened()


# Which wire it is


def framed_beginning(token: bytes) -> bytes:
    return struct.pack("<I", len(token)) + token


def der(tag: int, size: int) -> bytes:
    """An element that takes so many bytes in all."""
    for header in (2, 3, 4):
        body = size - header
        length = {2: bytes([body & 0xFF]), 3: b"\x81" + bytes([body & 0xFF]), 4: b"\x82" + body.to_bytes(2, "big")}[
            header
        ]
        if (body < 0x80, body < 0x100, True)[header - 2]:
            return bytes([tag]) + length + b"\x06" * body
    raise AssertionError


TOKENS: dict[str, Callable[[int], bytes]] = {
    "SPNEGO": lambda size: der(0x60, size),
    "a bare NegTokenInit": lambda size: der(0xA0, size),
    "NTLM": lambda size: (b"NTLMSSP\0" + bytes(size))[:size],
}


@pytest.mark.parametrize("make", TOKENS.values(), ids=TOKENS)
def test_the_wire_is_told_rightly_by_every_beginning_of_every_length(make: Callable[[int], bytes]) -> None:
    # 278 bytes behind their length are the one beginning that both have.
    for size in [*range(10, 700), 4096, 12_000, 65_535]:
        for said, expected in ((message(IN_PROGRESS, make(size)), True), (framed_beginning(make(size)), False)):
            for count in range(1, NEGOTIATE_STREAM_KNOWN_BY + 1):
                found = is_negotiate_stream(said[:count])
                assert found is expected or (found is None and count < NEGOTIATE_STREAM_KNOWN_BY), (size, count)


@pytest.mark.parametrize(
    "beginning", [b"GET / HTTP/1.1", b"\x16\x03\x01\x02\x00\x01", b"\xff" * 6, b"\x14\x01\x00\0\0\0"]
)
def test_what_neither_begins_with_is_not_waited_for(beginning: bytes) -> None:
    assert is_negotiate_stream(beginning) is False


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00", "TLS"),
        (b"GET / HTTP/1.1\r\n", "HTTP"),
        (framed_beginning(der(0x60, 300)), "the framed wire format"),
        (framed_beginning(b"NTLMSSP\0\1\0\0\0"), "the framed wire format"),
        (message(IN_PROGRESS, b"no token"), "text"),
        (message(IN_PROGRESS, b"\xff" * 40), "None"),
    ],
)
def test_who_speaks_something_else_is_named_as_soon_as_it_shows(said: bytes, name: str) -> None:
    session = StreamSession(make_acceptor())
    session.receive_data(said)
    with pytest.raises(ForeignProtocolError) as caught:
        session.next_token()
    assert name in str(caught.value.looks_like)
    # Nothing is said to whom does not speak this.
    assert session.refuse(caught.value) == b""
    assert not session.try_again(caught.value)


# Handshakes


def handshake() -> list[tuple[bool, bytes]]:
    """What is said in one by NTLM, and whether by the client."""
    client, server = make_stream_sessions(shake=False)
    said, data, mine = [], client.step(None), True
    while data:
        said.append((mine, data))
        receiver = server if mine else client
        receiver.receive_data(data)
        data = receiver.step(receiver.next_token())
        mine = not mine
    assert client.established
    assert server.established
    return said


def test_the_acceptor_always_says_that_it_is_over() -> None:
    assert [data[0] for _, data in handshake()] == [IN_PROGRESS, IN_PROGRESS, IN_PROGRESS, DONE]


def test_an_acceptor_without_a_last_token_acknowledges_with_an_empty_one() -> None:
    client, server = make_stream_sessions(raw=True, shake=False)
    server.receive_data(client.step(None))
    client.receive_data(server.step(server.next_token()))
    authenticate = client.step(client.next_token())
    # Its own context is complete; it says so, and waits.
    assert authenticate[0] == DONE
    assert not client.established
    server.receive_data(authenticate)
    acknowledgement = server.step(server.next_token())
    assert acknowledgement == message(DONE)
    client.receive_data(acknowledgement)
    assert client.step(client.next_token()) == b""
    assert client.established


def test_a_cut_at_every_byte_of_the_handshake_is_one_error_and_no_login() -> None:
    for cut_by_client in (True, False):
        for cut in range(1, sum(len(data) for mine, data in handshake() if mine is cut_by_client)):
            client, server = make_stream_sessions(shake=False)
            left = cut
            data, mine = client.step(None), True
            with pytest.raises((TruncatedError, AuthenticationError)):
                while data:
                    receiver = server if mine else client
                    if mine is cut_by_client:
                        data, left = data[:left], left - len(data)
                    receiver.receive_data(data)
                    if left <= 0:
                        receiver.receive_data(b"")
                    while (token := receiver.next_token()) is None:
                        pass
                    data = receiver.step(token)
                    mine = not mine
            assert not (server if cut_by_client else client).established


def test_an_initiator_that_is_done_too_early_is_refused() -> None:
    client, server = make_stream_sessions(shake=False)
    server.receive_data(bytes([DONE]) + client.step(None)[1:])
    with pytest.raises(AuthenticationError, match="over, and it is not"):
        server.step(server.next_token())
    assert not server.established


def test_an_initiator_may_say_of_its_last_token_that_it_is() -> None:
    # .NET 8 does, where SPNEGO has told it nothing more to wait for.
    client, server = make_stream_sessions(shake=False)
    server.receive_data(client.step(None))
    client.receive_data(server.step(server.next_token()))
    server.receive_data(bytes([DONE]) + client.step(client.next_token())[1:])
    server.step(server.next_token())
    assert server.established


@pytest.mark.parametrize("kind", [IN_PROGRESS, DONE])
def test_an_acceptor_that_goes_on_behind_the_end_is_refused(kind: int) -> None:
    client, server = make_stream_sessions(raw=True, shake=False)
    server.receive_data(client.step(None))
    client.receive_data(server.step(server.next_token()))
    client.step(client.next_token())
    client.receive_data(message(kind, b"\x60\x00"))
    with pytest.raises(RemoteProtocolError):
        client.step(client.next_token())
    assert not client.established


def test_an_acceptor_that_is_done_before_its_client_is_refused() -> None:
    client, server = make_stream_sessions(shake=False)
    server.receive_data(client.step(None))
    answer = server.step(server.next_token())
    client.receive_data(bytes([DONE]) + answer[1:])
    with pytest.raises(AuthenticationError, match="over, and it is not"):
        client.step(client.next_token())


def test_data_may_come_with_the_acceptors_last_token() -> None:
    client, server = make_stream_sessions(shake=False)
    data = client.step(None)
    while not server.established:
        server.receive_data(data)
        answer = server.step(server.next_token())
        client.receive_data(answer + (server.seal_checked(b"at once") if server.established else b""))
        data = client.step(client.next_token())
    assert client.established
    assert client.next_opened() == b"at once"


@pytest.mark.parametrize("size", [16, 20, 22, 0x0114, 0x0116])
def test_data_before_the_end_of_the_handshake_is_refused(size: int) -> None:
    client, server = make_stream_sessions(shake=False)
    server.receive_data(client.step(None))
    server.step(server.next_token())
    # A record's size may begin as a message does.
    server.receive_data(struct.pack("<I", size) + bytes(size) * 2)
    with pytest.raises(RemoteProtocolError):
        while (token := server.next_token()) is not None:
            server.step(token)
    assert not server.established


# Refusals


def refuse(server: StreamSession, client: StreamSession) -> tuple[AuthenticationError, bytes]:
    """Let a client that may not come in try; the error and what the server says of it."""
    data = client.step(None)
    while True:
        server.receive_data(data)
        try:
            data = server.step(server.next_token())
        except AuthenticationError as exc:
            return exc, server.refuse(exc)
        client.receive_data(data)
        data = client.step(client.next_token())


LOGON_DENIED = message(ERROR, bytes.fromhex("0c030980 8009030c"))
TRUST_FAILURE = message(ERROR, bytes.fromhex("fe060000 000006fe"))


@pytest.mark.parametrize(
    ("acceptor", "initiator", "said"),
    [
        ({}, {"password": "wrong"}, LOGON_DENIED),
        ({}, {"username": "DOM\\nobody"}, LOGON_DENIED),
        ({"deny": ["DOM\\alice"]}, {}, LOGON_DENIED),
        ({"target_names": ["host/mine"], "require_target": "allow"}, {"target": "host/other"}, TRUST_FAILURE),
    ],
    ids=["wrong password", "unknown account", "denied", "another service"],
)
def test_a_refusal_says_no_more_than_a_code(acceptor: Any, initiator: Any, said: bytes) -> None:
    server, client = StreamSession(make_acceptor(**acceptor)), StreamSession(make_initiator(**initiator))
    _, answer = refuse(server, client)
    assert answer == said
    client.receive_data(answer)
    with pytest.raises(PeerRefusalError):
        client.next_token()


def test_after_a_refusal_there_are_two_more_tries_and_then_none() -> None:
    server = StreamSession(make_acceptor())
    for number in range(1, MAX_ATTEMPTS + 1):
        error, answer = refuse(server, StreamSession(make_initiator("wrong")))
        assert answer == LOGON_DENIED
        assert not server.established
        assert server.try_again(error) is (number < MAX_ATTEMPTS)


def test_who_succeeds_at_last_is_logged_in_and_the_rounds_of_all_tries_are_counted_together() -> None:
    server = StreamSession(make_acceptor())
    for _ in range(MAX_ATTEMPTS - 1):
        error, _ = refuse(server, StreamSession(make_initiator("wrong")))
        assert server.try_again(error)
    client = StreamSession(make_initiator(PASSWORD))
    data = client.step(None)
    while not client.established:
        server.receive_data(data)
        client.receive_data(server.step(server.next_token()))
        data = client.step(client.next_token())
    assert server._rounds == 2 * MAX_ATTEMPTS
    server.receive_data(client.seal_checked(b"hello"))
    assert server.next_opened() == b"hello"


def test_who_leaves_after_its_refusal_has_said_nothing_since() -> None:
    server = StreamSession(make_acceptor())
    error, _ = refuse(server, StreamSession(make_initiator("wrong")))
    assert server.try_again(error)
    server.receive_data(b"")
    with pytest.raises(TruncatedError) as caught:
        server.next_token()
    assert caught.value.nothing_said


# Ends


def test_a_peer_that_ends_without_a_word_has_proved_nothing() -> None:
    client, server = make_stream_sessions()
    server.receive_data(b"")
    assert server.next_opened() == b""
    assert server.receive_ended
    assert not server.peer_proved
    with pytest.raises(ValueError, match="has not proved its key"):
        server.check_may_act_as_peer()
    # To the initiator the acceptor has said that it accepts: an end is no refusal.
    client.receive_data(b"")
    assert client.next_opened() == b""
    assert client.receive_ended
