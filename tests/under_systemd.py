"""The units of deploy/ under a real systemd: a process for test_deploy.

    python under_systemd.py FOLDER ACCOUNTS

A user's instance of systemd, run by root, in namespaces of its own: it sees no other process's control group, no other network,
and a /run that is gone with it. FOLDER has the units and drop-ins. It prints what it has seen, as JSON.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import trio

from programs import PATIENCE
from steady_load import APPLICATION, Load

SYSTEMD = "/lib/systemd/systemd"
UNIT = "triosspi.service"
PORT = 2000
# Where everything that the service reads is: its /tmp and /home are not ours.
ETC = Path("/run/etc")

CONFIGURATION = """
[serve]
app = "load_application:handler"
wire = "framed"
[accept]
mechanisms = "ntlm"
[workers]
workers = 2
grace = "10s"
[log]
log_level = "warning"
[metrics]
metrics = "127.0.0.1:9464"
"""
# What cannot be here, and why: where these tests run, the interpreter is in somebody's home, and nobody reads a journal. A
# user's instance does not hand credentials over to another user, so the service runs as this one, without its capabilities.
DROP_IN = f"""
[Service]
DynamicUser=no
ProtectHome=read-only
# Where the tests may be running from.
PrivateTmp=no
ExecStart=
ExecStart={sys.executable} -m triosspi serve --config {ETC}/triosspi.toml
LoadCredential=
LoadCredential=accounts:{ETC}/accounts
# Nor may it write what the tests measure themselves with.
UnsetEnvironment=TRIOSSPI_KEYTAB COVERAGE_PROCESS_CONFIG COVERAGE_PROCESS_START
Environment=SERVER_NAME=unit PYTHONPATH={ETC}
StandardOutput=append:/run/log
StandardError=append:/run/log
WatchdogSec=2s
"""


@functools.cache
def missing() -> str | None:
    """Why it cannot run here, if it cannot."""
    if os.geteuid() != 0:
        return "systemd in namespaces of its own needs root"
    if not os.access(SYSTEMD, os.X_OK):
        return "no systemd"
    if _control_groups() is None:
        return "no control groups of version 2"
    tried = subprocess.run(["unshare", "--mount", "--cgroup", "--net", "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "no namespaces"


def run(folder: Path, accounts: Path) -> dict[str, Any]:
    """Run it; returns what it has seen."""
    enter = ["sh", "-c", 'echo $$ >"$0" && exec "$@"']
    unshare = ["unshare", "--mount", "--cgroup", "--net", "--propagation", "private"]
    inside = [sys.executable, __file__, os.fspath(folder), os.fspath(accounts)]
    with _control_group() as group:
        done = subprocess.run(
            [*enter, os.fspath(group / "cgroup.procs"), *unshare, *inside],
            capture_output=True,
            text=True,
            timeout=3 * PATIENCE,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


@contextmanager
def _control_group() -> Iterator[Path]:
    """A control group of its own: an instance of systemd moves all that is in its own to one below, whosever it is."""
    above = _control_groups()
    assert above is not None
    group = above / f"triosspi-test-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        for directory, _, _ in os.walk(group, topdown=False):
            with suppress(OSError):
                os.rmdir(directory)


def _control_groups() -> Path | None:
    """This process's, in the hierarchy of version 2, if it may make others there."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    where = [fields[4] for fields in mounts if "cgroup2" in fields[fields.index("-") :]]
    own = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::/")]
    if not where or not own:
        return None
    found = Path(where[0]) / own[0].lstrip("/")
    return found if os.access(found, os.W_OK) else None


# ---- inside ----


def _mount(kind: str, where: str) -> None:
    subprocess.run(["mount", "-t", kind, kind, where], check=True)


def _prepare() -> None:
    """Make this process's own world: control groups, /run, the loopback interface."""
    subprocess.run(["umount", "-l", "/sys/fs/cgroup"], check=True)
    _mount("cgroup2", "/sys/fs/cgroup")
    _mount("tmpfs", "/run")
    # A helper of systemd's mounts the credentials, in a namespace of its own, for the service to see.
    subprocess.run(["mount", "--make-rshared", "/"], check=True)
    # What an instance for a user takes for granted: that there is one for the system, and what that has made.
    inaccessible = Path("/run/systemd/inaccessible")
    for directory in (Path("/run/systemd/system"), inaccessible, Path("/run/instance"), Path("/run/home"), ETC):
        directory.mkdir(parents=True)
    Path("/run/instance").chmod(0o700)
    (inaccessible / "dir").mkdir(0)
    for name, kind in (("reg", stat.S_IFREG), ("fifo", stat.S_IFIFO), ("chr", stat.S_IFCHR), ("blk", stat.S_IFBLK)):
        os.mknod(inaccessible / name, kind, os.makedev(0, 0))
    with socket.socket() as sock:
        # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING
        fcntl.ioctl(sock, 0x8914, struct.pack("16sh", b"lo", 0x41))


