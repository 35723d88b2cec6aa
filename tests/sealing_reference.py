"""Sealing in plain Python, from the specifications alone: what `triosspi._sealing` must equal, byte for byte.

Slow, and clear rather than clever. The standard library has the hashes; AES, block by block, comes from `cryptography`.
Published vectors prove it (see `test_sealing.py`).
"""

from __future__ import annotations

import hmac
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import md5
from math import lcm

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

BLOCK = 16
HEADER = 16

# Flags of RFC 4121 4.2.2.
SENT_BY_ACCEPTOR = 1
SEALED = 2
ACCEPTOR_SUBKEY = 4


class Refused(Exception):
    """A message that does not open."""


# ---- NTLM: [MS-NLMP] 3.4.4.2, 3.4.5.2, 3.4.5.3; extended session security, key exchange, 128 bits ----


def rc4(key: bytes) -> Iterator[int]:
    """The key stream."""
    state = list(range(256))
    j = 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) & 0xFF
        state[i], state[j] = state[j], state[i]
    i = j = 0
    while True:
        i = (i + 1) & 0xFF
        j = (j + state[i]) & 0xFF
        state[i], state[j] = state[j], state[i]
        yield state[(state[i] + state[j]) & 0xFF]


def with_stream(stream: Iterator[int], data: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(data, itertools.islice(stream, len(data)), strict=True))


def ntlm_key(session_key: bytes, purpose: str, from_initiator: bool) -> bytes:
    """SIGNKEY or SEALKEY; purpose: signing or sealing."""
    way = "client-to-server" if from_initiator else "server-to-client"
    return md5(session_key + f"session key to {way} {purpose} key magic constant\0".encode()).digest()


class NTLMDirection:
    """One direction; what it seals is what its other end opens."""

    def __init__(self, session_key: bytes, from_initiator: bool, sequence: int) -> None:
        self.signing_key = ntlm_key(session_key, "signing", from_initiator)
        self.stream = rc4(ntlm_key(session_key, "sealing", from_initiator))
        self.sequence = sequence

    def _signature(self, message: bytes) -> bytes:
        sequence = self.sequence.to_bytes(4, "little")
        checksum = hmac.digest(self.signing_key, sequence + message, "md5")[:8]
        self.sequence += 1
        return b"\1\0\0\0" + with_stream(self.stream, checksum) + sequence

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        ciphertext = with_stream(self.stream, message)
        return self._signature(message), ciphertext

    def open(self, trailer: bytes, ciphertext: bytes) -> bytes:
        message = with_stream(self.stream, ciphertext)
        if self._signature(message) != trailer:
            raise Refused
        return message


# ---- Kerberos: RFC 3961, RFC 3962, RFC 8009, RFC 4121 ----


@dataclass(frozen=True)
class Enctype:
    number: int
    key_size: int
    integrity_key_size: int
    mac_size: int
    digest: str
    sha2: bool  # RFC 8009: the MAC is of the ciphertext, and keys come from another function


ENCTYPES = {
    17: Enctype(17, 16, 16, 12, "sha1", False),
    18: Enctype(18, 32, 32, 12, "sha1", False),
    19: Enctype(19, 16, 16, 16, "sha256", True),
    20: Enctype(20, 32, 24, 24, "sha384", True),
}


def xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


def aes(key: bytes, block: bytes) -> bytes:
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # one block at a time: the modes are built here
    return encryptor.update(block)


def aes_inverse(key: bytes, block: bytes) -> bytes:
    decryptor = Cipher(algorithms.AES(key), modes.ECB()).decryptor()
    return decryptor.update(block)


def cts_encrypt(key: bytes, plaintext: bytes) -> bytes:
    """AES in CBC mode with ciphertext stealing and a zero IV, RFC 3962 5; at least one block."""
    if len(plaintext) == BLOCK:
        return aes(key, plaintext)
    blocks, before = [], bytes(BLOCK)
    for at in range(0, len(plaintext), BLOCK):
        before = aes(key, xor(plaintext[at : at + BLOCK].ljust(BLOCK, b"\0"), before))
        blocks.append(before)
    rest = len(plaintext) % BLOCK or BLOCK
    blocks[-2:] = [blocks[-1], blocks[-2][:rest]]
    return b"".join(blocks)


def cts_decrypt(key: bytes, ciphertext: bytes) -> bytes:
    if len(ciphertext) == BLOCK:
        return aes_inverse(key, ciphertext)
    rest = len(ciphertext) % BLOCK or BLOCK
    blocks = [ciphertext[at : at + BLOCK] for at in range(0, len(ciphertext), BLOCK)]
    last, cut_off = blocks[-2:]
    tail = aes_inverse(key, last)
    blocks[-2:] = [cut_off + tail[rest:], last]
    plaintext, before = b"", bytes(BLOCK)
    for block in blocks:
        plaintext += xor(aes_inverse(key, block), before)
        before = block
    return plaintext[: len(ciphertext)]


