"""What `triosspi serve` puts together, and a server with all of it as a foreign client of HTTP sees it."""

from __future__ import annotations

import pickle
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import trio

from programs import running
from triosspi import ConfigurationError, Initiator, open_sspi_over_tcp_channel
from triosspi.service import account_editor, program
from triosspi.service.config.configuration import Sources
from triosspi.service.config.settings import Listen, Settings
from triosspi.service.demo import DemoAccount
from triosspi.service.program import Program

PASSWORD = "a password"


@pytest.fixture
def accounts(tmp_path: Path) -> Path:
    account_editor.add(tmp_path / "accounts", "DOM\\alice", PASSWORD)
    return tmp_path / "accounts"


def configured(tmp_path: Path, text: str) -> Sources:
    (tmp_path / "t.toml").write_text(text)
    return Sources(file=tmp_path / "t.toml", environ={})


def test_a_program_goes_to_a_worker_and_loads_the_same_there(tmp_path: Path, accounts: Path) -> None:
    sources = configured(tmp_path, '[accept]\naccounts = "accounts"\n')
    program = Program(sources=sources, demo=DemoAccount.make(), share=2)
    there = pickle.loads(pickle.dumps(program))
    assert there == program
    assert there.load().settings == program.load().settings


def test_workers_share_what_all_connections_together_may_take(tmp_path: Path, accounts: Path) -> None:
    sources = configured(
        tmp_path,
        '[accept]\naccounts = "accounts"\n[limits]\nmax_connections = 1001\nmax_unauthenticated = "10:30:61"\n'
        "max_unauthenticated_per_source = 7\n",
    )
    alone, one_of_four = (Program(sources=sources, share=share).load().settings.limits for share in (1, 4))
    assert (alone.max_connections, str(alone.max_unauthenticated)) == (1001, "10:30:61")
    assert (one_of_four.max_connections, str(one_of_four.max_unauthenticated)) == (251, "3:30:16")
    assert one_of_four.max_unauthenticated_per_source == 7


def test_the_files_that_matter_are_known(tmp_path: Path, accounts: Path) -> None:
    sources = configured(tmp_path, '[accept]\naccounts = "accounts"\nmechanisms = "ntlm"\nkeytab = "FILE:/a/keytab"\n')
    assert Program(sources=sources).load().files == (tmp_path / "t.toml", Path("/a/keytab"))


def test_a_contradiction_between_options_is_told_with_its_place(tmp_path: Path, accounts: Path) -> None:
    sources = configured(tmp_path, '[accept]\naccounts = "accounts"\n[impersonation]\nimpersonate = true\n')
    with pytest.raises(ConfigurationError, match=r"t\.toml:4: impersonation\.impersonate needs account_map"):
        Program(sources=sources).load()


def test_proxies_by_address_are_told_where_systemd_has_opened_unix_sockets_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told(sockets: list[socket.socket], **listen: Any) -> bool:
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in sockets]
        caplog.clear()
        program._tell_unproxied(Settings(listen=Listen(**listen)), listeners)
        return "proxy_from has no effect" in caplog.text

    proxies = (ip_network("10.0.0.0/8"),)
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind(str(tmp_path / "socket"))
        unix.listen()
        assert told([unix], proxy_from=proxies)
        assert not told([unix], proxy_from=proxies, proxy_unix=True)
        assert not told([unix], proxy_from=())
        assert not told([unix, tcp], proxy_from=proxies)


def get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()


async def echo(port: int) -> None:
    initiator = Initiator(username="DOM\\alice", password=PASSWORD, mechanism="ntlm")
    async with await open_sspi_over_tcp_channel("127.0.0.1", port, initiator) as channel:
        await channel.send(b"hello")
        assert await channel.receive() == b"hello"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_metrics_and_health_are_shown_while_it_serves(accounts: Path, workers: str) -> None:
    arguments = ["serve", "--wire", "framed", "--host", "127.0.0.1", "--port", "0", "--accounts", accounts]
    with running(*arguments, "--metrics", "127.0.0.1:0", "--workers", workers) as server:
        port = server.expect_port()
        address = server.expect(r"metrics and health on http://(\S+)", "err")[1]
        assert get(address, "/healthz")[0] == 200
        for _ in range(4):
            trio.run(echo, port)
        server.expect(r"(?s)(session ended.*){4}", "err")
        while get(address, "/readyz")[0] != 200:
            pass
        counted = r'triosspi_handshakes_total\{mechanism="ntlm",outcome="accepted"\} 4\.0'
        while not re.search(counted, shown := get(address, "/metrics")[1]):
            pass
        if (promtool := shutil.which("promtool")) is not None:
            checked = subprocess.run(
                [promtool, "check", "metrics"], input=shown, capture_output=True, text=True, check=False
            )
            assert checked.returncode == 0, checked.stdout + checked.stderr
        assert server.stop() == 0
