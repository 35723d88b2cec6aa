"""The two sides of .NET's NegotiateStream among themselves: what a test of ours takes for granted of them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from peers import dotnet_stream, gssapi_peer, wire
from peers.dotnet_stream import DotnetClient, DotnetError, DotnetServer, DotnetStreams, ProtectionLevel
from peers.kerberos.fixtures import MitKdc
from peers.recording import Conversation, RecordingRelay
from peers.requirements import require_nothing

IN_PROGRESS, DONE, ERROR = 0x16, 0x14, 0x15
# The most plaintext that it puts into a record; and what Kerberos adds with AES.
CHUNK, TRAILER = 64512, 60


@dataclass
class Sides:
    """Processes with the client's tickets and with the server's keytab."""

    client: DotnetStreams
    server: DotnetStreams
    target: str
    other_target: str


@pytest.fixture(scope="module")
def sides(mit_kdc: MitKdc) -> Iterator[Sides]:
    require_nothing(dotnet_stream.available())
    service = mit_kdc.services["aes256"]
    tickets = {"KRB5_CONFIG": service.config, "KRB5CCNAME": mit_kdc.login("aes256").ccache or ""}
    with (
        DotnetStreams(tickets) as client,
        DotnetStreams({**mit_kdc.environment, "KRB5_KTNAME": service.keytab}) as server,
    ):
        yield Sides(client, server, service.target, mit_kdc.services["other"].target)


def handshake(said: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Split what one side said into the frames of its handshake, up to the last one, and the rest."""
    frames = []
    while said[:1] in (b"\x14", b"\x15", b"\x16"):
        kind, version, size = struct.unpack_from(">BHH", said)
        assert version == 0x0100
        frames.append((kind, said[5 : 5 + size]))
        said = said[5 + size :]
        if kind == DONE:
            break
    return frames, said


def records(said: bytes) -> list[bytes]:
    """The payloads of the records after a handshake."""
    found = []
    while said:
        (size,) = struct.unpack_from("<I", said)
        found.append(said[4 : 4 + size])
        assert len(found[-1]) == size
        said = said[4 + size :]
    return found


def kinds(frames: list[tuple[int, bytes]]) -> list[int]:
    return [kind for kind, _ in frames]


def only(relay: RecordingRelay) -> Conversation:
    (conversation,) = relay.conversations
    return conversation


def test_messages_over_the_borders_of_records_come_back_as_they_were(sides: Sides):
    sizes = [1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 200_000]
    with sides.server.listen() as server:
        with RecordingRelay(server.port) as relay, sides.client.connect(relay.port) as client:
            told = client.login(None, sides.target)
            assert client.echo(20, sizes=sizes) > 0
        seen = server.next_login()
        server.next_end()
    assert (told.authentication_type, told.remote_name) == ("Kerberos", sides.target)
    assert (seen.authentication_type, seen.remote_name) == ("Kerberos", "alice@MIT.TEST")
    assert told.is_mutually_authenticated and told.is_encrypted and told.is_signed

    frames, said = handshake(bytes(only(relay).client))
    assert kinds(frames) == [IN_PROGRESS]
    assert kinds(handshake(bytes(only(relay).server))[0]) == [DONE]
    # Each message begins a record, and each record is as full as it can be.
    parts = [min(CHUNK, size - at) for size in (sizes * 3)[:20] for at in range(0, size, CHUNK)]
    assert [len(record) for record in records(said)] == [part + TRAILER for part in parts]


def test_many_messages_may_be_under_way(sides: Sides):
    with sides.server.listen() as server, sides.client.connect(server.port) as client:
        client.login(None, sides.target)
        client.echo(2000, sizes=[32, 1024, 16384], window=16)


def test_many_clients_are_served_at_once(sides: Sides):
    clients: list[DotnetClient] = []

    def run(client: DotnetClient) -> float:
        client.login(None, sides.target)
        return client.echo(50, sizes=[32, 4096])

    with sides.server.listen() as server:
        clients = [sides.client.connect(server.port) for _ in range(8)]
        with ThreadPoolExecutor(len(clients)) as threads:
            assert len([*threads.map(run, clients)]) == len(clients)
        for client in clients:
            client.close()
        names = {server.next_login().remote_name for _ in clients}
        for _ in clients:
            server.next_end()
    assert names == {"alice@MIT.TEST"}


