"""What a conftest.py, or a module of tests, imports; and the combinations worth a test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import pytest

from .kinds import KERBEROS_PEERS, KerberosPeerKind
from .mit import MitKdc, mit_kdc
from .realm import Kdc
from .samba import SambaKdc, samba_kdc

__all__ = ["Kdc", "MitKdc", "SambaKdc", "each_with_its_kdcs", "join", "kdc", "mit_kdc", "samba_kdc"]


def join(realm: Kdc, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put this process into a realm, for a test."""
    for name, value in realm.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("KRB5CCNAME", "KRB5_KTNAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def kdc(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kdc:
    """The KDC that the test is parametrised with, by its name, `mit` or `samba`; this process belongs to its realm."""
    realm = cast(Kdc, request.getfixturevalue(f"{request.param}_kdc"))
    join(realm, monkeypatch)
    return realm


def each_with_its_kdcs(peers: Iterable[KerberosPeerKind] = KERBEROS_PEERS) -> pytest.MarkDecorator:
    """Parametrise a test over `peer` and `kdc`: every initiator, with every KDC that it gets tickets from."""
    return pytest.mark.parametrize(
        ("peer", "kdc"),
        [pytest.param(peer, realm, id=f"{peer}-{realm}") for peer in peers for realm in sorted(peer.realms)],
        indirect=["kdc"],
    )
