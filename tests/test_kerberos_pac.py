"""What a domain controller says of a client in its ticket, and who is admitted by that: Samba AD's KDC, our live server.

What a PAC may look like: ``test_pac.py``. What rules mean: ``test_authorization.py``.
"""

from __future__ import annotations

from typing import Any

import pytest

from peers import wire
from peers.kerberos import KERBEROS_PEERS, Kdc, KerberosPeerKind, Login
from peers.kerberos.fixtures import SambaKdc, join
from peers.kerberos.kinds import MIT_RAW, MIT_SPNEGO
from peers.kerberos.samba import DOMAIN
from peers.pyspnego_peer import PYSPNEGO_NTLM
from peers.requirements import require
from test_kerberos_peers import acceptor_for, assert_refused, greet, read_sample
from test_peers import MESSAGE, Server, accounts, in_thread, serving
from test_peers import read_sample as read_ntlm_sample
from triosspi import AuthenticationError, PeerIdentity, WireFormat
from triosspi.security.identity import PAC
from triosspi.security.kerberos import gssapi


@pytest.fixture
def samba(samba_kdc: SambaKdc, monkeypatch: pytest.MonkeyPatch) -> SambaKdc:
    """The domain, with this process in it."""
    require(MIT_RAW)
    join(samba_kdc, monkeypatch)
    return samba_kdc


@pytest.fixture
def mit(mit_kdc: Kdc, monkeypatch: pytest.MonkeyPatch) -> Kdc:
    """The realm without PACs, with this process in it."""
    require(MIT_RAW)
    join(mit_kdc, monkeypatch)
    return mit_kdc


async def admitted(kdc: Kdc, login: Login, peer: KerberosPeerKind = MIT_RAW, **rules: Any) -> PeerIdentity:
    """Log in and read the sample: as whom."""
    async with serving(acceptor_for(kdc, **rules), greet, WireFormat.SAMPLE) as server:
        assert (await in_thread(read_sample, peer, server, login)).plaintext == MESSAGE
    assert server.statistics.refused == 0
    return server.peers[-1]


async def refused(
    kdc: Kdc, login: Login, caplog: pytest.LogCaptureFixture, peer: KerberosPeerKind = MIT_RAW, **rules: Any
) -> str:
    """Log in and be refused, without a word: for what reason, as the log has it."""
    async with serving(acceptor_for(kdc, **rules), greet, WireFormat.SAMPLE) as server:
        await in_thread(assert_refused, peer, server, login)
        await server.wait_until_over()
    assert (server.peers, server.statistics.refused) == ([], 1)
    (line,) = (record.getMessage() for record in caplog.records if record.name == "triosspi.server")
    caplog.clear()
    return line.partition("login refused: ")[2]


# ---- what it says ----


def sids(kdc: SambaKdc, *names: str) -> set[str]:
    return {kdc.sids[name] for name in names}


@pytest.mark.parametrize("peer", [peer for peer in KERBEROS_PEERS if "samba" in peer.realms], ids=str)
async def test_whoever_logs_in_is_known_by_sid_and_by_groups_within_groups(
    samba: SambaKdc, peer: KerberosPeerKind
) -> None:
    require(peer)
    identity = await admitted(samba, samba.login(layout=peer.layouts[0]), peer)
    pac = identity.pac
    assert isinstance(pac, PAC)
    assert (pac.account, pac.domain, pac.sid) == ("alice", DOMAIN, samba.sids["alice"])
    # Alice is an engineer, engineers are staff, and staff are owners.
    assert pac.groups >= sids(samba, "engineers", "staff", "owners")
    assert f"{samba.sids['domain']}-513" in pac.groups  # Domain Users
    assert pac.sid not in pac.groups


