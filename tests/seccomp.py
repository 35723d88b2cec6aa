"""A system call of this thread's that fails, by a filter in the kernel; there is no way to take it off again."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

# Linux's numbers, by machine. Elsewhere the tests with it do not run.
_NUMBERS = {
    "x86_64": {"setresuid": 117, "getresuid": 118, "setresgid": 119, "getresgid": 120, "setgroups": 116},
    "aarch64": {"setresuid": 147, "getresuid": 148, "setresgid": 149, "getresgid": 150, "setgroups": 159},
}
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def answer(call: str, number: int) -> None:
    """Have a system call do nothing and fail with an errno from now on; with 0 it says that it has worked."""
    code = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (_LOAD, 0, 0, 0),  # the call's number
            (_JUMP_IF_EQUAL, 0, 1, _NUMBERS[platform.machine()][call]),
            (_RETURN, 0, 0, _ERRNO | number),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    program = _Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "prctl")
