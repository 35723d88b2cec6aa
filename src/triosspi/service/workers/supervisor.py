"""The parent of ``triosspi serve --workers``: starts the worker processes, watches them, replaces and ends them."""

# What it must hold:
#
# * A worker is a fresh interpreter. A fork of a process with threads, an event loop and a Kerberos library is a copy of
#   locks that nobody will release.
# * Nobody waits in a dead worker's queue for ever: the listening sockets are this process's, which accepts nothing, and
#   outlive every worker. A replacement finds what was queued.
# * Nor is anybody reset when all of it stops. The kernel resets who is queued on a socket when its last descriptor is closed,
#   so one worker must be the last who has it, and know it. First it says that it will empty the queue; then the others
#   close theirs, and say so; then this process closes its own; and only then the last one goes: it accepts whoever is
#   queued, and closes at once. Until then it serves as ever. Where somebody else has told all workers to go (systemd
#   signals each process of a service) there may be none left for that, and if anybody is queued another is started.
# * What a worker does to itself is its own affair. It dies: another takes its place, at once if it had lived for a while,
#   else after a pause that doubles, so that a fault which comes with every start does not take the whole machine. It hangs:
#   its event loop sends no heartbeat, and it is killed. Only where one cannot start when all begin is it the
#   configuration's fault: then the start fails, with that worker's reason.
# * Everything ends. A worker that is told to go and does not is killed; whatever happens to this process's own tasks, the
#   last thing that they do is to kill and to reap. And where this process itself is killed, the workers see the end
#   of their link (see `worker_link`).
# * One request to stop is one, however many processes it reaches. systemd sends SIGTERM to all of a service at once; a
#   terminal's Ctrl-C would go to all of its group, so workers have a group of their own. Orders go over the link, where
#   the same one may be said twice; signals are for a worker that does not listen yet.

from __future__ import annotations

import logging
import math
import os
import select
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, Protocol

import trio

from ..._errors import ConfigurationError
from ..admission.tables import Columns, Tables
from ..observe.notify import Notifier
from ..reasons import described, only_configuration_errors, reason
from ..serving.reloading import Reading, watch_files
from .balance import Loads
from .processes import COMMAND, Process, Timing, Work, WorkerProcess, spawn
from .worker_link import Plan

log = logging.getLogger("triosspi.server")

Spawn = Callable[[int, int, Sequence[int]], Awaitable[Process]]
_SPAWN: Final[Spawn] = partial(spawn, COMMAND)
# Seconds within which a second signal is the first one's echo: timeout(1) sends its SIGTERM to the process and to its group.
_ECHO: Final = 0.2
# Times of `heartbeat_timeout`: the supervisor's own kill comes first, if there is a supervisor.
_ALARM: Final = 2


class ListeningSocket(Protocol):
    """What is needed of a socket: the standard library's, or Trio's."""

    def fileno(self) -> int:
        """Its descriptor."""

    def close(self) -> None:
        """May be called twice."""


def _tell(whom: Callable[..., object] | None, *what: object) -> None:
    """Tell somebody whose failure is none of the service."""
    try:
        if whom is not None:
            whom(*what)
    except Exception as exc:  # noqa: BLE001 - see above
        log.error("%s; the service goes on", described(exc))  # noqa: TRY400 - the reason is all there is to it


