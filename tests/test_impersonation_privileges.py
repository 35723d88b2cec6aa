"""What impersonation needs, and that its lack is told at the start; each case in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from local_users import Users
from programs import environment

pytest.importorskip("triosspi._thread_ids", reason="Linux's own")

TESTS = Path(__file__).parent

# All imports first: who is nobody may not read this directory.
PRELUDE = """
import codecs, ctypes, grp, json, os, pwd, subprocess, sys
import trio, trio.testing
from triosspi import AccountMap, ConfigurationError, Impersonation, ImpersonationError, LocalAccount, _thread_ids
from triosspi.impersonation.linux import thread_identity

for name in ("ascii", "utf-16-le", "idna"):
    codecs.lookup(name)

sys.path.insert(0, sys.argv[1])
path, *names = sys.argv[2:]
alice, bob, service = map(LocalAccount.lookup, names)
libc = ctypes.CDLL(None, use_errno=True)
SETGID, SETUID, KILL = 1 << 6, 1 << 7, 1 << 5

def drop(to, kept, ambient=0):
    # As systemd does for User= with CapabilityBoundingSet= and AmbientCapabilities=.
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setgroups(to.groups)
    os.setresgid(to.gid, to.gid, to.gid)
    os.setresuid(to.uid, to.uid, to.uid)
    _thread_ids.set_capabilities(kept, kept, ambient)
    _thread_ids.raise_ambient(ambient)

def show(function, *args):
    # What comes of it, as JSON.
    try:
        print(json.dumps(function(*args), default=str))
    except Exception as exc:
        print(json.dumps([type(exc).__name__, str(exc)]))
"""


def child(users: Users, path: Path, program: str) -> subprocess.CompletedProcess[str]:
    # Who is nobody may not write coverage's data either, and would say so.
    surroundings = {name: value for name, value in environment().items() if not name.startswith("COVERAGE_")}
    return subprocess.run(
        [
            *(sys.executable, "-c", PRELUDE + program, str(TESTS), str(path)),
            *(users.alice.name, users.bob.name, users.service.name),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**surroundings, "PYTHONDONTWRITEBYTECODE": "1"},
    )


def answers(done: subprocess.CompletedProcess[str]) -> list[Any]:
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def account_map(users: Users) -> Path:
    """Where everybody can read it, but only root write it."""
    path = users.place / "map"
    path.write_text(f"DOM\\alice {users.alice.name}\nDOM\\bob {users.bob.name}\n")
    path.chmod(0o644)
    return path


@pytest.mark.parametrize(
    ("kept", "missing"),
    [("0", "CAP_SETUID and CAP_SETGID is"), ("SETUID", "CAP_SETGID is"), ("SETGID | KILL", "CAP_SETUID is")],
)
def test_without_the_capabilities_it_cannot_even_be_configured(
    users: Users, account_map: Path, kept: str, missing: str
) -> None:
    done = child(users, account_map, f"drop(service, {kept})\nshow(Impersonation, AccountMap(path))")
    ((kind, text),) = answers(done)
    assert kind == "ConfigurationError"
    assert text.startswith("impersonation needs the capabilities CAP_SETUID and CAP_SETGID; ")
    assert f"; {missing} not there: run as root, or better as a user with these two" in text


def test_root_without_the_capabilities_is_not_enough(users: Users, account_map: Path) -> None:
    done = child(users, account_map, "_thread_ids.set_capabilities(0, 0, 0)\nshow(Impersonation, AccountMap(path))")
    ((kind, text),) = answers(done)
    assert (kind, "not there: run as root" in text) == ("ConfigurationError", True)


@pytest.mark.parametrize("call", ["setgroups", "setresgid", "setresuid"])
def test_where_a_filter_refuses_the_calls_it_cannot_be_configured(users: Users, account_map: Path, call: str) -> None:
    """As systemd's SystemCallFilter=~@privileged, and some containers."""
    program = f"from seccomp import answer\nanswer({call!r}, 1)\nshow(Impersonation, AccountMap(path))"
    ((kind, text),) = answers(child(users, account_map, program))
    assert kind == "ConfigurationError"
    assert text.startswith(f"impersonation cannot work: {call}: Operation not permitted; is there a filter")


