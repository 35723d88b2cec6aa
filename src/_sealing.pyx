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
#   - Nothing that was not authenticated leaves: an opened message is put into a bytes object that nobody else has seen,
#     and this is handed out when signature and number were found good.
#   - Keys are in libcrypto's contexts only, which wipes them when they are freed.
#
# Whoever calls may come from an attacker's bytes: a length is compared before it is used, and before memory is taken.
# All arithmetic is unsigned and cannot wrap, as in `_framing`.

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_CheckExact, PyList_GET_SIZE
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.number cimport PyNumber_Index
from cpython.object cimport PyObject
from cpython.ref cimport Py_CLEAR
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

import os


cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX
    # On PyObject*, outside of Cython's reference counting: an object can only be resized while it has one reference.
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *source, Py_ssize_t size) except NULL
    char *bytes_of "PyBytes_AS_STRING"(PyObject *object) noexcept
    int resize_bytes "_PyBytes_Resize"(PyObject **object, Py_ssize_t size) except -1

cdef extern from "<openssl/crypto.h>" nogil:
    int CRYPTO_memcmp(const void *left, const void *right, size_t size)
    void OPENSSL_cleanse(void *at, size_t size)
    ctypedef struct OSSL_LIB_CTX:
        pass
    OSSL_LIB_CTX *OSSL_LIB_CTX_new()
    void OSSL_LIB_CTX_free(OSSL_LIB_CTX *library)

cdef extern from "<openssl/provider.h>" nogil:
    ctypedef struct OSSL_PROVIDER:
        pass
    OSSL_PROVIDER *OSSL_PROVIDER_load(OSSL_LIB_CTX *library, const char *name)

cdef extern from "<openssl/err.h>" nogil:
    int ERR_set_mark()
    int ERR_pop_to_mark()
    void ERR_clear_error()

cdef extern from "<openssl/params.h>" nogil:
    ctypedef struct OSSL_PARAM:
        pass
    OSSL_PARAM OSSL_PARAM_construct_utf8_string(const char *key, char *value, size_t size)
    OSSL_PARAM OSSL_PARAM_construct_octet_string(const char *key, void *value, size_t size)
    OSSL_PARAM OSSL_PARAM_construct_end()

cdef extern from "<openssl/evp.h>" nogil:
    ctypedef struct EVP_CIPHER:
        pass
    ctypedef struct EVP_CIPHER_CTX:
        pass
    ctypedef struct EVP_MD:
        pass
    ctypedef struct EVP_MD_CTX:
        pass
    ctypedef struct EVP_KDF:
        pass
    ctypedef struct EVP_KDF_CTX:
        pass
    int EVP_default_properties_is_fips_enabled(OSSL_LIB_CTX *library)
    EVP_CIPHER *EVP_CIPHER_fetch(OSSL_LIB_CTX *library, const char *name, const char *properties)
    EVP_CIPHER_CTX *EVP_CIPHER_CTX_new()
    void EVP_CIPHER_CTX_free(EVP_CIPHER_CTX *context)
    int EVP_CIPHER_CTX_set_padding(EVP_CIPHER_CTX *context, int pad)
    int EVP_CipherInit_ex2(
        EVP_CIPHER_CTX *context, const EVP_CIPHER *cipher, const unsigned char *key, const unsigned char *iv,
        int encrypt, const OSSL_PARAM *parameters,
    )
    int EVP_CipherUpdate(
        EVP_CIPHER_CTX *context, unsigned char *to, int *written, const unsigned char *source, int size
    )
    EVP_MD *EVP_MD_fetch(OSSL_LIB_CTX *library, const char *name, const char *properties)
    EVP_MD_CTX *EVP_MD_CTX_new()
    void EVP_MD_CTX_free(EVP_MD_CTX *context)
    int EVP_MD_CTX_copy_ex(EVP_MD_CTX *to, const EVP_MD_CTX *source)
    int EVP_DigestInit_ex2(EVP_MD_CTX *context, const EVP_MD *digest, const OSSL_PARAM *parameters)
    int EVP_DigestUpdate(EVP_MD_CTX *context, const void *source, size_t size)
    int EVP_DigestFinal_ex(EVP_MD_CTX *context, unsigned char *to, unsigned int *size)

cdef extern from "<openssl/kdf.h>" nogil:
    EVP_KDF *EVP_KDF_fetch(OSSL_LIB_CTX *library, const char *name, const char *properties)
    EVP_KDF_CTX *EVP_KDF_CTX_new(EVP_KDF *kdf)
    void EVP_KDF_CTX_free(EVP_KDF_CTX *context)
    int EVP_KDF_derive(EVP_KDF_CTX *context, unsigned char *to, size_t size, const OSSL_PARAM *parameters)


ctypedef unsigned char byte

cdef enum:
    # Sizes, in bytes.
    PREFIX = 8  # of a frame, before its trailer: length and trailer_length
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

cdef tuple REASONS = (
    "",
    "libcrypto failed",
    "a sealed message too short, or divided otherwise than its mechanism does",
    "not a sealed message for this side of this context",
    "a message that was signed but not encrypted",
    "a message out of order: replayed, or one before it is missing",
    "a message was altered, replayed or reordered, or sealed by somebody else",
)
cdef str NO_MORE_OPENING = "nothing more opens: a message before this one did not"
cdef str NO_MORE_SEALING = "nothing more can be sealed: libcrypto failed before"

# Bytes in one call from which on other threads may run meanwhile. Measured with `bench/bench_sealing.py --threads` on
# two cores: where both let go, two threads that seal do up to twice the work of one from 64 KiB on. But who lets go
# beside a thread that is busy in Python may get the GIL back only after the interpreter's switch interval, 5 ms: that
# one sealed, of what it does alone, 0.13 at 64 KiB and 0.1 to 0.3 at 256 KiB and 1 MiB, where one that keeps the GIL
# does 0.4 to 0.5. So it is kept while others lose little by waiting: 256 KiB take 0.63 ms (Kerberos: 0.40), an eighth
# of what any thread has to grant any other.
cdef size_t RELEASE_FROM = 262144

