"""Sessions: the handshake and what it proves, sealed messages and how they are refused; all without I/O."""

from __future__ import annotations

import random
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from harness import (
    PASSWORD,
    SERVER_MESSAGE,
    PlainCredential,
    dword,
    frame,
    make_acceptor,
    make_initiator,
    make_sessions,
    outcome,
    plain_session,
    step_through,
)
from triosspi import (
    Acceptor,
    AuthenticationError,
    ConfigurationError,
    Initiator,
    LocalProtocolError,
    RemoteProtocolError,
    TruncatedError,
    UnsealError,
    WireFormat,
)
from triosspi.security import native
from triosspi.security.authorization import Authorization
from triosspi.security.context import SecurityContext
from triosspi.security.identity import ContextFlag
from triosspi.security.kerberos.tickets import KerberosPolicy
from triosspi.security.ntlm.acceptor import NTLMAcceptor
from triosspi.security.ntlm.accounts import AccountTable
from triosspi.security.ntlm.verification import NTLMPolicy
from triosspi.security.policy import AcceptorPolicy, check_initiator
from triosspi.security.proxies import KerberosInitiator, adopt
from triosspi.security.sealers import GSSWrapSealer
from triosspi.session.base import MAX_ROUNDS
from triosspi.session.session import Session

check_acceptor = AcceptorPolicy(kerberos=KerberosPolicy(), authorization=Authorization()).check

both_formats = pytest.mark.parametrize("wire", [WireFormat.SAMPLE, WireFormat.FRAMED])
both_packagings = pytest.mark.parametrize("raw", [False, True], ids=["spnego", "raw"])


# ---- the handshake ----


@both_formats
@both_packagings
def test_after_the_handshake_both_sides_know_who_is_there(wire, raw):
    client, server = make_sessions(wire, raw=raw)
    assert (server.peer.principal, server.peer.domain, server.peer.name) == ("DOM\\alice", "DOM", "alice")
    assert str(server.peer) == "DOM\\alice"
    assert server.peer.mechanism == client.peer.mechanism == "ntlm"
    assert server.package_name == client.package_name == "NTLM"
    assert client.peer.principal == "host/unspecified"
    # NTLM's acceptor never proves its name.
    assert not client.peer.mutual
    assert server.peer.authenticated_at.utcoffset() is not None


def test_the_peer_is_spelled_as_the_account_is_not_as_the_client_did():
    client = Session(make_initiator(username="dom\\ALICE"), WireFormat.FRAMED)
    server = Session(make_acceptor(), WireFormat.FRAMED)
    step_through(client, server)
    assert server.peer.principal == "DOM\\alice"


def test_the_target_that_was_asked_for_is_the_initiators_peer():
    client = Session(make_initiator(target="http/www.example"), WireFormat.FRAMED)
    step_through(client, Session(make_acceptor(), WireFormat.FRAMED))
    assert client.peer.principal == "http/www.example"


def test_each_side_knows_its_role():
    client, server = make_sessions(shake=False)
    assert server.accepts
    assert not client.accepts
    assert not client.established
    assert not server.established


def test_our_initiator_speaks_spnego_unless_told_otherwise():
    assert Session(make_initiator(), WireFormat.FRAMED).step(None)[4:5] == b"\x60"
    raw = Session(make_initiator(raw=True), WireFormat.FRAMED).step(None)
    assert raw[4:].startswith(b"NTLMSSP\0")


def test_ntlm_with_a_password_never_blocks_and_anything_else_may():
    assert not Session(make_initiator(), WireFormat.FRAMED).may_block
    assert not Session(make_acceptor(), WireFormat.FRAMED).may_block
    assert Session(Initiator(username="alice", password="x"), WireFormat.FRAMED).may_block


@both_packagings
def test_a_wrong_password_is_an_authentication_error_at_the_acceptor(raw):
    client = Session(make_initiator("wrong", raw=raw), WireFormat.FRAMED)
    server = Session(make_acceptor(), WireFormat.FRAMED)
    with pytest.raises(AuthenticationError, match="wrong password"):
        step_through(client, server)
    assert not server.established
    # Raw NTLM's initiator speaks last, and so believes that it is logged in; under SPNEGO it does not.
    assert client.established is raw