@pytest.mark.parametrize("service", ["aes128", "aes256", "other"])
async def test_every_service_is_told_the_same(samba: SambaKdc, service: str) -> None:
    async with serving(acceptor_for(samba, service), greet, WireFormat.SAMPLE) as server:
        await in_thread(read_sample, MIT_SPNEGO, server, samba.login(service))
        await in_thread(read_sample, MIT_SPNEGO, server, samba.login(service, user="bob"))
    alice, bob = (identity.pac for identity in server.peers)
    assert alice is not None and bob is not None
    assert (alice.sid, bob.sid) == (samba.sids["alice"], samba.sids["bob"])
    assert alice.groups - bob.groups == sids(samba, "engineers", "staff", "owners")
    assert bob.groups < alice.groups


async def test_tickets_of_mits_kdc_say_nothing_of_the_kind(mit: Kdc) -> None:
    assert (await admitted(mit, mit.login())).pac is None


# ---- who comes in ----


@pytest.mark.parametrize("groups", [["engineers"], ["staff"], ["owners"], ["engineers", "staff", "owners"]])
async def test_of_required_groups_the_client_must_be_in_all(
    samba: SambaKdc, caplog: pytest.LogCaptureFixture, groups: list[str]
) -> None:
    required = [samba.sids[group] for group in groups]
    assert (await admitted(samba, samba.login(), require_groups=required)).name == "alice"
    reason = await refused(samba, samba.login(user="bob"), caplog, require_groups=required)
    assert reason == f"'bob@{samba.realm}' is not in {', '.join(sorted(required))}"
    # In one of them is not in all.
    absent = f"{samba.sids['domain']}-99999"
    reason = await refused(samba, samba.login(), caplog, require_groups=[*required, absent])
    assert reason == f"'alice@{samba.realm}' is not in {absent}"


@pytest.mark.parametrize(
    ("allow", "deny", "alice", "bob"),
    [
        (["alice"], [], True, False),
        (["engineers"], [], True, False),
        (["owners"], [], True, False),
        (["bob", "staff"], [], True, True),
        ([], [], False, False),
        (None, ["alice"], False, True),
        (None, ["staff"], False, True),
        (None, ["owners", "bob"], False, False),
        (["alice", "bob"], ["engineers"], False, True),
        (["engineers"], ["alice"], False, False),
        (["domain users"], ["bob"], True, False),
    ],
)
async def test_people_are_admitted_and_denied_by_sid(
    *,
    samba: SambaKdc,
    caplog: pytest.LogCaptureFixture,
    allow: list[str] | None,
    deny: list[str],
    alice: bool,
    bob: bool,
) -> None:
    known = {**samba.sids, "domain users": f"{samba.sids['domain']}-513"}
    rules: dict[str, Any] = {
        "allow": None if allow is None else [known[name] for name in allow],
        "deny": [known[name] for name in deny],
    }
    for user, comes_in in (("alice", alice), ("bob", bob)):
        if comes_in:
            assert (await admitted(samba, samba.login(user=user), **rules)).name == user
        else:
            reason = await refused(samba, samba.login(user=user), caplog, **rules)
            assert reason in (f"'{user}@{samba.realm}' is denied", f"'{user}@{samba.realm}' is not among those allowed")


async def test_the_domain_does_not_care_for_case_and_so_the_rules_do_not(samba: SambaKdc) -> None:
    assert (await admitted(samba, samba.login(), allow=[f"ALICE@{samba.realm.lower()}"])).name == "alice"


async def test_a_ticket_without_groups_is_refused_where_groups_are_demanded(
    mit: Kdc, caplog: pytest.LogCaptureFixture
) -> None:
    everyone = "S-1-1-0"
    assert await refused(mit, mit.login(), caplog, require_groups=[everyone]) == f"'alice@{mit.realm}' has no PAC"
    reason = await refused(mit, mit.login(), caplog, allow=[everyone])
    assert reason == f"'alice@{mit.realm}' is not among those allowed"


# ---- who has no PAC ----