# The most that one call of EVP_CipherUpdate is given: it counts in int. A multiple of the block.
cdef size_t PIECE_MAX = <size_t> 1 << 30

cdef size_t U32_MAX = 0xFFFFFFFF
cdef size_t OBJECT_MAX = <size_t> PY_SSIZE_T_MAX


class SealingError(Exception):
    pass


# ---- what is fetched once in a process ----


cdef struct Enctype:
    int number  # IANA's
    size_t key  # bytes of the protocol key, and of the encryption key
    size_t integrity_key
    size_t mac  # bytes of the truncated HMAC
    size_t hash_block
    bint mac_of_ciphertext  # RFC 8009; else, of the plaintext (RFC 3961 5.3)
    const char *cipher_name
    const char *digest_name
    EVP_CIPHER *cipher
    EVP_MD *digest

cdef bint fetched = False
cdef bint ntlm_works = False
cdef bint kerberos_works = False
cdef EVP_CIPHER *rc4 = NULL
cdef EVP_MD *md5 = NULL
cdef EVP_KDF *krb5kdf = NULL
cdef EVP_KDF *kbkdf = NULL
cdef Enctype[4] enctypes
enctypes[0] = Enctype(17, 16, 16, 12, 64, False, "AES-128-CBC", "SHA1", NULL, NULL)
enctypes[1] = Enctype(18, 32, 32, 12, 64, False, "AES-256-CBC", "SHA1", NULL, NULL)
enctypes[2] = Enctype(19, 16, 16, 16, 64, True, "AES-128-CBC", "SHA256", NULL, NULL)
enctypes[3] = Enctype(20, 32, 24, 24, 128, True, "AES-256-CBC", "SHA384", NULL, NULL)


cdef bint fetch_ntlm() noexcept:
    global rc4, md5
    cdef OSSL_LIB_CTX *library
    cdef byte[NTLM_KEY] key
    cdef EVP_CIPHER_CTX *trial
    if EVP_default_properties_is_fips_enabled(NULL):
        return False  # not to be got round by a library context of our own
    library = OSSL_LIB_CTX_new()
    if library is NULL:
        return False
    # Once legacy.so is loaded, MD5 has to be asked for too: "default" is only there by itself while nothing else is.
    if OSSL_PROVIDER_load(library, "legacy") is not NULL and OSSL_PROVIDER_load(library, "default") is not NULL:
        rc4 = EVP_CIPHER_fetch(library, "RC4", NULL)
        md5 = EVP_MD_fetch(library, "MD5", NULL)
    if rc4 is NULL or md5 is NULL:
        OSSL_LIB_CTX_free(library)
        return False
    # The library context stays for the life of the process.
    memset(key, 0, NTLM_KEY)
    trial = new_cipher(rc4, key, True)
    EVP_CIPHER_CTX_free(trial)
    return trial is not NULL


cdef bint fetch_kerberos() noexcept:
    global krb5kdf, kbkdf
    cdef size_t i
    cdef byte[KEY_MAX] key, derived
    cdef byte[5] constant
    krb5kdf = EVP_KDF_fetch(NULL, "KRB5KDF", NULL)
    kbkdf = EVP_KDF_fetch(NULL, "KBKDF", NULL)
    if krb5kdf is NULL or kbkdf is NULL:
        return False
    for i in range(<size_t> KEY_MAX):
        key[i] = <byte> i
    memset(constant, 0, 5)
    for i in range(4):
        enctypes[i].cipher = EVP_CIPHER_fetch(NULL, enctypes[i].cipher_name, NULL)
        enctypes[i].digest = EVP_MD_fetch(NULL, enctypes[i].digest_name, NULL)
        if enctypes[i].cipher is NULL or enctypes[i].digest is NULL:
            return False
        if not derive_key(&enctypes[i], key, constant, derived, enctypes[i].integrity_key):
            return False
    return True


cdef void fetch() noexcept:
    global fetched, ntlm_works, kerberos_works
    if fetched:
        return
    fetched = True
    # What could not be had leaves errors behind, which another user of libcrypto in this thread (`ssl`) would find.
    ERR_set_mark()
    ntlm_works = fetch_ntlm()
    kerberos_works = fetch_kerberos()
    ERR_pop_to_mark()


def available():
    fetch()
    return {"ntlm": bool(ntlm_works), "kerberos": bool(kerberos_works)}


# ---- ciphers, HMAC, keys ----


cdef EVP_CIPHER_CTX *new_cipher(const EVP_CIPHER *cipher, const byte *key, bint encrypt) noexcept:
    """A cipher context, its IV (if it has one) zero; NULL if there cannot be one."""
    cdef byte[BLOCK] zeros
    cdef EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new()
    if context is NULL:
        return NULL
    memset(zeros, 0, BLOCK)
    if EVP_CipherInit_ex2(context, cipher, key, zeros, encrypt, NULL) == 1:
        if EVP_CIPHER_CTX_set_padding(context, 0) == 1:
            return context
    EVP_CIPHER_CTX_free(context)
    return NULL


cdef inline bint crypt(EVP_CIPHER_CTX *context, byte *to, const byte *source, size_t size) noexcept nogil:
    """Encrypt or decrypt, whichever the context is for; `to` may be `source`. Block ciphers: whole blocks only."""
    cdef int written = 0
    while size > PIECE_MAX:
        if EVP_CipherUpdate(context, to, &written, source, <int> PIECE_MAX) != 1:
            return False
        to += PIECE_MAX
        source += PIECE_MAX
        size -= PIECE_MAX
    return size == 0 or EVP_CipherUpdate(context, to, &written, source, <int> size) == 1


cdef struct Mac:
    # HMAC with its key: the hash's states behind the padded keys. NULL or both there.
    EVP_MD_CTX *inner
    EVP_MD_CTX *outer


