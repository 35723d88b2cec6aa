"""What `triosspi serve` puts together, and a server with all of it as a foreign client of HTTP sees it."""

from __future__ import annotations

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
from triosspi.service.config.assembly import DemoAccount
from triosspi.service.config.configuration import Configuration, Sources
from triosspi.service.config.settings import Connections, Listen
from triosspi.service.program import Program, unpickled

PASSWORD = "a password"


@pytest.fixture
def accounts(tmp_path: Path) -> Path:
    account_editor.add(tmp_path / "accounts", "DOM\\alice", PASSWORD)
    return tmp_path / "accounts"


def configured(tmp_path: Path, text: str) -> Sources:
    (tmp_path / "t.toml").write_text(text)
    return Sources(file=tmp_path / "t.toml", environ={})


def program_of(sources: Sources) -> tuple[Program, Configuration]:
    configuration = sources.load()
    return Program(start=configuration.settings.start, sources=sources, demo=DemoAccount.make()), configuration


def test_a_worker_is_given_the_settings_and_never_reads_the_file(tmp_path: Path, accounts: Path) -> None:
    program, configuration = program_of(
        configured(tmp_path, '[accept]\naccounts = "accounts"\ndeny = ["DOM\\\\bob"]\n[workers]\nworkers = 2\n')
    )
    work = program.work(configuration)
    (tmp_path / "t.toml").write_text("[limits]\nmax_conections = 1\n")
    there = unpickled(work.service)
    assert there.program == program
    assert there.load().live.accept == configuration.settings.accept
    # Nor what was edited and not reloaded, nor what only a restart brings.
    (tmp_path / "t.toml").write_text('[serve]\nwire = "framed"\n[accept]\naccounts = "accounts"\n')
    assert there.load().live.accept.deny == ("DOM\\bob",)
    assert unpickled(program.reload_for_workers().service).program.start.serve.wire == "sample"


def test_what_is_handed_to_workers_is_what_was_read_and_judged(tmp_path: Path, accounts: Path) -> None:
    sources = configured(tmp_path, '[accept]\naccounts = "accounts"\n[workers]\nworkers = 2\ngrace = "6s"\n')
    program, _ = program_of(sources)
    configured(tmp_path, '[accept]\naccounts = "accounts"\n[workers]\ngrace = "60s"\n[reload]\nwatch_files = true\n')
    work = program.reload_for_workers()
    assert work.grace == 60
    assert work.files == (tmp_path / "t.toml",)
    assert unpickled(work.service).load().live.stopping.grace == 60
    accounts.unlink()
    with pytest.raises(ConfigurationError, match="cannot read the account file"):
        program.reload_for_workers()
    # A worker that finds it so keeps what it has, and says why.
    with pytest.raises(ConfigurationError, match="cannot read the account file"):
        unpickled(work.service).load()


def test_what_takes_a_restart_is_named_and_left_as_it_is(
    tmp_path: Path, accounts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = configured(tmp_path, '[accept]\naccounts = "accounts"\n')
    program, _ = program_of(sources)
    assert program.reload().live.stopping.grace == 30
    assert caplog.text == ""
    configured(
        tmp_path,
        '[accept]\naccounts = "accounts"\n[listen]\nport = 1\nkeepalive = "5s"\n[impersonation]\nimpersonate = true\n'
        '[workers]\ngrace = "1s"\nmax_sessions = 3\n[reload]\nwatch_files = true\n',
    )
    loaded = program.reload()
    assert "a restart is needed for what has changed in port, impersonate, max_sessions\n" in caplog.text
    assert (loaded.live.stopping.grace, loaded.live.connections.keepalive) == (1, 5)
    assert loaded.impersonation is None


def test_workers_share_what_all_connections_together_may_take(tmp_path: Path, accounts: Path) -> None:
    sources = configured(
        tmp_path,
        '[accept]\naccounts = "accounts"\n[limits]\nmax_connections = 1001\nmax_unauthenticated = "10:30:61"\nmax_waiting = 9\n'
        "max_unauthenticated_per_source = 7\n",
    )
    program, configuration = program_of(sources)
    alone, one_of_four = (program.make(configuration, share=share).live.limits for share in (1, 4))
    assert (alone.max_connections, alone.max_unauthenticated, alone.max_waiting) == (1001, 61, 9)
    assert (one_of_four.max_connections, one_of_four.max_unauthenticated, one_of_four.max_waiting) == (251, 16, 3)
    assert one_of_four.max_unauthenticated_per_source == 7


@pytest.mark.parametrize("watch", [True, False])
def test_the_files_that_matter_are_known(watch: bool, tmp_path: Path, accounts: Path) -> None:
    sources = configured(
        tmp_path,
        '[accept]\naccounts = "accounts"\nmechanisms = "ntlm"\nkeytab = "FILE:/a/keytab"\n'
        f"[reload]\nwatch_files = {str(watch).lower()}\n",
    )
    program, configuration = program_of(sources)
    assert program.make(configuration).files == ((tmp_path / "t.toml", Path("/a/keytab")) if watch else ())


def test_a_contradiction_between_options_is_told_with_its_place(tmp_path: Path, accounts: Path) -> None:
    sources = configured(tmp_path, '[accept]\naccounts = "accounts"\n[impersonation]\nimpersonate = true\n')
    program, _ = program_of(sources)
    with pytest.raises(ConfigurationError, match=r"t\.toml:4: impersonation\.impersonate needs account_map"):
        program.reload()


def test_proxies_by_address_are_told_where_systemd_has_opened_unix_sockets_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told(sockets: list[socket.socket], **connections: Any) -> bool:
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in sockets]
        caplog.clear()
        program._tell_unproxied(Listen(), Connections(**connections), listeners)
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
