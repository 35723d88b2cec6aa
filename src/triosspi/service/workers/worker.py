"""A worker process of ``triosspi serve --workers``.

    python -P -m triosspi.service.workers.worker LINK PLAN

LINK and PLAN are descriptors that the supervisor has passed on: a stream socket, and a file with a `Plan`.
"""

from __future__ import annotations

import faulthandler
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

import trio

from ..._errors import ConfigurationError
from ..admission.tables import Tables
from ..program import unpickled
from .balance import BalancedListener, OwnLoad
from .worker_link import Plan, WorkerLink, signals_of_a_worker, take_descriptors

log = logging.getLogger("triosspi.server")


def main(arguments: Sequence[str]) -> int:
    """Run a worker; returns the exit status."""
    link_fd, plan_fd = map(int, arguments)
    plan = Plan.take(plan_fd)
    (sock,) = take_descriptors([link_fd])
    tables = Tables.of(*plan.tables)
    load = OwnLoad(tables.loads, plan.number)
    link = WorkerLink(
        sock,
        plan.update,
        heartbeat=plan.heartbeat,
        max_sessions=plan.max_sessions,
        alarm=plan.alarm,
        load=load,
    )
    link.tables = tables
    with suppress(RuntimeError, OSError, ValueError):
        # The supervisor asks for it before it kills a worker that hangs. Names of files and functions; no values.
        faulthandler.register(signal.SIGQUIT, all_threads=True, chain=False)
    try:
        with signals_of_a_worker(link):
            program = unpickled(plan.update.service)
            listeners = [BalancedListener(listener, load) for listener in take_descriptors(plan.listeners)]
            trio.run(program.serve, listeners, link)
    except ConfigurationError as exc:
        link.failed(str(exc))
        return 1
    except Exception:
        log.exception("the worker has failed")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
