"""Kerberos peers: two KDCs, and initiators and acceptors that this project did not write, each in a process of its own.

`KERBEROS_PEERS` lists the initiators, `KERBEROS_ACCEPTORS` the other side; both behind the blocking interface of
`peers.base`, so that `peers.wire` and `peers.acceptors` drive them. The KDCs are fixtures, to be imported from
`peers.kerberos.fixtures`; each has users, services with keytabs, and `login()`, which is what an
initiator is given:

    @each_with_its_kdcs()
    def test_peer_is_known_by_name(peer: KerberosPeerKind, kdc: Kdc) -> None:
        require(peer)
        ...an acceptor with kdc.services["aes256"].keytab...
        with closing(peer.new(kdc.login("aes256"))) as initiator, wire.connect(host, port) as sock:
            wire.login(sock, initiator)

The test's own process belongs to the realm that the fixture `kdc` gave it, or that it has joined (`fixtures.join`).
Everything is on the loopback, and nothing asks the DNS.
"""

from __future__ import annotations

from .keytabs import Key as Key
from .keytabs import read_keytab as read_keytab
from .keytabs import write_keytab as write_keytab
from .kinds import KERBEROS_ACCEPTORS as KERBEROS_ACCEPTORS
from .kinds import KERBEROS_PEERS as KERBEROS_PEERS
from .kinds import KerberosAcceptorKind as KerberosAcceptorKind
from .kinds import KerberosPeerKind as KerberosPeerKind
from .process import LineAcceptor as LineAcceptor
from .process import LineContext as LineContext
from .process import StepError as StepError
from .realm import ENCTYPES as ENCTYPES
from .realm import Kdc as Kdc
from .realm import Login as Login
from .realm import Service as Service
