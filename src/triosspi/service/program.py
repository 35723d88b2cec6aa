"""What ``triosspi serve`` runs: one server, or a supervisor of several."""

from __future__ import annotations

import gc
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec
import trio

from .._errors import ConfigurationError
from ..session import Tracer
from ..tcp import AnyHandler, TCPEndpoint, format_address
from .apps import Greet
from .config.assembly import DemoAccount, choose_app, make_acceptor, make_impersonation
from .config.configuration import Configuration, Sources
from .config.fitting import UNPROXIED, fitted, misfits
from .config.options import OptionError
from .config.settings import Connections, Limits, Listen, LiveSettings, Settings, StartSettings, only_by_restart
from .network.listening import close_listeners, open_listeners, remove_socket_files
from .network.unix_sockets import UNIX
from .observe.logs import configure as configure_logs
from .observe.metrics import Metrics, worker_metrics
from .observe.notify import Notifier
from .observe.status import Health, StatusServer
from .observe.telemetry import Telemetry
from .observe.worker_files import WorkerMetrics
from .reasons import only_configuration_errors
from .serving.server import BEAT, Loaded, Server
from .transcript import Transcript
from .workers.pool import WorkerPool
from .workers.processes import Timing, Work
from .workers.supervisor import Supervisor
from .workers.worker_link import WorkerLink

log = logging.getLogger("triosspi.server")

_KEYTAB_FILE: Final = "FILE:"

#: Called when the server serves, with its listeners.
Started = Callable[[list[trio.SocketListener]], None]


