"""Ours and Microsoft's NegotiateStream: .NET's clients at our server, of 8 and of Core 3.1, and our client at .NET 8's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from harness import PASSWORD, make_acceptor, make_initiator
from peers import dotnet_stream, gssapi_peer
from peers.dotnet_stream import (
    Credential,
    DotnetClient,
    DotnetError,
    DotnetStreams,
    ImpersonationLevel,
    ProtectionLevel,
)
from peers.kerberos.fixtures import MitKdc
from peers.requirements import require_nothing
from triosspi import (
    Acceptor,
    ImpersonationError,
    Initiator,
    PeerIdentity,
    PeerRefusalError,
    ServerStatistics,
    SSPIStream,
    open_negotiate_stream,
    serve_negotiate_stream_over_tcp,
)

T = TypeVar("T")
Stream = SSPIStream[trio.SocketStream]

HOST = "127.0.0.1"
ALICE: Credential = ("alice", PASSWORD, "DOM")
NTLM_TARGET = "host/localhost"
# Over the most that .NET puts into a record, and ours.
GROWING = [1, 2, 100, 4096, 64_511, 64_512, 64_513, 129_023, 129_024, 129_025]
KINDS = ["managed NTLM", "gss-ntlmssp", "Kerberos", ".NET Core 3.1, gss-ntlmssp", ".NET Core 3.1, Kerberos"]


@dataclass
class Login:
    """A .NET that can log in to an acceptor of ours."""

    dotnet: DotnetStreams
    acceptor: Acceptor
    credential: Credential | None
    target: str
    mechanism: str
    principal: str


@pytest.fixture
def login(request: pytest.FixtureRequest) -> Iterator[Login]:
    """By any of `KINDS`."""
    require_nothing(dotnet_stream.available())
    kind: str = request.param
    core31 = "3.1" in kind
    if "Kerberos" in kind:
        kdc: MitKdc = request.getfixturevalue("mit_kdc")
        request.getfixturevalue("monkeypatch").setenv("KRB5_CONFIG", kdc.config)
        service = kdc.services["aes256"]
        environment = {"KRB5_CONFIG": service.config, "KRB5CCNAME": kdc.login("aes256").ccache or ""}
        with DotnetStreams(environment, core31=core31) as dotnet:
            acceptor = Acceptor(keytab=service.keytab)
            yield Login(dotnet, acceptor, None, service.target, "kerberos", "alice@MIT.TEST")
        return
    if "gss-ntlmssp" in kind:
        require_nothing(gssapi_peer.available())
    with DotnetStreams(managed_ntlm=kind == "managed NTLM", core31=core31) as dotnet:
        yield Login(dotnet, make_acceptor(), ALICE, NTLM_TARGET, "ntlm", "DOM\\alice")


all_kinds = pytest.mark.parametrize("login", KINDS, indirect=True)
by_ntlm = pytest.mark.parametrize("login", KINDS[:2], indirect=True)
by_kerberos = pytest.mark.parametrize("login", KINDS[2:3], indirect=True)
by_managed = pytest.mark.parametrize("login", KINDS[:1], indirect=True)


class Server:
    """A server of ours that echoes, and keeps what it sees of its clients."""

    def __init__(self) -> None:
        self.port = 0
        self.streams: list[Stream] = []
        self.statistics = ServerStatistics()

    async def serve(self, stream: Stream) -> None:
        self.streams.append(stream)
        await self.echo(stream)

    async def echo(self, stream: Stream) -> None:
        async for data in stream:
            await stream.send_all(data)


@asynccontextmanager
async def serving(acceptor: Acceptor, **options: Any) -> AsyncIterator[Server]:
    server = Server()
    async with trio.open_nursery() as nursery:
        serve = partial(serve_negotiate_stream_over_tcp, server.serve, 0, acceptor, host=HOST, **options)
        (listener,) = await nursery.start(partial(serve, statistics=server.statistics))
        server.port = listener.transport_listener.socket.getsockname()[1]
        yield server
        nursery.cancel_scope.cancel()


async def talk(login: Login, server: Server, conversation: Callable[[DotnetClient], T]) -> T:
    """Have a .NET client connect and do something, in a thread."""

    def run() -> T:
        with login.dotnet.connect(server.port) as client:
            return conversation(client)

    return await trio.to_thread.run_sync(run)


def logged_in(client: DotnetClient, login: Login, **options: Any) -> Any:
    return client.login(login.credential, login.target, **options)


# .NET at our server


@all_kinds
async def test_a_client_logs_in_and_its_echoes_grow_over_the_borders_of_records(login: Login) -> None:
    def conversation(client: DotnetClient) -> Any:
        security = logged_in(client, login)
        client.echo(20, sizes=GROWING)
        client.write(b"1")
        assert client.read_exactly(1) == b"1"
        return security

    async with serving(login.acceptor) as server:
        security = await talk(login, server, conversation)
        (stream,) = server.streams
        assert stream.peer.principal == login.principal
        assert stream.peer.mechanism == login.mechanism
        assert stream.protection == "encrypt"
    assert (security.is_encrypted, security.is_signed) == (True, True)
    assert security.is_mutually_authenticated is (login.mechanism == "kerberos")


@all_kinds
async def test_ten_mebibytes_in_one_write_come_back(login: Login) -> None:
    def conversation(client: DotnetClient) -> None:
        logged_in(client, login)
        # A thread reads while the other writes: what the echo fills would else stop both.
        client.echo(1, sizes=[10 * 1024 * 1024], window=2)

    async with serving(login.acceptor) as server:
        await talk(login, server, conversation)
        assert server.streams[0].traffic.bytes_received == 10 * 1024 * 1024


@all_kinds
async def test_what_one_side_ends_the_other_still_answers(login: Login) -> None:
    def conversation(client: DotnetClient) -> bytes:
        logged_in(client, login)
        client.write(b"the last words")
        client.shutdown()
        return client.read_exactly(100)

    async with serving(login.acceptor) as server:
        assert await talk(login, server, conversation) == b"the last words"


LEVELS: list[tuple[ImpersonationLevel, str]] = [
    ("Identification", "identification"),
    ("Impersonation", "impersonation"),
]


# Core 3.1 takes nothing but Identification on Linux.
@pytest.mark.parametrize("login", KINDS[1:3], indirect=True)
@pytest.mark.parametrize(("level", "seen"), LEVELS)
async def test_we_know_what_a_client_allows_to_be_done_in_its_name(
    login: Login, level: ImpersonationLevel, seen: str
) -> None:
    async with serving(login.acceptor) as server:
        await talk(login, server, partial(logged_in, login=login, impersonation=level))
        assert server.streams[0].peer.impersonation_level == seen


class Recorder:
    """In the place of an `Impersonation`: does not become anybody."""

    async def run_as_peer(self, peer: PeerIdentity, function: Callable[..., T], *args: Any, **_: object) -> T:
        return function(*args)


@pytest.mark.parametrize("login", KINDS[1:3], indirect=True)
async def test_nobody_is_impersonated_who_allows_only_to_be_identified(login: Login) -> None:
    outcomes: list[str] = []

    async def handler(stream: Stream) -> None:
        # It proves its key.
        assert await stream.receive_some() == b"1"
        try:
            outcomes.append(await stream.run_as_peer(str, "as the client"))
        except ImpersonationError as exc:
            outcomes.append(str(exc))
        await stream.send_all(b"2")

    def conversation(client: DotnetClient, level: ImpersonationLevel) -> bytes:
        logged_in(client, login, impersonation=level)
        client.write(b"1")
        return client.read_exactly(1)

    impersonation: Any = Recorder()
    async with serving(login.acceptor, impersonation=impersonation) as server:
        server.echo = handler  # type: ignore[method-assign]
        for level, _ in LEVELS:
            assert await talk(login, server, partial(conversation, level=level)) == b"2"
    assert "to be identified" in outcomes[0]
    assert outcomes[1:] == ["as the client"]


@all_kinds
async def test_a_hundred_writes_are_under_way_at_once(login: Login) -> None:
    def conversation(client: DotnetClient) -> None:
        logged_in(client, login)
        client.echo(2000, sizes=[32, 1024, 16_384], window=100)

    async with serving(login.acceptor) as server:
        await talk(login, server, conversation)
        assert server.streams[0].traffic.bytes_received == sum((32, 1024, 16_384)[n % 3] for n in range(2000))


async def refused(login: Login, server: Server, **options: Any) -> DotnetError:
    with pytest.raises(DotnetError) as caught:
        await talk(login, server, partial(logged_in, login=login, **options))
    return caught.value


@by_ntlm
@pytest.mark.parametrize(
    "credential", [("alice", "wrong", "DOM"), ("nobody", PASSWORD, "DOM"), ("alice", PASSWORD, "OTHER")]
)
async def test_whoever_may_not_come_in_is_told_the_same_whatever_is_wrong(login: Login, credential: Credential) -> None:
    login.credential = credential
    async with serving(login.acceptor) as server:
        error = await refused(login, server)
        assert server.streams == []
    assert error.type == "InvalidCredentialException"
    assert error.chain[-1].native == 0x8009030C
    assert (server.statistics.refused, server.statistics.nothing_said) == (1, 0)


@by_kerberos
async def test_a_ticket_of_another_service_is_a_matter_of_trust(login: Login) -> None:
    service = login.target.partition("@")[0]
    acceptor = Acceptor(keytab=login.acceptor.keytab, spns=["host/another.example"])
    assert service != "host/another.example"
    async with serving(acceptor) as server:
        error = await refused(login, server)
    assert error.type == "AuthenticationException"
    assert error.chain[-1].native == 1790


@by_managed
async def test_a_login_that_was_meant_for_another_service_is_a_matter_of_trust(login: Login) -> None:
    async with serving(make_acceptor(target_names=["host/mine"], require_target="require")) as server:
        assert (await refused(login, server)).chain[-1].native == 1790
        login.target = "host/mine"
        await talk(login, server, partial(logged_in, login=login))


@by_ntlm
@pytest.mark.parametrize("protection", ["encrypt", "sign"])
async def test_who_asks_for_no_protection_is_told_to_ask_for_more(login: Login, protection: Any) -> None:
    async with serving(login.acceptor, protection=protection) as server:
        error = await refused(login, server, protection="None")
        assert server.streams == []
    assert error.chain[-1].native == 1790


@by_ntlm
async def test_who_only_signs_where_encryption_is_demanded_is_cut_off_with_the_first_record(login: Login) -> None:
    def conversation(client: DotnetClient) -> None:
        logged_in(client, login, protection="Sign")
        client.write(b"in clear")
        assert client.read(100) == b""

    async with serving(login.acceptor) as server:
        await talk(login, server, conversation)
    assert server.statistics.lost == 1


PROTECTIONS: list[tuple[ProtectionLevel, str]] = [("EncryptAndSign", "encrypt"), ("Sign", "sign")]


# Core 3.1 cannot only sign on Linux.
@pytest.mark.parametrize("login", KINDS[:3], indirect=True)
@pytest.mark.parametrize(("level", "seen"), PROTECTIONS)
async def test_where_signatures_will_do_each_client_has_what_it_asks_for(
    login: Login, level: ProtectionLevel, seen: str
) -> None:
    def conversation(client: DotnetClient) -> Any:
        security = logged_in(client, login, protection=level)
        client.echo(20, sizes=GROWING)
        return security

    async with serving(login.acceptor, protection="sign") as server:
        security = await talk(login, server, conversation)
        protection = server.streams[0].protection
    # With Kerberos .NET on Linux always encrypts.
    assert protection == (seen if login.mechanism == "ntlm" else "encrypt")
    assert security.is_encrypted is (protection == "encrypt")


@by_managed
async def test_who_was_refused_may_try_again_on_its_connection(login: Login) -> None:
    def conversation(client: DotnetClient) -> None:
        for _ in range(2):
            with pytest.raises(DotnetError):
                client.login(("alice", "wrong", "DOM"), NTLM_TARGET)
            client.renew()
        logged_in(client, login)
        client.echo(3, sizes=[100_000])

    async with serving(login.acceptor) as server:
        await talk(login, server, conversation)
    assert (server.statistics.accepted, server.statistics.refused, server.statistics.authenticated) == (1, 2, 1)


@pytest.mark.long
@pytest.mark.parametrize("window", [1, 32])
@pytest.mark.parametrize("login", [KINDS[0], KINDS[2]], indirect=True)
async def test_a_hundred_thousand_messages_go_each_way(login: Login, window: int) -> None:
    def conversation(client: DotnetClient) -> None:
        logged_in(client, login)
        client.echo(100_000, sizes=[32, 1, 700], window=window, patience=300)

    async with serving(login.acceptor) as server:
        await talk(login, server, conversation)
        assert server.streams[0].traffic.bytes_sent == sum((32, 1, 700)[n % 3] for n in range(100_000))


# Our client at .NET's server


@dataclass
class Dotnet:
    """A server of .NET's, and what one of ours logs in with."""

    streams: DotnetStreams
    initiator: Initiator
    wrong: Initiator
    name: str


