"""Sessions of NegotiateStream without I/O: what a client does that signs or encrypts, in whatever pieces it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from harness import frame, make_stream_sessions
from triosspi import UnsealError
from triosspi.security import context, native
from triosspi.session import StreamSession

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
