# What `_framing` and `_sealing` both need of bytes: sizes that are checked, integers as they are on the wire, and bytes
# objects that are made here. Included, not cimported: each extension is one C file, and these are inlined into it.
#
# A `bytes` argument is borrowed from the caller, and so is the pointer that `start_of` gives: it is good for as long as
# somebody holds the object. What `new_bytes` gives is ours alone, outside of Cython's reference counting, which would
# hold a second reference; an object can be resized and written to only while it has one. Whoever keeps such a pointer
# drops it with Py_CLEAR.

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from libc.stdint cimport uint32_t


cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *source, Py_ssize_t size) except NULL
    char *bytes_of "PyBytes_AS_STRING"(PyObject *object) noexcept
    int resize_bytes "_PyBytes_Resize"(PyObject **object, Py_ssize_t size) except -1

ctypedef unsigned char byte

# A length on the wire has four bytes, which can say no more than this.
cdef size_t U32_MAX = 0xFFFFFFFF

# The most that an object can hold; only on a 32-bit system is it less than a length can say.
cdef size_t OBJECT_MAX = <size_t> PY_SSIZE_T_MAX


cdef inline uint32_t load_u32(const byte *at) noexcept nogil:
    return (
        <uint32_t> at[0]
        | (<uint32_t> at[1] << 8)
        | (<uint32_t> at[2] << 16)
        | (<uint32_t> at[3] << 24)
    )


cdef inline byte *store_u32(byte *at, uint32_t value) noexcept nogil:
    """Store four bytes, little-endian; where the next goes."""
    at[0] = <byte> (value & 0xFF)
    at[1] = <byte> ((value >> 8) & 0xFF)
    at[2] = <byte> ((value >> 16) & 0xFF)
    at[3] = <byte> (value >> 24)
    return at + 4


cdef inline size_t length_of(bytes value) noexcept:
    return <size_t> PyBytes_GET_SIZE(value)


cdef inline byte *start_of(bytes value) noexcept:
    """Only to be written to while nobody else has seen the object."""
    return <byte *> PyBytes_AS_STRING(value)


cdef inline bytes cut(const byte *start, size_t size):
    """A bytes object of its own, with a copy of what is there; uninitialised where start is NULL."""
    return PyBytes_FromStringAndSize(<const char *> start, <Py_ssize_t> size)


cdef inline size_t checked_sum(size_t left, size_t right) except? 0:
    """The sum of two sizes, if an object can be that long; both are at most OBJECT_MAX, so that it does not wrap."""
    cdef size_t total = left + right
    if total > OBJECT_MAX:
        raise ValueError("the result would be larger than an object can be")
    return total
