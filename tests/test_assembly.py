"""What is made of the settings: the demo account, the acceptor, the application."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from test_configuration import load
from triosspi import AccountFile, ConfigurationError
from triosspi.service import account_editor
from triosspi.service.apps import SAMPLE_MESSAGE, Greet, echo
from triosspi.service.config.assembly import (
    DemoAccount,
    app_name,
    choose_app,
    make_acceptor,
    make_account_map,
    make_impersonation,
    needs_demo_account,
)
from triosspi.service.config.options import OptionError
from triosspi.service.config.settings import Accept, Impersonate, LocalAccounts, Serve, Settings


def test_every_run_has_a_demo_account_with_a_password_of_its_own() -> None:
    accounts = [DemoAccount.make() for _ in range(10)]
    assert len({account.password for account in accounts}) == 10
    # 96 bits in base64.
    assert all(len(account.password) == 16 for account in accounts)
    assert all(account.password not in repr(account) for account in accounts)


def test_the_demo_account_alone_can_log_in() -> None:
    table = DemoAccount("DEMO\\guest", "password").table()
    assert len(table) == 1
    account = table.lookup("demo", "GUEST")
    assert account is not None
    assert account.nt_hash.hex() == "8846f7eaee8fb117ad06bdd830b7586c"
    assert table.lookup("OTHER", "guest") is None


@pytest.fixture
def accounts(tmp_path: Path) -> Path:
    account_editor.add(tmp_path / "accounts", "DOM\\alice", "secret")
    return tmp_path / "accounts"


@pytest.mark.parametrize(
    ("settings", "demo"),
    [
        ({}, True),
        ({"mechanisms": "ntlm"}, True),
        ({"mechanisms": "ntlm", "keytab": "k"}, True),
        ({"mechanisms": "kerberos"}, False),
        ({"keytab": "k"}, False),
        ({"accounts": Path("a")}, False),
        ({"accounts": Path("a"), "mechanisms": "ntlm"}, False),
    ],
)
def test_a_demo_account_is_needed_where_nobody_else_could_log_in(settings: dict[str, Any], demo: bool) -> None:
    assert needs_demo_account(Accept(**settings)) is demo


def test_an_acceptor_is_made_of_the_settings_and_made_again(accounts: Path) -> None:
    accept = Accept(
        accounts=accounts,
        mechanisms="ntlm",
        keytab="not looked at",
        allow_missing_mic=True,
        deny=("DOM\\bob",),
        allow=(),
        target_names=("host/x",),
        require_target="allow",
    )
    for _ in range(2):
        acceptor = make_acceptor(accept)
        assert isinstance(acceptor.accounts, AccountFile)
        assert acceptor.enabled == ("ntlm",)
        assert acceptor.keytab is None
        assert (acceptor.require_mic, acceptor.require_target) == (False, "allow")
        assert (acceptor.allow, acceptor.deny) == ((), ("DOM\\bob",))
    accounts.unlink()
    with pytest.raises(ConfigurationError, match="cannot read the account file"):
        make_acceptor(accept)
    # Those who have an acceptor keep it.
    assert acceptor.accounts is not None
    with pytest.raises(ConfigurationError, match="nobody could log in"):
        make_acceptor(Accept())


def test_the_application_follows_from_the_format_unless_it_is_named() -> None:
    assert isinstance(choose_app(Settings().start), Greet)
    assert choose_app(Settings(serve=Serve(wire="framed")).start) is echo
    assert choose_app(Settings(serve=Serve(app="echo")).start) is echo
    assert isinstance(choose_app(Settings(serve=Serve(app="greet", wire="framed")).start), Greet)
    assert [app_name(serve) for serve in (Serve(), Serve(wire="framed"), Serve(app="a:b"))] == ["greet", "echo", "a:b"]
    assert len(SAMPLE_MESSAGE) == 28


@pytest.mark.parametrize(
    ("settings", "option", "problem"),
    [
        (Settings(serve=Serve(app="echo", message="x")), "message", "is for the application 'greet'"),
        (Settings(serve=Serve(message="x" * 2029)), "message", "has 2029 bytes, and the sample's client reads 2028"),
        (
            Settings(serve=Serve(app="echo"), impersonation=Impersonate(impersonate=True)),
            "impersonate",
            "echo has no use for it",
        ),
    ],
)
def test_an_application_that_has_no_use_for_an_option_refuses_it(settings: Settings, option: str, problem: str) -> None:
    with pytest.raises(OptionError, match=problem) as caught:
        choose_app(settings.start)
    assert caught.value.option == option


def test_a_message_that_is_no_text_is_sent_as_the_bytes_it_was() -> None:
    app: Any = choose_app(Settings(serve=Serve(message=os.fsdecode(b"caf\xe9"))).start)
    assert app._message == b"caf\xe9"


def test_impersonation_is_off_unless_it_is_asked_for_and_needs_a_map() -> None:
    assert make_impersonation(Impersonate(), LocalAccounts(account_map=Path("/nowhere"))) is None
    assert make_account_map(Impersonate(), LocalAccounts()) is None
    with pytest.raises(OptionError, match="needs account_map, auth_to_local or both") as caught:
        make_impersonation(Impersonate(impersonate=True), LocalAccounts())
    flag = load(impersonate=True)
    assert flag.explain(caught.value) == "--impersonate needs --account-map, --auth-to-local or both"
    variable = load(None, None, {"TRIOSSPI_IMPERSONATE": "yes"})
    assert variable.explain(caught.value) == "TRIOSSPI_IMPERSONATE needs account_map, auth_to_local or both"
    assert load().explain(caught.value).startswith("impersonation.impersonate needs account_map")
    with pytest.raises(ConfigurationError, match="cannot read the account map /nowhere"):
        make_account_map(Impersonate(impersonate=True), LocalAccounts(account_map=Path("/nowhere")))
