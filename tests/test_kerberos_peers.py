"""Every Kerberos implementation that a Linux machine has, in both roles, with tickets of two KDCs, over real connections.

An initiator meets our live server, an acceptor our client. What only depends on the ticket: ``test_kerberos.py``.
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio

from forge import ACCEPT_COMPLETED, neg_token_resp
from peers import PeerError, wire
from peers.acceptors import accept_login, send_sample
from peers.kerberos import (
    ENCTYPES,
    KERBEROS_ACCEPTORS,
    KERBEROS_PEERS,
    Kdc,
    KerberosAcceptorKind,
    KerberosPeerKind,
    LineAcceptor,
    Login,
    read_keytab,
    write_keytab,
)
from peers.kerberos.fixtures import each_with_its_kdcs, join
from peers.kerberos.kinds import (
    DOTNET_KERBEROS_NEGOTIATE,
    HEIMDAL_RAW,
    HEIMDAL_SPNEGO,
    MIT_RAW,
    MIT_SPNEGO,
    PYSPNEGO_KERBEROS_NEGOTIATE,
    PYTHON_GSSAPI_RAW,
    PYTHON_GSSAPI_SPNEGO,
)
from peers.kerberos.realm import USUAL_FLAGS, Flag
from peers.pyspnego_peer import PYSPNEGO_NTLM
from peers.requirements import require
from test_peers import ALICE, MESSAGE, Channel, Connection, Server, accounts, in_thread, serving
from test_peers import logged_in as ntlm_logged_in
from test_peers_acceptor import cause_of
from triosspi import (
    Acceptor,
    AuthenticationError,
    Initiator,
    UnsealError,
    WireFormat,
    open_sspi_over_tcp_channel,
)
from triosspi.security import native
from triosspi.security.identity import ContextFlag

TRAILERS = {17: 60, 18: 60, 19: 64, 20: 72}
SERVICES = {
    "mit": {"aes128": 17, "aes256": 18, "aes128-sha2": 19, "aes256-sha2": 20},
    "samba": {"aes128": 17, "aes256": 18},
}
SIZES = [1, 15, 16, 17, 1024, 65_536, 1024 * 1024 - 1]
WITHOUT_MUTUAL: tuple[Flag, ...] = ("replay", "sequence", "conf", "integ")
# All that `framed` demands; what the sample's client asks for is confidentiality alone.
SEALED: tuple[Flag, ...] = ("conf", "integ")

# Positions in a sealed message as it is on the wire, trailer and ciphertext together (RFC 4121 4.2.6.2).
PLACES = {
    "token id": 0,
    "flags": 2,
    "filler": 3,
    "extra count": 5,
    "rotation": 7,
    "sequence number": 15,
    "confounder": 20,
    "mac": 59,
    "ciphertext": 60,
    "last byte": -1,
}


def flipped(data: bytes, position: int, bit: int = 0) -> bytes:
    spoiled = bytearray(data)
    spoiled[position] ^= 1 << bit
    return bytes(spoiled)


def cut_again(trailer: bytes, token: bytes) -> tuple[bytes, bytes]:
    """A spoiled token, cut where it was cut before."""
    return token[: len(trailer)], token[len(trailer) :]


def record_of(sealed: tuple[bytes, bytes]) -> bytes:
    """A whole record of the framed format."""
    body = wire.join_sealed(*sealed)
    return len(body).to_bytes(4, "little") + body


# ---- initiators, against our server ----


def acceptor_for(kdc: Kdc, service: str = "aes256", **options: Any) -> Acceptor:
    return Acceptor(keytab=kdc.services[service].keytab, **options)


@contextmanager
def logged_in(peer: KerberosPeerKind, server: Server, login: Login) -> Iterator[Connection]:
    """Blocks, as all that is done with it."""
    socks: list[socket.socket] = []

    def shake(initiator: Any) -> socket.socket:
        socks.append(wire.connect("127.0.0.1", server.port))
        wire.login(socks[-1], initiator)
        return socks[-1]

    try:
        with peer.logged_in(login, shake) as (initiator, sock):
            yield Connection(sock, initiator)
    finally:
        for sock in socks:
            sock.close()


def read_sample(peer: KerberosPeerKind, server: Server, login: Login) -> wire.Sample:
    with logged_in(peer, server, login) as connection:
        return wire.read_sample(connection.sock, connection.initiator)


def assert_refused(peer: KerberosPeerKind, server: Server, login: Login) -> None:
    """The server tells the client nothing, and ends the connection in an orderly way."""
    with closing(peer.new(login)) as initiator, wire.connect("127.0.0.1", server.port) as sock:
        try:
            wire.login(sock, initiator)
        except wire.Refused:
            pass
        else:
            # To raw Kerberos without mutual authentication its own token is the last, and all seems well.
            assert not peer.spnego
            assert "mutual" not in login.flags
        assert wire.recv_to_eof(sock) == b""


async def greet(channel: Channel) -> None:
    assert channel.package_name == "Kerberos"
    await channel.send(MESSAGE)


class Recorder:
    """Keeps the tokens of each connection: what has come, and how many went out."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.sent: list[bytes] = []

    def token_received(self, token: bytes) -> None:
        self.received.append(token)

    def token_made(self, token: bytes, established: bool) -> None:
        if token:
            self.sent.append(token)

    def message_sealed(self, message: bytes, trailer: bytes, ciphertext: bytes) -> None: ...

    def closed(self) -> None: ...


