"""What a supervisor and its workers tell each other, and the worker's end of it."""

# What goes over the link. The supervisor writes single letters, `Order`, so that none is ever there by half. With the one to
# reload comes a descriptor (SCM_RIGHTS) of a file in memory that has what to serve from then on, an `Update`: it is there or
# it is not, whatever its size and however full the socket is. The other letters may be said twice, and the second time
# means nothing, so that it does not matter who else tells the worker the same: systemd and a terminal send their SIGTERM and
# SIGINT to every process of the service at once, and a worker that took the supervisor's for a second one would cut off
# its clients. The worker writes lines of JSON, `Report`: each says everything, so that one may be lost. That happens when
# the supervisor is stopped for minutes (Ctrl-Z, a debugger) and the socket's buffer is full of heartbeats; the worker must
# neither wait then nor take it for the supervisor's death, which is the end of the stream and nothing else.
#
# Heartbeats come from a task of the event loop that serves: what stops the loop (a handler in an endless loop, a
# blocking call) stops them, and the supervisor kills the worker. In case the supervisor has died too, each heartbeat
# sets the kernel's alarm (SIGALRM) anew, which ends the process without the help of the loop or the interpreter.

from __future__ import annotations

import array
import enum
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, BinaryIO, Final, NoReturn, Self

import msgspec
import trio

from ..admission.tables import Tables
from .balance import OwnLoad

#: Seconds between two heartbeats.
HEARTBEAT: Final = 1.0
#: Characters of a `Report.failure` or `Report.refusal`, and bytes of a report's line.
LONGEST_FAILURE: Final = 1000
LONGEST_REPORT: Final = 16384
# What a handler starts is not to have them.
_CLOEXEC: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
# Descriptors that are taken with one look at the link. The kernel lets a look end at each message that has one.
_DESCRIPTORS: Final = 4


# That end a process which has no handler for them.
_SIGNALS: Final = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class Order(enum.Enum):
    """What the supervisor says, a byte each."""

    DRAIN = b"d"
    STOP = b"s"
    RELOAD = b"r"
    LAST = b"l"
    RETIRE = b"t"


class State(enum.Enum):
    """What a worker is doing."""

    STARTING = "starting"
    READY = "ready"
    RETIRED = "retired"
    DRAINING = "draining"


class Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker says of itself, about each second and when something has changed.

    Attributes:
      state: what it is doing.
      sessions: clients that have logged in since it started.
      generation: number of the configuration that it serves by.
      refused: number of the one that it could not use last; 0: there was none.
      refusal: why, in one line.
      last: it has heard `Order.LAST`: nobody else will have its sockets when it goes, and it will empty their queues.
      failure: why it cannot start, in one line.
    """

    state: State = State.STARTING
    sessions: Annotated[int, msgspec.Meta(ge=0)] = 0
    generation: Annotated[int, msgspec.Meta(ge=0)] = 0
    refused: Annotated[int, msgspec.Meta(ge=0)] = 0
    refusal: Annotated[str, msgspec.Meta(max_length=LONGEST_FAILURE)] | None = None
    last: bool = False
    failure: Annotated[str, msgspec.Meta(max_length=LONGEST_FAILURE)] | None = None

    def line(self) -> bytes:
        """As it goes over the link."""
        return msgspec.json.encode(self) + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Report:
        """The report of a line.

        Raises:
          ValueError: it is none.
        """
        return msgspec.json.decode(line, type=cls)


class PassedOn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a supervisor passes on to a worker in a file."""

    # Not on the command line and not in the environment, which others on the machine can read, nor on a disk.

    def file(self) -> BinaryIO:
        """A file with it, at its beginning; in memory, without a name, and gone when it is closed."""
        file = open(os.memfd_create(f"triosspi-{type(self).__name__.lower()}"), "w+b")  # noqa: SIM115 - the caller's
        try:
            file.write(msgspec.json.encode(self))
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file

    @classmethod
    def take(cls, fd: int) -> Self:
        """Read it, and close the descriptor.

        Raises:
          ValueError: there is none in it.
        """
        with open(fd, "rb") as file:
            return msgspec.json.decode(file.read(), type=cls)


