"""Where a server listens, with real sockets: TCP, unix, inherited; and what is done to accepted connections."""

from __future__ import annotations

import errno
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from harness import has_ipv6, make_acceptor, reset_connection
from triosspi import ConfigurationError, SSPIListener
from triosspi.service.config.settings import Listen
from triosspi.service.network import listening
from triosspi.service.network.descriptors import _adopt, inherited_listeners
from triosspi.service.network.listening import (
    ANY_HOST,
    close_listeners,
    open_listeners,
    queued,
    remove_socket_files,
    source_of,
    tune,
    where,
)
from triosspi.service.workers.balance import BalancedListener, OwnLoad
from triosspi.tcp.accepting import accept, remember

LOCAL = "127.0.0.1"


@dataclass(frozen=True)
class Where:
    hosts: tuple[str, ...] = (LOCAL,)
    port: int = 0
    unix: tuple[Path, ...] = ()
    unix_mode: int = 0o600
    backlog: int | None = None


@asynccontextmanager
async def listening_on(settings: Any, environ: Any = None) -> Any:
    listeners = await open_listeners(settings, {} if environ is None else environ)
    try:
        yield listeners
    finally:
        await close_listeners(listeners)


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def open_descriptors() -> set[str]:
    directory = Path("/proc/self/fd")
    # Without the one that the directory was read by.
    return {name for name in os.listdir(directory) if (directory / name).is_symlink()} if directory.exists() else set()


@pytest.fixture
def nothing_left_open() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() <= before


async def connected(listener: trio.SocketListener) -> tuple[trio.SocketStream, trio.SocketStream]:
    """(client, server)."""
    client = trio.socket.socket(listener.socket.family)
    await client.connect(listener.socket.getsockname())
    return trio.SocketStream(client), await listener.accept()


# ---- TCP ----


async def test_by_default_every_interface_is_bound_ipv4_and_ipv6_on_one_port() -> None:
    async with listening_on(Where(hosts=())) as listeners:
        names = [listener.socket.getsockname() for listener in listeners]
    assert [name[0] for name in names] == list(ANY_HOST[: 1 + has_ipv6()])
    assert len({name[1] for name in names}) == 1


async def test_the_settings_of_the_configuration_are_what_is_asked_for() -> None:
    async with listening_on(Listen(hosts=(LOCAL,), port=0)) as listeners:
        client, server = await connected(listeners[0])
        async with client, server:
            assert where(listeners[0]) == f"127.0.0.1:{server.socket.getsockname()[1]}"


async def test_every_host_named_is_bound_on_one_port() -> None:
    async with listening_on(Where(hosts=(LOCAL, "127.0.0.2", "127.0.0.3"))) as listeners:
        texts = [where(listener) for listener in listeners]
    port = texts[0].rpartition(":")[2]
    assert texts == [f"127.0.0.{number}:{port}" for number in (1, 2, 3)]
    assert int(port) > 0


class Names(trio.abc.HostnameResolver):
    """Knows one name, which has these addresses."""

    def __init__(self, *addresses: str) -> None:
        self._addresses = addresses

    async def getaddrinfo(self, host: Any, port: Any, *_args: Any) -> Any:
        assert host in (b"everywhere", "everywhere")
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in self._addresses
        ]

    async def getnameinfo(self, *_args: Any) -> Any:
        raise AssertionError


async def test_all_addresses_of_a_name_are_bound_on_one_port_and_each_once() -> None:
    addresses = [LOCAL, "127.0.0.2", *(["::1"] if has_ipv6() else [])]
    trio.socket.set_custom_hostname_resolver(Names(*addresses, LOCAL))
    async with listening_on(Where(hosts=("everywhere",))) as listeners:
        names = [listener.socket.getsockname() for listener in listeners]
    assert [name[0] for name in names] == addresses
    assert len({name[1] for name in names}) == 1


async def test_a_name_with_an_ipv6_address_is_bound_on_a_machine_whose_kernel_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listening, "_has_ipv6", lambda: False)
    trio.socket.set_custom_hostname_resolver(Names("::1", LOCAL))
    async with listening_on(Where(hosts=("everywhere",))) as listeners:
        assert [listener.socket.getsockname()[0] for listener in listeners] == [LOCAL]


