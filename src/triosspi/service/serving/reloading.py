"""What a running process reads again: when, for how long at most, and what becomes of a reading that fails."""

# A reload reads what people have written and where they have put it: a half-saved file, a FIFO instead of a file, a directory
# on a server that is gone. So it is done in a thread: by the single process, or by a supervisor for its workers.
#
# * Nothing that it raises ends the process. What cannot be used changes nothing, and is one line in the log.
# * A reading that hangs is left to itself after a while; a thread that waits for a disk cannot be ended. The loop
#   turns, signals are obeyed, and the process ends without waiting for it: Trio's threads are daemons. What it brings in the
#   end is thrown away, since the files may have been read again since.
# * How many may hang is bounded. They have a limiter of their own: what else needs threads, logins among it, has others.

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, Generic, NoReturn, TypeAlias, TypeVar

import trio

from ... import _server_threads
from ..._errors import ConfigurationError
from ..._texts import CannotReadError
from ..reasons import only_configuration_errors

log = logging.getLogger("triosspi.server")

T = TypeVar("T")
_State: TypeAlias = list[tuple[int, int, int, int] | None]

#: Seconds that a reading may take. A hundred thousand accounts take one.
PATIENCE: Final = 30.0
#: Readings that may hang at a time.
MOST_HANGING: Final = 4
#: Seconds between two looks at the files that the configuration comes from.
FILES_INTERVAL: Final = 2.0
#: Seconds between two tries where the system does not give a file; before that, they become longer and longer.
LONGEST_RETRY: Final = 60.0


class Reading(Generic[T]):
    """Reads again what may have changed, as often as that is asked for.

    Args:
      read: does it; called in a thread.

    Attributes:
      may_pass: the last reading failed since the system did not give a file, or not in time: another may go well, though no
        file changes.
    """

    def __init__(self, read: Callable[[], T]) -> None:
        self._read = read
        self._wanted = trio.Event()
        self._under_way = False
        self.may_pass = False
        self._limiter = trio.CapacityLimiter(MOST_HANGING)

    def ask(self, why: str) -> None:
        """Have it read again, soon; asked for several times before it begins, it is read once."""
        self._wanted.set()
        log.info("%s: reading the configuration again%s", why, ", after this reading" if self._under_way else "")

    async def asked(self) -> None:
        """Wait until somebody asks."""
        await self._wanted.wait()
        self._wanted = trio.Event()

    async def read(self) -> T:
        """Read.

        Raises:
          ConfigurationError: it cannot be used, or has not been read in time.
        """
        self._under_way = True
        self.may_pass = True
        try:
            with trio.move_on_after(PATIENCE):
                found = await _server_threads.run_sync(
                    only_configuration_errors,
                    "the configuration",
                    self._read,
                    abandon_on_cancel=True,
                    limiter=self._limiter,
                )
                self.may_pass = False
                return found
        except ConfigurationError as exc:
            self.may_pass = isinstance(exc, CannotReadError)
            raise
        finally:
            self._under_way = False
        hanging = self._limiter.borrowed_tokens
        raise ConfigurationError(
            f"it could not be read within {PATIENCE:g} s, and {hanging} such readings hang: is a file of it on a server "
            "that does not answer, or no file at all?"
        )

    async def watch(self, files: Callable[[], tuple[Path, ...]]) -> NoReturn:
        """Have it read again when one of these files changes, and when another try may go well; see `watch_files`."""
        changed = partial(self.ask, "a file of the configuration has changed")
        await watch_files(files, changed, lambda: self.may_pass)


async def watch_files(
    files: Callable[[], tuple[Path, ...]], changed: Callable[[], object], retry: Callable[[], bool] = lambda: False
) -> NoReturn:
    """Look at files again and again.

    Args:
      files: which, from now on.
      changed: called when one of them has.
      retry: whether it is to be called again although none of them has: see `Reading.may_pass`.
    """
    # One at a time: where one look hangs, the next would too.
    limiter = trio.CapacityLimiter(1)
    watched: tuple[Path, ...] = ()
    known: _State = []
    told = False
    pause, tried = FILES_INTERVAL, trio.current_time()
    while True:
        if (wanted := files()) != watched:
            watched, known = wanted, []
        found: _State | None = None if watched else []
        with trio.move_on_after(PATIENCE if watched else 0):
            found = await _server_threads.run_sync(_state_of, watched, abandon_on_cancel=True, limiter=limiter)
        if found is None and not told:
            log.warning("whether files have changed is not known: to look at them takes longer than %g s", PATIENCE)
        told = found is None
        if found is not None:
            now = trio.current_time()
            if not (watched and retry()):
                pause, tried = FILES_INTERVAL, now
            overdue = now - tried >= pause
            if (known and found != known) or overdue:
                changed()
            if overdue:
                pause, tried = min(2 * pause, LONGEST_RETRY), now
            known = found
        await trio.sleep(FILES_INTERVAL)


def _state_of(files: tuple[Path, ...]) -> _State:
    """What changes when a file does."""
    found: _State = []
    for file in files:
        try:
            status = file.stat()
        except (OSError, ValueError):
            found.append(None)
        else:
            # The last one nobody can set back.
            found.append((status.st_mtime_ns, status.st_ino, status.st_size, status.st_ctime_ns))
    return found
