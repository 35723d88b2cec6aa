"""Every NTLM client that a Linux machine has, against our live server."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import pytest
import trio

from harness import echo
from peers import NTLM_PEERS, Initiator, PeerError, PeerKind, wire
from peers.fixtures import no_public_realms  # noqa: F401 - a fixture, used by being here
from peers.gssapi_peer import GSS_NTLMSSP
from peers.mit_realm import kerberos_first, mit_realm  # noqa: F401 - the same
from peers.ntlm_auth_peer import NTLM_AUTH_NTLM, NtlmAuthInitiator
from peers.pyspnego_peer import PYSPNEGO_NTLM
from peers.requirements import require
from triosspi import (
    Acceptor,
    Account,
    PeerIdentity,
    ServerStatistics,
    SSPIChannel,
    WireFormat,
    serve_sspi_over_tcp,
)
from triosspi.security.ntlm import messages
from triosspi.security.ntlm.accounts import AccountTable
from triosspi.security.ntlm.primitives import nt_hash

MESSAGE = b"This is your server speaking"
KERBEROS_FIRST = "mit-spnego-kerberos-first"
PEER_NAMES = [*map(str, NTLM_PEERS), KERBEROS_FIRST]
NTLMSSP = b"NTLMSSP\0"


class User(NamedTuple):
    name: str
    password: str
    domain: str


ALICE = User("alice", "correct horse", "DOM")
UMLAUT = User("Ünïcode", "пароль", "DOM")
ESZETT = User("straße", "Pässwörd€", "DOM")
CAROL = User("carol", "anywhere", "")
UPN = User("bob@example.test", "by mail", "")
SPLIT_UPN = User("bob", UPN.password, "example.test")
DISABLED = User("mallory", "was right", "DOM")


def accounts() -> AccountTable:
    table = AccountTable()
    for user in (ALICE, UMLAUT, ESZETT, CAROL, UPN, SPLIT_UPN, DISABLED):
        table.add(Account(user.domain, user.name, nt_hash(user.password), enabled=user is not DISABLED))
    return table


# ---- the two sides ----


@pytest.fixture(params=PEER_NAMES)
def peer(request: pytest.FixtureRequest) -> PeerKind:
    if request.param == KERBEROS_FIRST:
        # It brings a realm along, and so cannot stand in a list.
        kind: PeerKind = request.getfixturevalue("kerberos_first")
    else:
        kind = next(kind for kind in NTLM_PEERS if kind.name == request.param)
    require(kind)
    return kind


def acceptor_for(peer: PeerKind) -> Acceptor:
    return Acceptor(accounts=accounts(), require_mic=peer.sends_mic)


Channel = SSPIChannel[trio.SocketStream]


@dataclass(kw_only=True)
class Server:
    """A live server. `peers` are those for whom the handler was called, in that order."""

    port: int
    statistics: ServerStatistics
    peers: list[PeerIdentity] = field(default_factory=list)
    connections: trio.Nursery

    async def wait_until_over(self, connections: int = 1) -> None:
        """Until so many connections have come and gone: a client's last read comes before the server's bookkeeping."""
        while self.statistics.accepted < connections or self.connections.child_tasks:
            await trio.lowlevel.checkpoint()


async def greet(channel: Channel) -> None:
    assert channel.package_name == "NTLM"
    assert channel.sizes.security_trailer == 16
    await channel.send(MESSAGE)


@asynccontextmanager
async def serving(
    acceptor: Acceptor,
    handler: Callable[[Channel], Any] = echo,
    wire_format: WireFormat = WireFormat.FRAMED,
    **options: Any,
) -> AsyncIterator[Server]:
    async def handle(channel: Channel) -> None:
        server.peers.append(channel.peer)
        await handler(channel)

    async with trio.open_nursery() as nursery, trio.open_nursery() as connections:
        server = Server(port=0, statistics=ServerStatistics(), connections=connections)
        listeners = await nursery.start(
            partial(
                serve_sspi_over_tcp,
                handle,
                0,
                acceptor,
                host="127.0.0.1",
                wire=wire_format,
                statistics=server.statistics,
                handler_nursery=connections,
                **options,
            )
        )
        server.port = listeners[0].transport_listener.socket.getsockname()[1]
        yield server
        connections.cancel_scope.cancel()
        nursery.cancel_scope.cancel()


class Connection(NamedTuple):
    """A foreign client that has logged in (or believes so)."""

    sock: Any
    initiator: Initiator

    def send(self, message: bytes) -> None:
        wire.send_message(self.sock, self.initiator, message)

    def receive(self) -> bytes:
        return wire.receive_message(self.sock, self.initiator)

    def echo(self, message: bytes) -> None:
        self.send(message)
        assert self.receive() == message


@contextmanager
def logged_in(peer: PeerKind, server: Server, user: User = ALICE) -> Iterator[Connection]:
    """Blocks, as all that is done with it."""
    with closing(peer.new(*user)) as initiator, wire.connect("127.0.0.1", server.port) as sock:
        wire.login(sock, initiator)
        yield Connection(sock, initiator)


def read_sample(peer: PeerKind, server: Server, user: User = ALICE) -> wire.Sample:
    with logged_in(peer, server, user) as connection:
        return wire.read_sample(connection.sock, connection.initiator)


in_thread = trio.to_thread.run_sync


# ---- the right password ----


@pytest.mark.parametrize(
    ("typed", "principal"),
    [
        pytest.param(ALICE, "DOM\\alice", id="as-in-the-file"),
        pytest.param(User("ALICE", ALICE.password, "dom"), "DOM\\alice", id="another-case"),
        pytest.param(UMLAUT, "DOM\\Ünïcode", id="umlaut"),
        pytest.param(User("üNÏCODE", UMLAUT.password, "Dom"), "DOM\\Ünïcode", id="umlaut-another-case"),
        pytest.param(ESZETT, "DOM\\straße", id="eszett"),
        pytest.param(User("Straße", ESZETT.password, "DOM"), "DOM\\straße", id="eszett-another-case"),
        pytest.param(CAROL, "carol", id="no-domain"),
        pytest.param(User("Carol", CAROL.password, "ANYWHERE"), "carol", id="any-domain"),
    ],
)
async def test_right_password_opens_the_sample_and_the_principal_is_the_account_files(
    peer: PeerKind, typed: User, principal: str
) -> None:
    async with serving(acceptor_for(peer), greet, WireFormat.SAMPLE) as server:
        sample = await in_thread(read_sample, peer, server, typed)
    assert sample.plaintext == MESSAGE
    # The sample's own count: a DWORD, NTLM's signature, and the message's 28 bytes.
    assert len(sample.raw) == 4 + 16 + 28 == 48
    assert len(server.peers) == 1
    identity = server.peers[0]
    domain, _, name = principal.rpartition("\\")
    assert (identity.mechanism, identity.principal) == ("ntlm", principal)
    assert (identity.domain, identity.name, identity.mutual) == (domain, name, False)
    assert (server.statistics.authenticated, server.statistics.refused) == (1, 0)


# Not the one with Kerberos to offer: it would want a ticket of the realm example.test.
@pytest.mark.parametrize("peer", [str(kind) for kind in NTLM_PEERS], indirect=True)
async def test_upn_logs_in_to_the_account_that_is_written_like_it(peer: PeerKind) -> None:
    async with serving(acceptor_for(peer), greet, WireFormat.SAMPLE) as server:
        assert (await in_thread(read_sample, peer, server, UPN)).plaintext == MESSAGE
    identity = server.peers[0]
    assert identity.principal == ("example.test\\bob" if peer.splits_upn else "bob@example.test")


async def test_twenty_messages_of_many_sizes_and_a_batch_come_back(peer: PeerKind) -> None:
    rng = random.Random(20)
    sizes = [1, 17, 1024, 64 * 1024, 1024 * 1024 - 1, *(rng.randint(1, 2000) for _ in range(15))]
    batch = [rng.randbytes(rng.randint(1, 300)) for _ in range(20)]

    def talk(server: Server) -> None:
        with logged_in(peer, server) as connection:
            for size in sizes:
                connection.echo(rng.randbytes(size))
            # In one piece, without waiting: nothing may be lost where the server reads several at once.
            wire.send_all(connection.sock, b"".join(wire.frame(connection.initiator, message) for message in batch))
            assert [connection.receive() for _ in batch] == batch

    async with serving(acceptor_for(peer)) as server:
        await in_thread(talk, server)
        await server.wait_until_over()
    assert server.peers[0].principal == "DOM\\alice"
    # Closing between two messages is how a peer ends that cannot say goodbye.
    assert (server.statistics.lost, server.statistics.handler_errors) == (0, 0)


async def test_goodbye_of_the_peer_ends_the_channel(peer: PeerKind) -> None:
    ends: list[str] = []

    async def until_the_end(channel: Channel) -> None:
        try:
            async for message in channel:
                await channel.send(message)
        except trio.BrokenResourceError:
            ends.append("without a goodbye")
            raise
        ends.append("goodbye")

    def talk(server: Server) -> None:
        with logged_in(peer, server) as connection:
            connection.echo(b"the last one")
            if peer.seals_empty:
                wire.send_goodbye(connection.sock, connection.initiator)
                # Whoever has said goodbye reads no more, and so is told nothing more.
                with pytest.raises(wire.Closed):
                    connection.receive()
            else:
                with pytest.raises(PeerError):
                    wire.send_goodbye(connection.sock, connection.initiator)

    async with serving(acceptor_for(peer), until_the_end) as server:
        await in_thread(talk, server)
        await server.wait_until_over()
    assert ends == ["goodbye" if peer.seals_empty else "without a goodbye"]
    assert server.statistics.lost == 0


async def test_goodbye_of_the_server_opens_as_an_empty_message(peer: PeerKind) -> None:
    def talk(server: Server) -> None:
        with logged_in(peer, server) as connection:
            assert connection.receive() == MESSAGE
            assert connection.receive() == b""
            with pytest.raises(wire.Closed):
                connection.receive()

    async with serving(acceptor_for(peer), greet) as server:
        await in_thread(talk, server)


# ---- the refused ----


class RecordingSocket:
    """Writes down what comes."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self.received = bytearray()

    def recv(self, size: int) -> bytes:
        data: bytes = self._sock.recv(size)
        self.received += data
        return data

    def sendall(self, data: bytes) -> None:
        self._sock.sendall(data)