def test_a_kernel_without_ipv6_is_one_that_makes_no_such_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any) -> Any:
        raise OSError(errno.EAFNOSUPPORT, "no IPv6")

    monkeypatch.setattr(socket, "socket", refuse)
    assert not listening._has_ipv6()


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
async def test_a_machine_without_ipv6_is_served_on_ipv4_unless_ipv6_was_asked_for(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind = listening._bind

    def without_ipv6(family: Any, *args: Any, **others: Any) -> Any:
        if family == socket.AF_INET6:
            raise OSError(number, "what the system says about it")
        return bind(family, *args, **others)

    monkeypatch.setattr(listening, "_bind", without_ipv6)
    async with listening_on(Where(hosts=())) as listeners:
        assert [listener.socket.getsockname()[0] for listener in listeners] == ["0.0.0.0"]
    with pytest.raises(ConfigurationError, match=r"^cannot listen on \[::1\]:\d+: "):
        await open_listeners(Where(hosts=(LOCAL, "::1")), {})


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """A machine that has not these addresses, as a container has no ::1."""

    class Socket(socket.socket):
        def bind(self, address: Any) -> None:
            if address[0] in missing:
                raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
            super().bind(address)

    monkeypatch.setattr(socket, "socket", Socket)


@pytest.mark.parametrize("missing", ["127.0.0.2", LOCAL, "127.0.0.3"])
async def test_of_the_addresses_of_a_name_those_are_bound_that_the_machine_has_and_the_others_are_told(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, nothing_left_open: None
) -> None:
    # "localhost" in Docker: /etc/hosts has ::1, and there is no IPv6.
    addresses = [LOCAL, "127.0.0.2", "127.0.0.3"]
    trio.socket.set_custom_hostname_resolver(Names(*addresses))
    without(monkeypatch, missing)
    async with listening_on(Where(hosts=("everywhere",))) as listeners:
        names = [listener.socket.getsockname() for listener in listeners]
    assert [name[0] for name in names] == [address for address in addresses if address != missing]
    assert len({name[1] for name in names}) == 1
    (text,) = [record.getMessage() for record in caplog.records if record.name == "triosspi.server"]
    port = names[0][1]
    assert text == f"not listening on {missing}:{port}, an address of 'everywhere': Cannot assign requested address"


async def test_an_address_that_was_written_down_or_a_name_with_no_other_must_be_there(
    monkeypatch: pytest.MonkeyPatch, nothing_left_open: None
) -> None:
    trio.socket.set_custom_hostname_resolver(Names("127.0.0.2", "127.0.0.3"))
    without(monkeypatch, "127.0.0.2", "127.0.0.3")
    for hosts in ((LOCAL, "127.0.0.2"), ("127.0.0.2", LOCAL), ("everywhere",), (LOCAL, "everywhere")):
        with pytest.raises(ConfigurationError, match=r"^cannot listen on .*: Cannot assign requested address; choose"):
            await open_listeners(Where(hosts=hosts), {})


async def test_another_error_of_one_of_the_addresses_of_a_name_is_one(nothing_left_open: None) -> None:
    trio.socket.set_custom_hostname_resolver(Names("127.77.0.3", "127.77.0.4"))
    with socket.socket() as taken:
        taken.bind(("127.77.0.4", 0))
        taken.listen()
        with pytest.raises(ConfigurationError, match="Address already in use"):
            await open_listeners(Where(hosts=("everywhere",), port=taken.getsockname()[1]), {})


# Takes the IPv6 address from loopback, in a network of its own and nowhere else.
WITHOUT_IPV6 = """
import fcntl, os, socket, struct, sys
import trio
from triosspi import open_sspi_over_tcp_listeners
from triosspi.service.config.settings import Listen
from triosspi.service.network.listening import open_listeners, where
from triosspi.service.observe.status import Health, StatusServer
from harness import make_acceptor

if os.readlink("/proc/self/ns/net") == sys.argv[1]:
    sys.exit("this is not a network of our own")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    fcntl.ioctl(sock, 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
    fcntl.ioctl(sock, 0x8936, socket.inet_pton(socket.AF_INET6, "::1") + struct.pack("Ii", 128, 1))  # SIOCDIFADDR

async def main():
    for listener in await open_listeners(Listen(hosts=("two",), port=2000)):
        print(where(listener))
    for listener in await open_sspi_over_tcp_listeners(2001, make_acceptor(), host="two"):
        print(where(listener.transport_listener))

found = socket.getaddrinfo

def getaddrinfo(host, port, *args, **options):
    if host not in ("two", b"two"):
        return found(host, port, *args, **options)
    return [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
    ]

socket.getaddrinfo = getaddrinfo
trio.run(main)
with StatusServer(("two", 2002), Health()) as status:
    print(*status.address, sep=":")
"""


def test_a_name_with_an_ipv6_address_is_listened_on_where_the_machine_has_ipv6_and_not_the_address() -> None:
    here = Path("/proc/self/ns/net")
    inside = ["unshare", "--user", "--map-root-user", "--net"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*inside, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("no network of one's own can be had here")
    ended = subprocess.run(
        [*inside, sys.executable, "-W", "ignore::ResourceWarning", "-c", WITHOUT_IPV6, os.readlink(here)],
        env={**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout.split()) == (0, [f"127.0.0.1:{port}" for port in (2000, 2001, 2002)]), (
        ended.stderr
    )


async def test_a_port_in_use_is_an_error_and_what_was_bound_already_is_free_again(nothing_left_open: None) -> None:
    # Two hosts, and only the second one's port is taken. (On 127.0.0.1 it may be a client's of another test.)
    with socket.socket() as taken, socket.socket() as again:
        taken.bind(("127.77.0.2", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError) as caught:
            await open_listeners(Where(hosts=("127.77.0.1", "127.77.0.2"), port=port), {})
        again.bind(("127.77.0.1", port))
    assert str(caught.value) == (
        f"cannot listen on 127.77.0.2:{port}: Address already in use; choose others with --host and --port"
    )


@pytest.mark.parametrize(("failures", "opened"), [(3, True), (10, False)])
async def test_where_the_systems_choice_is_taken_on_another_address_there_is_another_try(
    failures: int, opened: bool, monkeypatch: pytest.MonkeyPatch, nothing_left_open: None
) -> None:
    bind, tries = listening._bind, 0

    def unlucky(family: Any, address: Any, *args: Any, **others: Any) -> Any:
        nonlocal tries
        if address[0] == "127.0.0.2":
            tries += 1
            if tries <= failures:
                raise OSError(errno.EADDRINUSE, "in use")
        return bind(family, address, *args, **others)

    monkeypatch.setattr(listening, "_bind", unlucky)
    if opened:
        async with listening_on(Where(hosts=(LOCAL, "127.0.0.2"))) as listeners:
            assert len({listener.socket.getsockname()[1] for listener in listeners}) == 1
    else:
        with pytest.raises(ConfigurationError, match=r"^cannot listen on 127\.0\.0\.2:\d+: Address already in use; "):
            await open_listeners(Where(hosts=(LOCAL, "127.0.0.2")), {})
    assert tries == min(failures + 1, 10)


async def test_a_host_that_is_not_found_is_an_error() -> None:
    class NoSuchName(Names):
        async def getaddrinfo(self, *_args: Any) -> Any:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    trio.socket.set_custom_hostname_resolver(NoSuchName())
    with pytest.raises(ConfigurationError, match=r"^cannot listen on nowhere:0: Name or service not known; choose "):
        await open_listeners(Where(hosts=("nowhere",)), {})


async def test_a_host_that_no_name_can_be_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"^cannot listen on a\.\.b:0: no host can be called so; choose "):
        await open_listeners(Where(hosts=("a..b",)), {})


async def test_a_restart_need_not_wait_for_the_last_connections_to_be_forgotten() -> None:
    async with listening_on(Where()) as listeners:
        port = listeners[0].socket.getsockname()[1]
        client, server = await connected(listeners[0])
        # Who closes first keeps the address for a minute (TIME_WAIT).
        await server.aclose()
        assert await client.receive_some() == b""
        await client.aclose()
    async with listening_on(Where(port=port)):
        pass


@pytest.mark.parametrize("backlog", [None, 1, 70_000])
async def test_any_backlog_is_taken(backlog: int | None) -> None:
    # Listening would raise on what the system does not take; with a queue of none nobody could connect.
    async with listening_on(Where(backlog=backlog)) as listeners:
        client, server = await connected(listeners[0])
        async with client, server:
            pass


# ---- unix sockets ----


async def test_a_unix_socket_is_listened_on_with_its_mode_whatever_the_umask_is(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    for umask, mode in ((0o777, 0o666), (0o000, 0o600), (0o022, 0o660)):
        before = os.umask(umask)
        try:
            listeners = await open_listeners(Where(hosts=(), unix=(path,), unix_mode=mode), {})
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.lstat().st_mode) == mode
        client, server = await connected(listeners[0])
        async with client, server:
            await client.send_all(b"x")
            assert await server.receive_some() == b"x"
        assert where(listeners[0]) == f"unix:{path}"
        await close_listeners(listeners)
        assert not path.exists()


async def test_nobody_can_connect_before_the_mode_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tried = tmp_path / "socket", []
    chmod = Path.chmod

    def connect_first(self: Path, mode: int) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            tried.append(client.connect_ex(os.fspath(path)))
        chmod(self, mode)

    monkeypatch.setattr(Path, "chmod", connect_first)
    async with listening_on(Where(hosts=(), unix=(path,))):
        assert tried == [errno.ECONNREFUSED]


async def test_where_a_unix_socket_is_named_and_no_host_there_is_no_tcp(tmp_path: Path) -> None:
    paths = (tmp_path / "one", tmp_path / "two")
    async with listening_on(Where(hosts=(), unix=paths)) as listeners:
        assert [where(listener) for listener in listeners] == [f"unix:{path}" for path in paths]
    async with listening_on(Where(unix=paths)) as listeners:
        assert [listener.socket.family for listener in listeners] == [socket.AF_INET, *[socket.AF_UNIX] * 2]


async def test_the_socket_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
        dead.listen()
    # Listening would raise, the address being in use; or the connection, nobody being there.
    async with listening_on(Where(hosts=(), unix=(path,))) as listeners:
        client, server = await connected(listeners[0])
        async with client, server:
            pass


@pytest.mark.parametrize("full", [False, True])
async def test_the_socket_of_a_live_server_is_left_alone(full: bool, tmp_path: Path, nothing_left_open: None) -> None:
    path = tmp_path / "socket"
    with ExitStack() as stack:
        alive = stack.enter_context(socket.socket(socket.AF_UNIX))
        alive.bind(os.fspath(path))
        alive.listen(0)
        if full:
            # As many wait as may: who tries to connect would wait, too.
            for _ in range(2):
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect_ex(os.fspath(path))
        with pytest.raises(ConfigurationError) as caught:
            await open_listeners(Where(unix=(path,)), {})
        assert path.is_socket()
    assert str(caught.value) == (f"cannot listen on '{path}': Address already in use; choose another with --unix")


async def test_a_file_that_goes_while_it_is_looked_at_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    is_socket = stat.S_ISSOCK

    def look_and_lose(mode: int) -> bool:
        path.unlink(missing_ok=True)
        return is_socket(mode)

    monkeypatch.setattr("triosspi.service.network.unix_sockets.stat.S_ISSOCK", look_and_lose)
    async with listening_on(Where(hosts=(), unix=(path,))):
        assert os.listdir(tmp_path) == ["socket"]


@pytest.mark.parametrize("kind", ["file", "directory", "link to a dead socket", "dangling link", "fifo"])
async def test_what_is_not_a_socket_is_never_removed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        target = tmp_path / "target"
        path.symlink_to(target)
        if kind != "dangling link":
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(os.fspath(target))
    before = sorted((name, os.lstat(tmp_path / name).st_ino) for name in os.listdir(tmp_path))
    with pytest.raises(ConfigurationError, match="what is there is not a socket; choose another with --unix"):
        await open_listeners(Where(hosts=(), unix=(path,)), {})
    assert sorted((name, os.lstat(tmp_path / name).st_ino) for name in os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("name", "why"),
    [("missing/socket", "No such file or directory"), ("x" * 200, "AF_UNIX path too long"), ("a\0b", "no file can be")],
)
async def test_a_path_that_cannot_be_bound_is_an_error(
    name: str, why: str, tmp_path: Path, nothing_left_open: None
) -> None:
    first = tmp_path / "first"
    with pytest.raises(ConfigurationError, match=rf"^cannot listen on '.*: {why}.*; choose another with --unix$"):
        await open_listeners(Where(unix=(first, tmp_path / name)), {})
    # The one that had been opened already is gone, too.
    assert not first.exists()


@pytest.mark.parametrize("method", ["chmod", "lstat"])
async def test_a_socket_that_cannot_be_set_up_leaves_no_file(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_left_open: None
) -> None:
    path = tmp_path / "socket"
    real = getattr(Path, method)

    def failing(self: Path, *args: Any) -> Any:
        if self == path and os.path.lexists(path):
            raise PermissionError(errno.EPERM, "no")
        return real(self, *args)

    monkeypatch.setattr(Path, method, failing)
    with pytest.raises(ConfigurationError, match="Operation not permitted"):
        await open_listeners(Where(hosts=(), unix=(path,)), {})
    assert os.listdir(tmp_path) == []


async def test_a_system_without_unix_sockets_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triosspi.service.network.unix_sockets.UNIX", None)
    with pytest.raises(ConfigurationError, match="this system has no unix sockets"):
        await open_listeners(Where(hosts=(), unix=(tmp_path / "socket",)), {})


async def test_a_file_that_another_server_has_put_there_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listeners = await open_listeners(Where(hosts=(), unix=(path,)), {})
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(os.fspath(path))
        await close_listeners(listeners)
        assert path.is_socket()


async def test_a_file_that_is_gone_already_is_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listeners = await open_listeners(Where(hosts=(), unix=(path,)), {})
    path.unlink()
    remove_socket_files(listeners)
    assert not path.exists()
    # The second time nothing is there to close, either.
    await close_listeners(listeners)
    await close_listeners(listeners)


async def test_a_new_server_takes_the_path_of_one_that_only_drains_and_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    draining = await open_listeners(Where(hosts=(), unix=(path,)), {})
    await draining[0].aclose()
    async with listening_on(Where(hosts=(), unix=(path,))) as listeners:
        remove_socket_files(draining)
        client, server = await connected(listeners[0])
        async with client, server:
            pass
    assert not path.exists()


async def test_a_relative_path_is_found_again_after_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listeners = await open_listeners(Where(hosts=(), unix=(Path("socket"),)), {})
    monkeypatch.chdir("/")
    await close_listeners(listeners)
    assert not (tmp_path / "socket").exists()


# ---- descriptors that were passed on ----

# Puts each of its descriptors where systemd does, says so in the variables, and becomes Python with the code given.
SYSTEMD = """
import fcntl, os, sys
count = int(sys.argv[1])
descriptors = [int(fd) for fd in sys.argv[2:2 + count]]
# First out of the way of each other.
spare = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in descriptors]
for number, fd in enumerate(spare):
    os.dup2(fd, 3 + number, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count), LISTEN_FDNAMES=sys.argv[2 + count])
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[3 + count:]])
"""

SERVER = """
import os, subprocess, sys, trio
from triosspi import ConfigurationError
from triosspi.service.network.listening import open_listeners, where
from triosspi.service.config.settings import Listen

async def main():
    try:
        listeners = await open_listeners(Listen(port=1))  # which nobody may bind but root
    except ConfigurationError as exc:
        print("refused:", exc, flush=True)
        return
    print(*map(where, listeners), [name for name in os.environ if name.startswith("LISTEN_")], flush=True)
    print([os.get_inheritable(listener.socket.fileno()) for listener in listeners], flush=True)
    async with trio.open_nursery() as nursery:
        async def greet(listener):
            async with await listener.accept() as stream:
                await stream.send_all(b"hello")
        for listener in listeners:
            nursery.start_soon(greet, listener)

trio.run(main)
"""


def start_as_systemd_does(sockets: list[socket.socket], names: str) -> subprocess.Popen[str]:
    numbers = [str(sock.fileno()) for sock in sockets]
    return subprocess.Popen(
        [sys.executable, "-c", SYSTEMD, str(len(numbers)), *numbers, names, textwrap.dedent(SERVER)],
        pass_fds=[sock.fileno() for sock in sockets],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_sockets_that_systemd_has_opened_are_served_and_no_others(tmp_path: Path) -> None:
    with ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server((LOCAL, 0)))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(os.fspath(tmp_path / "socket"))
        unix.listen()
        process = stack.enter_context(start_as_systemd_does([tcp, unix], "one:two"))
        assert process.stdout is not None
        port = tcp.getsockname()[1]
        assert process.stdout.readline() == f"127.0.0.1:{port} unix:{tmp_path / 'socket'} []\n"
        assert process.stdout.readline() == "[False, False]\n"
        for listening_socket in (tcp, unix):
            with socket.socket(listening_socket.family) as client:
                client.settimeout(30)
                client.connect(listening_socket.getsockname())
                assert client.recv(100) == b"hello"
        assert process.wait(30) == 0
    # Systemd's to remove.
    assert (tmp_path / "socket").is_socket()


def test_a_connection_or_a_datagram_socket_from_systemd_is_refused_with_its_name() -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((LOCAL, 0)))
        datagrams = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        connection = stack.enter_context(socket.create_connection(listener.getsockname()))
        for wrong, why in (
            (datagrams, "neither a TCP nor a unix stream socket (ListenStream=)"),
            (connection, "it does not listen (is it a connection? Accept=no)"),
        ):
            process = stack.enter_context(start_as_systemd_does([listener, wrong], "good:bad"))
            assert process.stdout is not None
            assert process.stdout.readline() == f"refused: cannot listen on descriptor 4 ('bad'): {why}\n"
            assert process.wait(30) == 0


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": "{pid}"},
        {"LISTEN_PID": "{pid}", "LISTEN_FDS": "0", "LISTEN_FDNAMES": ""},
    ],
)
def test_sockets_for_another_process_are_not_taken_and_the_variables_go(environ: dict[str, str]) -> None:
    environ = {name: value.format(pid=os.getpid()) for name, value in environ.items()} | {"PATH": "/bin"}
    assert inherited_listeners(environ) == []
    assert environ == {"PATH": "/bin"}