@both_packagings
def test_an_unknown_account_is_an_authentication_error_at_the_acceptor(raw):
    client = Session(make_initiator(username="DOM\\mallory", raw=raw), WireFormat.FRAMED)
    with pytest.raises(AuthenticationError, match="no account"):
        step_through(client, Session(make_acceptor(), WireFormat.FRAMED))


def test_a_failed_handshake_has_failed_for_good():
    server = Session(make_acceptor(), WireFormat.FRAMED)
    with pytest.raises(AuthenticationError):
        step_through(Session(make_initiator("wrong"), WireFormat.FRAMED), server)
    with pytest.raises(AuthenticationError):
        step_through(Session(make_initiator(), WireFormat.FRAMED), server)
    assert not server.established


def test_nothing_secret_stands_in_an_error_or_a_repr():
    server = Session(make_acceptor(), WireFormat.FRAMED)
    with pytest.raises(AuthenticationError) as caught:
        step_through(Session(make_initiator("hunter2"), WireFormat.FRAMED), server)
    told = f"{caught.value!r} {caught.value.__cause__!r} {make_initiator('hunter2')!r} {make_acceptor()!r}"
    assert "hunter2" not in told
    assert PASSWORD not in told


# One that a peer may begin with, as far as anybody can tell who only reads its beginning.
TOKEN = b"NTLMSSP\0"


def test_at_most_ten_tokens_of_the_peer_are_taken():
    assert MAX_ROUNDS == 10
    credential: Any = PlainCredential("accept", [b"more"] * 100)
    session = Session(credential, WireFormat.FRAMED)
    session.receive_data(frame(TOKEN) * 11)
    for _ in range(10):
        assert session.step(session.next_token()) == frame(b"more")
    with pytest.raises(AuthenticationError, match="10 tokens"):
        session.next_token()
    assert len(credential.contexts[0].tokens) == 10


def test_an_initiator_takes_at_most_ten_tokens_too():
    credential: Any = PlainCredential("initiate", [b"more"] * 100)
    session = Session(credential, WireFormat.FRAMED)
    session.step(None)
    session.receive_data(frame(TOKEN) * 11)
    for _ in range(10):
        session.step(session.next_token())
    with pytest.raises(AuthenticationError, match="10 tokens"):
        session.next_token()


def test_a_handshake_may_take_exactly_ten_tokens():
    credential: Any = PlainCredential("accept", [b"more"] * 9 + [b"done"])
    session = Session(credential, WireFormat.FRAMED)
    session.receive_data(frame(TOKEN) * 10)
    for _ in range(10):
        session.step(session.next_token())
    assert session.established


def test_an_initiator_that_has_nothing_to_say_and_is_not_done_gives_up():
    credential: Any = PlainCredential("initiate", [b"hello", b"", b"never"])
    session = Session(credential, WireFormat.FRAMED)
    session.step(None)
    with pytest.raises(AuthenticationError, match="nothing more to say"):
        session.step(b"token")


# ---- tokens that are not what they should be ----


def refused(server: Session, token: bytes) -> AuthenticationError:
    server.receive_data(frame(token))
    with pytest.raises(AuthenticationError) as caught:
        server.step(server.next_token())
    assert not server.established
    return caught.value


NEG_TOKEN_RESP_COMPLETED = bytes.fromhex("a1073005a0030a0100")


@pytest.mark.parametrize(
    "token",
    [
        b"x",
        b"\x60",
        b"\x60\x84",
        b"\x60\x02\x06\x00",
        b"\xa0",
        b"\xa0\x80\x00\x00",
        b"NTLMSSP\0",
        b"NTLMSSP\0\x01\0\0\0",
        b"NTLMSSP\0\x03\0\0\0" + bytes(100),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello",
        NEG_TOKEN_RESP_COMPLETED,
        bytes.fromhex("602306092a864886f71201020201") + bytes(23),
        b"\xa0" * 5000,
    ],
    ids=lambda token: token[:12].hex(),
)
def test_a_first_token_that_is_none_is_an_authentication_error(token):
    refused(Session(make_acceptor(), WireFormat.FRAMED), token)


