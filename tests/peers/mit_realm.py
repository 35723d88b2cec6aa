"""MIT SPNEGO with Kerberos to offer: a client that prefers Kerberos and falls back to NTLM, as Windows clients do.

Its first token holds an AP-REQ for a service that really exists in a realm that really runs, before it knows that
the acceptor has no Kerberos. Made of a KDC by `k5test`, for the length of the test session, and of the same
python-gssapi and gss-ntlmssp as in `gssapi_peer`.

The fixtures are to be imported where they are wanted (a conftest.py, for one).
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from . import gssapi_peer
from .base import PeerKind, missing_module
from .requirements import require

if TYPE_CHECKING:
    from k5test import K5Realm  # type: ignore[import-untyped, unused-ignore]

_PROGRAMS = {
    "krb5kdc": "krb5-kdc",
    "kdb5_util": "krb5-kdc",
    "kadmin.local": "krb5-admin-server",
    "kinit": "krb5-user",
}
# What gssapi_peer asks a ticket for.
_SERVICE = "host/localhost"


def _available() -> str | None:
    reason = gssapi_peer.available() or missing_module("k5test", "k5test (pip k5test)")
    if reason is not None:
        return reason
    for program, package in _PROGRAMS.items():
        if not (shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")):
            return f"{program} is not installed (apt {package})"
    return None


def free_port() -> int:
    """A port that was free both ways a moment ago."""
    with ExitStack() as stack:
        tcp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        tcp.bind(("127.0.0.1", 0))
        port: int = tcp.getsockname()[1]
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", port))
        return port


class MitRealm:
    """A running realm with one service, `host/localhost`, and users as they are asked for."""

    def __init__(self) -> None:
        from k5test import K5Realm

        self._realm: K5Realm = K5Realm(
            # By default all KDCs of a machine take port 61000, and those of two test runs answer for each other.
            portbase=free_port(),
            krb5_conf={
                "libdefaults": {
                    "dns_lookup_realm": "false",
                    "dns_canonicalize_hostname": "false",
                    "rdns": "false",
                },
                # By address: the machine's own name need not resolve.
                "realms": {"$realm": {"kdc": "127.0.0.1:$port0"}},
            },
            create_user=False,
            create_host=False,
            # With these two an exception in the constructor leaves a KDC running that nobody can stop.
            start_kdc=False,
            get_creds=False,
        )
        self._caches: dict[str, str] = {}
        try:
            self._realm.addprinc(_SERVICE)
            self._realm.start_kdc()
        except BaseException:
            self.stop()
            raise

    @property
    def config(self) -> str:
        """The krb5.conf that makes this the default realm: KRB5_CONFIG must name it."""
        path: str = self._realm.env["KRB5_CONFIG"]
        return path

    def ticket(self, principal: str) -> str:
        """Return the name of a credential cache with the principal's ticket; the principal is created for it."""
        if principal not in self._caches:
            cache = f"FILE:{self._realm.tmpdir}/ccache-{len(self._caches)}"
            # Not k5test's addprinc: it quotes for a shell, and kadmin.local takes the ' for a part of the name.
            self._realm.run_kadminl(f'addprinc -pw kdc-secret "{principal}"')
            self._realm.kinit(principal, "kdc-secret", flags=["-c", cache])
            self._caches[principal] = cache
        return self._caches[principal]

    def login(self, username: str, password: str, domain: str) -> gssapi_peer.GSSAPIInitiator:
        """Start a login that offers Kerberos, with a ticket, then NTLM, with the password."""
        import gssapi

        # One GSS-API credential has one name for all its mechanisms, so Kerberos too gets "DOM\user". To its parser
        # the backslash is an escape: what it makes of it ("DOMuser") is the principal to create.
        name = gssapi.Name(f"{domain}\\{username}".encode() if domain else username.encode(), gssapi.NameType.user)
        principal = str(name.canonicalize(gssapi_peer.oid(gssapi_peer.KERBEROS)))
        if "\\" in principal:
            # "DOM\nobody" holds a line feed to it, and no ticket for that: the login would offer NTLM first.
            raise ValueError(f"{username!r}: a name that begins with b, n or t cannot be asked for here")
        store: gssapi_peer.Store = {"ccache": self.ticket(principal), **gssapi_peer.ntlm_store(password)}
        offer = [gssapi_peer.KERBEROS, gssapi_peer.NTLM]
        return gssapi_peer.GSSAPIInitiator(gssapi_peer.SPNEGO, offer, store, username, domain)

    def stop(self) -> None:
        """Stop the KDC and delete its files."""
        self._realm.stop()


@pytest.fixture(scope="session")
def mit_realm() -> Iterator[MitRealm]:
    """A realm for the whole session."""
    reason = _available()
    require(_Reason(reason))
    realm = MitRealm()
    try:
        yield realm
    finally:
        realm.stop()


@pytest.fixture
def kerberos_first(mit_realm: MitRealm, monkeypatch: pytest.MonkeyPatch) -> PeerKind:
    """The peer, in a process environment that knows the realm.

    The environment is the whole process's: an acceptor in it sees the same krb5.conf.
    """
    monkeypatch.setenv("KRB5_CONFIG", mit_realm.config)
    return PeerKind(
        name="mit-spnego-kerberos-first",
        mechanism="ntlm",
        spnego=True,
        sends_mic=True,
        sets_seal=True,
        eszett="SS",
        blob_tail=True,
        seals_empty=False,
        splits_upn=True,
        optimistic="kerberos",
        probe=_available,
        make=mit_realm.login,
    )


class _Reason:
    """What `require` wants, of a reason alone: there is no PeerKind before there is a realm."""

    def __init__(self, reason: str | None) -> None:
        self._reason = reason

    def available(self) -> str | None:
        return self._reason
