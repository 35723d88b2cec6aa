"""An NTLM client that can do everything wrong, written from [MS-NLMP] and RFC 4178 alone.

It shares nothing with the acceptor under test but hashlib, so that a mistake cannot cancel itself. What a
test wants to be wrong it says by an argument; all else is what a Windows client sends.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass, field

from cryptography.hazmat.decrepit.ciphers.algorithms import ARC4
from cryptography.hazmat.primitives.ciphers import Cipher
from spnego._ntlm_raw.des import DES
from spnego._ntlm_raw.md4 import md4

SIGNATURE = b"NTLMSSP\0"

UNICODE = 0x00000001
OEM = 0x00000002
SIGN = 0x00000010
SEAL = 0x00000020
NTLM = 0x00000200
ALWAYS_SIGN = 0x00008000
ESS = 0x00080000
TARGET_INFO = 0x00800000
VERSION = 0x02000000
KEY_128 = 0x20000000
KEY_EXCH = 0x40000000
KEY_56 = 0x80000000

GOOD_FLAGS = UNICODE | SIGN | SEAL | NTLM | ALWAYS_SIGN | ESS | TARGET_INFO | VERSION | KEY_128 | KEY_EXCH | KEY_56

AV_EOL, AV_FLAGS, AV_TARGET_NAME, AV_CHANNEL_BINDINGS = 0, 6, 9, 10

OID_SPNEGO = bytes.fromhex("06062b0601050502")
OID_NTLM = bytes.fromhex("060a2b06010401823702020a")
OID_KERBEROS = bytes.fromhex("06092a864886f712010202")
ACCEPT_COMPLETED, ACCEPT_INCOMPLETE, REJECT, REQUEST_MIC = range(4)


def hmac_md5(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, hashlib.md5).digest()


def rc4(key: bytes, data: bytes) -> bytes:
    return Cipher(ARC4(key), mode=None).encryptor().update(data)


def nt_hash(password: str) -> bytes:
    return md4(password.encode("utf-16-le"))


def negotiate(flags: int = GOOD_FLAGS) -> bytes:
    return SIGNATURE + struct.pack("<II", 1, flags) + bytes(16) + bytes.fromhex("0a00f4650000000f")


def read_challenge(challenge: bytes) -> tuple[bytes, list[tuple[int, bytes]]]:
    """The server challenge and the AV pairs of a CHALLENGE_MESSAGE."""
    assert challenge[:12] == SIGNATURE + b"\2\0\0\0"
    length, _, offset = struct.unpack_from("<HHI", challenge, 40)
    info = challenge[offset : offset + length]
    pairs = []
    position = 0
    while True:
        av_id, size = struct.unpack_from("<HH", info, position)
        if av_id == AV_EOL:
            return challenge[24:32], pairs
        pairs.append((av_id, info[position + 4 : position + 4 + size]))
        position += 4 + size


def pack_av_pairs(pairs: list[tuple[int, bytes]]) -> bytes:
    return b"".join(struct.pack("<HH", av_id, len(value)) + value for av_id, value in pairs) + bytes(4)


@dataclass(kw_only=True)
class Client:
    """One login; every field can be made wrong."""

    user: str = "alice"
    domain: str = "DOM"
    password: str = "secret"
    negotiate_flags: int = GOOD_FLAGS
    flags: int = GOOD_FLAGS
    promise_mic: bool = True
    mic: str = "right"  # "right", "wrong", "zero", "absent"
    version_field: bool = True
    extra_pairs: list[tuple[int, bytes]] = field(default_factory=list)
    blob_tail: bytes = bytes(4)
    lm_response: bytes = bytes(24)
    nt_response: bytes | None = None
    nt_form: str = "v2"  # "v2", "v1", "none"
    encrypted_session_key: bytes | None = None
    raw_user: bytes | None = None
    raw_domain: bytes | None = None
    upper: str | None = None
    session_key: bytes = bytes(range(16))

    def negotiate(self) -> bytes:
        self.negotiate_message = negotiate(self.negotiate_flags)
        return self.negotiate_message

    def authenticate(self, challenge: bytes) -> bytes:
        server_challenge, pairs = read_challenge(challenge)
        hashed = nt_hash(self.password)
        key = hmac_md5(hashed, ((self.upper or self.user.upper()) + self.domain).encode("utf-16-le"))
        pairs = [pair for pair in pairs if pair[0] != AV_FLAGS]
        if self.promise_mic:
            pairs.append((AV_FLAGS, struct.pack("<I", 2)))
        pairs += self.extra_pairs
        timestamp = next((value for av_id, value in pairs if av_id == 7), bytes(8))
        blob = b"\1\1" + bytes(6) + timestamp + b"\xaa" * 8 + bytes(4) + pack_av_pairs(pairs) + self.blob_tail
        proof = hmac_md5(key, server_challenge + blob)
        base_key = hmac_md5(key, proof)
        nt_response = proof + blob
        if self.nt_form == "v1":
            client_challenge = b"\xbb" * 8
            self.lm_response = client_challenge + bytes(16)
            nonce = hashlib.md5(server_challenge + client_challenge).digest()[:8]
            nt_response = _des_long(hashed, nonce)
        elif self.nt_form == "none":
            nt_response = b""
        if self.nt_response is not None:
            nt_response = self.nt_response
        encrypted = rc4(base_key, self.session_key)
        if self.encrypted_session_key is not None:
            encrypted = self.encrypted_session_key
        return self._pack(challenge, nt_response, encrypted)

    def _pack(self, challenge: bytes, nt_response: bytes, encrypted: bytes) -> bytes:
        payloads = [
            self.lm_response,
            nt_response,
            self.domain.encode("utf-16-le") if self.raw_domain is None else self.raw_domain,
            self.user.encode("utf-16-le") if self.raw_user is None else self.raw_user,
            "PC".encode("utf-16-le"),
            encrypted,
        ]
        version = bytes.fromhex("0a00f4650000000f") if self.version_field else b""
        mic_offset = 64 + len(version)
        offset = mic_offset + (0 if self.mic == "absent" else 16)
        header = SIGNATURE + struct.pack("<I", 3)
        for payload in payloads:
            header += struct.pack("<HHI", len(payload), len(payload), offset)
            offset += len(payload)
        header += struct.pack("<I", self.flags)
        body = b"".join(payloads)
        if self.mic == "absent":
            return header + version + body
        message = header + version + bytes(16) + body
        mic = hmac_md5(self.session_key, self.negotiate_message + challenge + message)
        if self.mic == "wrong":
            mic = bytes([mic[0] ^ 1]) + mic[1:]
        elif self.mic == "zero":
            mic = bytes(16)
        return message[:mic_offset] + mic + message[mic_offset + 16 :]

    def mech_list_mic(self, mech_list: bytes) -> bytes:
        """The first signature of the client's direction, over the list of mechanisms."""
        sign = hashlib.md5(self.session_key + b"session key to client-to-server signing key magic constant\0").digest()
        seal = hashlib.md5(self.session_key + b"session key to client-to-server sealing key magic constant\0").digest()
        checksum = hmac_md5(sign, bytes(4) + mech_list)[:8]
        return b"\1\0\0\0" + rc4(seal, checksum) + bytes(4)