def recorders() -> tuple[list[Recorder], Callable[[], Recorder]]:
    made: list[Recorder] = []

    def make() -> Recorder:
        made.append(Recorder())
        return made[-1]

    return made, make


def assert_is_alice(server: Server, kdc: Kdc, *, enctype: int = 18, mutual: bool = True) -> None:
    assert server.peers
    for identity in server.peers:
        assert (identity.mechanism, identity.principal) == ("kerberos", f"alice@{kdc.realm}")
        assert (identity.name, identity.domain, identity.realm) == ("alice", kdc.realm, kdc.realm)
        assert (identity.enctype, identity.mutual) == (ENCTYPES[enctype], mutual)
        assert not identity.delegated
    assert (server.statistics.refused, server.statistics.handler_errors) == (0, 0)


@each_with_its_kdcs()
async def test_peer_is_known_by_its_ticket_and_opens_the_sample(peer: KerberosPeerKind, kdc: Kdc) -> None:
    require(peer)
    made, make = recorders()
    async with serving(acceptor_for(kdc), greet, WireFormat.SAMPLE, make_tracer=make) as server:
        for layout in peer.layouts:
            sample = await in_thread(read_sample, peer, server, kdc.login(layout=layout))
            assert sample.plaintext == MESSAGE
            # The sample's own count: a DWORD, Kerberos's trailer, and the message's 28 bytes.
            assert len(sample.raw) == 4 + 60 + 28 == 92
    assert_is_alice(server, kdc)
    # What the harness says of the peer: SPNEGO's OID, or Kerberos's own.
    for recorder in made:
        oid = bytes.fromhex("06062b0601050502" if peer.spnego else "06092a864886f712010202")
        assert recorder.received[0][:1] == b"\x60"
        assert oid in recorder.received[0][:16]
        assert len(recorder.sent) == 1


@each_with_its_kdcs(peer for peer in KERBEROS_PEERS if not peer.needs_mutual)
async def test_peer_that_asks_for_confidentiality_alone_opens_the_sample(peer: KerberosPeerKind, kdc: Kdc) -> None:
    """So does the sample's client. With raw Kerberos the server then has nothing to answer."""
    require(peer)
    made, make = recorders()
    async with serving(acceptor_for(kdc), greet, WireFormat.SAMPLE, make_tracer=make) as server:
        sample = await in_thread(read_sample, peer, server, kdc.login(flags=("conf",), layout=peer.layouts[-1]))
    assert (sample.plaintext, len(sample.raw)) == (MESSAGE, 92)
    assert_is_alice(server, kdc, mutual=False)
    assert len(made[0].sent) == (1 if peer.spnego else 0)


@each_with_its_kdcs()
async def test_messages_of_many_sizes_a_batch_and_a_goodbye_each_way(peer: KerberosPeerKind, kdc: Kdc) -> None:
    require(peer)
    rng = random.Random(20)
    batch = [rng.randbytes(rng.randint(1, 300)) for _ in range(20)]
    ends: list[str] = []

    async def until_told(channel: Channel) -> None:
        async for message in channel:
            if message == b"you first":
                ends.append("ours")
                return
            await channel.send(message)
        ends.append("theirs")

    def talk(server: Server) -> None:
        with logged_in(peer, server, kdc.login(layout=peer.layouts[-1])) as connection:
            for size in SIZES:
                connection.echo(rng.randbytes(size))
            # In one piece, without waiting: nothing may be lost where the server reads several at once.
            wire.send_all(connection.sock, b"".join(wire.frame(connection.initiator, message) for message in batch))
            assert [connection.receive() for _ in batch] == batch
            wire.send_goodbye(connection.sock, connection.initiator)
            # Whoever has said goodbye reads no more, and so is told nothing more.
            with pytest.raises(wire.Closed):
                connection.receive()
        with logged_in(peer, server, kdc.login(layout=peer.layouts[0])) as connection:
            connection.echo(b"the other layout")
            connection.send(b"you first")
            assert connection.receive() == b""
            with pytest.raises(wire.Closed):
                connection.receive()

    async with serving(acceptor_for(kdc), until_told) as server:
        await in_thread(talk, server)
        await server.wait_until_over(2)
    assert ends == ["theirs", "ours"]
    assert_is_alice(server, kdc)
    assert server.statistics.lost == 0


@each_with_its_kdcs(peer for peer in KERBEROS_PEERS if not peer.needs_mutual)
async def test_peer_without_mutual_authentication_talks_both_ways(peer: KerberosPeerKind, kdc: Kdc) -> None:
    require(peer)

    def talk(server: Server) -> None:
        with logged_in(peer, server, kdc.login(flags=WITHOUT_MUTUAL, layout=peer.layouts[-1])) as connection:
            connection.send(b"one")
            if peer.counts_without_mutual:
                assert connection.receive() == b"one"
            else:
                with pytest.raises(PeerError):
                    connection.receive()
            connection.echo(b"two")

    async with serving(acceptor_for(kdc)) as server:
        await in_thread(talk, server)
    assert_is_alice(server, kdc, mutual=False)