def all_that_a_refused_client_sees(peer: PeerKind, server: Server, user: User) -> bytes:
    """Everything that the server says to a login that it refuses, with what is random in a CHALLENGE blanked."""
    with closing(peer.new(*user)) as initiator, wire.connect("127.0.0.1", server.port) as sock:
        recorder: Any = RecordingSocket(sock)
        try:
            wire.login(recorder, initiator)
        except wire.Refused:
            assert peer.spnego
        else:
            # To raw NTLM its own third token is the last, and all seems well.
            assert not peer.spnego
        # An orderly end, and no reset: the kernel could tell the one from the other, too.
        assert wire.recv_to_eof(recorder) == b""
    seen = recorder.received
    server_challenge = seen.index(NTLMSSP) + 24
    seen[server_challenge : server_challenge + 8] = bytes(8)
    # MsvAvTimestamp: its AvId and length, then a FILETIME.
    timestamp = seen.index(b"\x07\x00\x08\x00", server_challenge) + 4
    seen[timestamp : timestamp + 8] = bytes(8)
    return bytes(seen)


async def test_all_refused_logins_look_the_same_and_the_log_tells_why(
    peer: PeerKind, caplog: pytest.LogCaptureFixture
) -> None:
    tries = {
        User("alice", "not this one", "DOM"): "wrong password for 'DOM\\\\alice'",
        # The password of somebody else.
        User("alice", UMLAUT.password, "DOM"): "wrong password for 'DOM\\\\alice'",
        User("stranger", ALICE.password, "DOM"): "no account 'DOM\\\\stranger'",
        DISABLED: "the account 'DOM\\\\mallory' is disabled",
        User("mallory", "not this one", "DOM"): "wrong password for 'DOM\\\\mallory'",
    }
    async with serving(acceptor_for(peer), greet, WireFormat.SAMPLE) as server:
        seen = set()
        for user in tries:
            seen.add(await in_thread(all_that_a_refused_client_sees, peer, server, user))
        await server.wait_until_over(len(tries))
        # Nobody is worse off for it.
        assert (await in_thread(read_sample, peer, server)).plaintext == MESSAGE
    assert len(seen) == 1
    assert [identity.principal for identity in server.peers] == ["DOM\\alice"]
    assert (server.statistics.refused, server.statistics.authenticated) == (len(tries), 1)
    lines = [record.getMessage() for record in caplog.records if record.name == "triosspi.server"]
    assert len(lines) == len(tries)
    for line, reason in zip(lines, tries.values(), strict=True):
        assert line.startswith("127.0.0.1:")
        assert line.endswith(f": login refused: NTLM: {reason}")
    for user in (ALICE, *tries):
        assert user.password not in caplog.text


