"""The account that is made up for one run."""

from __future__ import annotations

from triosspi.service.demo import DemoAccount


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
