"""The workers of a supervisor: as many as there are to be, started, attended to, and replaced."""

# What it must hold:
#
# * A worker is a fresh interpreter. A fork of a process with threads, an event loop and a Kerberos library is a copy of
#   locks that will never be released.
# * What a worker does to itself is its own affair. It dies: another takes its place, at once if it had lived for a while,
#   else after a pause that doubles, so that a fault which comes with every start does not take the whole machine. It hangs:
#   its event loop sends no heartbeat, and it is killed. Only where one cannot start when all begin is it the
#   configuration's fault: then the start fails, with that worker's reason.

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

import trio

from ..._errors import ConfigurationError
from ..admission.tables import Columns, Tables
from ..reasons import described, reason
from .processes import COMMAND, Process, Timing, Work, WorkerProcess, spawn
from .worker_link import Plan

log = logging.getLogger("triosspi.server")

Spawn = Callable[[int, int, Sequence[int]], Awaitable[Process]]
SPAWN: Final[Spawn] = partial(spawn, COMMAND)
# Times of `heartbeat_timeout`: the supervisor's own kill comes first, if there is a supervisor.
_ALARM: Final = 2


class ListeningSocket(Protocol):
    """What is needed of a socket: the standard library's, or Trio's."""

    def fileno(self) -> int:
        """Its descriptor."""

    def close(self) -> None:
        """May be called twice."""


def tell(whom: Callable[..., object] | None, *what: object) -> None:
    """Tell somebody whose failure is none of the service."""
    try:
        if whom is not None:
            whom(*what)
    except Exception as exc:  # noqa: BLE001 - see above
        log.error("%s; the service goes on", described(exc))  # noqa: TRY400 - the reason is all there is to it


class Pauses:
    """How long to wait before the next try, after each that failed."""

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self._failures = 0

    def after(self, lived: float) -> float:
        """Seconds.

        Args:
          lived: what was tried went well for so many seconds.
        """
        if lived >= self.timing.stable:
            self._failures = 0
            return 0.0
        # The power's limit is only for the arithmetic.
        pause = self.timing.first_pause * 2.0 ** min(self._failures, 30)
        self._failures += 1
        return min(pause, self.timing.longest_pause)


