"""Handing over to native sealers, and doing without them."""

from __future__ import annotations

import random
from contextlib import closing

import pytest

from harness import make_sessions
from peers.kerberos import Kdc
from peers.kerberos.kinds import HEIMDAL_SPNEGO, MIT_RAW, MIT_SPNEGO, KerberosPeerKind
from peers.requirements import require
from test_kerberos import AES, log_in, new_session, receive, sealed
from triosspi import LocalProtocolError, UnsealError, WireFormat
from triosspi.security import context, native
from triosspi.security.sealers import GSSWrapSealer, ProxySealer

MESSAGES = [b"", b"\0", b"x" * 15, b"y" * 16, b"z" * 17, random.Random("native").randbytes(70_000)][1:]


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extension could not be built, or OpenSSL has no RC4."""
    monkeypatch.setattr(native, "_sealing", None)


def test_both_mechanisms_are_sealed_natively_here() -> None:
    # A machine without OpenSSL's headers does without, but none on which these tests are to run.
    assert native.available() == {"ntlm": True, "kerberos": True}


def test_without_the_extension_nothing_is(without_native: None) -> None:
    assert native.available() == {"ntlm": False, "kerberos": False}


@pytest.mark.parametrize("raw", [True, False])
def test_ntlm_gives_the_same_bytes_either_way(monkeypatch: pytest.MonkeyPatch, raw: bool) -> None:
    # Both from one handshake: what pyspnego's contexts were taken from still seal themselves.
    by_pyspnego = {}
    real = context.take_over

    def take_over(proxy: object, inner: object, *, initiator: bool, encrypt: bool) -> object:
        by_pyspnego[initiator] = inner.make_sealer(encrypt=True)  # type: ignore[attr-defined]
        assert isinstance(by_pyspnego[initiator], ProxySealer)
        return real(proxy, inner, initiator=initiator, encrypt=encrypt)  # type: ignore[arg-type]

    monkeypatch.setattr(context, "take_over", take_over)
    client, server = make_sessions(raw=raw)
    for session, theirs in ((client, by_pyspnego[True]), (server, by_pyspnego[False])):
        assert session._context.batch_sealer is not None
        for message in MESSAGES:
            assert sealed(session, message) == theirs.seal(message)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("which", ["client", "server"])
def test_ntlm_natively_talks_to_ntlm_by_pyspnego(monkeypatch: pytest.MonkeyPatch, which: str, raw: bool) -> None:
    real = context.take_over

    def take_over(proxy: object, inner: object, *, initiator: bool, encrypt: bool) -> object:
        native_side = initiator == (which == "client")
        return real(proxy, inner, initiator=initiator, encrypt=encrypt) if native_side else None  # type: ignore[arg-type]

    monkeypatch.setattr(context, "take_over", take_over)
    client, server = make_sessions(raw=raw)
    assert (client._context.batch_sealer is None) is (which == "server")
    assert (server._context.batch_sealer is None) is (which == "client")
    for sender, receiver in ((client, server), (server, client)) * 2:
        receiver.receive_data(sender.seal(MESSAGES))
        assert receiver.next_opened() == MESSAGES
    receiver.receive_data(sender.goodbye())
    assert receiver.next_opened() == []
    assert receiver.receive_ended


@pytest.mark.parametrize("peer", [MIT_RAW, MIT_SPNEGO, HEIMDAL_SPNEGO], ids=str)
@pytest.mark.parametrize("service", AES)
def test_without_the_extension_kerberos_is_sealed_by_its_library(
    without_native: None,
    mit_kdc: Kdc,
    monkeypatch: pytest.MonkeyPatch,
    peer: KerberosPeerKind,
    service: str,
) -> None:
    require(peer)
    for name, value in mit_kdc.environment.items():
        monkeypatch.setenv(name, value)
    with closing(peer.new(mit_kdc.login(service, layout="iov"))) as initiator:
        session = log_in(new_session(mit_kdc, service), initiator)
        assert isinstance(session._context._sealer, GSSWrapSealer)
        for message in MESSAGES:
            assert initiator.open(*sealed(session, message)) == message
            assert receive(session, *initiator.seal(message)) == [message]
        bad = bytearray(initiator.seal(b"bad")[0])
        bad[20] ^= 1
        with pytest.raises(UnsealError):
            receive(session, bytes(bad), b"bad")


def test_a_tracer_sees_each_message_though_sealing_is_native() -> None:
    class Tracer:
        def __init__(self) -> None:
            self.messages: list[tuple[bytes, int, int]] = []

        def token_received(self, token: bytes) -> None: ...
        def token_made(self, token: bytes, established: bool) -> None: ...
        def closed(self) -> None: ...
        def message_sealed(self, message: bytes, trailer: bytes, ciphertext: bytes) -> None:
            self.messages.append((message, len(trailer), len(ciphertext)))

    tracer = Tracer()
    client, server = make_sessions(tracer=tracer)
    server.receive_data(client.seal(MESSAGES))
    assert server.next_opened() == MESSAGES
    assert tracer.messages == [(message, 16, len(message)) for message in MESSAGES]


def test_the_samples_format_is_sealed_natively_too() -> None:
    client, server = make_sessions(wire=WireFormat.SAMPLE)
    assert server._context.batch_sealer is not None
    client.receive_data(server.seal([b"This is your server speaking"]))
    client.receive_data(b"")
    assert client.next_opened() == [b"This is your server speaking"]


def test_a_batch_with_a_message_that_cannot_be_sent_seals_none_of_it() -> None:
    client, server = make_sessions()
    with pytest.raises(LocalProtocolError):
        client.seal([b"fine", b""])
    server.receive_data(client.seal([b"next"]))
    assert server.next_opened() == [b"next"]