def test_accept_completed_without_credentials_authenticates_nobody():
    # pyspnego alone calls this context complete.
    client, server = make_sessions(shake=False)
    server.receive_data(client.step(None))
    server.step(server.next_token())
    refused(server, NEG_TOKEN_RESP_COMPLETED)


def test_an_acceptor_that_only_says_that_it_is_done_is_refused_by_our_initiator():
    # Its mechListMIC would prove that it knows the session's key.
    client, server = make_sessions(shake=False)
    data = client.step(None)
    server.receive_data(data)
    client.receive_data(server.step(server.next_token()))
    assert client.step(client.next_token())
    client.receive_data(frame(NEG_TOKEN_RESP_COMPLETED))
    with pytest.raises(AuthenticationError, match="mechListMIC"):
        client.step(client.next_token())
    assert not client.established


def test_an_ntlm_context_that_is_complete_without_a_verified_login_is_refused():
    acceptor = NTLMAcceptor(AccountTable(), NTLMPolicy())
    acceptor.complete = True
    with pytest.raises(AuthenticationError, match="not verified"):
        check_acceptor(acceptor, ContextFlag.CONF)


def test_a_refused_raw_mechanism_is_an_authentication_error():
    client = Session(make_initiator(raw=True), WireFormat.FRAMED)
    server = Session(make_acceptor(allow_raw=False), WireFormat.FRAMED)
    with pytest.raises(AuthenticationError, match="not allowed"):
        step_through(client, server)


def test_raw_kerberos_where_it_is_not_enabled_is_an_authentication_error():
    token = bytes.fromhex("601106092a864886f712010202") + bytes(6)
    error = refused(Session(make_acceptor(), WireFormat.FRAMED), token)
    assert "not enabled" in str(error)


def test_whatever_the_client_sends_nothing_but_our_errors_comes_out():
    rng = random.Random(5)
    seen = set()
    for raw in (False, True):
        for _ in range(150):
            client, server = make_sessions(raw=raw, shake=False)
            spoilt = rng.randint(0, 2)
            try:
                data = client.step(None)
                for step in range(3):
                    if step == spoilt:
                        data = spoil(data, rng)
                    server.receive_data(data)
                    token = server.next_token()
                    answer = server.step(token) if token is not None else b""
                    if not answer or client.established:
                        break
                    client.receive_data(answer)
                    data = client.step(client.next_token())
            except RemoteProtocolError as exc:
                seen.add(type(exc))
    assert AuthenticationError in seen


def test_whatever_the_server_sends_nothing_but_our_errors_comes_out():
    rng = random.Random(6)
    seen = set()
    for raw in (False, True):
        for _ in range(100):
            client, server = make_sessions(raw=raw, shake=False)
            try:
                server.receive_data(client.step(None))
                client.receive_data(spoil(server.step(server.next_token()), rng))
                token = client.next_token()
                if token is not None:
                    client.step(token)
            except RemoteProtocolError as exc:
                seen.add(type(exc))
    assert AuthenticationError in seen


def spoil(data: bytes, rng: random.Random) -> bytes:
    """The same frame with a token that was tampered with; its length is right."""
    token = bytearray(data[4:])
    for _ in range(rng.randint(1, 4)):
        kind = rng.randint(0, 3)
        at = rng.randrange(len(token)) if token else 0
        if kind == 0 and token:
            token[at] = rng.randrange(256)
        elif kind == 1:
            del token[at:]
        elif kind == 2:
            token[at:at] = rng.randbytes(rng.randint(1, 20))
        elif token:
            token[at] ^= 1 << rng.randrange(8)
    return frame(bytes(token) or b"\0")


