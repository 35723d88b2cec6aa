"""`triosspi serve --workers`, as a user has it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import trio

from forge import Client
from harness import PASSWORD, make_initiator
from programs import PATIENCE, Running, children, run, running
from triosspi import SSPIChannel, open_sspi_over_tcp_channel
from triosspi.service import account_editor

# What is left of a matrix, and what needs no hundreds of logins, is in `make test`.
LONG = pytest.mark.long("workers are started again and again, each an interpreter")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are for Linux")

APP = """
import os, trio

async def tell(channel):
    # Answers with its process; "hang" and "die" are taken at their word.
    async for message in channel:
        if message == b"hang":
            while True:
                pass
        if message == b"die":
            os._exit(7)
        await channel.send(b"%d" % os.getpid())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    account_editor.add(tmp_path / "accounts", "DOM\\alice", PASSWORD)
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


@contextmanager
def serving(folder: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[Running]:
    """Two workers that tell their numbers."""
    command = ["serve", "app:tell", "--wire", "framed", "--host", "127.0.0.1", "--port", "0", "--workers", "2"]
    command += ["--accounts", "accounts", "--log-format", "json", *options]
    with running(*command, cwd=folder, env=env) as program:
        yield program


async def log_in(port: int) -> SSPIChannel[trio.SocketStream]:
    channel = await open_sspi_over_tcp_channel("127.0.0.1", port, make_initiator())
    try:
        await channel.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(channel)
        raise
    return channel


async def ask(port: int) -> int:
    """Which worker answers. A goodbye instead of an answer says that the question was not looked at."""
    while True:
        async with await log_in(port) as channel:
            with suppress(trio.EndOfChannel):
                await channel.send(b"who")
                return int(await channel.receive())


async def ask_until(port: int, enough: Callable[[set[int]], bool]) -> set[int]:
    """Ask again and again; everybody who has answered."""
    answered: set[int] = set()
    with trio.fail_after(PATIENCE):
        while not enough(answered):
            answered.add(await ask(port))
    return answered


async def test_every_worker_serves_clients_on_the_one_port(folder: Path) -> None:
    with serving(folder) as program:
        port = program.expect_port()
        pids = set(children(program.process.pid))
        assert len(pids) == 2
        assert await ask_until(port, lambda answered: len(answered) == 2) == pids
        assert program.stop() == 0
    assert "Traceback" not in program.err


@pytest.mark.parametrize("number", [pytest.param(1, marks=LONG), 2, pytest.param(4, marks=LONG)])
async def test_wrong_passwords_are_looked_at_as_often_with_any_number_of_workers(folder: Path, number: int) -> None:
    client = Client(password="not this one")
    hello = _framed(client.negotiate())
    looked_at = 0
    with serving(folder, "--workers", str(number)) as program:
        port = program.expect_port()
        for _ in range(200):
            with trio.fail_after(PATIENCE), suppress(trio.BrokenResourceError):
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    await stream.send_all(hello)
                    if challenge := await stream.receive_some():
                        await stream.send_all(_framed(client.authenticate(bytes(challenge[4:]))))
                        assert not await stream.receive_some()
                        looked_at += 1
        assert program.stop() == 0
    # One after the other: three cost nothing, the fourth is one too many. A machine that takes its time forgets a second of
    # each of them per second.
    assert 4 <= looked_at < 10


def _framed(token: bytes) -> bytes:
    return len(token).to_bytes(4, "little") + token


async def test_the_demo_account_is_one_for_all_workers(folder: Path) -> None:
    options = ("--host", "127.0.0.1", "--port", "0", "--workers", "2", "--wire", "framed")
    with running("serve", "app:tell", *options, cwd=folder) as program:
        port = program.expect_port()
        password = program.expect(r"demo account DEMO\\guest, password (\S+);")[1]
        answered: set[int] = set()
        with trio.fail_after(PATIENCE):
            while len(answered) < 2:
                initiator = make_initiator(password, username="DEMO\\guest")
                async with await open_sspi_over_tcp_channel("127.0.0.1", port, initiator) as channel:
                    await channel.send(b"who")
                    answered.add(int(await channel.receive()))
        for pid in children(program.process.pid):
            proc = trio.Path(f"/proc/{pid}")
            for name in ("cmdline", "environ"):
                assert password.encode() not in await (proc / name).read_bytes()


async def test_a_worker_that_dies_is_replaced_and_a_client_of_the_other_notices_nothing(folder: Path) -> None:
    with serving(folder) as program:
        port = program.expect_port()
        async with await log_in(port) as stays:
            await stays.send(b"who")
            other = int(await stays.receive())
            (victim,) = set(children(program.process.pid)) - {other}
            os.kill(victim, signal.SIGKILL)
            program.expect(rf"worker \d \(process {victim}\) has ended: killed by SIGKILL", "err")
            answered = await ask_until(port, lambda answered: len(answered) == 2)
            assert other in answered
            assert victim not in answered
            await stays.send(b"who")
            assert int(await stays.receive()) == other


async def test_a_handler_that_stops_the_event_loop_costs_one_worker_which_says_where_it_was(folder: Path) -> None:
    with serving(folder, "--heartbeat-timeout", "4s") as program:
        port = program.expect_port()
        before = set(children(program.process.pid))
        async with await log_in(port) as channel:
            await channel.send(b"hang")
            with pytest.raises(trio.BrokenResourceError):
                await channel.receive()
        program.expect(r"is killed: silent for \d s", "err")
        program.expect(r'app.py", line \d+ in tell', "err")
        answered = await ask_until(port, lambda answered: len(answered) == 2)
        assert len(answered & before) == 1
        assert program.stop() == 0


async def test_stopping_lets_sessions_finish_with_a_goodbye(folder: Path) -> None:
    with serving(folder) as program:
        port = program.expect_port()
        async with AsyncExitStack() as stack:
            channels = [await stack.enter_async_context(await log_in(port)) for _ in range(4)]
            for channel in channels:
                await channel.send(b"who")
                assert int(await channel.receive()) in children(program.process.pid)
            # systemd tells everybody.
            for pid in (*children(program.process.pid), program.process.pid):
                os.kill(pid, signal.SIGTERM)
            for channel in channels:
                with pytest.raises(trio.EndOfChannel):
                    await channel.receive()
        assert await trio.to_thread.run_sync(program.wait) == 0
    assert "at once" not in program.err


@LONG
async def test_no_request_fails_while_workers_are_recycled(folder: Path) -> None:
    with serving(folder, "--max-sessions", "10") as program:
        port = program.expect_port()
        answered: set[int] = set()
        with trio.fail_after(2 * PATIENCE):

            async def ask_often() -> None:
                while len(answered) < 5:
                    answered.add(await ask(port))

            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(ask_often)
        assert program.stop() == 0
    assert "exit status 0" in program.err
    assert "SIGKILL" not in program.err


@LONG
async def test_who_is_logged_in_to_a_worker_that_is_replaced_may_finish_and_hears_a_goodbye_when_all_stop(
    folder: Path,
) -> None:
    with serving(folder, "--max-sessions", "3", "--workers", "2") as program:
        port = program.expect_port()
        async with await log_in(port) as stays:
            await stays.send(b"who")
            outworn = int(await stays.receive())
            with trio.fail_after(PATIENCE):
                while not re.search(rf'"pid": {outworn}.*no more connections are accepted', program.err):
                    await ask(port)
            for _ in range(3):
                await stays.send(b"who")
                assert int(await stays.receive()) == outworn
            program.process.send_signal(signal.SIGTERM)
            with pytest.raises(trio.EndOfChannel):
                await stays.receive()
        assert await trio.to_thread.run_sync(program.wait) == 0


def test_a_port_in_use_and_a_worker_that_cannot_start_are_one_line_each(folder: Path) -> None:
    with serving(folder) as program:
        port = program.expect_port()
        command = ("serve", "--accounts", "accounts", "--host", "127.0.0.1", "--workers", "2")
        second = run(*command, "--port", str(port), cwd=folder)
        assert second.returncode == 1
        assert "Address already in use" in second.stderr
        assert "Traceback" not in second.stderr
    # What is right for the supervisor need not be for a worker: here the file goes in between.
    (folder / "app.py").write_text("import sys\nif 'worker' in str(sys.argv): raise ValueError('not here')\n" + APP)
    failed = run(*command, "app:tell", "--port", "0", cwd=folder)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == ("triosspi: cannot load the application 'app:tell': ValueError: not here")
    assert "Traceback" not in failed.stderr


async def test_sighup_reaches_every_worker_and_a_broken_configuration_changes_nothing(folder: Path) -> None:
    config = folder / "triosspi.toml"
    config.write_text('[accept]\ndeny = ["DOM\\\\alice"]\n')
    with serving(folder, "--config", "triosspi.toml") as program:
        port = program.expect_port()
        for _ in range(4):
            with pytest.raises(trio.BrokenResourceError):
                await ask(port)
        config.write_text("[limits]\nmax_conections = 5\n")
        program.process.send_signal(signal.SIGHUP)
        program.expect("the old configuration stays.*max_conections", "err")
        for worst in (f"[limits]\nmax_connections = {'9' * 5000}\n", f"x = {'[' * 100_000}"):
            config.write_text(worst)
            told = len(program.err)
            program.process.send_signal(signal.SIGHUP)
            program.expect(rf"(?s)\A.{{{told}}}.*the old configuration stays.*triosspi.toml:\d: ", "err")
        config.write_text("[limits]\nmax_connections = 500\npenalties = false\n")
        program.process.send_signal(signal.SIGHUP)
        program.expect("(?s)(the configuration was read again.*){2}", "err")
        assert len(await ask_until(port, lambda answered: len(answered) == 2)) == 2


@LONG
async def test_a_worker_that_is_replaced_serves_by_what_was_reloaded_last_and_not_by_what_lies_on_the_disk(
    folder: Path,
) -> None:
    config = folder / "triosspi.toml"
    config.write_text("[limits]\npenalties = false\n")
    with serving(folder, "--config", "triosspi.toml") as program:
        port = program.expect_port()
        # Edited, and not reloaded; and then with a typo.
        for text in ('[accept]\ndeny = ["DOM\\\\alice"]\n', "[limits]\nmax_conections = 5\n", "x = " + "[" * 9999):
            config.write_text(text)
            before = set(children(program.process.pid))
            os.kill(min(before), signal.SIGKILL)
            answered = await ask_until(port, lambda answered, old=before: len(answered - old) == 1)  # type: ignore[misc]
            assert min(before) not in answered
        config.write_text('[accept]\ndeny = ["DOM\\\\alice"]\n[limits]\npenalties = false\n')
        for _ in range(3):
            program.process.send_signal(signal.SIGHUP)
        program.expect("(?s)(the configuration was read again.*){2}", "err")
        for _ in range(10):
            with pytest.raises(trio.BrokenResourceError):
                await ask(port)
        assert program.stop() == 0
    assert "not reloaded" not in program.err
    assert "Traceback" not in program.err


async def test_a_file_that_changes_reaches_every_worker_by_the_supervisor(folder: Path) -> None:
    config = folder / "triosspi.toml"
    config.write_text("[reload]\nwatch_files = true\n")
    with serving(folder, "--config", "triosspi.toml") as program:
        port = program.expect_port()
        text = '[reload]\nwatch_files = true\n[accept]\ndeny = ["DOM\\\\alice"]\n[limits]\npenalties = false\n'
        with trio.fail_after(PATIENCE):
            # It has begun to watch at some moment after its start.
            while "has changed" not in program.err:
                config.write_text(text := f"{text}#\n")
                await trio.sleep(0.05)
        program.expect("(?s)(the configuration was read again.*){2}", "err")
        for _ in range(10):
            with pytest.raises(trio.BrokenResourceError):
                await ask(port)
        assert program.stop() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_reload_that_hangs_holds_up_neither_clients_nor_the_end(folder: Path, workers: str) -> None:
    config = folder / "triosspi.toml"
    config.write_text("")
    # A server of files that is gone, as far as this machine can have one.
    (folder / "sitecustomize.py").write_text(
        "import os, threading\n"
        "real = os.open\n"
        "def hanging(path, *args, **options):\n"
        "    if os.fspath(path).endswith('triosspi.toml') and os.path.exists('gone'): threading.Event().wait()\n"
        "    return real(path, *args, **options)\n"
        "os.open = hanging\n"
    )
    path = {"PYTHONPATH": str(folder)}
    with serving(folder, "--config", "triosspi.toml", "--workers", workers, env=path) as program:
        port = program.expect_port()
        (folder / "gone").touch()
        program.process.send_signal(signal.SIGHUP)
        program.expect("reading the configuration again", "err")
        await ask(port)
        assert await trio.to_thread.run_sync(program.stop) == 0
    assert "Traceback" not in program.err


@pytest.mark.parametrize(
    "damage",
    [
        "removed",
        pytest.param("replaced by a file", marks=LONG),
        pytest.param("full of nonsense", marks=LONG),
        pytest.param("nowhere to make another", marks=LONG),
    ],
)
async def test_metrics_never_stop_workers_from_serving(folder: Path, tmp_path: Path, damage: str) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    options = ("--metrics", "127.0.0.1:0")
    with serving(folder, *options, env={"RUNTIME_DIRECTORY": str(runtime)}) as program:
        port = program.expect_port()
        address = program.expect(r"metrics and health on http://([^\s\"]+)", "err")[1]
        (directory,) = runtime.iterdir()
        if damage == "full of nonsense":
            for name in ("counter_1.db", "gauge_livesum_2.db"):
                (directory / name).write_bytes(b"nonsense" * 100)
        else:
            shutil.rmtree(directory)
        if damage == "replaced by a file":
            directory.write_text("")
        if damage == "nowhere to make another":
            runtime.rmdir()
        for _ in range(2):
            before = set(children(program.process.pid))
            os.kill(min(before), signal.SIGKILL)
            answered = await ask_until(port, lambda answered, old=before: len(answered - old) == 1)  # type: ignore[misc]
            assert min(before) not in answered
        shown = await trio.to_thread.run_sync(lambda: urllib.request.urlopen(f"http://{address}/metrics").read())
        assert b"triosspi_workers_ended_total 2.0" in shown
        if damage in ("removed", "replaced by a file"):
            # Those that have started since count.
            assert b"triosspi_connections_accepted_total" in shown
        assert program.stop() == 0
    assert "Traceback" not in program.err


async def test_workers_log_as_configured_and_name_themselves(folder: Path) -> None:
    with serving(folder) as program:
        port = program.expect_port()
        pids = await ask_until(port, lambda answered: len(answered) == 2)
        assert program.stop() == 0
    records = [json.loads(line) for line in program.err.splitlines()]
    assert pids <= {record["pid"] for record in records if record.get("principal") == "DOM\\alice"}


async def test_readiness_is_told_to_systemd_by_the_supervisor_alone(folder: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        path = str(tmp_path / "n")
        manager.bind(path)
        manager.settimeout(PATIENCE)
        with serving(folder, env={"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "200000"}) as program:
            told: list[str] = []
            while "WATCHDOG=1" not in told:
                told.append(manager.recv(4096).decode())
            assert [line for line in told if line.startswith("READY")] == ["READY=1\nSTATUS=2 of 2 workers ready"]
            program.process.send_signal(signal.SIGHUP)
            while not told[-1].startswith("READY"):
                told.append(manager.recv(4096).decode())
            assert any(line.startswith("RELOADING=1\nMONOTONIC_USEC=") for line in told)
            assert await trio.to_thread.run_sync(program.stop) == 0
            manager.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    told.append(manager.recv(4096).decode())
    assert told.count("STOPPING=1") == 1
    assert re.match("STATUS=0 of 2 workers ready", told[-1])