@pytest.fixture(params=["Kerberos", "gss-ntlmssp"])
def dotnet(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dotnet]:
    require_nothing(dotnet_stream.available())
    if request.param == "Kerberos":
        kdc: MitKdc = request.getfixturevalue("mit_kdc")
        service, other = kdc.services["aes256"], kdc.services["other"]
        monkeypatch.setenv("KRB5_CONFIG", kdc.config)
        ccache = kdc.login("aes256").ccache
        ours = partial(Initiator, ccache=ccache, mechanism="kerberos")
        with DotnetStreams({**kdc.environment, "KRB5_KTNAME": service.keytab}) as streams:
            yield Dotnet(streams, ours(target=service.target), ours(target=other.target), "alice@MIT.TEST")
        return
    # .NET's own NTLM has no server's side.
    require_nothing(gssapi_peer.available())
    users = tmp_path / "users"
    users.write_text(f"DOM:alice:{PASSWORD}\n")
    with DotnetStreams({"NTLM_USER_FILE": str(users)}, managed_ntlm=False) as streams:
        yield Dotnet(streams, make_initiator(), make_initiator("wrong"), "DOM\\alice")


@pytest.mark.parametrize(("level", "protection"), PROTECTIONS)
async def test_our_client_logs_in_to_dotnet_and_its_echoes_grow_over_the_borders(
    dotnet: Dotnet, level: ProtectionLevel, protection: Any
) -> None:
    with dotnet.streams.listen(protection=level) as server:
        async with await open_negotiate_stream(HOST, server.port, dotnet.initiator, protection=protection) as stream:
            for size in [*GROWING, 1024 * 1024]:
                data = bytes(range(256)) * (size // 256 + 1)
                received = bytearray()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.send_all, data[:size])
                    while len(received) < size:
                        received += await stream.receive_some()
                assert received == data[:size]
            # MIT's Kerberos encrypts whatever it is asked for.
            assert stream.protection == (protection if stream.peer.mechanism == "ntlm" else "encrypt")
        security = await trio.to_thread.run_sync(server.next_login)
        await trio.to_thread.run_sync(server.next_end)
    assert security.remote_name == dotnet.name
    assert security.is_signed


