"""SPNEGO's acceptor, around a mechanism that does as it is told."""

from __future__ import annotations

import random

import pytest

from forge import (
    ACCEPT_COMPLETED,
    ACCEPT_INCOMPLETE,
    OID_KERBEROS,
    OID_NTLM,
    REJECT,
    REQUEST_MIC,
    der,
    mech_list,
    neg_token_init,
    neg_token_resp,
)
from triosspi import AuthenticationError
from triosspi.security.spnego.acceptor import SPNEGOAcceptor

OID_MS_KERBEROS = bytes.fromhex("06092a864882f712010202")
OID_NEGOEX = bytes.fromhex("060a2b06010401823702021e")


class Mechanism:
    """Answers each token, is complete after some; its MIC is the data behind a word."""

    def __init__(self, steps: int) -> None:
        self.tokens: list[bytes] = []
        self.restarts: list[bool] = []
        self._steps = steps

    @property
    def complete(self) -> bool:
        return self.steps_left <= 0

    @property
    def steps_left(self) -> int:
        return self._steps - len(self.tokens)

    def step(self, in_token: bytes) -> bytes | None:
        self.tokens.append(in_token)
        return b"re:" + in_token

    def sign(self, data: bytes) -> bytes:
        return b"acceptor " + data

    def verify(self, data: bytes, mic: bytes) -> None:
        if mic != b"initiator " + data:
            raise ValueError("a wrong MIC")

    def restart_rc4(self, *, outgoing: bool) -> None:
        self.restarts.append(outgoing)


class Exchange:
    def __init__(self, *, kerberos: int | None = 1, ntlm: int | None = 2) -> None:
        self.made: dict[str, Mechanism] = {}
        steps = {"kerberos": kerberos, "ntlm": ntlm}
        factories = {name: self._factory(name, number) for name, number in steps.items() if number is not None}
        self.acceptor = SPNEGOAcceptor(factories)  # type: ignore[arg-type]

    def _factory(self, name: str, steps: int):  # type: ignore[no-untyped-def]
        def make() -> Mechanism:
            assert not self.made
            return self.made.setdefault(name, Mechanism(steps))

        return make

    def say(self, token: bytes) -> bytes | None:
        return self.acceptor.step(token)


def mic_of(*oids: bytes) -> bytes:
    return b"initiator " + mech_list(*oids)


def our_mic(*oids: bytes) -> bytes:
    return b"acceptor " + mech_list(*oids)


def test_the_first_choice_that_is_done_at_once_needs_no_mic() -> None:
    exchange = Exchange()
    answer = exchange.say(neg_token_init(b"ap-req", OID_KERBEROS, OID_NTLM))
    assert answer == neg_token_resp(state=ACCEPT_COMPLETED, mech=OID_KERBEROS, token=b"re:ap-req")
    acceptor = exchange.acceptor
    assert acceptor.complete and acceptor.first_offer_chosen
    assert not acceptor.mic_sent and not acceptor.mic_verified
    assert set(exchange.made) == {"kerberos"}


def test_the_answer_names_the_mechanism_as_the_client_did() -> None:
    answer = Exchange().say(neg_token_init(b"ap-req", OID_MS_KERBEROS, OID_KERBEROS, OID_NTLM))
    assert answer == neg_token_resp(state=ACCEPT_COMPLETED, mech=OID_MS_KERBEROS, token=b"re:ap-req")


def test_two_steps_end_with_both_mics() -> None:
    exchange = Exchange(kerberos=None)
    assert exchange.say(neg_token_init(b"1", OID_NTLM)) == neg_token_resp(
        state=REQUEST_MIC, mech=OID_NTLM, token=b"re:1"
    )
    assert not exchange.acceptor.complete
    answer = exchange.say(neg_token_resp(token=b"2", mic=mic_of(OID_NTLM)))
    assert answer == neg_token_resp(state=ACCEPT_COMPLETED, token=b"re:2", mic=our_mic(OID_NTLM))
    assert exchange.acceptor.complete and exchange.acceptor.mic_verified and exchange.acceptor.mic_sent
    # Each direction's crypto begins anew after its MIC, the verified one first.
    assert exchange.made["ntlm"].restarts == [False, True]


