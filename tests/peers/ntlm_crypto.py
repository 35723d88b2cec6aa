"""NTLM message security for a peer whose implementation keeps its sealing to itself.

The only module of these that uses private names of pyspnego (its `_ntlm_raw` functions are the plain arithmetic of
[MS-NLMP] 3.3 and 3.4, without state). They are not the library's own code under test, which is what matters here.
"""

from __future__ import annotations

import hmac
from typing import Literal

from spnego._ntlm_raw.crypto import RC4Handle, sealkey, signkey
from spnego._ntlm_raw.messages import NegotiateFlags
from spnego._ntlm_raw.security import sign

from .base import NTLM_TRAILER, PeerError

# What the arithmetic needs to know; the one shape that an acceptor of today agrees to.
_FLAGS = (
    NegotiateFlags.sign
    | NegotiateFlags.seal
    | NegotiateFlags.extended_session_security
    | NegotiateFlags.key_exch
    | NegotiateFlags.key_128
)


class NTLMSealing:
    """One side of NTLM message security, from a session key.

    Args:
        session_key: The exported session key, 16 bytes.
        first: The first sequence number, the same both ways: 0 for raw NTLM; 1 under SPNEGO, where number 0 went
            to the mechListMIC. RC4 starts afresh all the same ([MS-SPNG] 3.1.5.1): carried on from the MIC's
            eight bytes, not one message opens.
        usage: Which side.
    """

    def __init__(self, session_key: bytes, first: int, usage: Literal["initiate", "accept"] = "initiate") -> None:
        other: Literal["initiate", "accept"] = "accept" if usage == "initiate" else "initiate"
        self._sign_out = signkey(_FLAGS, session_key, usage)
        self._sign_in = signkey(_FLAGS, session_key, other)
        self._rc4_out = RC4Handle(sealkey(_FLAGS, session_key, usage))
        self._rc4_in = RC4Handle(sealkey(_FLAGS, session_key, other))
        self._next_out = self._next_in = first

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        """Return (trailer, ciphertext)."""
        # The data goes through RC4 before the checksum does: one stream for both.
        ciphertext = self._rc4_out.update(message)
        trailer = sign(_FLAGS, self._rc4_out, self._sign_out, self._next_out, message)
        self._next_out += 1
        return trailer, ciphertext

    def open(self, trailer: bytes, data: bytes) -> bytes:
        """Return the plaintext, or raise PeerError when the trailer is not its signature."""
        if len(trailer) != NTLM_TRAILER:
            raise PeerError(f"a trailer of {len(trailer)} bytes")
        message = self._rc4_in.update(data)
        expected = sign(_FLAGS, self._rc4_in, self._sign_in, self._next_in, message)
        self._next_in += 1
        if not hmac.compare_digest(expected, trailer):
            raise PeerError("bad signature")
        return message
