# cython: language_level=3, boundscheck=False, wraparound=False
"""Sealing and opening at the cryptography's own speed, over libcrypto. See `_sealing.pyi`."""

# What this module must achieve: make and open the sealed messages of NTLM ([MS-NLMP] 3.4.4.2) and of Kerberos with AES
# (RFC 4121 over RFC 3962 and RFC 8009), byte for byte as any other implementation, for hardly more than the ciphers and
# hashes themselves cost; a batch of messages in one call, straight into the buffer that is sent.
#
# Why it is hard: at 32 bytes the cryptography is 0.25 us. An allocation of a hash context, a system call for a random
# number, an object for a signature each cost as much again. So everything that can be is done once per context or once
# per process, and what is done per message is, in this order of cost:
#
#   - HMAC. Both states behind the key (inner and outer) are kept and copied, which is nearly twice as fast as hashing
#     the padded keys again (36 bytes: MD5 0.24 against 0.42 us, SHA-1 0.15 against 0.23), and faster than anything that
#     EVP_MAC offers. The context that they are copied to is not a sealer's but the module's: see `borrow`.
#   - The cipher. RC4 just runs on. AES runs on too: CBC contexts are never given the zero IV that each message starts
#     from, since that costs more than encrypting 64 bytes does. A context always goes on from the last ciphertext block
#     that it has seen, so that block is XORed into the first plaintext block: before encrypting, after decrypting.
#     Ciphertext stealing is two copies at the end (RFC 3962 5, "CS3": the last two blocks always change places).
#   - The confounder (Kerberos): from the system's generator, 4 KiB at a time.
#   - Python: one object for a whole batch of sealed frames, one per opened message.
#
# Rejected: EVP's own CTS mode (0.14 against 0.07 us for 64 bytes of AES-256) and EVP_MAC (0.25 against 0.19 for a short
# HMAC-SHA1), libcrypto's low-level RC4 (deprecated; 0.8 KiB less memory, no faster), primitives of our own (never).
#
# RC4 is only in OpenSSL's legacy provider. Loading that into the default library context would switch every old
# cipher on for the whole process, so it is loaded into a context that nobody else sees. The rest of NTLM's is from
# there too; Kerberos takes the default context, so that what the system's administrator has configured (FIPS) holds.
# Where something is missing, `available` says so and nothing else here need be called.
#
# Invariants, true between any two calls:
#
#   - `send_next` and `receive_next` are the numbers of the next messages. No number is used twice: who seals counts.
#   - Once a message did not open, none does ever again: cipher states have moved, and can no longer be the peer's. The
#     other direction has a state of its own and goes on: what was good before the bad message may yet be answered, no
#     matter in how many pieces the two arrived. Sealing ends only if libcrypto fails half-way through it.
#   - Nothing that was not authenticated leaves the call that opened it.
#   - Keys are in libcrypto's contexts only, which wipes them when they are freed.
#
# Who owns what, and for how long:
#
#   - For the life of the process: what is fetched of libcrypto (ciphers, hashes, key derivation, NTLM's library
#     context) and the pool of confounders. `fetch` makes these once; nothing frees them, since sealers may use them to
#     the last.
#   - For the life of a sealer: its cipher contexts and the states of its HMACs, made in `__cinit__` and freed in
#     `__dealloc__`. `__cinit__` may fail half-way: what was not made is NULL, and freeing that does nothing.
#   - For one call: the hash context of `borrow` and `give_back`, the array of jobs, the scratch. A job points into the
#     callers' messages and into frames that were made here; the call holds a reference to each, in a tuple or list of
#     its own, since the callers' may change while the GIL is released.
#   - Frames are made on a bare reference (`seal_all`), which becomes the caller's; what is opened goes into bytes
#     objects that nobody else sees before signature and number were found good.
#   - Keys as arguments are borrowed. Derived ones are on the stack and wiped before the function that derived them
#     returns.
#
# What stands in src/sealing/ is part of this module: what is declared of libcrypto, the primitives, what all sealers have
# in common, and one each for NTLM and for Kerberos.
#
# Whoever calls may come from an attacker's bytes: a length is compared before it is used, and before memory is taken.
# All arithmetic is unsigned and cannot wrap, as in `_framing`.

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_Check
from cpython.list cimport PyList_CheckExact, PyList_GET_SIZE
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.number cimport PyNumber_Index
from cpython.ref cimport Py_CLEAR
from libc.stdint cimport uint64_t
from libc.string cimport memcmp, memcpy, memset

