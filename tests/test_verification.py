"""What proves an AUTHENTICATE message without a MIC: the proof alone. With one: ``test_security_rows.py``."""

from __future__ import annotations

import struct

from forge import SIGNATURE, Client, hmac_md5, rc4
from triosspi import Account, AuthenticationError
from triosspi.security.ntlm.messages import read_authenticate
from triosspi.security.ntlm.primitives import nt_hash
from triosspi.security.ntlm.verification import NTLMPolicy, verify

CHALLENGE = bytes(range(8))


def _challenge() -> bytes:
    flags = struct.pack("<I", Client().flags)
    return (
        SIGNATURE
        + struct.pack("<I", 2)
        + bytes(8)
        + flags
        + CHALLENGE
        + bytes(8)
        + struct.pack("<HHI", 4, 4, 48)
        + bytes(4)
    )


def test_no_signed_byte_of_an_authenticate_can_be_changed_even_without_a_mic() -> None:
    # The proof alone covers the blob and, through the key, both names: every bit of each is flipped.
    client = Client(mic="absent", promise_mic=False)
    client.negotiate()
    challenge = _challenge()
    good = client.authenticate(challenge)
    policy = NTLMPolicy(require_mic=False)
    account = Account("DOM", "alice", nt_hash("secret"))

    def accepts(raw: bytes) -> bool:
        try:
            message = read_authenticate(raw)
            verify(message, account, policy, negotiate=b"", challenge=challenge)
        except AuthenticationError:
            return False
        return True

    assert accepts(good)
    tried = 0
    for field in (20, 28):  # the user name, too, but for its case
        length, _, offset = struct.unpack_from("<HHI", good, field)
        for position in range(offset, offset + length):
            for bit in range(8):
                changed = bytearray(good)
                changed[position] ^= 1 << bit
                assert not accepts(bytes(changed))
                tried += 1
    assert tried > 400


def test_a_signed_blob_without_a_target_name_or_any_pair_is_a_login() -> None:
    # Missing is not malformed: Samba's clients name no target, and proof and names are what counts.
    key = hmac_md5(nt_hash("secret"), "ALICEDOM".encode("utf-16-le"))
    blob = b"\1\1" + bytes(26) + bytes(4)
    proof = hmac_md5(key, CHALLENGE + blob)
    client = Client(mic="absent", promise_mic=False)
    client.nt_response = proof + blob
    client.encrypted_session_key = rc4(hmac_md5(key, proof), bytes(16))
    client.negotiate()
    message = read_authenticate(client.authenticate(_challenge()))
    policy = NTLMPolicy(require_mic=False)
    account = Account("DOM", "alice", nt_hash("secret"))
    login = verify(message, account, policy, negotiate=b"", challenge=_challenge())
    assert login.session_key == bytes(16)
