"""What ``triosspi serve`` runs: one server, or a supervisor of several."""

from __future__ import annotations

import gc
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec
import trio

from .._errors import ConfigurationError
from .._session import Tracer
from .._tcp import Handler, TCPChannel, format_address
from .apps import Greet
from .config.assembly import choose_app, make_acceptor, make_impersonation
from .config.configuration import Configuration, Sources
from .config.fitting import UNPROXIED, fitted, misfits
from .config.options import OptionError
from .config.settings import Limits, Settings
from .demo import DemoAccount
from .network.listening import close_listeners, open_listeners, remove_socket_files, reuse_port_sockets
from .network.unix_sockets import UNIX
from .observe.logs import configure as configure_logs
from .observe.metrics import Metrics, WorkerMetrics
from .observe.notify import Notifier
from .observe.status import Health, StatusServer
from .observe.telemetry import Telemetry
from .reasons import only_configuration_errors
from .server import BEAT, Loaded, Server
from .transcript import Transcript
from .workers.processes import Timing
from .workers.supervisor import Supervisor
from .workers.worker_link import WorkerLink

log = logging.getLogger("triosspi.server")

_KEYTAB_FILE: Final = "FILE:"

#: Called when the server serves, with its listeners.
Started = Callable[[list[trio.SocketListener]], None]


@dataclass(frozen=True, kw_only=True)
class Program:
    """What is run. The supervisor pickles it for its workers.

    Attributes:
      sources: what the configuration is read from, at the start and at each reload.
      demo: who may log in by NTLM where the configuration names nobody.
      share: of so many processes this is one, and may take that part of what all connections together may.
      descriptors: how many files each process may open; None: as many as it likes.
    """

    sources: Sources
    demo: DemoAccount | None = None
    share: int = 1
    descriptors: int | None = None

    def load(self, *, tell: bool = False) -> Loaded:
        """Read the configuration, and make of it what is needed.

        Args:
          tell: log what of it does not fit.

        Raises:
          ConfigurationError: something in it is wrong, or a file that it names.
        """
        configuration = self.sources.load()
        try:
            loaded = self.make(configuration)
        except OptionError as exc:
            raise ConfigurationError(configuration.explain(exc)) from None
        if tell:
            self.tell_misfits(configuration.settings)
        return loaded

    def tell_misfits(self, settings: Settings) -> None:
        """Log what of the settings does not fit."""
        for misfit in misfits(settings, self.descriptors):
            log.warning("%s", misfit)

    def make(self, configuration: Configuration) -> Loaded:
        """The same of a configuration that was read already.

        Raises:
          OptionError: two options do not go together.
          ConfigurationError: a file that it names is wrong.
        """
        return only_configuration_errors("what the configuration names", self._make, configuration)

    def _make(self, configuration: Configuration) -> Loaded:
        settings = configuration.settings
        return Loaded(
            settings=msgspec.structs.replace(
                settings, limits=fitted(_part(settings.limits, self.share), self.descriptors)
            ),
            acceptor=make_acceptor(settings.accept, None if self.demo is None else self.demo.table()),
            impersonation=make_impersonation(settings.impersonation),
            files=tuple(_files(settings, self.sources)),
        )

    async def serve(
        self,
        loaded: Loaded,
        started: Started,
        *,
        once: bool = False,
        make_tracer: Callable[[], Tracer] | None = None,
    ) -> bool:
        """Serve in this process; see `Server.run`."""
        settings = loaded.settings
        handler = choose_app(settings)
        # systemd has its sockets open too, and gives what is queued to whom it starts next.
        sole = "LISTEN_FDS" not in os.environ
        listeners = await open_listeners(settings.listen)
        _tell_unproxied(settings, listeners)
        try:
            health = Health()
            metrics = None if settings.metrics.metrics is None else Metrics()
            with ExitStack() as stack:
                if settings.metrics.metrics is not None and metrics is not None:
                    _show_status(stack, StatusServer(settings.metrics.metrics, health, metrics.exposition))
                telemetry = Telemetry(metrics, health=health)
                stack.callback(telemetry.close)
                server = Server(
                    loaded,
                    listeners,
                    handler=_announce(handler) if make_tracer is not None else handler,
                    telemetry=telemetry,
                    notifier=Notifier.from_environment(),
                    make_tracer=make_tracer,
                    sole=sole,
                    once=once,
                    reload=partial(self.load, tell=True),
                )
                _settle()
                return await server.run(partial(started, listeners))
        finally:
            with trio.CancelScope(shield=True):
                await close_listeners(listeners)

    async def serve_as_worker(
        self, listeners: Sequence[trio.abc.Listener[trio.SocketStream]], link: WorkerLink
    ) -> None:
        """Serve in this process as one of a supervisor's workers."""
        loaded = self.load()
        configure_logs(loaded.settings.log.log_level, loaded.settings.log.log_format)
        telemetry = Telemetry(None if loaded.settings.metrics.metrics is None else Metrics(worker=True))
        server = Server(
            loaded,
            listeners,
            handler=choose_app(loaded.settings),
            telemetry=telemetry,
            # The service manager hears the supervisor.
            notifier=Notifier(None),
            reload=self.load,
            link=link,
        )
        _settle()
        try:
            await server.run(lambda: None)
        finally:
            telemetry.close()

    async def supervise(self, settings: Settings, started: Started) -> None:
        """Serve in worker processes, see `Supervisor`."""
        workers = settings.workers
        crew = replace(self, share=workers.workers)
        if workers.reuse_port:
            places = await reuse_port_sockets(settings.listen, workers.workers)
        else:
            places = [await open_listeners(settings.listen)] * workers.workers
        listeners = list(dict.fromkeys(listener for place in places for listener in place))
        _tell_unproxied(settings, listeners)
        try:
            with ExitStack() as stack:
                health = Health()
                metrics: WorkerMetrics | None = None
                if settings.metrics.metrics is not None:
                    metrics = stack.enter_context(WorkerMetrics())
                    _show_status(stack, StatusServer(settings.metrics.metrics, health, metrics.exposition))
                    # Workers count in files, which has to be known to them when they start.
                    os.environ.update(metrics.environment)
                supervisor = Supervisor(
                    [[listener.socket for listener in place] for place in places],
                    pickle.dumps(crew),
                    timing=Timing(grace=workers.grace, heartbeat_timeout=workers.heartbeat_timeout),
                    max_sessions=workers.max_sessions,
                    notifier=Notifier.from_environment(),
                    reload=crew.reload_for_workers,
                    on_stop=partial(remove_socket_files, listeners),
                    on_end=None if metrics is None else metrics.worker_died,
                )
                await supervisor.run(partial(started, listeners), partial(_show_health, supervisor, health))
        finally:
            with trio.CancelScope(shield=True):
                await close_listeners(listeners)

    def reload_for_workers(self) -> bytes:
        """See `Supervisor`."""
        # They read it themselves; a broken one is refused here, once, before any of them is told.
        self.load(tell=True)
        return pickle.dumps(self)