@each_with_its_kdcs()
async def test_peer_that_asks_for_sealing_alone_is_served_and_its_messages_are_taken_in_their_order(
    peer: KerberosPeerKind, kdc: Kdc, caplog: pytest.LogCaptureFixture
) -> None:
    """.NET on Linux can ask for no more. Every peer numbers its messages all the same, and we look at the numbers."""
    require(peer)
    flags: tuple[Flag, ...] = ("mutual", *SEALED) if peer.needs_mutual else SEALED

    def talk(server: Server, order: list[int]) -> None:
        with logged_in(peer, server, kdc.login(flags=flags, layout=peer.layouts[-1])) as connection:
            for size in (1, 17, 5000):
                connection.echo(bytes(size))
            records = [wire.frame(connection.initiator, b"%d" % number) for number in range(3)]
            wire.send_all(connection.sock, b"".join(records[number] for number in order))
            for number in order[:-1]:
                assert connection.receive() == b"%d" % number
            with pytest.raises(wire.Closed):
                connection.receive()

    orders = [[0, 0], [0, 2], [1]]
    async with serving(acceptor_for(kdc)) as server:
        for order in orders:
            await in_thread(talk, server, order)
        await server.wait_until_over(len(orders))
    assert server.statistics.lost == len(orders)
    assert_is_alice(server, kdc, mutual="mutual" in flags)
    for identity in server.peers:
        assert identity.flags & ~ContextFlag.MUTUAL == ContextFlag.CONF | ContextFlag.INTEG
    assert sum("connection lost: a message did not open" in line for line in caplog.messages) == len(orders)


# What docs/clients.md says that each asks for by itself, by the beginnings of their names.
BY_ITSELF = {
    "mit": ContextFlag.CONF | ContextFlag.INTEG,
    "heimdal": ContextFlag.CONF | ContextFlag.INTEG,
    "python-gssapi": ContextFlag.MUTUAL | ContextFlag.SEQUENCE | ContextFlag.CONF | ContextFlag.INTEG,
    "pyspnego": ContextFlag(0x3E),
    "sspi-rs": ContextFlag(0x3E),
    "dotnet": ContextFlag.CONF | ContextFlag.INTEG,
}


@each_with_its_kdcs()
async def test_peer_that_is_told_nothing_is_served(peer: KerberosPeerKind, kdc: Kdc) -> None:
    require(peer)

    def talk(server: Server) -> None:
        with logged_in(peer, server, kdc.login(flags=(), layout=peer.layouts[-1])) as connection:
            connection.echo(b"as I am")

    async with serving(acceptor_for(kdc)) as server:
        await in_thread(talk, server)
    (wanted,) = (flags for name, flags in BY_ITSELF.items() if peer.name.startswith(name))
    assert {identity.flags for identity in server.peers} == {wanted}
    assert_is_alice(server, kdc, mutual=ContextFlag.MUTUAL in wanted)


@each_with_its_kdcs()
async def test_whether_the_peer_looks_at_the_order_is_what_it_asked_for(peer: KerberosPeerKind, kdc: Kdc) -> None:
    """What docs/clients.md says of the peers' own side, which is theirs to choose."""
    require(peer)

    def opens_out_of_order(server: Server, flags: tuple[Flag, ...]) -> list[bool]:
        with logged_in(peer, server, kdc.login(flags=flags, layout=peer.layouts[-1])) as connection:
            records = []
            for _ in range(3):
                connection.send(b"abc")
                records.append(wire.split_sealed(wire.recv_prefixed(connection.sock)))
            opened = []
            for number in (0, 0, 2):
                try:
                    opened.append(connection.initiator.open(*records[number]) == b"abc")
                except PeerError:
                    opened.append(False)
            return opened

    async with serving(acceptor_for(kdc)) as server:
        assert await in_thread(opens_out_of_order, server, ("mutual", *SEALED)) == [True, True, True]
        seen = await in_thread(opens_out_of_order, server, USUAL_FLAGS)
    assert seen == ([True, False, False] if peer.sees_order else [True, True, True])


def other_enctypes(peers: Iterable[KerberosPeerKind]) -> list[Any]:
    return [
        pytest.param(peer, realm, service, id=f"{peer}-{realm}-{service}")
        for peer in peers
        for realm in sorted(peer.realms)
        for service, enctype in SERVICES[realm].items()
        if enctype in peer.enctypes and enctype != 18
    ]


@pytest.mark.parametrize(("peer", "kdc", "service"), other_enctypes(KERBEROS_PEERS), indirect=["kdc"])
async def test_every_enctype_seals_both_ways(peer: KerberosPeerKind, kdc: Kdc, service: str) -> None:
    require(peer)
    enctype = kdc.services[service].enctype
    # The tests above have both layouts of every peer, with one enctype. Two peers have all of both.
    layouts = peer.layouts if peer in (MIT_SPNEGO, HEIMDAL_RAW) else peer.layouts[-1:]

    def talk(server: Server) -> None:
        for layout in layouts:
            with logged_in(peer, server, kdc.login(service, layout=layout)) as connection:
                for size in (1, 16, 17, 5000):
                    message = random.Random(size).randbytes(size)
                    connection.send(message)
                    record = wire.recv_prefixed(connection.sock)
                    assert len(record) == 4 + TRAILERS[enctype] + size
                    assert connection.initiator.open(*wire.split_sealed(record)) == message

    async with serving(acceptor_for(kdc, service)) as server:
        await in_thread(talk, server)
    assert_is_alice(server, kdc, enctype=enctype)