@dataclass(frozen=True, kw_only=True)
class Program:
    """What is run.

    Attributes:
      start: what it is started with, for good.
      sources: what the rest is read from again at each reload.
      demo: who may log in by NTLM where the configuration names nobody.
      descriptors: how many files each process may open; None: as many as it likes.
    """

    start: StartSettings
    sources: Sources
    demo: DemoAccount | None = None
    descriptors: int | None = None

    def tell_misfits(self, settings: Settings) -> None:
        """Log what of the settings does not fit."""
        for misfit in misfits(settings, self.descriptors):
            log.warning("%s", misfit)

    def make(self, configuration: Configuration, *, share: int = 1) -> Loaded:
        """Make of a configuration that was read what is needed to serve with it.

        Args:
          configuration: of which only the live part is looked at.
          share: of so many processes this is one, and may take that part of what all connections together may.

        Raises:
          OptionError: two options do not go together.
          ConfigurationError: a file that it names is wrong.
        """
        return only_configuration_errors("what the configuration names", self._make, configuration, share)

    def _make(self, configuration: Configuration, share: int) -> Loaded:
        live = configuration.settings.live
        return Loaded(
            live=msgspec.structs.replace(live, limits=fitted(_part(live.limits, share), self.descriptors)),
            acceptor=make_acceptor(live.accept, None if self.demo is None else self.demo.table()),
            impersonation=make_impersonation(self.start.impersonation, live.local_accounts),
            files=_files(live, self.sources),
        )

    def make_again(self, configuration: Configuration, *, share: int = 1) -> Loaded:
        """The same where nobody else explains what is wrong.

        Raises:
          ConfigurationError: something in it is, or in a file that it names.
        """
        try:
            return self.make(configuration, share=share)
        except OptionError as exc:
            raise ConfigurationError(configuration.explain(exc)) from None

    def read_again(self) -> Configuration:
        """Read the configuration; say what of it only a restart would bring.

        Raises:
          ConfigurationError: something in it is wrong.
        """
        configuration = self.sources.load()
        if names := only_by_restart(self.start, configuration.settings.start):
            log.warning("a restart is needed for what has changed in %s", ", ".join(names))
        self.tell_misfits(configuration.settings)
        return configuration

    def reload(self) -> Loaded:
        """See `Server`."""
        return self.make_again(self.read_again())

    async def serve(
        self,
        loaded: Loaded,
        started: Started,
        *,
        once: bool = False,
        make_tracer: Callable[[], Tracer] | None = None,
    ) -> bool:
        """Serve in this process; see `Server.run`."""
        handler = choose_app(self.start)
        sole = _has_sockets_alone()
        listeners = await open_listeners(self.start.listen)
        _tell_unproxied(self.start.listen, loaded.live.connections, listeners)
        try:
            health = Health()
            address = self.start.metrics.metrics
            metrics = None if address is None else Metrics()
            with ExitStack() as stack:
                if address is not None and metrics is not None:
                    _show_status(stack, StatusServer(address, health, metrics.exposition))
                telemetry = Telemetry(metrics, health=health)
                stack.callback(telemetry.close)
                server = Server(
                    self.start,
                    loaded,
                    listeners,
                    handler=_announce(handler) if make_tracer is not None else handler,
                    telemetry=telemetry,
                    notifier=Notifier.from_environment(),
                    make_tracer=make_tracer,
                    sole=sole,
                    once=once,
                    reload=self.reload,
                )
                _settle()
                return await server.run(partial(started, listeners))
        finally:
            with trio.CancelScope(shield=True):
                await close_listeners(listeners)

    async def supervise(self, configuration: Configuration, started: Started) -> None:
        """Serve in worker processes, see `Supervisor`."""
        workers = self.start.workers
        sole = _has_sockets_alone()
        listeners = await open_listeners(self.start.listen)
        _tell_unproxied(self.start.listen, configuration.settings.live.connections, listeners)
        try:
            with ExitStack() as stack:
                health = Health()
                metrics: WorkerMetrics | None = None
                if self.start.metrics.metrics is not None:
                    metrics = stack.enter_context(WorkerMetrics())
                    _show_status(stack, StatusServer(self.start.metrics.metrics, health, metrics.exposition))
                    # Workers count in files, which has to be known to them when they start.
                    os.environ.update(metrics.environment)
                pool = WorkerPool(
                    sockets=[listener.socket for listener in listeners],
                    work=self.work(configuration),
                    number=workers.workers,
                    timing=Timing(heartbeat_timeout=workers.heartbeat_timeout),
                    max_sessions=workers.max_sessions,
                    on_start=None if metrics is None else metrics.restore,
                    on_end=None if metrics is None else metrics.worker_died,
                )
                supervisor = Supervisor(
                    pool,
                    sole=sole,
                    notifier=Notifier.from_environment(),
                    reload=self.reload_for_workers,
                    on_stop=partial(remove_socket_files, listeners),
                )
                await supervisor.run(partial(started, listeners), partial(_show_health, supervisor, health))
        finally:
            with trio.CancelScope(shield=True):
                await close_listeners(listeners)

    def work(self, configuration: Configuration) -> Work:
        """What a supervisor has its workers serve by this configuration."""
        live = configuration.settings.live
        return Work(
            service=pickle.dumps(WorkerProgram(program=self, configuration=configuration)),
            grace=live.stopping.grace,
            files=_files(live, self.sources),
            taken_over=partial(configure_logs, live.log.log_level, live.log.log_format),
        )

    def reload_for_workers(self) -> Work:
        """See `Supervisor`."""
        configuration = self.read_again()
        # A broken one is refused here, once, before any of them is told.
        self.make_again(configuration)
        return self.work(configuration)


