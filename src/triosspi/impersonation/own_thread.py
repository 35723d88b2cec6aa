"""A new thread for one function, which ends with it."""

# That a thread has its ids and capabilities back is verified each time, but they are not all of a thread's state. A function
# may leave behind what cannot be undone (a filter of system calls, Landlock's rules, no_new_privs), and much else: a nice
# value, a signal mask, keyrings, namespaces, the `threading.local` of every library that it has used. None of that may reach
# the next function, which runs for another peer, nor the server's own work, which is what a thread of Trio's cache would do
# next. So each function has a thread that ends with it.
#
# The thread is started by one of Trio's worker threads, which waits for its end, and not by the event loop: so Trio's own
# limiters, cancellation and `from_thread` work, which all go through the worker. `from_thread` finds the waiting task by a
# thread-local variable of the worker, private to Trio. It is copied whole, without looking at its contents.

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from trio._threads import PARENT_TASK_DATA

from .._errors import ImpersonationError

T = TypeVar("T")


class _Errand(threading.Thread, Generic[T]):
    """Calls a function and keeps what came of it."""

    def __init__(self, function: Callable[..., T], args: tuple[Any, ...]) -> None:
        super().__init__(name="triosspi peer", daemon=True)
        self._call = (contextvars.copy_context(), function, args)
        self._task = vars(PARENT_TASK_DATA).copy()
        self._result: T | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        context, function, args = self._call
        # Arguments, and frames of an exception, are released in the worker thread, where they were made.
        vars(PARENT_TASK_DATA).update(self._task)
        try:
            self._result = context.run(function, *args)
        except BaseException as exc:  # noqa: BLE001 - it is raised in the caller
            self._error = exc

    def outcome(self) -> T:
        """What the function has returned, or raise what it has raised. Once: nothing is kept."""
        error, self._error = self._error, None
        if error is None:
            return cast("T", self._result)
        try:
            raise error
        finally:
            # Its traceback refers to this frame: a variable here that referred to it would be a cycle.
            del error


def call(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a thread of its own, and wait for the thread's end.

    Called in one of Trio's worker threads; `trio.from_thread` works in the other thread as it does here.

    Raises:
      ImpersonationError: there was no thread to be had; the function was not called.
    """
    errand = _Errand(function, args)
    try:
        errand.start()
    except RuntimeError as exc:
        raise ImpersonationError(f"there is no thread for it: {exc}") from None
    # Until the thread's end, not only the function's: whatever ends with the thread has ended when the caller goes on.
    errand.join()
    return errand.outcome()
