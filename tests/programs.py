"""The `triosspi` command as a user has it: a process, at a terminal or between pipes. Nothing here sleeps."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import trio

from triosspi.service.program import Program, Started
from triosspi.service.serving.server import Loaded

MODULE = (sys.executable, "-m", "triosspi")
SCRIPT = (str(Path(sys.executable).with_name("triosspi")),)

PATIENCE = 30.0  # seconds, for whatever is waited for

# What the machine that runs the tests may have set, and what would decide about a login.
_DECIDING = ("TRIOSSPI_PASSWORD", "KRB5_KTNAME", "KRB5CCNAME", "NTLM_USER_FILE")


def environment(**more: str) -> dict[str, str]:
    """The test run's environment without what decides about logins."""
    kept = {name: value for name, value in os.environ.items() if name not in _DECIDING}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}", **more}


def children(pid: int) -> list[int]:
    """The processes that a process has started, whichever of its threads did."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def run(
    *arguments: str | Path,
    program: Sequence[str] = MODULE,
    stdin: bytes = b"",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    result = subprocess.run(
        [*program, *map(str, arguments)],
        input=stdin,
        cwd=cwd,
        env=environment(**(env or {})),
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    out, err = os.fsdecode(result.stdout), os.fsdecode(result.stderr)
    return subprocess.CompletedProcess(result.args, result.returncode, out, err)


def stop_at_once(patch: pytest.MonkeyPatch) -> list[tuple[Program, Loaded]]:
    """Have `triosspi serve`, run in this process, stop as soon as it serves; what it has served with."""
    real = Program.serve
    seen: list[tuple[Program, Loaded]] = []

    async def serve(self: Program, loaded: Loaded, started: Started, **options: Any) -> bool:
        def start(listeners: list[trio.SocketListener]) -> None:
            started(listeners)
            signal.raise_signal(signal.SIGTERM)

        seen.append((self, loaded))
        return await real(self, loaded, start, **options)

    patch.setattr(Program, "serve", serve)
    return seen


class Running:
    """A program in the background.

    Attributes:
        out: What it has printed so far.
        err: The same of standard error.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.out = ""
        self.err = ""
        self._news = threading.Condition()
        self._open = {"out", "err"}
        assert process.stdout is not None and process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(name, stream), daemon=True)
            for name, stream in (("out", process.stdout), ("err", process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str, stream: IO[bytes]) -> None:
        for line in stream:
            with self._news:
                setattr(self, name, getattr(self, name) + line.decode())
                self._news.notify_all()
        with self._news:
            self._open.discard(name)
            self._news.notify_all()

    def expect(self, pattern: str, stream: str = "out") -> re.Match[str]:
        """Wait until what was printed matches."""
        with self._news:
            self._news.wait_for(
                lambda: re.search(pattern, getattr(self, stream), re.MULTILINE) or stream not in self._open, PATIENCE
            )
            found = re.search(pattern, getattr(self, stream), re.MULTILINE)
        assert found, f"no {pattern!r} in {stream}:\n{self.out}\n--- stderr:\n{self.err}"
        return found

    def expect_port(self) -> int:
        """The port that `triosspi serve` says it is bound to."""
        return int(self.expect(r"^triosspi: serving .*:(\d+)\n")[1])

    def wait(self) -> int:
        """Wait for its end; returns the exit status."""
        status = self.process.wait(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)
        return status

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; returns the exit status."""
        self.process.send_signal(number)
        return self.wait()


@contextmanager
def running(
    *arguments: str | Path,
    program: Sequence[str] = MODULE,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Run in the background, and end it in the end."""
    with subprocess.Popen(
        [*program, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env=environment(**(env or {})),
    ) as process:
        program_ = Running(process)
        try:
            yield program_
        finally:
            if process.poll() is None:
                # Not at once killed: it would write no coverage data.
                process.terminate()
                try:
                    program_.wait()
                finally:
                    process.kill()
            program_.wait()


class Terminal:
    """A program whose standard streams are a terminal, with somebody who types."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self.shown = ""
        self._master = master
        self._seen = 0

    def _read(self) -> bool:
        ready, _, _ = select.select([self._master], [], [], PATIENCE)
        assert ready, f"nothing more is shown after:\n{self.shown}"
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: the program's side is closed
            return False
        self.shown += data.decode().replace("\r\n", "\n")
        return bool(data)

    def expect(self, text: str) -> None:
        """Wait until something is shown, behind what was waited for before."""
        while (found := self.shown.find(text, self._seen)) < 0:
            assert self._read(), f"no {text!r} in:\n{self.shown}"
        self._seen = found + len(text)

    def type(self, text: str) -> None:
        """Type something."""
        os.write(self._master, text.encode())

    def wait(self) -> int:
        """Wait for its end; returns the exit status."""
        while self._read():
            pass
        return self.process.wait(PATIENCE)


@contextmanager
def terminal(
    *arguments: str | Path,
    program: Sequence[str] = MODULE,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Terminal]:
    """Run at a terminal of its own."""
    master, slave = pty.openpty()
    name = os.ttyname(slave)
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        # Inherited by test runs in the background; with any handler the program begins with the default.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        # The first terminal that the leader of a session opens becomes its controlling one, which Ctrl-C needs.
        process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1 3<&-', name, *program, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env=environment(**(env or {})),
            start_new_session=True,
        )
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with process:
            program_ = Terminal(process, master)
            try:
                # Until the program has it open there would be nobody at the terminal, and reading would fail.
                program_._read()
                os.close(slave)
                slave = -1
                yield program_
            finally:
                if process.poll() is None:
                    process.kill()
    finally:
        os.close(master)
        if slave >= 0:
            os.close(slave)