async def test_raw_gss_ntlmssp_sends_no_mic_and_is_refused_unless_that_is_allowed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    require(GSS_NTLMSSP)
    async with serving(Acceptor(accounts=accounts()), greet, WireFormat.SAMPLE) as server:
        await in_thread(all_that_a_refused_client_sees, GSS_NTLMSSP, server, ALICE)
        await server.wait_until_over()
    assert server.peers == []
    assert caplog.messages[-1].endswith(": login refused: NTLM: the client of 'DOM\\\\alice' sends no MIC")
    async with serving(Acceptor(accounts=accounts(), require_mic=False), greet, WireFormat.SAMPLE) as server:
        assert (await in_thread(read_sample, GSS_NTLMSSP, server)).plaintext == MESSAGE
    assert server.peers[0].principal == "DOM\\alice"


async def test_samba_client_that_asks_for_no_session_security_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    require(NTLM_AUTH_NTLM)

    def try_it(server: Server) -> bytes:
        with (
            closing(NtlmAuthInitiator("ntlmssp-client-1", *ALICE, secure=False)) as initiator,
            wire.connect("127.0.0.1", server.port) as sock,
        ):
            wire.login(sock, initiator)
            return wire.recv_to_eof(sock)

    async with serving(Acceptor(accounts=accounts(), require_mic=False), greet, WireFormat.SAMPLE) as server:
        assert await in_thread(try_it, server) == b""
        await server.wait_until_over()
    assert server.peers == []
    assert "login refused: NTLM: the client left out SIGN" in caplog.messages[-1]


