"""`SSPIChannel.run_as_peer`, and `triosspi serve --impersonate`: with clients of our own, and those of others."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from harness import (
    SERVER_MESSAGE,
    Channel,
    PlainCredential,
    close_both,
    frame,
    make_acceptor,
    make_channels,
    make_initiator,
    shake_hands,
)
from local_users import Users
from peers import NTLM_PEERS, PeerKind, wire
from peers.kerberos.fixtures import each_with_its_kdcs
from peers.kerberos.kinds import HEIMDAL_SPNEGO, MIT_RAW, PYTHON_GSSAPI_SPNEGO, KerberosPeerKind
from peers.kerberos.realm import Kdc
from peers.requirements import require
from peers.sspi_rs_peer import SSPI_RS_NEGOTIATE, SSPI_RS_NTLM
from programs import Running, running
from test_cli import Call, assert_one_line, call  # noqa: F401 - a fixture
from test_kerberos_peers import acceptor_for as kerberos_acceptor
from test_kerberos_peers import logged_in as kerberos_logged_in
from test_peers import ALICE, CAROL, User, acceptor_for, in_thread, logged_in, serving
from triosspi import (
    AccountMap,
    Impersonation,
    ImpersonationError,
    LocalProtocolError,
    PeerIdentity,
    SSPIChannel,
    WireFormat,
)
from triosspi.impersonation import windows
from triosspi.service import account_editor

Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_garbage_of_others() -> None:
    """Credentials of earlier tests, if the collector came to them while a thread is somebody who cannot read their files,
    would complain here."""
    gc.collect()


class Recorder:
    """Stands in for an `Impersonation`: runs what it is given as whoever runs the tests."""

    def __init__(self) -> None:
        self.peers: list[PeerIdentity] = []

    async def run_as_peer(self, peer: PeerIdentity, function: Function, *args: Any, native: object = None) -> Any:
        await trio.lowlevel.checkpoint()
        assert native is None
        self.peers.append(peer)
        return function(*args)


async def connected(wire_format: WireFormat = WireFormat.FRAMED, **options: Any) -> tuple[Channel, Channel, Recorder]:
    """(client, server, recorder), with the handshake behind them."""
    recorder = Recorder()
    client_stream, server_stream = trio.testing.memory_stream_pair()
    client: Channel = SSPIChannel(client_stream, make_initiator(target="host/server"), wire=wire_format)
    server: Channel = SSPIChannel(server_stream, make_acceptor(**options), wire=wire_format, impersonation=recorder)
    await shake_hands(client, server)
    return client, server, recorder


# When


async def test_before_the_handshake_there_is_nobody_to_be() -> None:
    _, server = make_channels(impersonation=Recorder())
    with pytest.raises(trio.NeedHandshakeError):
        await server.run_as_peer(int)


async def test_it_is_off_unless_asked_for() -> None:
    client, server = make_channels()
    await shake_hands(client, server)
    await client.send(b"hello")
    await server.receive()
    with pytest.raises(
        LocalProtocolError, match=r"impersonation is off: it needs impersonation=Impersonation\(\.\.\.\)"
    ):
        await server.run_as_peer(int)
    await close_both(client, server)


async def test_an_initiator_cannot_be_its_acceptor() -> None:
    client, server = make_channels(impersonation=Recorder())
    await shake_hands(client, server)
    await server.send(b"hello")
    await client.receive()
    with pytest.raises(LocalProtocolError, match="only an acceptor can impersonate its peer"):
        await client.run_as_peer(int)
    await close_both(client, server)


async def test_a_peer_is_impersonated_only_after_its_first_message(caplog: pytest.LogCaptureFixture) -> None:
    """A login alone may be somebody's else, relayed: who has no key has no message that opens."""
    client, server, recorder = await connected()
    with pytest.raises(LocalProtocolError, match="the peer has not proved its key: receive its first message"):
        await server.run_as_peer(int)
    # Nothing is lost by the attempt; and what has arrived and was not opened proves nothing.
    await client.send(b"hello")
    with pytest.raises(LocalProtocolError):
        await server.run_as_peer(int)
    assert await server.receive() == b"hello"
    assert await server.run_as_peer(divmod, 17, 5) == (3, 2)
    assert [str(peer) for peer in recorder.peers] == ["DOM\\alice"]
    assert caplog.records == []
    await close_both(client, server)
    assert recorder.peers == [server.peer]