cdef EVP_MD_CTX *new_digest(
    const EVP_MD *digest, const byte *key, size_t key_size, size_t block, byte pad, size_t zeros
) noexcept:
    """A hash context that has seen the padded key, and after it `zeros` zero bytes; NULL if there cannot be one."""
    cdef byte[HASH_BLOCK_MAX] padded
    cdef size_t i
    cdef EVP_MD_CTX *context = EVP_MD_CTX_new()
    cdef bint good = context is not NULL
    memset(padded, pad, block)
    for i in range(key_size):
        padded[i] ^= key[i]
    good = good and EVP_DigestInit_ex2(context, digest, NULL) == 1 and EVP_DigestUpdate(context, padded, block) == 1
    memset(padded, 0, zeros)
    good = good and EVP_DigestUpdate(context, padded, zeros) == 1
    OPENSSL_cleanse(padded, HASH_BLOCK_MAX)
    if good:
        return context
    EVP_MD_CTX_free(context)
    return NULL


cdef bint new_mac(
    Mac *mac, const EVP_MD *digest, const byte *key, size_t key_size, size_t block, size_t zeros
) noexcept:
    """HMAC of messages that begin with `zeros` zero bytes, which will not be given again (RFC 8009 5: the IV)."""
    mac.inner = new_digest(digest, key, key_size, block, 0x36, zeros)
    mac.outer = new_digest(digest, key, key_size, block, 0x5C, 0)
    return mac.inner is not NULL and mac.outer is not NULL


cdef void free_mac(Mac *mac) noexcept:
    EVP_MD_CTX_free(mac.inner)
    EVP_MD_CTX_free(mac.outer)
    mac.inner = mac.outer = NULL


cdef inline bint authenticate(
    EVP_MD_CTX *work,
    const Mac *mac,
    const byte *first,
    size_t first_size,
    const byte *second,
    size_t second_size,
    byte *to,
) noexcept nogil:
    """HMAC of first | second into `to`, which has room for DIGEST_MAX bytes."""
    cdef unsigned int size = 0
    return (
        EVP_MD_CTX_copy_ex(work, mac.inner) == 1
        and EVP_DigestUpdate(work, first, first_size) == 1
        and (second_size == 0 or EVP_DigestUpdate(work, second, second_size) == 1)
        and EVP_DigestFinal_ex(work, to, &size) == 1
        and EVP_MD_CTX_copy_ex(work, mac.outer) == 1
        and EVP_DigestUpdate(work, to, size) == 1
        and EVP_DigestFinal_ex(work, to, &size) == 1
    )


# The hash context that states are copied to. A sealer uses it from one end of a call to the other and no longer, and
# calls that keep the GIL do not overlap, so one is enough for all: it saves each connection 0.2 KiB, more under SHA-2.
# It is taken, not shared: while a call has released the GIL, others find none here and make one.
cdef EVP_MD_CTX *spare = NULL


cdef EVP_MD_CTX *borrow() except NULL:
    global spare
    cdef EVP_MD_CTX *work = spare
    spare = NULL
    if work is NULL:
        work = EVP_MD_CTX_new()
        if work is NULL:
            raise MemoryError
    return work


cdef void give_back(EVP_MD_CTX *work) noexcept:
    global spare
    if spare is NULL:
        spare = work
    else:
        EVP_MD_CTX_free(work)


cdef bint derive_ntlm_key(EVP_MD_CTX *work, bytes session_key, bytes purpose, byte *to) noexcept:
    """[MS-NLMP] 3.4.5.2 and 3.4.5.3: 16 bytes."""
    cdef unsigned int size = 0
    return (
        EVP_DigestInit_ex2(work, md5, NULL) == 1
        and EVP_DigestUpdate(work, PyBytes_AS_STRING(session_key), NTLM_KEY) == 1
        # The constants' final zero byte is part of them.
        and EVP_DigestUpdate(work, PyBytes_AS_STRING(purpose), length_of(purpose) + 1) == 1
        and EVP_DigestFinal_ex(work, to, &size) == 1
    )


cdef bint derive_key(const Enctype *enctype, const byte *key, const byte *constant, byte *to, size_t size) noexcept:
    """DK(key, constant) of RFC 3961 5.1, for RFC 8009's enctypes KDF-HMAC-SHA2 of its section 3; constant: 5 bytes."""
    cdef OSSL_PARAM[6] parameters
    cdef EVP_KDF_CTX *context = EVP_KDF_CTX_new(kbkdf if enctype.mac_of_ciphertext else krb5kdf)
    cdef bint good
    if context is NULL:
        return False
    parameters[0] = OSSL_PARAM_construct_octet_string("key", <void *> key, enctype.key)
    if enctype.mac_of_ciphertext:
        parameters[1] = OSSL_PARAM_construct_utf8_string("mac", "HMAC", 0)
        parameters[2] = OSSL_PARAM_construct_utf8_string("digest", <char *> enctype.digest_name, 0)
        parameters[3] = OSSL_PARAM_construct_utf8_string("mode", "COUNTER", 0)
        parameters[4] = OSSL_PARAM_construct_octet_string("salt", <void *> constant, 5)
        parameters[5] = OSSL_PARAM_construct_end()
    else:
        parameters[1] = OSSL_PARAM_construct_utf8_string("cipher", <char *> enctype.cipher_name, 0)
        parameters[2] = OSSL_PARAM_construct_octet_string("constant", <void *> constant, 5)
        parameters[3] = OSSL_PARAM_construct_end()
    good = EVP_KDF_derive(context, to, size, parameters) == 1
    EVP_KDF_CTX_free(context)
    return good


# ---- confounders ----

# From the system's generator, since a process of ours may be forked in ways that no generator of a library notices. A
# piece is used once and gone. After a fork parent and child hold the same bytes: the child throws its away.
cdef byte[POOL] pool
cdef size_t pool_left = 0  # pool[:pool_left] has not been used


cdef int draw_confounder(byte *to) except -1:
    global pool_left
    cdef bytes fresh
    if pool_left == 0:
        fresh = os.urandom(POOL)
        memcpy(pool, PyBytes_AS_STRING(fresh), POOL)
        OPENSSL_cleanse(PyBytes_AS_STRING(fresh), POOL)
        pool_left = POOL
    pool_left -= CONFOUNDER
    memcpy(to, pool + pool_left, CONFOUNDER)
    OPENSSL_cleanse(pool + pool_left, CONFOUNDER)
    return 0


