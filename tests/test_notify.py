"""What systemd is told, on the socket that it listens on."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from triosspi.service.observe.notify import VARIABLES, Notifier

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="systemd is Linux's")


class Manager:
    """The service manager's end, as systemd opens it."""

    def __init__(self, address: str | bytes) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(address)
        self.sock.setblocking(False)

    def told(self) -> list[str]:
        """Every message so far."""
        messages = []
        while True:
            try:
                messages.append(self.sock.recv(65536).decode())
            except BlockingIOError:
                return messages


@pytest.fixture
def path(tmp_path: Path) -> str:
    # Shorter than what a socket's address may have.
    return os.path.relpath(tmp_path / "notify")


@pytest.fixture
def manager(path: str) -> Iterator[Manager]:
    manager = Manager(path)
    with manager.sock:
        yield manager


def test_each_state_is_one_datagram_in_sd_notifys_words(manager: Manager, path: str) -> None:
    notifier = Notifier(path)
    assert notifier
    before = time.monotonic_ns() // 1000
    notifier.ready()
    notifier.ready("2 workers")
    notifier.reloading()
    notifier.status("half awake")
    notifier.stopping()
    notifier.alive()
    ready, again, reloading, *others = manager.told()
    assert (ready, again) == ("READY=1", "READY=1\nSTATUS=2 workers")
    first, second = reloading.split("\n")
    assert first == "RELOADING=1"
    # Type=notify-reload compares it with its own clock.
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    assert others == ["STATUS=half awake", "STOPPING=1", "WATCHDOG=1"]


@pytest.mark.skipif(shutil.which("systemd-notify") is None, reason="systemd-notify is not installed")
def test_systemds_own_program_says_the_same(manager: Manager, path: str) -> None:
    command = ["systemd-notify", "--no-block", "--ready", "--status=half awake"]
    subprocess.run(command, check=True, timeout=30, env={**os.environ, "NOTIFY_SOCKET": os.path.abspath(path)})
    theirs = set("\n".join(manager.told()).split("\n"))
    Notifier(path).ready("half awake")
    assert set(manager.told()[0].split("\n")) <= theirs


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_an_at_sign_is_linuxs_abstract_namespace() -> None:
    name = f"triosspi-test-{os.getpid()}-{time.monotonic_ns()}"
    manager = Manager(b"\0" + name.encode())
    with manager.sock:
        Notifier(f"@{name}").ready()
        assert manager.told() == ["READY=1"]


def test_a_status_is_one_line_whatever_is_in_it(manager: Manager, path: str) -> None:
    Notifier(path).status("fine\nMAINPID=1\x00\x1b[31m\u2028" + "x" * 10_000)
    (told,) = manager.told()
    assert told.startswith("STATUS=fine?MAINPID=1??[31m?xxx")
    assert "\n" not in told
    assert len(told) < 500


def test_the_environment_names_the_manager_and_is_cleaned_of_it(manager: Manager, path: str) -> None:
    environment = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid()), "OTHER": "1"}
    notifier = Notifier.from_environment(environment)
    assert environment == {"OTHER": "1"}
    assert notifier.watchdog_interval == 1.5
    notifier.ready()
    assert manager.told() == ["READY=1"]


def test_a_child_process_does_not_inherit_the_managers_address(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, path)
    Notifier.from_environment()
    child = [sys.executable, "-c", "import os; print(*os.environ)"]
    shown = subprocess.run(child, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    assert not {*VARIABLES} & {*shown}


@pytest.mark.parametrize(
    ("microseconds", "pid"), [("20000000", "1"), ("", ""), ("soon", ""), ("0", ""), ("-5", ""), (str(2**64), "1")]
)
def test_a_watchdog_that_is_not_meant_for_us_or_makes_no_sense_is_none(microseconds: str, pid: str) -> None:
    given = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": microseconds, "WATCHDOG_PID": pid}
    assert Notifier.from_environment(given).watchdog_interval is None


@pytest.mark.parametrize("address", [None, ""])
async def test_without_a_manager_nothing_is_said_to_anybody(
    address: str | None, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    def no_socket(*_arguments: object) -> None:
        raise AssertionError("a socket was made")

    monkeypatch.setattr(socket, "socket", no_socket)
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address} if address is not None else {})
    assert not notifier
    notifier.ready("well")
    notifier.alive()
    with trio.move_on_after(3600) as hour:
        await notifier.keep_alive()
    assert hour.cancelled_caught


@pytest.mark.parametrize(
    "address", ["/nowhere/at/all", "@" + "x" * 200, "/" + "x" * 200, "vsock:2:1234", "@nobody\0here"]
)
def test_a_manager_that_cannot_be_reached_is_no_error(address: str) -> None:
    notifier = Notifier(address)
    # An OSError would come out of these.
    notifier.ready()
    notifier.alive()


def test_a_manager_that_does_not_read_costs_the_server_a_moment_at_most(manager: Manager, path: str) -> None:
    notifier = Notifier(path)
    for _ in range(10_000):
        notifier.alive()
    told = manager.told()
    assert 0 < len(told) < 10_000


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors of another kind")
def test_no_message_leaves_a_descriptor_open(manager: Manager, path: str) -> None:
    before = os.listdir("/dev/fd")
    for address in (path, "/nowhere"):
        Notifier(address).ready()
    assert os.listdir("/dev/fd") == before


async def test_the_watchdog_is_fed_twice_in_its_time_and_only_while_all_is_well(
    manager: Manager, path: str, autojump_clock: trio.testing.MockClock
) -> None:
    notifier = Notifier(path, watchdog=10)
    ill = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(notifier.keep_alive, lambda: not ill)
        await trio.sleep(21)
        assert manager.told() == ["WATCHDOG=1"] * 5
        ill = True
        await trio.sleep(20)
        assert manager.told() == []
        ill = False
        await trio.sleep(10)
        assert manager.told() == ["WATCHDOG=1"] * 2
        nursery.cancel_scope.cancel()
