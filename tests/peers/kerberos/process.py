"""A foreign implementation in a process of its own, driven by lines of text: `lines.h` describes them.

Every Kerberos peer is one: two C programs, each linked with MIT's library and with Heimdal's (the two define the same
symbols and cannot share a process), and `worker.py` for the peers that are Python packages. So each login has an
environment of its own, in which nothing but its own realm exists: krb5.conf, ticket cache, keytab and replay cache are
all found through variables that would else be the whole test process's.

A C program has one login and starts in a millisecond or two. A worker starts in a quarter of a second, with .NET in a whole
one: so it is kept when its login is over, and takes the next one with the environment of that.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..base import PeerError


class StepError(PeerError):
    """A step failed.

    Attributes:
        token: What the implementation would tell its peer about it (a KRB-ERROR, as a rule); may be empty.
    """

    def __init__(self, text: str, token: bytes) -> None:
        super().__init__(text)
        self.token = token


def to_hex(data: bytes) -> str:
    return data.hex() or "-"


def from_hex(word: str) -> bytes:
    return b"" if word == "-" else bytes.fromhex(word)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextInfo:
    """What an implementation says about its established context.

    Attributes:
        flags: GSS-API's context flags.
        lifetime: Seconds until it ends.
        initiator: Who logged in, as the implementation displays it.
        target: At which service.
        delegated: Whose credentials were delegated; empty if nobody's.
    """

    flags: int
    lifetime: int
    initiator: str
    target: str
    delegated: str


class LineProcess:
    """The process. Started, it has a credential or has said why not."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, password: str | None = None) -> None:
        # What a program says before it dies; read only then.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._owed = 0  # answers that were asked for and have not come
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=environment,
                encoding="utf-8",
                errors="replace",  # a library's message, in whatever it writes it in
            )
        except BaseException:
            self._stderr.close()
            raise
        try:
            self._begin(password)
        except BaseException:
            self.close()
            raise

    def _begin(self, password: str | None) -> None:
        if password is not None:
            self._write(to_hex(password.encode()))
        self._owed += 1
        self._answer("ok")

    def ask(self, *words: str, expect: Sequence[str] = ("ok",)) -> list[str]:
        """Send one command; return the words of its answer, the first of them being one of `expect`.

        Raises:
            StepError: the implementation refuses.
            PeerError: the process has ended.
        """
        self._owed += 1
        self._write(" ".join(words))
        return self._answer(*expect)

    def ask_many(self, commands: Sequence[Sequence[str]]) -> list[list[str]]:
        """Send commands together, and return the answers, each of which must be "ok".

        Both have to fit a pipe's buffer, or the two sides would wait for each other to read.
        """
        self._owed += len(commands)
        self._write("\n".join(map(" ".join, commands)))
        return [self._answer("ok") for _ in commands]

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as exc:
            raise PeerError(f"the peer has ended: {self._last_words() or exc}") from exc

    def _answer(self, *expect: str) -> list[str]:
        assert self._process.stdout is not None
        try:
            line = self._process.stdout.readline().rstrip("\n")
        except ValueError as exc:
            raise PeerError("the peer is closed") from exc
        if not line:
            raise PeerError(f"the peer has ended: {self._last_words()}")
        self._owed -= 1
        if line.startswith("error "):
            _, token, text = line.split(" ", 2)
            raise StepError(text, from_hex(token))
        words = line.split(" ")
        if words[0] not in expect:
            raise PeerError(f"not an answer: {line[:200]}")
        return words

    @property
    def in_step(self) -> bool:
        """Whether it runs, and has answered all that it was asked."""
        return self._owed == 0 and self._process.poll() is None

    def _last_words(self) -> str:
        if self._stderr.closed:
            return "closed"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.returncode}"

    def close(self) -> None:
        """End the process. May be called twice."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.kill()
        self._process.wait()
        self._stderr.close()


class Worker:
    """A login in a `worker.py` that others had before and will have after; as a `LineProcess` to whoever has it.

    Args:
        command: The program and the name of the package.
        arguments: As the C programs take them.
        environment: All that the login finds, see there.
        password: The same.
    """

    # By command. Taking from a list and putting back are each one step, so threads may do so at once.
    _idle: ClassVar[defaultdict[tuple[str, ...], list[LineProcess]]] = defaultdict(list)

    def __init__(
        self,
        command: Sequence[str],
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        password: str | None = None,
    ) -> None:
        idle = self._idle[tuple(command)]
        try:
            self._process: LineProcess | None = idle.pop()
        except IndexError:
            self._process = LineProcess(command, environment)
            atexit.register(self._process.close)
        self._put_back = idle.append
        login = {"arguments": list(arguments), "environment": dict(environment), "password": password}
        try:
            self.ask("begin", to_hex(json.dumps(login).encode()))
        except BaseException:
            self.close()
            raise

    def ask(self, *words: str, expect: Sequence[str] = ("ok",)) -> list[str]:
        """See `LineProcess.ask`."""
        return self._mine().ask(*words, expect=expect)

    def ask_many(self, commands: Sequence[Sequence[str]]) -> list[list[str]]:
        """See `LineProcess.ask_many`."""
        return self._mine().ask_many(commands)

    def _mine(self) -> LineProcess:
        if self._process is None:
            raise PeerError("the peer is closed")
        return self._process

    def close(self) -> None:
        """End the login. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.in_step:
            with contextlib.suppress(PeerError):
                process.ask("end")
                self._put_back(process)
                return
        # It has died, or an answer is still to come, which the next login would take for its own.
        atexit.unregister(process.close)
        process.close()


