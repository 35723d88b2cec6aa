"""The Kerberos peers among themselves: what a test of ours takes for granted of them. Nothing of triosspi is in here."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace

import pytest

from peers.base import PeerError
from peers.kerberos import (
    KERBEROS_ACCEPTORS,
    KERBEROS_PEERS,
    Kdc,
    KerberosAcceptorKind,
    KerberosPeerKind,
    Key,
    LineAcceptor,
    LineContext,
    Login,
    StepError,
    read_keytab,
    write_keytab,
)
from peers.kerberos.fixtures import MitKdc, SambaKdc, each_with_its_kdcs
from peers.kerberos.kinds import (
    DOTNET_KERBEROS_RAW,
    HEIMDAL_RAW,
    HEIMDAL_SPNEGO,
    MIT_RAW,
    MIT_SPNEGO,
    PYTHON_GSSAPI_RAW,
)
from peers.kerberos.samba import available as samba_available
from peers.requirements import require

# What a Windows trailer is in size, by enctype; RC4's has no defined layout.
TRAILERS = {17: 60, 18: 60, 19: 64, 20: 72, 23: None}
DELEGATE, MUTUAL, CONF = 1, 2, 16

by_acceptor = pytest.mark.parametrize("acceptor_kind", KERBEROS_ACCEPTORS, ids=str)


def acceptor_for(peer: KerberosPeerKind) -> KerberosAcceptorKind:
    """MIT's, of the peer's kind."""
    (found,) = (kind for kind in KERBEROS_ACCEPTORS if kind.name == f"mit-{'spnego' if peer.spnego else 'raw'}")
    return found


def shake(initiator: LineContext, acceptor: LineAcceptor) -> list[bytes]:
    """Log in; return all tokens."""
    tokens: list[bytes] = []
    answer = None
    for _ in range(10):
        token = initiator.step(answer)
        if token:
            tokens.append(token)
            answer = acceptor.step(token)
            if answer:
                tokens.append(answer)
        if initiator.complete and acceptor.complete:
            return tokens
        if not token or (not answer and not initiator.complete):
            break
    raise PeerError("they talk past each other")


@contextmanager
def logged_in(peer: KerberosPeerKind, login: Login, kdc: Kdc) -> Iterator[tuple[LineContext, LineAcceptor]]:
    """Initiator and acceptor, who have shaken hands."""
    with ExitStack() as stack:

        def attempt(initiator: LineContext) -> LineAcceptor:
            acceptor = stack.enter_context(closing(acceptor_for(peer).new(kdc, layout=login.layout)))
            shake(initiator, acceptor)
            return acceptor

        yield stack.enter_context(peer.logged_in(login, attempt))


def assert_seals(initiator: LineContext, acceptor: LineContext) -> None:
    for size in (0, 1, 15, 16, 17, 4096, 70_000):
        message = os.urandom(size)
        assert acceptor.open(*initiator.seal(message)) == message
        assert initiator.open(*acceptor.seal(message)) == message


@each_with_its_kdcs()
def test_every_initiator_logs_in_and_seals_both_ways(peer: KerberosPeerKind, kdc: Kdc) -> None:
    require(peer)
    for layout in peer.layouts:
        with logged_in(peer, kdc.login("aes256", layout=layout), kdc) as (initiator, acceptor):
            assert acceptor.client == f"alice@{kdc.realm}"
            assert acceptor.info().target == kdc.services["aes256"].principal
            assert acceptor.info().flags & (MUTUAL | CONF) == MUTUAL | CONF
            assert_seals(initiator, acceptor)


@by_acceptor
def test_every_acceptor_accepts_and_seals_both_ways(acceptor_kind: KerberosAcceptorKind, mit_kdc: MitKdc) -> None:
    peer = MIT_SPNEGO if acceptor_kind.spnego else MIT_RAW
    require(peer)
    require(acceptor_kind)
    for layout in acceptor_kind.layouts:
        login = mit_kdc.login("aes256", layout=layout)
        with closing(peer.new(login)) as initiator, closing(acceptor_kind.new(mit_kdc, layout=layout)) as acceptor:
            shake(initiator, acceptor)
            assert acceptor.client == "alice@MIT.TEST"
            assert_seals(initiator, acceptor)


@pytest.mark.parametrize("peer", [MIT_RAW, HEIMDAL_RAW], ids=str)
@pytest.mark.parametrize(
    ("kdc", "name"),
    [
        *(("mit", name) for name in ("aes128", "aes256", "aes128-sha2", "aes256-sha2", "rc4")),
        *(("samba", name) for name in ("aes128", "aes256", "rc4")),
    ],
    indirect=["kdc"],
)
def test_the_service_decides_which_enctype_protects_the_messages(peer: KerberosPeerKind, kdc: Kdc, name: str) -> None:
    require(peer)
    service = kdc.services[name]
    (key,) = read_keytab(service.keytab)
    assert key.enctype == service.enctype
    with closing(peer.new(kdc.login(name))) as initiator, closing(acceptor_for(peer).new(kdc, name)) as acceptor:
        shake(initiator, acceptor)
        assert initiator.key() == acceptor.key()
        assert acceptor.key()[0] == service.enctype
        assert_seals(initiator, acceptor)
        trailer, data = initiator.seal(b"message")
        assert len(data) == len(b"message")
        assert TRAILERS[service.enctype] in (len(trailer), None)


@each_with_its_kdcs(peer for peer in KERBEROS_PEERS if peer.takes_password)
def test_by_password_the_initiator_fetches_its_own_ticket(peer: KerberosPeerKind, kdc: Kdc) -> None:
    require(peer)
    login = kdc.login("aes256", user="bob", password=True, layout=peer.layouts[-1])
    with logged_in(peer, login, kdc) as (_, acceptor):
        assert acceptor.client == f"bob@{kdc.realm}"


@each_with_its_kdcs(peer for peer in KERBEROS_PEERS if peer.takes_password and not peer.falls_back)
def test_a_wrong_password_is_the_initiators_own_error(peer: KerberosPeerKind, kdc: Kdc) -> None:
    require(peer)
    login = dataclasses.replace(kdc.login("aes256", password=True), password="wrong")
    with pytest.raises(StepError), closing(peer.new(login)) as initiator:
        initiator.step(None)


@each_with_its_kdcs(peer for peer in KERBEROS_PEERS if not peer.needs_mutual)
def test_without_mutual_authentication_one_token_is_all_of_a_raw_login(peer: KerberosPeerKind, kdc: Kdc) -> None:
    require(peer)
    layout = peer.layouts[-1]
    login = kdc.login("aes256", flags=("conf",), layout=layout)
    with closing(peer.new(login)) as initiator, closing(acceptor_for(peer).new(kdc, layout=layout)) as acceptor:
        tokens = shake(initiator, acceptor)
        assert len(tokens) == (2 if peer.spnego else 1)
        assert not acceptor.info().flags & MUTUAL
        assert acceptor.open(*initiator.seal(b"in")) == b"in"


@each_with_its_kdcs(peer for peer in KERBEROS_PEERS if peer.wraps)
def test_a_message_can_be_signed_alone_and_is_then_not_opened(peer: KerberosPeerKind, kdc: Kdc) -> None:
    require(peer)
    with closing(peer.new(kdc.login())) as initiator, closing(acceptor_for(peer).new(kdc)) as acceptor:
        shake(initiator, acceptor)
        signed = initiator.wrap(b"readable", confidential=False)
        assert b"readable" in signed
        assert acceptor.unwrap(signed) == (b"readable", False)
        with pytest.raises(PeerError, match="not sealed"):
            acceptor.open(b"", initiator.wrap(b"readable", confidential=False))


@each_with_its_kdcs([MIT_RAW, MIT_SPNEGO, HEIMDAL_RAW, HEIMDAL_SPNEGO, PYTHON_GSSAPI_RAW])
def test_credentials_can_be_delegated(peer: KerberosPeerKind, kdc: Kdc) -> None:
    require(peer)
    login = kdc.login("aes256", flags=("mutual", "conf", "delegate"))
    with closing(peer.new(login)) as initiator, closing(acceptor_for(peer).new(kdc)) as acceptor:
        shake(initiator, acceptor)
        assert acceptor.info().flags & DELEGATE
        assert acceptor.info().delegated == f"alice@{kdc.realm}"


@each_with_its_kdcs(peer for peer in KERBEROS_PEERS if peer.bindings)
def test_channel_bindings_must_be_the_same_on_both_sides(peer: KerberosPeerKind, kdc: Kdc) -> None:
    require(peer)
    layout = peer.layouts[-1]
    for theirs, refused in ((b"tls-server-end-point:1", False), (b"tls-server-end-point:2", True)):
        login = kdc.login("aes256", bindings=theirs, layout=layout)
        acceptor_kind = acceptor_for(peer)
        with (
            closing(peer.new(login)) as initiator,
            closing(acceptor_kind.new(kdc, bindings=b"tls-server-end-point:1", layout=layout)) as acceptor,
        ):
            if refused:
                with pytest.raises(StepError, match="(?i)channel binding"):
                    shake(initiator, acceptor)
            else:
                shake(initiator, acceptor)


def refusal(kdc: Kdc, service: str, keytab: str | None = None, **login: str) -> str:
    """What MIT's acceptor says about this login."""
    require(MIT_RAW)
    accepting = kdc.services[service]
    if keytab is not None:
        accepting = dataclasses.replace(accepting, keytab=keytab)
    with (
        closing(MIT_RAW.new(kdc.login(service, **login))) as initiator,  # type: ignore[arg-type]
        closing(acceptor_for(MIT_RAW).new(kdc, accepting)) as acceptor,
        pytest.raises(StepError) as refused,
    ):
        shake(initiator, acceptor)
    return str(refused.value)


