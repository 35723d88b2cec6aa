"""A thread for one function, in which nobody has been before and nobody will be after."""

# That a thread has its ids and capabilities back is proven each time, and is not all that a thread is. A function may leave
# in it what has no way back at all (a filter of system calls, Landlock's rules, no_new_privs), and much that nobody thinks
# of: its nice value, signal mask, keyrings and namespaces, the `threading.local` of every library that it has used. None of
# that may meet the next function, who is another peer's, and still less the server's own work, which is where a thread of
# Trio's cache goes next. So each function has a thread that ends with it.
#
# It is started by one of Trio's worker threads, which waits for its end, and not by the event loop: so there are Trio's own
# limits, cancellation and `from_thread`, which all go by the worker. The last of these finds the waiting task by a variable
# of the worker's, Trio's private one. It is handed over whole, without looking at what is in it.

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
        # Arguments, and what stands in the way of an exception, are let go of where they were made: in the worker.
        vars(PARENT_TASK_DATA).update(self._task)
        try:
            self._result = context.run(function, *args)
        except BaseException as exc:  # noqa: BLE001 - whatever it is, it is the caller's
            self._error = exc

    def outcome(self) -> T:
        """What the function has returned, or raise what it has raised. Once: nothing is kept."""
        error, self._error = self._error, None
        if error is None:
            return cast("T", self._result)
        try:
            raise error
        finally:
            # It knows this frame, and that of `run`: what knew it from there would keep it until the garbage collector comes.
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
    # Not for the function's end only: what ends with the thread ends before anybody hears of it.
    errand.join()
    return errand.outcome()