@contextmanager
def _systemd(folder: Path) -> Iterator[None]:
    os.environ.update(
        XDG_RUNTIME_DIR="/run/instance",
        HOME="/run/home",
        SYSTEMD_LOG_TARGET="console",
        SYSTEMD_UNIT_PATH=f"{folder}:",
    )
    with (
        open("/run/systemd.log", "wb") as log,
        subprocess.Popen([SYSTEMD, "--user", "--unit=basic.target"], stdout=log, stderr=log) as process,
    ):
        try:
            _wait_until_it_answers()
            yield
        finally:
            process.terminate()


def _wait_until_it_answers() -> None:
    for _ in range(int(PATIENCE / 0.1)):
        if _ask("is-system-running").stdout.strip() in {"running", "degraded"}:
            return
        # A process that nobody here has written: there is nothing but to ask again.
        signal.sigtimedwait([], 0.1)
    raise RuntimeError(Path("/run/systemd.log").read_text())


def _ask(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemctl", "--user", *words], capture_output=True, text=True, check=False, timeout=PATIENCE
    )


async def _do(*words: str) -> None:
    done = await trio.to_thread.run_sync(partial(_ask, *words))
    if done.returncode:
        shown = _ask("status", "--no-pager", UNIT).stdout
        raise RuntimeError(f"systemctl {' '.join(words)}: {done.stderr}\n{shown}\n{_log()}")


def _log() -> str:
    log = Path("/run/log")
    return log.read_text() if log.exists() else ""


def _shown(*names: str) -> dict[str, str]:
    lines = _ask("show", UNIT, *(f"--property={name}" for name in names)).stdout.splitlines()
    return dict(line.split("=", 1) for line in lines)


def _processes() -> dict[str, dict[str, str]]:
    """What /proc says of each of the service's processes."""
    group = Path("/sys/fs/cgroup") / _shown("ControlGroup")["ControlGroup"].lstrip("/")
    found = {}
    for pid in (group / "cgroup.procs").read_text().split():
        fields = (line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        found[pid] = {
            name: value.strip() for name, value in fields if name in {"CapEff", "CapBnd", "NoNewPrivs", "Seccomp"}
        }
    return found


async def _scenario() -> dict[str, Any]:
    seen: dict[str, Any] = {}
    load = Load("127.0.0.1", PORT, talkers=4, callers=2)
    await _do("start", "triosspi.socket", UNIT)
    seen["started"] = _shown("ActiveState", "StatusText", "Type")
    seen["processes"] = _processes()
    async with load.running():
        await load.answered("unit", 50)
        await _do("restart", UNIT)
        await load.answered("unit", 50)
        await _do("reload", UNIT)
        await load.answered("unit", 50)
        seen["failures"] = [asdict(failure) for failure in load.failures]
        seen["goodbyes"] = load.goodbyes
        # Whatever hangs is found out by the watchdog, and started again.
        os.kill(int(_shown("MainPID")["MainPID"]), signal.SIGSTOP)
        with trio.fail_after(PATIENCE):
            while _shown("NRestarts")["NRestarts"] == "0":  # noqa: ASYNC110 - systemd's doing
                await trio.sleep(0.1)
        await load.answered("unit", 50)
    await _do("stop", UNIT)
    seen["stopped"] = _shown("ActiveState", "Result")
    seen["log"] = _log()
    return seen


def main(folder: Path, accounts: Path) -> NoReturn:
    _prepare()
    (ETC / "triosspi.toml").write_text(CONFIGURATION)
    (ETC / "load_application.py").write_text(APPLICATION)
    (ETC / "accounts").write_bytes(accounts.read_bytes())
    (ETC / "accounts").chmod(0o600)
    with _systemd(folder):
        print(json.dumps(trio.run(_scenario)))
    sys.exit()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
