"""The ``auth_to_local`` rules of krb5.conf, through MIT Kerberos's own library.

Neither python-gssapi nor pykrb5 passes ``krb5_aname_to_localname`` on, so it is called by ctypes, in the
library that they have loaded anyway.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_void_p
from typing import Final

from .._errors import ConfigurationError, ImpersonationError, printable

# MIT's; Heimdal's has another number, and other rules.
_LIBRARY: Final = "libkrb5.so.3"
# KRB5_LNAME_NOTRANS: no rule gives a name.
_NO_TRANSLATION: Final = -1765328208
_LONGEST_NAME: Final = 256


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(_LIBRARY)
    signatures: dict[str, tuple[object, list[object]]] = {
        "krb5_init_context": (c_int32, [POINTER(c_void_p)]),
        "krb5_free_context": (None, [c_void_p]),
        "krb5_parse_name": (c_int32, [c_void_p, c_char_p, POINTER(c_void_p)]),
        "krb5_free_principal": (None, [c_void_p, c_void_p]),
        "krb5_aname_to_localname": (c_int32, [c_void_p, c_void_p, c_int, c_char_p]),
        "krb5_get_error_message": (c_void_p, [c_void_p, c_int32]),
        "krb5_free_error_message": (None, [c_void_p, c_void_p]),
    }
    for name, (result, arguments) in signatures.items():
        # Not library[name], which is another object each time.
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def check_auth_to_local() -> None:
    """See that the library is there.

    Raises:
      ConfigurationError: it is not.
    """
    try:
        _library()
    except (OSError, AttributeError):
        raise ConfigurationError(f"auth_to_local needs MIT Kerberos's library {_LIBRARY}") from None


def auth_to_local(principal: str) -> str | None:
    """What the rules make of a principal. May block: plug-ins ask a directory.

    Args:
      principal: as the Kerberos library has displayed it, ``alice@REALM``.

    Returns:
      The name of a local account, which need not exist; None where no rule is about the principal.

    Raises:
      ImpersonationError: the library could not tell.
    """
    if "\\" in principal or not principal.isprintable():
        # Quoted for display, or never text at all: read back it might be somebody else.
        return None
    library = _library()
    context, parsed = c_void_p(), c_void_p()
    if code := library.krb5_init_context(byref(context)):
        raise ImpersonationError(f"auth_to_local: no Kerberos context, error {code}")
    try:
        name = ctypes.create_string_buffer(_LONGEST_NAME)
        code = library.krb5_parse_name(context, principal.encode(), byref(parsed))
        code = code or library.krb5_aname_to_localname(context, parsed, _LONGEST_NAME - 1, name)
        if code == _NO_TRANSLATION:
            return None
        if code:
            raise ImpersonationError(f"auth_to_local: {printable(principal)}: {_message(library, context, code)}")
        return name.value.decode(errors="backslashreplace")
    finally:
        if parsed.value:
            library.krb5_free_principal(context, parsed)
        library.krb5_free_context(context)


def _message(library: ctypes.CDLL, context: c_void_p, code: int) -> str:
    text = library.krb5_get_error_message(context, code)
    try:
        return printable((ctypes.string_at(text) if text else b"").decode(errors="replace"), 200)
    finally:
        library.krb5_free_error_message(context, text)