def test_an_account_source_that_raises_is_an_authentication_error():
    class Broken:
        def lookup(self, domain: str, user: str) -> None:
            raise KeyError("the database is gone")

    server = Session(Acceptor(accounts=Broken()), WireFormat.FRAMED)
    with pytest.raises(AuthenticationError, match="KeyError") as caught:
        step_through(Session(make_initiator(), WireFormat.FRAMED), server)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


# ---- ends ----


def test_a_raw_initiator_takes_an_end_before_the_first_record_for_a_refused_login():
    client = Session(make_initiator("wrong", raw=True), WireFormat.FRAMED)
    with pytest.raises(AuthenticationError):
        step_through(client, Session(make_acceptor(), WireFormat.FRAMED))
    # To the initiator the handshake has gone well.
    assert client.established
    client.receive_data(b"")
    with pytest.raises(AuthenticationError, match="closed without a word: login probably refused"):
        client.next_opened()
    with pytest.raises(AuthenticationError):
        client.next_opened()


def test_a_raw_initiator_of_the_sample_takes_it_for_that_too():
    client, _ = make_sessions(WireFormat.SAMPLE, raw=True)
    client.receive_data(b"")
    with pytest.raises(AuthenticationError, match="without a word"):
        client.next_opened()


def test_a_raw_acceptor_is_proven_by_its_first_record():
    client, server = make_sessions(raw=True)
    client.receive_data(server.seal([b"welcome"]))
    assert client.next_opened() == [b"welcome"]
    client.receive_data(b"")
    with pytest.raises(TruncatedError) as caught:
        client.next_opened()
    assert caught.value.at_boundary


def test_a_raw_acceptor_is_proven_by_a_goodbye():
    client, server = make_sessions(raw=True)
    assert outcome(client, [server.goodbye(), b""]) == ["end"]


def test_a_raw_acceptor_is_not_proven_by_half_a_record():
    client, server = make_sessions(raw=True)
    (error,) = outcome(client, [server.seal([b"welcome"])[:-1], b""])
    assert error[0] is AuthenticationError


def test_an_spnego_acceptor_has_confirmed_the_login_already():
    client, _ = make_sessions()
    (error,) = outcome(client, [b""])
    assert error[0] is TruncatedError


def test_an_initiator_takes_an_end_during_the_handshake_for_a_refused_login():
    client = Session(make_initiator("wrong"), WireFormat.FRAMED)
    with pytest.raises(AuthenticationError):
        step_through(client, Session(make_acceptor(), WireFormat.FRAMED))
    client.receive_data(b"")
    with pytest.raises(AuthenticationError, match="during the handshake: login probably refused"):
        client.next_token()


def test_an_acceptor_takes_an_end_during_the_handshake_for_what_it_is():
    _, server = make_sessions(shake=False)
    server.receive_data(b"")
    with pytest.raises(TruncatedError) as caught:
        server.next_token()
    assert caught.value.at_boundary


@pytest.mark.parametrize("side", [0, 1], ids=["client", "server"])
def test_an_end_between_two_records_without_a_goodbye_is_a_truncation_at_a_boundary(side):
    sessions = make_sessions()
    receiver, sender = sessions[side], sessions[1 - side]
    receiver.receive_data(sender.seal([b"one", b"two"]))
    receiver.receive_data(b"")
    assert receiver.next_opened() == [b"one", b"two"]
    for _ in range(2):
        with pytest.raises(TruncatedError) as caught:
            receiver.next_opened()
        assert caught.value.at_boundary


def test_an_end_within_a_record_is_a_truncation_not_at_a_boundary():
    client, server = make_sessions()
    data = client.seal([b"one", b"two"])
    server.receive_data(data[:-1])
    server.receive_data(b"")
    assert server.next_opened() == [b"one"]
    with pytest.raises(TruncatedError) as caught:
        server.next_opened()
    assert not caught.value.at_boundary


def test_a_goodbye_ends_receiving_and_is_said_once():
    client, server = make_sessions()
    assert outcome(server, [client.seal([b"last"]) + client.goodbye()]) == [b"last", "end"]
    assert server.peer_left
    assert server.next_opened() == []
    assert client.goodbye() == b""


