"""NTLM's cryptographic primitives, [MS-NLMP] 3.3 and 6.

Reading an account file needs some of these, and imports neither pyspnego nor python-gssapi for them; nor cryptography,
which RC4 is taken from where a login needs it.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from ..names import simple_upper

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import Cipher

# MD4, RFC 1320. Neither the standard library nor OpenSSL 3 (but for its legacy provider) has it.

_MD4_START: Final = (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)
_MD4_BLOCK: Final = 64
_MASK: Final = 0xFFFFFFFF

_Round = tuple[Callable[[int, int, int], int], int, tuple[tuple[int, int], ...]]


def _round(
    function: Callable[[int, int, int], int], constant: int, order: Sequence[int], turns: Sequence[int]
) -> _Round:
    return function, constant, tuple(zip(order, [*turns] * 4, strict=True))


# For each round (RFC 1320 3.4) its function, its constant, the order in which it takes the words, and their rotations.
_MD4_ROUNDS: Final = (
    _round(lambda x, y, z: z ^ (x & (y ^ z)), 0, range(16), (3, 7, 11, 19)),
    _round(
        lambda x, y, z: (x & y) | (z & (x | y)),
        0x5A827999,
        (0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
        (3, 5, 9, 13),
    ),
    _round(
        lambda x, y, z: x ^ y ^ z,
        0x6ED9EBA1,
        (0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15),
        (3, 9, 11, 15),
    ),
)


def md4(data: bytes) -> bytes:
    """MD4, RFC 1320: for the hashes of passwords, and for nothing new."""
    padded = data + b"\x80" + bytes((_MD4_BLOCK - 9 - len(data)) % _MD4_BLOCK) + struct.pack("<Q", 8 * len(data))
    state = _MD4_START
    for words in struct.iter_unpack("<16I", padded):
        a, b, c, d = state
        for function, constant, schedule in _MD4_ROUNDS:
            for index, turn in schedule:
                total = (a + function(b, c, d) + words[index] + constant) & _MASK
                a, b, c, d = d, (total << turn | total >> 32 - turn) & _MASK, b, c
        state = (state[0] + a) & _MASK, (state[1] + b) & _MASK, (state[2] + c) & _MASK, (state[3] + d) & _MASK
    return struct.pack("<4I", *state)


def nt_hash(password: str) -> bytes:
    """NTOWFv1, [MS-NLMP] 3.3.1: MD4 of the password in UTF-16LE. 16 bytes."""
    return md4(password.encode("utf-16-le", errors="surrogatepass"))


def hmac_md5(key: bytes, data: bytes) -> bytes:
    """HMAC-MD5, [MS-NLMP] 6."""
    return hmac.digest(key, data, "md5")


def ntowf_v2(user: str, domain: str, nt_hash: bytes) -> tuple[bytes, ...]:
    """The keys that a client may have made of an account's NT hash (NTOWFv2, 3.3.2).

    There are two: Microsoft's upper-casing (and Samba's, and .NET's) keeps a letter whose upper case
    is two letters, while pyspnego, gss-ntlmssp and sspi-rs take Unicode's full mapping. They differ
    for ``straße`` and its like, and agree for all else.
    """
    simple, full = simple_upper(user), user.upper()
    names = (simple,) if simple == full else (simple, full)
    return tuple(hmac_md5(nt_hash, (name + domain).encode("utf-16-le")) for name in names)


@functools.cache
def _arc4() -> Callable[[bytes], Cipher[None]]:
    # The library that pyspnego has its RC4 from.
    from cryptography.hazmat.decrepit.ciphers.algorithms import ARC4  # noqa: PLC0415 - see the head of the file
    from cryptography.hazmat.primitives.ciphers import Cipher  # noqa: PLC0415

    return lambda key: Cipher(ARC4(key), mode=None)


def rc4k(key: bytes, data: bytes) -> bytes:
    """RC4 of one piece of data under a key of its own, [MS-NLMP] 6."""
    return _arc4()(key).encryptor().update(data)


def channel_bindings_hash(packed: bytes) -> bytes:
    """MsvAvChannelBindings: MD5 of a gss_channel_bindings_struct, 2.2.2.1 and RFC 2744 3.11."""
    return hashlib.md5(packed, usedforsecurity=False).digest()