def _forget_confounders():
    global pool_left
    pool_left = 0
    OPENSSL_cleanse(pool, POOL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_confounders)


# ---- bytes ----


cdef inline uint32_t load_u32(const byte *at) noexcept nogil:
    return (
        <uint32_t> at[0]
        | (<uint32_t> at[1] << 8)
        | (<uint32_t> at[2] << 16)
        | (<uint32_t> at[3] << 24)
    )


cdef inline void store_u32(byte *at, uint32_t value) noexcept nogil:
    at[0] = <byte> (value & 0xFF)
    at[1] = <byte> ((value >> 8) & 0xFF)
    at[2] = <byte> ((value >> 16) & 0xFF)
    at[3] = <byte> (value >> 24)


cdef inline size_t load_u16_be(const byte *at) noexcept nogil:
    return (<size_t> at[0] << 8) | <size_t> at[1]


cdef inline void store_u64_be(byte *at, uint64_t value) noexcept nogil:
    cdef unsigned int i
    for i in range(8):
        at[7 - i] = <byte> (value & 0xFF)
        value >>= 8


cdef inline void xor_block(byte *to, const byte *other) noexcept nogil:
    cdef unsigned int i
    for i in range(<unsigned int> BLOCK):
        to[i] = <byte> (to[i] ^ other[i])


cdef inline void copy_turned(byte *to, const byte *ring, size_t ring_size, size_t begin, size_t size) noexcept nogil:
    """Copy size bytes of a ring from ring[begin] on; begin is within it, size at most its size."""
    cdef size_t first = min(size, ring_size - begin)
    memcpy(to, ring + begin, first)
    memcpy(to + first, ring, size - first)


cdef inline size_t length_of(bytes value) noexcept:
    return <size_t> PyBytes_GET_SIZE(value)


cdef inline byte *start_of(bytes value) noexcept:
    return <byte *> PyBytes_AS_STRING(value)


cdef inline bytes cut(const byte *start, size_t size):
    return PyBytes_FromStringAndSize(<const char *> start, <Py_ssize_t> size)


cdef bytes checked_bytes(object value, str what):
    if not PyBytes_Check(value):
        raise TypeError(f"{what} must be bytes, not {type(value).__name__}")
    return <bytes> value


cdef uint64_t checked_sequence(object value, uint64_t last) except? 0:
    value = PyNumber_Index(value)  # the conversion to C alone would cut 3.5 to 3
    if not 0 <= value <= last:
        raise ValueError(f"a sequence number must be in 0..{last}, not {value!r}")
    return value


# ---- sealers ----


cdef struct Job:
    # One message of a batch.
    const byte *source  # sealing: the message; opening: the token (trailer | ciphertext)
    size_t size  # of it
    byte *to  # where the frame, or the opened message, goes
    size_t opened  # opening: the message's size


