# Kerberos's wrap tokens, RFC 4121 4.2, with confidentiality or without, over RFC 3962 and RFC 8009.


cdef struct Direction:
    # One direction of a Kerberos context.
    EVP_CIPHER_CTX *cipher  # CBC, which runs on from message to message; NULL where messages are signed only
    Mac mac
    byte[BLOCK] seen  # the last ciphertext block that `cipher` has seen; zero before the first
    byte flags  # of the tokens that go this way


cdef bint set_direction(
    Direction *direction, const Enctype *enctype, const byte *key, byte usage, bint encrypt, byte flags
) noexcept:
    """Derive the keys for a key usage (RFC 3961 5.3: usage | AA to encrypt, usage | 55 for that MAC, usage | 99 for a MAC
    alone)."""
    cdef byte[KEY_MAX] derived
    cdef byte[5] constant
    cdef bint sealed = flags & SEALED
    cdef bint good = True
    memset(constant, 0, 5)
    constant[3] = usage
    if sealed:
        constant[4] = 0xAA
        good = derive_key(enctype, key, constant, derived, enctype.key) and set_cipher(
            &direction.cipher, enctype.cipher, derived, encrypt
        )
    constant[4] = 0x55 if sealed else 0x99
    good = (
        good
        and derive_key(enctype, key, constant, derived, enctype.integrity_key)
        and new_mac(
            &direction.mac,
            enctype.digest,
            derived,
            enctype.integrity_key,
            enctype.hash_block,
            BLOCK if sealed and enctype.mac_of_ciphertext else 0,
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
    #
    # One that is signed only is the header, the message and its MAC, which is over the message and the header with EC and RRC
    # zero (RFC 4121 4.2.4); and turned by the MAC for the same reason.
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
        bint encrypt=True,
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
        self.encrypt = encrypt
        self.trailer_size = HEADER + kind.mac
        if encrypt:
            self.trailer_size += CONFOUNDER + HEADER
            self.slack = 2 * BLOCK
            self.scratch_needed = 2 * BLOCK
        fetch()
        if not kerberos_works:
            raise RuntimeError("not all that Kerberos needs is to be had here")
        cdef byte subkey = ACCEPTOR_SUBKEY if acceptor_subkey else 0
        cdef byte sealed = SEALED if encrypt else 0
        cdef byte from_initiator = sealed | subkey
        cdef byte from_acceptor = SENT_BY_ACCEPTOR | from_initiator
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
        if not self.encrypt:
            return 0
        # Where it will be encrypted. The message before this one writes less far than this beyond its end.
        return draw_confounder(token + HEADER + BLOCK + self.mac_size)

    cdef void store_header(self, byte *to, byte flags, uint64_t number) noexcept nogil:
        """A header with EC and RRC zero."""
        to[0] = 0x05
        to[1] = 0x04
        to[2] = flags
        to[3] = 0xFF
        memset(to + 4, 0, 4)
        store_u64_be(to + 8, number)

    cdef int seal_one(self, const byte *message, size_t size, byte *token, EVP_MD_CTX *work) noexcept nogil:
        self.store_header(token, self.out.flags, self.send_next)
        if self.encrypt:
            return self.encrypt_one(message, size, token, work)
        cdef byte[DIGEST_MAX] mac
        if not authenticate(work, &self.out.mac, message, size, token, HEADER, mac):
            return FAILED
        token[5] = token[7] = <byte> self.mac_size
        memcpy(token + HEADER, mac, self.mac_size)
        memcpy(token + HEADER + self.mac_size, message, size)
        return GOOD

    cdef int encrypt_one(self, const byte *message, size_t size, byte *token, EVP_MD_CTX *work) noexcept nogil:
        cdef byte *text = token + HEADER + BLOCK + self.mac_size  # confounder (there already) | message | header
        cdef size_t sealed = CONFOUNDER + size + HEADER
        cdef size_t rest = sealed & (BLOCK - 1)  # bytes in the last block
        if rest == 0:
            rest = BLOCK
        cdef size_t padded = sealed - rest + BLOCK
        cdef byte *last = text + padded - BLOCK
        cdef byte[DIGEST_MAX] mac
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
        # Two things in a record are under nobody's signature, and each has one value that is taken, or they could be
        # changed on the way without anybody's noticing: the cut between trailer and ciphertext, and the rotation.
        #
        # The cut is where the ciphertext is as long as the message. There SSPI's buffers have it, and there whoever has
        # a token of gss_wrap's cuts it, turned or not: into as many bytes as the message has, and what is before them.
        #
        # RFC 4121 4.2.5 wants rotations taken that are longer than what is turned. Nobody sends one, and to add the
        # length once more would change a bit of some messages and nothing else.
        cdef size_t extra, turn
        if size < HEADER:
            return MALFORMED
        if token[0] != 0x05 or token[1] != 0x04 or token[3] != 0xFF:
            return NOT_OURS
        if token[2] != self.into.flags:
            if (token[2] ^ self.into.flags) != SEALED:
                return NOT_OURS
            return NOT_ENCRYPTED if self.encrypt else ENCRYPTED
        if size < self.trailer_size:
            return MALFORMED
        # Filler, of what is encrypted; else the MAC's size.
        extra = load_u16_be(token + 4)
        if not self.encrypt:
            if extra != self.mac_size:
                return MALFORMED
            extra = 0
        if extra > size - self.trailer_size or (trailer != WHOLE and trailer != self.trailer_size + extra):
            return MALFORMED
        # One whole turn is taken: of an empty message that is signed only, all of which SSPI (and we) turn by the MAC.
        turn = load_u16_be(token + 6)
        if turn >= size - HEADER and (self.encrypt or turn != self.mac_size):
            return MALFORMED
        opened[0] = size - self.trailer_size - extra
        return GOOD

    cdef int open_one(
        self, const byte *token, size_t size, byte *to, size_t opened, byte *scratch, EVP_MD_CTX *work
    ) noexcept nogil:
        cdef byte[HEADER] header
        self.store_header(header, self.into.flags, self.receive_next)
        if memcmp(token + 8, header + 8, 8) != 0:
            return OUT_OF_ORDER
        if self.encrypt:
            memcpy(header, token, 6)
            return self.decrypt_one(token, size, header, to, opened, scratch, work)
        cdef const byte *ring = token + HEADER
        cdef size_t ring_size = size - HEADER
        cdef size_t turn = load_u16_be(token + 6) % ring_size
        cdef byte[DIGEST_MAX] mac, sent
        copy_turned(to, ring, ring_size, turn, opened)
        copy_turned(sent, ring, ring_size, (turn + opened) % ring_size, self.mac_size)
        if not authenticate(work, &self.into.mac, to, opened, header, HEADER, mac):
            return FAILED
        return GOOD if CRYPTO_memcmp(mac, sent, self.mac_size) == 0 else ALTERED

    cdef int decrypt_one(
        self,
        const byte *token,
        size_t size,
        const byte *header,
        byte *to,
        size_t opened,
        byte *scratch,
        EVP_MD_CTX *work,
    ) noexcept nogil:
        """`header` is the token's, with RRC zero, as it was encrypted with the message."""
        cdef const byte *ring = token + HEADER
        cdef size_t ring_size = size - HEADER
        cdef size_t turn = load_u16_be(token + 6)  # less than the ring, see `measure`
        cdef size_t sealed = ring_size - self.mac_size
        cdef size_t rest = sealed & (BLOCK - 1)
        if rest == 0:
            rest = BLOCK
        cdef size_t whole = sealed - rest - BLOCK  # bytes before the two blocks that have changed places
        cdef size_t straight = 0  # bytes of them that are decrypted from where they are
        cdef byte *last = scratch + whole + BLOCK
        cdef byte[DIGEST_MAX] mac, sent
        cdef byte[BLOCK] end, before
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