@pytest.mark.parametrize("kdc", ["mit", "samba"], indirect=True)
@pytest.mark.parametrize("peer", [MIT_RAW, HEIMDAL_SPNEGO], ids=str)
async def test_rc4_is_refused_unless_it_is_asked_for(
    peer: KerberosPeerKind, kdc: Kdc, caplog: pytest.LogCaptureFixture
) -> None:
    require(peer)

    def talk(server: Server) -> None:
        with logged_in(peer, server, kdc.login("rc4")) as connection:
            for size in (1, 8, 5000):
                connection.echo(bytes(size))

    async with serving(acceptor_for(kdc, "rc4")) as server:
        await in_thread(assert_refused, peer, server, kdc.login("rc4"))
        await server.wait_until_over()
    assert server.peers == []
    assert "login refused: Kerberos: the session key has encryption type 23, not AES" in caplog.messages[-1]
    async with serving(acceptor_for(kdc, "rc4", allow_rc4=True)) as server:
        await in_thread(talk, server)
    assert server.peers[0].enctype == "arcfour-hmac"


@each_with_its_kdcs([MIT_RAW, MIT_SPNEGO, HEIMDAL_RAW, HEIMDAL_SPNEGO, PYTHON_GSSAPI_RAW, PYTHON_GSSAPI_SPNEGO])
async def test_delegated_credentials_are_noticed(peer: KerberosPeerKind, kdc: Kdc) -> None:
    require(peer)
    login = kdc.login(flags=("delegate", "mutual", "conf"))
    async with serving(acceptor_for(kdc), greet, WireFormat.SAMPLE) as server:
        assert (await in_thread(read_sample, peer, server, login)).plaintext == MESSAGE
    assert server.peers[0].delegated


# ---- the refused ----


