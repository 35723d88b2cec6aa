"""What a function that runs as a peer may not start: what would go on being the peer."""

# A new thread, or a copy of the process, begins with the credentials of the thread that starts it, and nothing ever changes
# them back. So a function that makes a pool grow (Trio's cache of threads, an executor of the application, asyncio's, a
# `multiprocessing.Pool` that forks) would leave a thread with the peer's credentials in it, which would do the next piece of
# work of the server or of another peer. The code that starts a pool's thread cannot know of this, so the start itself is
# refused, through Python's auditing events: what an audit hook raises makes the audited call fail.
#
# An event loop is refused for the opposite reason: the idle threads that it finds in Trio's cache have the server's
# credentials, so `trio.run(trio.Path(name).read_text)` would read as the server what the peer may not read. Which loop it is
# cannot be seen here; that one is being installed can, by its event.
#
# What cannot be seen: threads that a library in C starts, and `multiprocessing`'s other start methods, which start programs.
# Nor can work that is handed to a thread that exists already; it is done with that thread's credentials.

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
    """See that a confined thread is really kept from starting another one.

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
