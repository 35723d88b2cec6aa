"""The status port: it answers when the event loop does not, and no client can hold it up."""

from __future__ import annotations

import errno
import http.client
import logging
import random
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import trio
import trio.testing
from prometheus_client.parser import text_string_to_metric_families

from harness import Clock
from test_metrics import PROMTOOL
from triosspi import ConfigurationError
from triosspi.service.observe import status
from triosspi.service.observe.metrics import CONTENT_TYPE, Metrics
from triosspi.service.observe.status import Health, StatusServer

PATIENCE = 30.0
LOCAL = ("127.0.0.1", 0)


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(healthy_for=10, clock=clock)


@pytest.fixture
def server(health: Health) -> Iterator[StatusServer]:
    with StatusServer(LOCAL, health, Metrics().exposition) as running:
        yield running


def ask(server: StatusServer, path: str, method: str = "GET", body: bytes | None = None) -> Answer:
    """As a probe does."""
    connection = http.client.HTTPConnection(*server.address, timeout=PATIENCE)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return Answer(response.status, response.read(), dict(response.getheaders()))
    finally:
        connection.close()


def connect(server: StatusServer) -> socket.socket:
    return socket.create_connection(server.address, PATIENCE)


def read_all(client: socket.socket) -> bytes:
    """Until the server closes, in whatever way."""
    data = b""
    try:
        while piece := client.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


def say(server: StatusServer, data: bytes) -> bytes:
    """What it answers to these bytes, and nothing after them."""
    with connect(server) as client:
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        except OSError:
            # It has closed already; what it said may still be there.
            pass
        return read_all(client)


# What it says


def test_healthz_is_200_while_the_event_loop_turns(server: StatusServer, health: Health, clock: Clock) -> None:
    assert ask(server, "/healthz")[:2] == (200, b"ok\n")
    clock.now += 10
    assert ask(server, "/healthz").status == 200
    clock.now += 0.1
    assert ask(server, "/healthz")[:2] == (503, b"the event loop is stuck\n")
    health.heartbeat()
    assert ask(server, "/healthz").status == 200


def test_readyz_is_200_only_while_connections_are_taken(server: StatusServer, health: Health, clock: Clock) -> None:
    assert ask(server, "/readyz")[:2] == (503, b"not ready\n")
    health.set_ready(True)
    assert ask(server, "/readyz")[:2] == (200, b"ready\n")
    # The kernel may take them, but nobody else does.
    clock.now += 11
    assert ask(server, "/readyz").status == 503
    health.heartbeat()
    assert ask(server, "/readyz").status == 200
    health.set_ready(False)
    assert ask(server, "/readyz").status == 503
    assert ask(server, "/healthz").status == 200


async def test_it_answers_while_the_event_loop_does_not(server: StatusServer) -> None:
    # Blocking, here, is what the loop must never do.
    assert ask(server, "/healthz").status == 200
    await trio.lowlevel.checkpoint()


def test_metrics_are_shown_in_the_text_format(server: StatusServer) -> None:
    answer = ask(server, "/metrics")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == CONTENT_TYPE
    names = {family.name for family in text_string_to_metric_families(answer.body.decode())}
    assert {"triosspi_build_info", "triosspi_handshakes", "triosspi_loop_latency_seconds"} <= names


@pytest.mark.skipif(PROMTOOL is None, reason="promtool, from Prometheus, is not here")
def test_promtool_takes_what_metrics_shows(server: StatusServer) -> None:
    assert PROMTOOL is not None
    body = ask(server, "/metrics").body
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=body, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_without_metrics_there_are_none(health: Health) -> None:
    with StatusServer(LOCAL, health) as server:
        assert ask(server, "/metrics").status == 404
        assert ask(server, "/healthz").status == 200