def test_reading_gives_what_there_is_or_all_that_was_asked_for_and_nothing_at_the_end(sides: Sides):
    with sides.server.listen() as server, sides.client.connect(server.port) as client:
        client.login(None, sides.target)
        client.write(b"hello")
        client.write(b"world")
        assert client.read(3) == b"hel"
        assert client.read(100) == b"lo"
        assert client.read_exactly(4) == b"worl"
        assert client.read(100) == b"d"
        client.shutdown()
        assert client.read(100) == b""
        server.next_end()


def refused(sides: Sides, server: DotnetServer, target: str) -> tuple[DotnetError, Conversation]:
    """Log in where it fails; return what .NET says to the client, and the bytes."""
    with (
        RecordingRelay(server.port) as relay,
        sides.client.connect(relay.port) as client,
        pytest.raises(DotnetError) as raised,
    ):
        client.login(None, target)
    with pytest.raises(DotnetError):
        server.next_login()
    return raised.value, only(relay)


def test_a_ticket_for_another_service_is_refused_with_an_error_of_eight_bytes(sides: Sides):
    with sides.server.listen() as server:
        error, conversation = refused(sides, server, sides.other_target)
    ((kind, payload),) = handshake(bytes(conversation.server))[0]
    # SEC_E_INTERNAL_ERROR, with the sign extended, in an order that is neither the specification's nor that of the .NET
    # Framework.
    assert (kind, payload) == (ERROR, struct.pack("<q", 0x80090304 - (1 << 32)))
    assert error.type == "AuthenticationException"
    assert [each.native for each in error.chain] == [None, 0x80090304]


def test_a_level_of_impersonation_that_is_too_low_is_refused_by_its_number(sides: Sides):
    with sides.server.listen(impersonation="Impersonation") as server:
        error, conversation = refused(sides, server, sides.target)
    assert handshake(bytes(conversation.server))[0] == [(ERROR, struct.pack("<q", 1790))]
    assert [each.native for each in error.chain] == [None, 1790]


def test_another_login_on_the_same_connection_takes_a_new_stream_object(sides: Sides):
    with sides.server.listen(tries=2) as server, sides.client.connect(server.port) as client:
        with pytest.raises(DotnetError, match="remote side"):
            client.login(None, sides.other_target)
        with pytest.raises(DotnetError, match="remote side"):
            client.login(None, sides.target)  # the same exception once more, and nothing is sent
        client.renew()
        assert client.login(None, sides.target).is_authenticated
        client.echo(3, sizes=[100])
        with pytest.raises(DotnetError):
            server.next_login()
        assert server.next_login().is_authenticated


def test_a_client_that_asks_for_signatures_gets_kerberos_with_encryption(sides: Sides):
    with sides.server.listen() as server, sides.client.connect(server.port) as client:
        assert client.login(None, sides.target, protection="Sign").is_encrypted
        client.echo(3, sizes=[100])


def test_a_client_that_asks_for_no_protection_gets_no_kerberos(sides: Sides):
    """It asks for the NTLM package; without a password it gives up, and says so before it has said anything else."""
    with (
        sides.server.listen(protection="None") as server,
        RecordingRelay(server.port) as relay,
        sides.client.connect(relay.port) as client,
        pytest.raises(DotnetError),
    ):
        client.login(None, sides.target, protection="None")
    assert kinds(handshake(bytes(only(relay).client))[0]) == [ERROR]
    assert not only(relay).server


@pytest.fixture
def ntlm_server(tmp_path: Path) -> Iterator[DotnetStreams]:
    """Its NTLM is gss-ntlmssp's: .NET's own has no server's side."""
    require_nothing(dotnet_stream.available() or gssapi_peer.available())
    users = tmp_path / "users"
    users.write_text("DOM:alice:secret\n")
    with DotnetStreams({"NTLM_USER_FILE": str(users)}) as process:
        yield process


