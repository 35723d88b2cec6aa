"""Our client against servers that this project did not write, and what our client must not believe of any server."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from peers import PeerError, wire
from peers.acceptors import NTLM_ACCEPTORS, Acceptor, AcceptorKind, accept_login, send_sample
from peers.fixtures import no_public_realms  # noqa: F401 - a fixture, used by being here
from peers.requirements import require
from triosspi import (
    AuthenticationError,
    Initiator,
    RemoteProtocolError,
    SSPIChannel,
    TruncatedError,
    UnsealError,
    WireFormat,
    open_sspi_over_tcp_channel,
)

MESSAGE = b"This is your server speaking"
PASSWORD = "correct horse"
ACCOUNTS = [("alice", PASSWORD), ("Ünïcode", "пароль"), ("straße", "Pässwörd€")]

#: What a blocking server does with one connection.
Script = Callable[[socket.socket, Acceptor], None]
Channel = SSPIChannel[trio.SocketStream]


@pytest.fixture(params=NTLM_ACCEPTORS, ids=str)
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AcceptorKind:
    acceptor: AcceptorKind = request.param
    require(acceptor)
    if acceptor.user_file:
        accounts = tmp_path / "accounts"
        accounts.write_text("".join(f"DOM:{user}:{password}\n" for user, password in ACCOUNTS), encoding="utf-8")
        monkeypatch.setenv("NTLM_USER_FILE", str(accounts))
    return acceptor


spnego_only = pytest.mark.parametrize("kind", [k for k in NTLM_ACCEPTORS if k.spnego], ids=str, indirect=True)
raw_only = pytest.mark.parametrize("kind", [k for k in NTLM_ACCEPTORS if not k.spnego], ids=str, indirect=True)


@asynccontextmanager
async def connected(
    kind: AcceptorKind,
    script: Script,
    wire_format: WireFormat = WireFormat.FRAMED,
    *,
    user: str = "alice",
    typed: str | None = None,
    password: str = PASSWORD,
) -> AsyncIterator[Channel]:
    """Our client, and a server that runs `script` in a thread and closes. It knows `user`; the client types `typed`."""
    known = dict(ACCOUNTS)[user]

    def serve(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock, closing(kind.new(user, known, "DOM")) as acceptor:
            sock.settimeout(wire.TIMEOUT)
            script(sock, acceptor)

    initiator = Initiator(username=f"DOM\\{typed or user}", password=password, mechanism="ntlm", raw=not kind.spnego)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(wire.TIMEOUT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, serve, listener)
            port: int = listener.getsockname()[1]
            channel = await open_sspi_over_tcp_channel("127.0.0.1", port, initiator, wire=wire_format)
            async with channel:
                yield channel


def login(sock: socket.socket, acceptor: Acceptor) -> None:
    accept_login(sock, acceptor)


def greet(sock: socket.socket, acceptor: Acceptor) -> None:
    accept_login(sock, acceptor)
    send_sample(sock, acceptor, MESSAGE)


def refuse(sock: socket.socket, acceptor: Acceptor) -> None:
    """What every server does about a login that its implementation refuses: it closes."""
    with pytest.raises(PeerError):
        accept_login(sock, acceptor)


async def cause_of(receive: Callable[[], Any]) -> RemoteProtocolError:
    """Why the channel is broken; and it stays so, for the same reason."""
    with pytest.raises(trio.BrokenResourceError) as first:
        await receive()
    with pytest.raises(trio.BrokenResourceError) as second:
        await receive()
    cause = first.value.__cause__
    assert isinstance(cause, RemoteProtocolError)
    assert second.value.__cause__ is cause
    return cause


# ---- the right password ----


@pytest.mark.parametrize(
    ("user", "typed"),
    [("alice", "alice"), ("alice", "ALICE"), ("Ünïcode", "Ünïcode")],
)
async def test_right_password_opens_the_sample(kind: AcceptorKind, user: str, typed: str) -> None:
    clients = []

    def greet_by_name(sock: socket.socket, acceptor: Acceptor) -> None:
        greet(sock, acceptor)
        clients.append(acceptor.client)

    password = dict(ACCOUNTS)[user]
    async with connected(kind, greet_by_name, WireFormat.SAMPLE, user=user, typed=typed, password=password) as channel:
        assert await channel.receive() == MESSAGE
        with pytest.raises(trio.EndOfChannel):
            await channel.receive()
        assert channel.peer.mechanism == "ntlm"
        assert channel.peer.principal == "host/127.0.0.1"
        assert not channel.peer.mutual
        assert channel.package_name == "NTLM"
        assert channel.sizes.security_trailer == 16
    assert len(clients) == 1
    assert clients[0] is not None and clients[0].upper() == f"DOM\\{user}".upper()


@pytest.mark.parametrize("kind", [k for k in NTLM_ACCEPTORS if k.eszett == "ß"], ids=str, indirect=True)
async def test_our_client_upper_cases_eszett_as_windows_does(kind: AcceptorKind) -> None:
    """Windows, .NET and Samba hash STRAßE. By `str.upper` it is STRASSE, and nobody of such a name gets in there.

    The servers that hash STRASSE, pyspnego's among them, are on the other side of it: a client has one try.
    """
    async with connected(kind, greet, WireFormat.SAMPLE, user="straße", password="Pässwörd€") as channel:
        assert await channel.receive() == MESSAGE


async def test_twenty_messages_of_many_sizes_and_a_batch_come_back(kind: AcceptorKind) -> None:
    rng = random.Random(20)
    sizes = [1, 17, 1024, 64 * 1024, 1024 * 1024 - 1, *(rng.randint(1, 2000) for _ in range(15))]
    batch = [rng.randbytes(rng.randint(1, 300)) for _ in range(20)]
    heard_goodbye = []

    def echo(sock: socket.socket, acceptor: Acceptor) -> None:
        accept_login(sock, acceptor)
        while message := wire.receive_message(sock, acceptor):
            wire.send_message(sock, acceptor, message)
        heard_goodbye.append(True)

    async with connected(kind, echo) as channel:
        for size in sizes:
            message = rng.randbytes(size)
            await channel.send(message)
            assert await channel.receive() == message
        await channel.send_many(batch)
        assert [await channel.receive() for _ in batch] == batch
    assert heard_goodbye == [True]


async def test_goodbye_of_the_server_ends_the_channel(kind: AcceptorKind) -> None:
    def leave(sock: socket.socket, acceptor: Acceptor) -> None:
        accept_login(sock, acceptor)
        wire.send_message(sock, acceptor, MESSAGE)
        if kind.seals_empty:
            wire.send_goodbye(sock, acceptor)

    async with connected(kind, leave) as channel:
        assert await channel.receive() == MESSAGE
        if kind.seals_empty:
            with pytest.raises(trio.EndOfChannel):
                await channel.receive()
        else:
            cause = await cause_of(channel.receive)
            assert isinstance(cause, TruncatedError) and cause.at_boundary


# ---- the wrong one ----


@spnego_only
async def test_wrong_password_under_spnego_fails_the_handshake(kind: AcceptorKind) -> None:
    async with connected(kind, refuse, password="not this one") as channel:
        cause = await cause_of(channel.do_handshake)
    assert isinstance(cause, AuthenticationError)
    assert "login probably refused" in str(cause)


@raw_only
async def test_wrong_password_with_raw_ntlm_shows_at_the_first_message(kind: AcceptorKind) -> None:
    async with connected(kind, refuse, password="not this one") as channel:
        # Its third token is the last; nobody confirms it.
        await channel.do_handshake()
        cause = await cause_of(channel.receive)
    assert isinstance(cause, AuthenticationError)
    assert "login probably refused" in str(cause)


# ---- what is changed on the way ----


@pytest.mark.parametrize("where", ["version", "checksum", "sequence number", "ciphertext", "last byte"])
async def test_message_of_the_server_with_one_bit_flipped_is_refused(kind: AcceptorKind, where: str) -> None:
    offset = 8 + {"version": 0, "checksum": 4, "sequence number": 12, "ciphertext": 16, "last byte": -9}[where]
    bit = random.Random(f"{kind} {where}").randrange(8)

    def tamper(sock: socket.socket, acceptor: Acceptor) -> None:
        accept_login(sock, acceptor)
        good, bad, late = (bytearray(wire.frame(acceptor, message)) for message in (b"good", b"bad", b"late"))
        bad[offset] ^= 1 << bit
        wire.send_all(sock, bytes(good + bad + late))

    async with connected(kind, tamper) as channel:
        assert await channel.receive() == b"good"
        assert isinstance(await cause_of(channel.receive), UnsealError)


@pytest.mark.parametrize("offset", [4 + 4, 4 + 12, 4 + 16, 47])
async def test_the_samples_message_with_one_bit_flipped_is_refused(kind: AcceptorKind, offset: int) -> None:
    def tamper(sock: socket.socket, acceptor: Acceptor) -> None:
        accept_login(sock, acceptor)
        record = bytearray(wire.join_sealed(*acceptor.seal(MESSAGE)))
        assert len(record) == 48
        record[offset] ^= 1
        wire.send_all(sock, bytes(record))

    async with connected(kind, tamper, WireFormat.SAMPLE) as channel:
        assert isinstance(await cause_of(channel.receive), UnsealError)


@pytest.mark.parametrize("where", ["checksum", "sequence number", "ciphertext", "last byte"])
async def test_our_message_with_one_bit_flipped_is_refused_by_the_server(kind: AcceptorKind, where: str) -> None:
    offset = 4 + {"checksum": 4, "sequence number": 12, "ciphertext": 16, "last byte": -5}[where]
    refused = []

    def tamper(sock: socket.socket, acceptor: Acceptor) -> None:
        accept_login(sock, acceptor)
        assert wire.receive_message(sock, acceptor) == b"good"
        record = bytearray(wire.recv_prefixed(sock))
        record[offset] ^= 1
        try:
            acceptor.open(*wire.split_sealed(bytes(record)))
        except PeerError:
            refused.append(where)

    async with connected(kind, tamper) as channel:
        await channel.send_many([b"good", b"bad"])
    assert refused == [where]


# ---- what a server may not leave out ----


def neg_token_resp(*fields: bytes) -> bytes:
    """DER of a short NegTokenResp (RFC 4178 4.2.2)."""
    body = b"".join(fields)
    return bytes([0xA1, 2 + len(body), 0x30, len(body)]) + body


def neg_state(state: int) -> bytes:
    return bytes([0xA0, 3, 0x0A, 1, state])


ACCEPT_COMPLETED, REJECT = 0, 2


def answering(replace: Callable[[bytes, bool], bytes]) -> Script:
    """A server some of whose answers are replaced on the way, and which then goes on as if they were not."""

    def script(sock: socket.socket, acceptor: Acceptor) -> None:
        accept_login(sock, acceptor, replace)
        wire.send_message(sock, acceptor, MESSAGE)

    return script


@spnego_only
async def test_server_that_leaves_out_its_final_mech_list_mic_is_refused(kind: AcceptorKind) -> None:
    """Only this signature shows that the server has seen our list as we sent it, and knows our key.

    pyspnego's initiator takes accept-completed for enough.
    """
    script = answering(lambda token, last: neg_token_resp(neg_state(ACCEPT_COMPLETED)) if last else token)
    async with connected(kind, script) as channel:
        assert isinstance(await cause_of(channel.do_handshake), AuthenticationError)


@spnego_only
async def test_server_that_signs_the_mech_list_wrongly_is_refused(kind: AcceptorKind) -> None:
    script = answering(lambda token, last: token[:-9] + bytes([token[-9] ^ 1]) + token[-8:] if last else token)
    async with connected(kind, script) as channel:
        assert isinstance(await cause_of(channel.do_handshake), AuthenticationError)


@spnego_only
async def test_server_that_answers_spnego_with_raw_ntlm_is_refused(kind: AcceptorKind) -> None:
    """It would end the handshake without any mechListMIC."""

    def unwrap(token: bytes, _last: bool) -> bytes:
        return token[token.index(b"NTLMSSP\0") :]

    def script(sock: socket.socket, acceptor: Acceptor) -> None:
        challenge = acceptor.step(wire.recv_prefixed(sock))
        assert challenge is not None
        wire.send_prefixed(sock, unwrap(challenge, False))

    async with connected(kind, script) as channel:
        assert isinstance(await cause_of(channel.do_handshake), AuthenticationError)


@spnego_only
async def test_server_that_says_completed_instead_of_a_challenge_is_refused(kind: AcceptorKind) -> None:
    def script(sock: socket.socket, _acceptor: Acceptor) -> None:
        wire.recv_prefixed(sock)
        wire.send_prefixed(sock, neg_token_resp(neg_state(ACCEPT_COMPLETED)))

    async with connected(kind, script) as channel:
        assert isinstance(await cause_of(channel.do_handshake), AuthenticationError)


@spnego_only
async def test_server_that_says_reject_fails_the_handshake(kind: AcceptorKind) -> None:
    script = answering(lambda token, last: neg_token_resp(neg_state(REJECT)) if last else token)
    async with connected(kind, script) as channel:
        assert isinstance(await cause_of(channel.do_handshake), AuthenticationError)


# ---- all of them together ----


async def test_one_program_talks_to_all_kinds_of_servers_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts = tmp_path / "accounts"
    accounts.write_text(f"DOM:alice:{PASSWORD}\n", encoding="utf-8")
    monkeypatch.setenv("NTLM_USER_FILE", str(accounts))
    for kind in NTLM_ACCEPTORS:
        require(kind)
    logged_in = 0
    all_logged_in = trio.Event()

    def answer(sock: socket.socket, acceptor: Acceptor) -> None:
        accept_login(sock, acceptor)
        while message := wire.receive_message(sock, acceptor):
            wire.send_message(sock, acceptor, message[::-1])

    async def talk(kind: AcceptorKind) -> None:
        nonlocal logged_in
        async with connected(kind, answer) as channel:
            await channel.send(b"abc")
            assert await channel.receive() == b"cba"
            logged_in += 1
            if logged_in == len(NTLM_ACCEPTORS):
                all_logged_in.set()
            await all_logged_in.wait()
            await channel.send(b"12")
            assert await channel.receive() == b"21"

    async with trio.open_nursery() as nursery:
        for kind in NTLM_ACCEPTORS:
            nursery.start_soon(partial(talk, kind))