def test_a_key_that_was_changed_is_a_wrong_version(mit_kdc: MitKdc) -> None:
    assert "kvno" in refusal(mit_kdc, "rotated", mit_kdc.stale_keytab)


def test_a_ticket_for_another_service_finds_no_key(mit_kdc: MitKdc) -> None:
    assert "host/other.mit.test" in refusal(mit_kdc, "other", mit_kdc.all_keytab)


def test_a_wrong_key_of_the_right_version_does_not_decrypt(mit_kdc: MitKdc, tmp_path: Path) -> None:
    (key,) = read_keytab(mit_kdc.services["aes256"].keytab)
    wrong = dataclasses.replace(key, key=bytes(len(key.key)))
    assert "decrypt" in refusal(mit_kdc, "aes256", write_keytab(tmp_path / "wrong.keytab", [wrong]))


def test_an_hour_ago_a_brief_ticket_was_good(mit_kdc: MitKdc) -> None:
    assert "expired" in refusal(mit_kdc.an_hour_ago(), "brief")


def test_an_hour_ago_is_too_great_a_clock_skew(mit_kdc: MitKdc) -> None:
    assert "skew" in refusal(mit_kdc.an_hour_ago(), "aes256")


def test_a_ticket_of_seconds_ends_in_seconds(mit_kdc: MitKdc) -> None:
    require(MIT_RAW)
    login = mit_kdc.login("aes256", lifetime="20s")
    with closing(MIT_RAW.new(login)) as initiator, closing(acceptor_for(MIT_RAW).new(mit_kdc)) as acceptor:
        shake(initiator, acceptor)
        assert 0 < initiator.info().lifetime <= 20
        # What MIT's acceptor tells has the clock skew added that it would allow.
        assert acceptor.info().lifetime <= 20 + 300