def n_fold(data: bytes, size: int) -> bytes:
    """RFC 3961 5.1: stretch to size bytes, each copy turned right by 13 bits, added in ones' complement."""
    bits = 8 * len(data)
    value = int.from_bytes(data, "big")
    total = lcm(len(data), size)
    stretched = b""
    for copy in range(total // len(data)):
        turn = 13 * copy % bits
        stretched += (((value >> turn) | (value << (bits - turn))) & ((1 << bits) - 1)).to_bytes(len(data), "big")
    modulus = (1 << (8 * size)) - 1
    folded = sum(int.from_bytes(stretched[at : at + size], "big") for at in range(0, total, size)) % modulus
    return (folded or modulus).to_bytes(size, "big")


def derive(enctype: Enctype, key: bytes, constant: bytes, size: int) -> bytes:
    if enctype.sha2:
        # RFC 8009 3: the counter, the label, a zero byte, no context, the length in bits.
        text = b"\0\0\0\1" + constant + b"\0" + (8 * size).to_bytes(4, "big")
        return hmac.digest(key, text, enctype.digest)[:size]
    block, derived = n_fold(constant, BLOCK), b""
    while len(derived) < size:
        block = aes(key, block)
        derived += block
    return derived[:size]


def encryption_key(enctype: Enctype, key: bytes, usage: int) -> bytes:
    return derive(enctype, key, usage.to_bytes(4, "big") + b"\xaa", enctype.key_size)


def integrity_key(enctype: Enctype, key: bytes, usage: int) -> bytes:
    return derive(enctype, key, usage.to_bytes(4, "big") + b"\x55", enctype.integrity_key_size)


def encrypt(enctype: Enctype, key: bytes, usage: int, plaintext: bytes, confounder: bytes) -> bytes:
    """RFC 3961 5.3, RFC 8009 5."""
    ciphertext = cts_encrypt(encryption_key(enctype, key, usage), confounder + plaintext)
    signed = bytes(BLOCK) + ciphertext if enctype.sha2 else confounder + plaintext
    mac = hmac.digest(integrity_key(enctype, key, usage), signed, enctype.digest)
    return ciphertext + mac[: enctype.mac_size]


def decrypt(enctype: Enctype, key: bytes, usage: int, sealed: bytes) -> bytes:
    ciphertext, mac = sealed[: -enctype.mac_size], sealed[-enctype.mac_size :]
    if len(ciphertext) < BLOCK:
        raise Refused
    plaintext = cts_decrypt(encryption_key(enctype, key, usage), ciphertext)
    signed = bytes(BLOCK) + ciphertext if enctype.sha2 else plaintext
    if hmac.digest(integrity_key(enctype, key, usage), signed, enctype.digest)[: enctype.mac_size] != mac:
        raise Refused
    return plaintext[BLOCK:]


def wrap(
    enctype: Enctype,
    key: bytes,
    message: bytes,
    *,
    confounder: bytes,
    by_initiator: bool,
    acceptor_subkey: bool,
    sequence: int,
    rotation: int = 0,
    filler: bytes = b"",
    flags: int | None = None,
) -> bytes:
    """A wrap token with confidentiality, RFC 4121 4.2.4 and 4.2.6.2; any rotation, any filler, any flags."""
    if flags is None:
        flags = SEALED | (0 if by_initiator else SENT_BY_ACCEPTOR) | (ACCEPTOR_SUBKEY if acceptor_subkey else 0)
    start = b"\x05\x04" + bytes([flags]) + b"\xff" + len(filler).to_bytes(2, "big")
    end = sequence.to_bytes(8, "big")
    header = start + b"\0\0" + end
    body = encrypt(enctype, key, 24 if by_initiator else 22, message + filler + header, confounder)
    turn = rotation % len(body)
    return start + rotation.to_bytes(2, "big") + end + body[len(body) - turn :] + body[: len(body) - turn]


def unwrap(
    enctype: Enctype, key: bytes, token: bytes, *, by_initiator: bool, acceptor_subkey: bool, sequence: int
) -> bytes:
    flags = SEALED | (0 if by_initiator else SENT_BY_ACCEPTOR) | (ACCEPTOR_SUBKEY if acceptor_subkey else 0)
    header, body = token[:HEADER], token[HEADER:]
    if header[:4] != b"\x05\x04" + bytes([flags]) + b"\xff" or header[8:] != sequence.to_bytes(8, "big"):
        raise Refused
    extra, turn = int.from_bytes(header[4:6], "big"), int.from_bytes(header[6:8], "big") % len(body)
    plaintext = decrypt(enctype, key, 24 if by_initiator else 22, body[turn:] + body[:turn])
    message, copy = plaintext[:-HEADER], plaintext[-HEADER:]
    if extra > len(message) or copy != header[:6] + b"\0\0" + header[8:]:
        raise Refused
    return message[: len(message) - extra]