async def test_a_forged_first_message_proves_nothing() -> None:
    client, server, recorder = await connected()
    await client.transport_stream.send_all(b"\x20\0\0\0\x10\0\0\0" + bytes(28))
    with pytest.raises(trio.BrokenResourceError):
        await server.receive()
    with pytest.raises(trio.BrokenResourceError):
        await server.run_as_peer(int)
    assert recorder.peers == []
    await trio.aclose_forcefully(client)
    await server.aclose()


async def test_a_goodbye_is_a_message_too() -> None:
    client, server, recorder = await connected()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.aclose)
        with pytest.raises(trio.EndOfChannel):
            await server.receive()
        assert await server.run_as_peer(int) == 0
        await server.aclose()
    assert len(recorder.peers) == 1


async def test_on_a_closed_channel_nobody_is_impersonated() -> None:
    client, server, recorder = await connected()
    await client.send(b"hello")
    await server.receive()
    await close_both(client, server)
    with pytest.raises(trio.ClosedResourceError):
        await server.run_as_peer(int)
    assert recorder.peers == []


async def test_nobody_is_impersonated_after_his_ticket_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    client, server, recorder = await connected()
    await client.send(b"hello")
    await server.receive()
    server._session._context._deadline = 0.0
    with pytest.raises(trio.BrokenResourceError, match="the peer's Kerberos ticket has ended"):
        await server.run_as_peer(int)
    with pytest.raises(trio.BrokenResourceError):
        await server.send(b"hello")
    assert recorder.peers == []
    await trio.aclose_forcefully(client)
    await server.aclose()


RELAYED = "to be impersonated, though the NTLM login may be relayed from another service"


async def test_in_the_samples_format_an_ntlm_login_is_believed_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    for options in ({}, {"require_target": "allow", "target_names": ["host/server"]}):
        client, server, _ = await connected(WireFormat.SAMPLE, **options)
        caplog.clear()
        assert await server.run_as_peer(int) == 0
        (record,) = caplog.records
        assert (record.name, record.levelno) == ("triosspi.impersonation", logging.WARNING)
        assert record.getMessage() == f"DOM\\alice: {RELAYED}: require_target='require' refuses those"
        await trio.aclose_forcefully(client)
        await trio.aclose_forcefully(server)


async def test_where_only_logins_for_this_service_are_let_in_there_is_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client, server, _ = await connected(WireFormat.SAMPLE, require_target="require", target_names=["host/server"])
    assert await server.run_as_peer(int) == 0
    assert caplog.records == []
    await trio.aclose_forcefully(client)
    await trio.aclose_forcefully(server)


async def test_in_the_samples_format_a_ticket_needs_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    client_stream, server_stream = trio.testing.memory_stream_pair()
    credential: Any = PlainCredential("accept", [b"token"])
    server: Channel = SSPIChannel(server_stream, credential, wire=WireFormat.SAMPLE, impersonation=Recorder())
    await client_stream.send_all(frame(b"NTLMSSP\0"))
    await server.do_handshake()
    (context,) = credential.contexts
    context.peer.mechanism = "kerberos"
    context.native = None
    assert await server.run_as_peer(int) == 0
    assert caplog.records == []
    await trio.aclose_forcefully(server)


async def test_the_option_is_passed_on_by_every_layer() -> None:
    recorder = Recorder()
    seen: list[str] = []

    async def handler(channel: Any) -> None:
        seen.append(await channel.receive())
        seen.append(await channel.run_as_peer(str, "as the peer"))

    def talk(server: Any) -> None:
        with logged_in(SSPI_RS_NTLM, server) as connection:
            connection.send(b"hello")
            # The server's goodbye.
            assert connection.receive() == b""

    require(SSPI_RS_NTLM)
    async with serving(make_acceptor(), handler, impersonation=recorder) as server:
        await in_thread(talk, server)
        await server.wait_until_over()
    assert seen == [b"hello", "as the peer"]