def test_the_domain_tells_the_sids_of_its_users_and_groups(samba_kdc: SambaKdc) -> None:
    assert set(samba_kdc.sids) == {"alice", "bob", "engineers", "staff", "owners", "domain"}
    domain = samba_kdc.sids.pop("domain")
    assert domain.startswith("S-1-5-21-")
    assert all(sid.rpartition("-")[0] == domain for sid in samba_kdc.sids.values())
    samba_kdc.sids["domain"] = domain


@pytest.mark.long("a domain controller starts and ends")
def test_processes_share_the_domain_and_the_last_ends_it(tmp_path: Path) -> None:
    require(SimpleNamespace(available=samba_available))
    join_it = "import sys; from peers.kerberos.samba import SambaKdc; kdc = SambaKdc(Path(sys.argv[1])); "
    program = [
        sys.executable,
        "-c",
        f"from pathlib import Path; {join_it}print(kdc.port, kdc.sids); input(); kdc.stop()",
    ]
    with ExitStack() as stack:
        users = [
            stack.enter_context(
                subprocess.Popen([*program, tmp_path], stdin=PIPE, stdout=PIPE, cwd=Path(__file__).parent)
            )
            for _ in range(2)
        ]
        lines = set()
        for user in users:
            assert user.stdout is not None
            lines.add(user.stdout.readline())
        assert len(lines) == 1
        port = int(lines.pop().split()[0])
        for user in users:
            socket.create_connection(("127.0.0.1", port)).close()
            user.communicate(b"\n")
            assert user.returncode == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert not (tmp_path / "samba.json").exists()