class Pauses:
    """How long to wait before the next try, after each that failed."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._failures = 0

    def after(self, lived: float) -> float:
        """Seconds.

        Args:
          lived: what was tried went well for so many seconds.
        """
        if lived >= self._timing.stable:
            self._failures = 0
            return 0.0
        # The power's limit is only for the arithmetic.
        pause = self._timing.first_pause * 2.0 ** min(self._failures, 30)
        self._failures += 1
        return min(pause, self._timing.longest_pause)


class Supervisor:
    """Worker processes that accept from the same sockets.

    Args:
      sockets: the listening sockets. They are this object's from now on, and closed when it stops.
      work: what the workers serve until there is another.
      number: how many workers there are.
      timing: see `Timing`.
      max_sessions: a worker is replaced after so many sessions; None: never. Its replacement starts first, and its sessions
          may go on until the replacement is replaced in its turn.
      sole: nobody else has these sockets: who is queued on them in the end is to be told so by a worker.
      notifier: the service manager.
      reload: called in a thread, for each SIGHUP and when a file has changed; returns what the workers serve from then
          on, those that are there and those that start later. Where it raises, or hangs, that is logged, and all stays
          as it is. None: nothing can be read again.
      on_start: called before a worker is started. This and the next two may fail: that is logged, and is all.
      on_stop: called when it begins to stop, before the sockets are closed.
      on_end: called with the process number of each worker that has ended.
      spawn: starts a worker: see `spawn`, but for the command; for tests.
    """

    def __init__(
        self,
        sockets: Sequence[ListeningSocket],
        work: Work,
        *,
        number: int,
        timing: Timing | None = None,
        max_sessions: int | None = None,
        sole: bool = False,
        notifier: Notifier | None = None,
        reload: Callable[[], Work] | None = None,
        on_start: Callable[[], object] | None = None,
        on_stop: Callable[[], object] | None = None,
        on_end: Callable[[int], object] | None = None,
        spawn: Spawn = _SPAWN,
    ) -> None:
        self._sockets = list(sockets)
        self._number = number
        self._loads: Loads | None = None
        self._work = work
        self._tables: Tables | None = None
        self._timing = timing if timing is not None else Timing()
        self._max_sessions = max_sessions
        self._sole = sole
        self._notifier = notifier if notifier is not None else Notifier(None)
        self._reading = None if reload is None else Reading(reload)
        self._on_start = on_start
        self._on_stop = on_stop
        self._on_end = on_end
        self._spawn = spawn
        self._workers: set[WorkerProcess] = set()
        self._attending: trio.Nursery
        self._serving = trio.CancelScope()
        self._handing_over = trio.CancelScope()
        self._stops = 0
        self._renewing = trio.Lock()

    @property
    def workers(self) -> list[WorkerProcess]:
        """All that have not ended, also those on their way out."""
        return sorted(self._workers, key=lambda worker: (worker.number, worker.pid))

    @property
    def well(self) -> bool:
        """The service manager need not do anything: somebody serves, or finishes, and nobody hangs."""
        return any(worker.ready.is_set() for worker in self._workers) and all(worker.alive for worker in self._workers)

    @property
    def ready(self) -> bool:
        """Whoever comes now is served: somebody is ready, and nobody has said stop."""
        return not self._stops and any(worker.serving for worker in self._workers)

    async def run(
        self,
        started: Callable[[], object] | None = None,
        alongside: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        """Serve until a signal says stop. SIGTERM and SIGINT stop, a second one at once; SIGHUP reloads.

        Args:
          started: called when all workers are ready.
          alongside: run from the first worker's start to the last one's end.

        Raises:
          ConfigurationError: a worker could not start; the others have been ended.
        """
        failure: ConfigurationError | None = None
        try:
            # The last to be undone: a signal that comes late must not end this process before its children.
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
                async with trio.open_nursery() as self._attending:
                    self._attending.start_soon(self._obey, signals)
                    if alongside is not None:
                        self._attending.start_soon(alongside)
                    try:
                        with self._serving:
                            await self._serve(started)
                        await self._end()
                    except ConfigurationError as exc:
                        failure = exc
                    # With it the workers, if there are any left.
                    self._attending.cancel_scope.cancel()
        finally:
            self._close()
            if self._loads is not None:
                self._loads.close()
            if self._tables is not None:
                self._tables.close()
        if failure is not None:
            raise failure

    # Starting and replacing

    async def _serve(self, started: Callable[[], object] | None) -> None:
        """Start all, and keep all places filled, for ever."""
        if not hasattr(os, "memfd_create"):
            raise ConfigurationError("several workers need Linux: start with one")
        try:
            self._loads = Loads.make(self._number)
            # A worker that is replaced finishes beside its successor.
            columns = 2 * self._number
            self._tables = Tables.make(columns)
            self._columns = Columns(self._tables, columns)
        except OSError as exc:
            raise ConfigurationError(f"cannot start workers: {reason(exc)}") from None
        first = [await self._launch(number) for number in range(1, self._number + 1)]
        for worker in first:
            await worker.settled.wait()
            if not worker.ready.is_set():
                raise ConfigurationError(worker.failure)
        log.info("all %d workers are ready", len(first))
        self._notifier.ready(self._status())
        if started is not None:
            started()
        async with trio.open_nursery() as nursery:
            for worker in first:
                nursery.start_soon(self._keep, worker)
            if (reading := self._reading) is not None:
                nursery.start_soon(self._reload_when_asked, reading)
                changed = partial(reading.ask, "a file of the configuration has changed")
                nursery.start_soon(watch_files, lambda: self._work.files, changed, lambda: reading.may_pass)
            nursery.start_soon(self._notifier.keep_alive, lambda: self.well)

    async def _keep(self, worker: WorkerProcess) -> None:
        """Keep a place filled, for ever."""
        pauses = Pauses(self._timing)
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
                return await self._launch(number)
            except ConfigurationError as exc:
                log.error("%s", exc)  # noqa: TRY400 - the reason is all there is to it
                await self._pause(pauses.after(0.0), number)

    async def _pause(self, seconds: float, number: int) -> None:
        if seconds:
            log.warning("worker %d is started again in %g s", number, seconds)
        await trio.sleep(seconds)

    async def _launch(self, number: int) -> WorkerProcess:
        """Start a worker for a place; it is attended to from now on.

        Raises:
          ConfigurationError: the system does not let it start.
        """
        _tell(self._on_start)
        listeners = tuple(sock.fileno() for sock in self._sockets)
        work = self._work
        assert self._loads is not None
        assert self._tables is not None
        loads, tables = self._loads.fileno(), self._tables.fileno()
        column = self._columns.take()
        plan = Plan(
            number=number,
            listeners=listeners,
            loads=loads,
            update=work.update,
            tables=(tables, column),
            heartbeat=self._timing.heartbeat,
            max_sessions=self._max_sessions,
            alarm=_ALARM * self._timing.heartbeat_timeout,
        )
        try:
            ours, theirs = socket.socketpair()
            try:
                with theirs, plan.file() as file:
                    process = await self._spawn(theirs.fileno(), file.fileno(), (*listeners, loads, tables))
            except BaseException:
                ours.close()
                raise
        except BaseException as exc:
            self._columns.give_back(column)
            if not isinstance(exc, OSError):
                raise
            raise ConfigurationError(f"cannot start worker {number}: {reason(exc)}") from None
        worker = WorkerProcess(
            number, process, ours, self._timing, work, max_sessions=self._max_sessions, changed=self._tell_status
        )
        log.debug("%s has been started", worker)
        self._workers.add(worker)
        if self._work is not work:
            # While the system started it.
            worker.reload(self._work)
        # Without a checkpoint since it was started: nobody else would reap it.
        self._attending.start_soon(self._attend, worker, column)
        return worker

    async def _attend(self, worker: WorkerProcess, column: int | None) -> None:
        try:
            await worker.attend()
        finally:
            # By identity: the system may have given the number to the next already.
            self._workers.discard(worker)
            self._columns.give_back(column)
            if self._loads is not None and not any(other.number == worker.number for other in self._workers):
                self._loads.set(worker.number, None)
            _tell(self._on_end, worker.pid)
            self._tell_status()

    # Telling

    def _status(self) -> str:
        draining = sum(worker.draining.is_set() for worker in self._workers)
        retired = sum(worker.retired and not worker.draining.is_set() for worker in self._workers)
        ready = sum(worker.ready.is_set() and not worker.draining.is_set() for worker in self._workers) - retired
        status = f"{ready} of {self._number} workers ready"
        for number, what in ((draining, "draining"), (retired, "retired")):
            status += f", {number} {what}" if number else ""
        return status

    def _tell_status(self) -> None:
        self._notifier.status(self._status())

    # Signals

    async def _obey(self, signals: AsyncIterator[int]) -> None:
        last = -math.inf
        async for number in signals:
            name = signal.Signals(number).name
            if number == signal.SIGHUP:
                if self._reading is None:
                    log.warning("%s: there is no configuration to read again", name)
                else:
                    self._reading.ask(name)
            elif trio.current_time() - last > _ECHO:
                last = trio.current_time()
                self.stop(name)

    def stop(self, why: str = "stop") -> None:
        """Stop, as a signal does: called again, at once; a third time, without mercy."""
        self._stops += 1
        if self._stops == 1:
            log.info("%s: stopping", why)
            self._serving.cancel()
            return
        log.warning("%s again: stopping at once", why)
        self._handing_over.cancel()
        for worker in self._workers:
            if self._stops == 2:
                worker.stop()
            else:
                worker.send(signal.SIGKILL)

    async def _end(self) -> None:
        """Let all workers finish, and wait for it."""
        self._notifier.stopping()
        _tell(self._on_stop)
        if self._sole and self._workers:
            self._handing_over.deadline = trio.current_time() + self._timing.hand_over
            with self._handing_over:
                await self._hand_over()
            if self._handing_over.cancelled_caught:
                log.warning("no worker had the listening sockets alone in time: who is queued on them may be reset")
        # From now on nobody new is to come in; where the workers have closed theirs too, connecting is refused.
        self._close()
        workers = list(self._workers)
        for worker in workers:
            worker.drain()
        for worker in workers:
            await worker.ended.wait()

    async def _hand_over(self) -> None:
        """Have the sockets with one worker and with this process alone; or with nobody, where nobody is queued on them."""
        while True:
            last = await self._find_last()
            others = self._workers - {last}
            for worker in others:
                worker.drain()
            with trio.move_on_after(self._timing.closing):
                for worker in others:
                    await worker.wait_closed()
            # One that was told to go by somebody else meanwhile has emptied the queue once, and not for the last time.
            if (last is not None and last.serving) or not self._waited_on():
                return

    async def _find_last(self) -> WorkerProcess | None:
        """A worker that will empty the sockets; None: there is none, and nobody is queued."""
        for worker in self.workers:
            if worker.serving and await worker.make_last():
                return worker
        while self._waited_on():
            starting = (w for w in self.workers if not (w.settled.is_set() or w.draining.is_set()))
            try:
                worker = next(starting, None) or await self._launch(1)
            except ConfigurationError as exc:
                log.error("%s", exc)  # noqa: TRY400 - the reason is all there is to it
                return None
            await worker.settled.wait()
            if await worker.make_last():
                return worker
        return None

    def _waited_on(self) -> bool:
        """Whether anybody is queued on one of the sockets."""
        poll = select.poll()
        for sock in self._sockets:
            poll.register(sock.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def _close(self) -> None:
        for sock in self._sockets:
            sock.close()

    async def _reload_when_asked(self, reading: Reading[Work]) -> None:
        while True:
            await reading.asked()
            self._notifier.reloading()
            try:
                work = await reading.read()
                only_configuration_errors("the configuration", work.taken_over)
            except ConfigurationError as exc:
                log.error("not reloaded, the old configuration stays: %s", exc)  # noqa: TRY400 - no error of ours
            else:
                self._work = replace(work, generation=self._work.generation + 1)
                await self._reload_workers()
            self._notifier.ready(self._status())

    async def _reload_workers(self) -> None:
        workers = [worker for worker in self._workers if worker.alive and not worker.draining.is_set()]
        for worker in workers:
            worker.reload(self._work)
        with trio.move_on_after(self._timing.reload):
            for worker in workers:
                if worker.ready.is_set():
                    await worker.wait_reloaded()
        # One that had been launched meanwhile has it from its start.
        late = [str(worker) for worker in workers if worker.ready.is_set() and worker.reloading]
        if late:
            log.warning("not reloaded after %g s: %s", self._timing.reload, ", ".join(late))
