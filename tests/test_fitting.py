"""What does not fit into what the system lets a server have: the limit on descriptors, kept to and told; the backlog."""

from __future__ import annotations

import shlex
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import trio

from programs import MODULE, PATIENCE, children, run, running
from triosspi import Initiator, open_sspi_over_tcp_channel
from triosspi.service import account_editor
from triosspi.service.config import system
from triosspi.service.config.fitting import RESERVED, fitted, misfits
from triosspi.service.config.settings import Connections, Limits, Listen, Settings, Workers

if sys.platform == "win32":
    pytest.skip("Windows has no limit on descriptors", allow_module_level=True)


PASSWORD = "a password"


def limited(soft: int, hard: int, program: Sequence[str] = MODULE) -> list[str]:
    """The program where it may open so many files."""
    return ["/bin/sh", "-c", f'ulimit -S -n {soft} && ulimit -H -n {hard} && exec {shlex.join(program)} "$@"', "sh"]


@pytest.fixture
def accounts(tmp_path: Path) -> Path:
    account_editor.add(tmp_path / "accounts", "DOM\\alice", PASSWORD)
    return tmp_path / "accounts"


def settings(most: int, **sections: Any) -> Settings:
    return Settings(limits=Limits(max_connections=most), **sections)


# What fits


@pytest.mark.parametrize(
    ("descriptors", "connections", "expected"),
    [
        (None, 10_000, 10_000),
        (10_000 + RESERVED, 10_000, 10_000),
        (10_000, 10_000, 10_000 - RESERVED),
        (2 * RESERVED, 10_000, RESERVED),
        # Some are better than none.
        (100, 10_000, 50),
        (1, 10_000, 1),
        (100, 20, 20),
    ],
)
def test_no_more_connections_are_taken_than_there_are_descriptors_for(
    descriptors: int | None, connections: int, expected: int
) -> None:
    assert fitted(Limits(max_connections=connections), descriptors).max_connections == expected
    assert bool([*misfits(settings(connections), descriptors)]) == (expected < connections)


def test_what_does_not_fit_is_told_with_what_to_do() -> None:
    (text,) = misfits(settings(10_000), 4096)
    assert text == (
        "max_connections = 10000 does not fit: a process may open 4096 files, and at most 3968 connections are taken; "
        "raise the limit (LimitNOFILE=, ulimit -n) to 10128, or lower max_connections"
    )


def test_a_worker_needs_descriptors_for_its_share_only() -> None:
    assert not [*misfits(settings(10_000, workers=Workers(workers=4)), 2500 + RESERVED)]
    (text,) = misfits(settings(10_000, workers=Workers(workers=4)), 2400 + RESERVED)
    assert "at most 2400 connections are taken in each of 4 workers; raise" in text
    assert f"to {2500 + RESERVED}, or" in text


def test_a_backlog_that_the_kernel_cuts_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_SOMAXCONN", tmp_path / "somaxconn")
    wanted = settings(1, listen=Listen(backlog=200))
    # Not Linux.
    assert not [*misfits(wanted, None)]
    (tmp_path / "somaxconn").write_text("128\n")
    assert [*misfits(wanted, None)] == [
        "backlog = 200 does not fit: the kernel lets 128 wait; raise net.core.somaxconn, or lower backlog"
    ]
    (tmp_path / "somaxconn").write_text("200\n")
    assert not [*misfits(wanted, None)]
    # As many as the kernel lets.
    (tmp_path / "somaxconn").write_text("1\n")
    assert not [*misfits(settings(1), None)]


def test_proxies_by_address_where_nobody_has_one_are_told(tmp_path: Path) -> None:
    proxies = (ip_network("10.0.0.0/8"),)
    sockets = (tmp_path / "socket",)
    unix, everywhere = Listen(unix=sockets), Listen(unix=sockets, hosts=("127.0.0.1",))
    named, both = Connections(proxy_from=proxies), Connections(proxy_from=proxies, proxy_unix=True)
    (text,) = misfits(settings(1, listen=unix, connections=named), None)
    assert text.startswith("proxy_from has no effect")
    for listen, connections in ((unix, Connections()), (unix, both), (everywhere, named), (Listen(), named)):
        assert not [*misfits(settings(1, listen=listen, connections=connections), None)]


# The program


def test_check_config_says_what_would_not_fit_and_that_is_no_error() -> None:
    checked = run("check-config", program=limited(100, 5000))
    assert checked.returncode == 0
    assert "max_connections = 10000 does not fit: a process may open 5000 files" in checked.stderr
    assert "does not fit" not in run("check-config", "--max-connections", "100", program=limited(100, 5000)).stderr


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what limit a process has")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_takes_the_limit_that_it_may_have_and_says_what_does_not_fit(
    workers: int, tmp_path: Path, accounts: Path
) -> None:
    config = tmp_path / "t.toml"
    config.write_text("[limits]\nmax_connections = 200\n")
    arguments = ["serve", "--wire", "framed", "--host", "127.0.0.1", "--port", "0", "--accounts", str(accounts)]
    arguments += ["--config", str(config), "--workers", str(workers)]
    with running(*arguments, program=limited(64, 400)) as server:
        server.expect_port()
        for pid in (server.process.pid, *children(server.process.pid)):
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert "Max open files            400                  400" in limits
        assert "does not fit" not in server.err
        config.write_text("[limits]\nmax_connections = 2000\n")
        server.process.send_signal(signal.SIGHUP)
        server.expect("max_connections = 2000 does not fit: a process may open 400 files, and at most 272", "err")
        assert server.stop() == 0
    with running(*arguments, program=limited(64, 400)) as server:
        server.expect_port()
        # Once, however many workers there are.
        assert server.err.count("max_connections = 2000 does not fit") == 1
        assert server.stop() == 0


def test_a_crowd_beyond_the_descriptors_makes_room_for_itself_and_whoever_is_there_can_log_in(accounts: Path) -> None:
    # Where accept(2) fails, opening the account file fails too.
    arguments = ["serve", "--wire", "framed", "--host", "127.0.0.1", "--port", "0", "--accounts", str(accounts)]
    arguments += ["--max-unauthenticated", "1000", "--max-unauthenticated-per-source", "off", "--no-penalties"]
    with running(*arguments, program=limited(64, 200)) as server, ExitStack() as stack:
        address = ("127.0.0.1", server.expect_port())
        for _ in range(99):
            stack.enter_context(socket.create_connection(address))
        trio.run(logs_in_beside, address)
        assert server.stop() == 0
        assert "cannot accept" not in server.err
        assert "connections dropped: evicted" in server.err


async def logs_in_beside(address: tuple[str, int]) -> None:
    """The hundredth comes in; those behind it take the places of others that say nothing, and it is served meanwhile."""
    initiator = Initiator(username="DOM\\alice", password=PASSWORD, mechanism="ntlm")
    with trio.fail_after(PATIENCE):
        async with await open_sspi_over_tcp_channel(*address, initiator) as channel:
            await channel.do_handshake()
            async with AsyncExitStack() as stack:
                for _ in range(150):
                    await stack.enter_async_context(await trio.open_tcp_stream(*address))
                await channel.send(b"hello")
                assert await channel.receive() == b"hello"