import os


cdef extern from *:
    """
    #ifndef SEALING_RELEASE_FROM
    #define SEALING_RELEASE_FROM 262144
    #endif
    """
    # Bytes in one call from which on other threads may run meanwhile. Measured with `bench/bench_sealing.py --threads`
    # (which builds this with other values) on two cores: where both let go, two threads that seal do up to twice the
    # work of one from 64 KiB on. But who lets go beside a thread that is busy in Python may get the GIL back only after
    # the interpreter's switch interval, 5 ms: that one sealed, of what it does alone, 0.13 at 64 KiB and 0.1 to 0.3 at
    # 256 KiB and 1 MiB, where one that keeps the GIL does 0.4 to 0.5. So it is kept while others lose little by
    # waiting: 256 KiB take 0.63 ms (Kerberos: 0.40), an eighth of what any thread has to grant any other.
    const size_t RELEASE_FROM "(size_t) SEALING_RELEASE_FROM"

include "shared/bytes.pxi"
include "sealing/libcrypto.pxi"

cdef enum:
    # Sizes, in bytes.
    FRAME = 8  # before the trailer of a frame: length and trailer_length
    RECORD = 4  # before a record's: length
    BLOCK = 16  # AES
    CONFOUNDER = 16
    HEADER = 16  # RFC 4121 4.2.6.2: 05 04 | flags | ff | EC | RRC | sequence number, big-endian
    KEY_MAX = 32
    NTLM_KEY = 16
    NTLM_SIGNATURE = 16  # [MS-NLMP] 2.2.2.9.2: version 1 | checksum, 8 | sequence number, little-endian
    NTLM_CHECKSUM = 8
    DIGEST_MAX = 64
    HASH_BLOCK_MAX = 128
    POOL = 4096
    SMALL = 2048  # messages up to about this are opened by way of the stack

    # Flags of RFC 4121 4.2.2.
    SENT_BY_ACCEPTOR = 1
    SEALED = 2
    ACCEPTOR_SUBKEY = 4

    # What can be wrong with a message; each but the first is the end.
    GOOD = 0
    FAILED = 1
    MALFORMED = 2
    NOT_OURS = 3
    NOT_ENCRYPTED = 4
    OUT_OF_ORDER = 5
    ALTERED = 6
    ENCRYPTED = 7

cdef tuple REASONS = (
    "",
    "libcrypto failed",
    "a sealed message too short, or divided otherwise than its mechanism does",
    "not a sealed message for this side of this context",
    "a message that was signed but not encrypted",
    "a message out of order: replayed, or one before it is missing",
    "a message was altered, replayed or reordered, or sealed by somebody else",
    "a message that was encrypted, where both sides had agreed to sign only",
)
cdef str NO_MORE_OPENING = "nothing more opens: a message before this one did not"
cdef str NO_MORE_SEALING = "nothing more can be sealed: libcrypto failed before"

# In the place of a trailer's size: nobody has divided the token.
cdef size_t WHOLE = <size_t> -1

# The most that one call of EVP_CipherUpdate is given: it counts in int. A multiple of the block.
cdef size_t PIECE_MAX = <size_t> 1 << 30


class SealingError(Exception):
    pass


include "sealing/primitives.pxi"


include "sealing/sealer.pxi"
include "sealing/ntlm.pxi"
include "sealing/kerberos.pxi"
