# The cryptography that sealers are made of: RC4, AES-CBC, HMAC, key derivation, confounders; and bytes.


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


cdef bint set_cipher(EVP_CIPHER_CTX **place, const EVP_CIPHER *cipher, const byte *key, bint encrypt) noexcept:
    place[0] = new_cipher(cipher, key, encrypt)
    return place[0] is not NULL


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


cdef bytes checked_bytes(object value, str what):
    if not PyBytes_Check(value):
        raise TypeError(f"{what} must be bytes, not {type(value).__name__}")
    return <bytes> value


cdef uint64_t checked_sequence(object value, uint64_t last) except? 0:
    value = PyNumber_Index(value)  # the conversion to C alone would cut 3.5 to 3
    if not 0 <= value <= last:
        raise ValueError(f"a sequence number must be in 0..{last}, not {value!r}")
    return value