def test_the_command_line_says_so_in_one_line(users: Users, account_map: Path) -> None:
    program = """
sys.argv[1:] = ["serve", "--host", "127.0.0.1", "--port", "0", "--impersonate", "--account-map", path]
# Not as somebody else, who perhaps could not read the modules that it imports.
_thread_ids.set_capabilities(0, 0, 0)
from triosspi.service import cli
cli.main()
"""
    done = child(users, account_map, program)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("triosspi: impersonation needs the capabilities CAP_SETUID and CAP_SETGID")
    assert done.stderr.count("\n") == 1


# A server that is not root: a systemd unit with User= and AmbientCapabilities=


def test_a_server_with_the_two_capabilities_alone_needs_no_root(users: Users, account_map: Path) -> None:
    program = """
drop(service, SETGID | SETUID | KILL, SETGID | SETUID)
before = thread_identity()
impersonation = Impersonation(AccountMap(path))
place = os.path.dirname(path)

def work():
    with open(os.path.join(place, "of " + pwd.getpwuid(os.geteuid()).pw_name), "x"):
        pass
    with open("/proc/thread-self/status") as file:
        mine = file.read()
    return mine, subprocess.run(["/bin/cat", "/proc/self/status"], capture_output=True, text=True).stdout

async def main():
    for account in (alice, bob):
        print(json.dumps(await impersonation.run_as(account, work)))
        after = await trio.to_thread.run_sync(thread_identity)
        print(json.dumps([before == after == thread_identity(), before.ambient, before.user_ids]))
trio.run(main)
"""
    found = answers(child(users, account_map, program))
    for account, (thread, started), afterwards in zip((users.alice, users.bob), found[::2], found[1::2], strict=True):
        kept = {name: rest.split() for name, _, rest in (line.partition(":") for line in thread.splitlines())}
        shown = {name: rest.split() for name, _, rest in (line.partition(":") for line in started.splitlines())}
        uid, server = str(account.uid), str(users.service.uid)
        assert kept["Uid"] == [uid, uid, server, uid]
        assert shown["Uid"] == [uid] * 4
        for status in (kept, shown):
            assert status["Groups"] == list(map(str, account.groups))
            # KILL too, which nobody asked us to take away: the function has none of the server's power.
            for kind in ("CapEff", "CapInh", "CapAmb"):
                assert int(status[kind][0], 16) == 0
        # The way back, which no program inherits.
        assert int(kept["CapPrm"][0], 16) == 0xE0
        assert int(shown["CapPrm"][0], 16) == 0
        status = (users.place / f"of {account.name}").stat()
        assert (status.st_uid, status.st_gid) == (account.uid, account.gid)
        assert afterwards == [True, 0xC0, [users.service.uid] * 3]


def test_a_server_that_is_not_root_gives_nobody_root(users: Users, account_map: Path) -> None:
    """It could, and could not come back: whoever leaves root's id loses what was permitted."""
    account_map.write_text("DOM\\admin root\n")
    program = """
drop(service, SETGID | SETUID)
show(Impersonation, AccountMap(path))
other = os.path.join(os.path.dirname(path), "of the service")
with open(other, "w") as file:
    file.write("DOM\\\\bob " + bob.name)
os.chmod(other, 0o644)
impersonation = Impersonation(AccountMap(other))
show(trio.run, impersonation.run_as, LocalAccount.lookup("root"), int)
show(trio.run, impersonation.run_as, bob, os.geteuid)
"""
    refused, late, served = answers(child(users, account_map, program))
    assert refused[0] == "ConfigurationError"
    assert "'root' is root, which only a server started by root may become" in refused[1]
    assert late == ["ImpersonationError", "only a server started by root may become root"]
    assert served == users.bob.uid


