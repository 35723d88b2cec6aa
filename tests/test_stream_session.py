"""Sessions of NegotiateStream without I/O: what a client does that signs or encrypts, in whatever pieces it comes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from harness import frame, make_acceptor, make_initiator, make_stream_sessions, step_through
from triosspi import Acceptor, Account, AuthenticationError, UnsealError
from triosspi.security import context, native
from triosspi.security.ntlm.accounts import AccountTable
from triosspi.security.ntlm.primitives import nt_hash
from triosspi.session import StreamSession
from triosspi.session.base import MAX_ROUNDS

Sessions = tuple[StreamSession, StreamSession]
ANSWER = b"an answer that is nobody else's"


@pytest.fixture
def sessions_with_a_client_that_encrypts_unsaid(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Sessions]:
    """(client, server) by NTLM, where the server demands signing only, and the client encrypts without having set SEAL.

    As .NET on Linux does; its flags are those of a client that only signs.
    """
    if not native.available()["ntlm"]:
        pytest.skip("NTLM is not sealed natively here")
    real = context.take_over

    def take_over(handshake: Any, inner: Any, *, initiator: bool, encrypt: bool) -> Any:
        return real(handshake, inner, initiator=initiator, encrypt=encrypt or initiator)

    def make() -> Sessions:
        with monkeypatch.context() as patch:
            patch.setattr(context, "take_over", take_over)
            return make_stream_sessions(protection="sign")

    return make


def flipped(record: bytes) -> bytes:
    return record[:-1] + bytes([record[-1] ^ 1])


def test_the_first_record_tells_whether_a_client_encrypts(
    sessions_with_a_client_that_encrypts_unsaid: Callable[[], Sessions],
) -> None:
    client, server = sessions_with_a_client_that_encrypts_unsaid()
    server.receive_data(client.seal_checked(b"encrypted"))
    assert server.next_opened() == b"encrypted"
    assert server.protection == "encrypt"
    assert ANSWER not in server.seal_checked(ANSWER)


def test_a_client_that_signs_is_answered_so() -> None:
    client, server = make_stream_sessions(protection="sign")
    server.receive_data(client.seal_checked(b"signed"))
    assert server.next_opened() == b"signed"
    assert server.protection == "sign"
    answer = server.seal_checked(ANSWER)
    assert ANSWER in answer
    client.receive_data(answer)
    assert client.next_opened() == ANSWER


def test_an_empty_record_in_front_of_the_first_does_not_hide_that_a_client_signs() -> None:
    # By NTLM it is the same whether it is signed or encrypted.
    client, server = make_stream_sessions(protection="sign")
    server.receive_data(frame(b"".join(client._context.seal(b""))) + client.seal_checked(b"signed"))
    assert server.next_opened() == b"signed"
    assert server.protection == "sign"


@pytest.mark.parametrize("empty_before", [False, True])
def test_a_first_record_that_was_altered_does_not_turn_encryption_off(
    empty_before: bool, sessions_with_a_client_that_encrypts_unsaid: Callable[[], Sessions]
) -> None:
    # Whoever is between the two can change a bit; the other direction goes on, and would then go on in the clear.
    client, server = sessions_with_a_client_that_encrypts_unsaid()
    before = frame(b"".join(client._context.seal(b""))) if empty_before else b""
    server.receive_data(before + flipped(client.seal_checked(b"encrypted")))
    with pytest.raises(UnsealError):
        server.next_opened()
    assert server.protection == "encrypt"
    answer = server.seal_checked(ANSWER)
    assert ANSWER not in answer
    client.receive_data(answer)
    assert client.next_opened() == ANSWER


def test_what_a_signing_client_said_before_what_was_altered_comes_first() -> None:
    client, server = make_stream_sessions(protection="sign")
    server.receive_data(client.seal_checked(b"good") + flipped(client.seal_checked(b"bad")))
    assert server.next_opened() == b"good"
    assert server.protection == "sign"
    with pytest.raises(UnsealError):
        server.next_opened()


# Handshakes


@pytest.mark.parametrize("raw", [False, True], ids=["spnego", "raw"])
@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7, 64])
def test_a_handshake_and_data_in_pieces_of_any_size_are_the_same(raw: bool, piece: int) -> None:
    client, server = make_stream_sessions(raw=raw, shake=False)
    sender, receiver, data = client, server, client.step(None)
    while data:
        token = None
        for start in range(0, len(data), piece):
            assert token is None
            receiver.receive_data(data[start : start + piece])
            token = receiver.next_token()
        assert token is not None
        data = receiver.step(token)
        sender, receiver = receiver, sender
    assert client.established
    assert server.established
    for ours, theirs in ((client, server), (server, client)):
        sealed, opened = ours.seal_checked(b"hello"), b""
        for start in range(0, len(sealed), piece):
            theirs.receive_data(sealed[start : start + piece])
            opened += theirs.next_opened()
        assert opened == b"hello"


def test_a_handshake_that_does_not_end_is_refused_after_so_many_tokens() -> None:
    server = StreamSession(make_acceptor())
    first = make_stream_sessions(shake=False)[0].step(None)
    for _ in range(MAX_ROUNDS):
        server.receive_data(first)
        token = server.next_token()
        assert token is not None
    server.receive_data(first)
    with pytest.raises(AuthenticationError, match=f"after {MAX_ROUNDS} tokens"):
        server.next_token()
    assert not server.established


def test_a_wrong_password_an_unknown_and_a_disabled_account_are_told_the_same() -> None:
    accounts = AccountTable()
    accounts.add(Account("DOM", "alice", nt_hash("right")))
    accounts.add(Account("DOM", "bob", nt_hash("right"), enabled=False))
    said = set()
    for username, password in (("alice", "wrong"), ("nobody", "right"), ("bob", "right")):
        client = StreamSession(make_initiator(password, username=f"DOM\\{username}"))
        server = StreamSession(Acceptor(accounts=accounts))
        with pytest.raises(AuthenticationError) as caught:
            step_through(client, server)
        said.add(server.refuse(caught.value))
        assert not server.established
    assert said == {struct.pack(">BHH", 0x15, 0x0100, 8) + bytes.fromhex("0c030980 8009030c")}