async def test_a_client_of_the_domain_may_decline_its_pac_and_then_has_no_groups(
    samba: SambaKdc, caplog: pytest.LogCaptureFixture
) -> None:
    login = samba.login(pac=False)
    assert (await admitted(samba, login)).pac is None
    reason = await refused(samba, login, caplog, require_groups=[samba.sids["staff"]])
    assert reason == f"'alice@{samba.realm}' has no PAC"
    reason = await refused(samba, login, caplog, allow=[samba.sids["alice"]])
    assert reason == f"'alice@{samba.realm}' is not among those allowed"


@pytest.mark.parametrize("denied", ["bob", "domain users"])
async def test_nobody_escapes_being_denied_by_sid_by_declining_the_pac(
    samba: SambaKdc, caplog: pytest.LogCaptureFixture, denied: str
) -> None:
    """Whether a ticket has a PAC is the client's choice (KERB-PA-PAC-REQUEST), so its absence must not admit anybody."""
    sid = {**samba.sids, "domain users": f"{samba.sids['domain']}-513"}[denied]
    assert "denied" in await refused(samba, samba.login(user="bob"), caplog, deny=[sid])
    assert "has no PAC" in await refused(samba, samba.login(user="bob", pac=False), caplog, deny=[sid])


async def test_nobody_escapes_being_denied_by_sid_by_logging_in_with_ntlm(samba: SambaKdc) -> None:
    def try_it(server: Server) -> None:
        with pytest.raises(wire.Refused):
            read_ntlm_sample(PYSPNEGO_NTLM, server)

    acceptor = acceptor_for(samba, accounts=accounts(), deny=[samba.sids["alice"]])
    async with serving(acceptor, greet, WireFormat.SAMPLE) as server:
        await in_thread(try_it, server)
        await server.wait_until_over()
    assert (server.peers, server.statistics.refused) == ([], 1)


@pytest.fixture
def unreadable(samba: SambaKdc, monkeypatch: pytest.MonkeyPatch) -> SambaKdc:
    """The domain, whose PACs are of no form that we know."""

    def read(_data: bytes) -> PAC:
        raise AuthenticationError("the ticket's PAC ends too early")

    monkeypatch.setattr(gssapi, "read_logon_info", read)
    return samba


async def test_a_pac_that_cannot_be_read_is_ignored_with_a_warning(
    unreadable: SambaKdc, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await admitted(unreadable, unreadable.login())).pac is None
    (warning,) = (record for record in caplog.records if record.name == "triosspi.kerberos")
    assert (warning.levelname, warning.getMessage()) == (
        "WARNING",
        "Kerberos: the ticket's PAC ends too early; it is ignored",
    )


async def test_a_pac_that_cannot_be_read_is_refused_where_groups_are_demanded(
    unreadable: SambaKdc, caplog: pytest.LogCaptureFixture
) -> None:
    login = unreadable.login()
    reason = await refused(unreadable, login, caplog, require_groups=[unreadable.sids["staff"]])
    assert reason == f"'alice@{unreadable.realm}' has no PAC"
    reason = await refused(unreadable, login, caplog, allow=[unreadable.sids["alice"]])
    assert reason == f"'alice@{unreadable.realm}' is not among those allowed"


async def test_nobody_escapes_being_denied_by_sid_by_a_pac_that_cannot_be_read(
    unreadable: SambaKdc, caplog: pytest.LogCaptureFixture
) -> None:
    assert "has no PAC" in await refused(unreadable, unreadable.login(), caplog, deny=[unreadable.sids["alice"]])


async def test_whatever_our_reader_raises_is_one_refused_login(
    samba: SambaKdc, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug in there must not take the server along."""

    def read(_data: bytes) -> PAC:
        raise IndexError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(gssapi, "read_logon_info", read)
        assert "IndexError" in await refused(samba, samba.login(), caplog)
    assert (await admitted(samba, samba.login())).pac is not None