def test_nothing_can_be_sent_after_our_goodbye():
    client, _ = make_sessions()
    client.goodbye()
    with pytest.raises(LocalProtocolError):
        client.seal([b"forgotten"])


def test_no_goodbye_is_said_to_a_peer_that_has_left_or_was_never_there():
    client, server = make_sessions()
    outcome(server, [client.goodbye()])
    assert server.goodbye() == b""
    assert make_sessions(shake=False)[0].goodbye() == b""


# ---- messages that do not open ----


def test_a_replayed_message_does_not_open():
    client, server = make_sessions()
    record = client.seal([b"pay 10"])
    events = outcome(server, [record, record])
    assert events[0] == b"pay 10"
    assert events[1][0] is UnsealError
    assert len(events) == 2


def test_reordered_messages_do_not_open():
    client, server = make_sessions()
    first, second = client.seal([b"first"]), client.seal([b"second"])
    (error,) = outcome(server, [second, first])
    assert error[0] is UnsealError


def test_a_missing_message_is_noticed_at_the_next():
    client, server = make_sessions()
    client.seal([b"taken out on the way"])
    (error,) = outcome(server, [client.seal([b"second"])])
    assert error[0] is UnsealError


@pytest.mark.parametrize("side", [0, 1], ids=["client", "server"])
def test_a_message_reflected_to_its_sender_does_not_open(side):
    session = make_sessions()[side]
    (error,) = outcome(session, [session.seal([b"hello"])])
    assert error[0] is UnsealError


def test_a_message_of_another_session_does_not_open():
    client, _ = make_sessions()
    _, other_server = make_sessions()
    (error,) = outcome(other_server, [client.seal([b"hello"])])
    assert error[0] is UnsealError


@both_packagings
def test_a_flipped_bit_in_any_part_of_a_record_breaks_it(raw):
    size = 4 + 4 + 16 + 5
    rng = random.Random(7)
    for position in range(4, size):
        client, server = make_sessions(raw=raw)
        data = bytearray(client.seal([b"hello"]))
        assert len(data) == size
        data[position] ^= 1 << rng.randrange(8)
        (error,) = outcome(server, [bytes(data)])
        # The trailer's length may be refused before anything is opened.
        assert error[0] in ((UnsealError, RemoteProtocolError) if position < 8 else (UnsealError,))


def test_a_flipped_bit_in_a_goodbye_is_not_an_end():
    client, server = make_sessions()
    data = bytearray(client.goodbye())
    data[-1] ^= 1
    (error,) = outcome(server, [bytes(data)])
    assert error[0] is UnsealError
    assert not server.receive_ended


def test_messages_before_a_bad_one_are_delivered_first_whatever_the_batching():
    for together in (True, False):
        client, server = make_sessions()
        good = [client.seal([b"%d" % i]) for i in range(3)]
        bad = bytearray(client.seal([b"bad"]))
        bad[-1] ^= 1
        pieces = [*good, bytes(bad), client.seal([b"never"])]
        if together:
            pieces = [b"".join(pieces)]
        events = outcome(server, pieces)
        assert events[:3] == [b"0", b"1", b"2"]
        assert events[3][0] is UnsealError
        assert len(events) == 4


def test_the_first_bad_message_is_the_last_that_is_looked_at():
    client, server = make_sessions()
    bad = bytearray(client.seal([b"bad"]))
    bad[-1] ^= 1
    server.receive_data(bytes(bad))
    with pytest.raises(UnsealError) as first:
        server.next_opened()
    server.receive_data(client.seal([b"good"]))
    with pytest.raises(UnsealError) as second:
        server.next_opened()
    assert second.value is first.value


def test_a_sample_message_that_does_not_open_is_not_delivered():
    client, server = make_sessions(WireFormat.SAMPLE)
    data = bytearray(server.seal([SERVER_MESSAGE]))
    data[-1] ^= 1
    (error,) = outcome(client, [bytes(data), b""])
    assert error[0] is UnsealError