@pytest.mark.parametrize("name", ["LISTEN_PID", "LISTEN_FDS"])
@pytest.mark.parametrize("value", ["", "x", "-1", "1.0", " 1", "\N{ARABIC-INDIC DIGIT ONE}", "9" * 5000])
def test_variables_that_make_no_sense_are_an_error(name: str, value: str) -> None:
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", name: value}
    with pytest.raises(ConfigurationError, match=f"^the variable {name} is '.*, which it cannot be$"):
        inherited_listeners(environ)
    assert environ == {}


def test_descriptors_that_were_announced_and_are_not_there_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # Far above all that are open here: this process's own 3 must not be taken.
    monkeypatch.setattr("triosspi.service.network.descriptors._FIRST", 900)
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "9999", "LISTEN_FDNAMES": "web"}
    with pytest.raises(
        ConfigurationError, match=r"^cannot listen on descriptor 900 \('web'\), .*: Bad file descriptor$"
    ):
        inherited_listeners(environ)


def adopted(descriptors: list[int]) -> list[trio.SocketListener]:
    """As those that systemd passes on, which are always those from 3 on."""
    return _adopt((fd, "") for fd in descriptors)


def test_a_descriptor_that_is_no_socket_is_an_error_and_all_that_were_taken_are_closed() -> None:
    with socket.create_server((LOCAL, 0)) as server, open(os.devnull, "rb") as null:
        fds = [os.dup(server.fileno()), os.dup(null.fileno())]
        with pytest.raises(ConfigurationError, match="Socket operation on non-socket"):
            adopted(fds)
        for fd in fds:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)