@pytest.mark.parametrize(
    ("offered", "guess", "state"),
    [
        pytest.param((OID_KERBEROS, OID_NTLM), b"guess", ACCEPT_COMPLETED, id="kerberos-first"),
        pytest.param((OID_MS_KERBEROS, OID_NTLM), b"guess", ACCEPT_COMPLETED, id="kerberos-first-by-windows-number"),
        pytest.param((OID_KERBEROS, OID_NTLM), None, ACCEPT_INCOMPLETE, id="kerberos-first-without-a-guess"),
        pytest.param((OID_NTLM, OID_KERBEROS), b"guess", REQUEST_MIC, id="kerberos-not-first"),
        pytest.param((OID_NEGOEX, OID_MS_KERBEROS), b"guess", REQUEST_MIC, id="kerberos-behind-a-stranger"),
        pytest.param((OID_NTLM,), b"guess", REQUEST_MIC, id="ntlm-first"),
        pytest.param((OID_NTLM,), None, REQUEST_MIC, id="ntlm-first-without-a-guess"),
        pytest.param((OID_NEGOEX, OID_NTLM), b"guess", REQUEST_MIC, id="ntlm-not-first"),
    ],
)
def test_the_first_answers_state_tells_the_client_whether_a_mic_will_follow(
    offered: tuple[bytes, ...], guess: bytes | None, state: int
) -> None:
    """After accept-incomplete .NET takes its own last token for the end, and our MIC for the first message."""
    exchange = Exchange()
    answer = exchange.say(neg_token_init(guess, *offered))
    # a1 LENGTH 30 LENGTH, then the first field: a0 03 0a 01 STATE.
    assert answer is not None
    assert answer[:1] + answer[2:3] + answer[4:9] == bytes([0xA1, 0x30, 0xA0, 3, 0x0A, 1, state])
    # And it was the truth, to a client that signs the list where it was asked to, and nowhere else.
    (mechanism,) = exchange.made.values()
    while not exchange.acceptor.complete:
        mic = mic_of(*offered) if state == REQUEST_MIC and mechanism.steps_left == 1 else None
        assert exchange.say(neg_token_resp(token=b"next", mic=mic))
    assert exchange.acceptor.mic_sent is (state == REQUEST_MIC)


def test_a_mic_that_nobody_asked_for_is_verified_and_answered() -> None:
    exchange = Exchange()
    exchange.say(neg_token_init(None, OID_KERBEROS, OID_NTLM))
    oids = (OID_KERBEROS, OID_NTLM)
    answer = exchange.say(neg_token_resp(token=b"ap-req", mic=mic_of(*oids)))
    assert answer == neg_token_resp(state=ACCEPT_COMPLETED, token=b"re:ap-req", mic=our_mic(*oids))
    assert exchange.acceptor.complete and exchange.acceptor.mic_verified


def test_a_guess_for_another_mechanism_is_ignored_and_the_mic_demanded() -> None:
    exchange = Exchange(kerberos=None)
    oids = (OID_NEGOEX, OID_KERBEROS, OID_NTLM)
    assert exchange.say(neg_token_init(b"guess", *oids)) == neg_token_resp(state=REQUEST_MIC, mech=OID_NTLM)
    assert exchange.made["ntlm"].tokens == []
    assert exchange.say(neg_token_resp(token=b"1")) == neg_token_resp(state=ACCEPT_INCOMPLETE, token=b"re:1")
    answer = exchange.say(neg_token_resp(token=b"2", mic=mic_of(*oids)))
    assert answer == neg_token_resp(state=ACCEPT_COMPLETED, token=b"re:2", mic=our_mic(*oids))
    assert exchange.acceptor.complete and not exchange.acceptor.first_offer_chosen


def test_a_client_without_a_guess_is_asked_for_its_first_token() -> None:
    exchange = Exchange(kerberos=None)
    assert exchange.say(neg_token_init(None, OID_NTLM)) == neg_token_resp(state=REQUEST_MIC, mech=OID_NTLM)
    assert exchange.say(neg_token_resp(token=b"1")) == neg_token_resp(state=ACCEPT_INCOMPLETE, token=b"re:1")


def test_a_mic_may_come_in_a_token_of_its_own_and_is_not_answered_then() -> None:
    # Kerberos, not the client's first choice: it has no key for the MIC before our answer.
    exchange = Exchange()
    oids = (OID_NTLM, OID_KERBEROS)
    assert exchange.say(neg_token_init(b"guess", *oids)) == neg_token_resp(state=REQUEST_MIC, mech=OID_KERBEROS)
    answer = exchange.say(neg_token_resp(token=b"ap-req"))
    assert answer == neg_token_resp(state=ACCEPT_INCOMPLETE, token=b"re:ap-req", mic=our_mic(*oids))
    assert not exchange.acceptor.complete
    assert exchange.say(neg_token_resp(state=ACCEPT_COMPLETED, mic=mic_of(*oids))) is None
    assert exchange.acceptor.complete


@pytest.mark.parametrize("last", [neg_token_resp(state=ACCEPT_COMPLETED), neg_token_resp(state=ACCEPT_INCOMPLETE)])
def test_a_mic_that_never_comes_is_missed(last: bytes) -> None:
    exchange = Exchange(kerberos=None)
    exchange.say(neg_token_init(b"1", OID_NTLM))
    exchange.say(neg_token_resp(token=b"2"))
    with pytest.raises(AuthenticationError, match="mechListMIC is missing"):
        exchange.say(last)
    assert not exchange.acceptor.complete


