"""What a rule means where it gives something, and where it takes something: one table, for both of its users."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from triosspi import AccountMap, AuthenticationError, ConfigurationError, ImpersonationError, PeerIdentity
from triosspi.security.authorization import Authorization
from triosspi.security.identity import PAC, ContextFlag
from triosspi.security.rules import Rule


def peer(mechanism: str, principal: str, domain: str, name: str, *, pac: bool = False) -> PeerIdentity:
    return PeerIdentity(
        principal=principal,
        domain=domain,
        name=name,
        mechanism=mechanism,
        flags=ContextFlag(0),
        mutual=False,
        authenticated_at=datetime.now(UTC),
        pac=PAC(account=name, domain="EX", sid="S-1-5-21-1-2-3-500", groups=frozenset()) if pac else None,
    )


TICKET = peer("kerberos", "admin@EX.TEST", "EX.TEST", "admin")
TICKET_AD = peer("kerberos", "admin@EX.TEST", "EX.TEST", "admin", pac=True)
# An NTLM account whose name looks like a Kerberos principal: in no domain, and in one.
LOOKALIKE = peer("ntlm", "admin@EX.TEST", "", "admin@EX.TEST")
LOOKALIKE_IN_DOM = peer("ntlm", "DOM\\admin@EX.TEST", "DOM", "admin@EX.TEST")
DOM_ADMIN = peer("ntlm", "DOM\\admin", "DOM", "admin")
BARE = peer("ntlm", "admin", "", "admin")
# Windows says so of whoever has a ticket.
WINDOWS_TICKET = peer("kerberos", "DOM\\admin", "DOM", "admin")
WINDOWS_UNKNOWN = peer("unknown", "DOM\\admin", "DOM", "admin")

EVERYBODY = [TICKET, TICKET_AD, LOOKALIKE, LOOKALIKE_IN_DOM, DOM_ADMIN, BARE, WINDOWS_TICKET, WINDOWS_UNKNOWN]
LOOKALIKES = [LOOKALIKE, LOOKALIKE_IN_DOM]

# A rule, whom it lets in, and whom it keeps out.
TABLE: list[tuple[str, list[PeerIdentity], list[PeerIdentity]]] = [
    ("admin@EX.TEST", [TICKET, TICKET_AD], [TICKET, TICKET_AD, *LOOKALIKES]),
    ("*@EX.TEST", [TICKET, TICKET_AD], [TICKET, TICKET_AD, *LOOKALIKES]),
    ("ADMIN@ex.test", [TICKET_AD], [TICKET, TICKET_AD, *LOOKALIKES]),
    ("kerberos:admin@EX.TEST", [TICKET, TICKET_AD], [TICKET, TICKET_AD]),
    ("Kerberos:*@EX.TEST", [TICKET, TICKET_AD], [TICKET, TICKET_AD]),
    ("ntlm:admin@EX.TEST", [LOOKALIKE], LOOKALIKES),
    ("ntlm:*@EX.TEST", [LOOKALIKE], LOOKALIKES),
    ("ntlm:ADMIN@EX.TEST", [LOOKALIKE], LOOKALIKES),
    ("DOM\\admin@EX.TEST", [LOOKALIKE_IN_DOM], [LOOKALIKE_IN_DOM]),
    ("DOM\\admin", [DOM_ADMIN, WINDOWS_TICKET, WINDOWS_UNKNOWN], [DOM_ADMIN, WINDOWS_TICKET, WINDOWS_UNKNOWN]),
    (
        "DOM\\*",
        [DOM_ADMIN, LOOKALIKE_IN_DOM, WINDOWS_TICKET, WINDOWS_UNKNOWN],
        [DOM_ADMIN, LOOKALIKE_IN_DOM, WINDOWS_TICKET, WINDOWS_UNKNOWN],
    ),
    ("dom\\ADMIN", [DOM_ADMIN], [DOM_ADMIN, WINDOWS_TICKET, WINDOWS_UNKNOWN]),
    ("kerberos:DOM\\admin", [WINDOWS_TICKET], [WINDOWS_TICKET, WINDOWS_UNKNOWN]),
    ("ntlm:DOM\\*", [DOM_ADMIN, LOOKALIKE_IN_DOM], [DOM_ADMIN, LOOKALIKE_IN_DOM, WINDOWS_UNKNOWN]),
    ("admin", [BARE], [BARE]),
    ("ntlm:admin", [BARE], [BARE]),
    ("kerberos:admin", [], []),
    ("S-1-5-21-1-2-3-500", [TICKET_AD], [TICKET_AD]),
]
each_rule = pytest.mark.parametrize(("rule", "given", "taken"), TABLE, ids=[row[0] for row in TABLE])


def is_admitted(who: PeerIdentity, authorization: Authorization) -> bool:
    try:
        authorization.check(who)
    except AuthenticationError:
        return False
    return True


@each_rule
def test_to_let_in_a_rule_is_read_narrowly(rule: str, given: list[PeerIdentity], taken: list[PeerIdentity]) -> None:
    for who in EVERYBODY:
        assert Rule.parse(rule).gives(who) is (who in given), who
        assert is_admitted(who, Authorization(allow=frozenset([rule]))) is (who in given), who
    assert all(who in taken for who in given)


@each_rule
def test_to_keep_out_a_rule_is_read_widely(rule: str, given: list[PeerIdentity], taken: list[PeerIdentity]) -> None:
    for who in EVERYBODY:
        assert Rule.parse(rule).takes(who) is (who in taken), who
        # A denied SID keeps out whoever shows none.
        kept_out = who in taken or (rule.startswith("S-1-") and who.pac is None)
        assert is_admitted(who, Authorization(deny=frozenset([rule]))) is not kept_out, who


@each_rule
def test_the_account_map_gives_accounts_narrowly_and_takes_them_widely(
    tmp_path: Path, rule: str, given: list[PeerIdentity], taken: list[PeerIdentity]
) -> None:
    if rule.startswith("S-1-"):
        with pytest.raises(ConfigurationError, match="a SID"):
            AccountMap(written(tmp_path, f"{rule} -\n"))
        return
    gives = AccountMap(written(tmp_path, f'"{rule}" nobody\n'), min_uid=1)
    for who in EVERYBODY:
        assert has_account(gives, who) is (who in given), who
    # Everybody else is somebody by the lines behind it, however they log in.
    rest = "\n".join(f'"{each}" nobody' for each in ("*@EX.TEST", "ntlm:*@EX.TEST", "DOM\\*", "admin"))
    takes = AccountMap(written(tmp_path, f'"{rule}" -\n{rest}\n'), min_uid=1)
    for who in EVERYBODY:
        assert has_account(takes, who) is (who not in taken), who


def written(folder: Path, text: str) -> Path:
    path = folder / "map"
    path.write_text(text)
    path.chmod(0o600)
    return path


def has_account(accounts: AccountMap, who: PeerIdentity) -> bool:
    try:
        accounts.lookup(who)
    except ImpersonationError:
        return False
    return True


@pytest.mark.parametrize(
    "text",
    [
        *("", "*", "*@", "\\*", "a*@EX.TEST", "@EX.TEST", "alice@", "DOM\\"),
        *(
            " alice@EX.TEST",
            "DOM\\alice ",
            "kerberos: alice@EX.TEST",
            "kerberos:",
            "ntlm:*",
            "spnego:alice@EX.TEST",
            "ntlm:S-1-5-21-1-2-3-500",
        ),
    ],
)
def test_what_means_nothing_is_an_error_and_not_a_rule_that_matches_nobody(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is no rule"):
        Rule.parse(text)


def test_a_service_with_a_port_in_its_name_is_no_mechanism() -> None:
    assert Rule.parse("MSSQLSvc/host:1433@EX.TEST") == Rule("MSSQLSvc/host:1433@EX.TEST")
