"""Which local account a peer becomes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from triosspi import AccountMap, ConfigurationError, ContextFlag, ImpersonationError, LocalAccount, PeerIdentity
from triosspi.impersonation import accounts as accounts_module
from triosspi.impersonation import auth_to_local as auth_to_local_module
from triosspi.impersonation.auth_to_local import auth_to_local
from triosspi.security.identity import PAC

if os.name != "posix":
    pytest.skip("Windows has no map", allow_module_level=True)

UIDS = {"root": 0, "daemon": 1, "system": 999, "alice": 1000, "bob": 1001, "visitor": 4000, "ALICE": 1500}


def ntlm(principal: str) -> PeerIdentity:
    domain, _, name = principal.rpartition("\\")
    return peer("ntlm", principal, domain, name)


def kerberos(principal: str, *, pac: bool = False) -> PeerIdentity:
    name, _, realm = principal.rpartition("@")
    found = PAC(account=name, domain="X", sid="S-1-5-21-1-2-3-1104", groups=frozenset()) if pac else None
    return peer("kerberos", principal, realm, name, found)


def peer(mechanism: str, principal: str, domain: str, name: str, pac: PAC | None = None) -> PeerIdentity:
    return PeerIdentity(
        principal=principal,
        domain=domain,
        name=name,
        mechanism=mechanism,
        flags=ContextFlag(0),
        mutual=False,
        authenticated_at=datetime.now(UTC),
        pac=pac,
    )


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the system; it knows the accounts above."""
    asked: list[str] = []

    def lookup(name: str) -> LocalAccount:
        asked.append(name)
        if name not in UIDS:
            raise ImpersonationError(f"there is no local account {name!r}")
        return LocalAccount(name, UIDS[name], UIDS[name], (UIDS[name],))

    monkeypatch.setattr(LocalAccount, "lookup", lookup)
    return asked


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, lookups: list[str]) -> Write:
    def write(*lines: str) -> Path:
        path = tmp_path / "map"
        path.write_text("\n".join(lines), encoding="utf-8")
        path.chmod(0o644)
        return path

    return write


def refused(found: AccountMap, who: PeerIdentity) -> str:
    with pytest.raises(ImpersonationError) as caught:
        found.lookup(who)
    return str(caught.value)


# Lines


def test_the_first_line_that_matches_decides(write: Write) -> None:
    found = AccountMap(
        write(
            "# who is whom",
            "",
            "alice@EXAMPLE.COM\talice",
            "bob@EXAMPLE.COM -   # has left",
            "*@EXAMPLE.COM visitor",
            "bob@EXAMPLE.COM bob",
            "  DOM\\bob    bob  ",
            '"DOM\\Bob Smith" bob\r',
            "DOM\\* *",
            "carol alice",
        )
    )
    assert found.lookup(kerberos("alice@EXAMPLE.COM")).name == "alice"
    assert found.lookup(kerberos("carol@EXAMPLE.COM")).name == "visitor"
    assert refused(found, kerberos("bob@EXAMPLE.COM")).startswith("'bob@EXAMPLE.COM' is nobody here (")
    assert found.lookup(ntlm("DOM\\bob")).name == "bob"
    assert found.lookup(ntlm("DOM\\Bob Smith")).name == "bob"
    assert found.lookup(ntlm("DOM\\alice")).name == "alice"
    assert found.lookup(ntlm("carol")).name == "alice"
    assert refused(found, ntlm("DOM\\mallory")) == "there is no local account 'mallory'"
    assert {account.name for account in found.named} == {"alice", "visitor", "bob"}


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("alice@EXAMPLE.COM", "write a principal or pattern, then a local account, such as"),
        ("alice@EXAMPLE.COM alice bob", "write a principal or pattern"),
        ("Bob Smith@EXAMPLE.COM bob", "write a principal or pattern"),
        ('"Bob Smith bob', "write a principal or pattern"),
        ("alice@EXAMPLE.COM: alice", "there is no local account"),
        ("* visitor", "is no rule: write a principal, '*@REALM', 'DOM\\*'"),
        ("*@ visitor", "is no rule"),
        ("\\* visitor", "is no rule"),
        ("a*@EXAMPLE.COM visitor", "is no rule"),
        ("*@*.COM visitor", "is no rule"),
        ("*\\alice visitor", "is no rule"),
        ("*@*\\* visitor", "is no rule"),
        ("@EXAMPLE.COM visitor", "is no rule"),
        ("alice@ visitor", "is no rule"),
        ("DOM\\ visitor", "is no rule"),
        ("S-1-5-21-1-2-3-1104 alice", "a SID"),
        ("alice@EXAMPLE.COM *", "'*' as local account is for a pattern's own '*', and stands alone"),
        ("*@EXAMPLE.COM ad-*", "'*' as local account"),
        ("alice@EXAMPLE.COM mallory", "there is no local account 'mallory'"),
        ("*@EXAMPLE.COM root", "uids below 1000 are only for principals that a line names"),
        ("DOM\\* system", "uids below 1000 are only for principals that a line names"),
    ],
)
def test_a_line_that_means_nothing_is_an_error_with_its_number(write: Write, line: str, fragment: str) -> None:
    path = write("# first", "bob@EXAMPLE.COM bob", line if "EXAMPLE.COM:" not in line else "alice@EXAMPLE.COM mallory:")
    with pytest.raises(ConfigurationError) as caught:
        AccountMap(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:3: ")
    assert fragment in text
    assert "\n" not in text


@pytest.mark.parametrize("lines", [[], ["", "# nobody"]])
def test_a_file_that_maps_nobody_is_an_error(write: Write, lines: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="no line maps anybody"):
        AccountMap(write(*lines))


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read the account map .*: No such file"):
        AccountMap(tmp_path / "map")
    (tmp_path / "map").write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match="is not UTF-8 text"):
        AccountMap(tmp_path / "map")


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_may_write_is_an_error(write: Write, mode: int) -> None:
    path = write("DOM\\alice alice")
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match="others than root and this server may write it: chmod 644"):
        AccountMap(path)