def test_whatever_is_sent_after_the_handshake_nothing_but_our_errors_comes_out():
    rng = random.Random(8)
    for _ in range(100):
        client, server = make_sessions()
        record = bytearray(client.seal([b"hello" * 10]))
        for _ in range(rng.randint(1, 5)):
            record[rng.randrange(len(record))] = rng.randrange(256)
        events = outcome(server, [bytes(record), rng.randbytes(rng.randint(1, 50)), b""])
        assert issubclass(events[-1][0], RemoteProtocolError)


def test_whatever_a_context_raises_when_it_seals_is_an_unseal_error():
    client, _ = make_sessions()

    class Poisoned:
        trailer_size = 16

        def seal(self, message: bytes) -> tuple[bytes, bytes]:
            raise OverflowError("sequence numbers exhausted")

        def open(self, trailer: bytes, ciphertext: bytes) -> bytes:
            raise IndexError("nothing there")

    client._context._sealer = Poisoned()
    client._batches = None
    with pytest.raises(UnsealError, match="sealing failed: OverflowError"):
        client.seal([b"x"])
    client.receive_data(frame(dword(0)))
    with pytest.raises(UnsealError, match="did not open: IndexError"):
        client.next_opened()


# ---- what a program may ask for ----


@pytest.mark.parametrize("message", ["text", 5, None, [1, 2]], ids=lambda message: type(message).__name__)
def test_a_message_that_is_not_bytes_is_an_error_of_the_program_and_seals_nothing(message):
    client, server = make_sessions()
    with pytest.raises((LocalProtocolError, TypeError)):
        client.seal([b"first", message])
    assert outcome(server, [client.seal([b"next"])]) == [b"next"]


def test_a_tracer_sees_every_token_and_every_message():
    class Tracer:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def token_received(self, token: bytes) -> None:
            self.seen.append(("received", token))

        def token_made(self, token: bytes, established: bool) -> None:
            self.seen.append(("made", token, established))

        def message_sealed(self, message: bytes, trailer: bytes, ciphertext: bytes) -> None:
            self.seen.append(("sealed", message, len(trailer), len(ciphertext)))

    tracer = Tracer()
    client = Session(make_initiator(raw=True), WireFormat.FRAMED, tracer=tracer)
    server = Session(make_acceptor(), WireFormat.FRAMED)
    step_through(client, server)
    client.seal([b"hello", b"you"])
    kinds = [event[0] for event in tracer.seen]
    assert kinds == ["made", "received", "made", "sealed", "sealed"]
    assert [event[2] for event in tracer.seen if event[0] == "made"] == [False, True]
    assert all(event[1].startswith(b"NTLMSSP\0") for event in tracer.seen[:3])
    assert tracer.seen[3:] == [("sealed", b"hello", 16, 5), ("sealed", b"you", 16, 3)]


def test_a_session_without_a_tracer_does_the_same():
    session = plain_session("accept", WireFormat.FRAMED)
    assert session.seal([b"x"])


