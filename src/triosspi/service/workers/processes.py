"""One worker process as its supervisor sees it: told, heard, and in the end reaped."""

# Times are counted in waiting, and not read off a clock: where the machine was suspended or the supervisor stopped, the
# workers have been silent for hours and no time was theirs to speak in.

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import trio

from ..observe.notify import VARIABLES
from .worker_link import HEARTBEAT, LONGEST_REPORT, Order, Report, State, Update

log = logging.getLogger("triosspi.server")

#: What starts a worker. -P: nothing is imported from the working directory just because it lies there.
COMMAND: Final = (sys.executable, "-P", "-m", "triosspi.service.workers.worker")
# systemd's sockets are the supervisor's alone, as is its ear.
_NOT_FOR_WORKERS: Final = {*VARIABLES, "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"}
# Seconds in which a worker that hangs may write down where.
_LAST_WORDS: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long a supervisor waits for what, in seconds.

    Attributes:
      heartbeat: between two heartbeats of a worker.
      heartbeat_timeout: without any, a worker is killed.
      start: from its start until a worker must be ready.
      margin: more than its grace until a worker is killed that was told to go.
      hurry: the same when it was told to end at once; and until it must have answered.
      closing: for a worker that was told to go to close its sockets.
      hand_over: when all stop, until one of them must have the sockets alone, if need be one that has yet to start.
      reload: for a worker to read its configuration again; then the others' sake goes before.
      first_pause: before a worker is replaced that has died too soon; doubles with each.
      longest_pause: the most of that. Not long: whoever finds a way to crash a worker from outside would otherwise
          need to do so but seldom.
      stable: having lived for so long, a worker did not die too soon.
    """

    heartbeat: float = HEARTBEAT
    heartbeat_timeout: float = 30.0
    start: float = 60.0
    margin: float = 5.0
    hurry: float = 2.0
    closing: float = 5.0
    hand_over: float = 20.0
    reload: float = 5.0
    first_pause: float = 0.5
    longest_pause: float = 10.0
    stable: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What workers serve, and what the supervisor has to know of it: a reload brings another.

    Attributes:
      service: see `Update`.
      grace: seconds that a worker has, by its own clock, to finish what is under way when it is told to go.
      files: a change of these is a reason to reload.
      taken_over: called when it holds for the supervisor, too.
      generation: its number; the supervisor counts them.
    """

    service: bytes
    grace: float = 30.0
    files: tuple[Path, ...] = ()
    taken_over: Callable[[], object] = lambda: None
    generation: int = 0

    @property
    def update(self) -> Update:
        """As workers get it."""
        return Update(generation=self.generation, service=self.service)


class Process(Protocol):
    """What is needed of a `trio.Process`."""

    @property
    def pid(self) -> int:
        """Its number."""

    async def wait(self) -> int:
        """Until it has ended and is reaped; its status as `subprocess` has it."""

    def send_signal(self, sig: signal.Signals | int) -> None:
        """Nothing, if it has been reaped."""


async def spawn(command: Sequence[str], link: int, plan: int, others: Sequence[int]) -> Process:
    """Start a fresh interpreter that has these descriptors, under the same numbers, and no others.

    Raises:
      OSError: it cannot be started.
    """
    return await trio.lowlevel.open_process(
        [*command, str(link), str(plan)],
        stdin=subprocess.DEVNULL,
        pass_fds=(link, plan, *others),
        env={name: value for name, value in os.environ.items() if name not in _NOT_FOR_WORKERS},
        # A terminal's Ctrl-C is for the supervisor, who tells the workers in its own time; and Ctrl-Z stops
        # the supervisor and not the service.
        process_group=0,
    )