def test_metrics_that_fail_are_500_and_in_the_log(health: Health, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> bytes:
        raise RuntimeError("a file is corrupted")

    with StatusServer(LOCAL, health, fail) as server:
        assert ask(server, "/metrics")[:2] == (500, b"the log says why\n")
        assert ask(server, "/healthz").status == 200
    assert "a file is corrupted" in caplog.text


def test_head_is_get_without_the_body(health: Health) -> None:
    # Of a process's own metrics, memory and time, the next answer may be longer.
    metrics = Metrics().exposition()
    with StatusServer(LOCAL, health, lambda: metrics) as server:
        for path in ("/healthz", "/metrics", "/nothing"):
            get, head = ask(server, path), ask(server, path, "HEAD")
            assert (head.status, head.body) == (get.status, b"")
            assert head.headers["Content-Length"] == str(len(get.body))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE", "PRI"])
def test_other_methods_are_405(method: str, server: StatusServer) -> None:
    answer = say(server, f"{method} /metrics HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"\r\nAllow: GET, HEAD\r\n" in answer


def test_every_answer_closes_and_may_not_be_kept_or_guessed_at(server: StatusServer) -> None:
    for path in ("/healthz", "/metrics", "/nothing"):
        headers = ask(server, path).headers
        assert headers["Connection"] == "close"
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Date"].endswith(" GMT")


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /healthz HTTP/1.1", 200),
        (b"GET /healthz HTTP/1.0", 200),
        (b"GET /healthz?verbose=1&x=/ HTTP/1.1", 200),
        (b"GET http://localhost:9464/healthz HTTP/1.1", 200),
        (b"GET /healthz/ HTTP/1.1", 404),
        (b"GET / HTTP/1.1", 404),
        (b"GET /../healthz HTTP/1.1", 404),
        (b"GET //healthz HTTP/1.1", 404),
        (b"GET /%68ealthz HTTP/1.1", 404),
        (b"GET /healthz", 400),
        (b"GET /healthz HTTP/2.0", 400),
        (b"GET /healthz HTTP/1.1 ", 400),
        (b"GET  /healthz HTTP/1.1", 400),
        (b" GET /healthz HTTP/1.1", 400),
        (b"get /healthz HTTP/1.1", 400),
        (b"GET healthz HTTP/1.1", 400),
        (b"GET * HTTP/1.1", 400),
        (b"GET http://localhost HTTP/1.1", 400),
        (b"GET /caf\xe9 HTTP/1.1", 400),
        (b"GET /\0 HTTP/1.1", 400),
        (b"GET /a b HTTP/1.1", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"", 400),
    ],
)
@pytest.mark.parametrize("end", [b"\r\n\r\n", b"\n\n", b"\r\nHost: x\r\nAccept: */*\r\n\r\n", b"\nA:b\n\r\n"])
def test_request_lines(request_line: bytes, status: int, end: bytes, server: StatusServer) -> None:
    assert say(server, request_line + end).startswith(f"HTTP/1.1 {status} ".encode())


# Hostile clients


def test_a_request_may_come_in_any_pieces(server: StatusServer) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nUser-Agent: kube-probe/1.30\r\n\r\n"
    rng = random.Random(8)
    for _ in range(20):
        with connect(server) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            rest = request
            while rest:
                size = rng.randint(1, 30)
                client.sendall(rest[:size])
                rest = rest[size:]
            assert read_all(client).endswith(b"\r\n\r\nok\n")


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"A" * 20_000,
        b"\r\r" * 10_000,
        b"GET http://" + b"/" * 8181 + b"\r\n",
    ],
    ids=["target", "header", "headers", "no end", "no line", "slashes"],
)
def test_a_head_that_is_too_long_is_431_however_long_it_is(request_: bytes, server: StatusServer) -> None:
    assert say(server, request_).startswith(b"HTTP/1.1 431 ")
    assert ask(server, "/healthz").status == 200


