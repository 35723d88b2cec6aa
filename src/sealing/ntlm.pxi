# NTLM's message security, [MS-NLMP] 3.4.4.2: HMAC-MD5 over number and message, and RC4 over message and checksum.


@cython.final
cdef class NTLMSealer(Sealer):
    cdef EVP_CIPHER_CTX *cipher_out
    cdef EVP_CIPHER_CTX *cipher_in
    cdef Mac mac_out
    cdef Mac mac_in

    def __cinit__(
        self,
        bytes session_key not None,
        *,
        bint initiator,
        object send_sequence,
        object receive_sequence,
        bint encrypt=True,
    ):
        if length_of(session_key) != NTLM_KEY:
            raise ValueError(f"a session key has 16 bytes, not {len(session_key)}")
        self.last = U32_MAX
        self.send_next = checked_sequence(send_sequence, self.last)
        self.receive_next = checked_sequence(receive_sequence, self.last)
        self.trailer_size = NTLM_SIGNATURE
        self.encrypt = encrypt
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
        # The checksum goes through the same RC4: after the message, or alone.
        if (
            self.convert(self.cipher_out, token + NTLM_SIGNATURE, message, size)
            and authenticate(work, &self.mac_out, token + 12, 4, message, size, checksum)
            and crypt(self.cipher_out, token + 4, checksum, NTLM_CHECKSUM)
        ):
            return GOOD
        return FAILED

    cdef inline bint convert(self, EVP_CIPHER_CTX *cipher, byte *to, const byte *source, size_t size) noexcept nogil:
        """Encrypt or decrypt, which are the same, or neither."""
        if self.encrypt:
            return crypt(cipher, to, source, size)
        memcpy(to, source, size)
        return True

    cdef int measure(self, const byte *token, size_t size, size_t trailer, size_t *opened) noexcept nogil:
        if trailer == WHOLE:
            trailer = min(size, <size_t> NTLM_SIGNATURE)
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
            self.convert(self.cipher_in, to, token + NTLM_SIGNATURE, opened)
            and authenticate(work, &self.mac_in, expected + 12, 4, to, opened, checksum)
            and crypt(self.cipher_in, expected + 4, checksum, NTLM_CHECKSUM)
        ):
            return FAILED
        return GOOD if CRYPTO_memcmp(expected, token, NTLM_SIGNATURE) == 0 else ALTERED


cdef bytes SIGN_TO_SERVER = b"session key to client-to-server signing key magic constant"
cdef bytes SIGN_TO_CLIENT = b"session key to server-to-client signing key magic constant"
cdef bytes SEAL_TO_SERVER = b"session key to client-to-server sealing key magic constant"
cdef bytes SEAL_TO_CLIENT = b"session key to server-to-client sealing key magic constant"