def _settle() -> None:
    """Tell the garbage collector that what there is now will stay.

    It would look through all of it, the modules and what they have made, again and again: some 30 ms each time,
    in which nobody is served. What connections leave behind is found as before.
    """
    gc.collect()
    gc.freeze()


def _tell_unproxied(settings: Settings, listeners: Sequence[trio.SocketListener]) -> None:
    """Of sockets that systemd has opened, what `misfits` cannot know."""
    listen = settings.listen
    given = not listen.unix and all(listener.socket.family == UNIX for listener in listeners)
    if given and listen.proxy_from and not listen.proxy_unix:
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

    What is counted by source is not divided: nobody knows to which process a source's next connection goes.
    """
    startups = limits.max_unauthenticated
    return msgspec.structs.replace(
        limits,
        max_connections=-(-limits.max_connections // share),
        max_unauthenticated=replace(startups, start=-(-startups.start // share), full=-(-startups.full // share)),
    )


def _files(settings: Settings, sources: Sources) -> list[Path]:
    """What the configuration comes from and is about, but for the accounts, which are looked at anyway."""
    found = [] if sources.file is None else [sources.file]
    if settings.impersonation.account_map is not None:
        found.append(settings.impersonation.account_map)
    keytab = settings.accept.keytab
    if keytab is not None and (keytab.startswith(_KEYTAB_FILE) or ":" not in keytab):
        found.append(Path(keytab.removeprefix(_KEYTAB_FILE)))
    return found


def _announce(handler: Handler) -> Handler:
    """The same, with the sample's lines for each login."""
    # As the sample does, which asks for the client's name while it is the client.
    name = not (isinstance(handler, Greet) and handler.impersonates)

    async def announced(channel: TCPChannel) -> Any:
        if isinstance(channel.tracer, Transcript):
            channel.tracer.authenticated(channel, name=name)
        return await handler(channel)

    return announced
