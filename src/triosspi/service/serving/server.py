"""A server's life: accepting, watching, reloading, stopping."""

# Stopping is the delicate part. Each client gets either its reply or a goodbye, from which it knows that its request was
# not looked at and may be sent elsewhere. So on SIGTERM:
#
# * the listening sockets are closed. Where another process holds them too (systemd, the supervisor, a successor), it gets
#   what is queued on them; where none does, which a worker is told by its supervisor, the queue is accepted before;
# * logins under way go on, and are followed by the goodbye;
# * no handler receives any more: those that wait for a request end at once, those that work on one answer it first
#   (`SSPIChannel.stop_receiving`). Then each channel is closed as always: goodbye, FIN, and the peer's last bytes read, or
#   the kernel would send RST and destroy the reply;
# * what has not ended when the grace is over is cancelled. So is everything on a second signal.

from __future__ import annotations

import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from ..._errors import ConfigurationError
from ...channel import Impersonator
from ...security.credentials import Acceptor
from ...session import Tracer
from ...tcp import Handler, accept_forever
from ..admission.admission import Admission
from ..config.settings import LiveSettings, StartSettings
from ..network.listening import queued, remove_socket_files
from ..network.proxy_protocol import ProxyProtocol
from ..observe.logs import configure as configure_logs
from ..observe.notify import Notifier
from ..observe.telemetry import Telemetry
from ..reasons import only_configuration_errors
from ..workers.balance import BalancedListener
from ..workers.worker_link import WorkerLink
from .connection import Service
from .lifecycle import shutting_down
from .reloading import Reading
from .sessions import Sessions
from .wires import Wires

log = logging.getLogger("triosspi.server")

#: Seconds between two measurements of how late the event loop runs, which are also this process's heartbeat.
BEAT: Final = 1.0