def test_an_answer_reaches_a_client_that_sends_what_nobody_reads(server: StatusServer) -> None:
    assert ask(server, "/metrics", "POST", b"x" * 60_000).status == 405
    # And of two requests at once one is answered.
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    assert say(server, request * 3).count(b"HTTP/1.1 ") == 1


def test_garbage_is_refused_or_closed_and_hurts_nobody(server: StatusServer, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(7)
    pieces = [b"GET ", b"/healthz", b" HTTP/1.1", b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"/", b"http://", b"HEAD "]
    for _ in range(200):
        if rng.random() < 0.5:
            data = rng.randbytes(rng.randrange(300))
        else:
            data = b"".join(rng.choice(pieces) for _ in range(rng.randrange(20)))
        answer = say(server, data)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 404 ", b"HTTP/1.1 200 "))
    assert ask(server, "/healthz").status == 200
    assert not caplog.records


def test_clients_that_reset_hurt_nobody(server: StatusServer, caplog: pytest.LogCaptureFixture) -> None:
    for data in (b"", b"GET /met", b"GET /metrics HTTP/1.1\r\n\r\n"):
        for _ in range(20):
            with connect(server) as client:
                client.sendall(data)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert ask(server, "/healthz").status == 200
    assert not caplog.records


def test_silent_clients_do_not_keep_a_probe_waiting(server: StatusServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # It is not the deadline that makes room.
    monkeypatch.setattr(status, "_DEADLINE", float("inf"))
    threads = threading.active_count()
    clients = [connect(server) for _ in range(100)]
    try:
        for client in clients:
            client.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
        for _ in range(5):
            assert ask(server, "/healthz").status == 200
        # Trio's idle threads may end meanwhile.
        assert threading.active_count() <= threads
        # Those who came first had to go.
        assert [read_all(client) for client in clients[:60]] == [b""] * 60
        assert len(server._open) <= 32
    finally:
        for client in clients:
            client.close()


def lonely_server(health: Health) -> StatusServer:
    """One whose parts a test calls."""
    server = StatusServer(LOCAL, health)
    server.close()
    return server


@pytest.mark.parametrize("pause", [0.2, 4.0])
async def test_one_deadline_bounds_a_request_however_slowly_it_comes(
    pause: float, health: Health, autojump_clock: trio.testing.MockClock
) -> None:
    server = lonely_server(health)
    client, stream = trio.testing.memory_stream_pair()
    began = trio.current_time()

    async def drip() -> None:
        try:
            while True:
                await client.send_all(b"x")
                await trio.sleep(pause)
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drip)
        await server._connection(stream, server._admit())
        assert trio.current_time() - began == pytest.approx(5.0)
        assert server._open == {}


@pytest.mark.parametrize("reads", [False, True])
async def test_a_client_that_has_its_answer_and_stays_is_closed_too(
    reads: bool, health: Health, autojump_clock: trio.testing.MockClock
) -> None:
    server = lonely_server(health)
    stream, client = trio.testing.lockstep_stream_pair()
    began = trio.current_time()

    async def stay() -> None:
        await client.send_all(b"GET /healthz HTTP/1.1\r\n\r\n")
        if reads:
            assert (await client.receive_some()).startswith(b"HTTP/1.1 200 ")
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stay)
        await server._connection(stream, server._admit())
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began == pytest.approx(5.0)


async def test_a_client_that_goes_on_sending_is_not_read_for_ever(
    health: Health, autojump_clock: trio.testing.MockClock
) -> None:
    server = lonely_server(health)
    client, stream = trio.testing.memory_stream_pair()
    sent = 0

    async def pour() -> None:
        nonlocal sent
        await client.send_all(b"GET /healthz HTTP/1.1\r\n\r\n")
        try:
            while True:
                await client.send_all(b"x" * 4096)
                sent += 4096
                await trio.lowlevel.checkpoint()
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pour)
        await server._connection(stream, server._admit())
    assert sent < 1_000_000