def test_a_file_of_somebody_else_is_an_error(root: None, write: Write) -> None:
    path = write("DOM\\alice alice")
    os.chown(path, 4000, 0)
    with pytest.raises(ConfigurationError, match="others than root and this server may write it"):
        AccountMap(path)


def test_without_a_file_and_without_auth_to_local_nobody_could_be_impersonated() -> None:
    with pytest.raises(ConfigurationError, match="give an account map, auth_to_local or both"):
        AccountMap(None)
    with pytest.raises(ConfigurationError, match="min_uid is -1"):
        AccountMap(None, auth_to_local=True, min_uid=-1)


def test_the_map_that_the_readme_shows_means_what_it_says(write: Write) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```text\n(# principal or pattern.*?)```", readme, re.DOTALL)
    found = AccountMap(write(*shown.splitlines()))
    assert found.lookup(kerberos("alice@EXAMPLE.COM")).name == "alice"
    assert found.lookup(kerberos("bob@EXAMPLE.COM")).name == "visitor"
    assert found.lookup(ntlm("DOM\\bob")).name == "bob"
    assert "is nobody here" in refused(found, ntlm("DOM\\guest"))
    assert refused(found, ntlm("OTHER\\bob")).endswith("has no local account")


# Who matches


def test_a_name_is_never_tried_without_its_domain(write: Write) -> None:
    """CVE-2020-25717: whoever can make accounts in a domain would be any local user, by that user's name."""
    found = AccountMap(write("alice alice", "alice@EXAMPLE.COM alice", "OTHER\\alice alice", "OTHER\\* *"))
    for who in (ntlm("DOM\\alice"), kerberos("alice@DOM"), ntlm("DOM\\root"), kerberos("root@EXAMPLE.COM")):
        assert refused(found, who).endswith("has no local account")
    # Nor the other way round: a name alone is not everybody's of that name.
    assert refused(AccountMap(write("DOM\\alice alice")), ntlm("alice")) == "'alice' has no local account"


def test_a_pattern_is_for_its_mechanism_and_its_whole_domain(write: Write) -> None:
    found = AccountMap(write("DOM\\* visitor", "*@EXAMPLE.COM visitor"))
    assert found.lookup(ntlm("DOM\\x")).name == "visitor"
    assert found.lookup(kerberos("x@EXAMPLE.COM")).name == "visitor"
    for who in (
        ntlm("x@EXAMPLE.COM"),
        kerberos("x@DOM"),
        ntlm("DOM2\\x"),
        ntlm("SUB.DOM\\x"),
        kerberos("x@SUB.EXAMPLE.COM"),
        kerberos("x@EXAMPLE.COM.EVIL"),
    ):
        assert refused(found, who).endswith("has no local account")


