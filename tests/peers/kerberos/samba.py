"""A Samba AD domain controller on the loopback, reduced to its KDC: tickets with a PAC, as Windows clients have them.

Made from nothing in a temporary directory, which takes four seconds, most of them Samba's schema. It is one process,
without DNS, LDAP or file service, and the processes of a test run share it: the first that needs it makes it, the last
that is done ends it.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from ..mit_realm import free_port
from ..requirements import require
from .realm import ENCTYPES, Kdc, RealmError, Service, find_program, missing_program, run

REALM = "SAMBA.TEST"
DOMAIN = "SAMBADOM"

SERVICES = {"aes256": 18, "aes128": 17, "rc4": 23, "other": 18}

# The bits of msDS-SupportedEncryptionTypes ([MS-KILE] 2.2.7).
_SUPPORTED = {23: 0x4, 17: 0x8, 18: 0x10}

_PROGRAMS = {"samba": "samba-ad-dc", "samba-tool": "samba-common-bin", "kinit": "krb5-user"}
# What provisioning reads, and the database's modules; packages of their own.
_FILES = {"setup/provision.ldif": "samba-ad-provision"}
_START_TIMEOUT = 30.0  # seconds
_STOP_TIMEOUT = 5.0


def available() -> str | None:
    """None when the controller can run here, else the reason."""
    reason = missing_program(_PROGRAMS)
    if reason is not None:
        return reason
    for name, package in _FILES.items():
        if not any((Path(prefix) / "share/samba" / name).exists() for prefix in ("/usr", "/usr/local")):
            return f"{name} of Samba is not installed (apt {package})"
    return None


def _python() -> str:
    """The interpreter that has Samba's modules: samba-tool's own, which is the system's and not this one."""
    tool = find_program("samba-tool")
    assert tool is not None, "ask available() first"
    with open(tool, "rb") as script:
        return script.readline().decode().removeprefix("#!").split()[0]