async def test_an_error_of_ours_ends_one_connection(
    health: Health, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = lonely_server(health)
    client, stream = trio.testing.memory_stream_pair()

    def fail(_: bytes) -> bytes:
        raise KeyError("bug")

    monkeypatch.setattr(server, "_answer", fail)
    await client.send_all(b"GET /healthz HTTP/1.1\r\n\r\n")
    await server._connection(stream, server._admit())
    assert await client.receive_some() == b""
    assert "a request of the status port has failed" in caplog.text
    assert server._open == {}


@pytest.mark.parametrize("addresses", [["192.0.2.1", LOCAL[0]], [LOCAL[0], "192.0.2.1"]])
def test_of_a_name_the_first_address_that_the_machine_has_is_taken(
    addresses: list[str], health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    # "localhost" is ::1, too, where a container has no IPv6.
    def resolve(_: str, port: int, **_options: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolve)
        server = StatusServer(("two", 0), health)
    assert server.address[0] == LOCAL[0]
    server.close()
    with pytest.raises(ConfigurationError, match="Cannot assign requested address"):
        StatusServer(("192.0.2.1", 0), health)


def test_when_accept_fails_it_is_tried_again(
    health: Health, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real: Callable[[trio.SocketListener], object] = trio.SocketListener.accept
    failures = [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ECONNABORTED, "gone")]

    async def accept(listener: trio.SocketListener) -> object:
        if failures:
            raise failures.pop(0)
        return await real(listener)  # type: ignore[misc]

    monkeypatch.setattr(trio.SocketListener, "accept", accept)
    monkeypatch.setattr(status, "_PAUSE", 0)
    with StatusServer(LOCAL, health) as server:
        assert ask(server, "/healthz").status == 200
    assert not failures
    assert "cannot accept: Too many open files" in caplog.text


# Beginning and end


def test_its_end_frees_the_port_and_ends_the_thread_and_the_connections(health: Health) -> None:
    threads = threading.active_count()
    server = StatusServer(LOCAL, health)
    server.start()
    assert ask(server, "/healthz").status == 200
    with connect(server) as client:
        # It is known to be accepted when one that came later is answered.
        assert ask(server, "/healthz").status == 200
        server.close()
        assert read_all(client) == b""
    server.close()
    assert threading.active_count() == threads
    with StatusServer(server.address, health) as again:
        assert again.address == server.address
        assert ask(again, "/healthz").status == 200


def test_it_can_be_closed_without_having_been_started(health: Health) -> None:
    server = StatusServer(LOCAL, health)
    server.close()
    with socket.socket() as probe:
        # Fails while anything else has the address.
        probe.bind(server.address)


def test_it_starts_and_ends_within_a_running_event_loop(health: Health) -> None:
    async def main() -> None:
        with StatusServer(LOCAL, health) as server:
            answer = await trio.to_thread.run_sync(ask, server, "/healthz")
            assert answer.status == 200

    trio.run(main)


def test_a_failure_of_its_thread_is_logged_and_stops_nobody(
    health: Health, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: StatusServer) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(StatusServer, "_serve", fail)
    with StatusServer(LOCAL, health):
        pass
    (record,) = [record for record in caplog.records if record.name == "triosspi.status"]
    assert (record.levelno, record.message) == (logging.ERROR, "the status server has failed")


def test_ipv6_is_as_good(health: Health) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with StatusServer(("::1", 0), health) as server:
        assert server.address[0] == "::1"
        assert ask(server, "/healthz").status == 200


def test_an_address_that_cannot_be_bound_is_a_configuration_error(health: Health) -> None:
    with StatusServer(LOCAL, health) as server:
        for address in (server.address, ("192.0.2.1", 0), ("127.0.0.1", 70_000), ("." * 70, 1), ("no such host", 1)):
            with pytest.raises(ConfigurationError, match=r"cannot listen on .* for metrics: ."):
                StatusServer(address, health)
        assert ask(server, "/healthz").status == 200
