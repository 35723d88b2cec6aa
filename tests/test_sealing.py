"""`triosspi._sealing` against published vectors, a reference in plain Python, pyspnego and MIT's libgssapi."""

from __future__ import annotations

import copy
import ctypes
import ctypes.util
import functools
import gc
import inspect
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from spnego._ntlm_raw.crypto import RC4Handle, sealkey, signkey
from spnego._ntlm_raw.messages import NegotiateFlags
from spnego._ntlm_raw.security import seal as pyspnego_seal

import sealing_reference as reference
from compiling import compile_without_a_warning
from peers.kerberos.fixtures import MitKdc
from peers.requirements import require

try:
    from triosspi import _sealing
except ImportError:
    if os.environ.get("CI", "").lower() not in ("", "0", "false", "no"):
        raise
    pytest.skip("built without OpenSSL's headers", allow_module_level=True)

from triosspi._sealing import KerberosSealer, NTLMSealer, SealingError, available

ROOT = Path(__file__).resolve().parent.parent
ENCTYPES = sorted(reference.ENCTYPES)
TRAILERS = {17: 60, 18: 60, 19: 64, 20: 72}
KEY = bytes(range(32))
NTLM_LAST = 2**32 - 1

Sealer = NTLMSealer | KerberosSealer
Pair = tuple[Sealer, Sealer]