@cython.internal
cdef class Sealer:
    """What the two have in common: batches, numbers, the GIL, and the end after a failure."""

    cdef readonly size_t trailer_size
    cdef size_t slack  # bytes behind a token that sealing it may write to
    cdef size_t scratch_needed  # bytes beside the token's size that opening it needs; 0: none at all
    cdef uint64_t send_next  # the number of the next message to seal
    cdef uint64_t receive_next  # the number that the next message to open must have
    cdef uint64_t last  # the largest number that may be used; one more still fits
    cdef uint64_t messages_sealed, bytes_sealed, messages_opened, bytes_opened  # without the empty ones
    cdef bint sealing_failed
    cdef bint opening_failed
    cdef bint sealing  # a call is at it, and may have released the GIL
    cdef bint opening  # the same

    @property
    def traffic(self):
        return self.messages_sealed, self.bytes_sealed, self.messages_opened, self.bytes_opened

    # ---- what a mechanism does: one message, without the GIL ----

    cdef int prepare(self, byte *token) except -1:
        """With the GIL, before `seal_one`: put there what the token needs of Python."""
        return 0

    cdef int seal_one(self, const byte *message, size_t size, byte *token, EVP_MD_CTX *work) noexcept nogil:
        """Seal into `token`, `trailer_size + size` bytes and then `slack`."""
        return FAILED

    cdef int measure(self, const byte *token, size_t size, size_t trailer, size_t *opened) noexcept nogil:
        """How long the message will be that is in a token; may be as wrong as the token."""
        return FAILED

    cdef int open_one(
        self, const byte *token, size_t size, byte *to, size_t opened, byte *scratch, EVP_MD_CTX *work
    ) noexcept nogil:
        """Open a token that was measured; its message is `opened` bytes."""
        return FAILED

    # ---- sealing ----

    def seal(self, message):
        cdef Job job
        cdef size_t total = self.add_job(message, &job, 0)
        cdef bytes frame = self.seal_all(&job, 1, total, job.size)
        cdef const byte *token = start_of(frame) + PREFIX
        return cut(token, self.trailer_size), cut(token + self.trailer_size, job.size)

    def seal_frames(self, messages):
        cdef Job one
        cdef Job *jobs
        cdef object message
        cdef tuple mine
        cdef size_t count = 0, total = 0, content = 0
        if PyList_CheckExact(messages) and PyList_GET_SIZE(messages) == 1:
            # The commonest by far, where nobody sends in batches; it has no need of what follows.
            message = (<list> messages)[0]
            total = self.add_job(message, &one, 0)
            return self.seal_all(&one, 1, total, one.size)
        # A tuple of our own: the messages measured first must be the messages sealed afterwards.
        mine = tuple(messages)
        if not mine:
            return b""
        jobs = new_jobs(<size_t> len(mine))
        try:
            for message in mine:
                total = self.add_job(message, &jobs[count], total)
                content += jobs[count].size  # at most `total`
                count += 1
            return self.seal_all(jobs, count, total, content)
        finally:
            PyMem_RawFree(jobs)

    cdef size_t add_job(self, object message, Job *job, size_t total) except 0:
        """Check a message; the bytes of all frames with this one's, where those before take total."""
        cdef size_t size = length_of(checked_bytes(message, "a message"))
        if size > U32_MAX - 4 - self.trailer_size:
            raise ValueError(f"a message of {size} bytes does not fit a length of four bytes")
        job.source = <const byte *> PyBytes_AS_STRING(message)
        job.size = size
        return checked_sum(total, checked_sum(size, PREFIX + self.trailer_size))

    cdef int check_sealing(self, size_t count) except -1:
        """Refuse before anything is spent."""
        if self.sealing_failed:
            raise SealingError(NO_MORE_SEALING)
        if self.sealing:
            raise RuntimeError("another thread is sealing with this sealer")
        if self.send_next > self.last or count - 1 > self.last - self.send_next:
            raise SealingError("no more messages can be numbered")
        return 0

    cdef bytes seal_all(self, Job *jobs, size_t count, size_t total, size_t content):
        """Seal at least one message, `content` bytes in all, into frames of `total` bytes."""
        cdef EVP_MD_CTX *work = NULL
        cdef PyObject *frames = NULL
        cdef bytes result
        cdef byte *to
        cdef size_t i
        cdef int state
        self.check_sealing(count)
        self.sealing = True
        try:
            frames = new_bytes(NULL, <Py_ssize_t> checked_sum(total, self.slack))
            to = <byte *> bytes_of(frames)
            for i in range(count):
                self.prepare(to + PREFIX)
                jobs[i].to = to
                to += PREFIX + self.trailer_size + jobs[i].size
            work = borrow()
            if content >= RELEASE_FROM:
                with nogil:
                    state = self.seal_jobs(jobs, count, work)
            else:
                state = self.seal_jobs(jobs, count, work)
            if state != GOOD:
                self.sealing_failed = True
                forget_errors()
                raise SealingError(REASONS[state])
            if self.slack:
                self.shorten(&frames, total)
            result = <bytes> frames  # a second reference; the last line drops ours
        finally:
            self.sealing = False
            if work is not NULL:
                give_back(work)
            Py_CLEAR(frames)
        return result

    cdef int shorten(self, PyObject **frames, size_t total) except -1:
        try:
            return resize_bytes(frames, <Py_ssize_t> total)
        except MemoryError:
            # Numbers were used for what will never be sent.
            self.sealing_failed = True
            raise

    cdef int seal_jobs(self, const Job *jobs, size_t count, EVP_MD_CTX *work) noexcept nogil:
        cdef size_t i
        cdef byte *frame
        cdef int state
        for i in range(count):
            frame = jobs[i].to
            # Only now: sealing the message before this one has written here. No narrowing loses anything: `add_job`.
            store_u32(frame, <uint32_t> (4 + self.trailer_size + jobs[i].size))
            store_u32(frame + 4, <uint32_t> self.trailer_size)
            state = self.seal_one(jobs[i].source, jobs[i].size, frame + PREFIX, work)
            if state != GOOD:
                return state
            self.send_next += 1
            self.messages_sealed += jobs[i].size != 0
            self.bytes_sealed += jobs[i].size
        return GOOD

    # ---- opening ----

    def open(self, trailer, ciphertext):
        cdef size_t trailer_size = length_of(checked_bytes(trailer, "a trailer"))
        cdef size_t rest = length_of(checked_bytes(ciphertext, "a ciphertext"))
        cdef bytes token = cut(NULL, checked_sum(trailer_size, rest))
        cdef bytes message = b""
        cdef Job job
        self.check_opening()
        memcpy(start_of(token), PyBytes_AS_STRING(trailer), trailer_size)
        memcpy(start_of(token) + trailer_size, PyBytes_AS_STRING(ciphertext), rest)
        job.source = start_of(token)
        job.size = length_of(token)
        cdef int state = self.measure(job.source, job.size, trailer_size, &job.opened)
        if state == GOOD:
            message = cut(NULL, job.opened)
            job.to = start_of(message)
            self.open_all(&job, 1, &state)
        if state != GOOD:
            self.opening_failed = True
            forget_errors()
            raise SealingError(REASONS[state])
        return message

    def open_frames(self, list frames not None, Py_ssize_t start=0):
        cdef list messages = []
        cdef list mine
        cdef Job one
        cdef Job *jobs = &one
        cdef size_t count = 0, done
        cdef int state = GOOD
        cdef object frame
        cdef bytes message
        if start < 0:
            raise ValueError(f"start must not be negative: {start}")
        mine = frames[start:]  # a list of our own: theirs may change while the GIL is not ours
        if self.opening_failed:
            return messages, SealingError(NO_MORE_OPENING)
        if not mine:
            return messages, None
        self.check_opening()
        if len(mine) > 1:
            jobs = new_jobs(<size_t> len(mine))
        try:
            for frame in mine:
                state = self.take_apart(checked_bytes(frame, "a frame"), &jobs[count])
                if state != GOOD:
                    break
                message = cut(NULL, jobs[count].opened)
                jobs[count].to = start_of(message)
                messages.append(message)
                count += 1
                if length_of(message) == 0:
                    break
            done = self.open_all(jobs, count, &state)
        finally:
            if jobs is not &one:
                PyMem_RawFree(jobs)
        if state == GOOD:
            return messages, None
        self.opening_failed = True
        forget_errors()
        del messages[<Py_ssize_t> done:]
        return messages, SealingError(REASONS[state])

    cdef int check_opening(self) except -1:
        if self.opening_failed:
            raise SealingError(NO_MORE_OPENING)
        if self.opening:
            raise RuntimeError("another thread is opening with this sealer")
        return 0

    cdef int take_apart(self, bytes frame, Job *job) noexcept:
        """trailer_length | trailer | ciphertext."""
        cdef size_t size = length_of(frame)
        cdef size_t trailer
        if size < 4:
            return MALFORMED
        trailer = load_u32(start_of(frame))
        if trailer > size - 4:
            return MALFORMED
        job.source = start_of(frame) + 4
        job.size = size - 4
        return self.measure(job.source, job.size, trailer, &job.opened)

    cdef size_t open_all(self, const Job *jobs, size_t count, int *state) except? 0:
        """Open in order; how many did. If one did not, `state` says why, else it is left as it was."""
        cdef byte[SMALL] small
        cdef byte *scratch = small
        cdef size_t content = 0, longest = 0, i, done = 0
        cdef EVP_MD_CTX *work = borrow()
        self.opening = True
        for i in range(count):
            content += jobs[i].size  # all in memory: does not wrap
            longest = max(longest, jobs[i].size)
        try:
            if self.scratch_needed and longest > SMALL - self.scratch_needed:
                scratch = <byte *> PyMem_RawMalloc(longest + self.scratch_needed)
                if scratch is NULL:
                    raise MemoryError
            if content >= RELEASE_FROM:
                with nogil:
                    done = self.open_jobs(jobs, count, scratch, work, state)
            else:
                done = self.open_jobs(jobs, count, scratch, work, state)
        finally:
            self.opening = False
            give_back(work)
            if scratch is not small:
                PyMem_RawFree(scratch)
        return done

    cdef size_t open_jobs(
        self, const Job *jobs, size_t count, byte *scratch, EVP_MD_CTX *work, int *state
    ) noexcept nogil:
        cdef size_t i
        cdef int found
        for i in range(count):
            if self.receive_next > self.last:
                found = OUT_OF_ORDER
            else:
                found = self.open_one(jobs[i].source, jobs[i].size, jobs[i].to, jobs[i].opened, scratch, work)
            if found != GOOD:
                state[0] = found
                return i
            self.receive_next += 1
            self.messages_opened += jobs[i].opened != 0
            self.bytes_opened += jobs[i].opened
        return count


