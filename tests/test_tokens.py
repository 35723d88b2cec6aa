"""SPNEGO's tokens, against ones written by hand; what the acceptor makes of them: ``test_spnego_acceptor.py``."""

from __future__ import annotations

import random

import pytest

from forge import (
    ACCEPT_COMPLETED,
    OID_KERBEROS,
    OID_NTLM,
    REQUEST_MIC,
    Client,
    der,
    mech_list,
    neg_token_init,
    neg_token_resp,
)
from triosspi import AuthenticationError
from triosspi.security.spnego.tokens import (
    NegTokenResp,
    first_token_kind,
    read_neg_token_init,
    read_neg_token_resp,
    write_neg_token_resp,
)

SIZES = [1, 0x7E, 0x7F, 0x80, 0xFF, 0x100, 0xFFFF, 0x10000]


@pytest.mark.parametrize("size", SIZES)
def test_a_first_token_of_any_length_is_read(size: int) -> None:
    token = bytes(size)
    first = read_neg_token_init(neg_token_init(token, OID_KERBEROS, OID_NTLM))
    assert first.mech_types == mech_list(OID_KERBEROS, OID_NTLM)
    assert first.offered == [OID_KERBEROS[2:], OID_NTLM[2:]]
    assert first.mech_token == token


def test_a_first_token_may_come_without_its_outer_frame() -> None:
    bare = der(0xA0, der(0x30, der(0xA0, mech_list(OID_NTLM)) + der(0xA2, der(0x04, b"1"))))
    assert read_neg_token_init(bare).mech_token == b"1"


def test_a_first_token_may_have_no_guess() -> None:
    assert read_neg_token_init(neg_token_init(None, OID_NTLM)).mech_token is None


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_what_is_read(size: int) -> None:
    token, mic = bytes(size), bytes(16)
    written = write_neg_token_resp(ACCEPT_COMPLETED, mechanism=OID_NTLM[2:], token=token, mic=mic)
    assert written == neg_token_resp(state=ACCEPT_COMPLETED, mech=OID_NTLM, token=token, mic=mic)
    assert read_neg_token_resp(written) == NegTokenResp(ACCEPT_COMPLETED, True, token, mic)


def test_what_a_token_leaves_out_is_none() -> None:
    assert read_neg_token_resp(neg_token_resp()) == NegTokenResp(None, False, None, None)
    assert write_neg_token_resp(REQUEST_MIC) == neg_token_resp(state=REQUEST_MIC)


def test_nothing_but_a_refusal_comes_out_of_what_is_malformed() -> None:
    rng = random.Random("tokens")
    good = neg_token_resp(state=ACCEPT_COMPLETED, token=b"x" * 200, mic=bytes(16))
    refused = 0
    for _ in range(20_000):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.choice([0, 0x7F, 0x80, 0x84, 0xFF, rng.randrange(256)])
        try:
            read_neg_token_resp(bytes(data))
        except AuthenticationError:
            refused += 1
    assert 1000 < refused < 20_000


AP_REQ = OID_KERBEROS + b"\x01\x00" + bytes(8)


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        (Client().negotiate(), "ntlm"),
        (neg_token_init(b"x" * 300, OID_NTLM), "spnego"),
        (der(0xA0, der(0x30, der(0xA0, mech_list(OID_NTLM)))), "spnego"),
        (der(0x60, AP_REQ), "kerberos"),
        (der(0x60, AP_REQ + bytes(300)), "kerberos"),
    ],
)
def test_a_first_token_is_known_by_its_beginning(token: bytes, kind: str) -> None:
    assert first_token_kind(token) == kind


@pytest.mark.parametrize(
    "token",
    [
        b"",
        b"\x60",
        b"NTLMSSP",
        der(0x60, AP_REQ)[:-1],
        der(0x60, AP_REQ) + b"\0",
        der(0x60, OID_NTLM),
        b"GET / HTTP/1.1",
    ],
)
def test_what_is_no_first_token_is_refused(token: bytes) -> None:
    with pytest.raises(AuthenticationError, match="neither SPNEGO, nor NTLM, nor Kerberos"):
        first_token_kind(token)