def test_case_counts_where_it_makes_another_account(write: Write) -> None:
    found = AccountMap(write("DOM\\alice alice", "alice@EXAMPLE.COM alice"))
    assert found.lookup(ntlm("dom\\ALICE")).name == "alice"
    # To Active Directory they are one, to an MIT KDC two.
    assert found.lookup(kerberos("Alice@EXAMPLE.COM", pac=True)).name == "alice"
    assert refused(found, kerberos("Alice@EXAMPLE.COM")).endswith("has no local account")
    # What has been found for one is not remembered for the other.
    assert found.cached(kerberos("Alice@EXAMPLE.COM", pac=True)) is not None
    assert found.cached(kerberos("Alice@EXAMPLE.COM")) is None


@pytest.mark.parametrize(
    "name",
    ["../alice", "host/server", ".", "-alice", "a b", "al\\@ice", "alice\n", "alice:x", "", "alice,bob", "$", "a\0b"],
)
def test_a_name_that_no_account_could_have_is_not_even_looked_up(write: Write, lookups: list[str], name: str) -> None:
    found = AccountMap(write("*@EXAMPLE.COM *"))
    lookups.clear()
    text = refused(found, kerberos(f"{name}@EXAMPLE.COM"))
    assert "has no name that a local account could have" in text
    assert "\n" not in text and "\0" not in text
    assert lookups == []


# Whom nobody becomes


@pytest.mark.parametrize("name", ["root", "daemon", "system"])
def test_a_pattern_gives_nobody_root_or_a_system_account(write: Write, name: str) -> None:
    found = AccountMap(write("*@EXAMPLE.COM *"))
    uid = UIDS[name]
    assert refused(found, kerberos(f"{name}@EXAMPLE.COM")) == (
        f"the local account {name!r} has the uid {uid}, and uids below 1000 are only for principals that a line names"
    )
    # A line that names the principal means it.
    found = AccountMap(write(f"{name}@EXAMPLE.COM {name}", "*@EXAMPLE.COM *"))
    assert found.lookup(kerberos(f"{name}@EXAMPLE.COM")).uid == uid


def test_the_floor_can_be_moved_but_never_below_root(write: Write) -> None:
    path = write("*@EXAMPLE.COM *")
    found = AccountMap(path, min_uid=0)
    assert found.lookup(kerberos("daemon@EXAMPLE.COM")).uid == 1
    assert "uids below 1 are only" in refused(found, kerberos("root@EXAMPLE.COM"))
    found = AccountMap(path, min_uid=1001)
    assert "uids below 1001 are only" in refused(found, kerberos("alice@EXAMPLE.COM"))
    assert found.lookup(kerberos("bob@EXAMPLE.COM")).uid == 1001


# What is remembered


