"""The native sealers beside other implementations for a long time: 100,000 messages in either direction each.

What wears out or drifts (sequence numbers, RC4's state, the chaining of AES, the pool of confounders) shows only then. The
messages go through whole sessions, as a server's do, after a real login.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from harness import say
from peers import NTLM_PEERS, PeerKind
from peers.kerberos import Kdc, KerberosPeerKind
from peers.kerberos.kinds import HEIMDAL_RAW, MIT_RAW, PYTHON_GSSAPI_RAW, SSPI_RS_KERBEROS_NEGOTIATE
from peers.kerberos.process import LineContext
from peers.requirements import require
from triosspi import Acceptor, AccountFile, WireFormat
from triosspi.security import native
from triosspi.service import account_editor
from triosspi.session.session import Session

MESSAGES = 100_000
BATCH = 100
#: As many bytes of sealed messages, in hexadecimal and with what is around them, fit a pipe's 64 KiB.
BATCH_BYTES = 16 * 1024

Sealed = list[tuple[bytes, bytes]]


def batches(rng: random.Random) -> Iterator[list[bytes]]:
    """Random messages: most of a few blocks, some of a few KiB."""
    left = MESSAGES
    while left:
        batch: list[bytes] = []
        while left and len(batch) < BATCH and sum(map(len, batch)) < BATCH_BYTES - 4096:
            longest = 80 if rng.random() < 0.98 else 4096
            batch.append(rng.randbytes(rng.randint(1, longest)))
            left -= 1
        yield batch


def split(data: bytes) -> Sealed:
    """The frames' (trailer, ciphertext)."""
    sealed, at = [], 0
    while at < len(data):
        length, trailer = struct.unpack_from("<II", data, at)
        sealed.append((data[at + 8 : at + 8 + trailer], data[at + 8 + trailer : at + 4 + length]))
        at += 4 + length
    return sealed


def join(sealed: Sealed) -> bytes:
    return b"".join(
        struct.pack("<II", 4 + len(trailer) + len(data), len(trailer)) + trailer + data for trailer, data in sealed
    )


def exchange(
    session: Session, seal: Callable[[list[bytes]], Sealed], open_: Callable[[Sealed], list[bytes]], seed: int
) -> None:
    """Every batch there, and back."""
    for batch in batches(random.Random(seed)):
        session.receive_data(join(seal(batch)))
        assert session.next_opened() == batch
        assert open_(split(session.seal(batch))) == batch


@pytest.mark.long("a hundred thousand messages")
@pytest.mark.parametrize(
    ("peer", "kdc"),
    [
        pytest.param(peer, kdc, id=str(peer))
        for peer, kdc in (
            (MIT_RAW, "mit"),
            (HEIMDAL_RAW, "mit"),
            (PYTHON_GSSAPI_RAW, "mit"),
            (SSPI_RS_KERBEROS_NEGOTIATE, "samba"),
        )
    ],
    indirect=["kdc"],
)
def test_kerberos_and_a_peer_exchange_100000_messages_each_way(kdc: Kdc, peer: KerberosPeerKind) -> None:
    require(peer)
    assert native.available()["kerberos"]

    def shake(context: LineContext) -> Session:
        session = Session(Acceptor(keytab=kdc.services["aes256"].keytab), WireFormat.FRAMED)
        token = context.step(None)
        while token:
            answer = say(session, token)
            token = context.step(answer) if answer else None
        return session

    with peer.logged_in(kdc.login("aes256"), shake) as (context, session):
        exchange(session, context.seal_many, context.open_many, seed=4121)


@pytest.mark.long("a hundred thousand messages")
@pytest.mark.parametrize("peer", [p for p in NTLM_PEERS if p.name.startswith(("sspi-rs", "gss-ntlmssp"))], ids=str)
def test_ntlm_and_a_peer_exchange_100000_messages_each_way(peer: PeerKind, tmp_path: Path) -> None:
    require(peer)
    assert native.available()["ntlm"]
    accounts = tmp_path / "accounts"
    account_editor.add(accounts, "DOM\\alice", "secret")
    session = Session(Acceptor(accounts=AccountFile(accounts), require_mic=peer.sends_mic), WireFormat.FRAMED)
    with closing(peer.new("alice", "secret", "DOM")) as context:
        token = context.step(None)
        while token:
            answer = say(session, token)
            token = context.step(answer) if answer else None
        exchange(
            session,
            lambda messages: [context.seal(message) for message in messages],
            lambda sealed: [context.open(*record) for record in sealed],
            seed=757,
        )