def test_root_may_be_given_by_root_to_whom_a_line_names(users: Users, account_map: Path) -> None:
    account_map.write_text("DOM\\admin root\n")
    program = """
impersonation = Impersonation(AccountMap(path))
before = thread_identity()
def work():
    now = thread_identity()
    return now.user_ids, now.capabilities == before.capabilities, thread_identity() == before
async def main():
    account, = impersonation._accounts.named
    print(json.dumps(await impersonation.run_as(account, work)))
    print(json.dumps(await trio.to_thread.run_sync(thread_identity) == before))
trio.run(main)
"""
    (ids, power, _), same = answers(child(users, account_map, program))
    assert (ids, power, same) == ([0, 0, 0], True, True)


def test_a_process_that_impersonates_can_be_dumped_and_traced_by_root_alone(users: Users, account_map: Path) -> None:
    """The kernel sees to that; otherwise a peer's own debugger could read the server's keys."""
    program = """
PR_GET_DUMPABLE = 3
impersonation = Impersonation(AccountMap(path))
def dumpable():
    return libc.prctl(PR_GET_DUMPABLE, 0, 0, 0, 0)
print(dumpable())
print(trio.run(impersonation.run_as, alice, dumpable))
print(dumpable())
"""
    before, *after = answers(child(users, account_map, program))
    wanted = int(Path("/proc/sys/fs/suid_dumpable").read_text())
    assert before == 1
    assert after == [wanted, wanted]


def test_a_process_of_the_peers_may_not_touch_the_thread_but_by_signals(users: Users, account_map: Path) -> None:
    """What the documentation says of the price: a real id of the peer's admits signals of the peer's processes, and nothing else."""
    program = """
import threading
impersonation = Impersonation(AccountMap(path))
started, looked = threading.Event(), threading.Event()

def stay():
    started.set()
    looked.wait(30)
    return _thread_ids.thread_id()

def start_the_peers_process():
    # Before there are threads. It is the peer and nothing but, and waits to be told of one.
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            found = {}
            os.setgroups(alice.groups)
            os.setresgid(alice.gid, alice.gid, alice.gid)
            os.setresuid(alice.uid, alice.uid, alice.uid)
            thread = int(os.read(reader, 20))
            libc.ptrace.restype = ctypes.c_long
            found["attach"] = libc.ptrace(0x4206, thread, None, None)  # PTRACE_SEIZE
            for name in ("mem", "environ", "maps", "fd/0"):
                try:
                    os.close(os.open(f"/proc/{thread}/{name}", os.O_RDONLY))
                    found[name] = 0
                except OSError:
                    found[name] = -1
            try:
                os.kill(os.getppid(), 0)
                found["kill the process"] = 0
            except OSError:
                found["kill the process"] = -1
            try:
                os.kill(thread, 0)
                found["kill the thread"] = 0
            except OSError:
                found["kill the thread"] = -1
            print(json.dumps(found), flush=True)
        finally:
            os._exit(0)
    return pid, writer

pid, writer = start_the_peers_process()

async def main():
    threads = []
    def work():
        threads.append(_thread_ids.thread_id())
        stay()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(impersonation.run_as, alice, work)
        await trio.to_thread.run_sync(started.wait, 30)
        os.write(writer, b"%d" % threads[0])
        os.waitpid(pid, 0)
        looked.set()
trio.run(main)
"""
    (found,) = answers(child(users, account_map, program))
    assert found.pop("kill the thread") == 0
    assert set(found.values()) == {-1}, found


# User namespaces