async def test_what_dotnet_refuses_is_told_with_its_code_in_words(dotnet: Dotnet) -> None:
    with dotnet.streams.listen() as server:
        stream = await open_negotiate_stream(HOST, server.port, dotnet.wrong)
        # What its server says is not LOGON_DENIED, and so in .NET's own words.
        with pytest.raises(trio.BrokenResourceError, match=r"SEC_E_INTERNAL_ERROR.*\(0x80090304\)") as caught:
            await stream.do_handshake()
        assert isinstance(caught.value.__cause__, PeerRefusalError)
        assert caught.value.__cause__.code == 0x80090304
        await trio.aclose_forcefully(stream)


async def test_too_little_protection_is_told_by_dotnet(tmp_path: Path) -> None:
    require_nothing(dotnet_stream.available() or gssapi_peer.available())
    users = tmp_path / "users"
    users.write_text(f"DOM:alice:{PASSWORD}\n")
    with DotnetStreams({"NTLM_USER_FILE": str(users)}, managed_ntlm=False) as streams, streams.listen() as server:
        stream = await open_negotiate_stream(HOST, server.port, make_initiator(), protection="sign")
        with pytest.raises(trio.BrokenResourceError, match="ERROR_TRUST_FAILURE"):
            await stream.do_handshake()
        await trio.aclose_forcefully(stream)


@pytest.mark.long
@pytest.mark.parametrize("outstanding", [1, 32])
async def test_our_client_exchanges_a_hundred_thousand_messages_with_dotnet(dotnet: Dotnet, outstanding: int) -> None:
    size, count = 32, 100_000
    with dotnet.streams.listen() as server:
        async with await open_negotiate_stream(HOST, server.port, dotnet.initiator) as stream:
            for _ in range(count // outstanding):
                for _ in range(outstanding):
                    await stream.send_all(bytes(size))
                left = size * outstanding
                while left:
                    left -= len(await stream.receive_some(left))
            assert stream.traffic.bytes_received == size * count
        await trio.to_thread.run_sync(server.next_end)