_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
# Windows has none.
_RELOAD_SIGNAL: Final = getattr(signal, "SIGHUP", None)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a running server takes over, and what was made of it.

    Attributes:
      live: the settings.
      acceptor: what clients authenticate with.
      impersonation: see `SSPIChannel`.
      files: a change of these is a reason to reload.
    """

    live: LiveSettings
    acceptor: Acceptor
    impersonation: Impersonator | None = None
    files: tuple[Path, ...] = ()


class Server:
    """One process's connections, its signals and its watches.

    Args:
      start: what only a restart can change.
      loaded: the rest that it serves with, until it reloads.
      listeners: bound already; they are closed when the server stops.
      handler: the application.
      telemetry: is told of everything.
      notifier: tells the service manager.
      make_tracer: makes the tracer of each connection.
      sole: no other process has these listeners: what is queued on them when the server stops is accepted and told here.
      once: stop after the first connection.
      reload: reads the configuration again, in a thread; None where that makes no sense.
      link: tells the supervisor, where this process is a worker.
    """

    def __init__(
        self,
        start: StartSettings,
        loaded: Loaded,
        listeners: Sequence[trio.abc.Listener[trio.SocketStream]],
        *,
        handler: Handler,
        telemetry: Telemetry,
        notifier: Notifier,
        make_tracer: Callable[[], Tracer] | None = None,
        sole: bool = False,
        once: bool = False,
        reload: Callable[[], Loaded] | None = None,
        link: WorkerLink | None = None,
    ) -> None:
        self._loaded = loaded
        self._listeners = listeners
        self._telemetry = telemetry
        self._notifier = notifier
        self._sole = sole
        self._once = once
        self._reading = None if reload is None else Reading(reload)
        self._link = link
        self._stopping = self._retired = False
        # With `once`: whether the first connection's login has succeeded; None until it has come.
        self._served: bool | None = None
        self._accepting = trio.CancelScope()
        live = loaded.live
        sessions = Sessions(lambda: self._service.limits, telemetry.traffic)
        self._service = Service(
            handler=handler,
            acceptor=loaded.acceptor,
            wires=Wires.of(start.serve, loaded.impersonation),
            limits=live.limits,
            keepalive=live.connections.keepalive,
            proxies=ProxyProtocol(live.connections.proxy_from, unix=live.connections.proxy_unix),
            admission=Admission(live.limits, clock=time.monotonic, tables=None if link is None else link.tables),
            sessions=sessions,
            telemetry=telemetry,
            make_tracer=make_tracer,
            logged_in=None if link is None else link.session_started,
        )

    async def run(self, started: Callable[[], None]) -> bool:
        """Serve until told to stop, and all sessions have ended or the grace is over.

        Args:
          started: called when signals are obeyed and connections accepted.

        Returns:
          Where only one connection was to be served, whether its login succeeded; else True.
        """
        signals = [*_STOP_SIGNALS, *([_RELOAD_SIGNAL] if _RELOAD_SIGNAL is not None else [])]
        with trio.open_signal_receiver(*signals) as received:
            async with trio.open_nursery() as self._watches:
                self._watches.start_soon(self._obey, received)
                self._watches.start_soon(self._service.sessions.watch, self._watches)
                self._watches.start_soon(self._service.keep_turns)
                self._watches.start_soon(self._keep_beating)
                if self._reading is not None:
                    self._watches.start_soon(self._reload_when_asked, self._reading)
                    self._watches.start_soon(self._reading.watch, self._watched_files)
                self._watches.start_soon(self._notifier.keep_alive)
                if self._link is not None:
                    self._link.on_parent_gone = self._link.on_stop = self.stop
                    self._link.on_last = self._become_sole
                    self._link.on_retire = self.retire
                    self._link.on_reload = partial(self.ask_to_reload, "the supervisor")
                    self._link.count_connections(self._count_connections)
                    self._watches.start_soon(self._link.run)
                async with trio.open_nursery() as self._connections:
                    self._connections.start_soon(self._accept, started)
                self._watches.cancel_scope.cancel()
        return self._served is not False

    # Accepting

    async def _accept(self, started: Callable[[], None]) -> None:
        serve = self._serve_one if self._once else self._service.serve
        with self._accepting:
            async with trio.open_nursery() as nursery:
                for listener in self._listeners:
                    nursery.start_soon(self._accept_from, listener, serve)
                # Only now: a service manager that learns of it may send a signal at once.
                self._telemetry.ready(True)
                self._notifier.ready()
                if self._link is not None:
                    self._link.ready()
                started()

    async def _accept_from(
        self,
        listener: trio.abc.Listener[trio.SocketStream],
        serve: Callable[[trio.SocketStream], Awaitable[object]],
    ) -> None:
        try:
            await accept_forever(listener, self._connections, serve, self._telemetry.accept_error)
        except trio.ClosedResourceError:
            # By `stop`, just before it was to accept.
            if not (self._stopping or self._retired):
                raise

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        if self._served is not None:
            # Accepted beside the first one, by another listener.
            await trio.aclose_forcefully(stream)
            return
        self._served = False
        self._accepting.cancel()
        self._served = await self._service.serve(stream)

    # Watching

    async def _keep_beating(self) -> None:
        while True:
            due = trio.current_time() + BEAT
            await trio.sleep_until(due)
            self._telemetry.loop_latency(trio.current_time() - due)
            admission = self._service.admission
            self._telemetry.connections(admission.pending, admission.established)

    def _count_connections(self) -> int:
        return self._service.admission.pending + self._service.admission.established

    def _watched_files(self) -> tuple[Path, ...]:
        # With a supervisor, the supervisor watches; else each worker might read a different configuration.
        return self._loaded.files if self._link is None else ()

    async def _obey(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            if number == _RELOAD_SIGNAL:
                self.ask_to_reload("SIGHUP")
            elif self._link is None or not self._stopping:
                # A worker may hear the same request from its supervisor and from systemd, in either order; when it is to
                # be at once, the supervisor says so.
                log.info("%s: stopping%s", signal.Signals(number).name, " at once" if self._stopping else "")
                self.stop()

    # Reloading

    def ask_to_reload(self, why: str) -> None:
        """Have the configuration read again; a broken one changes nothing. Connections notice nothing of it."""
        if self._reading is None:
            log.warning("%s: there is no configuration to read again", why)
        else:
            self._reading.ask(why)

    async def _reload_when_asked(self, reading: Reading[Loaded]) -> None:
        # A task of its own: while it waits for a disk, signals are obeyed.
        while True:
            await reading.asked()
            await self.reload()

    async def reload(self) -> None:
        """Read the configuration again, if there is one to read; see `ask_to_reload`."""
        if self._reading is None:
            return
        self._notifier.reloading()
        # Another may come while this one is read.
        generation = None if self._link is None else self._link.newest.generation
        problem: str | None = None
        try:
            loaded = await self._reading.read()
            only_configuration_errors("the configuration", self._apply, loaded)
        except ConfigurationError as exc:
            problem = str(exc)
            log.error("the configuration stays as it was: %s", exc)  # noqa: TRY400 - a clear one-line error
        else:
            log.info("the configuration was read again")
        if not self._stopping:
            self._notifier.ready()
        if self._link is not None and generation is not None:
            self._link.reloaded(generation, problem)

    def _apply(self, loaded: Loaded) -> None:
        service, live = self._service, loaded.live
        # What may fail comes first: all of it is taken over, or nothing.
        proxies = ProxyProtocol(live.connections.proxy_from, unix=live.connections.proxy_unix)
        configure_logs(live.log.log_level, live.log.log_format)
        service.acceptor = loaded.acceptor
        service.wires = service.wires.impersonating(loaded.impersonation)
        service.limits = live.limits
        service.admission.reconfigure(live.limits)
        service.keepalive = live.connections.keepalive
        service.proxies = proxies
        self._loaded = loaded

    # Stopping

    def retire(self) -> None:
        """Accept no more connections, and end when all sessions have ended by themselves. `stop` ends it sooner."""
        if self._stopping or self._retired:
            return
        log.info("no more connections are accepted: those that are there may finish")
        self._retired = True
        self._telemetry.ready(False)
        self._accepting.cancel()
        self._close_listeners()
        if self._link is not None:
            self._link.retired()

    def stop(self) -> None:
        """Stop; when called again, at once."""
        if self._stopping:
            self._connections.cancel_scope.cancel()
            return
        self._stopping = True
        shutting_down().set()
        self._telemetry.ready(False)
        self._notifier.stopping()
        # While they are open: a server that starts next finds either a socket that answers, or none.
        remove_socket_files(self._listeners)
        self._service.stop()
        self._accepting.cancel()
        if not self._retired:
            self._close_listeners()
        if self._link is not None:
            # Not before: the supervisor takes it for true that they are closed.
            self._link.draining()
        self._watches.start_soon(self._cancel_after_grace)

    def _become_sole(self) -> None:
        self._sole = True

    def _close_listeners(self) -> None:
        # The kernel resets what is queued on a listening socket when its last descriptor is closed. To those clients the
        # connection is open, and their first token sent.
        for listener in self._listeners:
            if isinstance(listener, (trio.SocketListener, BalancedListener)):
                if self._sole:
                    for stream in queued(listener):
                        self._connections.start_soon(self._service.serve, stream)
                # Now, and not when the task that accepts gets its turn: connections that come in between would be reset.
                (listener if isinstance(listener, BalancedListener) else listener.socket).close()

    async def _cancel_after_grace(self) -> None:
        grace = self._loaded.live.stopping.grace
        await trio.sleep(grace)
        log.warning("%d sessions have not ended within %g s: cancelled", len(self._service.sessions), grace)
        self._connections.cancel_scope.cancel()
