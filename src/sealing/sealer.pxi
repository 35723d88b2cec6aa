# What all sealers have in common: batches of messages, frames and records, numbers, the GIL, and the end after a failure.


cdef struct Job:
    # One message of a batch.
    const byte *source  # sealing: the message; opening: the token (trailer | ciphertext)
    size_t size  # of it
    byte *to  # where the frame, or the opened message, goes
    size_t opened  # opening: the message's size


@cython.internal
cdef class Sealer:
    """What the two have in common. See the head of `_sealing.pyx`."""

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