async def test_descriptors_that_were_passed_on_are_listeners_like_any_other(tmp_path: Path) -> None:
    settings = Where(hosts=(LOCAL, *(["::1"] if has_ipv6() else [])), unix=(tmp_path / "socket",))
    async with listening_on(settings) as listeners:
        # As a child has them: descriptors of the same sockets.
        theirs = adopted([os.dup(listener.socket.fileno()) for listener in listeners])
        for ours, copy in zip(listeners, theirs, strict=True):
            assert where(ours) == where(copy)
            client = trio.socket.socket(ours.socket.family)
            await client.connect(ours.socket.getsockname())
            async with await copy.accept(), trio.SocketStream(client):
                pass
        await close_listeners(theirs)
        # Not the child's to remove.
        assert (tmp_path / "socket").is_socket()
        client, server = await connected(listeners[0])
        async with client, server:
            pass


# ---- accepted connections ----


def option(stream: trio.SocketStream, level: int, name: str) -> int:
    return stream.getsockopt(level, getattr(socket, name))


async def test_an_accepted_connection_does_not_delay_and_notices_a_peer_that_has_vanished() -> None:
    async with listening_on(Where()) as listeners:
        client, server = await connected(listeners[0])
        async with client, server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
            tune(server, 59.5)
            assert option(server, socket.IPPROTO_TCP, "TCP_NODELAY")
            assert option(server, socket.SOL_SOCKET, "SO_KEEPALIVE")
            times = [option(server, socket.IPPROTO_TCP, f"TCP_KEEP{name}") for name in ("IDLE", "INTVL", "CNT")]
            assert times == [60, 15, 4]
            tune(server, 1)
            assert option(server, socket.IPPROTO_TCP, "TCP_KEEPINTVL") == 1


