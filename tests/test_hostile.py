"""Every message of a good exchange, mutated: refused, or the same in effect; never anything else.

Seeded, so that a failure comes back. 20,000 mutants of each kind.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable, Iterator

import pytest
import spnego._ntlm

from forge import OID_NTLM, Client, hmac_md5, mech_list, neg_token_init, neg_token_resp, rc4, response_token
from framing_oracle import FrameScanner as OracleScanner
from harness import say
from triosspi import Acceptor, Account, RemoteProtocolError, WireFormat
from triosspi._framing import FrameScanner, LengthError
from triosspi.security.ntlm.accounts import AccountTable
from triosspi.security.ntlm.primitives import nt_hash
from triosspi.session.session import Session

MUTANTS = 20_000
CHALLENGE = bytes(range(8))
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def acceptor() -> Acceptor:
    table = AccountTable()
    table.add(Account("DOM", "alice", nt_hash("secret")))
    return Acceptor(accounts=table)


def mutants(good: bytes, seed: str, number: int = MUTANTS) -> Iterator[bytes]:
    """Bytes that are not ``good``: bits flipped, fields set to limits, pieces cut, doubled and moved."""
    rng = random.Random(seed)
    made = 0
    while made < number:
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            at = rng.randrange(len(data)) if data else 0
            kind = rng.randrange(7)
            if kind == 0 and data:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1 and data:
                data[at] = rng.randrange(256)
            elif kind == 2:
                del data[at : at + rng.randrange(1, 9)]
            elif kind == 3:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            elif kind == 4:
                size = rng.choice([1, 2, 4])
                value = rng.choice(INTERESTING) & (1 << 8 * size) - 1
                data[at : at + size] = value.to_bytes(size, rng.choice(["little", "big"]))
            elif kind == 5:
                del data[at:]
            else:
                piece = data[at : at + rng.randrange(1, 33)]
                data[rng.randrange(len(data) + 1) :][:0] = piece
                data += piece
        if bytes(data) != good:
            made += 1
            yield bytes(data)


@pytest.fixture
def fixed_challenge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same CHALLENGE on every login, so that one good answer serves for all."""
    monkeypatch.setattr(spnego._ntlm.os, "urandom", lambda size: CHALLENGE[:size])
    time = spnego._ntlm.FileTime.now()
    monkeypatch.setattr(spnego._ntlm.FileTime, "now", staticmethod(lambda: time))


def outcome(session: Session, token: bytes) -> str:
    """What becomes of one token; anything but our exceptions fails the test."""
    try:
        say(session, token)
    except RemoteProtocolError as exc:
        return "refused" if str(exc).isprintable() and not session.established else "refused, but not safely"
    return "established" if session.established else "answered"


