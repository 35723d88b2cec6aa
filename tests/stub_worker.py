"""Worker programs that do what workers should not, and a supervisor of them: processes for test_supervisor.

python stub_worker.py LINK PLAN              a worker; the plan's service is a JSON object, `Stub`
python stub_worker.py supervise NUMBER STUB  a supervisor of such workers on a port of its own
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import trio

from triosspi import ConfigurationError
from triosspi.service.workers.pool import WorkerPool
from triosspi.service.workers.processes import Timing, Work, spawn
from triosspi.service.workers.supervisor import Supervisor
from triosspi.service.workers.worker_link import Plan, WorkerLink, signals_of_a_worker, take_descriptors

COMMAND = (sys.executable, __file__)


@dataclass
class Stub:
    """What a worker does.

    Attributes:
      folder: where it tells what happens: a file ``said``, a line each.
      first: what the first worker does, ``mode`` what those after it do: "serve", "crash", "hang", "deaf" (ignores
          whatever it is told), "fail", "leave" (without a word), "never ready".
      mode: see ``first``.
      secret: must not be seen anywhere.
    """

    folder: str
    first: str = "serve"
    mode: str = "serve"
    secret: str = ""

    def encode(self) -> bytes:
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)}).encode()

    def said(self) -> list[str]:
        """All that was told so far."""
        path = Path(self.folder, "said")
        return path.read_text().splitlines() if path.exists() else []

    def say(self, *words: object) -> None:
        # One write: several processes do.
        with Path(self.folder, "said").open("ab", buffering=0) as file:
            file.write((" ".join(map(str, (os.getpid(), *words))) + "\n").encode())

    def my_mode(self) -> str:
        """``first`` for the first that asks, ``mode`` for the others."""
        try:
            Path(self.folder, "first").touch(exist_ok=False)
        except FileExistsError:
            return self.mode
        return self.first


async def work(stub: Stub, mode: str, plan: Plan, link: WorkerLink) -> None:
    """Answer every connection with this process's number."""
    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in take_descriptors(plan.listeners)]

    async def answer(stream: trio.SocketStream) -> None:
        link.session_started()
        async with stream:
            await stream.send_all(b"%d\n" % os.getpid())
            if mode == "hang":
                stub.say("hangs")
                while True:
                    pass
            if mode == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)

    told = 0

    def stop(why: str) -> None:
        nonlocal told
        stub.say("told to stop by", why)
        if mode == "deaf":
            return
        # Whoever says it, and however often: it is one request.
        if not told:
            told = 1
            link.draining()
            serving.cancel()

    def stop_at_once() -> None:
        nonlocal told
        told = 2

    async def take_signals() -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for number in signals:
                if number == signal.SIGHUP:
                    stub.say("reloaded")
                    link.reloaded(link.newest.generation)
                else:
                    stop(signal.Signals(number).name)

    async with trio.open_nursery() as nursery:
        link.on_parent_gone = partial(stop, "the supervisor")
        link.on_stop = stop_at_once
        nursery.start_soon(take_signals)
        nursery.start_soon(link.run)
        async with trio.open_nursery() as connections:
            with trio.CancelScope() as serving:
                async with trio.open_nursery() as accepting:
                    for listener in listeners:
                        serve = partial(trio.serve_listeners, answer, [listener], handler_nursery=connections)
                        await accepting.start(serve)
                    if mode != "never ready":
                        stub.say("ready")
                        link.ready()
        for listener in listeners:
            await listener.aclose()
        nursery.cancel_scope.cancel()
    say_it_again()
    stub.say("ended at once" if told == 2 else "ended")


def say_it_again() -> None:
    """What systemd says to all may reach a worker when it has done it already."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.raise_signal(number)


def main() -> int:
    link_fd, plan_fd = map(int, sys.argv[1:])
    plan = Plan.take(plan_fd)
    stub = Stub(**json.loads(plan.update.service))
    mode = stub.my_mode()
    stub.say("started", mode)
    (sock,) = take_descriptors([link_fd])
    faulthandler.register(signal.SIGQUIT, all_threads=True)
    link = WorkerLink(sock, plan.update, heartbeat=plan.heartbeat, max_sessions=plan.max_sessions, alarm=plan.alarm)
    if mode == "fail":
        link.failed("the accounts are\nnot there")
        return 3
    if mode == "leave":
        return 4
    with signals_of_a_worker(link):
        trio.run(work, stub, mode, plan, link)
        say_it_again()
    say_it_again()
    return 0


def listen() -> socket.socket:
    """A listening socket of loopback."""
    return socket.create_server(("127.0.0.1", 0))


def make_supervisor(
    stub: Stub, sock: socket.socket, number: int, *, timing: Timing, grace: float = 30.0, **options: Any
) -> Supervisor:
    work = Work(service=stub.encode(), grace=grace)
    return supervise_pool([sock], work, number=number, timing=timing, spawn=partial(spawn, COMMAND), **options)


def supervise_pool(sockets: list[socket.socket], work: Work, **options: Any) -> Supervisor:
    """A supervisor of workers, with options of both."""
    mine = {field.name for field in fields(WorkerPool)}
    pool = WorkerPool(sockets=sockets, work=work, **{name: option for name, option in options.items() if name in mine})
    return Supervisor(pool, **{name: option for name, option in options.items() if name not in mine})


def supervise(number: str, stub: str, timing: str) -> NoReturn:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sock = listen()
    what = Stub(**json.loads(stub))
    supervisor = make_supervisor(
        what, sock, int(number), timing=Timing(**json.loads(timing)), reload=lambda: Work(service=what.encode())
    )
    port = sock.getsockname()[1]
    try:
        trio.run(supervisor.run, lambda: print(f"port {port}", flush=True))
    except ConfigurationError as exc:
        sys.exit(str(exc))
    sys.exit()


if __name__ == "__main__":
    if sys.argv[1] == "supervise":
        supervise(*sys.argv[2:])
    sys.exit(main())