class WorkerProcess:
    """A worker, from its start until it has been reaped.

    Args:
      number: of its place, from 1.
      process: has just been started.
      link: our end of the link.
      timing: see `Timing`.
      work: what it was started with.
      max_sessions: after so many it is `outworn`; None: never.
      changed: called when it is ready, and when it drains.

    Attributes:
      number: of its place.
      pid: the process's.
      report: what it has said last.
      ready: it serves, or did.
      settled: it is ready, or will not be.
      leaving: its place is to be filled: it has died, it hangs, it drains, or it is outworn.
      draining: it was told to go, or goes by itself.
      ended: it has been reaped.
      retired: it was told to accept nobody any more; there is another in its place.
      hung: it was killed, because it was silent or did not end.
    """

    def __init__(
        self,
        number: int,
        process: Process,
        link: socket.socket,
        timing: Timing,
        work: Work,
        *,
        max_sessions: int | None = None,
        changed: Callable[[], object] = lambda: None,
    ) -> None:
        link.setblocking(False)
        self.number = number
        self.pid = process.pid
        self.report = Report()
        self.ready = trio.Event()
        self.settled = trio.Event()
        self.leaving = trio.Event()
        self.draining = trio.Event()
        self.ended = trio.Event()
        self.retired = False
        self.hung = False
        self._process = process
        self._link = link
        self._timing = timing
        self._max_sessions = max_sessions
        self._changed = changed
        self._inbox = b""
        self._failure: str | None = None
        self._status: int | None = None
        self._ready_since = 0.0
        self._hurried = trio.Event()
        # The last that it is to serve, and whether it was told.
        self._work = work
        self._told = True
        # Of all that it may serve by now.
        self._graces = {work.generation: work.grace}
        self._news = trio.Event()

    def __str__(self) -> str:
        return f"worker {self.number} (process {self.pid})"

    @property
    def alive(self) -> bool:
        """It has not ended, and does not hang."""
        return not self.hung and not self.ended.is_set()

    @property
    def serving(self) -> bool:
        """It takes connections, as far as one can know."""
        return self.ready.is_set() and self.alive and not (self.draining.is_set() or self.retired)

    @property
    def outworn(self) -> bool:
        """It serves, and has served enough."""
        enough = self._max_sessions is not None and self.report.sessions >= self._max_sessions
        return enough and self.alive and not (self.draining.is_set() or self.retired)

    @property
    def lived(self) -> float:
        """Seconds since it became ready; 0 if it never did."""
        return trio.current_time() - self._ready_since if self.ready.is_set() else 0.0

    @property
    def failure(self) -> str:
        """Why it has not become ready, in one line."""
        if self._failure is not None:
            return self._failure
        if self.hung or self._status is None:
            return f"worker {self.number} was not ready after {self._timing.start:g} s"
        return f"worker {self.number} ended before it was ready ({self._end()}); the log may have its reason"

    # Orders

    async def make_last(self) -> bool:
        """Have it empty the queues of its sockets when it stops, since no other process will have them then.

        Returns:
          Whether it has heard of it, and still serves.
        """
        self._say(Order.LAST)
        with trio.move_on_after(self._timing.hurry):
            while self.serving and not self.report.last:
                await self._news.wait()
        return self.serving and self.report.last

    async def wait_closed(self) -> None:
        """Until it has closed its listening sockets."""
        while self.alive and self.report.state is not State.DRAINING:
            await self._news.wait()

    def retire(self) -> None:
        """Let it accept no more connections, and end when all its sessions have ended by themselves."""
        self.retired = True
        self._say(Order.RETIRE)

    def drain(self) -> None:
        """Let it finish what is under way, and go; it is killed if it does not."""
        if self.ended.is_set():
            return
        self.draining.set()
        if self.ready.is_set():
            self._say(Order.DRAIN)
        else:
            # It does not listen yet, and has no connections.
            self.send(signal.SIGTERM)

    def stop(self) -> None:
        """Let it go at once; it is killed if it does not."""
        if self.ended.is_set():
            return
        self.draining.set()
        self._hurried.set()
        if self.ready.is_set():
            self._say(Order.STOP)
        else:
            self.send(signal.SIGKILL)

    def reload(self, work: Work) -> None:
        """Let it serve something else. One that is just starting will do so when it has started."""
        self._work, self._told = work, False
        self._graces[work.generation] = work.grace
        self._tell_work()

    @property
    def reloading(self) -> bool:
        """It has neither taken over nor refused what it was told last."""
        return self.alive and max(self.report.generation, self.report.refused) < self._work.generation

    async def wait_reloaded(self) -> None:
        """Until that is so no more."""
        while self.reloading:
            await self._news.wait()

    def _tell_work(self) -> None:
        # Where there is no room, it is tried again whenever something is heard: one that is silent hangs, and is killed.
        try:
            with self._work.update.file() as file:
                self._told = bool(socket.send_fds(self._link, [Order.RELOAD.value], [file.fileno()]))
        except OSError as exc:
            log.debug("%s was not told to reload: %s", self, exc)

    def send(self, number: signal.Signals) -> None:
        """Send a signal. Never to another process: the number is ours until `attend` has reaped it."""
        self._process.send_signal(number)

    def _say(self, order: Order) -> None:
        try:
            self._link.send(order.value)
        except OSError as exc:
            # It does not read, so it hangs; or it has just ended.
            log.debug("%s was not told to %s: %s", self, order.name.lower(), exc)

    # Attending

    async def attend(self) -> None:
        """Hear it until it ends. It always does: where this is cancelled, it is killed."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen)
                nursery.start_soon(self._limit)
                self._status = await self._process.wait()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                if self._status is None:
                    self.send(signal.SIGKILL)
                    self._status = await self._process.wait()
            self._hear_the_rest()
            self._link.close()
            for event in (self.ended, self.settled, self.leaving, self._news):
                event.set()
            expected = (self.draining.is_set() or self.retired) and self._status == 0
            why = self._end() if self._failure is None else f"{self._end()}: {self._failure}"
            log.log(logging.INFO if expected else logging.WARNING, "%s has ended: %s", self, why)

    def _end(self) -> str:
        if self._status is not None and self._status < 0:
            try:
                return f"killed by {signal.Signals(-self._status).name}"
            except ValueError:
                return f"killed by signal {-self._status}"
        return f"exit status {self._status}"

    async def _listen(self) -> None:
        """Take what it says; kill it when that makes no sense, or when it has been silent for too long."""
        link, tick, silent = trio.socket.from_stdlib_socket(self._link), self._timing.heartbeat, 0.0
        hung_up = False
        while silent < self._patience:
            since = trio.current_time()
            with trio.move_on_after(tick) as waited:
                if hung_up:
                    await trio.sleep_forever()
                try:
                    data = await link.recv(LONGEST_REPORT)
                except OSError:
                    # It has ended without having read its orders.
                    data = b""
            # However long it was by the clock: see above.
            silent += min(trio.current_time() - since, 2 * tick)
            if waited.cancelled_caught:
                continue
            hung_up = not data
            try:
                self._hear(data)
            except ValueError as exc:
                await self._kill_where_it_stands(f"what it says makes no sense: {exc}")
                return
            if data and self.ready.is_set():
                silent = 0.0
        await self._kill_where_it_stands(f"{'silent' if self.ready.is_set() else 'not ready'} for {silent:.0f} s")

    @property
    def _patience(self) -> float:
        """Seconds that it may be silent; before it is ready, that it may be not."""
        return self._timing.heartbeat_timeout if self.ready.is_set() else self._timing.start

    def _hear(self, data: bytes) -> None:
        """Take reports.

        Raises:
          ValueError: these are none.
        """
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        for line in lines:
            self._take(Report.read(line))
        if len(self._inbox) > LONGEST_REPORT:
            raise ValueError("a line without an end")

    def _take(self, report: Report) -> None:
        changed = report.state is not self.report.state
        if report.refused != self.report.refused:
            log.error("%s keeps the configuration that it has: %s", self, report.refusal)
        self.report = report
        done = max(report.generation, report.refused)
        self._graces = {n: grace for n, grace in self._graces.items() if n == report.generation or n > done}
        if not self._told:
            self._tell_work()
        self._failure = report.failure
        if report.state is not State.STARTING and not self.ready.is_set():
            self._ready_since = trio.current_time()
            self.ready.set()
            self.settled.set()
        if report.state is State.DRAINING:
            self.draining.set()
        if self.draining.is_set() or self.outworn:
            self.leaving.set()
        self._news.set()
        self._news = trio.Event()
        if changed:
            self._changed()

    def _hear_the_rest(self) -> None:
        """What it has said just before it ended: its reason, mostly."""
        try:
            while data := self._link.recv(LONGEST_REPORT):
                self._hear(data)
        except OSError:
            # A child of its own may hold the link: there is no end of it.
            return
        except ValueError:
            # Cut off.
            return

    async def _kill_where_it_stands(self, why: str) -> None:
        """Kill it, and have it show where it stands before, if it can still do that."""
        self.hung = True
        self.settled.set()
        self._news.set()
        log.error("%s is killed: %s", self, why)
        if self.ready.is_set():
            self.send(signal.SIGQUIT)
            await trio.sleep(_LAST_WORDS)
        self.send(signal.SIGKILL)
        # Should even that not help (it waits for a disk that does not answer): there is another in its place.
        self.leaving.set()

    async def _limit(self) -> None:
        """Kill it when it does not go, though it was told to."""
        await self.draining.wait()
        with trio.move_on_after(max(self._graces.values(), default=self._work.grace) + self._timing.margin):
            await self._hurried.wait()
            await trio.sleep(self._timing.hurry)
        log.error("%s is killed: it was told to end, and did not", self)
        self.hung = True
        self.send(signal.SIGKILL)