@each_with_its_kdcs()
async def test_a_ticket_for_another_service_of_the_same_keytab_is_refused(
    peer: KerberosPeerKind, kdc: Kdc, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    require(peer)
    this, other = (kdc.services[name] for name in ("aes256", "other"))
    keytab = write_keytab(tmp_path / "both.keytab", [*read_keytab(this.keytab), *read_keytab(other.keytab)])
    layout = peer.layouts[0]
    async with serving(Acceptor(keytab=keytab, spns=[this.target]), greet, WireFormat.SAMPLE) as server:
        await in_thread(assert_refused, peer, server, kdc.login("other", layout=layout))
        await server.wait_until_over()
        assert (server.peers, server.statistics.refused) == ([], 1)
        assert (await in_thread(read_sample, peer, server, kdc.login(layout=layout))).plaintext == MESSAGE
    (line,) = (line for line in caplog.messages if "refused" in line)
    assert line.endswith(
        f"login refused: Kerberos: 'alice@{kdc.realm}' has a ticket for {other.target!r}, not for this service"
    )
    # Only the list makes the difference.
    async with serving(Acceptor(keytab=keytab), greet, WireFormat.SAMPLE) as server:
        assert (await in_thread(read_sample, peer, server, kdc.login("other", layout=layout))).plaintext == MESSAGE


@each_with_its_kdcs()
async def test_a_login_sent_again_byte_for_byte_is_refused(
    peer: KerberosPeerKind, kdc: Kdc, caplog: pytest.LogCaptureFixture
) -> None:
    require(peer)
    made, make = recorders()

    def replay(server: Server, tokens: list[bytes]) -> bytes:
        with wire.connect("127.0.0.1", server.port) as sock:
            try:
                for token in tokens:
                    wire.send_prefixed(sock, token)
                return wire.recv_to_eof(sock)
            except wire.Refused:
                # It did not care for what else came.
                return b""

    async with serving(acceptor_for(kdc), greet, WireFormat.SAMPLE, make_tracer=make) as server:
        await in_thread(read_sample, peer, server, kdc.login(layout=peer.layouts[0]))
        logins = len(server.peers)
        assert await in_thread(replay, server, made[-1].received) == b""
        await server.wait_until_over(logins + 1)
    assert (len(server.peers), server.statistics.refused) == (logins, 1)
    assert caplog.messages[-1].endswith("login refused: Kerberos: 'Request is a replay'")


@each_with_its_kdcs(peer for peer in KERBEROS_PEERS if peer.bindings)
async def test_channel_bindings_must_be_ours_where_they_are_required(peer: KerberosPeerKind, kdc: Kdc) -> None:
    require(peer)
    ours, others = b"tls-server-end-point:ours", b"tls-server-end-point:others"
    layout = peer.layouts[0]
    async with serving(acceptor_for(kdc, channel_bindings=ours), greet, WireFormat.SAMPLE) as server:
        for wrong in (None, others):
            await in_thread(assert_refused, peer, server, kdc.login(bindings=wrong, layout=layout))
        await server.wait_until_over(2)
        assert (server.peers, server.statistics.refused) == ([], 2)
        sample = await in_thread(read_sample, peer, server, kdc.login(bindings=ours, layout=layout))
    assert sample.plaintext == MESSAGE


@pytest.mark.parametrize("kdc", ["mit", "samba"], indirect=True)
async def test_a_client_that_says_it_is_done_without_having_authenticated_is_refused(
    kdc: Kdc, caplog: pytest.LogCaptureFixture
) -> None:
    """pyspnego's SPNEGO, where no mutual authentication is asked for, forgets the AP-REQ and says accept-completed."""
    peer = PYSPNEGO_KERBEROS_NEGOTIATE
    require(peer)
    made, make = recorders()

    def try_it(server: Server) -> None:
        with (
            closing(peer.new(kdc.login(flags=("conf",), layout="iov"))) as initiator,
            wire.connect("127.0.0.1", server.port) as sock,
        ):
            wire.login(sock, initiator)
            assert initiator.complete
            assert wire.recv_to_eof(sock) == b""

    async with serving(acceptor_for(kdc), greet, WireFormat.SAMPLE, make_tracer=make) as server:
        await in_thread(try_it, server)
        await server.wait_until_over()
    assert len(made[0].received) == 2
    assert (server.peers, server.statistics.authenticated, server.statistics.refused) == ([], 0, 1)
    assert caplog.messages[-1].endswith("the peer says that it is done, but nobody has authenticated")


@pytest.mark.parametrize("peer", [MIT_RAW, DOTNET_KERBEROS_NEGOTIATE], ids=str)
async def test_where_the_kerberos_library_seals_who_has_not_asked_for_the_order_is_refused_and_the_log_says_what_to_ask(
    peer: KerberosPeerKind, mit_kdc: Kdc, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    require(peer)
    join(mit_kdc, monkeypatch)
    monkeypatch.setattr(native, "_sealing", None)
    login = mit_kdc.login(flags=("mutual", *SEALED))

    def log_in(server: Server) -> bytes:
        with closing(peer.new(login)) as initiator, wire.connect("127.0.0.1", server.port) as sock:
            with pytest.raises(wire.Refused):
                wire.login(sock, initiator)
            return wire.recv_to_eof(sock)

    async with serving(acceptor_for(mit_kdc)) as server:
        assert await in_thread(log_in, server) == b""
        await server.wait_until_over()
    assert server.peers == []
    assert caplog.messages[-1].endswith(
        "login refused: Kerberos: the context of 'alice@MIT.TEST' lacks REPLAY, SEQUENCE: its client must ask for"
        " GSS_C_REPLAY_FLAG, GSS_C_SEQUENCE_FLAG (SSPI: ISC_REQ_REPLAY_DETECT, ISC_REQ_SEQUENCE_DETECT)"
    )


# ---- what is changed on the way ----


@each_with_its_kdcs()
async def test_peer_refuses_our_message_with_one_bit_of_any_byte_flipped(peer: KerberosPeerKind, kdc: Kdc) -> None:
    require(peer)
    rng = random.Random(f"{peer} {kdc.realm}")

    def read_flipped(server: Server) -> None:
        with logged_in(peer, server, kdc.login(layout=peer.layouts[-1])) as connection:
            trailer, data = wire.split_sealed(wire.recv_to_eof(connection.sock))
            token = trailer + data
            for position in range(len(token)):
                with pytest.raises(PeerError):
                    # Of the flags the first two: sspi-rs overlooks those that mean nothing.
                    bit = rng.randrange(2 if position == PLACES["flags"] else 8)
                    connection.initiator.open(*cut_again(trailer, flipped(token, position, bit)))

    async with serving(acceptor_for(kdc), greet, WireFormat.SAMPLE) as server:
        await in_thread(read_flipped, server)


# All places with the two C libraries, which are quick; then every peer, each at one place of its own.
@pytest.mark.parametrize(
    ("peer", "kdc", "where"),
    [
        *((peer, "mit", where) for peer in (MIT_RAW, HEIMDAL_SPNEGO) for where in PLACES),
        *(
            (peer, realm, list(PLACES)[number % len(PLACES)])
            for number, peer in enumerate(KERBEROS_PEERS)
            for realm in sorted(peer.realms)
            if (peer, realm) not in ((MIT_RAW, "mit"), (HEIMDAL_SPNEGO, "mit"))
        ),
    ],
    indirect=["kdc"],
)
async def test_server_refuses_a_peers_message_with_one_bit_flipped(
    peer: KerberosPeerKind, kdc: Kdc, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    require(peer)
    require(MIT_RAW)
    bit = random.Random(f"{peer} {where}").randrange(8)

    def tamper(server: Server) -> None:
        with (
            logged_in(MIT_RAW, server, kdc.login(user="bob")) as bystander,
            logged_in(peer, server, kdc.login(layout=peer.layouts[-1])) as connection,
        ):
            bystander.echo(b"before")
            good, bad, late = (connection.initiator.seal(message) for message in (b"good", b"bad", b"late"))
            token = flipped(b"".join(bad), PLACES[where], bit)
            # In one piece: the server resets a connection that it closes with something unread.
            wire.send_all(connection.sock, b"".join(map(record_of, (good, cut_again(bad[0], token), late))))
            # What was good is handed over first; after the bad one there is nothing, for ever.
            assert connection.receive() == b"good"
            with pytest.raises(wire.Closed):
                connection.receive()
            bystander.echo(b"after")

    async with serving(acceptor_for(kdc)) as server:
        await in_thread(tamper, server)
        await server.wait_until_over(2)
    assert server.statistics.lost == 1
    lines = [line for line in caplog.messages if "connection lost" in line]
    assert len(lines) == 1
    assert f": alice@{kdc.realm}: connection lost: a message" in lines[0]


@each_with_its_kdcs()
async def test_server_refuses_a_peers_message_sent_again(peer: KerberosPeerKind, kdc: Kdc) -> None:
    require(peer)

    def replay(server: Server) -> None:
        with logged_in(peer, server, kdc.login(layout=peer.layouts[0])) as connection:
            record = wire.frame(connection.initiator, b"once")
            wire.send_all(connection.sock, record + record)
            assert connection.receive() == b"once"
            with pytest.raises(wire.Closed):
                connection.receive()

    async with serving(acceptor_for(kdc)) as server:
        await in_thread(replay, server)
        await server.wait_until_over()
    assert server.statistics.lost == 1


# ---- all of them together ----


@pytest.mark.parametrize("kdc", ["mit", "samba"], indirect=True)
async def test_all_kinds_of_peers_are_served_at_once_and_ntlm_on_the_same_port(kdc: Kdc) -> None:
    realm = kdc.realm.partition(".")[0].lower()
    kinds = [kind for kind in KERBEROS_PEERS if realm in kind.realms]
    require(PYSPNEGO_NTLM)
    for kind in kinds:
        require(kind)
    # Each peer waits here until all have logged in, and again until all have had their answer.
    together = threading.Barrier(len(kinds) + 1, timeout=wire.TIMEOUT)
    numbers = count()

    def talk(name: str, log_in: Callable[[], Any]) -> None:
        with log_in() as connection:
            connection.echo(b"first, alone")
            together.wait()
            for _ in range(5):
                connection.echo(f"{name} {next(numbers)}".encode() * 100)
            together.wait()

    acceptor = acceptor_for(kdc, accounts=accounts())
    async with serving(acceptor) as server, trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, talk, "NTLM", partial(ntlm_logged_in, PYSPNEGO_NTLM, server, ALICE))
        for kind in kinds:
            login = kdc.login(layout=kind.layouts[0])
            nursery.start_soon(in_thread, talk, str(kind), partial(logged_in, kind, server, login))
    principals = [identity.principal for identity in server.peers]
    assert set(principals) == {"DOM\\alice", f"alice@{kdc.realm}"}
    assert principals.count("DOM\\alice") == 1
    assert len(principals) >= len(kinds) + 1 >= 9
    assert (server.statistics.refused, server.statistics.handler_errors) == (0, 0)


async def test_ntlm_is_refused_where_only_kerberos_is_enabled(mit_kdc: Kdc, monkeypatch: pytest.MonkeyPatch) -> None:
    join(mit_kdc, monkeypatch)

    def try_it(server: Server) -> None:
        with pytest.raises(wire.Refused), ntlm_logged_in(PYSPNEGO_NTLM, server, ALICE):
            pass

    acceptor = acceptor_for(mit_kdc, accounts=accounts(), mechanisms=("kerberos",))
    async with serving(acceptor, greet, WireFormat.SAMPLE) as server:
        await in_thread(try_it, server)
        await server.wait_until_over()
        assert (await in_thread(read_sample, MIT_SPNEGO, server, mit_kdc.login())).plaintext == MESSAGE
    assert (server.statistics.refused, server.statistics.authenticated) == (1, 1)


# ---- our client, against acceptors ----

#: What a blocking server does with one connection.
Script = Callable[[socket.socket, LineAcceptor], None]

each_acceptor_with_each_kdc = pytest.mark.parametrize(
    ("kind", "kdc"),
    [pytest.param(kind, realm, id=f"{kind}-{realm}") for kind in KERBEROS_ACCEPTORS for realm in ("mit", "samba")],
    indirect=["kdc"],
)
each_acceptor = pytest.mark.parametrize(
    ("kind", "kdc"), [pytest.param(kind, "mit", id=str(kind)) for kind in KERBEROS_ACCEPTORS], indirect=["kdc"]
)


@asynccontextmanager
async def connected(
    kind: KerberosAcceptorKind,
    kdc: Kdc,
    script: Script,
    wire_format: WireFormat = WireFormat.FRAMED,
    *,
    service: str = "aes256",
    layout: str = "iov",
    **options: Any,
) -> AsyncIterator[Channel]:
    """Our client, and a server that runs `script` in a thread and closes."""
    require(kind)
    wanted = kdc.services[service]

    def serve(listener: socket.socket, acceptor: LineAcceptor) -> None:
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(wire.TIMEOUT)
            script(sock, acceptor)

    initiator = Initiator(
        **{
            "mechanism": "kerberos",
            "raw": not kind.spnego,
            "ccache": kdc.ccache(config=wanted.config),
            "target": wanted.target,
            **options,
        }
    )
    acceptor = await in_thread(partial(kind.new, kdc, service, layout=layout))  # type: ignore[arg-type]
    with closing(acceptor), socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(wire.TIMEOUT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, serve, listener, acceptor)
            port: int = listener.getsockname()[1]
            async with await open_sspi_over_tcp_channel("127.0.0.1", port, initiator, wire=wire_format) as channel:
                yield channel


def refuse(sock: socket.socket, acceptor: LineAcceptor) -> None:
    """What every server does about a login that its implementation refuses: it closes."""
    with pytest.raises(PeerError):
        accept_login(sock, acceptor)


def echo_back(sock: socket.socket, acceptor: LineAcceptor) -> None:
    accept_login(sock, acceptor)
    while message := wire.receive_message(sock, acceptor):
        wire.send_message(sock, acceptor, message)


@each_acceptor_with_each_kdc
async def test_our_client_opens_the_sample_and_the_server_knows_it(kind: KerberosAcceptorKind, kdc: Kdc) -> None:
    seen = []

    def greet_by_name(sock: socket.socket, acceptor: LineAcceptor) -> None:
        accept_login(sock, acceptor)
        send_sample(sock, acceptor, MESSAGE)
        seen.append((acceptor.client, acceptor.info().flags & 0x12))

    for layout in kind.layouts:
        async with connected(kind, kdc, greet_by_name, WireFormat.SAMPLE, layout=layout) as channel:
            assert await channel.receive() == MESSAGE
            with pytest.raises(trio.EndOfChannel):
                await channel.receive()
            identity = channel.peer
            assert (identity.mechanism, identity.principal) == ("kerberos", kdc.services["aes256"].target)
            assert identity.mutual
            assert channel.package_name == "Kerberos"
            assert channel.sizes.security_trailer == 60
    # Mutual authentication and confidentiality.
    assert seen == [(f"alice@{kdc.realm}", 0x12)] * len(kind.layouts)


@each_acceptor_with_each_kdc
async def test_our_clients_messages_of_many_sizes_and_a_batch_come_back(kind: KerberosAcceptorKind, kdc: Kdc) -> None:
    rng = random.Random(20)
    batch = [rng.randbytes(rng.randint(1, 300)) for _ in range(20)]
    heard_goodbye = []

    def echo_to_the_end(sock: socket.socket, acceptor: LineAcceptor) -> None:
        echo_back(sock, acceptor)
        heard_goodbye.append(True)

    async with connected(kind, kdc, echo_to_the_end) as channel:
        for size in SIZES:
            message = rng.randbytes(size)
            await channel.send(message)
            assert await channel.receive() == message
        await channel.send_many(batch)
        assert [await channel.receive() for _ in batch] == batch
    assert heard_goodbye == [True]


@each_acceptor
async def test_goodbye_of_the_server_ends_our_clients_channel(kind: KerberosAcceptorKind, kdc: Kdc) -> None:
    def leave(sock: socket.socket, acceptor: LineAcceptor) -> None:
        accept_login(sock, acceptor)
        wire.send_message(sock, acceptor, MESSAGE)
        wire.send_goodbye(sock, acceptor)

    async with connected(kind, kdc, leave) as channel:
        assert await channel.receive() == MESSAGE
        with pytest.raises(trio.EndOfChannel):
            await channel.receive()


@pytest.mark.parametrize(
    ("kind", "kdc", "service"),
    [
        (kind, realm, service)
        for kind in KERBEROS_ACCEPTORS
        if kind.name.startswith(("mit", "heimdal"))
        for realm, services in SERVICES.items()
        for service, enctype in services.items()
        if enctype != 18
    ],
    indirect=["kdc"],
)
async def test_our_client_seals_with_every_enctype(
    kind: KerberosAcceptorKind, kdc: Kdc, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KRB5_CONFIG", kdc.services[service].config)
    keys = []

    def echo_with_key(sock: socket.socket, acceptor: LineAcceptor) -> None:
        echo_back(sock, acceptor)
        keys.append(acceptor.key()[0])

    for layout in kind.layouts:
        async with connected(kind, kdc, echo_with_key, service=service, layout=layout) as channel:
            await channel.do_handshake()
            assert channel.sizes.security_trailer == TRAILERS[kdc.services[service].enctype]
            for size in (1, 16, 17, 5000):
                await channel.send(bytes(size))
                assert await channel.receive() == bytes(size)
    assert keys == [kdc.services[service].enctype] * len(kind.layouts)


# What the server sends is changed on the way


@pytest.mark.parametrize(
    ("kind", "kdc", "where"),
    [
        *((KERBEROS_ACCEPTORS[number], "mit", where) for number in (0, 3) for where in PLACES),
        *(
            (kind, realm, list(PLACES)[-1 - number % len(PLACES)])
            for number, kind in enumerate(KERBEROS_ACCEPTORS)
            for realm in ("mit", "samba")
            if (number, realm) not in ((0, "mit"), (3, "mit"))
        ),
    ],
    indirect=["kdc"],
)
async def test_our_client_refuses_a_servers_message_with_one_bit_flipped(
    kind: KerberosAcceptorKind, kdc: Kdc, where: str
) -> None:
    bit = random.Random(f"{kind} {where}").randrange(8)

    def tamper(sock: socket.socket, acceptor: LineAcceptor) -> None:
        accept_login(sock, acceptor)
        good, bad, late = (acceptor.seal(message) for message in (b"good", b"bad", b"late"))
        token = flipped(b"".join(bad), PLACES[where], bit)
        wire.send_all(sock, b"".join(map(record_of, (good, cut_again(bad[0], token), late))))

    async with connected(kind, kdc, tamper) as channel:
        assert await channel.receive() == b"good"
        assert isinstance(await cause_of(channel.receive), UnsealError)


@each_acceptor
async def test_our_client_refuses_the_samples_message_with_one_bit_flipped(
    kind: KerberosAcceptorKind, kdc: Kdc
) -> None:
    def tamper(sock: socket.socket, acceptor: LineAcceptor) -> None:
        accept_login(sock, acceptor)
        record = wire.join_sealed(*acceptor.seal(MESSAGE))
        wire.send_all(sock, flipped(record, random.Random(str(kind)).randrange(4, len(record))))

    async with connected(kind, kdc, tamper, WireFormat.SAMPLE) as channel:
        assert isinstance(await cause_of(channel.receive), UnsealError)


@each_acceptor
async def test_our_message_with_one_bit_of_any_byte_flipped_is_refused_by_the_server(
    kind: KerberosAcceptorKind, kdc: Kdc
) -> None:
    rng = random.Random(str(kind))
    refused: list[int] = []

    def tamper(sock: socket.socket, acceptor: LineAcceptor) -> None:
        accept_login(sock, acceptor)
        assert wire.receive_message(sock, acceptor) == b"good"
        trailer, data = wire.split_sealed(wire.recv_prefixed(sock))
        token = trailer + data
        for position in range(len(token)):
            with pytest.raises(PeerError):
                acceptor.open(*cut_again(trailer, flipped(token, position, rng.randrange(8))))
            refused.append(position)

    async with connected(kind, kdc, tamper) as channel:
        await channel.send_many([b"good", b"bad"])
    assert refused == list(range(60 + 3))


@each_acceptor
async def test_our_client_refuses_a_servers_message_sent_again(kind: KerberosAcceptorKind, kdc: Kdc) -> None:
    def replay(sock: socket.socket, acceptor: LineAcceptor) -> None:
        accept_login(sock, acceptor)
        record = wire.frame(acceptor, b"once")
        wire.send_all(sock, record + record)

    async with connected(kind, kdc, replay) as channel:
        assert await channel.receive() == b"once"
        assert isinstance(await cause_of(channel.receive), UnsealError)


# What a server may not leave out


@each_acceptor_with_each_kdc
async def test_our_clients_ticket_for_another_service_is_refused(kind: KerberosAcceptorKind, kdc: Kdc) -> None:
    other = kdc.services["other"].target
    async with connected(kind, kdc, refuse, target=other) as channel:
        cause = await cause_of(channel.do_handshake)
    assert isinstance(cause, AuthenticationError)


@each_acceptor
async def test_our_client_refuses_an_answer_of_the_server_with_one_bit_flipped(
    kind: KerberosAcceptorKind, kdc: Kdc
) -> None:
    """The AP-REP is all that proves the server."""

    def script(sock: socket.socket, acceptor: LineAcceptor) -> None:
        # After the token's id: the AP-REP, whose encrypted part begins within 40 bytes.
        accept_login(sock, acceptor, lambda token, _last: flipped(token, token.index(b"\x02\x00\x6f") + 45))

    async with connected(kind, kdc, script) as channel:
        assert isinstance(await cause_of(channel.do_handshake), AuthenticationError)


@pytest.mark.parametrize(
    ("kind", "kdc"), [(kind, "mit") for kind in KERBEROS_ACCEPTORS if kind.spnego], ids=str, indirect=["kdc"]
)
async def test_our_client_refuses_a_server_that_says_completed_without_an_ap_rep(
    kind: KerberosAcceptorKind, kdc: Kdc
) -> None:
    def script(sock: socket.socket, acceptor: LineAcceptor) -> None:
        accept_login(sock, acceptor, lambda _token, _last: neg_token_resp(state=ACCEPT_COMPLETED))
        wire.send_message(sock, acceptor, MESSAGE)

    async with connected(kind, kdc, script) as channel:
        assert isinstance(await cause_of(channel.do_handshake), AuthenticationError)


@each_acceptor
async def test_our_client_refuses_the_answer_of_another_login(kind: KerberosAcceptorKind, kdc: Kdc) -> None:
    answers: list[bytes] = []

    def keep(token: bytes, _last: bool) -> bytes:
        answers.append(token)
        return answers[0]

    def script(sock: socket.socket, acceptor: LineAcceptor) -> None:
        accept_login(sock, acceptor, keep)

    async with connected(kind, kdc, script) as channel:
        await channel.do_handshake()
    async with connected(kind, kdc, script) as channel:
        assert isinstance(await cause_of(channel.do_handshake), AuthenticationError)


async def test_one_program_talks_to_all_kinds_of_servers_at_once(mit_kdc: Kdc, monkeypatch: pytest.MonkeyPatch) -> None:
    join(mit_kdc, monkeypatch)
    for kind in KERBEROS_ACCEPTORS:
        require(kind)
    logged_in_already = 0
    all_logged_in = trio.Event()

    async def talk(kind: KerberosAcceptorKind) -> None:
        nonlocal logged_in_already
        async with connected(kind, mit_kdc, echo_back) as channel:
            await channel.send(b"abc")
            assert await channel.receive() == b"abc"
            logged_in_already += 1
            if logged_in_already == len(KERBEROS_ACCEPTORS):
                all_logged_in.set()
            await all_logged_in.wait()
            await channel.send(b"12")
            assert await channel.receive() == b"12"

    async with trio.open_nursery() as nursery:
        for kind in KERBEROS_ACCEPTORS:
            nursery.start_soon(talk, kind)
