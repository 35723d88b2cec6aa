"""Starts an echo server of each kind in a process of its own, and a load on it.

The server is pinned to the machine's first core, the load to the second; this process goes with the load, and sleeps.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from realm import kerberos
from triosspi.service import account_editor

BENCH = Path(__file__).resolve().parent.parent
PASSWORD = "correct horse battery staple"
CFLAGS = ["-O2", "-std=c99", "-D_GNU_SOURCE"]
CORES = sorted(os.sched_getaffinity(0))

Wire = Literal["plain", "tls", "ntlm", "kerberos", "ntlm-stream", "kerberos-stream"]


@dataclass(frozen=True)
class Kind:
    """A kind of server.

    Attributes:
        name: Of the row in a table.
        wire: What the load speaks to it.
        command: What starts it, but for the interpreter. Words in braces are filled in from the `Setting`.
        environment: More variables, filled in likewise.
    """

    name: str
    wire: Wire
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


_NTLM = {"NTLM_USER_FILE": "{users}"}
_KEYTAB = {"KRB5_KTNAME": "{keytab}"}
_PYSPNEGO = ("{python}", "-m", "baselines.asyncio_pyspnego")
_OURS = ("{python}", "-m", "triosspi", "serve", "echo", "--wire", "framed", "--host", "127.0.0.1", "--port", "0")

PLAIN = Kind("Trio, plain", "plain", ("{python}", "-m", "baselines.trio_echo"))
TLS = Kind("Trio, TLS 1.3", "tls", ("{python}", "-m", "baselines.trio_echo", "{certificate}"))
ASYNCIO_NTLM = Kind("asyncio + pyspnego, NTLM", "ntlm", _PYSPNEGO, _NTLM)
ASYNCIO_KERBEROS = Kind("asyncio + pyspnego, Kerberos", "kerberos", _PYSPNEGO, _KEYTAB)
ASYNCIO_WRAP = Kind("the same by wrap(), Kerberos", "kerberos", (*_PYSPNEGO, "--seal", "wrap"), _KEYTAB)
C_KERBEROS = Kind("C on libgssapi, Kerberos", "kerberos", ("{gssapi_echo}",), _KEYTAB)
OURS_NTLM = Kind("triosspi, NTLM", "ntlm", (*_OURS, "--accounts", "{accounts}"))
OURS_KERBEROS = Kind("triosspi, Kerberos", "kerberos", (*_OURS, "--keytab", "{keytab}"))

KINDS = (PLAIN, TLS, ASYNCIO_NTLM, ASYNCIO_KERBEROS, ASYNCIO_WRAP, C_KERBEROS, OURS_NTLM, OURS_KERBEROS)


def core(number: int) -> set[int]:
    """The server's core, 0, or the load's, 1; the same one where there is only one."""
    return {CORES[number % len(CORES)]}


@dataclass(frozen=True)
class Setting:
    """What servers and loads need: accounts, keys, certificates, the C server. Files live as long as it.

    Attributes:
        values: What stands for the words in braces.
        environment: Of every process.
        missing: Kinds that cannot be had, with the reason.
    """

    values: dict[str, str]
    environment: dict[str, str]
    missing: dict[str, str]

    def available(self, kinds: tuple[Kind, ...] = KINDS) -> list[Kind]:
        """Those that can be started."""
        return [kind for kind in kinds if kind.name not in self.missing]


def build_gssapi_echo(folder: Path) -> str:
    """Compile the C server against the system's Kerberos; its path.

    Raises:
        OSError: there is no compiler, or no header.
        subprocess.CalledProcessError: it does not build.
    """
    config = shutil.which("krb5-config.mit") or "krb5-config"

    def words(option: str) -> list[str]:
        return subprocess.run([config, option, "gssapi"], capture_output=True, text=True, check=True).stdout.split()

    source, program = Path(__file__).parent / "gssapi_echo.c", folder / "gssapi_echo"
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run([*compiler, *CFLAGS, *words("--cflags"), "-o", program, source, *words("--libs")], check=True)
    return str(program)


@contextmanager
def setting(folder: Path) -> Iterator[Setting]:
    """Prepare everything, for as long as it lasts."""
    # All processes inherit it: a server of thousands of connections needs as many files.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    accounts, users = folder / "accounts", folder / "users"
    account_editor.add(accounts, "DOM\\alice", PASSWORD)
    users.write_text(f"DOM:alice:{PASSWORD}\n")
    paths = [str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])]
    values = {"python": sys.executable, "accounts": str(accounts), "users": str(users)}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "BENCH_PASSWORD": PASSWORD}
    missing = {}
    try:
        _make_certificate(folder, values, environment)
    except ImportError:
        missing[TLS.name] = "trustme is not installed"
    with ExitStack() as stack:
        service = stack.enter_context(kerberos())
        if service is None:
            missing.update({kind.name: "no Kerberos" for kind in KINDS if kind.wire == "kerberos"})
        else:
            values["keytab"], environment["BENCH_TARGET"] = service
            # The realm puts its own into the environment.
            environment |= {name: value for name, value in os.environ.items() if name.startswith("KRB5")}
            try:
                values["gssapi_echo"] = build_gssapi_echo(folder)
            except (OSError, subprocess.CalledProcessError) as exc:
                missing[C_KERBEROS.name] = f"it does not build: {exc}"
        for name, reason in missing.items():
            print(f"without {name}: {reason}")
        os.sched_setaffinity(0, core(1))
        stack.callback(os.sched_setaffinity, 0, CORES)
        yield Setting(values, environment, missing)


def _make_certificate(folder: Path, values: dict[str, str], environment: dict[str, str]) -> None:
    import trustme  # noqa: PLC0415 - may be missing

    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(folder / "certificate.pem")
    values["certificate"] = str(folder / "certificate.pem")
    environment["BENCH_AUTHORITY"] = str(folder / "authority.pem")


@dataclass(frozen=True)
class Server:
    """A running server."""

    kind: Kind
    pid: int
    port: int

    def resident(self) -> int:
        """Its memory in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


@contextmanager
def serve(kind: Kind, where: Setting) -> Iterator[Server]:
    """Run a server."""
    command = [word.format(**where.values) for word in kind.command]
    more = {name: value.format(**where.values) for name, value in kind.environment.items()}
    process = subprocess.Popen(
        command, env=where.environment | more, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with process:
        try:
            os.sched_setaffinity(process.pid, core(0))
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{kind.name} has not started: {' '.join(command)}")
            yield Server(kind, process.pid, int(re.search(r":(\d+)\s*$", line)[1]))  # type: ignore[index]
        finally:
            process.kill()


class Load:
    """A running load: see `bench/load.py`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.sealing: str = self._answer()["sealing"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the load has failed; its reason stands above")
        return json.loads(line)  # type: ignore[no-any-return]

    def run(self, size: int, window: int, seconds: float) -> dict[str, float]:
        """One run; the fields of `load.Run`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"size": size, "window": window, "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        return self._answer()


@contextmanager
def load(server: Server, where: Setting, connections: int, *, verify: bool = False) -> Iterator[Load]:
    """Log in so many times, and stay for runs."""
    command = [sys.executable, str(BENCH / "load.py"), "--commands", "--connections", str(connections)]
    command += ["--port", str(server.port), "--wire", server.kind.wire, "--server-pid", str(server.pid)]
    command += ["--verify"] if verify else []
    process = subprocess.Popen(command, env=where.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            os.sched_setaffinity(process.pid, core(1))
            yield Load(process)
        finally:
            process.kill()
