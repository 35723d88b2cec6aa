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
# What stands in src/sealing/ is part of this module: what is declared of libcrypto, the primitives, and a sealer each
# for NTLM and for Kerberos. Here is what the two have in common.
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
    cdef bint encrypt  # False: messages are signed only
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
        """How long the message will be that is in a token; may be as wrong as the token. The trailer may be WHOLE."""
        return FAILED

    cdef int open_one(
        self, const byte *token, size_t size, byte *to, size_t opened, byte *scratch, EVP_MD_CTX *work
    ) noexcept nogil:
        """Open a token that was measured; its message is `opened` bytes."""
        return FAILED

    # ---- sealing ----

    def seal(self, message):
        cdef Job job
        cdef size_t total = self.add_message(message, &job, 0)
        cdef bytes frame = self.seal_all(&job, 1, total, job.size, FRAME)
        cdef const byte *token = start_of(frame) + FRAME
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
            total = self.add_message(message, &one, 0)
            return self.seal_all(&one, 1, total, one.size, FRAME)
        # A tuple of our own: the messages measured first must be the messages sealed afterwards.
        mine = tuple(messages)
        if not mine:
            return b""
        jobs = new_jobs(<size_t> len(mine))
        try:
            for message in mine:
                total = self.add_message(message, &jobs[count], total)
                content += jobs[count].size  # at most `total`
                count += 1
            return self.seal_all(jobs, count, total, content, FRAME)
        finally:
            PyMem_RawFree(jobs)

    def seal_records(self, data, piece):
        cdef Py_buffer view
        cdef Job one
        cdef Job *jobs = &one
        cdef size_t left, most, count = 0, total = 0
        piece = PyNumber_Index(piece)  # the conversion to C alone would cut 3.5 to 3
        if piece < 1:
            raise ValueError(f"a record has at least one byte of data, not {piece}")
        # While it is held, whoever owns a bytearray may write to it, but neither resize nor free it.
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            left = <size_t> view.len
            if left == 0:
                return b""
            most = <size_t> min(piece, view.len)
            if most > U32_MAX - self.trailer_size:
                raise ValueError(f"a record of {most} bytes does not fit a length of four bytes")
            if left > most:
                jobs = new_jobs((left - 1) // most + 1)
            while left:
                jobs[count].source = <const byte *> view.buf + (<size_t> view.len - left)
                jobs[count].size = min(left, most)
                total = checked_sum(total, checked_sum(jobs[count].size, RECORD + self.trailer_size))
                left -= jobs[count].size
                count += 1
            return self.seal_all(jobs, count, total, <size_t> view.len, RECORD)
        finally:
            if jobs is not &one:
                PyMem_RawFree(jobs)
            PyBuffer_Release(&view)

    cdef size_t add_message(self, object message, Job *job, size_t total) except 0:
        """Check a message; the bytes of all frames with this one's, where those before take total."""
        cdef size_t size = length_of(checked_bytes(message, "a message"))
        if size > U32_MAX - 4 - self.trailer_size:
            raise ValueError(f"a message of {size} bytes does not fit a length of four bytes")
        job.source = <const byte *> PyBytes_AS_STRING(message)
        job.size = size
        return checked_sum(total, checked_sum(size, FRAME + self.trailer_size))

    cdef int check_sealing(self, size_t count) except -1:
        """Refuse before anything is spent."""
        if self.sealing_failed:
            raise SealingError(NO_MORE_SEALING)
        if self.sealing:
            raise RuntimeError("another thread is sealing with this sealer")
        if self.send_next > self.last or count - 1 > self.last - self.send_next:
            raise SealingError("no more messages can be numbered")
        return 0

    cdef bytes seal_all(self, Job *jobs, size_t count, size_t total, size_t content, size_t prefix):
        """Seal at least one message, `content` bytes in all, into FRAMEs or RECORDs of `total` bytes."""
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
                self.prepare(to + prefix)
                jobs[i].to = to
                to += prefix + self.trailer_size + jobs[i].size
            work = borrow()
            if content >= RELEASE_FROM:
                with nogil:
                    state = self.seal_jobs(jobs, count, prefix, work)
            else:
                state = self.seal_jobs(jobs, count, prefix, work)
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

    cdef int seal_jobs(self, const Job *jobs, size_t count, size_t prefix, EVP_MD_CTX *work) noexcept nogil:
        cdef size_t i
        cdef byte *frame
        cdef int state
        for i in range(count):
            frame = jobs[i].to
            # Only now: sealing the message before this one has written here. No narrowing loses anything: all sizes were
            # compared when the jobs were made.
            store_u32(frame, <uint32_t> (prefix - 4 + self.trailer_size + jobs[i].size))
            if prefix == FRAME:
                store_u32(frame + 4, <uint32_t> self.trailer_size)
            state = self.seal_one(jobs[i].source, jobs[i].size, frame + prefix, work)
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

    def open_records(self, list tokens not None):
        cdef list mine = tokens[:]  # as in `open_frames`
        cdef Job one
        cdef Job *jobs = &one
        cdef size_t i, count = 0, total = 0, done
        cdef int state = GOOD
        cdef object token
        cdef bytes data
        if self.opening_failed:
            return b"", SealingError(NO_MORE_OPENING)
        if not mine:
            return b"", None
        self.check_opening()
        if len(mine) > 1:
            jobs = new_jobs(<size_t> len(mine))
        try:
            for token in mine:
                jobs[count].source = start_of(checked_bytes(token, "a token"))
                jobs[count].size = length_of(<bytes> token)
                state = self.measure(jobs[count].source, jobs[count].size, WHOLE, &jobs[count].opened)
                if state != GOOD:
                    break
                # Of one token that is there many times it may be more than all that is in memory.
                total = checked_sum(total, jobs[count].opened)
                count += 1
            data = cut(NULL, total)
            total = 0
            for i in range(count):
                jobs[i].to = start_of(data) + total
                total += jobs[i].opened
            done = self.open_all(jobs, count, &state)
            if state == GOOD:
                return data, None
            self.opening_failed = True
            forget_errors()
            total = 0
            for i in range(done):
                total += jobs[i].opened
            return data[:<Py_ssize_t> total], SealingError(REASONS[state])
        finally:
            if jobs is not &one:
                PyMem_RawFree(jobs)

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
    cdef Job *jobs = NULL
    if count <= OBJECT_MAX // sizeof(Job):
        jobs = <Job *> PyMem_RawMalloc(count * sizeof(Job))
    if jobs is NULL:
        raise MemoryError
    return jobs


include "sealing/ntlm.pxi"
include "sealing/kerberos.pxi"