def test_an_account_is_looked_up_once_a_minute(
    write: Write, lookups: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(accounts_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    found = AccountMap(write("*@EXAMPLE.COM *"))
    alice = kerberos("alice@EXAMPLE.COM")
    assert found.cached(alice) is None
    account = found.lookup(alice)
    clock.now += 59.9
    assert found.cached(alice) is account
    assert found.cached(kerberos("bob@EXAMPLE.COM")) is None
    clock.now += 0.2
    assert found.cached(alice) is None
    assert lookups == ["alice"]
    # A refusal is not remembered: the next look-up asks again, since there may be an account by then.
    refused(found, kerberos("carol@EXAMPLE.COM"))
    monkeypatch.setitem(UIDS, "carol", 2000)
    assert found.lookup(kerberos("carol@EXAMPLE.COM")).uid == 2000


def test_what_is_remembered_has_a_limit(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts_module, "_CACHE_SIZE", 3)
    found = AccountMap(write("*@EXAMPLE.COM visitor"))
    for number in range(10):
        found.lookup(kerberos(f"u{number}@EXAMPLE.COM"))
        assert found.cached(kerberos(f"u{number}@EXAMPLE.COM")) is not None
        assert len(found._cache) <= 3


# The system's accounts


def test_an_account_is_what_the_system_says(root: None) -> None:
    found = LocalAccount.lookup("root")
    assert (found.name, found.uid, found.gid) == ("root", 0, 0)
    assert 0 in found.groups


@pytest.mark.parametrize("name", ["nobody-is-called-so", "", "a\0b", "\udcff"])
def test_an_account_that_there_is_not_is_an_error(name: str) -> None:
    with pytest.raises(ImpersonationError, match="there is no local account"):
        LocalAccount.lookup(name)


def test_a_directory_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(110, "Connection timed out")

    monkeypatch.setattr(os, "getgrouplist", broken)
    with pytest.raises(ImpersonationError, match=r"'root' was not found: Connection timed out"):
        LocalAccount.lookup("root")


# auth_to_local

KRB5_CONF = """
[libdefaults]
    default_realm = EXAMPLE.COM
    dns_lookup_kdc = false
    dns_lookup_realm = false
[realms]
    EXAMPLE.COM = {
        auth_to_local = RULE:[1:$1@$0](^old-.*@EXAMPLE\\.COM$)s/@.*//s/^old-//
        auth_to_local = RULE:[2:$2.$1](^admin\\..*)s/^admin\\.//
        auth_to_local = DEFAULT
    }
"""


@pytest.fixture
def krb5_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "krb5.conf"
    path.write_text(KRB5_CONF)
    monkeypatch.setenv("KRB5_CONFIG", str(path))
    try:
        auth_to_local_module.check_auth_to_local()
    except ConfigurationError as exc:
        pytest.skip(str(exc))


@pytest.mark.parametrize(
    ("principal", "name"),
    [
        ("alice@EXAMPLE.COM", "alice"),
        ("old-alice@EXAMPLE.COM", "alice"),
        ("bob/admin@EXAMPLE.COM", "bob"),
        ("root@EXAMPLE.COM", "root"),
        ("host/server@EXAMPLE.COM", None),
        ("alice@OTHER.COM", None),
        # Quoted for display, or never text: read back it could be somebody else.
        ("al\\ice@EXAMPLE.COM", None),
        ("alice\\xff@EXAMPLE.COM", None),
        ("alice\n@EXAMPLE.COM", None),
    ],
)
def test_the_rules_of_krb5_conf_say_who_a_principal_is(krb5_conf: None, principal: str, name: str | None) -> None:
    assert auth_to_local(principal) == name


def test_a_principal_that_the_library_cannot_read_is_an_error(krb5_conf: None) -> None:
    with pytest.raises(ImpersonationError, match="auth_to_local: 'a@B@C': "):
        auth_to_local("a@B@C")


def test_a_krb5_conf_that_cannot_be_read_is_an_error(
    krb5_conf: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "krb5.conf").write_text("[realms\n")
    with pytest.raises(ImpersonationError, match=r"auth_to_local: no Kerberos context, error -\d+"):
        auth_to_local("alice@EXAMPLE.COM")


def test_auth_to_local_is_asked_only_where_no_line_decides(krb5_conf: None, write: Write, lookups: list[str]) -> None:
    found = AccountMap(write("bob@EXAMPLE.COM -", "old-alice@EXAMPLE.COM bob"), auth_to_local=True)
    assert found.lookup(kerberos("old-alice@EXAMPLE.COM")).name == "bob"
    assert found.lookup(kerberos("alice@EXAMPLE.COM")).name == "alice"
    assert "is nobody here" in refused(found, kerberos("bob@EXAMPLE.COM"))
    assert refused(found, kerberos("host/x@EXAMPLE.COM")) == "'host/x@EXAMPLE.COM' has no local account"
    # Nobody is root by a rule.
    assert "has the uid 0" in refused(found, kerberos("root@EXAMPLE.COM"))
    # And only Kerberos's principals are asked about.
    assert refused(found, ntlm("alice@EXAMPLE.COM")).endswith("has no local account")
    assert refused(found, ntlm("EXAMPLE.COM\\alice")).endswith("has no local account")


def test_auth_to_local_is_not_asked_unless_wanted(krb5_conf: None, write: Write) -> None:
    assert refused(AccountMap(write("x@Y alice")), kerberos("alice@EXAMPLE.COM")).endswith("has no local account")
    assert AccountMap(None, auth_to_local=True).lookup(kerberos("alice@EXAMPLE.COM")).name == "alice"


def test_without_the_library_auth_to_local_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise OSError("libkrb5.so.3: cannot open shared object file")

    monkeypatch.setattr(auth_to_local_module, "_library", missing)
    with pytest.raises(ConfigurationError, match=r"auth_to_local needs MIT Kerberos's library libkrb5\.so\.3"):
        AccountMap(None, auth_to_local=True)