def from_hex(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


def ntlm(initiator: bool = True, sends: int = 0, receives: int = 0, key: bytes = KEY[:16]) -> NTLMSealer:
    return NTLMSealer(key, initiator=initiator, send_sequence=sends, receive_sequence=receives)


def kerberos(
    enctype: int = 18, initiator: bool = True, sends: int = 0, receives: int = 0, *, subkey: bool = True
) -> KerberosSealer:
    return KerberosSealer(
        KEY[: reference.ENCTYPES[enctype].key_size],
        enctype,
        initiator=initiator,
        acceptor_subkey=subkey,
        send_sequence=sends,
        receive_sequence=receives,
    )


def make(kind: str, initiator: bool = True, sends: int = 0, receives: int = 0) -> Sealer:
    if kind == "ntlm":
        return ntlm(initiator, sends, receives)
    return kerberos(int(kind), initiator, sends, receives)


def pair(kind: str) -> Pair:
    return make(kind, True), make(kind, False)


KINDS = ["ntlm", *map(str, ENCTYPES)]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_side = pytest.mark.parametrize("initiator", [True, False], ids=["initiator", "acceptor"])
each_enctype = pytest.mark.parametrize("enctype", ENCTYPES)


def split_frames(data: bytes) -> list[bytes]:
    """The payloads of length-prefixed frames."""
    frames = []
    while data:
        length = int.from_bytes(data[:4], "little")
        assert length <= len(data) - 4
        frames.append(data[4 : 4 + length])
        data = data[4 + length :]
    return frames


def frame(trailer: bytes, ciphertext: bytes) -> bytes:
    return len(trailer).to_bytes(4, "little") + trailer + ciphertext


def divided(token: bytes, size: int) -> tuple[bytes, bytes]:
    """A token where whoever has it of gss_wrap cuts it: the ciphertext is as long as the message, ``size`` bytes."""
    return token[: len(token) - size], token[len(token) - size :]


def refused(opener: Sealer, trailer: bytes, ciphertext: bytes) -> None:
    """One sealer can refuse once: both ways in are tried by different tests."""
    with pytest.raises(SealingError):
        opener.open(trailer, ciphertext)


def sizes_around_blocks() -> list[int]:
    edges = [16 * n for n in (5, 8, 16, 64, 125, 126, 127, 128, 129, 256)]
    return [*range(65), *(edge + step for edge in edges for step in (-1, 0, 1))]


# ---- published vectors ----


def test_the_reference_gives_the_n_folds_of_rfc_3961() -> None:
    for text, size, folded in [
        (b"012345", 8, "be072631276b1955"),
        (b"password", 7, "78a07b6caf85fa"),
        (b"Rough Consensus, and Running Code", 8, "bb6ed30870b7f0e0"),
        (b"password", 21, "59e4a8ca7c0385c3c37b3f6d2000247cb6e6bd5b3e"),
        (b"MASSACHVSETTS INSTITVTE OF TECHNOLOGY", 24, "db3b0d8f0b061e603282b308a50841229ad798fab9540c1b"),
        (b"Q", 21, "518a54a215a8452a518a54a215a8452a518a54a215"),
        (b"ba", 21, "fb25d531ae8974499f52fd92ea9857c4ba24cf297e"),
        (b"kerberos", 16, "6b65726265726f737b9b5b2b93132b93"),
    ]:
        assert reference.n_fold(text, size).hex() == folded


CHICKEN = b"I would like the General Gau's Chicken, please, and wonton soup."


def test_the_reference_gives_the_ciphertexts_of_rfc_3962() -> None:
    for size, ciphertext in [
        (17, "c6353568f2bf8cb4d8a580362da7ff7f97"),
        (31, "fc00783e0efdb2c1d445d4c8eff7ed2297687268d6ecccc0c07b25e25ecfe5"),
        (32, "39312523a78662d5be7fcbcc98ebf5a897687268d6ecccc0c07b25e25ecfe584"),
        (
            47,
            "97687268d6ecccc0c07b25e25ecfe584b3fffd940c16a18c1b5549d2f838029e39312523a78662d5be7fcbcc98ebf5",
        ),
        (
            48,
            "97687268d6ecccc0c07b25e25ecfe5849dad8bbb96c4cdc03bc103e1a194bbd839312523a78662d5be7fcbcc98ebf5a8",
        ),
        (
            64,
            (
                "97687268d6ecccc0c07b25e25ecfe58439312523a78662d5be7fcbcc98ebf5a8"
                "4807efe836ee89a526730dbc2f7bc8409dad8bbb96c4cdc03bc103e1a194bbd8"
            ),
        ),
    ]:
        assert reference.cts_encrypt(b"chicken teriyaki", CHICKEN[:size]).hex() == ciphertext
        assert reference.cts_decrypt(b"chicken teriyaki", from_hex(ciphertext)) == CHICKEN[:size]


# Of RFC 8009's appendix A, and for RFC 3962's enctypes those that come with MIT krb5 (its t_derive.c), all usage 2.
DERIVED = [
    (17, "42263c6e89f4fc28b8df68ee09799f15", "aa", "5b14fc4e250e14ddf9dccf1af6674f53"),
    (17, "42263c6e89f4fc28b8df68ee09799f15", "55", "4ed31063621684f09ae8d89991af3e8f"),
    (
        18,
        "fe697b52bc0d3ce14432ba036a92e65bbb52280990a2fa27883998d72af30161",
        "aa",
        "c7cfd9cd75fe793a586a542d87e0d1396f1134a104bb1a9190b8c90ada3ddf37",
    ),
    (
        18,
        "fe697b52bc0d3ce14432ba036a92e65bbb52280990a2fa27883998d72af30161",
        "55",
        "97151b4c76945063e2eb0529dc067d97d7bba90776d8126d91f34f3101aea8ba",
    ),
    (19, "3705d96080c17728a0e800eab6e0d23c", "aa", "9b197dd1e8c5609d6e67c3e37c62c72e"),
    (19, "3705d96080c17728a0e800eab6e0d23c", "55", "9fda0e56ab2d85e1569a688696c26a6c"),
    (
        20,
        "6d404d37faf79f9df0d33568d320669800eb4836472ea8a026d16b7182460c52",
        "aa",
        "56ab22bee63d82d7bc5227f6773f8ea7a5eb1c825160c38312980c442e5c7e49",
    ),
    (
        20,
        "6d404d37faf79f9df0d33568d320669800eb4836472ea8a026d16b7182460c52",
        "55",
        "69b16514e3cd8e56b82010d5c73012b622c4d00ffc23ed1f",
    ),
]


@pytest.mark.parametrize(("enctype", "key", "purpose", "derived"), DERIVED)
def test_the_reference_derives_the_published_keys(enctype: int, key: str, purpose: str, derived: str) -> None:
    constant = bytes([0, 0, 0, 2]) + from_hex(purpose)
    size = len(derived) // 2
    assert reference.derive(reference.ENCTYPES[enctype], from_hex(key), constant, size).hex() == derived


@each_enctype
@each_side
def test_the_extension_derives_keys_as_the_reference_does(enctype: int, initiator: bool) -> None:
    """A sealer keeps its four keys to itself: what they seal and open is what shows them.

    The encryption key and the MAC's of each key usage: a wrong one of either, and the message does not open.
    """
    rng = random.Random(enctype)
    kind = reference.ENCTYPES[enctype]
    for _ in range(50):
        key, confounder, message = rng.randbytes(kind.key_size), rng.randbytes(16), rng.randbytes(rng.randrange(1, 70))
        sealer = KerberosSealer(
            key, enctype, initiator=initiator, acceptor_subkey=True, send_sequence=5, receive_sequence=7
        )
        ours = b"".join(sealer.seal(message))
        opened = reference.unwrap(kind, key, ours, by_initiator=initiator, acceptor_subkey=True, sequence=5)
        assert opened == message
        rotation = kind.mac_size + 16
        theirs = reference.wrap(
            kind,
            key,
            message,
            confounder=confounder,
            by_initiator=not initiator,
            acceptor_subkey=True,
            sequence=7,
            rotation=rotation,
        )
        assert sealer.open(*divided(theirs, len(message))) == message


def test_the_reference_gives_the_ciphertexts_of_rfc_8009() -> None:
    plaintexts = [bytes(range(size)) for size in (0, 6, 16, 21)]
    samples = {
        19: (
            "3705d96080c17728a0e800eab6e0d23c",
            [
                (
                    "7e5895eaf2672435bad817f545a37148",
                    "ef85fb890bb8472f4dab20394dca781dad877eda39d50c870c0d5a0a8e48c718",
                ),
                (
                    "7bca285e2fd4130fb55b1a5c83bc5b24",
                    "84d7f30754ed987bab0bf3506beb09cfb55402cef7e6877ce99e247e52d16ed4421dfdf8976c",
                ),
                (
                    "56ab21713ff62c0a1457200f6fa9948f",
                    "3517d640f50ddc8ad3628722b3569d2ae07493fa8263254080ea65c1008e8fc295fb4852e7d83e1e7c48c37eebe6b0d3",
                ),
                (
                    "a7a4e29a4728ce10664fb64e49ad3fac",
                    (
                        "720f73b18d9859cd6ccb4346115cd336c70f58edc0c4437c5573544c31c813bce1e6d072c1"
                        "86b39a413c2f92ca9b8334a287ffcbfc"
                    ),
                ),
            ],
        ),
        20: (
            "6d404d37faf79f9df0d33568d320669800eb4836472ea8a026d16b7182460c52",
            [
                (
                    "f764e9fa15c276478b2c7d0c4e5f58e4",
                    "41f53fa5bfe7026d91faf9be959195a058707273a96a40f0a01960621ac612748b9bbfbe7eb4ce3c",
                ),
                (
                    "b80d3251c1f6471494256ffe712d0b9a",
                    "4ed7b37c2bcac8f74f23c1cf07e62bc7b75fb3f637b9f559c7f664f69eab7b6092237526ea0d1f61cb20d69d10f2",
                ),
                (
                    "53bf8a0d105265d4e276428624ce5e63",
                    (
                        "bc47ffec7998eb91e8115cf8d19dac4bbbe2e163e87dd37f49beca92027764f6"
                        "8cf51f14d798c2273f35df574d1f932e40c4ff255b36a266"
                    ),
                ),
                (
                    "763e65367e864f02f55153c7e3b58af1",
                    (
                        "40013e2df58e8751957d2878bcd2d6fe101ccfd556cb1eae79db3c3ee86429f2b2a602ac86fef6ecb647d6295fae077a"
                        "1feb517508d2c16b4192e01f62"
                    ),
                ),
            ],
        ),
    }
    for number, (key, rows) in samples.items():
        enctype = reference.ENCTYPES[number]
        for plaintext, (confounder, sealed) in zip(plaintexts, rows, strict=True):
            assert reference.encrypt(enctype, from_hex(key), 2, plaintext, from_hex(confounder)).hex() == sealed
            assert reference.decrypt(enctype, from_hex(key), 2, from_hex(sealed)) == plaintext


NLMP_SESSION_KEY = b"\x55" * 16
NLMP_MESSAGE = "Plaintext".encode("utf-16-le")


def test_the_reference_derives_the_keys_of_ms_nlmp_4_2_4() -> None:
    assert reference.ntlm_key(NLMP_SESSION_KEY, "sealing", True) == from_hex("59f600973cc4960a25480a7c196e4c58")
    assert reference.ntlm_key(NLMP_SESSION_KEY, "signing", True) == from_hex("4788dc861b4782f35d43fd98fe1a2d39")


@pytest.mark.parametrize("batch", [False, True], ids=["seal", "seal_frames"])
def test_ntlm_seals_the_message_of_ms_nlmp_4_2_4(batch: bool) -> None:
    signature = from_hex("01000000 7fb38ec5c55d4976 00000000")
    ciphertext = from_hex("54e50165bf1936dc996020c1811b0f06fb5f")
    sealer = ntlm(key=NLMP_SESSION_KEY)
    if batch:
        assert split_frames(sealer.seal_frames([NLMP_MESSAGE])) == [frame(signature, ciphertext)]
    else:
        assert sealer.seal(NLMP_MESSAGE) == (signature, ciphertext)
    assert ntlm(False, key=NLMP_SESSION_KEY).open(signature, ciphertext) == NLMP_MESSAGE
    assert reference.NTLMDirection(NLMP_SESSION_KEY, True, 0).seal(NLMP_MESSAGE) == (signature, ciphertext)


# ---- NTLM equals pyspnego, and the reference ----

FLAGS = int(
    NegotiateFlags.sign
    | NegotiateFlags.seal
    | NegotiateFlags.extended_session_security
    | NegotiateFlags.key_exch
    | NegotiateFlags.key_128
)


@pytest.mark.parametrize("initiator", [True, False], ids=["initiator", "acceptor"])
def test_ntlm_seals_100000_random_messages_as_pyspnego_does_to_the_last_number(initiator: bool) -> None:
    rng = random.Random(f"ntlm {initiator}")
    key = rng.randbytes(16)
    # One direction is counted from the beginning, the other to the end.
    number = 0 if initiator else 2**32 - 100_000
    side = "initiate" if initiator else "accept"
    flags = NegotiateFlags(FLAGS)
    handle, signing_key = RC4Handle(sealkey(flags, key, side)), signkey(flags, key, side)
    ours, peer = ntlm(initiator, number, key=key), ntlm(not initiator, receives=number, key=key)
    left = 100_000
    while left:
        count = min(left, rng.randint(1, 400))
        messages = [
            rng.randbytes(rng.randint(0, 48) if rng.random() < 0.98 else rng.randint(49, 3000)) for _ in range(count)
        ]
        messages[:-1] = [message or b"." for message in messages[:-1]]  # an empty one ends what is opened together
        expected = []
        for message in messages:
            ciphertext, signature = pyspnego_seal(FLAGS, handle, signing_key, number, message)  # type: ignore[arg-type, unused-ignore]
            expected.append(frame(signature, ciphertext))
            number += 1
        frames = split_frames(ours.seal_frames(messages))
        assert frames == expected
        assert peer.open_frames(frames) == (messages, None)
        left -= count
    if not initiator:
        for sealing in (lambda: ours.seal(b"one too many"), lambda: ours.seal_frames([b"one too many"])):
            with pytest.raises(SealingError, match="number"):
                sealing()
        # The peer's next number does not exist either, whatever is in the message.
        opened, error = peer.open_frames([frame(b"\1" + bytes(15), b"")])
        assert opened == [] and isinstance(error, SealingError)


@pytest.mark.parametrize("initiator", [True, False])
def test_ntlm_is_what_the_reference_makes_and_opens(initiator: bool) -> None:
    rng = random.Random(5)
    ours, to_us = ntlm(initiator, 7, 9), reference.NTLMDirection(KEY[:16], not initiator, 9)
    from_us = reference.NTLMDirection(KEY[:16], initiator, 7)
    for size in sizes_around_blocks():
        message = rng.randbytes(size)
        sealed = ours.seal(message)
        assert from_us.open(*sealed) == message
        assert ours.open(*to_us.seal(message)) == message


def test_a_batch_that_would_go_beyond_the_last_number_is_refused_whole() -> None:
    sealer = ntlm(sends=NTLM_LAST - 1)
    with pytest.raises(SealingError, match="number"):
        sealer.seal_frames([b"a", b"b", b"c"])
    # Nothing was spent on it.
    opener = ntlm(False, receives=NTLM_LAST - 1)
    assert opener.open_frames(split_frames(sealer.seal_frames([b"a", b"b"]))) == ([b"a", b"b"], None)
    with pytest.raises(SealingError):
        sealer.seal_frames([b"c"])
    assert sealer.seal_frames([]) == b""


def test_kerberos_numbers_go_to_64_bits() -> None:
    for number in (0, 2**32 - 1, 2**32, 2**63, 2**64 - 3):
        sealer, opener = kerberos(18, True, number), kerberos(18, False, receives=number)
        trailer, ciphertext = sealer.seal(b"message")
        assert trailer[8:16] == number.to_bytes(8, "big")
        assert opener.open(trailer, ciphertext) == b"message"
    last = kerberos(18, True, 2**64 - 2)
    last.seal(b"the last")
    with pytest.raises(SealingError, match="number"):
        last.seal(b"one too many")


# ---- Kerberos equals the reference ----


@each_enctype
@pytest.mark.parametrize("subkey", [True, False], ids=["subkey", "no-subkey"])
@pytest.mark.parametrize("initiator", [True, False], ids=["initiator", "acceptor"])
def test_kerberos_is_what_the_reference_opens(enctype: int, subkey: bool, initiator: bool) -> None:
    rng = random.Random(enctype)
    kind = reference.ENCTYPES[enctype]
    sealer = kerberos(enctype, initiator, 1000, subkey=subkey)
    assert sealer.trailer_size == TRAILERS[enctype]
    for number, size in enumerate([*range(50), 1000, 2100], 1000):
        message = rng.randbytes(size)
        trailer, ciphertext = sealer.seal(message)
        assert len(trailer) == TRAILERS[enctype]
        assert len(ciphertext) == size
        # No filler, and turned so that exactly the message's bytes come last, as in SSPI.
        assert int.from_bytes(trailer[4:6], "big") == 0
        assert int.from_bytes(trailer[6:8], "big") == TRAILERS[enctype] - 32
        token = trailer + ciphertext
        options = {"by_initiator": initiator, "acceptor_subkey": subkey, "sequence": number}
        opened = reference.unwrap(kind, KEY[: kind.key_size], token, **options)  # type: ignore[arg-type, unused-ignore]
        assert opened == message


@functools.cache
def reference_token(enctype: int, message: bytes, filler: bytes = b"", sequence: int = 0) -> bytes:
    """The acceptor's, as MIT's gss_wrap lays it out: not turned."""
    kind = reference.ENCTYPES[enctype]
    return reference.wrap(
        kind,
        KEY[: kind.key_size],
        message,
        confounder=random.Random(sequence).randbytes(16),
        by_initiator=False,
        acceptor_subkey=True,
        sequence=sequence,
        filler=filler,
    )


def turned(token: bytes, rotation: int) -> bytes:
    """The same with another RRC, which is under no signature."""
    body = token[16:]
    turn = rotation % len(body)
    return token[:6] + rotation.to_bytes(2, "big") + token[8:16] + body[len(body) - turn :] + body[: len(body) - turn]


@each_enctype
def test_kerberos_opens_any_filler(enctype: int) -> None:
    for size, extra in [(0, 1), (0, 16), (5, 0), (5, 1), (5, 15), (5, 16), (16, 3), (100, 200), (3000, 65535)]:
        message = bytes(range(256))[: size % 256] * (1 if size < 256 else size // (size % 256))
        filler = b"\xa5" * extra
        token = reference_token(enctype, message, filler)
        for rotation in (0, 28, 16 + reference.ENCTYPES[enctype].mac_size):
            parts = divided(turned(token, rotation), len(message))
            assert kerberos(enctype).open(*parts) == message
            assert kerberos(enctype).open_frames([frame(*parts)]) == ([message], None)


@each_enctype
def test_kerberos_opens_every_rotation_within_the_token_and_none_beyond(enctype: int) -> None:
    message = b"turned by every number there is"
    token = reference_token(enctype, message)
    for rotation in range(len(token) - 16):
        assert kerberos(enctype).open(*divided(turned(token, rotation), len(message))) == message
    # The same bytes again, with another number under no signature.
    for rotation in range(len(token) - 16, 65536, 1 if enctype == 18 else 97):
        refused(kerberos(enctype), *divided(turned(token, rotation), len(message)))


@each_enctype
def test_kerberos_opens_a_long_message_turned_at_every_byte(enctype: int) -> None:
    # Long ones are decrypted from where they are as far as they are in one piece.
    for size in (2016, 2100, 4097):
        message = random.Random(size).randbytes(size)
        token = reference_token(enctype, message)
        for rotation in range(0, len(token), 1 if size == 2100 else 41):
            if rotation < len(token) - 16:
                assert kerberos(enctype).open(*divided(turned(token, rotation), size)) == message


@each_enctype
def test_kerberos_opens_at_one_cut_only(enctype: int) -> None:
    message = b"cut once"
    for filler in (b"", b"\xa5" * 3):
        for rotation in (0, 16 + reference.ENCTYPES[enctype].mac_size):
            token = turned(reference_token(enctype, message, filler), rotation)
            for cut in range(len(token) + 1):
                ours = frame(token[:cut], token[cut:])
                opened, error = kerberos(enctype).open_frames([ours])
                if (token[:cut], token[cut:]) == divided(token, len(message)):
                    assert kerberos(enctype).open(token[:cut], token[cut:]) == message
                    assert (opened, error) == ([message], None)
                else:
                    refused(kerberos(enctype), token[:cut], token[cut:])
                    assert opened == []
                    assert isinstance(error, SealingError)


# ---- Kerberos and MIT ----


class MitContexts:
    """Finished pairs of python-gssapi contexts for one enctype."""

    def __init__(self, gssapi: Any, kdc: MitKdc, enctype: int) -> None:
        self._gssapi = gssapi
        service = kdc.services[{17: "aes128", 18: "aes256", 19: "aes128-sha2", 20: "aes256-sha2"}[enctype]]
        os.environ["KRB5_CONFIG"] = service.config
        self._mech = gssapi.OID.from_int_seq("1.2.840.113554.1.2.2")
        kerberos_name = gssapi.NameType.kerberos_principal
        self._service = gssapi.Name(service.principal, kerberos_name)
        self._initiates = gssapi.Credentials(
            usage="initiate", mechs=[self._mech], store={"ccache": kdc.ccache(config=service.config)}
        )
        self._accepts = gssapi.Credentials(
            usage="accept", mechs=[self._mech], store={"keytab": service.keytab, "rcache": "none:"}
        )
        self._enctype = enctype

    def login(self, mutual: bool = True) -> tuple[Any, Any]:
        """(initiator, acceptor)."""
        flag = self._gssapi.RequirementFlag
        flags = flag.confidentiality | flag.integrity | flag.replay_detection | flag.out_of_sequence_detection
        if mutual:
            flags |= flag.mutual_authentication
        initiator = self._gssapi.SecurityContext(
            name=self._service, creds=self._initiates, flags=flags, usage="initiate", mech=self._mech
        )
        acceptor = self._gssapi.SecurityContext(creds=self._accepts, usage="accept")
        answer = acceptor.step(initiator.step())
        if mutual:
            initiator.step(answer)
        assert initiator.complete and acceptor.complete
        return initiator, acceptor

    def take_over(self, context: Any, *, encrypt: bool = True) -> KerberosSealer:
        """The native sealer that goes on where a finished context is; it ends that."""
        lucid = self._gssapi.raw.krb5_export_lucid_sec_context(context, 1)
        keys = lucid.cfx_kd
        subkey = keys.acceptor_subkey is not None
        enctype = keys.acceptor_subkey_type if subkey else keys.ctx_key_type
        assert enctype == self._enctype
        return KerberosSealer(
            keys.acceptor_subkey if subkey else keys.ctx_key,
            enctype,
            initiator=bool(lucid.is_initiator),
            acceptor_subkey=subkey,
            send_sequence=lucid.send_seq,
            receive_sequence=lucid.recv_seq,
            encrypt=encrypt,
        )

    def halves(self, initiator: bool, mutual: bool = True, *, encrypt: bool = True) -> tuple[KerberosSealer, Any]:
        """(our side, native; the other one, MIT's)."""
        contexts = self.login(mutual)
        return self.take_over(contexts[not initiator], encrypt=encrypt), contexts[initiator]


@pytest.fixture
def mit(mit_kdc: MitKdc, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], MitContexts]:
    class GSSAPI:
        @staticmethod
        def available() -> str | None:
            try:
                import gssapi  # noqa: F401
            except ImportError:
                return "gssapi is not installed (pip gssapi)"
            return None

    require(GSSAPI)
    import gssapi

    monkeypatch.setenv("KRB5_CONFIG", mit_kdc.config)  # for what the test does to it to be undone
    return lambda enctype: MitContexts(gssapi, mit_kdc, enctype)


each_side = pytest.mark.parametrize("initiator", [True, False], ids=["initiator", "acceptor"])
OUR_SIZES = [*sizes_around_blocks(), 1024, 65535, 65536, 70000, 1 << 20]


@each_enctype
@each_side
@pytest.mark.parametrize("mutual", [True, False], ids=["mutual", "one-way"])
def test_mit_opens_what_kerberos_seals_and_the_reverse(
    mit: Callable[[int], MitContexts], enctype: int, initiator: bool, mutual: bool
) -> None:
    from gssapi.raw import unwrap, wrap

    ours, peer = mit(enctype).halves(initiator, mutual)
    for size in OUR_SIZES:
        message = random.Random(size).randbytes(size)
        trailer, ciphertext = ours.seal(message)
        opened = unwrap(peer, trailer + ciphertext)
        assert opened.message == message
        assert opened.encrypted
        token = wrap(peer, message, True, None).message
        assert ours.open(*divided(token, size)) == message


@each_enctype
@each_side
def test_mit_opens_the_buffers_of_kerberos_and_the_reverse(
    mit: Callable[[int], MitContexts], enctype: int, initiator: bool
) -> None:
    """As pyspnego, and .NET on Linux, seal in SSPI's layout."""
    from gssapi.raw import IOV, IOVBufferType, unwrap_iov, wrap_iov

    ours, peer = mit(enctype).halves(initiator)
    for size in OUR_SIZES:
        message = random.Random(size).randbytes(size)
        trailer, ciphertext = ours.seal(message)
        received = IOV((IOVBufferType.header, False, trailer), ciphertext, IOVBufferType.data, std_layout=False)
        assert unwrap_iov(peer, received).encrypted
        assert received[1].value == message
        sent = IOV(IOVBufferType.header, message, IOVBufferType.padding, std_layout=False)
        wrap_iov(peer, sent, True, None)
        header, data = sent[0].value, (sent[1].value or b"") + (sent[2].value or b"")
        assert len(header) == TRAILERS[enctype]
        # The same filler, the same rotation; of the flags only the one for the side differs.
        assert header[3:8] == trailer[3:8]
        assert header[2] ^ trailer[2] == reference.SENT_BY_ACCEPTOR
        assert ours.open_frames([frame(header, data)]) == ([message], None)


@pytest.mark.parametrize(("enctype", "count"), [(17, 10_000), (18, 100_000), (19, 10_000), (20, 10_000)])
def test_kerberos_and_mit_exchange_many_random_messages(
    mit: Callable[[int], MitContexts], enctype: int, count: int
) -> None:
    from gssapi.raw import unwrap, wrap

    rng = random.Random(enctype)
    ours, peer = mit(enctype).halves(initiator=False)
    left = count
    while left:
        batch = min(left, rng.randint(1, 200))
        messages = [
            rng.randbytes(rng.randint(1, 60) if rng.random() < 0.98 else rng.randint(61, 3000)) for _ in range(batch)
        ]
        sealed = split_frames(ours.seal_frames(messages))
        assert [unwrap(peer, token[4:]).message for token in sealed] == messages
        frames = [frame(*divided(wrap(peer, message, True, None).message, len(message))) for message in messages]
        assert ours.open_frames(frames) == (messages, None)
        left -= batch


def test_mics_before_the_hand_over_are_counted_by_the_export_for_sending_only(
    mit: Callable[[int], MitContexts],
) -> None:
    """MIT exports the first number to receive, whatever it has verified since: who takes over has to add the MICs."""
    from gssapi.raw import get_mic, unwrap, verify_mic, wrap

    contexts = mit(18)
    initiator, acceptor = contexts.login()
    verify_mic(acceptor, b"one", get_mic(initiator, b"one"))
    verify_mic(initiator, b"two", get_mic(acceptor, b"two"))
    token = wrap(initiator, b"after a MIC", True, None).message
    ours = contexts.take_over(acceptor)
    assert unwrap(initiator, b"".join(ours.seal(b"answer"))).message == b"answer"
    with pytest.raises(SealingError, match="order"):
        ours.open(*divided(token, len(b"after a MIC")))


def test_a_mit_acceptor_refuses_what_kerberos_would_not_send(mit: Callable[[int], MitContexts]) -> None:
    """That the two agree above is no accident of a peer that checks nothing."""
    from gssapi.raw import unwrap
    from gssapi.raw.misc import GSSError

    ours, peer = mit(18).halves(initiator=True)
    trailer, ciphertext = ours.seal(b"message")
    with pytest.raises(GSSError):
        unwrap(peer, trailer + ciphertext[:-1] + bytes([ciphertext[-1] ^ 1]))


# ---- strict ----


@each_kind
def test_every_bit_of_a_small_message_counts(kind: str) -> None:
    trailer, ciphertext = make(kind, False).seal(b"small".ljust(7, b"!"))
    token = trailer + ciphertext
    for bit in range(8 * len(token)):
        flipped = bytearray(token)
        flipped[bit // 8] ^= 1 << bit % 8
        changed = bytes(flipped)
        refused(make(kind), changed[: len(trailer)], changed[len(trailer) :])
        opened, error = make(kind).open_frames([frame(changed[: len(trailer)], changed[len(trailer) :])])
        assert opened == [] and isinstance(error, SealingError)
    assert make(kind).open(trailer, ciphertext) == b"small!!"


@each_kind
def test_every_bit_before_the_message_counts_whatever_its_size(kind: str) -> None:
    """Of Kerberos's header the rotation is signed by nobody; a whole turn more is one bit in some sizes."""
    for size in range(150):
        trailer, ciphertext = make(kind, False).seal(bytes(size))
        record = frame(trailer, ciphertext)
        for bit in range(8 * (4 + 16)):
            flipped = bytearray(record)
            flipped[bit // 8] ^= 1 << bit % 8
            opened, error = make(kind).open_frames([bytes(flipped)])
            assert opened == [] and isinstance(error, SealingError), (size, bit)
        assert make(kind).open_frames([record]) == ([bytes(size)], None)


@each_kind
def test_a_replayed_reordered_missing_or_reflected_message_is_refused(kind: str) -> None:
    def sealed() -> list[tuple[bytes, bytes]]:
        sealer = make(kind, False)
        return [sealer.seal(text) for text in (b"one", b"two", b"three")]

    replayed = make(kind)
    messages = sealed()
    assert replayed.open(*messages[0]) == b"one"
    refused(replayed, *messages[0])

    reordered = make(kind)
    refused(reordered, *sealed()[1])

    gap = make(kind)
    assert gap.open(*messages[0]) == b"one"
    refused(gap, *messages[2])

    reflected = make(kind)
    refused(reflected, *reflected.seal(b"mine"))


@each_kind
def test_after_one_bad_message_nothing_opens_for_ever(kind: str) -> None:
    ours, peer = pair(kind)
    good = peer.seal(b"good")
    with pytest.raises(SealingError):
        ours.open(good[0], bytes([good[1][0] ^ 1]) + good[1][1:])
    for _ in range(2):
        with pytest.raises(SealingError, match="before"):
            ours.open(*good)
        opened, error = ours.open_frames([frame(*good)])
        assert opened == []
        assert isinstance(error, SealingError)
        assert "before" in str(error)
        opened, error = ours.open_frames([])
        assert opened == [] and isinstance(error, SealingError)


@each_kind
def test_what_was_good_before_a_bad_message_can_still_be_answered(kind: str) -> None:
    """Else it would depend on the pieces in which the two arrived whether the answer is ever sent."""
    ours, peer = pair(kind)
    asked = split_frames(peer.seal_frames([b"question"]))
    assert ours.open_frames([*asked, b"rubbish"])[0] == [b"question"]
    assert peer.open(*ours.seal(b"answer")) == b"answer"
    assert peer.open_frames(split_frames(ours.seal_frames([b"and", b"more"]))) == ([b"and", b"more"], None)


def test_kerberos_says_that_a_message_is_not_encrypted() -> None:
    # A wrap token without confidentiality: the message in the clear, and a checksum.
    token = bytes.fromhex("0504 05ff 000c 0000") + bytes(8) + b"in the clear" + bytes(12)
    with pytest.raises(SealingError, match="signed but not encrypted"):
        kerberos(18).open(b"", token)


@each_enctype
def test_kerberos_refuses_other_flags_even_if_they_are_signed(enctype: int) -> None:
    kind = reference.ENCTYPES[enctype]
    for flags in range(256):
        token = reference.wrap(
            kind,
            KEY[: kind.key_size],
            b"message",
            confounder=bytes(16),
            by_initiator=False,
            acceptor_subkey=True,
            sequence=0,
            flags=flags,
        )
        if flags == reference.SENT_BY_ACCEPTOR | reference.SEALED | reference.ACCEPTOR_SUBKEY:
            assert kerberos(enctype).open(*divided(token, len(b"message"))) == b"message"
        else:
            refused(kerberos(enctype), *divided(token, len(b"message")))
        if enctype != 18 and flags > 8:
            break


def test_kerberos_refuses_a_message_of_a_subkey_where_there_is_none_and_the_reverse() -> None:
    for ours in (True, False):
        sealer = kerberos(18, False, subkey=ours)
        refused(kerberos(18, True, subkey=not ours), *sealer.seal(b"message"))


@each_enctype
def test_kerberos_refuses_a_filler_length_that_is_not_the_signed_one(enctype: int) -> None:
    token = reference_token(enctype, b"message", b"..")
    for extra in (0, 1, 3, 9, 10, 65535):
        changed = token[:4] + extra.to_bytes(2, "big") + token[6:]
        for cut in range(len(changed) + 1):
            refused(kerberos(enctype), changed[:cut], changed[cut:])


@each_kind
def test_a_message_cut_off_anywhere_is_refused(kind: str) -> None:
    trailer, ciphertext = make(kind, False).seal(b"cut off")
    whole = frame(trailer, ciphertext)
    for size in range(len(whole)):
        opened, error = make(kind).open_frames([whole[:size]])
        assert opened == [], size
        assert isinstance(error, SealingError)
    token = trailer + ciphertext
    for size in range(len(token)):
        refused(make(kind), token[: min(size, len(trailer))], token[min(size, len(trailer)) : size])
    refused(make(kind), trailer, ciphertext + b"\0")


@each_kind
def test_a_lying_trailer_length_is_refused_without_harm(kind: str) -> None:
    trailer, ciphertext = make(kind, False).seal(b"message")
    room = len(trailer) + len(ciphertext)
    for length in [*range(room + 3), 2**31 - 1, 2**31, 2**32 - 5, 2**32 - 4, 2**32 - 1]:
        opened, error = make(kind).open_frames([length.to_bytes(4, "little") + trailer + ciphertext])
        if length == len(trailer):
            assert (opened, error) == ([b"message"], None)
        else:
            assert opened == []
            assert isinstance(error, SealingError)


@each_kind
def test_no_shape_of_rubbish_does_any_harm(kind: str) -> None:
    rng = random.Random(kind)
    start = make(kind, False).seal(b"")[0]
    for _ in range(3000):
        rubbish = rng.randbytes(rng.randint(0, 150))
        if rng.random() < 0.7:
            rubbish = start[: rng.randint(0, 16)] + rubbish
        cut = rng.randint(0, len(rubbish))
        refused(make(kind), rubbish[:cut], rubbish[cut:])
        opened, error = make(kind).open_frames([rubbish])
        assert opened == [] and isinstance(error, SealingError)


# ---- batches ----


@each_kind
def test_a_batch_is_its_messages_one_by_one(kind: str) -> None:
    rng = random.Random(kind)
    messages = [rng.randbytes(size) for size in (*range(1, 70), 500, 1, 2047, 2048, 2049, 1, 5000)]
    batch, singly = make(kind, False), make(kind, False)
    frames = split_frames(batch.seal_frames(messages))
    sealed = [singly.seal(message) for message in messages]
    assert [len(each) for each in frames] == [4 + len(trailer) + len(data) for trailer, data in sealed]
    if kind == "ntlm":
        assert frames == [frame(*each) for each in sealed]  # no randomness in it
    assert make(kind).open_frames(frames) == (messages, None)
    assert make(kind).open_frames([frame(*each) for each in sealed]) == (messages, None)
    one_by_one = make(kind)
    trailer = batch.trailer_size
    assert [one_by_one.open(each[4 : 4 + trailer], each[4 + trailer :]) for each in frames] == messages
    # Sealing goes on after a batch, opening too, and both ways of each may be mixed.
    assert one_by_one.open(*batch.seal(b"and on")) == b"and on"
    assert one_by_one.open_frames(split_frames(batch.seal_frames(iter([b"and", b"on"])))) == ([b"and", b"on"], None)


@each_kind
def test_open_frames_stops_after_a_goodbye(kind: str) -> None:
    ours, peer = pair(kind)
    frames = split_frames(peer.seal_frames([b"one", b"", b"two", b""]))
    assert ours.open_frames(frames) == ([b"one", b""], None)
    # What came after it was not looked at, and not counted.
    assert ours.open_frames(frames, 2) == ([b"two", b""], None)
    assert ours.open_frames([*split_frames(peer.seal_frames([b""])), b"never looked at"]) == ([b""], None)


@each_kind
def test_open_frames_begins_where_it_is_told(kind: str) -> None:
    ours, peer = pair(kind)
    frames = split_frames(peer.seal_frames([b"one", b"two"]))
    assert ours.open_frames([b"skipped", b"too", *frames], 2) == ([b"one", b"two"], None)
    assert ours.open_frames(frames, 2) == ([], None)
    assert ours.open_frames(frames, 2**62) == ([], None)
    assert ours.open_frames([]) == ([], None)
    with pytest.raises(ValueError, match="negative"):
        ours.open_frames(frames, -1)
    with pytest.raises(TypeError):
        ours.open_frames(frames, 1.5)  # type: ignore[arg-type]
    assert ours.open(*peer.seal(b"unharmed")) == b"unharmed"


@each_kind
@pytest.mark.parametrize(
    "bad", [b"", b"\xff\xff\xff\xff", b"\x10\0\0\0" + bytes(16 + 7)], ids=["empty", "lying", "forged"]
)
def test_the_good_ones_before_a_bad_one_are_given_first(kind: str, bad: bytes) -> None:
    ours, peer = pair(kind)
    frames = split_frames(peer.seal_frames([b"one", b"two", b"three"]))
    opened, error = ours.open_frames([*frames[:2], bad, frames[2]])
    assert opened == [b"one", b"two"]
    assert isinstance(error, SealingError)
    assert ours.open_frames(frames[2:])[0] == []


@each_kind
def test_huge_batches_seal_and_open(kind: str) -> None:
    ours, peer = pair(kind)
    messages = [b"%d" % number for number in range(200_000)]
    frames = split_large(ours.seal_frames(messages))
    assert peer.open_frames(frames) == (messages, None)


def split_large(data: bytes) -> list[bytes]:
    frames, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        frames.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return frames


@each_kind
def test_messages_of_a_mebibyte_seal_and_open(kind: str) -> None:
    ours, peer = pair(kind)
    messages = [random.Random(size).randbytes(size) for size in ((1 << 20) - 1, 1 << 20, (1 << 20) + 1)]
    assert peer.open_frames(split_large(ours.seal_frames(messages))) == (messages, None)
    assert ours.open(*peer.seal(messages[2])) == messages[2]


# ---- misuse ----


@each_kind
def test_only_bytes_are_sealed_and_opened(kind: str) -> None:
    ours, peer = pair(kind)
    for wrong in ("text", bytearray(b"array"), memoryview(b"view"), 5, None, [b"list"]):
        any_wrong: Any = wrong
        with pytest.raises(TypeError):
            ours.seal(any_wrong)
        with pytest.raises(TypeError):
            ours.seal_frames([b"good", any_wrong])
        with pytest.raises(TypeError):
            ours.open(any_wrong, b"")
        with pytest.raises(TypeError):
            ours.open(b"", any_wrong)
        with pytest.raises(TypeError):
            ours.open_frames([any_wrong])
    for wrong in (b"bytes", "text", 5, None):
        any_wrong = wrong
        with pytest.raises(TypeError):
            ours.seal_frames(any_wrong)
    for wrong in (b"bytes", (b"tuple",), "text", 5, None):
        any_wrong = wrong
        with pytest.raises(TypeError):
            ours.open_frames(any_wrong)

    class Bytes(bytes):
        pass

    # None of it was counted, or done by halves.
    assert peer.open(*ours.seal(Bytes(b"message"))) == b"message"
    assert ours.open_frames([Bytes(frame(*peer.seal(b"message")))]) == ([b"message"], None)


def test_keys_enctypes_and_numbers_are_checked() -> None:
    good: dict[str, Any] = {"initiator": True, "send_sequence": 0, "receive_sequence": 0}
    for size in (0, 15, 17, 32):
        with pytest.raises(ValueError, match="16 bytes"):
            NTLMSealer(bytes(size), **good)
    with pytest.raises(TypeError):
        NTLMSealer(bytearray(16), **good)  # type: ignore[arg-type]
    good["acceptor_subkey"] = True
    for enctype, size in {17: 16, 18: 32, 19: 16, 20: 32}.items():
        for wrong in (0, 8, 16, 24, 32, 48):
            if wrong != size:
                with pytest.raises(ValueError, match=f"{size} bytes"):
                    KerberosSealer(bytes(wrong), enctype, **good)
    for enctype in (0, -1, 1, 16, 21, 23, 2**40):
        with pytest.raises(ValueError, match="enctype"):
            KerberosSealer(bytes(16), enctype, **good)
    for wrong in (-1, 2**64, 10**30):
        with pytest.raises(ValueError, match="sequence"):
            kerberos(18, True, wrong)
        with pytest.raises(ValueError, match="sequence"):
            kerberos(18, True, 0, wrong)
    for wrong in (-1, 2**32, 10**30):
        with pytest.raises(ValueError, match="sequence"):
            ntlm(True, wrong)
        with pytest.raises(ValueError, match="sequence"):
            ntlm(True, 0, wrong)
    for wrong in (1.5, "1", None):
        with pytest.raises(TypeError):
            ntlm(True, wrong)  # type: ignore[arg-type]


@each_kind
def test_a_sealer_shows_nothing_of_its_keys_and_cannot_be_copied(kind: str) -> None:
    sealer = make(kind)
    for text in (repr(sealer), str(sealer), repr(vars(type(sealer)))):
        assert repr(KEY[:4])[2:-1] not in text
        assert KEY[:8].hex() not in text
    assert not hasattr(sealer, "__dict__")
    # A copy would use numbers and key streams twice.
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            way(sealer)
    with pytest.raises(AttributeError):
        sealer.trailer_size = 1  # type: ignore[misc]


def test_errors_show_nothing_of_keys_or_messages() -> None:
    ours, peer = pair("18")
    trailer, ciphertext = peer.seal(b"the secret")
    with pytest.raises(SealingError) as caught:
        ours.open(trailer, bytes([ciphertext[0] ^ 1]) + ciphertext[1:])
    for secret in (b"the secret", KEY, KEY[:8]):
        assert secret.hex() not in str(caught.value)
        assert repr(secret)[2:-1] not in str(caught.value)


def test_the_stub_has_the_modules_names() -> None:
    stub = (ROOT / "src" / "triosspi" / "_sealing.pyi").read_text()
    public = [name for name in vars(_sealing) if not name.startswith("_") and name != "os"]
    assert sorted(public) == ["KerberosSealer", "NTLMSealer", "SealingError", "available"]
    for name in public:
        assert name in stub
    for sealer in (NTLMSealer, KerberosSealer):
        names = {name for name, _ in inspect.getmembers(sealer) if not name.startswith("_")}
        assert names == {
            "open",
            "open_frames",
            "open_records",
            "seal",
            "seal_frames",
            "seal_records",
            "traffic",
            "trailer_size",
        }
        for name in names:
            assert name in stub


# ---- counting ----


@each_kind
def test_the_traffic_is_what_was_sealed_and_opened_without_the_empty_messages(kind: str) -> None:
    ours, peer = pair(kind)
    assert ours.traffic == (0, 0, 0, 0)
    ours.seal_frames([b"one", b"three"])
    ours.seal(b"")
    ours.seal(bytes(100))
    frames = split_frames(peer.seal_frames([b"12", b"345"]))
    assert ours.open_frames(frames) == ([b"12", b"345"], None)
    assert ours.open(*peer.seal(b"")) == b""
    assert ours.open(*peer.seal(b"6789")) == b"6789"
    assert ours.traffic == (3, 108, 3, 9)
    bad = peer.seal(b"bad")
    with pytest.raises(SealingError):
        ours.open(bad[0], b"BAD")
    assert ours.traffic == (3, 108, 3, 9)


# ---- memory, threads, processes ----


@each_kind
def test_nothing_leaks(kind: str) -> None:
    """A sealer left behind is 2 to 4 KiB in libcrypto's own memory, which tracemalloc does not see."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def work() -> None:
        for _ in range(2000):
            ours, peer = pair(kind)
            peer.open_frames(split_frames(ours.seal_frames([b"a", b"b" * 100])))
            peer.open(*ours.seal(b"c" * 3000))
            trailer, ciphertext = ours.seal(b"d" * 3000)
            peer.open_frames([frame(trailer, ciphertext + b"!"), b""])
            with pytest.raises(TypeError):
                ours.seal_frames([b"x", "y"])  # type: ignore[list-item]
            with pytest.raises(ValueError, match="sequence"):
                make(kind, sends=-1)

    work()
    gc.collect()
    before = resident()
    work()
    gc.collect()
    assert resident() - before < 1_000_000


# In a call of so many bytes the GIL is released, see `_sealing.pyi`.
RELEASED = 256 * 1024


def run_all(functions: Sequence[Callable[[], None]]) -> None:
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_sealers_work_side_by_side_in_threads() -> None:
    def exchange(kind: str, seed: int) -> None:
        rng = random.Random(seed)
        ours, peer = pair(kind)
        large = rng.randbytes(RELEASED)
        for _ in range(60):
            messages = [rng.randbytes(rng.choice([1, 40, 3000, 20_000])) for _ in range(3)]
            messages[rng.randrange(3)] = large
            assert peer.open_frames(split_frames(ours.seal_frames(messages))) == (messages, None)
            assert ours.open(*peer.seal(messages[0])) == messages[0]

    run_all([functools.partial(exchange, kind, seed) for seed, kind in enumerate(["ntlm", "18", "20", "ntlm", "19"])])


@each_kind
def test_one_sealer_in_two_threads_refuses_one_of_them_and_stays_whole(kind: str) -> None:
    ours, peer = pair(kind)
    frames: list[bytes] = []
    refusals: list[RuntimeError] = []

    def seal() -> None:
        for _ in range(50):
            try:
                frames.append(ours.seal_frames([bytes(RELEASED)]))
            except RuntimeError as exc:
                refusals.append(exc)

    run_all([seal, seal])
    assert len(frames) + len(refusals) == 100
    number = (slice(20, 24), "little") if kind == "ntlm" else (slice(16, 24), "big")
    frames.sort(key=lambda each: int.from_bytes(each[number[0]], number[1]))  # type: ignore[arg-type, unused-ignore]
    for each in frames:
        assert peer.open_frames(split_frames(each)) == ([bytes(RELEASED)], None)


def python(program: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_forked_child_has_other_confounders() -> None:
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    program = """
import os
from triosspi._sealing import KerberosSealer
sealer = KerberosSealer(bytes(32), 18, initiator=True, acceptor_subkey=True, send_sequence=0, receive_sequence=0)
sealer.seal(b"")  # now there is a buffer of random bytes to be inherited
def tokens():
    return b"".join(b"".join(sealer.seal(b"same")) for _ in range(3))
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, tokens())
    os._exit(0)
os.wait()
theirs, ours = os.read(reader, 65536), tokens()
assert len(theirs) == len(ours)
size = len(ours) // 3
for at in range(0, len(ours), size):
    assert ours[at:at + 16] == theirs[at:at + 16]  # the same numbers
    assert ours[at + 16:at + size] != theirs[at + 16:at + size]
print("good")
"""
    assert python(program) == "good\n"


def test_no_confounder_comes_twice() -> None:
    # Same key, same number, same message: only the confounder can make them differ. More than one buffer of them.
    tokens = {kerberos(18).seal(b"same") for _ in range(2000)}
    assert len(tokens) == 2000


def test_what_is_available_is_found_out_once() -> None:
    assert available() == {"ntlm": True, "kerberos": True}
    available().clear()
    assert available() == {"ntlm": True, "kerberos": True}


LIBCRYPTO = ctypes.util.find_library("crypto")


def test_without_rc4_kerberos_remains_and_the_errors_of_looking_for_it_do_not() -> None:
    program = f"""
import ctypes
from triosspi import _sealing
libcrypto = ctypes.CDLL({LIBCRYPTO!r})
libcrypto.ERR_peek_error.restype = ctypes.c_ulong
assert _sealing.available() == {{"ntlm": False, "kerberos": True}}, _sealing.available()
assert libcrypto.ERR_peek_error() == 0
try:
    _sealing.NTLMSealer(bytes(16), initiator=True, send_sequence=0, receive_sequence=0)
except RuntimeError as exc:
    print(exc)
_sealing.KerberosSealer(bytes(16), 17, initiator=True, acceptor_subkey=True, send_sequence=0, receive_sequence=0)
"""
    assert python(program, OPENSSL_MODULES="/nonexistent") == "there is no RC4 to be had here\n"


def test_other_users_of_libcrypto_get_no_rc4_from_this() -> None:
    program = f"""
import ctypes
from triosspi import _sealing
assert _sealing.available()["ntlm"]
libcrypto = ctypes.CDLL({LIBCRYPTO!r})
libcrypto.EVP_CIPHER_fetch.restype = ctypes.c_void_p
libcrypto.EVP_CIPHER_fetch.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
print(libcrypto.EVP_CIPHER_fetch(None, b"AES-128-CBC", None) is not None, libcrypto.EVP_CIPHER_fetch(None, b"RC4", None))
"""
    assert python(program) == "True None\n"


# ---- the C compiler's opinion ----


@pytest.mark.long("compiles the extension, optimised")
def test_the_extension_compiles_without_a_warning(tmp_path: Path) -> None:
    compile_without_a_warning("_sealing", tmp_path)
