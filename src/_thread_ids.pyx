# cython: language_level=3, boundscheck=False, wraparound=False
"""The ids and capabilities of the calling thread alone, by raw system calls. See `_thread_ids.pyi`."""

# What this module must achieve: change who *one thread* is, and nobody else.
#
# Why it is not `os.setresuid`: to the kernel credentials belong to a thread, to POSIX they belong to the process. So
# glibc's wrappers of setresuid, setgroups and the like interrupt every thread of the process and have each of them do
# the same (nptl's "setxid"). Used by one worker, `os.setresuid` would make the whole server the peer, its event loop
# and the workers of all other peers included. The system calls themselves concern the calling thread only.
#
# Why it is compiled: the numbers of system calls differ between architectures, and on the old ones there are two of
# each, of which the first takes ids of 16 bits and cuts. The C library's headers know.
#
# A thread has the credentials of the thread that starts it, for ever, so an impersonating thread must start none: they would be
# found later in pools that the whole process shares, and do the server's work as the peer. `confine` makes attempts
# fail, by an audit hook. It is C's, not Python's, since it is asked at every event of every thread. It never goes away
# again; threads that are not confined pass through it.
#
# What could go wrong here: an id of all ones means "leave as it is" to the kernel. A user entry with that number would
# leave a thread root that believes itself somebody else, so it is refused before any call.

# Who owns what, and for how long: arrays of groups are this module's for one call, and freed in it. Everything else is
# on the stack, but for two things that stay: the audit hook, for the life of the process (it has no data of its own),
# and `ids_confined`, for the life of its thread.

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.errno cimport errno
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport abort
from libc.string cimport strerror


cdef extern from *:
    """
    #include <linux/capability.h>
    #include <poll.h>
    #include <string.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    #define IDS_KEEP 0xFFFFFFFFul
    #define IDS_CAPABILITIES 64ul

    #ifdef SYS_setresuid32
    #define IDS_SETGROUPS SYS_setgroups32
    #define IDS_SETRESGID SYS_setresgid32
    #define IDS_SETRESUID SYS_setresuid32
    #define IDS_SETFSGID SYS_setfsgid32
    #define IDS_SETFSUID SYS_setfsuid32
    #define IDS_GETGROUPS SYS_getgroups32
    #define IDS_GETRESGID SYS_getresgid32
    #define IDS_GETRESUID SYS_getresuid32
    #else
    #define IDS_SETGROUPS SYS_setgroups
    #define IDS_SETRESGID SYS_setresgid
    #define IDS_SETRESUID SYS_setresuid
    #define IDS_SETFSGID SYS_setfsgid
    #define IDS_SETFSUID SYS_setfsuid
    #define IDS_GETGROUPS SYS_getgroups
    #define IDS_GETRESGID SYS_getresgid
    #define IDS_GETRESUID SYS_getresuid
    #endif

    static __thread int ids_confined = 0;

    /* What events begin with, and what is refused then. */
    static const char *const ids_refusals[][2] = {
        {"_thread.start_", "start threads: they would be the peer for ever"},
        {"os.fork", "fork: the copy of the server would be the peer for ever (a program may be started)"},
        {"sys.set_asyncgen_hook", "run an event loop: the worker threads that it finds are the server"},
    };

    static int ids_refuse(const char *event, PyObject *args, void *data)
    {
        size_t i;
        (void) args;
        (void) data;
        if (!ids_confined)
            return 0;
        for (i = 0; i < sizeof ids_refusals / sizeof *ids_refusals; i++)
            if (strncmp(event, ids_refusals[i][0], strlen(ids_refusals[i][0])) == 0) {
                PyErr_Format(PyExc_RuntimeError, "a function that runs as a peer may not %s", ids_refusals[i][1]);
                return -1;
            }
        return 0;
    }

    static int ids_add_hook(void)
    {
        return PySys_AddAuditHook(ids_refuse, NULL);
    }
    """
    int ids_confined
    int ids_add_hook() except -1
    const unsigned long IDS_KEEP
    const unsigned long IDS_CAPABILITIES
    const long IDS_SETGROUPS
    const long IDS_SETRESGID
    const long IDS_SETRESUID
    const long IDS_SETFSGID
    const long IDS_SETFSUID
    const long IDS_GETGROUPS
    const long IDS_GETRESGID
    const long IDS_GETRESUID
    const long SYS_gettid
    const long SYS_capget
    const long SYS_capset
    const long SYS_prctl
    const unsigned long PR_CAP_AMBIENT
    const unsigned long PR_CAP_AMBIENT_IS_SET
    const unsigned long PR_CAP_AMBIENT_RAISE
    const uint32_t _LINUX_CAPABILITY_VERSION_3

    ctypedef struct cap_header "struct __user_cap_header_struct":
        uint32_t version
        int pid
    ctypedef struct cap_data "struct __user_cap_data_struct":
        uint32_t effective
        uint32_t permitted
        uint32_t inheritable

    # Arguments go as unsigned long: a shorter one would leave half a register to chance.
    long syscall(long number, ...) nogil

    ctypedef struct pollfd "struct pollfd":
        int fd
        short events
        short revents
    const short POLLOUT
    int poll(pollfd* fds, unsigned long count, int timeout) nogil
    Py_ssize_t write(int fd, const void* data, size_t size) nogil


cdef enum:
    MAX_GROUPS = 65536  # NGROUPS_MAX of the kernel
    STDERR = 2
    PATIENCE = 1000  # ms


cdef object failed(str call):
    """The error of the call that has just failed."""
    cdef int number = errno
    return OSError(number, (<bytes> strerror(number)).decode("ascii", "replace"), call)


