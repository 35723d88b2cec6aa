"""One thread as the client, and back again; Windows, through SSPI as the sample does it.

Written from the documentation of ImpersonateSecurityContext and RevertSecurityContext and never run on
Windows. What SSPI itself does there is the same as on Linux in one thing: an identity belongs to the
thread. It differs in another: a program that the function starts runs as the server.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any, Final, NoReturn, TypeVar

from .._errors import ImpersonationError

T = TypeVar("T")

_SEC_E_OK: Final = 0


class SecHandle(ctypes.Structure):
    """SSPI's CtxtHandle."""

    _fields_ = [("dwLower", ctypes.c_void_p), ("dwUpper", ctypes.c_void_p)]


def context_handle(context: Any) -> SecHandle:
    """The handle of sspilib's context, which keeps it behind its object's head and shows it to nobody.

    Args:
      context: a `sspilib.raw.CtxtHandle`; it must be kept for as long as the handle is used.

    Raises:
      ImpersonationError: this sspilib is of another make.
    """
    base = next((kind for kind in type(context).__mro__ if kind.__name__ == "CtxtHandle"), None)
    # Two pointers, then an int that is padded to the size of one.
    size = ctypes.sizeof(SecHandle) + ctypes.sizeof(ctypes.c_void_p)
    if base is None or base.__basicsize__ != object.__basicsize__ + size:
        raise ImpersonationError("this version of sspilib hides its contexts' handles elsewhere")
    return SecHandle.from_address(id(context) + object.__basicsize__)


def load_secur32() -> Any:
    """The library with the two functions."""
    return ctypes.WinDLL("secur32")  # type: ignore[attr-defined,unused-ignore]  # pragma: no cover


def run_as_client(context: Any, function: Callable[..., T], args: tuple[Any, ...], secur32: Any = None) -> T:
    """Call a function as the client of a finished acceptor's context. On a worker thread only.

    Raises:
      ImpersonationError: the thread could not become the client; the function was not called.
    """
    secur32 = secur32 if secur32 is not None else load_secur32()
    handle = ctypes.byref(context_handle(context))
    if (status := secur32.ImpersonateSecurityContext(handle)) != _SEC_E_OK:
        raise ImpersonationError(f"ImpersonateSecurityContext: 0x{status & 0xFFFFFFFF:08x}")
    try:
        return function(*args)
    finally:
        reverted = False
        try:
            reverted = secur32.RevertSecurityContext(handle) == _SEC_E_OK
        finally:
            if not reverted:
                _die()


def _die() -> NoReturn:
    try:
        os.write(2, b"triosspi: RevertSecurityContext failed; aborting\n")
    finally:
        os.abort()


def user_name() -> str:  # pragma: no cover - see the head of this module
    """GetUserName: of the calling thread."""
    size = ctypes.c_ulong(257)
    buffer = ctypes.create_unicode_buffer(size.value)
    if not ctypes.WinDLL("advapi32").GetUserNameW(buffer, ctypes.byref(size)):  # type: ignore[attr-defined,unused-ignore]
        raise OSError("GetUserName failed")
    return buffer.value
