"""NTLM's primitives, held to what others have published."""

from __future__ import annotations

import random

import pytest
from spnego._ntlm_raw.md4 import md4 as reference_md4

from forge import nt_hash as reference_nt_hash
from forge import rc4 as reference_rc4
from triosspi.security.ntlm.primitives import channel_bindings_hash, hmac_md5, md4, nt_hash, ntowf_v2, rc4k

# RFC 1320 A.5.
MD4 = {
    b"": "31d6cfe0d16ae931b73c59d7e0c089c0",
    b"a": "bde52cb31de33e46245e05fbdbd6fb24",
    b"abc": "a448017aaf21d8525fc10ae87aa6729d",
    b"message digest": "d9130a8164549fe818874806e1c7014b",
    b"abcdefghijklmnopqrstuvwxyz": "d79e1c308aa5bbcdeea8ed63df412da9",
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789": "043f8582f241db351ce627e153e7f0e4",
    b"1234567890" * 8: "e33b4ddc9c38f2199c3e7b164fcc0536",
}


@pytest.mark.parametrize(("data", "digest"), MD4.items())
def test_md4_gives_the_rfcs_values(data: bytes, digest: str) -> None:
    assert md4(data).hex() == digest


def test_md4_is_pyspnegos_at_every_length_around_its_blocks() -> None:
    rng = random.Random("md4")
    for size in range(260):
        data = rng.randbytes(size)
        assert md4(data) == reference_md4(data)


def test_the_nt_hash_is_md4_of_the_utf16_password() -> None:
    # [MS-NLMP] 4.2.2.1.2: "Password".
    assert nt_hash("Password").hex() == "a4f49c406510bdcab6824ee7c30fd852"
    assert nt_hash("").hex() == "31d6cfe0d16ae931b73c59d7e0c089c0"
    assert nt_hash("pässwörd€") == reference_nt_hash("pässwörd€")


def test_a_password_that_is_no_text_has_an_nt_hash_too() -> None:
    # Half a surrogate pair, as a terminal that is not UTF-8 gives it.
    assert len(nt_hash("\udc80")) == 16


# RFC 6229, the 128-bit keys: the first 32 bytes of the key stream.
RC4 = {
    "0102030405060708090a0b0c0d0e0f10": "9ac7cc9a609d1ef7b2932899cde41b975248c4959014126a6e8a84f11d1a9e1c",
    "ebb46227c6cc8b37641910833222772a": "720c94b63edf44e131d950ca211a5a30c366fdeacf9ca80436be7c358424d20b",
}


@pytest.mark.parametrize(("key", "stream"), RC4.items())
def test_rc4_gives_the_rfcs_values(key: str, stream: str) -> None:
    assert rc4k(bytes.fromhex(key), bytes(32)).hex() == stream


def test_rc4_takes_each_key_anew() -> None:
    key = bytes(range(1, 17))
    assert rc4k(key, b"one") == rc4k(key, b"one") == reference_rc4(key, b"one")
    assert rc4k(key, rc4k(key, b"one")) == b"one"


def test_the_keys_of_an_account_are_the_published_one_and_pyspnegos_spelling() -> None:
    # [MS-NLMP] 4.2.4.1.1: User, Domain, "Password".
    assert [key.hex() for key in ntowf_v2("User", "Domain", nt_hash("Password"))] == [
        "0c868a403bfd7a93a3001ef22ef02e3f"
    ]
    simple, full = ntowf_v2("straße", "", bytes(16))
    assert simple == hmac_md5(bytes(16), "STRAßE".encode("utf-16-le"))
    assert full == hmac_md5(bytes(16), "STRASSE".encode("utf-16-le"))


def test_channel_bindings_are_hashed_as_md5() -> None:
    assert channel_bindings_hash(b"").hex() == "d41d8cd98f00b204e9800998ecf8427e"