@dataclass(kw_only=True, eq=False)
class WorkerPool:
    """Worker processes that accept from the same sockets, numbered from 1.

    Attributes:
      sockets: the listening sockets.
      work: what those are to serve that are there, and those that start from now on.
      number: how many workers there are.
      timing: see `Timing`.
      max_sessions: a worker is replaced after so many sessions; None: never. Its replacement starts first, and its sessions
          may go on until the replacement is replaced in its turn.
      on_start: called before a worker is started. This and the next may fail: that is logged, and is all.
      on_end: called with the process number of each worker that has ended.
      spawn: starts a worker: see `spawn`, but for the command; for tests.
      changed: called when a worker has become ready, drains, or has ended.
      nursery: in which workers are attended to; to be set before the first one is launched.
    """

    sockets: Sequence[ListeningSocket]
    work: Work
    number: int
    timing: Timing = field(default_factory=Timing)
    max_sessions: int | None = None
    on_start: Callable[[], object] | None = None
    on_end: Callable[[int], object] | None = None
    spawn: Spawn = SPAWN
    changed: Callable[[], object] = bool
    nursery: trio.Nursery = field(init=False)
    _tables: Tables | None = None
    _columns: Columns = field(init=False)
    _workers: set[WorkerProcess] = field(default_factory=set)
    _renewing: trio.Lock = field(default_factory=trio.Lock)

    @property
    def workers(self) -> list[WorkerProcess]:
        """All that have not ended, also those on their way out."""
        return sorted(self._workers, key=lambda worker: (worker.number, worker.pid))

    async def start(self) -> list[WorkerProcess]:
        """Start all, and wait until they are ready.

        Raises:
          ConfigurationError: one of them could not start.
        """
        if not hasattr(os, "memfd_create"):
            raise ConfigurationError("several workers need Linux: start with one")
        try:
            # A worker that is replaced finishes beside its successor.
            columns = 2 * self.number
            self._tables = Tables.make(columns, self.number)
            self._columns = Columns(self._tables, columns)
        except OSError as exc:
            raise ConfigurationError(f"cannot start workers: {reason(exc)}") from None
        first = [await self.launch(number) for number in range(1, self.number + 1)]
        for worker in first:
            await worker.settled.wait()
            if not worker.ready.is_set():
                raise ConfigurationError(worker.failure)
        return first

    def close(self) -> None:
        """Give up what they shared."""
        if self._tables is not None:
            self._tables.close()

    async def keep(self, worker: WorkerProcess) -> None:
        """Replace a worker when it leaves, and the next one, for ever."""
        pauses = Pauses(self.timing)
        while True:
            await worker.leaving.wait()
            if worker.outworn:
                # One at a time: all have had their sessions at about the same moment.
                async with self._renewing:
                    log.info("%s has served %d sessions: it is replaced", worker, worker.report.sessions)
                    fresh = await self._launch_until_ready(worker.number, pauses)
                for earlier in self.workers:
                    # One beside each that serves: a day's sessions would keep dozens of processes.
                    if earlier.retired and earlier.number == worker.number:
                        earlier.drain()
                worker.retire()
            else:
                await self._pause(pauses.after(worker.lived), worker.number)
                fresh = await self._launch_somehow(worker.number, pauses)
            worker = fresh

    async def _launch_until_ready(self, number: int, pauses: Pauses) -> WorkerProcess:
        while True:
            worker = await self._launch_somehow(number, pauses)
            await worker.settled.wait()
            if worker.ready.is_set():
                return worker
            await self._pause(pauses.after(0.0), number)

    async def _launch_somehow(self, number: int, pauses: Pauses) -> WorkerProcess:
        while True:
            try:
                return await self.launch(number)
            except ConfigurationError as exc:
                log.error("%s", exc)  # noqa: TRY400 - the reason is all there is to it
                await self._pause(pauses.after(0.0), number)

    async def _pause(self, seconds: float, number: int) -> None:
        if seconds:
            log.warning("worker %d is started again in %g s", number, seconds)
        await trio.sleep(seconds)

    async def launch(self, number: int) -> WorkerProcess:
        """Start a worker with a number; it is attended to from now on.

        Raises:
          ConfigurationError: the system does not let it start.
        """
        tell(self.on_start)
        listeners = tuple(sock.fileno() for sock in self.sockets)
        work = self.work
        assert self._tables is not None
        tables = self._tables.fileno()
        column = self._columns.take()
        plan = Plan(
            number=number,
            listeners=listeners,
            update=work.update,
            tables=(tables, column),
            heartbeat=self.timing.heartbeat,
            max_sessions=self.max_sessions,
            alarm=_ALARM * self.timing.heartbeat_timeout,
        )
        try:
            ours, theirs = socket.socketpair()
            try:
                with theirs, plan.file() as file:
                    process = await self.spawn(theirs.fileno(), file.fileno(), (*listeners, tables))
            except BaseException:
                ours.close()
                raise
        except BaseException as exc:
            self._columns.give_back(column)
            if not isinstance(exc, OSError):
                raise
            raise ConfigurationError(f"cannot start worker {number}: {reason(exc)}") from None
        worker = WorkerProcess(
            number, process, ours, self.timing, work, max_sessions=self.max_sessions, changed=self.changed
        )
        log.debug("%s has been started", worker)
        self._workers.add(worker)
        if self.work is not work:
            # While the system started it.
            worker.reload(self.work)
        # Without a checkpoint since it was started: nobody else would reap it.
        self.nursery.start_soon(self._attend, worker, column)
        return worker

    async def _attend(self, worker: WorkerProcess, column: int | None) -> None:
        try:
            await worker.attend()
        finally:
            # By identity: the system may have given the number to the next already.
            self._workers.discard(worker)
            self._columns.give_back(column)
            if self._tables is not None and not any(other.number == worker.number for other in self._workers):
                self._tables.loads[worker.number - 1] = 0
            tell(self.on_end, worker.pid)
            self.changed()

    async def reload(self) -> None:
        """Have all of them serve what is `work` now, and wait a moment for it."""
        workers = [worker for worker in self._workers if worker.alive and not worker.draining.is_set()]
        for worker in workers:
            worker.reload(self.work)
        with trio.move_on_after(self.timing.reload):
            for worker in workers:
                if worker.ready.is_set():
                    await worker.wait_reloaded()
        # One that had been launched meanwhile has it from its start.
        late = [str(worker) for worker in workers if worker.ready.is_set() and worker.reloading]
        if late:
            log.warning("not reloaded after %g s: %s", self.timing.reload, ", ".join(late))

    def status(self) -> str:
        """How they are, in one line."""
        draining = sum(worker.draining.is_set() for worker in self._workers)
        retired = sum(worker.retired and not worker.draining.is_set() for worker in self._workers)
        ready = sum(worker.ready.is_set() and not worker.draining.is_set() for worker in self._workers) - retired
        status = f"{ready} of {self.number} workers ready"
        for number, what in ((draining, "draining"), (retired, "retired")):
            status += f", {number} {what}" if number else ""
        return status
