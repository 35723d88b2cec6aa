"""What a function that runs as a peer may not start: what would go on being the peer."""

# A thread, or a copy of the process, is from its first moment on who its starter is just then, and there is nobody to bring
# it back. So a function that has a pool grow, which may be anybody's (Trio's cache of threads, an executor of the
# application, asyncio's, a `multiprocessing.Pool` that forks), would leave the peer in there, to do the next errand of the
# server or of another peer. Whoever starts a pool's thread means no harm and knows nothing of it, so it is the start that
# is refused, by Python's auditing events; an audit hook that raises makes what it is asked about fail.
#
# An event loop is refused for the contrary: the threads that it finds idle in Trio's cache are the server, so
# `trio.run(trio.Path(name).read_text)` would read as the server what the peer may not. It cannot be seen from here which
# loop it is; that one is being installed, it says by an event.
#
# What is not seen: threads that a library in C starts for itself, and `multiprocessing`'s other ways to start processes,
# which are programs. Work that is handed to a thread that there is already cannot be seen at all, and is done by that one.

from __future__ import annotations

import _thread
import sys
import threading
from functools import cache
from types import ModuleType
from typing import Any

from .._errors import ConfigurationError


@cache
def see_threads() -> None:
    """Have Python 3.11 raise the event that later ones raise when a thread is started."""
    if sys.version_info < (3, 12):
        start = _thread.start_new_thread

        def start_new_thread(*args: Any) -> int:
            sys.audit("_thread.start_new_thread", *args)
            return start(*args)

        _thread.start_new_thread = start_new_thread
        threading._start_new_thread = start_new_thread  # type: ignore[attr-defined]  # noqa: SLF001 - what `start` calls


def rehearse(ids: ModuleType) -> None:
    """See that it works here, on a thread that nobody needs.

    Args:
      ids: the extension.

    Raises:
      ConfigurationError: a confined thread starts another one.
    """
    see_threads()
    ids.confine(True)
    try:
        threading.Thread(target=int, name="triosspi rehearsal").start()
    except RuntimeError:
        return
    finally:
        ids.confine(False)
    raise ConfigurationError(
        "impersonation cannot work: a function that runs as a peer could start threads, since this Python's auditing "
        "events do not reach triosspi; is there an audit hook that refuses others?"
    )