@pytest.mark.parametrize(
    "options",
    [
        {"mechanism": "digest"},
        {"mechanism": "negotiate", "raw": True},
        {"username": None},
        {"password": None},
        {"target": "server.example"},
        {"target": "host/"},
    ],
    ids=str,
)
def test_an_initiator_that_cannot_work_is_refused_when_it_is_made(options):
    with pytest.raises(ConfigurationError):
        make_initiator(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"accounts": None}, "nobody could log in"),
        ({"mechanisms": ()}, "mechanisms is empty"),
        ({"mechanisms": ("digest",)}, "unknown mechanism"),
        ({"accounts": None, "mechanisms": ("ntlm",)}, "NTLM needs accounts"),
        ({"require_target": "allow"}, "target_names"),
    ],
    ids=str,
)
def test_an_acceptor_that_cannot_work_is_refused_when_it_is_made(options, text):
    with pytest.raises(ConfigurationError, match=text):
        Acceptor(**{"accounts": AccountTable(), **options})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Acceptor(keytab="FILE:/nowhere"),
        lambda: Initiator(mechanism="kerberos", username="alice", password="x"),
        Initiator,
    ],
    ids=["acceptor", "initiator", "ticket"],
)
def test_kerberos_without_its_library_says_what_to_install(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "gssapi", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'triosspi\[kerberos\]'"):
        make()


# ---- what is demanded of a finished context that is not NTLM of pyspnego's ----


class NativeProxy:
    """A context that the system has finished, as Windows's SSPI or a Kerberos library does."""

    complete = True
    session_key = bytes(32)
    client_principal: str | None = "alice@EXAMPLE.COM"
    negotiated_protocol = "kerberos"
    spn = "host/server.example"
    context_attr = 0x3E

    def __init__(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)

    def step(self, _token: bytes | None) -> bytes:
        return b"answer"

    def query_message_sizes(self) -> Any:
        return SimpleNamespace(header=60)

    def wrap_winrm(self, message: bytes) -> Any:
        return SimpleNamespace(header=bytes(60), data=message[::-1])

    def unwrap_winrm(self, _header: bytes, data: bytes) -> bytes:
        return data[::-1]


def native_context(proxy: Any, check: Any, wire: WireFormat = WireFormat.FRAMED, adopt: Any = adopt) -> Session:
    class Credential:
        def new_context(self, demanded: ContextFlag) -> SecurityContext:
            return SecurityContext(
                "accept",
                lambda _: adopt(proxy),
                partial(check, demanded=demanded),
                demanded=demanded,
                may_block=lambda: True,
            )

    credential: Any = Credential()
    return Session(credential, wire)


@pytest.mark.parametrize(
    ("principal", "domain", "name"),
    [
        ("alice@EXAMPLE.COM", "EXAMPLE.COM", "alice"),
        ("host/a.example@EXAMPLE.COM", "EXAMPLE.COM", "host/a.example"),
        ("DOM\\alice", "DOM", "alice"),
    ],
)
def test_a_kerberos_client_is_its_principal_in_its_realm(principal, domain, name):
    session = native_context(NativeProxy(client_principal=principal), check_acceptor)
    assert session.step(b"token") == frame(b"answer")
    assert (session.peer.principal, session.peer.domain, session.peer.name) == (principal, domain, name)
    assert session.peer.mutual
    assert session.package_name == "Kerberos"


def test_a_context_seals_with_the_systems_own_layout():
    session = native_context(NativeProxy(), check_acceptor)
    session.step(b"token")
    assert session.sizes.security_trailer == 60
    assert session.seal([b"abc"]) == frame(frame(bytes(60)) + b"cba")
    assert outcome(session, [frame(frame(bytes(60)) + b"cba")]) == [b"abc"]


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"session_key": b""}, "no session key"),
        ({"client_principal": None}, "names no client"),
        ({"client_principal": ""}, "names no client"),
        (
            {"context_attr": 0x2E},
            r"lacks CONF: its client must ask for GSS_C_CONF_FLAG \(SSPI: ISC_REQ_CONFIDENTIALITY\)",
        ),
        ({"context_attr": 0x1E}, "lacks INTEG"),
        ({"context_attr": 0x3A}, "lacks REPLAY"),
        ({"context_attr": 0x36}, "lacks SEQUENCE"),
    ],
    ids=str,
)
def test_an_acceptors_context_that_lacks_something_is_refused(attributes, text):
    session = native_context(NativeProxy(**attributes), check_acceptor)
    with pytest.raises(AuthenticationError, match=text):
        session.step(b"token")
    assert not session.established


@pytest.mark.parametrize("flags", [0x10, 0x30])
def test_the_sample_demands_confidentiality_and_nothing_else(flags):
    session = native_context(NativeProxy(context_attr=flags), check_acceptor, WireFormat.SAMPLE)
    session.step(b"token")
    assert session.established
    session = native_context(NativeProxy(context_attr=0x2F), check_acceptor, WireFormat.SAMPLE)
    with pytest.raises(AuthenticationError, match="lacks CONF"):
        session.step(b"token")