# What the client says first, whether a message's own bytes are to be seen, and how large the record of one byte is.
NTLM_LEVELS: list[tuple[ProtectionLevel, bytes, bool, int]] = [
    ("EncryptAndSign", b"\x60", False, 17),
    ("Sign", b"\x60", True, 17),
    ("None", b"NTLMSSP\0", True, 0),
]


@pytest.mark.parametrize(("level", "first", "legible", "record"), NTLM_LEVELS)
def test_ntlm_of_the_machines_library_protects_what_is_asked_for(
    ntlm_server: DotnetStreams, level: ProtectionLevel, first: bytes, legible: bool, record: int
):
    message = b"a message that is easy to find"
    with DotnetStreams(managed_ntlm=False) as process, ntlm_server.listen(protection=level) as server:
        with RecordingRelay(server.port) as relay, process.connect(relay.port) as client:
            told = client.login(("alice", "secret", "DOM"), "host/localhost", protection=level)
            client.write(message)
            assert client.read_exactly(len(message)) == message
            client.echo(20, sizes=[1, CHUNK + 1])
        assert server.next_login().remote_name == "DOM\\alice"
        server.next_end()
    assert told.authentication_type == "NTLM"
    assert not told.is_mutually_authenticated
    assert (told.is_encrypted, told.is_signed) == (level == "EncryptAndSign", level != "None")

    said = bytes(only(relay).client)
    assert handshake(said)[0][0][1].startswith(first)
    assert (message in said) == legible
    if record:
        # The client's last token came as one of several; what its records begin with is a size.
        data = said[sum(5 + len(payload) for _, payload in handshake(said)[0]) :]
        assert len(records(data)[1]) == record
    else:
        assert message in handshake(said)[1][: len(message)]


def test_a_wrong_ntlm_password_is_refused_where_the_last_token_would_be(ntlm_server: DotnetStreams):
    with (
        DotnetStreams() as process,
        ntlm_server.listen() as server,
        RecordingRelay(server.port) as relay,
        process.connect(relay.port) as client,
        pytest.raises(DotnetError, match="remote side"),
    ):
        client.login(("alice", "wrong", "DOM"), "host/localhost")
    assert kinds(handshake(bytes(only(relay).server))[0]) == [IN_PROGRESS, ERROR]


def answered(sides: Sides, answer: bytes) -> DotnetError:
    """What .NET makes of a server's answer to its first token."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(wire.TIMEOUT)
                _, _, size = struct.unpack(">BHH", wire.recv_exact(connection, 5))
                wire.recv_exact(connection, size)
                connection.sendall(answer)

        serving = threads.submit(serve)
        with sides.client.connect(listener.getsockname()[1]) as client, pytest.raises(DotnetError) as raised:
            client.login(None, sides.target)
        serving.result()
    return raised.value


def alert(payload: bytes) -> bytes:
    return struct.pack(">BHH", ERROR, 0x0100, len(payload)) + payload


def test_an_error_is_understood_by_its_first_four_bytes_little_endian_first(sides: Sides):
    """The .NET Framework reads the last four, big-endian: a code that stands in both places is understood by both."""
    for code, kind in ((0x8009030C, "InvalidCredentialException"), (1790, "AuthenticationException")):
        error = answered(sides, alert(struct.pack("<I", code) + struct.pack(">I", code)))
        assert (error.type, error.chain[1].native) == (kind, code)
        error = answered(sides, alert(struct.pack(">Q", code)))
        assert (error.type, error.chain[1].native) == ("AuthenticationException", 0)


def test_an_error_without_a_code_is_an_error(sides: Sides):
    error = answered(sides, alert(b""))
    assert error.type == "AuthenticationException"
    assert len(error.chain) == 1


def test_the_process_says_what_was_wrong_with_a_request(sides: Sides):
    with pytest.raises(DotnetError) as raised:
        sides.client.ask("nonsense", 1)
    assert raised.value.chain[0].type == "System.ArgumentException"