def test_mutants_of_a_first_token_are_answered_or_refused(fixed_challenge: None) -> None:
    credential = acceptor()
    negotiate = Client().negotiate()
    for good in (negotiate, neg_token_init(negotiate, OID_NTLM)):
        seen = {outcome(Session(credential, WireFormat.FRAMED), m) for m in mutants(good, "first", MUTANTS // 2)}
        assert seen == {"refused", "answered"}


def test_no_mutant_of_a_negotiate_survives_the_mic(fixed_challenge: None) -> None:
    # Whatever was changed on the way in the first message, the client's MIC covers what it sent.
    credential = acceptor()
    client = Client()
    good = client.negotiate()
    answered = 0
    for mutant in mutants(good, "negotiate", 3_000):
        session = Session(credential, WireFormat.FRAMED)
        try:
            challenge = say(session, mutant)
        except RemoteProtocolError:
            continue
        answered += 1
        assert outcome(session, client.authenticate(challenge)) == "refused"
    assert answered > 1_000


def test_no_mutant_of_a_raw_authenticate_is_accepted(fixed_challenge: None) -> None:
    credential = acceptor()
    client = Client()
    session = Session(credential, WireFormat.FRAMED)
    challenge = say(session, client.negotiate())
    good = client.authenticate(challenge)
    assert outcome(session, good) == "established"
    for mutant in mutants(good, "authenticate"):
        session = Session(credential, WireFormat.FRAMED)
        assert say(session, client.negotiate()) == challenge
        assert outcome(session, mutant) == "refused"


def test_mutants_of_an_authenticate_in_spnego_are_refused_or_the_same_in_effect(fixed_challenge: None) -> None:
    credential = acceptor()
    client = Client()
    first = neg_token_init(client.negotiate(), OID_NTLM)
    session = Session(credential, WireFormat.FRAMED)
    authenticate = client.authenticate(response_token(say(session, first)))
    good = neg_token_resp(token=authenticate, mic=client.mech_list_mic(mech_list(OID_NTLM)))
    assert outcome(session, good) == "established"
    for mutant in mutants(good, "authenticate in SPNEGO"):
        session = Session(credential, WireFormat.FRAMED)
        say(session, first)
        if outcome(session, mutant) == "established":
            # Changed outside of all that is signed: a length in another form, bytes behind the end.
            assert authenticate in mutant
            assert session.peer.principal == "DOM\\alice"


READER: list[tuple[str, Callable[[bytearray], None]]] = [
    ("offset and length that overflow 32 bits together (CVE-2023-25563)", lambda m: _field(m, 20, 0xFFF0, 0xFFFFFFF0)),
    ("a length beyond the message", lambda m: _field(m, 36, 0xFFFF, 88)),
    ("an offset within the header", lambda m: _field(m, 36, 10, 12)),
    ("an offset beyond the message", lambda m: _field(m, 52, 16, 0x7FFFFFFF)),
    ("an oversized LM response (CVE-2022-2127)", lambda m: _field(m, 12, 0xFFFF, 88)),
    ("an NT response of 25 bytes", lambda m: _field(m, 20, 25, 112)),
    ("an NT response of 43 bytes", lambda m: _field(m, 20, 43, 112)),
    ("a session key of 8 bytes", lambda m: _length(m, 52, 8)),
    ("a user name of odd length", lambda m: _length(m, 36, 9)),
    ("another message type", lambda m: m.__setitem__(8, 2)),
    ("no signature", lambda m: m.__setitem__(0, 0)),
    ("63 bytes", lambda m: m.__delitem__(slice(63, None))),
]


def _field(message: bytearray, position: int, length: int, offset: int) -> None:
    struct.pack_into("<HHI", message, position, length, length, offset)


def _length(message: bytearray, position: int, length: int) -> None:
    struct.pack_into("<HH", message, position, length, length)


@pytest.mark.parametrize(("name", "spoil"), READER, ids=[name for name, _ in READER])
def test_the_reader_refuses(name: str, spoil: Callable[[bytearray], None]) -> None:
    session = Session(acceptor(), WireFormat.FRAMED)
    client = Client()
    message = bytearray(client.authenticate(say(session, client.negotiate())))
    spoil(message)
    assert outcome(session, bytes(message)) == "refused"


ASN1 = {
    "nothing but a tag": b"\x60",
    "an indefinite length": b"\x60\x80" + neg_token_init(None, OID_NTLM)[2:] + bytes(2),
    "a length of 126 bytes": b"\x60\xfe" + b"\xff" * 126,
    "a length beyond the token": b"\x60\x84\x7f\xff\xff\xff" + neg_token_init(None, OID_NTLM)[2:],
    "depth (CVE-2020-28196)": b"\x60\x82\x40\x08" + bytes.fromhex("06062b0601050502") + b"\xa0\x80" * 8192,
    "no mechanism at all": neg_token_init(b"\x01"),
    "10,000 mechanisms": neg_token_init(b"\x01", *[b"\x06\x03\x2a\x03\x04"] * 10_000)[:60_000],
    "a NEGOEX header cut short": neg_token_init(b"NEGOEXTS\0\0\0\0", bytes.fromhex("060a2b06010401823702021e")),
    "a DCE-style AP-REQ": b"\x6e\x82\x01\x00" + bytes(256),
    "an OID of no end": b"\x60\x06\x06\x04\xff\xff\xff\xff",
}


@pytest.mark.parametrize("token", ASN1.values(), ids=ASN1)
def test_a_first_token_is_refused_that_is_malformed_by(token: bytes) -> None:
    assert outcome(Session(acceptor(), WireFormat.FRAMED), token) == "refused"


def test_an_empty_second_spnego_token_is_refused() -> None:
    # CVE-2014-4344.
    session = Session(acceptor(), WireFormat.FRAMED)
    say(session, neg_token_init(Client().negotiate(), OID_NTLM))
    for empty in (b"\xa1\x00", b"\xa1\x02\x30\x00"):
        assert outcome(session, empty) in {"refused", "answered"}
        assert not session.established


def test_a_second_first_token_does_not_start_anew() -> None:
    # CVE-2015-2695: contexts doubled or aliased.
    client = Client()
    session = Session(acceptor(), WireFormat.FRAMED)
    first = neg_token_init(client.negotiate(), OID_NTLM)
    challenge = response_token(say(session, first))
    assert outcome(session, first) == "refused"
    assert outcome(session, neg_token_resp(token=client.authenticate(challenge))) == "refused"


def test_an_exchange_that_goes_nowhere_ends_at_once() -> None:
    session = Session(acceptor(), WireFormat.FRAMED)
    say(session, neg_token_init(None, OID_NTLM))
    assert outcome(session, neg_token_resp(state=1)) == "refused"


def test_mutants_of_a_sealed_record_never_open() -> None:
    _server, record = _sealed_pair()
    refused = 0
    for mutant in mutants(record, "record", 2_000):
        server, record = _sealed_pair()
        server.receive_data(mutant)
        try:
            messages = server.next_opened()
        except RemoteProtocolError:
            refused += 1
            continue
        # More bytes are announced than came, or they stand behind a record that was whole.
        assert messages == [] or (messages == [b"attack at dawn"] and mutant.startswith(record))
    assert refused > 500


def _sealed_pair() -> tuple[Session, bytes]:
    """An established session, and its client's first record by the client's own arithmetic."""
    client = Client()
    server = Session(acceptor(), WireFormat.FRAMED)
    challenge = say(server, client.negotiate())
    assert outcome(server, client.authenticate(challenge)) == "established"
    message = b"attack at dawn"
    key = client.session_key
    sign = hashlib.md5(key + b"session key to client-to-server signing key magic constant\0").digest()
    seal = hashlib.md5(key + b"session key to client-to-server sealing key magic constant\0").digest()
    stream = rc4(seal, message + hmac_md5(sign, bytes(4) + message)[:8])
    trailer = b"\1\0\0\0" + stream[len(message) :] + bytes(4)
    body = struct.pack("<I", 16) + trailer + stream[: len(message)]
    return server, struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("pieces", ["whole", "byte by byte", "random"])
def test_mutants_of_a_stream_of_frames_give_the_events_of_the_reference(pieces: str) -> None:
    good = b"".join(struct.pack("<I", size) + bytes([size]) * size for size in (0, 1, 5, 40, 2, 0, 17))
    rng = random.Random(pieces)
    for mutant in mutants(good, pieces, MUTANTS // 3):
        ours, reference = FrameScanner(64), OracleScanner(64)
        position = 0
        while position < len(mutant):
            size = {"whole": len(mutant), "byte by byte": 1, "random": rng.randrange(1, 30)}[pieces]
            piece = mutant[position : position + size]
            position += size
            events = []
            for scanner in (ours, reference):
                scanner.feed(piece)
                try:
                    events.append((scanner.frames(), scanner.at_boundary))
                except ValueError as exc:
                    events.append(("too long", exc.length))  # type: ignore[attr-defined]
            assert events[0] == events[1]
    assert issubclass(LengthError, ValueError)