def test_an_initiators_context_has_its_target_as_peer_and_the_same_demands():
    session = native_context(NativeProxy(), check_initiator)
    session.step(b"token")
    assert session.peer.principal == "host/server.example"
    assert session.peer.mutual
    session = native_context(NativeProxy(context_attr=0x32), check_initiator)
    with pytest.raises(AuthenticationError, match="lacks REPLAY, SEQUENCE"):
        session.step(b"token")


def test_an_ntlm_acceptor_that_leaves_a_flag_out_is_refused_by_our_initiator():
    # Key exchange taken out of the CHALLENGE: the session's keys would be those of the password alone.
    client, server = make_sessions(raw=True, shake=False)
    server.receive_data(client.step(None))
    challenge = bytearray(server.step(server.next_token()))
    challenge[4 + 23] &= ~0x40
    client.receive_data(challenge)
    with pytest.raises(AuthenticationError, match="the acceptor left out KEY_EXCH"):
        client.step(client.next_token())


class WrapProxy:
    """Makes and opens tokens laid out as RFC 4121's, AES's sizes, without the cryptography."""

    def __init__(self, *, encrypted: bool = True) -> None:
        self.encrypted = encrypted

    def wrap(self, message: bytes, encrypt: bool) -> Any:
        assert encrypt
        header = bytes.fromhex("050406ff00000000") + (7).to_bytes(8, "big")
        return SimpleNamespace(data=header + b"c" * 16 + message + header + b"h" * 12)

    def unwrap(self, token: bytes) -> Any:
        header, body = token[:16], token[16:]
        turn = int.from_bytes(header[6:8], "big")
        body = body[turn:] + body[:turn]
        assert body[:16] == b"c" * 16
        assert body[-12:] == b"h" * 12
        return SimpleNamespace(data=body[16:-28], encrypted=self.encrypted)


@pytest.mark.parametrize("size", [0, 1, 27, 28, 29, 1000])
def test_a_kerberos_token_is_rotated_so_that_only_the_message_is_outside_of_the_trailer(size):
    sealer = GSSWrapSealer(WrapProxy(), 60, encrypt=True)
    message = bytes(i % 256 for i in range(size))
    trailer, data = sealer.seal(message)
    assert len(trailer) == 60
    assert data == message
    assert int.from_bytes(trailer[6:8], "big") == 28
    assert sealer.open(trailer, data) == message
    assert sealer.traffic == (size > 0, size, size > 0, size)


@pytest.mark.parametrize("cut", [0, 1, 16, 59, 61, 65])
def test_a_kerberos_token_that_was_cut_elsewhere_does_not_open(cut):
    sealer = GSSWrapSealer(WrapProxy(), 60, encrypt=True)
    token = b"".join(sealer.seal(b"hello"))
    assert sealer.open(token[:60], token[60:]) == b"hello"
    with pytest.raises(UnsealError):
        sealer.open(token[:cut], token[cut:])


def test_a_kerberos_token_turned_a_whole_turn_more_does_not_open():
    sealer = GSSWrapSealer(WrapProxy(), 60, encrypt=True)
    trailer, data = sealer.seal(b"hello")
    longer = 28 + len(trailer + data) - 16
    with pytest.raises(UnsealError, match="rotation"):
        sealer.open(trailer[:6] + longer.to_bytes(2, "big") + trailer[8:], data)


def test_a_kerberos_token_that_was_not_encrypted_does_not_open():
    sealer = GSSWrapSealer(WrapProxy(encrypted=False), 60, encrypt=True)
    with pytest.raises(UnsealError, match="not encrypted"):
        sealer.open(*sealer.seal(b"hello"))


def test_a_kerberos_context_of_a_gss_library_is_rotated(monkeypatch):
    class Context(WrapProxy, KerberosInitiator):
        enctype = 18
        session_key = bytes(32)

        def __init__(self, proxy: Any) -> None:
            KerberosInitiator.__init__(self, proxy)
            self.encrypted = True

    monkeypatch.setattr(native, "_sealing", None)
    session = native_context(NativeProxy(), check_initiator, adopt=Context)
    session.step(b"token")
    data = session.seal([b"hello"])
    assert len(data) == 4 + 4 + 60 + 5
    assert data.endswith(b"hello")