# Whom the map does not know


async def test_who_is_nobody_here_is_logged_in_one_line_and_the_others_are_served(
    users: Users, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    impersonation = Impersonation(account_map(tmp_path, f"DOM\\alice {users.alice.name}"))

    async def handler(channel: Any) -> None:
        async for message in channel:
            await channel.run_as_peer(os.geteuid)
            await channel.send(message)

    def talk(server: Any) -> None:
        with logged_in(SSPI_RS_NTLM, server, CAROL) as connection:
            connection.send(b"hello")
            # Our goodbye, and nothing else.
            assert connection.receive() == b""
        with logged_in(SSPI_RS_NTLM, server, ALICE) as connection:
            connection.echo(b"hello")

    require(SSPI_RS_NTLM)
    caplog.set_level(logging.WARNING, logger="triosspi.server")
    async with serving(acceptor_for(SSPI_RS_NTLM), handler, impersonation=impersonation) as server:
        await in_thread(talk, server)
        await server.wait_until_over(2)
    (record,) = caplog.records
    assert record.getMessage().endswith(": carol: cannot be impersonated: 'carol' has no local account")
    assert record.exc_info is None
    assert server.statistics.handler_errors == 1


def account_map(directory: Path, *lines: str, **options: Any) -> AccountMap:
    path = directory / "map"
    path.write_text("\n".join(lines))
    return AccountMap(path, **options)


# Live servers, and clients that nobody here wrote


async def save(channel: Any) -> None:
    """A file server in small: each message is a path and what is to be written there, by whoever says so."""
    async for message in channel:
        path, _, text = message.decode().partition(" ")

        def write(path: str = path, text: str = text) -> str:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
            return f"saved by {os.geteuid()}"

        try:
            answer = await channel.run_as_peer(write)
        except OSError as exc:
            answer = type(exc).__name__
        await channel.send(answer.encode())


def owner(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_uid, status.st_gid


@pytest.fixture
def private(users: Users, request: pytest.FixtureRequest) -> Path:
    """A directory of bob's that nobody else may look into."""
    path = users.place / f"private-{abs(hash(request.node.name))}"
    path.mkdir(mode=0o700)
    os.chown(path, users.bob.uid, users.bob.gid)
    return path


@pytest.mark.parametrize("peer", NTLM_PEERS, ids=str)
async def test_what_an_ntlm_peer_makes_is_the_mapped_users(
    peer: PeerKind, users: Users, private: Path, tmp_path: Path
) -> None:
    require(peer)
    impersonation = Impersonation(account_map(tmp_path, f"DOM\\alice {users.alice.name}", f"carol {users.bob.name}"))
    public = users.place / f"{private.name}-alice"

    def talk(server: Any, user: User, path: Path) -> bytes:
        with logged_in(peer, server, user) as connection:
            connection.send(f"{path} by {user.name}".encode())
            return connection.receive()

    async with serving(acceptor_for(peer), save, impersonation=impersonation) as server:
        assert await in_thread(talk, server, ALICE, public) == b"saved by %d" % users.alice.uid
        # Both at once, where one of them may not be.
        answers: dict[str, bytes] = {}

        async def attempt(user: User) -> None:
            answers[user.name] = await in_thread(talk, server, user, private / user.name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(attempt, ALICE)
            nursery.start_soon(attempt, CAROL)
    assert answers == {"alice": b"PermissionError", "carol": b"saved by %d" % users.bob.uid}
    for path, account in ((public, users.alice), (private / "carol", users.bob)):
        assert owner(path) == (account.uid, account.gid)
    assert await in_thread(public.read_text) == "by alice"
    assert os.listdir(private) == ["carol"]


@each_with_its_kdcs([MIT_RAW, HEIMDAL_SPNEGO, PYTHON_GSSAPI_SPNEGO])
async def test_what_a_kerberos_peer_makes_is_the_mapped_users(
    peer: KerberosPeerKind, kdc: Kdc, users: Users, private: Path, tmp_path: Path
) -> None:
    require(peer)
    login = kdc.login("aes256")
    # To a pattern the name of nobody else is given, and bob of another realm is not this one.
    lines = (f"{login.username}@OTHER.TEST root", f"*@{login.realm} {users.bob.name}")
    impersonation = Impersonation(account_map(tmp_path, *lines))

    def talk(server: Any) -> bytes:
        with kerberos_logged_in(peer, server, login) as connection:
            connection.send(f"{private / 'file'} by Kerberos".encode())
            return connection.receive()

    async with serving(kerberos_acceptor(kdc), save, impersonation=impersonation) as server:
        assert await in_thread(talk, server) == b"saved by %d" % users.bob.uid
    assert owner(private / "file") == (users.bob.uid, users.bob.gid)


def with_rule(path: Path, realm: str, rule: str) -> Path:
    """The krb5.conf of now, with one more line for a realm."""
    config = Path(os.environ["KRB5_CONFIG"]).read_text()
    path.write_text(re.sub(rf"({re.escape(realm)} = {{)", rf"\1\n {rule}", config, count=1))
    assert rule in path.read_text()
    return path


@pytest.mark.parametrize("kdc", ["mit"], indirect=True)
async def test_the_rules_of_krb5_conf_map_a_live_peer(
    kdc: Kdc, users: Users, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(MIT_RAW)
    login = kdc.login("aes256")
    acceptor = kerberos_acceptor(kdc)
    rule = f"auth_to_local = RULE:[1:$1]({login.username})s/.*/{users.alice.name}/"
    monkeypatch.setenv("KRB5_CONFIG", str(with_rule(tmp_path / "krb5.conf", login.realm, rule)))
    impersonation = Impersonation(AccountMap(None, auth_to_local=True))
    uids: list[int] = []

    async def greet(channel: Any) -> None:
        uids.append(await channel.run_as_peer(os.geteuid))
        await channel.send(SERVER_MESSAGE)

    def talk(server: Any) -> bytes:
        with kerberos_logged_in(MIT_RAW, server, login) as connection:
            return wire.read_sample(connection.sock, connection.initiator).plaintext

    async with serving(acceptor, greet, WireFormat.SAMPLE, impersonation=impersonation) as server:
        assert await in_thread(talk, server) == SERVER_MESSAGE
    assert uids == [users.alice.uid]


# The command line


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("accounts") / "accounts"
    account_editor.add(path, "DOM\\alice", ALICE.password)
    return path


def started(server: Running) -> Any:
    return SimpleNamespace(port=server.expect_port())


@pytest.mark.parametrize("peer", [SSPI_RS_NTLM, SSPI_RS_NEGOTIATE], ids=str)
def test_greet_impersonates_and_says_so_as_the_sample_does(
    peer: PeerKind, users: Users, accounts: Path, tmp_path: Path
) -> None:
    require(peer)
    account_map(tmp_path, f"DOM\\alice {users.alice.name}")
    options = ("--accounts", accounts, "--impersonate", "--account-map", tmp_path / "map", "-v", "--once")
    with running("serve", "--host", "127.0.0.1", "--port", "0", *options) as server:
        with logged_in(peer, started(server)) as connection:
            assert wire.read_sample(connection.sock, connection.initiator).plaintext == SERVER_MESSAGE
        assert server.wait() == 0
    transcript = server.out[server.out.index("Package Name") :].splitlines()
    assert transcript[:6] == [
        "Package Name: NTLM",
        "Impersonation worked. ",
        f"Client connected as :  {users.alice.name}",
        "Reverted to self.",
        "Data before encryption: This is your server speaking",
        "Length of data before encryption: 28 ",
    ]
    (line,) = (line for line in server.err.splitlines() if "WARNING" in line)
    assert f"DOM\\alice: {RELAYED}: require_target='require' refuses those" in line


def test_without_the_flag_greet_is_as_it_was(root: None, accounts: Path) -> None:
    require(SSPI_RS_NTLM)
    with running("serve", "--host", "127.0.0.1", "--port", "0", "--accounts", accounts, "-v", "--once") as server:
        with logged_in(SSPI_RS_NTLM, started(server)) as connection:
            assert wire.read_sample(connection.sock, connection.initiator).plaintext == SERVER_MESSAGE
        assert server.wait() == 0
    assert "\nClient connected as :  DOM\\alice\n" in server.out
    assert "mpersonat" not in server.out + server.err
    assert "Reverted" not in server.out


def test_greet_in_the_framed_format_waits_for_the_clients_first_message(
    users: Users, accounts: Path, tmp_path: Path
) -> None:
    require(SSPI_RS_NTLM)
    account_map(tmp_path, f"DOM\\alice {users.alice.name}")
    options = ("--accounts", accounts, "--impersonate", "--account-map", tmp_path / "map", "-v", "--once")
    with running("serve", "greet", "--wire", "framed", "--host", "127.0.0.1", "--port", "0", *options) as server:
        with logged_in(SSPI_RS_NTLM, started(server)) as connection:
            connection.send(b"hello")
            assert connection.receive() == SERVER_MESSAGE
        assert server.wait() == 0
    assert f"\nImpersonation worked. \nClient connected as :  {users.alice.name}\nReverted to self.\n" in server.out
    assert "WARNING" not in server.err


def test_greet_tells_a_client_nothing_whom_the_map_does_not_know(users: Users, accounts: Path, tmp_path: Path) -> None:
    require(SSPI_RS_NTLM)
    account_map(tmp_path, f"alice {users.alice.name}", f"OTHER\\* {users.bob.name}")
    options = ("--accounts", accounts, "--impersonate", "--account-map", tmp_path / "map", "-v", "--once")
    with running("serve", "--host", "127.0.0.1", "--port", "0", *options) as server:
        with logged_in(SSPI_RS_NTLM, started(server)) as connection, pytest.raises(wire.Refused):
            wire.read_sample(connection.sock, connection.initiator)
        server.wait()
    (line,) = (line for line in server.err.splitlines() if "cannot be impersonated" in line)
    assert "DOM\\alice: cannot be impersonated: 'DOM\\\\alice' has no local account" in line
    assert "Traceback" not in server.err
    assert "Client connected" not in server.out


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("arguments", "status", "fragments"),
    [
        (["--impersonate"], 2, ["--impersonate needs --account-map, --auth-to-local or both"]),
        (["--account-map", "map"], 2, ["--account-map, --auth-to-local and --min-uid go with --impersonate"]),
        (["--auth-to-local"], 2, ["go with --impersonate"]),
        (["--min-uid", "5"], 2, ["go with --impersonate"]),
        (["--impersonate", "--account-map", "map", "--min-uid", "-1"], 2, ["--min-uid"]),
        (["echo", "--impersonate", "--account-map", "map"], 2, ["echo has no use for it"]),
        (["--wire", "framed", "--impersonate", "--account-map", "map"], 2, ["echo has no use for it"]),
        (["--impersonate", "--account-map", "missing"], 1, ["cannot read the account map missing: No such file"]),
        (["--impersonate", "--account-map", "bad"], 1, ["bad:2: write a principal or pattern, then a local account"]),
        (["--impersonate", "--account-map", "unknown"], 1, ["unknown:1: there is no local account 'tsspi-nobody'"]),
        (["--impersonate", "--account-map", "system"], 1, ["system:1: the local account 'root' has the uid 0, and"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_work_is_said_in_one_line_at_the_start(
    call: Call,  # noqa: F811 - the fixture
    tmp_path: Path,
    arguments: list[str],
    status: int,
    fragments: list[str],
) -> None:
    texts = {
        "map": "DOM\\alice nobody",
        "bad": "# first\nDOM\\alice",
        "unknown": "a tsspi-nobody",
        "system": "*@X root",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert_one_line(call("serve", "--port", "0", *arguments), status, *fragments)


# Windows, as far as it can be seen from here


class Secur32:
    """The two functions, and what was asked of them."""

    def __init__(self, impersonate: int = 0, revert: int = 0) -> None:
        self.calls: list[tuple[str, Any]] = []
        self._answers = {"Impersonate": impersonate, "Revert": revert}

    def _answer(self, name: str, handle: Any) -> int:
        self.calls.append((name, handle._obj.dwLower))
        return self._answers[name]

    def ImpersonateSecurityContext(self, handle: Any) -> int:  # noqa: N802 - Windows's name
        return self._answer("Impersonate", handle)

    def RevertSecurityContext(self, handle: Any) -> int:  # noqa: N802 - the same
        return self._answer("Revert", handle)


@pytest.fixture
def native_context() -> Any:
    """A context of sspi-rs's, which keeps its handle where a Windows one's is."""
    sspilib = pytest.importorskip("sspilib")
    credential = sspilib.UserCredential("alice", "secret", "DOM", protocol="NTLM")
    context = sspilib.ClientSecurityContext(credential, "host/server")
    context.step()
    return context


def test_a_native_context_gives_its_handle(native_context: Any) -> None:
    handle = windows.context_handle(native_context)
    # sspi-rs's own: what is read here is what its library is called with. SECPKG_ATTR_SIZES is 0.
    (library,) = Path(importlib.util.find_spec("sspilib").origin).parents[1].glob("sspilib.libs/libsspi*.so")  # type: ignore[union-attr,arg-type]
    sizes = (ctypes.c_uint32 * 4)()
    assert ctypes.CDLL(str(library)).QueryContextAttributesW(ctypes.byref(handle), 0, sizes) == 0
    assert sizes[3] == 16  # cbSecurityTrailer of NTLM


def test_a_context_of_another_make_is_an_error() -> None:
    class CtxtHandle:
        __slots__ = ("one", "two")

    for context in (object(), CtxtHandle(), None):
        with pytest.raises(ImpersonationError, match="hides its contexts' handles elsewhere"):
            windows.run_as_client(context, int, (), Secur32())


async def test_a_native_peer_is_impersonated_and_reverted(root: None, native_context: Any, tmp_path: Path) -> None:
    secur32 = Secur32()
    lower = windows.context_handle(native_context).dwLower
    inside: list[Any] = []

    def fail() -> None:
        inside.append(list(secur32.calls))
        raise KeyError

    assert windows.run_as_client(native_context, divmod, (17, 5), secur32) == (3, 2)
    assert secur32.calls == [("Impersonate", lower), ("Revert", lower)]
    secur32.calls.clear()
    with pytest.raises(KeyError):
        windows.run_as_client(native_context, fail, (), secur32)
    assert inside == [[("Impersonate", lower)]]
    assert secur32.calls == [("Impersonate", lower), ("Revert", lower)]


def test_a_native_peer_that_cannot_be_impersonated_is_an_error(native_context: Any) -> None:
    called: list[bool] = []
    secur32 = Secur32(impersonate=-2146893045)  # SEC_E_NO_IMPERSONATION, as a signed int
    with pytest.raises(ImpersonationError, match="ImpersonateSecurityContext: 0x8009030b"):
        windows.run_as_client(native_context, called.append, (True,), secur32)
    assert called == []
    assert [name for name, _ in secur32.calls] == ["Impersonate"]


def test_a_native_thread_that_cannot_revert_ends_the_process(
    native_context: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Aborted(BaseException):
        pass

    def abort() -> None:
        raise Aborted

    monkeypatch.setattr(windows.os, "abort", abort)
    with pytest.raises(Aborted):
        windows.run_as_client(native_context, int, (), Secur32(revert=1))
    assert capfd.readouterr().err == "triosspi: RevertSecurityContext failed; aborting\n"


async def test_on_windows_the_peers_own_context_is_what_is_run_with(
    users: Users, native_context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secur32 = Secur32()
    monkeypatch.setattr(windows, "load_secur32", lambda: secur32)
    impersonation = Impersonation(account_map(tmp_path, f"alice {users.alice.name}"))
    peer: Any = None
    thread = await impersonation.run_as_peer(peer, threading.get_native_id, native=native_context)
    assert thread != threading.get_native_id()
    assert [name for name, _ in secur32.calls] == ["Impersonate", "Revert"]
