"""What docs/environment.md says of the environment."""

from __future__ import annotations

import logging
import os
import re
import struct
from pathlib import Path

import pytest

from exposure import Secrets
from harness import PASSWORD, make_acceptor, make_initiator
from peers.kerberos import Kdc
from triosspi import Acceptor, AuthenticationError, Initiator
from triosspi.security.kerberos import gssapi as kerberos
from triosspi.security.ntlm import messages
from triosspi.security.ntlm.primitives import nt_hash

DOCUMENT = Path(__file__).parent.parent / "docs" / "environment.md"
_WEAK = 0x00000080  # NTLMSSP_NEGOTIATE_LM_KEY


def flags_of(negotiate: bytes) -> int:
    found: int = struct.unpack_from("<I", negotiate, negotiate.index(b"NTLMSSP\0\1") + 12)[0]
    return found


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "SPNEGO"])
@pytest.mark.parametrize("level", ["0", "1", "2", "3", "4", "5"])
def test_the_client_speaks_ntlmv2_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, level: str, raw: bool
) -> None:
    seen: list[messages.Authenticate] = []
    read = messages.read_authenticate
    monkeypatch.setattr(messages, "read_authenticate", lambda raw: seen.append(read(raw)) or read(raw))  # type: ignore[func-returns-value]
    monkeypatch.setenv("LM_COMPAT_LEVEL", level)
    client, server = make_initiator(raw=raw).new_context(), make_acceptor().new_context()
    first = token = client.step(None)
    while token:
        token = server.step(token)
        token = client.step(token) if token else b""
    assert server.established
    assert client.established
    assert os.environ["LM_COMPAT_LEVEL"] == level
    assert flags_of(first) & messages.NEGOTIATE_EXTENDED_SESSIONSECURITY
    assert not flags_of(first) & _WEAK
    (message,) = seen
    assert len(message.nt_response) > 24
    # Its response in the old field is of version 2 too, or none: with the server's time there is none.
    assert message.lm_response == bytes(24)


@pytest.mark.parametrize("level", ["6", "-1", "high"])
def test_a_level_that_is_none_sends_nothing(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setenv("LM_COMPAT_LEVEL", level)
    with pytest.raises(AuthenticationError):
        make_initiator().new_context().step(None)


def test_no_account_of_the_environment_is_used_for_ntlm(
    kdc: Kdc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = tmp_path / "users"
    users.write_text(f"DOM:alice:{PASSWORD}\n")
    monkeypatch.setenv("NTLM_USER_FILE", str(users))
    monkeypatch.setenv("KRB5CCNAME", f"FILE:{tmp_path / 'none'}")
    monkeypatch.delenv("KRB5_CLIENT_KTNAME", raising=False)
    secrets = Secrets(monkeypatch)
    with pytest.raises(AuthenticationError):
        Initiator(username="DOM\\alice").new_context().step(None)
    assert nt_hash(PASSWORD) not in secrets.raw


@pytest.fixture
def kdc(mit_kdc: Kdc, monkeypatch: pytest.MonkeyPatch) -> Kdc:
    for name, value in mit_kdc.environment.items():
        monkeypatch.setenv(name, value)
    return mit_kdc


def test_a_given_keytab_is_the_one_that_counts(kdc: Kdc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KRB5_KTNAME", "FILE:/nonexistent/keytab")
    Acceptor(keytab=kdc.services["aes256"].keytab)


@pytest.mark.parametrize(("name", "value"), [("KRB5RCACHENAME", "none:"), ("KRB5RCACHETYPE", "none")])
def test_a_replay_cache_that_is_turned_off_is_told(
    kdc: Kdc, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        kerberos.acceptor_credential(kdc.services["aes256"].keytab)
    assert "replay cache off" in caplog.text


def test_every_variable_that_pyspnego_reads_is_decided() -> None:
    import spnego

    package = Path(spnego.__file__).parent
    read = {
        name
        for path in package.glob("*.py")
        for name in re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", path.read_text(encoding="utf-8"))
    }
    assert len(read) >= 3
    text = DOCUMENT.read_text(encoding="utf-8")
    assert not [name for name in read - {"TESTING"} if f"`{name}`" not in text]
