"""Texts for operators: why something could not be done, in few words, and what others have said, safe to show."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

from .._errors import ConfigurationError

log = logging.getLogger("triosspi.server")

P = ParamSpec("P")
T = TypeVar("T")

# Characters of what an exception says of itself. Nobody reads more of it in a log, and some quote all that they met.
_LONGEST: Final = 300


def reason(exc: OSError) -> str:
    """What the system says, without what Trio puts around it.

    A host may have several addresses, and each its own reason: each reason is given once.
    """
    if isinstance(exc.__cause__, ExceptionGroup):
        # A dict, as a set that keeps the order.
        return ", ".join(
            dict.fromkeys(reason(cause) for cause in exc.__cause__.exceptions if isinstance(cause, OSError))
        )
    # A name that was not found has a number too, but of another table; as have sockets on Windows.
    if exc.errno is None or isinstance(exc, socket.gaierror) or os.name == "nt":
        return exc.strerror or str(exc)
    return os.strerror(exc.errno)


def described(exc: BaseException) -> str:
    """Any exception in one short line: its type, and what it says of itself."""
    try:
        text = " ".join(str(exc).split())
    except Exception:  # noqa: BLE001 - somebody else's __str__, which is no reason to fail
        text = ""
    text = "".join(char if char.isprintable() else "?" for char in text[:_LONGEST])
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


def harmless(text: str, keep: str = "") -> str:
    """Text with everything escaped, except for ``keep``, that could command the terminal it is shown on."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def only_configuration_errors(what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function that reads what people have written, and whose failures none of us has foreseen all.

    Args:
      what: cannot be used, in the words of the error.
      function: is called.
      args: its arguments.
      kwargs: the same.

    Raises:
      ConfigurationError: whatever `Exception` it was, in one line.
    """
    try:
        return function(*args, **kwargs)
    except ConfigurationError:
        raise
    except Exception as exc:
        # Whoever looks for the place has it at level debug.
        log.debug("%s cannot be used", what, exc_info=True)
        problem = f"{what} cannot be used: {described(exc)}"
    # Not in the block above: nothing of what was read is to hang on this error.
    raise ConfigurationError(problem)
