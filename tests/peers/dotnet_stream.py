""".NET's NegotiateStream, client and server, through the C# program in `dotnet_stream.cs`.

    with DotnetStreams(kdc.login("aes256").environment) as dotnet:
        with dotnet.connect(port) as client:
            client.login(None, "host/aes256.mit.test")
            client.echo(1000, sizes=[32, 64512])

One process has any number of connections and servers, and one environment: its realm, its tickets, its keytab. All
calls block, each for itself: use as many threads as you like.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from . import csharp
from .base import PeerError

_SOURCE = Path(__file__).with_suffix(".cs")
_NO_KERBEROS = Path(__file__).with_name("no_kerberos.krb5.conf")
_PATIENCE = 60.0  # seconds for one answer

ProtectionLevel = Literal["None", "Sign", "EncryptAndSign"]
ImpersonationLevel = Literal["None", "Identification", "Impersonation", "Delegation"]
Credential = tuple[str, str, str]  # user, password, domain

available = csharp.available


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """An exception of .NET's.

    Attributes:
        type: Its class, with the name space.
        hresult: Its HResult, without a sign.
        native: The NativeErrorCode of a Win32Exception, without a sign; None of any other.
        message: Its text.
    """

    type: str
    hresult: int
    native: int | None
    message: str


class DotnetError(PeerError):
    """.NET raised an exception.

    Attributes:
        chain: The exception, the one inside it, and so on.
    """

    def __init__(self, chain: Sequence[Raised]) -> None:
        super().__init__(" <- ".join(f"{each.type}: {each.message}" for each in chain))
        self.chain = tuple(chain)

    @property
    def type(self) -> str:
        """The outermost exception's class, without its name space."""
        return self.chain[0].type.rpartition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """What a NegotiateStream says of itself, once authenticated. The names are .NET's.

    Attributes:
        authentication_type: RemoteIdentity.AuthenticationType: NTLM or Kerberos.
        remote_name: RemoteIdentity.Name: to a server the client's; to a client its own target.
    """

    is_authenticated: bool
    is_encrypted: bool
    is_signed: bool
    is_mutually_authenticated: bool
    impersonation_level: str
    authentication_type: str
    remote_name: str


