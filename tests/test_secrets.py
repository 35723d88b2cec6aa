"""No password, hash, key or token in any log, repr or traceback."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

import exposure
from forge import Client, nt_hash, response_token
from harness import say
from triosspi import Acceptor, AccountFile, AuthenticationError, Initiator, SSPIChannel, WireFormat
from triosspi.security.ntlm.messages import read_authenticate
from triosspi.security.ntlm.verification import NTLMPolicy, verify
from triosspi.service.config.assembly import DemoAccount
from triosspi.session.session import Session

PASSWORD = "Tr0ub4dor&3"
SESSION_KEY = bytes(range(0x61, 0x71))


def shapes(secret: bytes) -> list[str]:
    """How a secret may look in a text."""
    return [*exposure.shapes(secret), secret.decode("latin-1"), repr(bytearray(secret))[12:-2]]


SECRETS = [
    PASSWORD,
    *shapes(PASSWORD.encode("utf-16-le")),
    *shapes(nt_hash(PASSWORD)),
    *shapes(SESSION_KEY),
    # What every token begins with.
    "NTLMSSP",
    *shapes(b"NTLMSSP\0"),
    "TlRMTVNTUA",
]


def assert_harmless(text: str) -> None:
    found = [secret for secret in SECRETS if secret in text]
    assert not found, text


@pytest.fixture
def account_file(tmp_path: Path) -> Path:
    path = tmp_path / "accounts"
    # Clear, and good: each with the secret in it.
    digest = nt_hash(PASSWORD).hex().upper()
    path.write_text(f"DOM:alice:{PASSWORD}\nDOM\\erin:1:{'0' * 32}:{digest}:[U]:LCT-0\n")
    path.chmod(0o644)
    return path


async def handshake(account_file: Path, **options: object) -> tuple[SSPIChannel, SSPIChannel, list[BaseException]]:
    client_stream, server_stream = trio.testing.memory_stream_pair()
    initiator = Initiator(username="DOM\\alice", mechanism="ntlm", **{"password": PASSWORD, **options})  # type: ignore[arg-type]
    client = SSPIChannel(client_stream, initiator)
    server = SSPIChannel(server_stream, Acceptor(accounts=AccountFile(account_file)))
    errors: list[BaseException] = []

    async def run(channel: SSPIChannel) -> None:
        try:
            await channel.do_handshake()
        except trio.BrokenResourceError as exc:
            errors.append(exc)
            await trio.aclose_forcefully(channel)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, client)
        nursery.start_soon(run, server)
    return client, server, errors


@pytest.mark.parametrize("raw", [False, True])
async def test_nothing_secret_is_logged_even_at_debug(
    account_file: Path, caplog: pytest.LogCaptureFixture, raw: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    client, server, errors = await handshake(account_file, raw=raw)
    assert not errors
    await client.send(b"hello")
    assert await server.receive() == b"hello"
    _, _, errors = await handshake(account_file, raw=raw, password=PASSWORD + "!")
    assert errors
    # An edit that breaks the file, in several ways, each with the secret in it.
    accounts = AccountFile(account_file)
    digest = nt_hash(PASSWORD).hex().upper()
    with account_file.open("a") as file:
        file.write(f"DOM:bob:{PASSWORD}:too:many\n")
        file.write(f"DOM\\carol:1:{'0' * 32}:{digest}:no brackets:LCT-0\n")
        file.write(f"DOM\\dave:1:{'0' * 32}:{digest}0:[U]:LCT-0\n")
    assert accounts.lookup("DOM", "alice") is not None
    assert "line 5: the NT hash" in caplog.text
    assert len(caplog.records) > 5
    assert_harmless(caplog.text)


async def test_no_repr_shows_a_secret(account_file: Path) -> None:
    client, server, _ = await handshake(account_file)
    talk = Client(user="alice", password=PASSWORD, session_key=SESSION_KEY)
    session = Session(Acceptor(accounts=AccountFile(account_file)), WireFormat.FRAMED)
    message = talk.negotiate()
    challenge = say(session, message)
    authenticate = read_authenticate(talk.authenticate(challenge))
    accounts = AccountFile(account_file)
    account = accounts.lookup("DOM", "alice")
    login = verify(
        authenticate,
        account,
        NTLMPolicy(require_mic=False),
        negotiate=message,
        challenge=response_token(challenge),
    )
    assert login.session_key == SESSION_KEY
    for thing in (
        client,
        server,
        client.peer,
        server.peer,
        client._session,
        client._session._context,
        server._session._context._handshake,
        Initiator(username="alice", password=PASSWORD, mechanism="ntlm"),
        Acceptor(accounts=accounts),
        accounts,
        account,
        authenticate,
        login,
        DemoAccount("DEMO\\guest", PASSWORD),
    ):
        assert_harmless(f"{thing!r} {thing}")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda token: token[:40],
        lambda token: token[:-3],
        lambda token: token.replace(b"a\0l\0i\0c\0e\0", b"\0\xd8" * 5),
        lambda token: b"NTLMSSP\0\x07" + token[9:],
        lambda token: b"\x60\x82" + token,
    ],
)
def test_no_traceback_shows_a_token(account_file: Path, spoil: Callable[[bytes], bytes]) -> None:
    session = Session(Acceptor(accounts=AccountFile(account_file)), WireFormat.FRAMED)
    client = Client(user="alice", password=PASSWORD, session_key=SESSION_KEY)
    with pytest.raises(AuthenticationError) as caught:
        say(session, spoil(client.authenticate(say(session, client.negotiate()))))
    assert_harmless("".join(traceback.format_exception(caught.value)))


async def test_no_traceback_of_a_refused_login_shows_a_password(account_file: Path) -> None:
    _, _, errors = await handshake(account_file, password=PASSWORD + "?")
    assert len(errors) == 2
    for error in errors:
        assert_harmless("".join(traceback.format_exception(error)))