@pytest.mark.parametrize(
    ("last", "error"),
    [
        (neg_token_resp(token=b"2", mic=b"acceptor " + mech_list(OID_NTLM)), "a wrong MIC"),
        (neg_token_resp(token=b"2", mic=mic_of(OID_KERBEROS, OID_NTLM)), "a wrong MIC"),
        (neg_token_resp(token=b"2", state=REJECT), "the client rejects"),
        (neg_token_resp(token=b"2", mech=OID_NTLM), "names a mechanism"),
        (neg_token_resp(mic=mic_of(OID_NTLM)), "before there is a key"),
        (neg_token_resp(), "nobody has authenticated"),
        (neg_token_resp(state=ACCEPT_COMPLETED), "nobody has authenticated"),
        (neg_token_init(b"2", OID_NTLM), "malformed"),
        (b"NTLMSSP\0", "malformed"),
    ],
)
def test_what_is_out_of_place_is_refused(last: bytes, error: str) -> None:
    exchange = Exchange(kerberos=None)
    exchange.say(neg_token_init(b"1", OID_NTLM))
    with pytest.raises((AuthenticationError, ValueError), match=error):
        exchange.say(last)
    assert not exchange.acceptor.complete


def test_a_token_repeated_in_the_place_of_the_mic_counts_as_none() -> None:
    exchange = Exchange(kerberos=None)
    exchange.say(neg_token_init(b"1", OID_NTLM))
    exchange.say(neg_token_resp(token=b"2", mic=b"2"))
    assert not exchange.acceptor.mic_verified and not exchange.acceptor.complete


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(AuthenticationError, match="no mechanism that is enabled"):
        Exchange(ntlm=None).say(neg_token_init(b"1", OID_NTLM, OID_NEGOEX))


GOOD = neg_token_init(b"x" * 200, OID_KERBEROS, OID_NTLM)


@pytest.mark.parametrize(
    "token",
    [
        b"",
        b"\x60",
        b"\x60\x00",
        GOOD + b"\0",
        GOOD[:-1],
        # Lengths: indefinite, not the shortest, of too many bytes.
        b"\x60\x80" + GOOD[3:] + bytes(2),
        b"\x60\x82\x00" + GOOD[2:],
        b"\x60\x81\x05" + bytes(5),
        b"\x60\x85\x00\x00\x00\x00\xff" + GOOD[3:],
        # Another mechanism's token, no mechTypes, an empty list, a list of something else, fields out of order.
        der(0x60, OID_KERBEROS + der(0xA0, der(0x30, der(0xA0, mech_list(OID_NTLM))))),
        der(0xA0, der(0x30, b"")),
        der(0xA0, der(0x30, der(0xA0, der(0x30, b"")))),
        der(0xA0, der(0x30, der(0xA0, der(0x30, der(0x04, b"x"))))),
        der(0xA0, der(0x30, der(0xA2, der(0x04, b"x")) + der(0xA0, mech_list(OID_NTLM)))),
        der(0xA0, der(0x30, der(0xA0, mech_list(OID_NTLM)) * 2)),
        der(0xA0, der(0x30, der(0xA0, mech_list(OID_NTLM)) + der(0xA2, der(0x30, b"x")))),
        der(0xA0, der(0x30, der(0xA0, mech_list(*[OID_NEGOEX] * 33)))),
    ],
)
def test_a_malformed_first_token_is_refused(token: bytes) -> None:
    exchange = Exchange()
    with pytest.raises(AuthenticationError, match="malformed"):
        exchange.say(token)
    assert not exchange.made


def test_a_first_token_may_come_without_its_outer_frame() -> None:
    bare = der(0xA0, der(0x30, der(0xA0, mech_list(OID_NTLM)) + der(0xA2, der(0x04, b"1"))))
    assert Exchange(kerberos=None).say(bare) == neg_token_resp(state=REQUEST_MIC, mech=OID_NTLM, token=b"re:1")


def test_req_flags_and_hints_are_left_alone() -> None:
    flags = der(0xA1, der(0x03, b"\x01\x06"))
    hints = der(0xA3, der(0x30, der(0xA0, der(0x1B, b"not_defined_in_RFC4178@please_ignore"))))
    token = der(0xA0, der(0x30, der(0xA0, mech_list(OID_NTLM)) + flags + der(0xA2, der(0x04, b"1")) + hints))
    assert Exchange(kerberos=None).say(token)


def test_mutants_are_refused_or_answered_and_nothing_else() -> None:
    rng = random.Random("spnego")
    seen = set()
    for _ in range(20_000):
        data = bytearray(GOOD)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.choice([0, 0x7F, 0x80, 0x84, 0xFF, rng.randrange(256)])
        try:
            seen.add(bool(Exchange().say(bytes(data))))
        except AuthenticationError:
            seen.add(False)
    assert seen == {True, False}
