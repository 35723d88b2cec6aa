"""The parent of ``triosspi serve --workers``: starts the worker processes, watches them, replaces and ends them."""

# What it must hold:
#
# * No connection waits in a dead worker's queue for ever: the listening sockets belong to this process, which accepts nothing,
#   and outlive every worker. A replacement finds what was queued.
# * No queued connection is reset when all of it stops. The kernel resets what is queued on a socket when its last descriptor
#   is closed, so one worker must be the last to have it, and know it. First it says that it will empty the queue; then the
#   others close theirs, and say so; then this process closes its own; and only then the last worker stops: it accepts what
#   is queued, and closes at once. Until then it serves as ever. If all workers were told to stop from outside (systemd
#   signals each process of a service), none may be left for that; if anything is queued then, another worker is started.
# * Everything ends. A worker that is told to go and does not is killed; whatever happens to this process's own tasks, the
#   last thing that they do is to kill and to reap. And where this process itself is killed, the workers see the end
#   of their link (see `worker_link`).
# * One request to stop is one, however many processes it reaches. systemd sends SIGTERM to all of a service at once; a
#   terminal's Ctrl-C would go to all of its group, so workers have a group of their own. Orders go over the link, where
#   the same one may be said twice; signals are for a worker that does not listen yet.

from __future__ import annotations

import logging
import math
import select
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Final

import trio

from ..._errors import ConfigurationError
from ..observe.notify import Notifier
from ..reasons import only_configuration_errors
from ..serving.reloading import Reading
from .pool import WorkerPool, tell
from .processes import Work, WorkerProcess

log = logging.getLogger("triosspi.server")

# Seconds within which a second signal is the first one's echo: timeout(1) sends its SIGTERM to the process and to its group.
_ECHO: Final = 0.2


class Supervisor:
    """Looks after a pool of workers, and after its end.

    Args:
      pool: the workers. Its sockets are this object's from now on, and closed when it stops.
      sole: nobody else has these sockets: who is queued on them in the end is to be told so by a worker.
      notifier: the service manager.
      reload: called in a thread, for each SIGHUP and when a file has changed; returns what the workers serve from then
          on, those that are there and those that start later. Where it raises, or hangs, that is logged, and all stays
          as it is. None: nothing can be read again.
      on_stop: called when it begins to stop, before the sockets are closed. It may fail: that is logged, and is all.
    """

    def __init__(
        self,
        pool: WorkerPool,
        *,
        sole: bool = False,
        notifier: Notifier | None = None,
        reload: Callable[[], Work] | None = None,
        on_stop: Callable[[], object] | None = None,
    ) -> None:
        pool.changed = self._tell_status
        self._pool = pool
        self._sole = sole
        self._notifier = notifier if notifier is not None else Notifier(None)
        self._reading = None if reload is None else Reading(reload)
        self._on_stop = on_stop
        self._serving = trio.CancelScope()
        self._handing_over = trio.CancelScope()
        self._stops = 0

    @property
    def workers(self) -> list[WorkerProcess]:
        """See `WorkerPool.workers`."""
        return self._pool.workers

    @property
    def well(self) -> bool:
        """A worker serves, or finishes, and none hangs: there is nothing for the service manager to do."""
        return any(worker.ready.is_set() for worker in self.workers) and all(worker.alive for worker in self.workers)

    @property
    def ready(self) -> bool:
        """New connections are served: a worker is ready, and there was no request to stop."""
        return not self._stops and any(worker.serving for worker in self.workers)

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
                async with trio.open_nursery() as nursery:
                    self._pool.nursery = nursery
                    nursery.start_soon(self._obey, signals)
                    if alongside is not None:
                        nursery.start_soon(alongside)
                    try:
                        with self._serving:
                            await self._serve(started)
                        await self._end()
                    except ConfigurationError as exc:
                        failure = exc
                    # With it the workers, if there are any left.
                    nursery.cancel_scope.cancel()
        finally:
            self._close()
            self._pool.close()
        if failure is not None:
            raise failure

    # Starting and replacing

    async def _serve(self, started: Callable[[], object] | None) -> None:
        """Start all, and keep all places filled, for ever."""
        first = await self._pool.start()
        log.info("all %d workers are ready", len(first))
        self._notifier.ready(self._pool.status())
        if started is not None:
            started()
        async with trio.open_nursery() as nursery:
            for worker in first:
                nursery.start_soon(self._pool.keep, worker)
            if (reading := self._reading) is not None:
                nursery.start_soon(self._reload_when_asked, reading)
                nursery.start_soon(reading.watch, lambda: self._pool.work.files)
            nursery.start_soon(self._notifier.keep_alive, lambda: self.well)

    # Telling

    def _tell_status(self) -> None:
        self._notifier.status(self._pool.status())

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
        for worker in self.workers:
            if self._stops == 2:
                worker.stop()
            else:
                worker.send(signal.SIGKILL)

    async def _end(self) -> None:
        """Let all workers finish, and wait for it."""
        self._notifier.stopping()
        tell(self._on_stop)
        if self._sole and self.workers:
            self._handing_over.deadline = trio.current_time() + self._pool.timing.hand_over
            with self._handing_over:
                await self._hand_over()
            if self._handing_over.cancelled_caught:
                log.warning(
                    "no worker had the listening sockets alone in time: connections that are queued on them may be reset"
                )
        # No new connection from now on: where the workers have closed theirs too, connecting is refused.
        self._close()
        workers = self.workers
        for worker in workers:
            worker.drain()
        for worker in workers:
            await worker.ended.wait()

    async def _hand_over(self) -> None:
        """Have the sockets with one worker and with this process alone; or with none, where nothing is queued on them."""
        while True:
            last = await self._find_last()
            others = [worker for worker in self.workers if worker is not last]
            for worker in others:
                worker.drain()
            with trio.move_on_after(self._pool.timing.closing):
                for worker in others:
                    await worker.wait_closed()
            # A worker that was told to stop from outside meanwhile has emptied the queue, but more may have come since.
            if (last is not None and last.serving) or not self._waited_on():
                return

    async def _find_last(self) -> WorkerProcess | None:
        """A worker that will empty the sockets; None: there is none, and nothing is queued."""
        for worker in self.workers:
            if worker.serving and await worker.make_last():
                return worker
        while self._waited_on():
            starting = (w for w in self.workers if not (w.settled.is_set() or w.draining.is_set()))
            try:
                worker = next(starting, None) or await self._pool.launch(1)
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
        for sock in self._pool.sockets:
            poll.register(sock.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def _close(self) -> None:
        for sock in self._pool.sockets:
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
                self._pool.work = replace(work, generation=self._pool.work.generation + 1)
                await self._pool.reload()
            self._notifier.ready(self._pool.status())