NAMESPACE = """
ready, wait = os.pipe(), os.pipe()
pid = os.fork()
if pid == 0:
    assert libc.unshare(0x10000000) == 0  # CLONE_NEWUSER
    os.write(ready[1], b"x")
    os.read(wait[0], 1)
    try:
        {body}
    finally:
        sys.stdout.flush()
        os._exit(0)
os.read(ready[0], 1)
for kind, text in {maps}.items():
    with open(f"/proc/{{pid}}/{{kind}}", "w") as file:
        file.write(text)
os.write(wait[1], b"x")
os.waitpid(pid, 0)
"""


def in_a_namespace(users: Users, path: Path, body: str, **maps: str) -> list[Any]:
    return answers(child(users, path, NAMESPACE.format(body=body, maps=maps)))


CONFIGURE = "show(Impersonation, AccountMap(path))"


def test_in_a_user_namespace_without_the_ids_the_account_is_named(users: Users, account_map: Path) -> None:
    everybody, few = "0 0 65536", f"0 0 {users.alice.uid}"
    ((kind, text),) = in_a_namespace(users, account_map, CONFIGURE, uid_map=few, gid_map=everybody)
    assert kind == "ConfigurationError"
    assert text == (
        f"the local account {users.alice.name!r} has the uid {users.alice.uid}, which this user namespace does not "
        "have (/proc/self/uid_map)"
    )
    # All of somebody's groups are needed, not the primary one alone.
    lowest = min(users.alice.gid, users.team)
    ((kind, text),) = in_a_namespace(users, account_map, CONFIGURE, uid_map=everybody, gid_map=f"0 0 {lowest}")
    assert kind == "ConfigurationError"
    assert "has the gid " in text and text.endswith("does not have (/proc/self/gid_map)")


def test_in_a_user_namespace_of_one_nobody_can_be_impersonated(users: Users, account_map: Path) -> None:
    """As `unshare --map-root-user` and rootless containers make them."""
    ((kind, text),) = in_a_namespace(users, account_map, CONFIGURE, setgroups="deny", uid_map="0 0 1", gid_map="0 0 1")
    assert (kind, text) == (
        "ConfigurationError",
        "impersonation cannot work in this user namespace: /proc/self/setgroups says 'deny'",
    )
    # Nor can those be whom only a pattern will name, later.
    account_map.write_text("DOM\\* *\n")
    ((kind, text),) = in_a_namespace(users, account_map, CONFIGURE, uid_map="0 0 1", gid_map="0 0 65536")
    assert (kind, text) == ("ConfigurationError", "this user namespace has no uid from 1000 on (/proc/self/uid_map)")


def test_in_a_user_namespace_with_the_ids_it_works(users: Users, account_map: Path) -> None:
    body = """
        impersonation = Impersonation(AccountMap(path))
        before = thread_identity()
        async def main():
            print(json.dumps(await impersonation.run_as(alice, thread_identity)))
            print(json.dumps(await trio.to_thread.run_sync(thread_identity) == before))
        trio.run(main)
"""
    found, same = in_a_namespace(users, account_map, body.strip(), uid_map="0 0 65536", gid_map="0 0 65536")
    assert found[0] == [users.alice.uid, users.alice.uid, 0]
    assert found[3] == list(users.alice.groups)
    assert same is True


def test_an_account_that_only_a_pattern_named_is_an_error_when_it_comes(users: Users, account_map: Path) -> None:
    first, last = sorted((users.alice, users.bob), key=lambda account: account.uid)
    body = """
        impersonation = Impersonation(AccountMap(path))
        first, last = sorted((alice, bob), key=lambda account: account.uid)
        show(trio.run, impersonation.run_as, last, int)
        show(trio.run, impersonation.run_as, first, os.geteuid)
"""
    account_map.write_text(f"DOM\\alice {first.name}\n")
    late, served = in_a_namespace(users, account_map, body.strip(), uid_map=f"0 0 {last.uid}", gid_map="0 0 65536")
    assert late[0] == "ImpersonationError"
    assert late[1].startswith(f"cannot become {last.name!r}: [Errno 22] Invalid argument")
    assert served == first.uid