# ---- what is changed on the way ----


@pytest.mark.parametrize("where", ["checksum", "sequence number", "ciphertext", "last byte"])
async def test_peer_refuses_our_message_with_one_bit_flipped(peer: PeerKind, where: str) -> None:
    offset = {"checksum": 4 + 4, "sequence number": 4 + 12, "ciphertext": 4 + 16, "last byte": 47}[where]
    bit = random.Random(f"{peer} {where}").randrange(8)

    def read_flipped(server: Server) -> None:
        with logged_in(peer, server) as connection:
            record = bytearray(wire.recv_to_eof(connection.sock))
            record[offset] ^= 1 << bit
            with pytest.raises(PeerError):
                connection.initiator.open(*wire.split_sealed(bytes(record)))

    async with serving(acceptor_for(peer), greet, WireFormat.SAMPLE) as server:
        await in_thread(read_flipped, server)


@pytest.mark.parametrize("where", ["version", "checksum", "sequence number", "ciphertext", "last byte"])
async def test_server_refuses_a_peers_message_with_one_bit_flipped(
    peer: PeerKind, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Behind the lengths of the record and of its trailer.
    offset = 8 + {"version": 0, "checksum": 4, "sequence number": 12, "ciphertext": 16, "last byte": -9}[where]
    bit = random.Random(f"{peer} {where}").randrange(8)

    def tamper(server: Server) -> None:
        with logged_in(PYSPNEGO_NTLM, server) as bystander, logged_in(peer, server) as connection:
            bystander.echo(b"before")
            good, bad, late = (
                bytearray(wire.frame(connection.initiator, message)) for message in (b"good", b"bad", b"late")
            )
            bad[offset] ^= 1 << bit
            wire.send_all(connection.sock, bytes(good + bad + late))
            # What was good is handed over first; after the bad one there is nothing, for ever.
            assert connection.receive() == b"good"
            with pytest.raises(wire.Closed):
                connection.receive()
            bystander.echo(b"after")

    async with serving(Acceptor(accounts=accounts(), require_mic=peer.sends_mic)) as server:
        await in_thread(tamper, server)
        await server.wait_until_over(2)
        assert server.statistics.lost == 1
    lines = [line for line in caplog.messages if "did not open" in line]
    assert len(lines) == 1
    assert ": DOM\\alice: connection lost: a message did not open" in lines[0]


async def test_server_refuses_a_peers_message_sent_again(peer: PeerKind) -> None:
    def replay(server: Server) -> None:
        with logged_in(peer, server) as connection:
            record = wire.frame(connection.initiator, b"once")
            wire.send_all(connection.sock, record + record)
            assert connection.receive() == b"once"
            with pytest.raises(wire.Closed):
                connection.receive()

    async with serving(acceptor_for(peer)) as server:
        await in_thread(replay, server)
        await server.wait_until_over()
    assert server.statistics.lost == 1


# ---- what the harness says of them ----


class TokenRecorder:
    """Keeps the tokens that came."""

    def __init__(self) -> None:
        self.tokens: list[bytes] = []

    def token_received(self, token: bytes) -> None:
        self.tokens.append(token)

    def token_made(self, token: bytes, established: bool) -> None: ...

    def message_sealed(self, message: bytes, trailer: bytes, ciphertext: bytes) -> None: ...

    def closed(self) -> None: ...


async def test_peer_is_as_different_as_the_harness_says(peer: PeerKind) -> None:
    """Guards the variety: peers that all came to send the same would prove less, and nobody would notice."""
    recorder = TokenRecorder()
    async with serving(acceptor_for(peer), greet, WireFormat.SAMPLE, make_tracer=lambda: recorder) as server:
        await in_thread(read_sample, peer, server, ESZETT)
    first = recorder.tokens[0]
    assert first.startswith(NTLMSSP) is not peer.spnego
    # MIT's own AP-REQ, KRB5's OID and the token's id 01 00, where it guesses that Kerberos it will be.
    assert (b"\x06\x09\x2a\x86\x48\x86\xf7\x12\x01\x02\x02\x01\x00" in first) is (peer.optimistic == "kerberos")
    raw = next(token[token.index(NTLMSSP) :] for token in recorder.tokens if NTLMSSP + b"\3" in token)
    message = messages.read_authenticate(raw)
    assert bool(message.flags & messages.NEGOTIATE_SEAL) is peer.sets_seal
    blob = message.nt_response[16:]
    assert messages.promises_mic(messages.read_av_pairs(blob)) is peer.sends_mic
    assert end_of_av_pairs(blob) in (b"", bytes(4))
    assert (end_of_av_pairs(blob) == bytes(4)) is peer.blob_tail
    assert {kind.eszett for kind in NTLM_PEERS} == {"SS", "ß"}


def end_of_av_pairs(blob: bytes) -> bytes:
    position = 28
    while True:
        av_id, length = struct.unpack_from("<HH", blob, position)
        position += 4 + length
        if av_id == 0:
            return blob[position:]


# ---- all of them together ----


async def test_all_kinds_of_peers_are_served_at_once(kerberos_first: PeerKind) -> None:  # noqa: F811 - the fixture
    kinds = [*NTLM_PEERS, kerberos_first]
    for kind in kinds:
        require(kind)
    assert len(kinds) >= 8
    # Each peer waits here until all have logged in, and again until all have had their answer.
    together = threading.Barrier(len(kinds), timeout=wire.TIMEOUT)
    numbers = count()

    def talk(kind: PeerKind, server: Server) -> None:
        with logged_in(kind, server) as connection:
            connection.echo(b"first, alone")
            together.wait()
            for _ in range(5):
                connection.echo(f"{kind} {next(numbers)}".encode() * 100)
            together.wait()

    async with serving(Acceptor(accounts=accounts(), require_mic=False)) as server, trio.open_nursery() as nursery:
        for kind in kinds:
            nursery.start_soon(in_thread, talk, kind, server)
    assert [identity.principal for identity in server.peers] == ["DOM\\alice"] * len(kinds)
    assert (server.statistics.refused, server.statistics.handler_errors) == (0, 0)