async def test_keep_alive_can_be_off() -> None:
    async with listening_on(Where()) as listeners:
        client, server = await connected(listeners[0])
        async with client, server:
            tune(server, None)
            assert not option(server, socket.SOL_SOCKET, "SO_KEEPALIVE")
            assert option(server, socket.IPPROTO_TCP, "TCP_NODELAY")


async def test_where_the_system_has_no_such_times_its_own_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IDLE", "INTERVAL", "COUNT"):
        monkeypatch.setattr(listening, f"_KEEPALIVE_{name}", None)
    async with listening_on(Where()) as listeners:
        client, server = await connected(listeners[0])
        async with client, server:
            tune(server, 60)
            assert option(server, socket.SOL_SOCKET, "SO_KEEPALIVE")


async def test_tuning_a_unix_socket_or_one_that_is_closed_is_no_error(tmp_path: Path) -> None:
    async with listening_on(Where(unix=(tmp_path / "socket",))) as listeners:
        for listener in listeners:
            client, server = await connected(listener)
            async with client, server:
                # Either would raise an OSError: TCP's options on a unix socket, any option on a closed one.
                tune(server, 60)
                server.socket.close()
                tune(server, 60)


@pytest.mark.parametrize("host", [LOCAL, pytest.param("::1", marks=needs_ipv6)])
async def test_a_connection_tells_where_it_comes_from(host: str) -> None:
    async with listening_on(Where(hosts=(host,))) as listeners:
        client, server = await connected(listeners[0])
        async with client, server:
            port = client.socket.getsockname()[1]
            expected = (
                (IPv4Address(LOCAL), f"127.0.0.1:{port}") if host == LOCAL else (IPv6Address("::1"), f"[::1]:{port}")
            )
            assert source_of(server) == expected