@dataclass(frozen=True, kw_only=True)
class WorkerProgram:
    """What a worker runs. The supervisor pickles it, at the start and at each reload.

    It has the settings themselves: a worker that read the file would have what is there at that moment, which need not be
    what the others have, nor be right.

    Attributes:
      program: what is run.
      configuration: what the supervisor has read.
    """

    program: Program
    configuration: Configuration

    def load(self) -> Loaded:
        """Make of the settings what is needed; the files that they name are read here.

        Raises:
          ConfigurationError: one of those is wrong.
        """
        return self.program.make_again(self.configuration, share=self.program.start.workers.workers)

    async def serve(self, listeners: Sequence[trio.abc.Listener[trio.SocketStream]], link: WorkerLink) -> None:
        """Serve in this process as one of a supervisor's workers."""
        start, loaded = self.program.start, self.load()
        configure_logs(loaded.live.log.log_level, loaded.live.log.log_format)
        telemetry = Telemetry(None if start.metrics.metrics is None else worker_metrics())
        server = Server(
            start,
            loaded,
            listeners,
            handler=choose_app(start),
            telemetry=telemetry,
            # The service manager hears the supervisor.
            notifier=Notifier(None),
            reload=lambda: unpickled(link.newest.service).load(),
            link=link,
        )
        _settle()
        try:
            await server.run(lambda: None)
        finally:
            telemetry.close()


def unpickled(service: bytes) -> WorkerProgram:
    """What a worker is to run."""
    program = pickle.loads(service)  # noqa: S301 - the supervisor's word, by a descriptor of its own
    assert isinstance(program, WorkerProgram)
    return program


def _has_sockets_alone() -> bool:
    """Whether no other process will have our listening sockets: to be asked before they are opened."""
    # systemd has those that it gives us open too, and gives what is queued to whom it starts next. Variables that are
    # another process's (a script that has started us) are of no account.
    return "LISTEN_FDS" not in os.environ or os.environ.get("LISTEN_PID") != str(os.getpid())


def _settle() -> None:
    """Tell the garbage collector that what there is now will stay.

    It would look through all of it, the modules and what they have made, again and again: some 30 ms each time,
    in which nobody is served. What connections leave behind is found as before.
    """
    gc.collect()
    gc.freeze()


def _tell_unproxied(listen: Listen, connections: Connections, listeners: Sequence[trio.SocketListener]) -> None:
    """Of sockets that systemd has opened, what `misfits` cannot know."""
    given = not listen.unix and all(listener.socket.family == UNIX for listener in listeners)
    if given and connections.proxy_from and not connections.proxy_unix:
        log.warning("%s", UNPROXIED)


def _show_status(stack: ExitStack, server: StatusServer) -> None:
    stack.enter_context(server)
    log.info("metrics and health on http://%s", format_address(*server.address))


async def _show_health(supervisor: Supervisor, health: Health) -> NoReturn:
    while True:
        if supervisor.well:
            health.heartbeat()
        health.set_ready(supervisor.ready)
        await trio.sleep(BEAT)


def _part(limits: Limits, share: int) -> Limits:
    """The caps on all connections, for one of so many processes.

    What is counted by source is not divided: all of them count it together, see `admission.tables`.
    """
    return msgspec.structs.replace(
        limits,
        max_connections=-(-limits.max_connections // share),
        max_unauthenticated=-(-limits.max_unauthenticated // share),
        max_waiting=-(-limits.max_waiting // share),
    )


def _files(live: LiveSettings, sources: Sources) -> tuple[Path, ...]:
    """What to watch: what the configuration comes from and is about, but for the accounts, which are looked at anyway."""
    if not live.reload.watch_files:
        return ()
    found = [] if sources.file is None else [sources.file]
    if live.local_accounts.account_map is not None:
        found.append(live.local_accounts.account_map)
    keytab = live.accept.keytab
    if keytab is not None and (keytab.startswith(_KEYTAB_FILE) or ":" not in keytab):
        found.append(Path(keytab.removeprefix(_KEYTAB_FILE)))
    return tuple(found)


def _announce(handler: AnyHandler) -> AnyHandler:
    """The same, with the sample's lines for each login."""
    # As the sample does, which asks for the client's name while it is the client.
    name = not (isinstance(handler, Greet) and handler.impersonates)

    async def announced(channel: TCPEndpoint) -> Any:
        if isinstance(channel.tracer, Transcript):
            channel.tracer.authenticated(channel, name=name)
        return await handler(channel)

    return announced
