"""What the system's own SSPI cannot be told is an error when it is asked for, and not an option that does nothing."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from triosspi import Acceptor, ConfigurationError, Initiator
from triosspi.security import credentials
from triosspi.security.ntlm.accounts import AccountTable
from triosspi.service.config import assembly, configuration
from triosspi.service.config.settings import Accept


@pytest.fixture(autouse=True)
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_WINDOWS", True)
    monkeypatch.setattr(assembly, "_WINDOWS", True)
    monkeypatch.setattr(configuration, "_WINDOWS", True)


REFUSED: list[tuple[type[Any], dict[str, Any], str]] = [
    (Acceptor, {"accounts": AccountTable()}, "leave out accounts"),
    (Acceptor, {"keytab": "FILE:/etc/krb5.keytab"}, "leave out keytab"),
    (Acceptor, {"spns": ["host/server"]}, "leave out spns"),
    (Acceptor, {"allow_rc4": True}, "leave out allow_rc4"),
    (Acceptor, {"require_groups": ["S-1-5-32-544"]}, "leave out require_groups"),
    (Acceptor, {"require_mic": False}, "leave out require_mic"),
    (Acceptor, {"target_names": ["host/server"]}, "leave out target_names"),
    (Acceptor, {"target_names": ["host/server"], "require_target": "require"}, "target_names, require_target"),
    (Acceptor, {"allow": ["S-1-5-32-544"]}, "leave SIDs out"),
    (Acceptor, {"deny": ["DOM\\bob", "S-1-5-32-544"]}, "leave SIDs out"),
    (Initiator, {"ccache": "FILE:cache"}, "leave out ccache"),
    (Initiator, {"keytab": "client.keytab"}, "leave out keytab"),
    (Initiator, {"allow_rc4": True}, "leave out allow_rc4"),
]


@pytest.mark.parametrize(("kind", "options", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_windows_cannot_enforce_is_an_error_when_it_is_made(
    kind: type[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        kind(**options)


ENFORCED = {
    Acceptor: {
        "allow": ["DOM\\alice"],
        "deny": ["DOM\\*"],
        "mechanisms": ("kerberos",),
        "allow_raw": False,
        "channel_bindings": b"tls-server-end-point:" + bytes(32),
    },
    Initiator: {
        "username": "DOM\\alice",
        "password": "secret",
        "target": "host/server",
        "mechanism": "negotiate",
        "raw": False,
        "channel_bindings": b"tls-server-end-point:" + bytes(32),
    },
}


@pytest.mark.parametrize("kind", ENFORCED, ids=lambda kind: kind.__name__)
def test_every_option_is_enforced_there_or_refused(kind: type[Any]) -> None:
    kind(**ENFORCED[kind])
    refused = {name for each, options, _ in REFUSED if each is kind for name in options}
    assert set(inspect.signature(kind).parameters) - {"usage"} == set(ENFORCED[kind]) | refused


def test_the_defaults_of_the_service_are_none_of_these() -> None:
    assert assembly.make_acceptor(Accept()) == Acceptor()
    with pytest.raises(ConfigurationError, match="require_mic"):
        assembly.make_acceptor(Accept(allow_missing_mic=True))


@pytest.mark.parametrize("mechanisms", ["negotiate", "kerberos", "ntlm"])
def test_a_keytab_of_the_service_is_an_error_as_the_librarys_is(mechanisms: Any) -> None:
    # It was left out without a word: somebody had set it in the belief that it counts.
    with pytest.raises(ConfigurationError, match="leave out keytab"):
        assembly.make_acceptor(Accept(keytab="FILE:/etc/krb5.keytab", mechanisms=mechanisms))


def test_a_keytab_that_other_programs_look_at_is_not_the_services() -> None:
    loaded = configuration.Sources(environ={"KRB5_KTNAME": "FILE:/etc/krb5.keytab"}).load()
    assert loaded.settings.accept.keytab is None
    assert assembly.make_acceptor(loaded.settings.accept) == Acceptor()
    loaded = configuration.Sources(environ={"TRIOSSPI_KEYTAB": "FILE:/etc/krb5.keytab"}).load()
    with pytest.raises(ConfigurationError, match="leave out keytab"):
        assembly.make_acceptor(loaded.settings.accept)