@needs_ipv6
async def test_an_ipv4_client_of_a_socket_for_both_families_is_an_ipv4_client() -> None:
    # systemd opens such sockets by default.
    with socket.socket(socket.AF_INET6) as both:
        both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        both.bind(("::", 0))
        both.listen()
        (listener,) = adopted([os.dup(both.fileno())])
        client = trio.socket.socket()
        await client.connect((LOCAL, both.getsockname()[1]))
        async with trio.SocketStream(client) as stream, await listener.accept() as server:
            assert source_of(server) == (IPv4Address(LOCAL), f"127.0.0.1:{stream.socket.getsockname()[1]}")
        await listener.aclose()


async def test_a_client_of_a_unix_socket_has_no_address(tmp_path: Path) -> None:
    async with listening_on(Where(hosts=(), unix=(tmp_path / "socket",))) as listeners:
        client, server = await connected(listeners[0])
        async with client, server:
            assert source_of(server) == (None, "unix")


async def accepted_by_the_server(listener: trio.SocketListener) -> trio.SocketStream:
    return await accept(listener)


async def accepted_by_a_worker(listener: trio.SocketListener) -> trio.SocketStream:
    sock = socket.socket(fileno=os.dup(listener.socket.fileno()))
    async with BalancedListener(sock, OwnLoad(memoryview(bytearray(8)).cast("Q"), 1)) as balanced:
        return await balanced.accept()


