"""Why the network did not do what was asked, in the system's own few words."""

from __future__ import annotations

import os
import socket


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