cdef void forget_errors() noexcept:
    # What libcrypto may have left would be found by another user of it in this thread.
    ERR_clear_error()


cdef Job *new_jobs(size_t count) except NULL:
    # The multiplication does not wrap: as many objects are in memory, each larger than a Job.
    cdef Job *jobs = <Job *> PyMem_RawMalloc(count * sizeof(Job))
    if jobs is NULL:
        raise MemoryError
    return jobs


cdef size_t checked_sum(size_t left, size_t right) except? 0:
    """The sum of two sizes, if an object can be that long; both are at most OBJECT_MAX, so that it does not wrap."""
    cdef size_t total = left + right
    if total > OBJECT_MAX:
        raise ValueError("the result would be larger than an object can be")
    return total


@cython.final
cdef class NTLMSealer(Sealer):
    cdef EVP_CIPHER_CTX *cipher_out
    cdef EVP_CIPHER_CTX *cipher_in
    cdef Mac mac_out
    cdef Mac mac_in

    def __cinit__(self, bytes session_key not None, *, bint initiator, object send_sequence, object receive_sequence):
        if length_of(session_key) != NTLM_KEY:
            raise ValueError(f"a session key has 16 bytes, not {len(session_key)}")
        self.last = U32_MAX
        self.send_next = checked_sequence(send_sequence, self.last)
        self.receive_next = checked_sequence(receive_sequence, self.last)
        self.trailer_size = NTLM_SIGNATURE
        fetch()
        if not ntlm_works:
            raise RuntimeError("there is no RC4 to be had here")
        cdef byte[NTLM_KEY] key
        cdef EVP_MD_CTX *work = borrow()
        cdef bint good = (
            derive_ntlm_key(work, session_key, SEAL_TO_SERVER if initiator else SEAL_TO_CLIENT, key)
            and set_cipher(&self.cipher_out, rc4, key, True)
            and derive_ntlm_key(work, session_key, SEAL_TO_CLIENT if initiator else SEAL_TO_SERVER, key)
            and set_cipher(&self.cipher_in, rc4, key, True)  # RC4 has only one direction
            and derive_ntlm_key(work, session_key, SIGN_TO_SERVER if initiator else SIGN_TO_CLIENT, key)
            and new_mac(&self.mac_out, md5, key, NTLM_KEY, 64, 0)
            and derive_ntlm_key(work, session_key, SIGN_TO_CLIENT if initiator else SIGN_TO_SERVER, key)
            and new_mac(&self.mac_in, md5, key, NTLM_KEY, 64, 0)
        )
        give_back(work)
        OPENSSL_cleanse(key, NTLM_KEY)
        if not good:
            forget_errors()
            raise MemoryError

    def __dealloc__(self):
        EVP_CIPHER_CTX_free(self.cipher_out)
        EVP_CIPHER_CTX_free(self.cipher_in)
        free_mac(&self.mac_out)
        free_mac(&self.mac_in)

    cdef int seal_one(self, const byte *message, size_t size, byte *token, EVP_MD_CTX *work) noexcept nogil:
        cdef byte[DIGEST_MAX] checksum
        store_u32(token, 1)
        store_u32(token + 12, <uint32_t> self.send_next)
        # The checksum goes through the same RC4, after the message.
        if (
            crypt(self.cipher_out, token + NTLM_SIGNATURE, message, size)
            and authenticate(work, &self.mac_out, token + 12, 4, message, size, checksum)
            and crypt(self.cipher_out, token + 4, checksum, NTLM_CHECKSUM)
        ):
            return GOOD
        return FAILED

    cdef int measure(self, const byte *token, size_t size, size_t trailer, size_t *opened) noexcept nogil:
        if trailer != NTLM_SIGNATURE:
            return MALFORMED
        opened[0] = size - NTLM_SIGNATURE  # the trailer is within it
        return GOOD

    cdef int open_one(
        self, const byte *token, size_t size, byte *to, size_t opened, byte *scratch, EVP_MD_CTX *work
    ) noexcept nogil:
        cdef byte[DIGEST_MAX] checksum
        cdef byte[NTLM_SIGNATURE] expected
        store_u32(expected, 1)
        store_u32(expected + 12, <uint32_t> self.receive_next)
        if not (
            crypt(self.cipher_in, to, token + NTLM_SIGNATURE, opened)
            and authenticate(work, &self.mac_in, expected + 12, 4, to, opened, checksum)
            and crypt(self.cipher_in, expected + 4, checksum, NTLM_CHECKSUM)
        ):
            return FAILED
        return GOOD if CRYPTO_memcmp(expected, token, NTLM_SIGNATURE) == 0 else ALTERED


