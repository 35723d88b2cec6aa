"""No error leads to a secret: not through its traceback's locals, its cause, its context or a group.

`raise ... from None` hides the context and keeps it: the NT hash and the session's keys once hung on every
refused login, for any error reporter that shows locals to publish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from exposure import Secrets, errors_of
from forge import (
    ACCEPT_INCOMPLETE,
    AV_TARGET_NAME,
    KEY_EXCH,
    OID_NTLM,
    Client,
    neg_token_init,
    neg_token_resp,
    response_token,
)
from harness import connected_channels, make_sessions, seal_from, tcp_channels
from peers.kerberos import Kdc, LineContext
from peers.kerberos.fixtures import join
from peers.kerberos.kinds import MIT_RAW
from peers.requirements import require
from triosspi import (
    Acceptor,
    Account,
    AccountFile,
    AuthenticationError,
    ConfigurationError,
    Initiator,
    SSPIChannel,
    UnsealError,
)
from triosspi.security.context import SecurityContext
from triosspi.security.ntlm.accounts import AccountTable, parse, parse_line
from triosspi.security.ntlm.primitives import nt_hash
from triosspi.security.sealers import ProxySealer
from triosspi.service import account_editor
from triosspi.service.cli.passwords import read_clear, read_password_file
from triosspi.tcp.server import CountingServer, ServerStatistics

PASSWORD = "Tr0ub4dor&3-and-more"


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> Secrets:
    return Secrets(monkeypatch, PASSWORD)


def accounts(*, enabled: bool = True) -> AccountTable:
    table = AccountTable()
    table.add(Account("DOM", "alice", nt_hash(PASSWORD), enabled=enabled))
    return table


class BrokenSource:
    def lookup(self, domain: str, user: str) -> Account | None:
        found = accounts().lookup(domain, user)
        assert found is not None
        raise LookupError("the database is gone")


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "wrong password": ({"password": "another"}, {}),
    "unknown account": ({"user": "nobody"}, {}),
    "disabled": ({}, {"accounts": accounts(enabled=False)}),
    "no MIC promised": ({"promise_mic": False}, {}),
    "MIC taken out": ({"mic": "absent"}, {}),
    "MIC wrong": ({"mic": "wrong"}, {}),
    "channel bindings": ({}, {"channel_bindings": b"tls-server-end-point:x"}),
    "target": (
        {"extra_pairs": [(AV_TARGET_NAME, "cifs/other".encode("utf-16-le"))]},
        {"target_names": ["host/this"], "require_target": "require"},
    ),
    "weak flags": ({"flags": Client().flags & ~KEY_EXCH}, {}),
    "NTLMv1": ({"nt_form": "v1"}, {}),
    "session key of another size": ({"encrypted_session_key": b"12345"}, {}),
    "anonymous": ({"user": ""}, {}),
    "denied": ({}, {"deny": ["DOM\\alice"]}),
    "not allowed": ({}, {"allow": ["DOM\\bob"]}),
    "no groups": ({}, {"require_groups": ["S-1-5-21-1-2-3-513"]}),
    "the source fails": ({}, {"accounts": BrokenSource()}),
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["raw", "SPNEGO"])
@pytest.mark.parametrize("reason", REFUSALS)
def test_no_refused_ntlm_login_leads_to_a_key(secrets: Secrets, reason: str, wrapped: bool) -> None:
    wrong, options = REFUSALS[reason]
    client = Client(**{"password": PASSWORD, **wrong})
    context = Acceptor(**{"accounts": accounts(), **options}).new_context()
    secrets.raw.add(client.session_key)
    with pytest.raises(AuthenticationError) as caught:
        if wrapped:
            answer = context.step(neg_token_init(client.negotiate(), OID_NTLM))
            token = client.authenticate(response_token(answer))
            context.step(
                neg_token_resp(state=ACCEPT_INCOMPLETE, token=token, mic=client.mech_list_mic(b"\x30\x0c" + OID_NTLM))
            )
        else:
            context.step(client.authenticate(context.step(client.negotiate())))
        assert context.established is False
    error = caught.value
    assert error.mechanism == "ntlm"
    assert list(errors_of(error)) == [error]
    secrets.assert_unseen(error)


def test_a_wrong_mech_list_mic_leads_to_no_key(secrets: Secrets) -> None:
    client = Client(password=PASSWORD)
    context = Acceptor(accounts=accounts()).new_context()
    token = client.authenticate(response_token(context.step(neg_token_init(client.negotiate(), OID_NTLM))))
    with pytest.raises(AuthenticationError) as caught:
        context.step(neg_token_resp(token=token, mic=b"\1\0\0\0" + bytes(12)))
    secrets.assert_unseen(caught.value)
    assert list(errors_of(caught.value)) == [caught.value]


@pytest.mark.parametrize("raw", [False, True])
def test_no_failed_initiator_leads_to_its_password(secrets: Secrets, raw: bool) -> None:
    initiator = Initiator(username="DOM\\alice", password=PASSWORD, mechanism="ntlm", raw=raw)
    acceptor = Acceptor(accounts=accounts()).new_context()
    context = initiator.new_context()
    challenge = acceptor.step(context.step(None))
    for spoiled in (challenge[:-7], challenge.replace(b"NTLMSSP\0\2", b"NTLMSSP\0\3"), b"rubbish"):
        context = initiator.new_context()
        context.step(None)
        with pytest.raises(AuthenticationError) as caught:
            context.step(spoiled)
        secrets.assert_unseen(caught.value)
        assert list(errors_of(caught.value)) == [caught.value]


async def refused(password: str, options: dict[str, Any]) -> list[BaseException]:
    """How a handshake ends on both channels, and once more when they are used again."""
    streams = trio.testing.memory_stream_pair()
    initiator = Initiator(username="DOM\\alice", password=password, mechanism="ntlm")
    channels = SSPIChannel(streams[0], initiator), SSPIChannel(streams[1], Acceptor(**options))
    errors: list[BaseException] = []

    async def run(channel: SSPIChannel[Any]) -> None:
        for use in (channel.do_handshake, channel.receive):
            try:
                await use()
            except trio.BrokenResourceError as exc:
                errors.append(exc)
        assert channel._cause is not None
        errors.append(channel._cause)
        await channel.transport_stream.aclose()

    async with trio.open_nursery() as nursery:
        for channel in channels:
            nursery.start_soon(run, channel)
    return errors


@pytest.mark.parametrize("reason", ["wrong password", "denied", "the source fails"])
async def test_no_refused_channel_leads_to_a_secret_or_a_token(secrets: Secrets, reason: str) -> None:
    secrets.raw.add(b"NTLMSSP\0")
    password = "another" if reason == "wrong password" else PASSWORD
    errors = await refused(password, {"accounts": accounts(), **REFUSALS[reason][1]})
    assert len(errors) == 6
    for error in errors:
        secrets.assert_unseen(error)
    secrets.assert_unseen(BaseExceptionGroup("all of them", errors))


@pytest.mark.parametrize("native", [True, False])
def test_no_message_that_does_not_open_or_seal_leads_to_a_key(
    secrets: Secrets, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    if not native:
        monkeypatch.setattr("triosspi.security.context.take_over", lambda *_args, **_options: None)
    _, server = make_sessions()
    context: SecurityContext = server._context
    attempts: list[Callable[[], object]] = [
        lambda: context.open(b"short", b"rubbish"),
        lambda: context.open(bytes(16), b"rubbish"),
        lambda: context.seal(None),  # type: ignore[arg-type]
    ]
    if native:
        attempts.append(lambda: context.seal_frames([None]))  # type: ignore[list-item]
    else:
        assert isinstance(context._sealer, ProxySealer)
    for attempt in attempts:
        with pytest.raises(UnsealError) as caught:
            attempt()
        assert list(errors_of(caught.value)) == [caught.value]
        secrets.assert_unseen(caught.value)


async def test_no_exception_of_a_handler_leads_to_a_key(secrets: Secrets, caplog: pytest.LogCaptureFixture) -> None:
    client, server = await tcp_channels()
    caught: list[BaseException] = []

    async def handler(channel: SSPIChannel[Any]) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channel.receive)
                nursery.start_soon(channel.receive)
                raise ValueError("a mistake of the handler's")  # noqa: TRY301
        except BaseException as exc:
            caught.append(exc)
            raise

    counts = ServerStatistics()
    await trio.aclose_forcefully(client)
    await CountingServer(handler, 10, counts).serve(server)
    assert counts.handler_errors == 1
    client, server = await connected_channels()
    tampered = bytearray(seal_from(client, b"hello"))
    tampered[-1] ^= 1
    await client.transport_stream.send_all(tampered)
    with pytest.raises(trio.BrokenResourceError) as broken:
        await server.receive()
    caught += [record.exc_info[1] for record in caplog.records if record.exc_info and record.exc_info[1]]
    assert len(caught) >= 2
    for error in (*caught, broken.value):
        secrets.assert_unseen(error)


# Files and passwords that cannot be used


DIGEST = nt_hash(PASSWORD).hex().upper()


@pytest.mark.parametrize(
    "line",
    [
        f"DOM:bob:{PASSWORD}:too:many",
        f"DOM\\carol:1:{'0' * 32}:{DIGEST}:no brackets:LCT-0",
        f"DOM\\dave:1:{'0' * 32}:{DIGEST}0:[U]:LCT-0",
        f"D:a\\b:{PASSWORD}",
    ],
)
def test_no_error_of_an_account_file_leads_to_its_lines(secrets: Secrets, tmp_path: Path, line: str) -> None:
    path = tmp_path / "accounts"
    path.write_bytes(line.encode() + b"\n")
    path.chmod(0o600)
    broken = tmp_path / "broken"
    broken.write_bytes(line.encode() + b"\xff\n")
    for attempt in (
        lambda: parse_line(line),
        lambda: parse(line, "accounts"),
        lambda: AccountFile(path),
        lambda: AccountFile(broken),
        lambda: account_editor.add(path, "no\\such\\name", PASSWORD),
        lambda: account_editor.add(broken, "alice", PASSWORD),
        lambda: account_editor.remove(path, "somebody"),
        lambda: account_editor.set_enabled(path, "somebody", enabled=True),
        lambda: account_editor.import_clear(broken, [line]),
        lambda: account_editor.hash_clear(broken),
        lambda: read_password_file(broken),
        lambda: read_clear(broken),
    ):
        with pytest.raises(ConfigurationError) as caught:
            attempt()
        assert list(errors_of(caught.value)) == [caught.value]
        secrets.assert_unseen(caught.value)


@pytest.mark.parametrize(
    "options", [{"username": None}, {"target": "rubbish"}, {"mechanism": "magic"}, {"raw": True}, {"ccache": "x"}]
)
def test_no_refused_initiator_leads_to_its_password(secrets: Secrets, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Initiator(**{"username": "alice", "password": PASSWORD, **options})
    secrets.assert_unseen(caught.value)


# Kerberos


@pytest.fixture
def kdc(mit_kdc: Kdc, monkeypatch: pytest.MonkeyPatch) -> Kdc:
    join(mit_kdc, monkeypatch)
    return mit_kdc


@pytest.fixture
def connect(kdc: Kdc) -> Iterator[Callable[..., LineContext]]:
    require(MIT_RAW)
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(closing(MIT_RAW.new(kdc.login("aes256", **options))))


@pytest.mark.parametrize(
    "options",
    [
        {"deny": ["*"]},
        {"spns": ["host/another.example"]},
        {"channel_bindings": b"tls-server-end-point:x"},
        {"require_groups": ["S-1-5-21-1-2-3-513"]},
        {"spoil": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_no_refused_ticket_leads_to_a_token(
    kdc: Kdc, connect: Callable[..., LineContext], secrets: Secrets, options: dict[str, Any]
) -> None:
    spoil = options.pop("spoil", False) if (options := dict(options)) else False
    if "deny" in options:
        options["deny"] = [f"*@{kdc.realm}"]
    context = Acceptor(keytab=kdc.services["aes256"].keytab, **options).new_context()
    token = connect().step(None)
    assert token is not None
    if spoil:
        token = token[:-9] + bytes([token[-9] ^ 1]) + token[-8:]
    secrets.raw |= {token, token[100:132], token[-40:]}
    with pytest.raises(AuthenticationError) as caught:
        context.step(token)
    assert caught.value.mechanism == "kerberos"
    assert list(errors_of(caught.value)) == [caught.value]
    secrets.assert_unseen(caught.value)


def test_a_kerberos_password_that_is_wrong_is_not_to_be_found(kdc: Kdc, secrets: Secrets) -> None:
    initiator = Initiator(username=f"alice@{kdc.realm}", password=PASSWORD, target="host/nowhere", mechanism="kerberos")
    with pytest.raises(AuthenticationError) as caught:
        initiator.new_context().step(None)
    assert list(errors_of(caught.value)) == [caught.value]
    secrets.assert_unseen(caught.value)