def test_a_keytab_is_read_as_it_was_written(tmp_path: Path) -> None:
    keys = [
        Key(principal="host/a.test@TEST", kvno=1, enctype=18, key=b"k" * 32),
        Key(principal="user@TEST", kvno=300, enctype=23, key=b"n" * 16),
    ]
    assert read_keytab(write_keytab(tmp_path / "keytab", keys)) == keys
    assert "kkkk" not in repr(keys)


def test_a_peer_that_dies_says_why(mit_kdc: MitKdc) -> None:
    require(MIT_RAW)
    login = dataclasses.replace(mit_kdc.login(), flags=("nonsense",))  # type: ignore[arg-type]
    with pytest.raises(PeerError, match="unknown flag: nonsense"):
        MIT_RAW.new(login)


def test_a_closed_peer_is_an_error_and_not_a_hang(mit_kdc: MitKdc) -> None:
    require(MIT_RAW)
    initiator = MIT_RAW.new(mit_kdc.login())
    initiator.close()
    initiator.close()
    before = time.monotonic()
    with pytest.raises(PeerError):
        initiator.step(None)
    assert time.monotonic() - before < 5


@pytest.mark.parametrize("peer", [PYTHON_GSSAPI_RAW, DOTNET_KERBEROS_RAW], ids=str)
def test_a_process_that_is_used_again_has_nothing_of_the_login_before(
    peer: KerberosPeerKind, mit_kdc: MitKdc, samba_kdc: SambaKdc
) -> None:
    """A ticket that stayed behind would let a login succeed that must not."""
    require(peer)
    used = []
    for kdc in (mit_kdc, samba_kdc, mit_kdc):
        login = kdc.login()
        with closing(peer.new(login)) as initiator, closing(acceptor_for(MIT_RAW).new(kdc)) as acceptor:
            used.append(initiator._process._process)
            shake(initiator, acceptor)
            assert acceptor.client == login.user_principal
        nothing = dataclasses.replace(login, ccache=os.fspath(Path(login.directory) / "no such cache"))
        with pytest.raises(StepError), closing(peer.new(nothing)) as initiator:
            used.append(initiator._process._process)
            initiator.step(None)
    assert None not in used
    assert len(set(used)) == 1


def test_a_process_that_owes_an_answer_is_not_used_again(mit_kdc: MitKdc) -> None:
    """The next login would take it for its own."""
    require(PYTHON_GSSAPI_RAW)
    initiator = PYTHON_GSSAPI_RAW.new(mit_kdc.login())
    process = initiator._process._process
    process._owed += 1
    initiator.close()
    assert process._process.returncode is not None
    with closing(PYTHON_GSSAPI_RAW.new(mit_kdc.login())) as another:
        assert another._process._process is not process