async def accepted_while_stopping(listener: trio.SocketListener) -> trio.SocketStream:
    with trio.fail_after(60):
        await trio.lowlevel.wait_readable(listener.socket)
    (stream,) = queued(listener)
    return stream


@pytest.mark.parametrize(
    ("error", "found", "told"),
    [(errno.ECONNABORTED, 2, False), (errno.EPROTO, 2, False), (errno.EMFILE, 0, True)],
    ids=lambda value: errno.errorcode.get(value) if isinstance(value, int) and value > 2 else None,
)
async def test_who_is_queued_behind_a_connection_that_is_gone_is_not_lost(
    error: int, found: int, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The first error was taken for the end of the queue, and all behind it were reset when the socket was closed.
    errors = [error]
    accept_one = socket.socket.accept

    def fail_once(sock: socket.socket) -> Any:
        if errors:
            raise OSError(errors[0], os.strerror(errors.pop()))
        return accept_one(sock)

    async with listening_on(Where()) as listeners:
        address = listeners[0].socket.getsockname()
        with socket.create_connection(address), socket.create_connection(address), trio.fail_after(60):
            await trio.lowlevel.wait_readable(listeners[0].socket)
            monkeypatch.setattr(socket.socket, "accept", fail_once)
            streams = list(queued(listeners[0]))
            assert len(streams) == found
            for stream in streams:
                await stream.aclose()
    assert ("is reset" in caplog.text) == told


async def accepted_by_the_library(listener: trio.SocketListener) -> trio.SocketStream:
    return (await SSPIListener(listener, make_acceptor()).accept()).transport_stream


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may not know the address of who is gone")
@pytest.mark.parametrize(
    "accepted", [accepted_by_the_server, accepted_by_a_worker, accepted_while_stopping, accepted_by_the_library]
)
async def test_a_client_that_is_gone_before_it_is_accepted_still_has_an_address(
    accepted: Callable[[trio.SocketListener], Awaitable[trio.SocketStream]],
) -> None:
    # getpeername(2) does not know it any more.
    async with listening_on(Where()) as listeners:
        port = reset_connection(listeners[0].socket.getsockname())
        async with await accepted(listeners[0]) as server:
            with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
                server.socket.getpeername()
            assert source_of(server) == (IPv4Address(LOCAL), f"127.0.0.1:{port}")
            tune(server, 60)
            # It is not kept: an idle connection is to be small.
            assert source_of(server) is None


async def test_a_client_that_is_gone_where_the_system_does_not_say_who_it_was_is_from_nowhere() -> None:
    async with listening_on(Where()) as listeners:
        client, server = await connected(listeners[0])
        async with client, server:
            # As Python has an address of no bytes.
            assert source_of(remember(server, None)) is None


async def test_an_abstract_unix_socket_can_be_passed_on_and_is_named() -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux has abstract unix sockets")
    name = f"triosspi-test-{os.getpid()}-{random.randrange(2**32)}"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"\0{name}")
        sock.listen()
        (listener,) = adopted([os.dup(sock.fileno())])
        assert where(listener) == f"unix:@{name}"
        await listener.aclose()