class Update(PassedOn, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker is to serve.

    Attributes:
      generation: its number. The supervisor counts them.
      service: as the program that the supervisor starts understands it: a pickled `program.WorkerProgram`. May be
          secret.
    """

    generation: int = 0
    service: bytes


class Plan(PassedOn, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker is to do.

    Attributes:
      number: of the worker's place, from 1, for people.
      listeners: descriptors of the listening sockets, which all workers accept from.
      tables: descriptor of the `Tables` that all workers share, and this one's column in them.
      update: what to serve, until there is another.
      heartbeat: seconds between two heartbeats.
      max_sessions: so many sessions are reported at once, and not with the next heartbeat.
      alarm: seconds without a heartbeat after which the kernel ends the worker; None: it does not.
    """

    number: int
    listeners: tuple[int, ...]
    tables: tuple[int, int | None]
    update: Update
    heartbeat: float = HEARTBEAT
    max_sessions: int | None = None
    alarm: float | None = None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:LONGEST_FAILURE]


def take_descriptors(descriptors: Iterable[int]) -> list[socket.socket]:
    """The sockets of inherited descriptors, which a child of this process does not inherit in its turn."""
    # Passed on by the supervisor, they are inheritable here. A program that a handler starts would hold the port, and
    # the link: the supervisor would not see its end.
    sockets = []
    for fd in descriptors:
        os.set_inheritable(fd, False)
        sockets.append(socket.socket(fileno=fd))
    return sockets