cdef bytes SIGN_TO_SERVER = b"session key to client-to-server signing key magic constant"
cdef bytes SIGN_TO_CLIENT = b"session key to server-to-client signing key magic constant"
cdef bytes SEAL_TO_SERVER = b"session key to client-to-server sealing key magic constant"
cdef bytes SEAL_TO_CLIENT = b"session key to server-to-client sealing key magic constant"


cdef bint set_cipher(EVP_CIPHER_CTX **place, const EVP_CIPHER *cipher, const byte *key, bint encrypt) noexcept:
    place[0] = new_cipher(cipher, key, encrypt)
    return place[0] is not NULL


cdef struct Direction:
    # One direction of a Kerberos context.
    EVP_CIPHER_CTX *cipher  # CBC, which runs on from message to message
    Mac mac
    byte[BLOCK] seen  # the last ciphertext block that `cipher` has seen; zero before the first
    byte flags  # of the tokens that go this way


cdef bint set_direction(
    Direction *direction, const Enctype *enctype, const byte *key, byte usage, bint encrypt, byte flags
) noexcept:
    """Derive the keys for a key usage (RFC 3961 5.3: usage | AA to encrypt, usage | 55 for the MAC)."""
    cdef byte[KEY_MAX] derived
    cdef byte[5] constant
    cdef bint good
    memset(constant, 0, 5)
    constant[3] = usage
    constant[4] = 0xAA
    good = derive_key(enctype, key, constant, derived, enctype.key) and set_cipher(
        &direction.cipher, enctype.cipher, derived, encrypt
    )
    constant[4] = 0x55
    good = (
        good
        and derive_key(enctype, key, constant, derived, enctype.integrity_key)
        and new_mac(
            &direction.mac,
            enctype.digest,
            derived,
            enctype.integrity_key,
            enctype.hash_block,
            BLOCK if enctype.mac_of_ciphertext else 0,
        )
    )
    OPENSSL_cleanse(derived, KEY_MAX)
    direction.flags = flags
    return good


cdef void free_direction(Direction *direction) noexcept:
    EVP_CIPHER_CTX_free(direction.cipher)
    free_mac(&direction.mac)


cdef const Enctype *find_enctype(object number) except NULL:
    cdef size_t i
    for i in range(4):
        if enctypes[i].number == number:
            return &enctypes[i]
    raise ValueError(f"an enctype must be one of 17, 18, 19 and 20, not {number!r}")


