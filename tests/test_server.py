"""A server's life: whom it serves, what it tells, how it reloads and how it stops."""

from __future__ import annotations

import errno
import logging
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from harness import PASSWORD, SERVER_MESSAGE, make_acceptor, make_initiator, reset_at_close, reset_connection
from triosspi import Acceptor, Account, ConfigurationError, SSPIChannel, WireFormat, open_sspi_over_tcp_channel
from triosspi.security.ntlm.accounts import AccountTable
from triosspi.security.ntlm.primitives import nt_hash
from triosspi.service import shutting_down
from triosspi.service.apps import Greet, echo
from triosspi.service.config.settings import Connections, Limits, Listen, Serve, Settings, Stopping
from triosspi.service.network.listening import close_listeners, open_listeners
from triosspi.service.observe.notify import Notifier
from triosspi.service.observe.telemetry import SessionEnd
from triosspi.service.serving import connection, sessions
from triosspi.service.serving.reloading import FILES_INTERVAL, MOST_HANGING, Reading
from triosspi.service.serving.server import Loaded, Server
from triosspi.tcp import accepting as _accepting

LOCAL = "127.0.0.1"


class Told:
    """A telemetry that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.ends: list[SessionEnd] = []
        self.news = trio.Event()

    def __getattr__(self, name: str) -> Callable[..., None]:
        def tell(*args: Any, **kwargs: Any) -> None:
            self.events.append((name, *args, kwargs))
            self._wake()

        return tell

    def session_ended(self, end: SessionEnd) -> None:
        self.ends.append(end)
        self._wake()

    def _wake(self) -> None:
        self.news.set()
        self.news = trio.Event()

    def outcomes(self) -> list[str]:
        return [end.outcome for end in self.ends]

    def all(self, name: str) -> list[tuple[Any, ...]]:
        return [event[1:] for event in self.events if event[0] == name]

    async def until(self, true: Callable[[], object]) -> None:
        while not true():
            await self.news.wait()


@dataclass
class Running:
    """A server that runs in this process."""

    server: Server
    addresses: list[Any]
    told: Told
    nursery: trio.Nursery
    result: list[bool] = field(default_factory=list)
    ended: trio.Event = field(default_factory=trio.Event)

    async def client(self, password: str = PASSWORD, **options: Any) -> SSPIChannel[Any]:
        """Connected and logged in."""
        channel = await open_sspi_over_tcp_channel(*self.addresses[0][:2], make_initiator(password), **options)
        try:
            await channel.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(channel)
            raise
        return channel


def settings(**sections: Any) -> Settings:
    given = {"serve": Serve(wire="framed"), "listen": Listen(hosts=(LOCAL,), port=0)}
    return Settings(**{**given, **sections})


@asynccontextmanager
async def serving(
    handler: Callable[[Any], Awaitable[Any]] = echo,
    *,
    reload: Callable[[], Loaded] | None = None,
    files: tuple[Path, ...] = (),
    make_tracer: Any = None,
    once: bool = False,
    acceptor: Acceptor | None = None,
    before: Callable[[Any], object] = lambda address: None,
    **sections: Any,
) -> AsyncIterator[Running]:
    given = settings(**sections)
    loaded = Loaded(live=given.live, acceptor=acceptor or make_acceptor(), files=files)
    listeners = await open_listeners(given.listen)
    before(listeners[0].socket.getsockname())
    told: Any = Told()
    server = Server(
        given.start,
        loaded,
        listeners,
        handler=handler,
        telemetry=told,
        notifier=Notifier(None),
        reload=reload,
        once=once,
        make_tracer=make_tracer,
    )
    ready = trio.Event()
    async with trio.open_nursery() as nursery:
        running = Running(server, [listener.socket.getsockname() for listener in listeners], told, nursery)

        async def run() -> None:
            running.result.append(await server.run(ready.set))
            running.ended.set()

        nursery.start_soon(run)
        await ready.wait()
        yield running
        if not running.ended.is_set():
            server.stop()
            server.stop()
    await close_listeners(listeners)


async def hears_goodbye(channel: SSPIChannel[Any]) -> None:
    with pytest.raises(trio.EndOfChannel):
        await channel.receive()
    assert channel.peer_left
    await channel.aclose()


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_the_server_even_as_soon_as_its_address_is_known(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    async with serving() as running:
        signal.raise_signal(number)
        await running.ended.wait()
    assert running.result == [True]
    assert signal.getsignal(number) is before


async def test_whoever_is_connected_hears_a_goodbye_and_the_outcome_is_told() -> None:
    async with serving() as running:
        channels = [await running.client() for _ in range(3)]
        signal.raise_signal(signal.SIGTERM)
        async with trio.open_nursery() as nursery:
            for channel in channels:
                nursery.start_soon(hears_goodbye, channel)
        await running.ended.wait()
    assert running.told.outcomes() == ["shutdown"] * 3


async def test_a_request_that_is_being_worked_on_is_answered_first() -> None:
    go_on = trio.Event()

    async def slow(channel: SSPIChannel[Any]) -> None:
        async for message in channel:
            await go_on.wait()
            await channel.send(message)

    async with serving(slow) as running:
        client = await running.client()
        await client.send_many([b"one", b"never looked at"])
        await trio.testing.wait_all_tasks_blocked()
        running.server.stop()
        assert running.told.all("ready") == [(True, {}), (False, {})]
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
        assert await client.receive() == b"one"
        await hears_goodbye(client)
        await running.ended.wait()


async def test_handlers_can_see_that_the_server_stops() -> None:
    async def until_the_end(channel: SSPIChannel[Any]) -> None:
        await shutting_down().wait()
        await channel.send(b"last words")

    async with serving(until_the_end) as running:
        client = await running.client()
        running.server.stop()
        assert await client.receive() == b"last words"
        await hears_goodbye(client)
        await running.ended.wait()


async def test_nobody_is_accepted_any_more() -> None:
    async with serving() as running:
        client = await running.client()
        running.server.stop()
        await hears_goodbye(client)
        await running.ended.wait()
        with pytest.raises(OSError, match=r"."):
            await running.client()


async def test_who_is_logging_in_may_finish_and_hears_goodbye_at_once() -> None:
    async with serving() as running:
        stream = await trio.open_tcp_stream(*running.addresses[0])
        await running.told.until(lambda: running.told.all("accepted"))
        running.server.stop()
        client: SSPIChannel[Any] = SSPIChannel(stream, make_initiator())
        await client.do_handshake()
        await hears_goodbye(client)
        await running.ended.wait()
    assert running.told.outcomes() == ["shutdown"]


async def test_who_has_only_connected_does_not_hold_up_the_stop_for_long() -> None:
    async with serving() as running, await trio.open_tcp_stream(*running.addresses[0]):
        await running.told.until(lambda: running.told.all("accepted"))
        running.server.stop()
        with trio.fail_after(20):
            await running.ended.wait()
    assert [event[0] for event in running.told.all("dropped")] == ["draining"]
    assert not running.told.all("login_refused")


async def stubborn(channel: SSPIChannel[Any]) -> None:
    await trio.sleep_forever()


async def test_what_does_not_end_within_the_grace_is_cancelled() -> None:
    async with serving(stubborn, stopping=Stopping(grace=0.05)) as running:
        client = await running.client()
        running.server.stop()
        await running.ended.wait()
        with pytest.raises((trio.BrokenResourceError, trio.EndOfChannel)):
            await client.receive()
        await client.aclose()
    assert running.told.outcomes() == ["shutdown"]


async def test_a_second_signal_ends_all_at_once() -> None:
    async with serving(stubborn, stopping=Stopping(grace=3600.0)) as running:
        client = await running.client()
        signal.raise_signal(signal.SIGTERM)
        await running.told.until(lambda: running.told.all("ready")[-1] == (False, {}))
        signal.raise_signal(signal.SIGINT)
        # Otherwise the grace is waited out, an hour, which the test has not.
        await running.ended.wait()
        await client.aclose()


# Sessions and what is told of them


async def test_a_session_is_told_from_login_to_goodbye() -> None:
    async with serving() as running:
        client = await running.client()
        await client.send(b"hello")
        assert await client.receive() == b"hello"
        await client.aclose()
        await running.told.until(lambda: running.told.ends)
    (login,) = running.told.all("login")
    (end,) = running.told.ends
    assert login[0]["peer"].principal == end.peer.principal == "DOM\\alice"
    assert login[0]["session_id"] == end.session_id
    assert login[0]["source"] == end.source
    assert end.source.startswith("127.0.0.1:")
    assert (end.outcome, end.error) == ("goodbye", None)
    assert (end.messages_received, end.bytes_received, end.messages_sent, end.bytes_sent) == (1, 5, 1, 5)


async def test_a_refused_login_is_told_with_its_true_reason() -> None:
    async with serving() as running:
        with pytest.raises(trio.BrokenResourceError):
            await running.client("wrong")
        await running.told.until(lambda: running.told.all("login_refused"))
    ((refusal,),) = running.told.all("login_refused")
    assert "wrong password" in refusal["reason"]
    assert refusal["mechanism"] == "ntlm"
    assert not refusal["timed_out"]
    assert not running.told.ends


async def test_a_login_that_takes_too_long_is_told_as_such() -> None:
    async with serving(limits=Limits(handshake_timeout=0.05)) as running:
        async with await trio.open_tcp_stream(*running.addresses[0]) as stream:
            assert await stream.receive_some() == b""
        await running.told.until(lambda: running.told.all("login_refused"))
    ((refusal,),) = running.told.all("login_refused")
    assert refusal["timed_out"]
    assert refusal["reason"] == "no login within 0.05 s"


async def failing(channel: SSPIChannel[Any]) -> None:
    raise KeyError("a bug")


async def failing_in_a_nursery(channel: SSPIChannel[Any]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(failing, channel)
        await trio.sleep_forever()


async def returning(channel: SSPIChannel[Any]) -> None:
    await channel.receive()


@pytest.mark.parametrize(
    ("handler", "outcome", "error"),
    [
        (failing, "handler_error", "KeyError"),
        (failing_in_a_nursery, "handler_error", "ExceptionGroup"),
        (returning, "finished", None),
    ],
)
async def test_how_a_handler_ended_is_told_and_the_server_goes_on(
    handler: Any, outcome: str, error: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(handler) as running:
        for _ in range(2):
            client = await running.client()
            if handler is returning:
                await client.send(b"x")
            await hears_goodbye(client)
        await running.told.until(lambda: len(running.told.ends) == 2)
    assert [(end.outcome, end.error) for end in running.told.ends] == [(outcome, error)] * 2
    assert ("the handler failed" in caplog.text) is (outcome == "handler_error")


async def test_an_end_without_a_goodbye_between_two_messages_is_ordinary() -> None:
    async with serving() as running:
        client = await running.client()
        await client.transport_stream.aclose()
        await running.told.until(lambda: running.told.ends)
    assert running.told.outcomes() == ["peer_closed"]


async def test_an_end_within_a_message_is_a_loss() -> None:
    async with serving() as running:
        client = await running.client()
        await client.transport_stream.send_all(b"\x40\0\0\0half")
        await client.transport_stream.aclose()
        await running.told.until(lambda: running.told.ends)
    assert running.told.outcomes() == ["lost"]
    assert running.told.ends[0].error


async def test_a_message_that_does_not_open_is_counted() -> None:
    async with serving() as running:
        client = await running.client()
        await client.transport_stream.send_all(b"\x24\0\0\0\x10\0\0\0" + bytes(32))
        await running.told.until(lambda: running.told.ends)
        await client.aclose()
    assert running.told.outcomes() == ["lost"]
    assert len(running.told.all("unseal_failure")) == 1


@pytest.mark.parametrize(
    ("beside", "outcome"),
    [
        (trio.EndOfChannel(), "lost"),
        (trio.BrokenResourceError("reset"), "lost"),
        (ValueError("a bug"), "handler_error"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("first", [False, True])
async def test_a_message_that_does_not_open_is_counted_beside_whatever_else_the_handler_ran_into(
    beside: Exception, outcome: str, first: bool
) -> None:
    async def handler(channel: SSPIChannel[Any]) -> None:
        try:
            await channel.receive()
        except trio.BrokenResourceError as exc:
            inner = ExceptionGroup("inner", [exc])
            raise ExceptionGroup("outer", [beside, inner] if first else [inner, beside]) from None

    async with serving(handler) as running:
        client = await running.client()
        await client.transport_stream.send_all(b"\x24\0\0\0\x10\0\0\0" + bytes(32))
        await running.told.until(lambda: running.told.ends)
        await client.aclose()
    assert running.told.outcomes() == [outcome]
    assert len(running.told.all("unseal_failure")) == 1


@pytest.mark.parametrize(
    "error", [KeyError("a bug"), OSError(24, "Too many open files"), trio.BrokenResourceError("x")]
)
async def test_a_tracer_that_cannot_be_made_is_one_connections_end(error: Exception) -> None:
    tracers: list[Any] = []

    def make_tracer() -> Any:
        tracers.append(None)
        if len(tracers) == 1:
            raise error

    async with serving(make_tracer=make_tracer, limits=Limits(penalties=False)) as running:
        with pytest.raises(trio.BrokenResourceError):
            await running.client()
        client = await running.client()
        await client.aclose()
        await running.told.until(lambda: running.told.ends)
    assert running.told.outcomes() == ["goodbye"]
    assert len(running.told.all("login_refused")) == 1


# Limits


async def test_an_idle_session_ends_with_a_goodbye_and_its_handler_is_no_failure() -> None:
    async with serving(limits=Limits(idle_timeout=0.1)) as running:
        client = await running.client()
        await hears_goodbye(client)
        await running.told.until(lambda: running.told.ends)
    assert running.told.outcomes() == ["idle"]


async def deaf(channel: SSPIChannel[Any]) -> None:
    await trio.sleep_forever()


async def deaf_and_failing(channel: SSPIChannel[Any]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(deaf, channel)
        try:
            await trio.sleep_forever()
        finally:
            raise KeyError("a bug")


async def swallowing(channel: SSPIChannel[Any]) -> None:
    with suppress(trio.Cancelled):
        await trio.sleep_forever()


@pytest.mark.parametrize(
    ("handler", "outcome"), [(deaf, "idle"), (swallowing, "idle"), (deaf_and_failing, "handler_error")]
)
async def test_a_session_whose_handler_waits_for_something_else_ends_all_the_same_and_frees_its_place(
    handler: Any, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "NOTICE", 0.05)
    monkeypatch.setattr(sessions, "WATCH_INTERVAL", 0.01)
    async with serving(handler, limits=Limits(idle_timeout=0.05, max_connections=1)) as running:
        for number in (1, 2):
            client = await running.client()
            await hears_goodbye(client)
            await running.told.until(lambda number=number: len(running.told.ends) == number)
            await trio.testing.wait_all_tasks_blocked()
    assert running.told.outcomes() == [outcome] * 2


async def test_more_connections_than_may_be_are_dropped_before_they_cost_anything() -> None:
    async with serving(limits=Limits(max_connections=2)) as running:
        clients = [await running.client() for _ in range(2)]
        with pytest.raises(trio.BrokenResourceError):
            await running.client()
        assert [event[0] for event in running.told.all("dropped")] == ["connections"]
        await clients.pop().aclose()
        await running.told.until(lambda: running.told.ends)
        clients.append(await running.client())
        for client in clients:
            await client.aclose()


async def test_a_source_whose_logins_fail_is_shut_out_and_others_are_not() -> None:
    async with serving(listen=Listen(hosts=(LOCAL, "127.0.0.2"), port=0)) as running:
        for _ in range(10):
            with suppress(trio.BrokenResourceError):
                await running.client("wrong")
        assert "penalty" in {event[0] for event in running.told.all("dropped")}
        with pytest.raises(trio.BrokenResourceError):
            await running.client()
        # From another address.
        with trio.socket.socket() as sock:
            await sock.bind(("127.0.0.3", 0))
            await sock.connect(running.addresses[1])
            channel: SSPIChannel[Any] = SSPIChannel(trio.SocketStream(sock), make_initiator())
            await channel.do_handshake()
            await channel.aclose()


# Where it listens


async def test_a_client_of_a_unix_socket_is_served(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with serving(listen=Listen(unix=(path,))) as running:
        channel: SSPIChannel[Any] = SSPIChannel(await trio.open_unix_socket(path), make_initiator())
        await channel.send(b"hello")
        assert await channel.receive() == b"hello"
        await channel.aclose()
        await running.told.until(lambda: running.told.ends)
        assert running.told.ends[0].source == "unix"
    assert not path.exists()


async def test_a_proxy_tells_who_the_client_is() -> None:
    async with serving(connections=Connections(proxy_from=(ip_network("127.0.0.0/8"),))) as running:
        stream = await trio.open_tcp_stream(*running.addresses[0])
        await stream.send_all(b"PROXY TCP4 192.0.2.7 192.0.2.8 4242 2000\r\n")
        channel: SSPIChannel[Any] = SSPIChannel(stream, make_initiator())
        await channel.do_handshake()
        assert running.told.all("login")[0][0]["source"] == "192.0.2.7:4242"
        await channel.aclose()
        # Without the header.
        with pytest.raises(trio.BrokenResourceError):
            await running.client()
        assert [event[0] for event in running.told.all("dropped")] == ["proxy_header"]


async def test_a_proxy_on_a_unix_socket_tells_who_the_client_is_where_that_is_what_connects_there(
    tmp_path: Path,
) -> None:
    path = tmp_path / "socket"
    async with serving(listen=Listen(unix=(path,)), connections=Connections(proxy_unix=True)) as running:
        stream = await trio.open_unix_socket(path)
        await stream.send_all(HEADER)
        channel: SSPIChannel[Any] = SSPIChannel(stream, make_initiator())
        await channel.do_handshake()
        assert running.told.all("login")[0][0]["source"] == "192.0.2.7:4242"
        await channel.aclose()
        # Without the header.
        channel = SSPIChannel(await trio.open_unix_socket(path), make_initiator())
        with pytest.raises(trio.BrokenResourceError):
            await channel.do_handshake()
        await channel.aclose()
        assert running.told.all("dropped") == [("proxy_header", "unix", {})]


HEADER = b"PROXY TCP4 192.0.2.7 192.0.2.8 4242 2000\r\n"
# The balancer's own, of its health checks.
LOCAL_HEADER = b"\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"
TOKEN = b"\x64\x00\x00\x00"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may not know the address of who is gone")
@pytest.mark.parametrize("before", [True, False], ids=["before it is accepted", "after"])
@pytest.mark.parametrize(
    ("proxied", "said", "told"),
    [
        (False, b"", ("nothing_said", "here")),
        (False, TOKEN, ("refused", "here")),
        (True, b"", ("nothing_said", "here")),
        (True, HEADER[:20], ("proxy_header", "here")),
        (True, HEADER, ("nothing_said", "192.0.2.7:4242")),
        (True, LOCAL_HEADER, ("nothing_said", "here")),
        (True, HEADER + TOKEN, ("refused", "192.0.2.7:4242")),
        (True, TOKEN, ("proxy_header", "here")),
    ],
)
async def test_a_reset_is_told_by_what_came_before_it_and_a_header_is_never_a_token(
    *, before: bool, proxied: bool, said: bytes, told: tuple[str, str]
) -> None:
    # Asked for its address when it was reset already, a proxy was nobody, and its header the beginning of a login; each
    # health check was a refused login.
    ports: list[int] = []

    def arrive(address: Any) -> None:
        if before:
            ports.append(reset_connection(address, said))

    proxies = Connections(proxy_from=(ip_network("127.0.0.0/8"),) if proxied else ())
    async with serving(connections=proxies, before=arrive) as running:
        if not before:
            with socket.create_connection(running.addresses[0]) as client:
                await running.told.until(lambda: running.told.all("accepted"))
                ports.append(client.getsockname()[1])
                client.sendall(said)
                reset_at_close(client)
        await running.told.until(lambda: running.told.all("dropped") or running.told.all("login_refused"))
        events = [(cause, source) for cause, source, _ in running.told.all("dropped")]
        events += [("refused", told["source"]) for (told,) in running.told.all("login_refused")]
        what, where = told
        assert events == [(what, f"{LOCAL}:{ports[0]}" if where == "here" else where)]


async def test_who_cannot_be_told_from_a_proxy_is_dropped_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where a system accepts a connection whose peer is gone, and no longer knows its address.
    monkeypatch.setattr(connection, "source_of", lambda stream: None)
    async with serving(listen=Listen(hosts=(LOCAL,), port=0)) as running:
        with pytest.raises(trio.BrokenResourceError):
            await running.client()
        assert running.told.all("dropped") == [("nothing_said", "unknown address", {})]


async def test_why_nothing_can_be_accepted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [OSError(errno.EMFILE, "Too many open files")]

    async def accept(listener: Any) -> Any:
        if failures:
            raise failures.pop()
        return await listener.accept()

    monkeypatch.setattr(_accepting, "accept", accept)
    async with serving() as running:
        await (await running.client()).aclose()
        ((error, _),) = running.told.all("accept_error")
        assert error.errno == errno.EMFILE


# Once


async def greeting(address: tuple[str, int], password: str = PASSWORD) -> list[bytes]:
    channel = await open_sspi_over_tcp_channel(*address, make_initiator(password), wire=WireFormat.SAMPLE)
    async with channel:
        return [message async for message in channel]


@pytest.mark.parametrize("which", [0, 1])
async def test_once_serves_one_client_on_whichever_address_and_ends(which: int) -> None:
    two = Listen(hosts=(LOCAL, "127.0.0.2"), port=0)
    async with serving(Greet(), serve=Serve(wire="sample"), listen=two, once=True) as running:
        assert await greeting(running.addresses[which]) == [SERVER_MESSAGE]
        await running.ended.wait()
    assert running.result == [True]


async def test_once_tells_that_the_login_was_refused() -> None:
    async with serving(Greet(), serve=Serve(wire="sample"), once=True) as running:
        with pytest.raises(trio.BrokenResourceError):
            await greeting(running.addresses[0], "wrong")
        await running.ended.wait()
    assert running.result == [False]


async def test_once_serves_only_one_of_two_clients_that_come_at_the_same_moment() -> None:
    # Both listeners have accepted before either could call the other off.
    two = Listen(hosts=(LOCAL, "127.0.0.2"), port=0)
    async with serving(once=True, listen=two) as running:
        clients = [socket.create_connection(address) for address in running.addresses]
        # Neither will say anything: so the one that is served is refused.
        for client in clients:
            client.shutdown(socket.SHUT_WR)
        await running.ended.wait()
        for client in clients:
            # Closed, and not merely forgotten.
            with client, suppress(ConnectionResetError):
                client.settimeout(10)
                assert client.recv(1) == b""
    assert running.result == [False]


# Reloading


async def test_sighup_brings_new_accounts_and_limits_and_nobody_who_is_connected_notices() -> None:
    loads: list[str] = []
    table = AccountTable()
    table.add(Account("DOM", "alice", nt_hash("new")))

    def load() -> Loaded:
        loads.append("read")
        return Loaded(live=settings(limits=Limits(max_connections=2)).live, acceptor=Acceptor(accounts=table))

    async with serving(reload=load) as running:
        old = await running.client()
        signal.raise_signal(signal.SIGHUP)
        while True:
            # Until the new password holds.
            try:
                new = await running.client("new")
                break
            except trio.BrokenResourceError:
                await trio.lowlevel.checkpoint()
        await old.send(b"still here")
        assert await old.receive() == b"still here"
        with pytest.raises(trio.BrokenResourceError):
            await running.client("new")
        assert "connections" in {event[0] for event in running.told.all("dropped")}
        for client in (old, new):
            await client.aclose()
    assert loads == ["read"]


async def test_a_broken_configuration_changes_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def load() -> Loaded:
        raise ConfigurationError("triosspi.toml:3: unknown key limits.idle_timeot")

    async with serving(reload=load) as running:
        await running.server.reload()
        client = await running.client()
        await client.aclose()
    assert "the configuration stays as it was: triosspi.toml:3: unknown key" in caplog.text


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("Exceeds the limit (4300 digits)"), "ValueError: Exceeds the limit (4300 digits)"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum"),
        (MemoryError(), "MemoryError"),
        (OverflowError("x"), "OverflowError: x"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), "UnicodeDecodeError: "),
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error"),
        (KeyError("two\nlines \x1b[2J" + "x" * 100_000), "KeyError: 'two\\nlines \\x1b[2Jxxx"),
        (Speechless(), "Speechless"),
        (ExceptionGroup("several", [ValueError()]), "ExceptionGroup: several"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("where", ["reading", "applying"])
async def test_nothing_that_a_reload_meets_ends_the_server(
    error: Exception, told: str, where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> Loaded:
        raise error

    def apply(*_: object) -> None:
        raise error

    if where == "applying":
        monkeypatch.setattr("triosspi.service.serving.server.configure_logs", apply)
    good = Loaded(live=settings(limits=Limits(max_connections=1)).live, acceptor=make_acceptor())
    async with serving(reload=load if where == "reading" else lambda: good) as running:
        await running.server.reload()
        # As it was, and all of it.
        clients = [await running.client() for _ in range(2)]
        for client in clients:
            await client.aclose()
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith(f"the configuration stays as it was: the configuration cannot be used: {told}")
    assert len(line) < 500
    assert line.isprintable()


async def test_a_reload_that_hangs_holds_up_nobody_is_given_up_and_does_not_stand_in_the_way_of_the_next(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "triosspi.server")
    monkeypatch.setattr("triosspi.service.serving.reloading.PATIENCE", 0.05)
    answers = threading.Event()
    loads: list[int] = []

    def load() -> Loaded:
        loads.append(len(loads))
        if len(loads) < 3:
            answers.wait()
        return Loaded(live=settings().live, acceptor=make_acceptor())

    async with serving(reload=load) as running:
        for _ in range(2):
            running.server.ask_to_reload("SIGHUP")
            while "could not be read within 0.05 s" not in caplog.text:
                client = await running.client()
                await client.aclose()
            caplog.clear()
        monkeypatch.undo()
        running.server.ask_to_reload("SIGHUP")
        while "the configuration was read again" not in caplog.text:
            await trio.lowlevel.checkpoint()
    answers.set()
    assert loads == [0, 1, 2]


async def test_readings_that_hang_are_bounded_and_many_requests_are_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triosspi.service.serving.reloading.PATIENCE", 0.02)
    answers = threading.Event()
    loads: list[None] = []

    def load() -> None:
        loads.append(None)
        answers.wait()

    reading = Reading(load)
    for _ in range(3):
        reading.ask("SIGHUP")
    await reading.asked()
    for _ in range(MOST_HANGING + 2):
        with pytest.raises(ConfigurationError, match=r"could not be read within 0.02 s") as caught:
            await reading.read()
    assert f"and {MOST_HANGING} such readings hang" in str(caught.value)
    answers.set()
    assert len(loads) <= MOST_HANGING


async def test_a_signal_to_stop_is_obeyed_while_a_reload_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    began = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def load() -> Loaded:
        token.run_sync_soon(began.set)
        answers.wait()
        raise AssertionError

    async with serving(reload=load) as running:
        signal.raise_signal(signal.SIGHUP)
        await began.wait()
        client = await running.client()
        signal.raise_signal(signal.SIGTERM)
        await hears_goodbye(client)
        await running.ended.wait()
    answers.set()


@pytest.mark.parametrize("watch", [True, False])
async def test_a_changed_file_is_a_reason_to_reload_where_that_is_wanted(
    watch: bool, tmp_path: Path, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "triosspi.toml"
    file.write_text("one")
    reloaded = trio.Event()

    async def inline(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
        # The clock would jump over a wait for a thread.
        await trio.lowlevel.checkpoint()
        return function(*args)

    def load() -> Loaded:
        reloaded.set()
        return Loaded(live=settings().live, acceptor=make_acceptor(), files=(file,) if watch else ())

    monkeypatch.setattr(trio.to_thread, "run_sync", inline)
    async with serving(reload=load, files=(file,) if watch else ()) as running:
        await running.server.reload()
        reloaded = trio.Event()
        await trio.sleep(3 * FILES_INTERVAL)
        assert not reloaded.is_set()
        file.write_text("two, and longer")
        await trio.sleep(3 * FILES_INTERVAL)
        assert reloaded.is_set() is watch
        file.unlink()
        await trio.sleep(3 * FILES_INTERVAL)