cdef int read_id(object number, unsigned long* id) except -1:
    """An id that is one. (Not returned: the sign of an error would have to be some id.)"""
    cdef uint32_t value = number
    if value == IDS_KEEP:
        raise ValueError(f"{number} is no id")
    id[0] = value
    return 0


def thread_id():
    return syscall(SYS_gettid)


def user_ids():
    cdef uint32_t real = 0, effective = 0, saved = 0
    if syscall(IDS_GETRESUID, &real, &effective, &saved):
        raise failed("getresuid")
    return real, effective, saved


def group_ids():
    cdef uint32_t real = 0, effective = 0, saved = 0
    if syscall(IDS_GETRESGID, &real, &effective, &saved):
        raise failed("getresgid")
    return real, effective, saved


def filesystem_ids():
    # They have no getter: what is no id is not set, and the answer is the old one in any case.
    return (
        <uint32_t> syscall(IDS_SETFSUID, IDS_KEEP),
        <uint32_t> syscall(IDS_SETFSGID, IDS_KEEP),
    )


def groups():
    cdef long count = syscall(IDS_GETGROUPS, <unsigned long> 0, NULL)
    cdef uint32_t* ids
    if count < 0:
        raise failed("getgroups")
    if count == 0:
        return ()
    ids = <uint32_t*> PyMem_Malloc(<size_t> count * sizeof(uint32_t))
    if ids == NULL:
        raise MemoryError
    try:
        count = syscall(IDS_GETGROUPS, <unsigned long> count, ids)
        if count < 0:
            raise failed("getgroups")
        return tuple([ids[i] for i in range(count)])
    finally:
        PyMem_Free(ids)


def set_groups(tuple groups not None):
    cdef size_t count = <size_t> len(groups), i
    cdef unsigned long id = 0
    cdef uint32_t* ids
    if count > MAX_GROUPS:
        raise ValueError(f"{count} groups are more than the kernel takes")
    ids = <uint32_t*> PyMem_Malloc((count + 1) * sizeof(uint32_t))
    if ids == NULL:
        raise MemoryError
    try:
        for i in range(count):
            read_id(groups[i], &id)
            ids[i] = <uint32_t> id
        if syscall(IDS_SETGROUPS, <unsigned long> count, ids):
            raise failed("setgroups")
    finally:
        PyMem_Free(ids)


def set_group_ids(real, effective, saved):
    cdef unsigned long ids[3]
    read_id(real, &ids[0])
    read_id(effective, &ids[1])
    read_id(saved, &ids[2])
    if syscall(IDS_SETRESGID, ids[0], ids[1], ids[2]):
        raise failed("setresgid")


def set_user_ids(real, effective, saved):
    cdef unsigned long ids[3]
    read_id(real, &ids[0])
    read_id(effective, &ids[1])
    read_id(saved, &ids[2])
    if syscall(IDS_SETRESUID, ids[0], ids[1], ids[2]):
        raise failed("setresuid")


cdef inline uint64_t whole(uint32_t low, uint32_t high) noexcept:
    return <uint64_t> low | (<uint64_t> high << 32)


def capabilities():
    cdef cap_header header
    cdef cap_data data[2]
    header.version = _LINUX_CAPABILITY_VERSION_3
    header.pid = 0  # the calling thread
    if syscall(SYS_capget, &header, data):
        raise failed("capget")
    return (
        whole(data[0].effective, data[1].effective),
        whole(data[0].permitted, data[1].permitted),
        whole(data[0].inheritable, data[1].inheritable),
    )


def set_capabilities(uint64_t effective, uint64_t permitted, uint64_t inheritable):
    cdef cap_header header
    cdef cap_data data[2]
    cdef int i
    header.version = _LINUX_CAPABILITY_VERSION_3
    header.pid = 0
    for i in range(2):
        data[i].effective = <uint32_t> (effective >> (32 * i))
        data[i].permitted = <uint32_t> (permitted >> (32 * i))
        data[i].inheritable = <uint32_t> (inheritable >> (32 * i))
    if syscall(SYS_capset, &header, data):
        raise failed("capset")


cdef inline long ambient_call(unsigned long what, unsigned long capability) noexcept:
    return syscall(SYS_prctl, PR_CAP_AMBIENT, what, capability, <unsigned long> 0, <unsigned long> 0)


def ambient():
    cdef uint64_t found = 0
    cdef unsigned long capability
    cdef long answer
    for capability in range(IDS_CAPABILITIES):
        answer = ambient_call(PR_CAP_AMBIENT_IS_SET, capability)
        if answer < 0:
            # Beyond the last that this kernel knows.
            break
        if answer > 0:
            found |= <uint64_t> 1 << capability
    return found


def raise_ambient(uint64_t wanted):
    cdef unsigned long capability
    for capability in range(IDS_CAPABILITIES):
        if (wanted >> capability) & 1 and ambient_call(PR_CAP_AMBIENT_RAISE, capability):
            raise failed("prctl")


cdef bint watched = False


def confine(bint confined):
    global watched, ids_confined
    if not watched:
        ids_add_hook()
        watched = True
    ids_confined = confined


def die(bytes line not None):
    # The GIL is kept all the while: no other thread of Python's runs any more.
    cdef pollfd reader
    cdef const char* text = line
    reader.fd = STDERR
    reader.events = POLLOUT
    reader.revents = 0
    # Standard error may be a pipe that is full and that nobody reads: a write would wait for ever, and this must die.
    if poll(&reader, 1, PATIENCE) == 1 and write(STDERR, text, <size_t> len(line)) < 0:
        pass
    abort()