class LineContext:
    """A security context in a process: what both sides of a login share."""

    def __init__(self, process: LineProcess | Worker) -> None:
        self._process = process
        self._complete = False

    @property
    def complete(self) -> bool:
        return self._complete

    def step(self, token: bytes | None) -> bytes | None:
        state, answer = self._process.ask("step", to_hex(token or b""), expect=("more", "done"))
        self._complete = state == "done"
        return from_hex(answer) or None

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        _, trailer, data = self._process.ask("seal", to_hex(message))
        return from_hex(trailer), from_hex(data)

    def open(self, trailer: bytes, data: bytes) -> bytes:
        return from_hex(self._process.ask("open", to_hex(trailer), to_hex(data))[1])

    def seal_many(self, messages: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
        """As `seal`; see `LineProcess.ask_many`."""
        answers = self._process.ask_many([("seal", to_hex(message)) for message in messages])
        return [(from_hex(trailer), from_hex(data)) for _, trailer, data in answers]

    def open_many(self, sealed: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """As `open`; see `LineProcess.ask_many`."""
        answers = self._process.ask_many([("open", to_hex(trailer), to_hex(data)) for trailer, data in sealed])
        return [from_hex(message) for _, message in answers]

    def wrap(self, message: bytes, *, confidential: bool) -> bytes:
        """A token of gss_wrap: without confidentiality it is signed and readable."""
        return from_hex(self._process.ask("wrap", "1" if confidential else "0", to_hex(message))[1])

    def unwrap(self, token: bytes) -> tuple[bytes, bool]:
        """Open a token of gss_wrap; return the message, and whether it was encrypted."""
        _, encrypted, message = self._process.ask("unwrap", to_hex(token))
        return from_hex(message), encrypted == "1"

    def key(self) -> tuple[int, bytes]:
        """The enctype and the key that protect the messages. Only the C programs tell."""
        _, enctype, key = self._process.ask("key")
        return int(enctype), from_hex(key)

    def info(self) -> ContextInfo:
        """What the implementation says about the context."""
        _, flags, lifetime, *names = self._process.ask("info")
        initiator, target, delegated = (from_hex(name).decode() for name in names)
        return ContextInfo(
            flags=int(flags), lifetime=int(lifetime), initiator=initiator, target=target, delegated=delegated
        )

    def close(self) -> None:
        self._process.close()


class LineAcceptor(LineContext):
    """The other side, as `peers.acceptors.Acceptor` wants it."""

    def step(self, token: bytes) -> bytes | None:  # type: ignore[override]  # an acceptor never begins
        return super().step(token)

    @property
    def client(self) -> str | None:
        """Who has logged in, once complete."""
        return self.info().initiator if self.complete else None