class DotnetStreams:
    """A process with .NET 8, which starts at once (in a tenth of a second).

    Args:
        environment: What it has in place of the test's own variables of Kerberos: KRB5_CONFIG, KRB5CCNAME, KRB5_KTNAME and
            so on. Without any of them there is no realm.
        managed_ntlm: Whether NTLM and SPNEGO are .NET's own, or else those of the machine's GSS-API.
        core31: Whether it is .NET Core 3.1, which has only the latter.
    """

    def __init__(
        self, environment: Mapping[str, str] | None = None, *, managed_ntlm: bool = True, core31: bool = False
    ) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE_", "KRB5"))}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # of the next two, and of writing
        self._waiting: dict[str, Future[list[str]]] = {}
        self._ended: str | None = None
        # What the runtime says before it dies.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        try:
            self._process = subprocess.Popen(
                csharp.command(_SOURCE, managed_ntlm=managed_ntlm, core31=core31),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env={**kept, "KRB5_CONFIG": os.fspath(_NO_KERBEROS), **(environment or {})},
                encoding="ascii",
            )
        except BaseException:
            self._stderr.close()
            raise
        self._reader = threading.Thread(target=self._read_answers, name="answers of .NET", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def connect(self, port: int) -> DotnetClient:
        """Connect to a port of this machine; nothing is sent yet.

        Raises:
            DotnetError: nobody listens there.
        """
        number = next(self._numbers)
        self.ask("connect", number, port)
        return DotnetClient(self, number)

    def listen(
        self,
        *,
        protection: ProtectionLevel = "EncryptAndSign",
        impersonation: ImpersonationLevel = "Identification",
        tries: int = 1,
    ) -> DotnetServer:
        """Start an echo server.

        Args:
            protection: What is required of the client, at least.
            impersonation: The same.
            tries: How often a client may log in on one connection.
        """
        number = next(self._numbers)
        (port,) = self.ask("listen", number, protection, impersonation, tries)
        return DotnetServer(self, number, int(port))

    def ask(self, verb: str, number: int, *words: object, patience: float = _PATIENCE) -> list[str]:
        """Send one request; return the words of its answer.

        Raises:
            DotnetError: .NET raised an exception.
            PeerError: the process has ended, or does not answer.
        """
        answer: Future[list[str]] = Future()
        request = str(next(self._numbers))
        with self._lock:
            if self._ended is not None:
                raise PeerError(self._ended)
            assert self._process.stdin is not None
            self._waiting[request] = answer
            try:
                self._process.stdin.write(" ".join([request, verb, str(number), *map(str, words)]) + "\n")
                self._process.stdin.flush()
            except OSError as exc:
                raise PeerError(f"the .NET process: {exc}") from exc
        try:
            outcome, *rest = answer.result(patience)
        except TimeoutError as exc:
            raise PeerError(f".NET has not answered in {patience:.0f} s: {verb}") from exc
        if outcome != "ok":
            raise DotnetError([_raised(word) for word in rest])
        return rest

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            request, *words = line.split()
            with self._lock:
                answer = self._waiting.pop(request)
            answer.set_result(words)
        with self._lock:
            self._ended = f"the .NET process has ended: {self._last_words()}"
            waiting = [*self._waiting.values()]
            self._waiting.clear()
        for answer in waiting:
            answer.set_exception(PeerError(self._ended))

    def _last_words(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace").strip()

    def close(self) -> None:
        """End the process, and with it all that it has."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # its loop ends with its input
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()
        self._stderr.close()


class DotnetClient:
    """One NegotiateStream of a client. Reading and writing may be in two threads, not in more."""

    def __init__(self, process: DotnetStreams, number: int) -> None:
        self._process = process
        self._number = number

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # When the process has died, the connection went with it.
        with contextlib.suppress(PeerError):
            self.close()

    def login(
        self,
        credential: Credential | None,
        target: str,
        *,
        protection: ProtectionLevel = "EncryptAndSign",
        impersonation: ImpersonationLevel = "Identification",
    ) -> Security:
        """AuthenticateAsClient. After a failure `renew` first: .NET 8 allows no second try on the same object.

        Args:
            credential: User, password and domain; None for the default ones, of the ticket cache.
            target: The service principal's name.
            protection: What is asked for.
            impersonation: What is allowed.

        Raises:
            DotnetError: the login failed.
        """
        texts = map(_hex, (*(credential or (None,) * 3), target))
        return _security(self._ask("login", *texts, protection, impersonation))

    def renew(self) -> None:
        """Put a new NegotiateStream onto the connection, for another login where one has failed."""
        self._ask("renew")

    def write(self, data: bytes) -> None:
        """Write, by one Write."""
        self._ask("write", data.hex() or "-")

    def read(self, limit: int) -> bytes:
        """One Read: at least a byte, at most `limit`; none is the end."""
        return _bytes(self._ask("read", limit)[0])

    def read_exactly(self, count: int) -> bytes:
        """So many bytes, or fewer at the end."""
        return _bytes(self._ask("read-exactly", count)[0])

    def echo(self, count: int, *, sizes: Sequence[int], window: int = 1, patience: float = _PATIENCE) -> float:
        """Write messages of the given sizes in turn, and read each back and compare it, within the process.

        Args:
            count: How many messages.
            sizes: Their sizes, in bytes.
            window: How many may be under way.
            patience: Seconds for all of them.

        Returns:
            The seconds that it took.

        Raises:
            DotnetError: it ended early, or something else came back.
        """
        return float(self._ask("echo", count, window, ",".join(map(str, sizes)), patience=patience)[0])

    def shutdown(self) -> None:
        """End what this side sends, below the NegotiateStream, which has no way to say so."""
        self._ask("shutdown")

    def close(self) -> None:
        """Dispose. May be called twice."""
        self._ask("close")

    def _ask(self, verb: str, *words: object, patience: float = _PATIENCE) -> list[str]:
        return self._process.ask(verb, self._number, *words, patience=patience)


class DotnetServer:
    """A NegotiateStream on each connection to a port, which sends back what comes.

    Attributes:
        port: Where it listens, on 127.0.0.1.
    """

    def __init__(self, process: DotnetStreams, number: int, port: int) -> None:
        self._process = process
        self._number = number
        self.port = port

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(PeerError):
            self.close()

    def next_login(self) -> Security:
        """Wait for the next login that ends, and return what the server's side says; each is told once.

        Raises:
            DotnetError: it failed.
        """
        return _security(self._process.ask("next-login", self._number))

    def next_end(self) -> None:
        """Wait for the end of the next connection that was logged in.

        Raises:
            DotnetError: it did not end with the client's stream.
        """
        self._process.ask("next-end", self._number)

    def close(self) -> None:
        """Stop listening. May be called twice."""
        self._process.ask("stop", self._number)


def _hex(text: str | None) -> str:
    return "*" if text is None else text.encode().hex() or "-"


def _bytes(word: str) -> bytes:
    return b"" if word == "-" else bytes.fromhex(word)


def _raised(word: str) -> Raised:
    kind, hresult, native, message = word.split(",")
    return Raised(
        type=kind,
        hresult=int(hresult) & 0xFFFFFFFF,
        native=None if native == "*" else int(native) & 0xFFFFFFFF,
        message=_bytes(message).decode(),
    )


def _security(words: Sequence[str]) -> Security:
    *flags, impersonation, kind, name = words
    authenticated, encrypted, signed, mutual = (flag == "True" for flag in flags)
    return Security(
        is_authenticated=authenticated,
        is_encrypted=encrypted,
        is_signed=signed,
        is_mutually_authenticated=mutual,
        impersonation_level=impersonation,
        authentication_type=_bytes(kind).decode(),
        remote_name=_bytes(name).decode(),
    )