class SambaKdc(Kdc):
    """The domain.

    Its services, beside one for each enctype: `other`, which has a key like `aes256`. Each has an account of its own.

    Its users: alice, of the global group engineers, which is in the universal group staff, which is in the
    domain-local group owners; and bob, of no group but that of all users.

    Attributes:
        sids: The SIDs of users and groups, by name; the domain's own by "domain".
    """

    def __init__(self, shared: Path) -> None:
        """Make it, or join in.

        Args:
            shared: A directory of the processes that share it.
        """
        self._shared = shared
        self._alive = self._using = -1
        with self._alone():
            try:
                state = json.loads(self._state.read_text())
            except FileNotFoundError:
                state = {}
            directory = Path(state.get("directory") or tempfile.mkdtemp(prefix="triosspi-samba-"))
            self._pid: int = state.get("pid", 0)
            try:
                super().__init__(REALM, state.get("port") or free_port(), directory)
                # As complex as the domain demands.
                self.users = {"alice": "Alice-secret-1", "bob": "Bob-secret-2"}
                self.services = {name: self._service(name, enctype) for name, enctype in SERVICES.items()}
                self.sids: dict[str, str] = state.get("sids", {})
                self._smb_conf = directory / "dc" / "etc" / "smb.conf"
                if not state:
                    self._provision()
                    self._fill()
                    os.mkfifo(directory / "alive")
                # The controller ends at the end of its input: when the last that has this open closes it or is killed.
                self._alive = os.open(directory / "alive", os.O_RDWR)
                if not state:
                    self._start()
                    state = {"directory": str(directory), "pid": self._pid, "port": self.port, "sids": self.sids}
                    self._state.write_text(json.dumps(state))
                self._using = os.open(shared / "samba.users", os.O_RDWR | os.O_CREAT)
                fcntl.flock(self._using, fcntl.LOCK_SH)
            except BaseException:
                self._leave(last=not state)
                raise

    @property
    def _state(self) -> Path:
        return self._shared / "samba.json"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process makes or ends it meanwhile."""
        lock = os.open(self._shared / "samba.lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _service(self, name: str, enctype: int) -> Service:
        return Service(
            principal=f"host/{name}.{self.realm.lower()}@{self.realm}",
            enctype=enctype,
            keytab=f"FILE:{self.directory}/{name}.keytab",
            config=self.write_config(ENCTYPES[enctype], [enctype]),
        )

    def _provision(self) -> None:
        target = self.directory / "dc"
        # A machine may have an smb.conf of its own, from which the new one would inherit.
        blank = self.directory / "blank.conf"
        blank.write_text("[global]\n")
        options = {
            "server services": "kdc",
            "krb5 port": str(self.port),
            "kpasswd port": str(free_port()),
            "interfaces": "127.0.0.1",
            "bind interfaces only": "yes",
            "pid directory": target,
            "ncalrpc dir": target / "ncalrpc",
            "log file": target / "log.samba",
        }
        tool = find_program("samba-tool")
        assert tool is not None, "ask available() first"
        run(
            [
                tool,
                "domain",
                "provision",
                f"--configfile={blank}",
                f"--targetdir={target}",
                f"--realm={self.realm}",
                f"--domain={DOMAIN}",
                "--server-role=dc",
                "--host-name=dc",
                "--host-ip=127.0.0.1",
                "--adminpass=Admin-secret-0",
                "--dns-backend=NONE",
                *(f"--option={name}={value}" for name, value in options.items()),
            ]
        )

    def _fill(self) -> None:
        """Create users, groups and services by Samba's own Python modules: a samba-tool for each is a second for each."""
        wanted = {
            "users": self.users,
            # Group type bits ([MS-ADTS] 2.2.12): a security group, and its scope.
            "groups": {"engineers": 0x80000002, "staff": 0x80000008, "owners": 0x80000004},
            "members": {"engineers": ["alice"], "staff": ["engineers"], "owners": ["staff"]},
            "services": {
                name: {
                    "spn": service.target,
                    "keytab": service.keytab.removeprefix("FILE:"),
                    "supported": _SUPPORTED[service.enctype],
                }
                for name, service in self.services.items()
            },
        }
        script = Path(__file__).with_name("samba_directory.py")
        output = run([_python(), "-P", os.fspath(script), os.fspath(self._smb_conf)], stdin=json.dumps(wanted))
        self.sids = json.loads(output.splitlines()[-1])

    def _start(self) -> None:
        samba = find_program("samba")
        assert samba is not None, "ask available() first"
        command = [samba, "-i", "-M", "single", "-s", os.fspath(self._smb_conf), "--no-process-group"]
        # Nobody's child: whoever makes it need not be the last to use it.
        script = 'alive=$1; output=$2; shift 2; "$@" <"$alive" >"$output" 2>&1 & echo $!'
        log = self.directory / "output"
        self._pid = int(run(["sh", "-c", script, "sh", os.fspath(self.directory / "alive"), os.fspath(log), *command]))
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                if not self._runs() or time.monotonic() > deadline:
                    raise RealmError(f"samba did not start:\n{log.read_text(errors='replace')}") from None
                time.sleep(0.02)
            else:
                return

    def _runs(self, wait: float = 0) -> bool:
        """Whether the controller runs, still so after these seconds."""
        try:
            process = os.pidfd_open(self._pid)
        except ProcessLookupError:
            return False
        try:
            return not select.select([process], [], [], wait)[0]
        finally:
            os.close(process)

    def stop(self) -> None:
        """Be done with it; the last of all ends the controller and deletes the domain. May be called twice."""
        if self._using == -1:
            return
        with self._alone():
            os.close(self._using)
            self._using = os.open(self._shared / "samba.users", os.O_RDWR)
            try:
                fcntl.flock(self._using, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._leave(last=False)
            else:
                self._leave(last=True)

    def _leave(self, *, last: bool) -> None:
        if self._alive != -1:
            os.close(self._alive)
        if self._using != -1:
            os.close(self._using)
        self._alive = self._using = -1
        if last:
            self._state.unlink(missing_ok=True)
            if self._pid and self._runs(_STOP_TIMEOUT):
                with suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
                self._runs(_STOP_TIMEOUT)
            shutil.rmtree(self.directory, ignore_errors=True)


@pytest.fixture(scope="session")
def samba_kdc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SambaKdc]:
    """The domain, for the whole session."""
    require(SimpleNamespace(available=available))
    own = tmp_path_factory.getbasetemp()
    # With pytest-xdist each worker has a directory of its own within that of the run.
    kdc = SambaKdc(own.parent if "PYTEST_XDIST_WORKER" in os.environ else own)
    try:
        yield kdc
    finally:
        kdc.stop()