def _des_long(hashed: bytes, nonce: bytes) -> bytes:
    padded = hashed + bytes(5)
    return b"".join(DES(DES.key56_to_key64(padded[i : i + 7])).encrypt(nonce) for i in (0, 7, 14))


# SPNEGO, RFC 4178 4.2, by hand


def der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def mech_list(*oids: bytes) -> bytes:
    return der(0x30, b"".join(oids))


def neg_token_init(token: bytes | None, *oids: bytes) -> bytes:
    content = der(0xA0, mech_list(*oids))
    if token is not None:
        content += der(0xA2, der(0x04, token))
    return der(0x60, OID_SPNEGO + der(0xA0, der(0x30, content)))


def neg_token_resp(
    *, state: int | None = None, mech: bytes | None = None, token: bytes | None = None, mic: bytes | None = None
) -> bytes:
    content = b""
    if state is not None:
        content += der(0xA0, der(0x0A, bytes([state])))
    if mech is not None:
        content += der(0xA1, mech)
    if token is not None:
        content += der(0xA2, der(0x04, token))
    if mic is not None:
        content += der(0xA3, der(0x04, mic))
    return der(0xA1, der(0x30, content))


def response_token(answer: bytes) -> bytes:
    """The mechanism's token within an acceptor's NegTokenResp."""
    start = answer.index(SIGNATURE)
    length, _, offset = struct.unpack_from("<HHI", answer, start + 40)
    return answer[start : start + offset + length]
