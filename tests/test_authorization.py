"""Who of the authenticated may come in: one table."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from triosspi import Acceptor, AuthenticationError, ConfigurationError, PeerIdentity
from triosspi.security.authorization import Authorization
from triosspi.security.identity import PAC, ContextFlag
from triosspi.security.ntlm.accounts import AccountTable

DOMAIN = "S-1-5-21-1-2-3"
USERS, ADMINS = f"{DOMAIN}-513", f"{DOMAIN}-512"


def peer(principal: str, *, groups: tuple[str, ...] | None = None) -> PeerIdentity:
    kerberos = "@" in principal
    name, domain = principal.rpartition("@")[::2] if kerberos else reversed(principal.rpartition("\\")[::2])
    return PeerIdentity(
        principal=principal,
        domain=domain,
        name=name,
        mechanism="kerberos" if kerberos else "ntlm",
        flags=ContextFlag.CONF,
        mutual=False,
        authenticated_at=datetime.now(UTC),
        pac=None if groups is None else PAC(account="x", domain="EX", sid=f"{DOMAIN}-1104", groups=frozenset(groups)),
    )


ALICE_MIT = peer("alice@MIT.TEST")
ALICE_AD = peer("alice@AD.TEST", groups=(USERS,))
ALICE_NTLM = peer("DOM\\alice")
NOBODYS_NTLM = peer("alice")


@pytest.mark.parametrize(
    ("who", "rules", "admitted"),
    [
        (ALICE_MIT, {}, True),
        # allow
        (ALICE_MIT, {"allow": ["alice@MIT.TEST"]}, True),
        (ALICE_MIT, {"allow": ["bob@MIT.TEST"]}, False),
        (ALICE_MIT, {"allow": []}, False),
        (ALICE_MIT, {"allow": ["alice"]}, False),
        (ALICE_MIT, {"allow": ["*@MIT.TEST"]}, True),
        (ALICE_MIT, {"allow": ["*@OTHER.TEST", "bob@MIT.TEST"]}, False),
        (ALICE_MIT, {"allow": ["MIT.TEST\\*"]}, False),
        (ALICE_NTLM, {"allow": ["DOM\\alice"]}, True),
        (ALICE_NTLM, {"allow": ["DOM\\*"]}, True),
        (ALICE_NTLM, {"allow": ["*@DOM"]}, False),
        (ALICE_NTLM, {"allow": ["alice"]}, False),
        (NOBODYS_NTLM, {"allow": ["alice"]}, True),
        (NOBODYS_NTLM, {"allow": ["DOM\\*"]}, False),
        (ALICE_AD, {"allow": [USERS]}, True),
        (ALICE_AD, {"allow": [f"{DOMAIN}-1104"]}, True),
        (ALICE_AD, {"allow": [ADMINS]}, False),
        (ALICE_MIT, {"allow": [USERS]}, False),
        # case
        (ALICE_MIT, {"allow": ["Alice@MIT.TEST"]}, False),
        (ALICE_AD, {"allow": ["ALICE@ad.test"]}, True),
        (ALICE_NTLM, {"allow": ["dom\\ALICE"]}, True),
        (ALICE_AD, {"allow": [USERS.lower()]}, True),
        # deny wins
        (ALICE_MIT, {"deny": ["alice@MIT.TEST"]}, False),
        (ALICE_MIT, {"deny": ["ALICE@mit.test"]}, False),
        (ALICE_MIT, {"deny": ["bob@MIT.TEST"]}, True),
        (ALICE_MIT, {"allow": ["alice@MIT.TEST"], "deny": ["*@MIT.TEST"]}, False),
        (ALICE_AD, {"allow": [USERS], "deny": [USERS]}, False),
        (ALICE_AD, {"deny": [ADMINS]}, True),
        (ALICE_MIT, {"deny": [ADMINS]}, False),
        (ALICE_NTLM, {"deny": [ADMINS]}, False),
        (ALICE_NTLM, {"allow": ["DOM\\alice"], "deny": ["DOM\\*"]}, False),
        # groups demanded
        (ALICE_AD, {"require_groups": [USERS]}, True),
        (ALICE_AD, {"require_groups": [USERS, ADMINS]}, False),
        (ALICE_MIT, {"require_groups": [USERS]}, False),
        (ALICE_NTLM, {"require_groups": [USERS]}, False),
        (ALICE_AD, {"require_groups": [USERS], "deny": ["alice@AD.TEST"]}, False),
    ],
)
def test_a_peer_is_admitted_by_the_rules(who: PeerIdentity, rules: dict[str, list[str]], admitted: bool) -> None:
    authorization = Authorization(**{name: frozenset(values) for name, values in rules.items()})
    if admitted:
        authorization.check(who)
    else:
        with pytest.raises(AuthenticationError, match="alice"):
            authorization.check(who)


@pytest.mark.parametrize("rule", ["", "*", "al*@R", "*@*", "**@R", "DOM\\al*"])
@pytest.mark.parametrize("kind", ["allow", "deny"])
def test_a_rule_that_means_nothing_is_refused_when_the_acceptor_is_made(kind: str, rule: str) -> None:
    with pytest.raises(ConfigurationError, match="no rule"):
        Acceptor(accounts=AccountTable(), **{kind: [rule]})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["spns", "allow", "deny", "require_groups", "target_names", "mechanisms"])
def test_one_name_where_a_collection_is_due_is_refused_when_the_acceptor_is_made(option: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{option} is a collection: write \['ntlm'\]"):
        Acceptor(accounts=AccountTable(), **{option: "ntlm"})  # type: ignore[arg-type]


@pytest.mark.parametrize("sid", ["Domain Users", "S-1", "513", "S-1-5-"])
def test_a_group_that_is_no_sid_is_refused_when_the_acceptor_is_made(sid: str) -> None:
    with pytest.raises(ConfigurationError, match="no SID"):
        Acceptor(accounts=AccountTable(), require_groups=[sid])