@cython.final
cdef class KerberosSealer(Sealer):
    # A token is the header, then `sealed` bytes of ciphertext (confounder, message, filler, copy of the header), then
    # the MAC; and all behind the header turned right by RRC. Sealing turns by a block and the MAC, which brings these
    # in front of the confounder's block: so what is as long as the message comes last, as in SSPI.
    cdef Direction out
    cdef Direction into
    cdef size_t mac_size
    cdef bint mac_of_ciphertext

    def __cinit__(
        self,
        bytes key not None,
        object enctype,
        *,
        bint initiator,
        bint acceptor_subkey,
        object send_sequence,
        object receive_sequence,
    ):
        cdef const Enctype *kind = find_enctype(enctype)
        if length_of(key) != kind.key:
            raise ValueError(f"a key of enctype {kind.number} has {kind.key} bytes, not {len(key)}")
        # The very last number is never used, so that the one after still fits.
        self.last = <uint64_t> 0xFFFFFFFFFFFFFFFE
        self.send_next = checked_sequence(send_sequence, self.last)
        self.receive_next = checked_sequence(receive_sequence, self.last)
        self.mac_size = kind.mac
        self.mac_of_ciphertext = kind.mac_of_ciphertext
        self.trailer_size = HEADER + CONFOUNDER + HEADER + kind.mac
        self.slack = 2 * BLOCK
        self.scratch_needed = 2 * BLOCK
        fetch()
        if not kerberos_works:
            raise RuntimeError("not all that Kerberos needs is to be had here")
        cdef byte subkey = ACCEPTOR_SUBKEY if acceptor_subkey else 0
        cdef byte from_initiator = SEALED | subkey
        cdef byte from_acceptor = SEALED | SENT_BY_ACCEPTOR | subkey
        # Key usages of RFC 4121 2: the acceptor seals with 22, the initiator with 24.
        cdef const byte *bare = start_of(key)
        if not (
            set_direction(&self.out, kind, bare, 24, True, from_initiator)
            and set_direction(&self.into, kind, bare, 22, False, from_acceptor)
            if initiator
            else set_direction(&self.out, kind, bare, 22, True, from_acceptor)
            and set_direction(&self.into, kind, bare, 24, False, from_initiator)
        ):
            forget_errors()
            raise MemoryError

    def __dealloc__(self):
        free_direction(&self.out)
        free_direction(&self.into)

    cdef int prepare(self, byte *token) except -1:
        # Where it will be encrypted. The message before this one writes less far than this beyond its end.
        return draw_confounder(token + HEADER + BLOCK + self.mac_size)

    cdef int seal_one(self, const byte *message, size_t size, byte *token, EVP_MD_CTX *work) noexcept nogil:
        cdef byte *text = token + HEADER + BLOCK + self.mac_size  # confounder (there already) | message | header
        cdef size_t sealed = CONFOUNDER + size + HEADER
        cdef size_t rest = sealed & (BLOCK - 1)  # bytes in the last block
        if rest == 0:
            rest = BLOCK
        cdef size_t padded = sealed - rest + BLOCK
        cdef byte *last = text + padded - BLOCK
        cdef byte[DIGEST_MAX] mac
        token[0] = 0x05
        token[1] = 0x04
        token[2] = self.out.flags
        token[3] = 0xFF
        memset(token + 4, 0, 4)
        store_u64_be(token + 8, self.send_next)
        memcpy(text + CONFOUNDER, message, size)
        memcpy(text + CONFOUNDER + size, token, HEADER)
        memset(text + sealed, 0, padded - sealed)
        if not self.mac_of_ciphertext:
            if not authenticate(work, &self.out.mac, text, sealed, NULL, 0, mac):
                return FAILED
        xor_block(text, self.out.seen)
        if not crypt(self.out.cipher, text, text, padded):
            return FAILED
        # Ciphertext stealing: the last two blocks change places, and the one that is now the last is cut. There are
        # always two, since the confounder and the header are one each.
        memcpy(self.out.seen, last, BLOCK)
        memcpy(last, last - BLOCK, rest)
        memcpy(last - BLOCK, self.out.seen, BLOCK)
        if self.mac_of_ciphertext:
            if not authenticate(work, &self.out.mac, text, sealed, NULL, 0, mac):
                return FAILED
        token[7] = <byte> (BLOCK + self.mac_size)
        memcpy(token + HEADER, text + sealed - BLOCK, BLOCK)
        memcpy(token + HEADER + BLOCK, mac, self.mac_size)
        return GOOD

    cdef int measure(self, const byte *token, size_t size, size_t trailer, size_t *opened) noexcept nogil:
        # Any division into trailer and ciphertext: MIT's gss_wrap leaves it to its caller.
        cdef size_t extra
        if size < HEADER:
            return MALFORMED
        if token[0] != 0x05 or token[1] != 0x04 or token[3] != 0xFF:
            return NOT_OURS
        if token[2] != self.into.flags:
            return NOT_OURS if token[2] & SEALED else NOT_ENCRYPTED
        if size < self.trailer_size:
            return MALFORMED
        extra = load_u16_be(token + 4)
        if extra > size - self.trailer_size:
            return MALFORMED
        opened[0] = size - self.trailer_size - extra
        return GOOD

    cdef int open_one(
        self, const byte *token, size_t size, byte *to, size_t opened, byte *scratch, EVP_MD_CTX *work
    ) noexcept nogil:
        cdef const byte *ring = token + HEADER
        cdef size_t ring_size = size - HEADER
        cdef size_t turn = load_u16_be(token + 6) % ring_size
        cdef size_t sealed = ring_size - self.mac_size
        cdef size_t rest = sealed & (BLOCK - 1)
        if rest == 0:
            rest = BLOCK
        cdef size_t whole = sealed - rest - BLOCK  # bytes before the two blocks that have changed places
        cdef size_t straight = 0  # bytes of them that are decrypted from where they are
        cdef byte *last = scratch + whole + BLOCK
        cdef byte[DIGEST_MAX] mac, sent
        cdef byte[BLOCK] end, before
        cdef byte[HEADER] header
        memcpy(header, token, 6)
        memset(header + 6, 0, 2)
        store_u64_be(header + 8, self.receive_next)
        if memcmp(token + 8, header + 8, 8) != 0:
            return OUT_OF_ORDER
        copy_turned(sent, ring, ring_size, (turn + sealed) % ring_size, self.mac_size)
        if self.mac_of_ciphertext:
            if ring_size - turn >= sealed:
                if not authenticate(work, &self.into.mac, ring + turn, sealed, NULL, 0, mac):
                    return FAILED
            elif not authenticate(
                work, &self.into.mac, ring + turn, ring_size - turn, ring, sealed - (ring_size - turn), mac
            ):
                return FAILED
            if CRYPTO_memcmp(mac, sent, self.mac_size) != 0:
                return ALTERED
        copy_turned(end, ring, ring_size, (turn + whole) % ring_size, BLOCK)
        memcpy(before, self.into.seen, BLOCK)
        if rest != BLOCK:
            # What was cut off the block before the last is in the last: there the zeros were encrypted, XORed with it.
            if not crypt(self.into.cipher, last, end, BLOCK):
                return FAILED
            xor_block(last, before)
            memcpy(last - BLOCK + rest, last + rest, BLOCK - rest)
            memcpy(before, end, BLOCK)
        if sealed > SMALL:
            straight = min(whole, (ring_size - turn) & ~<size_t> (BLOCK - 1))
            if not crypt(self.into.cipher, scratch, ring + turn, straight):
                return FAILED
        copy_turned(scratch + straight, ring, ring_size, (turn + straight) % ring_size, whole - straight)
        copy_turned(last - BLOCK, ring, ring_size, (turn + whole + BLOCK) % ring_size, rest)
        memcpy(last, end, BLOCK)
        if not crypt(self.into.cipher, scratch + straight, scratch + straight, whole - straight + 2 * BLOCK):
            return FAILED
        xor_block(scratch, before)
        memcpy(self.into.seen, end, BLOCK)
        if not self.mac_of_ciphertext:
            if not authenticate(work, &self.into.mac, scratch, sealed, NULL, 0, mac):
                return FAILED
            if CRYPTO_memcmp(mac, sent, self.mac_size) != 0:
                return ALTERED
        if memcmp(scratch + sealed - HEADER, header, HEADER) != 0:
            return ALTERED
        memcpy(to, scratch + CONFOUNDER, opened)
        return GOOD


def _derive_key(bytes key not None, object enctype, bytes constant not None, size_t size):
    # For the published vectors, nothing else: sealers derive their own.
    cdef const Enctype *kind = find_enctype(enctype)
    cdef byte[KEY_MAX] derived
    fetch()
    if not kerberos_works:
        raise RuntimeError("not all that Kerberos needs is to be had here")
    if length_of(key) != kind.key or length_of(constant) != 5 or size > KEY_MAX:
        raise ValueError("wrong size")
    if not derive_key(kind, start_of(key), start_of(constant), derived, size):
        raise ValueError("no such key")
    return cut(derived, size)


def _release_from(size_t size):
    # For measuring, and for testing with small messages. Returns what was set before.
    global RELEASE_FROM
    cdef size_t before = RELEASE_FROM
    RELEASE_FROM = size
    return before