class WorkerLink:
    """A worker's end of the link to its supervisor.

    What is told is told at once and never waited for. A server calls `ready` when it serves, `session_started`
    for each login, `draining` when it begins to stop, whyever, and `reloaded` when it has taken over
    what is `newest`, or has refused to; and it runs `run` meanwhile. With `count_connections` it gives its number.

    Args:
      sock: the connected socket; belongs to this from now on.
      update: what it serves at the start.
      heartbeat: see `Plan`.
      max_sessions: see `Plan`.
      alarm: see `Plan`.
      load: this worker's own among the loads; None: it accepts alone.

    Attributes:
      on_parent_gone: called once, when the supervisor has died or wants the worker to go: finish what is
          under way, and end; by default as SIGTERM would.
      on_stop: called when the supervisor wants it to end at once, after ``on_parent_gone``; by default as SIGINT would.
      on_reload: called when there is something else to serve; by default as SIGHUP would.
      on_retire: called when it shall accept nobody any more, and end when all who are there have gone by themselves; by
          default as if the supervisor had died.
      on_last: called when it is the last one to have its sockets: who is queued on them when it goes is to be told so.
      newest: what to serve now.
      tables: what is known together with other workers; None: nothing.
    """

    def __init__(
        self,
        sock: socket.socket,
        update: Update,
        *,
        heartbeat: float = HEARTBEAT,
        max_sessions: int | None = None,
        alarm: float | None = None,
        load: OwnLoad | None = None,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._heartbeat = heartbeat
        self._max_sessions = max_sessions
        self._alarm = alarm
        self._load = load
        self.newest = update
        self._report = Report(generation=update.generation)
        self.tables: Tables | None = None
        self._unsent = b""
        self._leaving = False
        self.on_parent_gone: Callable[[], object] = lambda: signal.raise_signal(signal.SIGTERM)
        # Not SIGTERM: Trio makes one of two that come at once.
        self.on_stop: Callable[[], object] = lambda: signal.raise_signal(signal.SIGINT)
        self.on_reload: Callable[[], object] = lambda: signal.raise_signal(signal.SIGHUP)
        self.on_retire: Callable[[], object] = self._leave
        self.on_last: Callable[[], object] = lambda: None

    @property
    def leaving(self) -> bool:
        """It was told to go, by whomever."""
        return self._leaving

    async def run(self) -> NoReturn:
        """Send heartbeats and take orders, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._obey)
            while True:
                if self._alarm is not None:
                    signal.setitimer(signal.ITIMER_REAL, self._alarm)
                if self._load is not None and not self._leaving and self._report.state is not State.RETIRED:
                    # Not afterwards: another may be at this place.
                    self._load.tell()
                self._tell()
                await trio.sleep(self._heartbeat)

    def ready(self) -> None:
        """It serves."""
        if self._report.state is State.STARTING:
            self._change(state=State.READY)

    def session_started(self) -> None:
        """One more client has logged in."""
        sessions = self._report.sessions + 1
        self._report = msgspec.structs.replace(self._report, sessions=sessions)
        if sessions == self._max_sessions:
            self._tell()

    def count_connections(self, count: Callable[[], int]) -> None:
        """What tells how many connections there are now; for an even share of them."""
        if self._load is not None:
            self._load.count = count

    def retired(self) -> None:
        """It has closed its listening sockets, and goes on with those who are there."""
        self._change(state=State.RETIRED)

    def draining(self) -> None:
        """It has closed its listening sockets, and will end."""
        self._leaving = True
        self._change(state=State.DRAINING)

    def reloaded(self, generation: int, problem: str | None = None) -> None:
        """It has taken over what has this number; or has not, because of a problem."""
        if problem is None:
            self._change(generation=generation)
        else:
            self._change(refused=generation, refusal=_one_line(problem))

    def failed(self, reason: str) -> None:
        """It cannot start; say why before ending."""
        self._change(failure=_one_line(reason))

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def _change(self, **fields: object) -> None:
        self._report = msgspec.structs.replace(self._report, **fields)
        self._tell()

    def _tell(self) -> None:
        """Send what there is to say, if there is room for it."""
        try:
            data = self._unsent + self._report.line()
            rest = data[self._sock.send(data) :]
        except OSError:
            # No room; or the supervisor is gone, which `_obey` sees, too.
            return
        # A line that has been begun must be ended, or the next would be nonsense.
        self._unsent = rest[: rest.find(b"\n") + 1]

    async def _obey(self) -> None:
        """Take orders until the link's end."""
        sock = trio.socket.from_stdlib_socket(self._sock)
        while True:
            try:
                said, extras, _, _ = await sock.recvmsg(64, socket.CMSG_SPACE(4 * _DESCRIPTORS), _CLOEXEC)
            except OSError:
                said, extras = b"", []
            if not said:
                break
            for extra in extras:
                self._take_updates(*extra)
            for number in said:
                self._follow(bytes([number]))
        self._leave()

    def _take_updates(self, level: int, kind: int, data: bytes) -> None:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors = array.array("i")
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
            for fd in descriptors:
                self.newest = Update.take(fd)

    def _follow(self, order: bytes) -> None:
        if order == Order.DRAIN.value:
            self._leave()
        elif order == Order.STOP.value:
            self._leave()
            self.on_stop()
        elif order == Order.RELOAD.value:
            self.on_reload()
        elif order == Order.RETIRE.value and not self._leaving:
            self.on_retire()
        elif order == Order.LAST.value and not self._leaving:
            self.on_last()
            self._change(last=True)

    def _leave(self) -> None:
        # A signal of somebody else's may have come before.
        if not self._leaving:
            self._leaving = True
            self.on_parent_gone()


@contextmanager
def signals_of_a_worker(link: WorkerLink) -> Iterator[None]:
    """Outside the time in which the server takes signals itself, they end the process: quietly, and not once it leaves.

    A worker without clients has finished before systemd has sent its SIGTERM to every process of the service. Without
    this, the one that comes last would kill it on its last steps, and it would be reported as a worker that failed.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        if not link.leaving:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in _SIGNALS:
        signal.signal(number, end)
    try:
        yield
    finally:
        if link.leaving:
            for number in _SIGNALS:
                # While the interpreter ends, it takes handlers away, but leaves this.
                signal.signal(number, signal.SIG_IGN)
