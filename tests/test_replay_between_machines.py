"""What a recording of a session is worth on another machine with the same keytab, which has not seen it: docs/deployment.md.

RFC 4120 3.2.3 wants a replay cache that all servers with one key share, unless the protocol needs none. Ours are one for each
machine. Within one, `test_a_login_sent_again_byte_for_byte_is_refused`.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio

from peers import wire
from peers.kerberos import Kdc, KerberosPeerKind
from peers.kerberos.kinds import MIT_RAW, MIT_SPNEGO
from peers.kerberos.realm import USUAL_FLAGS, Flag
from peers.requirements import require
from test_peers import Channel, Server, in_thread, serving
from triosspi import Acceptor, UnsealError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MIT Kerberos's replay cache")

WITHOUT_MUTUAL: tuple[Flag, ...] = tuple(flag for flag in USUAL_FLAGS if flag != "mutual")
ORDER = b"pay bob 100"


class Tapped:
    """A socket, and somebody on the line who writes down what the client sends."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.recording = bytearray()

    def sendall(self, data: bytes) -> None:
        self.recording += data
        self.sock.sendall(data)

    def recv(self, size: int) -> bytes:
        return self.sock.recv(size)


def client(peer: KerberosPeerKind, server: Server, kdc: Kdc, flags: Sequence[Flag]) -> bytes:
    """Log in and give an order; returns the recording."""
    with (
        closing(peer.new(kdc.login(flags=tuple(flags), layout=peer.layouts[0]))) as initiator,
        wire.connect("127.0.0.1", server.port) as sock,
    ):
        tapped: Any = Tapped(sock)
        wire.login(tapped, initiator)
        wire.send_message(tapped, initiator, ORDER)
        assert wire.receive_message(tapped, initiator) == b"done"
        return bytes(tapped.recording)


def play(server: Server, recording: bytes) -> None:
    """Send it all, and see the end."""
    with wire.connect("127.0.0.1", server.port) as sock:
        sock.sendall(recording)
        sock.shutdown(socket.SHUT_WR)
        wire.recv_to_eof(sock)


class Bank:
    """An application, and what it was told to do."""

    def __init__(self) -> None:
        self.orders: list[bytes] = []
        self.errors: list[BaseException | None] = []

    async def __call__(self, channel: Channel) -> None:
        try:
            async for order in channel:
                self.orders.append(order)
                await channel.send(b"done")
        except trio.BrokenResourceError as exc:
            self.errors.append(exc.__cause__)
            raise


async def play_to_another_machine(
    peer: KerberosPeerKind, kdc: Kdc, flags: Sequence[Flag], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> tuple[Server, Bank]:
    """A session with one machine, recorded and played to a second one; returns the second."""
    require(peer)
    acceptor = Acceptor(keytab=kdc.services["aes256"].keytab)
    banks = Bank(), Bank()
    for name in ("first", "second"):
        (folder / name).mkdir()
    monkeypatch.setenv("KRB5RCACHEDIR", str(folder / "first"))
    async with serving(acceptor, banks[0]) as server:
        recording = await in_thread(client, peer, server, kdc, flags)
    assert banks[0].orders == [ORDER]
    # Whatever it has seen is not known there.
    monkeypatch.setenv("KRB5RCACHEDIR", str(folder / "second"))
    async with serving(acceptor, banks[1]) as server:
        await in_thread(play, server, recording)
        await server.wait_until_over(1)
    return server, banks[1]


@pytest.mark.parametrize("peer", [MIT_RAW, MIT_SPNEGO], ids=str)
@pytest.mark.parametrize("kdc", ["mit"], indirect=True)
async def test_with_mutual_authentication_no_message_of_a_recording_opens_on_another_machine(
    peer: KerberosPeerKind, kdc: Kdc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server, bank = await play_to_another_machine(peer, kdc, USUAL_FLAGS, monkeypatch, tmp_path)
    # The ticket and its authenticator are believed: the handler runs, and the log has a login.
    assert [identity.name for identity in server.peers] == ["alice"]
    # But the acceptor has made a key of its own for this session, which nobody on the line has.
    assert bank.orders == []
    assert [type(error) for error in bank.errors] == [UnsealError]


@pytest.mark.parametrize("peer", [MIT_RAW, MIT_SPNEGO], ids=str)
@pytest.mark.parametrize("kdc", ["mit"], indirect=True)
async def test_without_mutual_authentication_a_recording_is_believed_by_another_machine(
    peer: KerberosPeerKind, kdc: Kdc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # What docs/deployment.md warns of. If this fails, it is out of date.
    server, bank = await play_to_another_machine(peer, kdc, WITHOUT_MUTUAL, monkeypatch, tmp_path)
    assert [identity.mutual for identity in server.peers] == [False]
    assert bank.orders == [ORDER]
