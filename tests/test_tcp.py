"""Servers and clients over TCP: what a server survives, counts and logs; and peers that share none of our code."""

from __future__ import annotations

import errno
import logging
import os
import re
import select
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
import spnego
import trio
import trio.testing
from spnego import NegotiateOptions

from harness import (
    PASSWORD,
    SERVER_MESSAGE,
    Channel,
    PlainCredential,
    RecordingStream,
    dword,
    echo,
    frame,
    make_acceptor,
    make_initiator,
    reset_at_close,
    reset_connection,
)
from triosspi import (
    AuthenticationError,
    ConfigurationError,
    ImpersonationError,
    Initiator,
    ServerStatistics,
    SSPIChannel,
    SSPIListener,
    TicketExpiredError,
    TruncatedError,
    UnsealError,
    WireFormat,
    open_sspi_over_tcp_channel,
    open_sspi_over_tcp_listeners,
    serve_sspi_listeners,
    serve_sspi_over_tcp,
)
from triosspi.tcp.accepting import SHORTAGE_INTERVAL, format_address, peer_address

LOCALHOST = "127.0.0.1"


async def greet(channel: Channel) -> None:
    await channel.send(SERVER_MESSAGE)


# ---- a server in memory ----


class FakeSocket:
    def __init__(self, address: Any) -> None:
        self.address = address

    def getpeername(self) -> Any:
        if isinstance(self.address, OSError):
            raise self.address
        return self.address


class SocketLikeStream(RecordingStream):
    def __init__(self, stream: Any, address: Any = ("192.0.2.1", 50000)) -> None:
        super().__init__(stream)
        self.socket = FakeSocket(address)


class MemoryListener(trio.abc.Listener[Any]):
    """Accepts what `connect` connects, and fails with what it is given to `fail` with."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[Any](1000)
        self.closed = False

    async def accept(self) -> Any:
        item = await self._receive.receive()
        if isinstance(item, BaseException):
            raise item
        return item

    async def aclose(self) -> None:
        self.closed = True
        await trio.lowlevel.checkpoint()

    def fail(self, error: BaseException) -> None:
        self._send.send_nowait(error)

    def connect(self, address: Any = ("192.0.2.1", 50000)) -> tuple[Any, SocketLikeStream]:
        """(the client's stream, the server's)."""
        ours, theirs = trio.testing.memory_stream_pair()
        stream = SocketLikeStream(theirs, address)
        self._send.send_nowait(stream)
        return ours, stream


class Server:
    def __init__(self, listener: MemoryListener, statistics: ServerStatistics) -> None:
        self.listener = listener
        self.statistics = statistics

    def connect(self, password: str = PASSWORD, **options: Any) -> Channel:
        stream, _ = self.listener.connect()
        return SSPIChannel(stream, make_initiator(password, **options))


@asynccontextmanager
async def serving(handler: Any, *, credential: Any = None, **options: Any) -> AsyncIterator[Server]:
    transport_listener = MemoryListener()
    channel_options = {name: options.pop(name) for name in ("run_blocking", "wire", "make_tracer") if name in options}
    listener: Any = SSPIListener(transport_listener, credential or make_acceptor(), **channel_options)
    server = Server(transport_listener, ServerStatistics())
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_sspi_listeners, handler, [listener], statistics=server.statistics, **options))
        yield server
        nursery.cancel_scope.cancel()
    assert transport_listener.closed


def server_log(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "triosspi.server"]


@pytest.fixture(autouse=True)
def _everything_is_logged(caplog):
    caplog.set_level(logging.DEBUG, logger="triosspi")


async def assert_still_serves(server: Server) -> None:
    """A new client is served as if nothing had happened."""
    async with server.connect() as client:
        await client.send(b"are you there?")
        assert await client.receive() == b"are you there?"


# ---- what a server survives ----


async def test_a_client_that_says_goodbye_is_counted_and_logged_in_one_line(caplog):
    async with serving(echo) as server:
        await assert_still_serves(server)
        await trio.testing.wait_all_tasks_blocked()
    assert server.statistics == ServerStatistics(accepted=1, authenticated=1)
    assert server_log(caplog) == [("INFO", "192.0.2.1:50000: DOM\\alice: closed by the peer")]


async def test_a_handler_that_returns_needs_no_log_line_and_closes_the_channel(caplog):
    async with serving(greet) as server, server.connect() as client:
        assert await client.receive() == SERVER_MESSAGE
        with pytest.raises(trio.EndOfChannel):
            await client.receive()
    assert server.statistics == ServerStatistics(accepted=1, authenticated=1)
    assert server_log(caplog) == []


async def test_a_handler_that_raises_is_logged_and_the_server_goes_on(caplog):
    async def handler(channel: Channel) -> None:
        if await channel.receive() == b"divide by zero":
            raise ZeroDivisionError("by the client's wish")
        await channel.send(b"are you there?")

    async with serving(handler) as server:
        async with server.connect() as client:
            await client.send(b"divide by zero")
            # Closed properly nevertheless.
            with pytest.raises(trio.EndOfChannel):
                await client.receive()
        await assert_still_serves(server)
    assert server.statistics.handler_errors == 1
    assert server.statistics.authenticated == 2
    assert server_log(caplog) == [("ERROR", "192.0.2.1:50000: DOM\\alice: the handler failed")]
    assert "by the client's wish" in caplog.text


async def test_a_handler_that_raises_a_group_of_errors_is_one_that_raises(caplog):
    async def handler(channel: Channel) -> None:
        async def fail(error: Exception) -> None:
            raise error

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, trio.BrokenResourceError())
            nursery.start_soon(fail, ValueError("also"))

    async with serving(handler) as server:
        async with server.connect() as client:
            with pytest.raises(trio.EndOfChannel):
                await client.receive()
        await trio.testing.wait_all_tasks_blocked()
    assert (server.statistics.handler_errors, server.statistics.lost) == (1, 0)
    assert len(server_log(caplog)) == 1


async def test_a_handlers_group_of_lost_connections_is_a_lost_connection(caplog):
    # Two tasks that use one channel both see its end, and a nursery makes a group of that.
    async def handler(channel: Channel) -> None:
        broken = trio.Event()

        async def receive() -> None:
            try:
                await channel.receive()
            finally:
                broken.set()

        async def send() -> None:
            with trio.CancelScope(shield=True):
                await broken.wait()
                await channel.send(b"x")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            async with trio.open_nursery() as inner:
                inner.start_soon(receive)

    async with serving(handler) as server:
        client = server.connect()
        await client.do_handshake()
        await client.transport_stream.send_all(frame(b"rubbish"))
        await drain(client.transport_stream)
        await trio.testing.wait_all_tasks_blocked()
    assert (server.statistics.handler_errors, server.statistics.lost) == (0, 1)
    assert [level for level, _ in server_log(caplog)] == ["WARNING"]


def _broken(cause: BaseException) -> trio.BrokenResourceError:
    broken = trio.BrokenResourceError(str(cause))
    broken.__cause__ = cause
    return broken


def _during(context: BaseException, error: Exception) -> Exception:
    error.__context__ = context
    return error


LEFT = trio.EndOfChannel()
LEFT_SILENTLY = _broken(TruncatedError("left", at_boundary=True))
CUT = _broken(TruncatedError("cut", at_boundary=False))
FORGED = _broken(UnsealError("forged"))
NO_ACCOUNT = ImpersonationError("no account here")
BUG = ValueError("a bug")


@pytest.mark.parametrize(
    ("error", "handler_errors", "lost", "levels"),
    [
        (ExceptionGroup("", [LEFT, LEFT_SILENTLY]), 0, 0, ["INFO"]),
        (ExceptionGroup("", [LEFT, CUT]), 0, 1, ["WARNING: cut"]),
        (ExceptionGroup("", [LEFT, FORGED]), 0, 1, ["WARNING: forged"]),
        (ExceptionGroup("", [FORGED, LEFT]), 0, 1, ["WARNING: forged"]),
        (ExceptionGroup("", [CUT, FORGED, LEFT_SILENTLY]), 0, 1, ["WARNING: forged"]),
        (
            ExceptionGroup("", [LEFT, ExceptionGroup("", [CUT, ExceptionGroup("", [FORGED])])]),
            0,
            1,
            ["WARNING: forged"],
        ),
        (_during(FORGED, trio.EndOfChannel()), 0, 1, ["WARNING: forged"]),
        (ExceptionGroup("", [LEFT, BUG]), 1, 0, ["ERROR"]),
        (ExceptionGroup("", [BUG, FORGED]), 1, 1, ["ERROR", "WARNING: forged"]),
        (_during(FORGED, ValueError("wrapped")), 1, 1, ["ERROR", "WARNING: forged"]),
        (ExceptionGroup("", [LEFT, NO_ACCOUNT]), 1, 0, ["WARNING: no account here"]),
        (ExceptionGroup("", [NO_ACCOUNT, BUG]), 1, 0, ["ERROR"]),
        (ExceptionGroup("", [NO_ACCOUNT, FORGED]), 1, 1, ["WARNING: no account here", "WARNING: forged"]),
    ],
    ids=str,
)
async def test_the_worst_of_all_that_a_handler_ran_into_is_how_its_session_ended(
    error, handler_errors, lost, levels, caplog
):
    async def handler(_channel: Channel) -> None:
        raise error

    async with serving(handler) as server:
        async with server.connect() as client:
            await raised_by(client.receive)
        await trio.testing.wait_all_tasks_blocked()
    assert (server.statistics.handler_errors, server.statistics.lost) == (handler_errors, lost)
    told = [
        level if level != "WARNING" else f"{level}: {text.rpartition(': ')[2]}" for level, text in server_log(caplog)
    ]
    assert told == levels


async def raised_by(call: Any) -> None:
    with pytest.raises((trio.BrokenResourceError, trio.EndOfChannel)):
        await call()


# ---- tickets ----


class TicketCredential(PlainCredential):
    """An acceptor whose clients have Kerberos tickets for so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__("accept", [b"done"])
        self.seconds = seconds

    def new_context(self, demanded: object) -> Any:
        context = super().new_context(demanded)
        context.peer.expires_at = datetime.now(UTC) + timedelta(seconds=self.seconds)
        return context


async def looking(channel: Channel) -> None:
    while True:
        with trio.move_on_after(0.5):
            await channel.receive()


async def deaf(_channel: Channel) -> None:
    await trio.sleep_forever()


async def returning_at_the_notice(channel: Channel) -> None:
    with pytest.raises(trio.EndOfChannel):
        await looking(channel)


async def sending_too_late(channel: Channel) -> None:
    await trio.sleep(100.5)
    raise _broken(TicketExpiredError("the peer's Kerberos ticket has ended"))


@pytest.mark.parametrize(
    ("handler", "earliest", "latest"),
    [(looking, 100, 102), (returning_at_the_notice, 100, 102), (sending_too_late, 100, 102), (deaf, 105, 105)],
)
async def test_a_handler_has_notice_of_its_tickets_end_and_is_cancelled_when_it_does_not_look(
    handler, earliest, latest, autojump_clock, caplog
):
    credential = TicketCredential(100)
    async with serving(handler, credential=credential) as server:
        ours, _ = server.listener.connect()
        start = trio.current_time()
        await ours.send_all(frame(b"NTLMSSP\0token"))
        assert await ours.receive_some() == frame(b"done")
        # The goodbye, an empty record, and the end.
        assert await ours.receive_some() == frame(frame(dword(1) + bytes(12)))
        assert earliest - 1 < trio.current_time() - start < latest + 1
        await ours.aclose()
        await trio.testing.wait_all_tasks_blocked()
    assert (server.statistics.expired, server.statistics.lost, server.statistics.handler_errors) == (1, 0, 0)
    assert [text.rpartition(": ")[2] for _, text in server_log(caplog)] == ["the Kerberos ticket has ended"]


@pytest.mark.parametrize("late", [False, True])
async def test_a_bug_is_a_bug_before_and_after_the_tickets_end(late, autojump_clock):
    async def handler(_channel: Channel) -> None:
        await trio.sleep(102 if late else 50)
        raise ZeroDivisionError

    async with serving(handler, credential=TicketCredential(100)) as server:
        ours, _ = server.listener.connect()
        await ours.send_all(frame(b"NTLMSSP\0token"))
        await trio.sleep(200)
    assert (server.statistics.expired, server.statistics.handler_errors) == (0, 1)


async def test_a_peer_that_leaves_before_its_ticket_has_ended_has_left(autojump_clock):
    credential = TicketCredential(100)
    async with serving(echo, credential=credential) as server:
        ours, _ = server.listener.connect()
        await ours.send_all(frame(b"NTLMSSP\0token"))
        assert await ours.receive_some() == frame(b"done")
        await ours.aclose()
        await trio.sleep(200)
    assert server.statistics == ServerStatistics(accepted=1, authenticated=1)


async def test_a_reply_that_comes_after_the_peers_goodbye_is_an_ordinary_end(caplog):
    async def handler(channel: Channel) -> None:
        with pytest.raises(trio.EndOfChannel):
            await channel.receive()
        await channel.send(b"too late")

    async with serving(handler) as server:
        async with server.connect() as client:
            await client.do_handshake()
        await trio.testing.wait_all_tasks_blocked()
    assert server.statistics == ServerStatistics(accepted=1, authenticated=1)
    assert [level for level, _ in server_log(caplog)] == ["INFO"]


async def test_a_message_that_does_not_open_is_a_lost_connection(caplog):
    async with serving(echo) as server:
        client = server.connect()
        await client.do_handshake()
        await client.transport_stream.send_all(frame(frame(bytes(16)) + b"forged"))
        with pytest.raises(trio.BrokenResourceError):
            await client.receive()
        await assert_still_serves(server)
        await trio.testing.wait_all_tasks_blocked()
    assert (server.statistics.lost, server.statistics.handler_errors) == (1, 0)
    (level, text), _ = server_log(caplog)
    assert level == "WARNING"
    assert text.startswith("192.0.2.1:50000: DOM\\alice: connection lost: a message did not open")


async def test_an_end_between_two_messages_is_an_ordinary_end(caplog):
    async with serving(echo) as server:
        client = server.connect()
        await client.send(b"hello")
        assert await client.receive() == b"hello"
        await client.transport_stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
    assert server.statistics == ServerStatistics(accepted=1, authenticated=1)
    assert server_log(caplog) == [("INFO", "192.0.2.1:50000: DOM\\alice: closed by the peer")]


async def test_an_end_within_a_message_is_a_lost_connection(caplog):
    async with serving(echo) as server:
        client = server.connect()
        await client.do_handshake()
        await client.transport_stream.send_all(dword(100) + b"half a mess")
        await client.transport_stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
    assert server.statistics.lost == 1
    ((level, text),) = server_log(caplog)
    assert level == "WARNING"
    assert "within a record" in text


async def test_a_refused_login_never_reaches_the_handler(caplog):
    called = []

    async def handler(channel: Channel) -> None:
        called.append(channel.peer)
        await echo(channel)

    async with serving(handler) as server:
        for raw in (False, True):
            with pytest.raises(trio.BrokenResourceError) as caught:
                await server.connect("wrong", raw=raw).receive()
            assert isinstance(caught.value.__cause__, AuthenticationError)
        assert called == []
        await assert_still_serves(server)
        await trio.testing.wait_all_tasks_blocked()
    assert len(called) == 1
    assert server.statistics == ServerStatistics(accepted=3, authenticated=1, refused=2)
    refusals = server_log(caplog)[:2]
    assert [level for level, _ in refusals] == ["WARNING"] * 2
    assert all("192.0.2.1:50000: login refused: NTLM: wrong password for 'DOM" in text for _, text in refusals)


async def test_why_a_login_was_refused_is_not_told_to_the_client():
    told = []
    async with serving(echo) as server:
        for options in ({"password": "wrong"}, {"username": "DOM\\nobody"}):
            client = server.connect(**options)
            stream = client.transport_stream
            await raised(client.do_handshake)
            told.append((str(client._cause), await drain(stream)))
    assert told[0] == told[1]


async def raised(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(trio.BrokenResourceError) as caught:
        await call()
    return caught.value


async def drain(stream: Any) -> bytes:
    data = b""
    async for more in stream:
        data += more
    return data


@pytest.mark.parametrize(
    "hello",
    [b"\x05", dword(0), dword(0xFFFFFFFF), frame(b"GET / HTTP/1.1\r\n\r\n"), b"\x16\x03\x01\x02\x00\x01"],
    ids=["one byte", "empty token", "huge token", "rubbish", "TLS"],
)
async def test_a_stranger_never_reaches_the_handler(hello, caplog):
    async def handler(channel: Channel) -> None:
        raise AssertionError("nobody has logged in")

    async with serving(handler) as server:
        stream, server_stream = server.listener.connect()
        await stream.send_all(hello)
        await stream.send_eof()
        assert await drain(stream) == b""
        assert server_stream.calls[-1] == "aclose"
    assert server.statistics == ServerStatistics(accepted=1, refused=1)
    ((level, text),) = server_log(caplog)
    assert level == "WARNING"
    assert text.startswith("192.0.2.1:50000: login refused: ")
    assert "\n" not in text


async def test_who_ends_the_connection_before_the_first_byte_is_no_refused_login(caplog):
    async with serving(echo) as server:
        stream, server_stream = server.listener.connect()
        await stream.send_eof()
        assert await drain(stream) == b""
        assert server_stream.calls[-1] == "aclose"
    assert server.statistics == ServerStatistics(accepted=1, nothing_said=1)
    assert [level for level, _ in server_log(caplog)] == ["DEBUG"]


async def test_a_login_that_never_comes_is_cut_off_in_time(autojump_clock, caplog):
    async with serving(echo) as server:
        start = trio.current_time()
        stream, _ = server.listener.connect()
        assert await drain(stream) == b""
        assert trio.current_time() - start == pytest.approx(30)
        await assert_still_serves(server)
    assert server.statistics.timed_out == 1
    assert server.statistics.refused == 0
    assert server_log(caplog)[0] == ("WARNING", "192.0.2.1:50000: no login within 30 s")


async def test_the_deadline_is_for_the_whole_handshake_not_for_each_read(autojump_clock):
    async with serving(echo, handshake_timeout=5) as server:
        start = trio.current_time()
        stream, _ = server.listener.connect()
        with pytest.raises(trio.BrokenResourceError):
            for byte in dword(1000) + b"NTLMSSP\0" + bytes(992):
                await stream.send_all(bytes([byte]))
                await trio.sleep(1)
        assert trio.current_time() - start <= 7
    assert server.statistics.timed_out == 1


async def test_no_deadline_of_the_handshake_reaches_into_the_handler(autojump_clock):
    async with serving(echo, handshake_timeout=5) as server, server.connect() as client:
        await client.do_handshake()
        await trio.sleep(1000)
        await client.send(b"still here")
        assert await client.receive() == b"still here"
    assert server.statistics.timed_out == 0


async def test_one_client_that_dawdles_holds_up_nobody_else():
    async with serving(echo) as server:
        dawdlers = [server.listener.connect() for _ in range(20)]
        await assert_still_serves(server)
        assert server.statistics.accepted == 21
        assert len(dawdlers) == 20


async def test_an_error_of_ours_during_a_handshake_costs_only_that_connection(caplog):
    failures = [RuntimeError("no thread to be had")]

    async def run_blocking(step: Any, token: bytes | None) -> bytes:
        await trio.lowlevel.checkpoint()
        if failures:
            raise failures.pop()
        return step(token)

    credential = PlainCredential("accept", [b"done"], may_block=True)
    async with serving(greet, credential=credential, run_blocking=run_blocking) as server:
        for _ in range(2):
            stream, _ = server.listener.connect()
            await stream.send_all(frame(b"NTLMSSP\0"))
            await stream.send_eof()
            await drain(stream)
    assert server.statistics == ServerStatistics(accepted=2, authenticated=1, refused=1)
    assert server_log(caplog)[0][0] == "ERROR"
    assert "no thread to be had" in caplog.text


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS], ids=errno.errorcode.get)
async def test_a_machine_out_of_something_is_given_time_and_the_server_goes_on(number, autojump_clock, caplog):
    async with serving(echo) as server:
        start = trio.current_time()
        for _ in range(3):
            server.listener.fail(OSError(number, "out of it"))
        await assert_still_serves(server)
        # It must not spin meanwhile.
        assert trio.current_time() - start >= 0.3
    assert server.statistics.accept_errors == 3
    errors = [text for level, text in server_log(caplog) if level == "ERROR"]
    assert len(errors) == 1
    assert errors[0].startswith("cannot accept: out of it")


async def test_a_shortage_that_lasts_is_told_now_and_then_with_a_count_and_so_is_its_end(autojump_clock, caplog):
    # It fails ten times a second, and each time was a line.
    async with serving(echo) as server:
        for _ in range(int(SHORTAGE_INTERVAL * 25)):
            server.listener.fail(OSError(errno.EMFILE, "Too many open files"))
        await trio.sleep(SHORTAGE_INTERVAL * 3)
        # A connection ends, and the next one takes its descriptor: that is not the end of the shortage.
        await assert_still_serves(server)
        server.listener.fail(OSError(errno.EMFILE, "Too many open files"))
        await trio.sleep(SHORTAGE_INTERVAL)
        await assert_still_serves(server)
        await assert_still_serves(server)
        server.listener.fail(OSError(errno.ENFILE, "Too many open files in system"))
        await trio.sleep(1)
    assert server.statistics.accept_errors == SHORTAGE_INTERVAL * 25 + 2
    told = [text for level, text in server_log(caplog) if level in ("ERROR", "WARNING")]
    process = "cannot accept: Too many open files, this process's limit (ulimit -n, LimitNOFILE=); "
    assert told[0] == process + "it is tried again and again"
    times = [int(re.fullmatch(re.escape(process) + r"(\d+) times in the last 10 s", text)[1]) for text in told[1:3]]
    assert times == pytest.approx([100, 100], abs=2)
    assert told[-2].startswith("accepting again: it had failed 251 times in ")
    assert told[-1].startswith("cannot accept: Too many open files in system, the machine's limit (fs.file-max); it is")
    assert len(told) <= 6


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EPROTO, errno.EPERM], ids=errno.errorcode.get)
async def test_a_connection_that_was_gone_before_it_was_accepted_is_passed_over(number, caplog):
    async with serving(echo) as server:
        server.listener.fail(OSError(number, "gone"))
        await assert_still_serves(server)
    assert server.statistics.accept_errors == 1
    assert server_log(caplog)[0] == ("INFO", "a connection was gone before it was accepted: gone")


async def test_an_error_of_the_listening_socket_itself_ends_the_server():
    with pytest.raises(ExceptionGroup) as caught:
        async with serving(echo) as server:
            server.listener.fail(OSError(errno.EINVAL, "not listening"))
            await trio.sleep_forever()
    assert caught.group_contains(OSError, match="not listening", depth=None)


async def test_the_listeners_are_closed_at_the_end():
    async with serving(echo) as server:
        assert not server.listener.closed
    assert server.listener.closed


async def test_connections_are_closed_when_the_server_is_cancelled():
    async with serving(echo) as server:
        client = server.connect()
        await client.do_handshake()
        stream, server_stream = server.listener.connect()
        await trio.testing.wait_all_tasks_blocked()
    assert await drain(stream) == b""
    assert server_stream.calls[-1] == "aclose"
    error = await raised(client.receive)
    assert isinstance(error.__cause__, TruncatedError)


async def test_a_handler_that_fails_while_the_server_is_cancelled_is_logged_too(caplog):
    async def clean_up_badly() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("while cleaning up")

    async def handler(_channel: Channel) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clean_up_badly)
            nursery.start_soon(trio.sleep_forever)

    async with serving(handler) as server:
        await server.connect().do_handshake()
        await trio.testing.wait_all_tasks_blocked()
    assert server.statistics.handler_errors == 1
    assert "while cleaning up" in caplog.text


async def test_a_handler_that_is_cancelled_with_the_server_has_not_failed(caplog):
    async def handler(_channel: Channel) -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled as exc:
            raise BaseExceptionGroup("from a nursery", [exc]) from None

    async with serving(handler) as server:
        await server.connect().do_handshake()
        await trio.testing.wait_all_tasks_blocked()
    assert server.statistics == ServerStatistics(accepted=1, authenticated=1)
    assert server_log(caplog) == []


async def test_an_error_of_ours_during_a_close_costs_only_that_connection(caplog):
    def fail(name: str) -> None:
        if name == "send_eof":
            raise ZeroDivisionError("in the farewell")

    async def handler(channel: Channel) -> None:
        if await channel.receive() == b"fail":
            channel.transport_stream.before = fail
        await channel.send(b"are you there?")

    async with serving(handler) as server:
        client = server.connect()
        await client.send(b"fail")
        await drain(client.transport_stream)
        await trio.aclose_forcefully(client)
        await assert_still_serves(server)
    assert server.statistics.handler_errors == 1
    assert "in the farewell" in caplog.text


async def test_handlers_run_in_the_nursery_that_is_given_to_the_server():
    parents = []

    async def handler(channel: Channel) -> None:
        parents.append(trio.lowlevel.current_task().parent_nursery)
        await echo(channel)

    async with trio.open_nursery() as handlers:
        async with serving(handler, handler_nursery=handlers) as server:
            client = server.connect()
            await client.send(b"1")
            assert await client.receive() == b"1"
        # Nobody listens any more, and who was let in stays.
        await client.send(b"2")
        assert await client.receive() == b"2"
        assert parents == [handlers]
        await client.aclose()


async def test_nothing_secret_is_logged(caplog):
    caplog.set_level(logging.DEBUG)
    async with serving(echo) as server:
        for password in (PASSWORD, "hunter2"):
            client = server.connect(password, raw=True)
            await client.send(b"a private message")
            if password == PASSWORD:
                assert await client.receive() == b"a private message"
            await client.aclose()
        await trio.testing.wait_all_tasks_blocked()
    ours = "\n".join(
        f"{record.getMessage()} {record.exc_info}" for record in caplog.records if "triosspi" in record.name
    )
    assert "closed by the peer" in ours
    assert "login refused" in ours
    for secret in (PASSWORD, "hunter2", "a private message", "NTLMSSP", "TlRMTVNTU"):
        assert secret not in ours


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a bug"),
        OSError(errno.EMFILE, "Too many open files"),
        PermissionError(errno.EACCES, "Permission denied"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_tracer_that_cannot_be_made_is_one_connections_end(error, caplog):
    # An OSError was taken for the listener's, and ended the server; the stream was dropped, unclosed.
    tracers: list[Any] = []

    def make_tracer() -> Any:
        tracers.append(None)
        if len(tracers) == 1:
            raise error
        return SimpleTracer()

    async with serving(echo, make_tracer=make_tracer) as server:
        ours, theirs = server.listener.connect()
        assert await ours.receive_some() == b""
        assert theirs.calls == ["aclose"]
        await assert_still_serves(server)
        await trio.testing.wait_all_tasks_blocked()
    counts = server.statistics
    assert (counts.accepted, counts.refused, counts.authenticated, counts.accept_errors) == (2, 1, 1, 0)
    assert ("ERROR", "make_tracer failed: its connection is given up") in server_log(caplog)
    assert str(error) in caplog.text


class SimpleTracer:
    def __getattr__(self, _name: str) -> Any:
        return lambda *_: None


async def test_a_channel_that_cannot_be_made_of_a_connection_closes_it():
    class Credential(PlainCredential):
        def new_context(self, demanded: object) -> Any:
            raise KeyboardInterrupt

    listener = MemoryListener()
    ours, theirs = listener.connect()
    credential: Any = Credential("accept", [])
    with pytest.raises(KeyboardInterrupt):
        await SSPIListener(listener, credential).accept()
    assert theirs.calls == ["aclose"]
    assert await ours.receive_some() == b""


@pytest.mark.parametrize(
    "address", [OSError(errno.ENOTCONN, "gone"), "", b"\0abstract"], ids=["gone", "unix", "abstract"]
)
async def test_a_client_without_an_ip_address_is_served_like_any_other(address, caplog):
    # A Unix socket's peer has an empty name; a peer that is gone has none at all.
    async with serving(greet) as server:
        stream, _ = server.listener.connect(address)
        client: Channel = SSPIChannel(stream, make_initiator())
        assert await client.receive() == SERVER_MESSAGE
        await client.aclose()
        stream, _ = server.listener.connect(address)
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        stream, _ = server.listener.connect(address)
        await stream.send_all(b"?")
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
    assert server.statistics.authenticated == server.statistics.nothing_said == 1
    assert server_log(caplog)[1][1].startswith("unknown address: login refused")


async def test_a_server_counts_for_itself_if_nobody_looks():
    transport_listener = MemoryListener()
    listener: Any = SSPIListener(transport_listener, make_acceptor())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_sspi_listeners, greet, [listener])
        client: Channel = SSPIChannel(transport_listener.connect()[0], make_initiator())
        assert await client.receive() == SERVER_MESSAGE
        await client.aclose()
        nursery.cancel_scope.cancel()


def test_addresses_are_written_as_in_a_url():
    assert format_address("192.0.2.1", 50000) == "192.0.2.1:50000"
    assert format_address("2001:db8::1", 50000) == "[2001:db8::1]:50000"


async def test_an_ipv6_peer_has_four_parts_to_its_address():
    stream: Any = SocketLikeStream(None, ("2001:db8::1", 50000, 0, 0))
    assert peer_address(stream) == "[2001:db8::1]:50000"


# ---- over TCP ----


@asynccontextmanager
async def tcp_server(handler: Any, **options: Any) -> AsyncIterator[int]:
    """Serves on a port of the kernel's choice; gives the port."""
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(
            partial(serve_sspi_over_tcp, handler, 0, make_acceptor(), host=LOCALHOST, **options)
        )
        yield listener.transport_listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("raw", [False, True], ids=["spnego", "raw"])
async def test_a_server_and_a_client_exchange_messages(raw):
    messages = [b"%d" % i * 100 for i in range(1, 50)]
    async with (
        tcp_server(echo) as port,
        await open_sspi_over_tcp_channel(LOCALHOST, port, make_initiator(raw=raw)) as client,
    ):
        await client.send_many(messages)
        assert [await client.receive() for _ in messages] == messages


async def test_many_clients_are_served_at_once():
    async def handler(channel: Channel) -> None:
        present.append(channel)
        if len(present) == 20:
            everybody_is_here.set()
        await everybody_is_here.wait()
        await echo(channel)

    async def client() -> None:
        async with await open_sspi_over_tcp_channel(LOCALHOST, port, make_initiator()) as channel:
            await channel.send(b"hello")
            assert await channel.receive() == b"hello"

    present: list[Channel] = []
    everybody_is_here = trio.Event()
    statistics = ServerStatistics()
    async with tcp_server(handler, statistics=statistics) as port, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(client)
    assert statistics.authenticated == 20


async def test_a_server_of_the_sample_sends_its_message_and_closes():
    async with tcp_server(greet, wire=WireFormat.SAMPLE) as port:
        client = await open_sspi_over_tcp_channel(LOCALHOST, port, make_initiator(), wire=WireFormat.SAMPLE)
        async with client:
            assert [message async for message in client] == [SERVER_MESSAGE]


async def test_a_peers_reset_costs_only_its_connection(caplog):
    reset = trio.Event()

    async def handler(channel: Channel) -> None:
        try:
            await echo(channel)
        except trio.BrokenResourceError:
            reset.set()
            raise

    statistics = ServerStatistics()
    async with tcp_server(handler, statistics=statistics) as port:
        client = await open_sspi_over_tcp_channel(LOCALHOST, port, make_initiator())
        await client.send(b"1")
        assert await client.receive() == b"1"
        client.transport_stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await client.transport_stream.aclose()
        await reset.wait()
        async with await open_sspi_over_tcp_channel(LOCALHOST, port, make_initiator()) as another:
            await another.send(b"2")
            assert await another.receive() == b"2"
    assert (statistics.lost, statistics.handler_errors) == (1, 0)
    assert server_log(caplog)[0][0] == "WARNING"


async def test_a_peers_reset_during_the_handshake_is_a_refused_login(caplog):
    statistics = ServerStatistics()
    async with tcp_server(echo, statistics=statistics) as port:
        stream = await trio.open_tcp_stream(LOCALHOST, port)
        await stream.send_all(dword(100))
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.aclose()
        async with await open_sspi_over_tcp_channel(LOCALHOST, port, make_initiator()) as another:
            await another.send(b"2")
            assert await another.receive() == b"2"
    assert statistics.refused == 1
    assert "login refused" in server_log(caplog)[0][1]


@pytest.mark.parametrize("when", ["before it is accepted", "after"])
async def test_a_reset_before_the_first_byte_is_a_health_check_and_no_refused_login(when, caplog):
    # Load balancers check so, every second: one warning and one refused login each.
    statistics = ServerStatistics()
    (listener,) = await open_sspi_over_tcp_listeners(0, make_acceptor(), host=LOCALHOST)
    address = listener.transport_listener.socket.getsockname()
    if when == "before it is accepted":
        reset_connection(address)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_sspi_listeners, echo, [listener], statistics=statistics))
        if when == "after":
            stream = await trio.open_tcp_stream(*address)
            await trio.testing.wait_all_tasks_blocked()
            reset_at_close(stream.socket)
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert statistics == ServerStatistics(accepted=1, nothing_said=1)
    assert [level for level, _ in server_log(caplog)] == ["DEBUG"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may not know the address of who is gone")
async def test_who_has_said_something_and_reset_the_connection_is_refused_by_address(caplog):
    statistics = ServerStatistics()
    (listener,) = await open_sspi_over_tcp_listeners(0, make_acceptor(), host=LOCALHOST)
    port = reset_connection(listener.transport_listener.socket.getsockname(), dword(100))
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_sspi_listeners, echo, [listener], statistics=statistics))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert server_log(caplog)[0][1].startswith(f"{LOCALHOST}:{port}: login refused: ")


async def test_starting_a_server_gives_its_listeners():
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(serve_sspi_over_tcp, echo, 0, make_acceptor(), host=LOCALHOST))
        assert len(listeners) == 1
        assert isinstance(listeners[0], SSPIListener)
        assert listeners[0].transport_listener.socket.getsockname()[0] == LOCALHOST
        nursery.cancel_scope.cancel()


async def test_opening_listeners_is_lazy():
    (listener,) = await open_sspi_over_tcp_listeners(0, make_acceptor(), host=LOCALHOST, backlog=5, max_message_size=9)
    async with listener:
        port = listener.transport_listener.socket.getsockname()[1]
        stream = await trio.open_tcp_stream(LOCALHOST, port)
        # Nobody has said a word, and the channel is there.
        channel = await listener.accept()
        with pytest.raises(trio.NeedHandshakeError):
            _ = channel.peer
        client: Channel = SSPIChannel(stream, make_initiator())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send, b"first use")
            assert await channel.receive() == b"first use"
        assert channel.sizes.max_message == 9
        await trio.aclose_forcefully(client)
        await trio.aclose_forcefully(channel)


async def test_by_default_all_interfaces_are_listened_on():
    listeners = await open_sspi_over_tcp_listeners(0, make_acceptor())
    hosts = {listener.transport_listener.socket.getsockname()[0] for listener in listeners}
    for listener in listeners:
        await listener.aclose()
    assert "0.0.0.0" in hosts
    assert hosts <= {"0.0.0.0", "::"}


class TwoAddresses(trio.abc.HostnameResolver):
    """A machine has 127.0.0.1, and this name says two."""

    def __init__(self, other: str) -> None:
        self._other = other

    async def getaddrinfo(self, host: Any, port: Any, *_args: Any) -> Any:
        assert host == b"two"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in (self._other, LOCALHOST)]

    async def getnameinfo(self, *_args: Any) -> Any:
        raise AssertionError


async def test_of_the_addresses_of_a_name_those_are_listened_on_that_the_machine_has(caplog):
    # TEST-NET-1, which nobody has; as ::1 is "localhost" where there is no IPv6.
    trio.socket.set_custom_hostname_resolver(TwoAddresses("192.0.2.1"))
    (listener,) = await open_sspi_over_tcp_listeners(0, make_acceptor(), host="two")
    async with listener:
        assert listener.transport_listener.socket.getsockname()[0] == LOCALHOST
    assert [level for level, text in server_log(caplog) if "not listening on 192.0.2.1" in text] == ["WARNING"]
    with pytest.raises(OSError, match=os.strerror(errno.EADDRNOTAVAIL)):
        await open_sspi_over_tcp_listeners(0, make_acceptor(), host="192.0.2.1")


async def test_opening_a_channel_is_lazy():
    (silent,) = await trio.open_tcp_listeners(0, host=LOCALHOST)
    async with silent:
        port = silent.socket.getsockname()[1]
        client = await open_sspi_over_tcp_channel(LOCALHOST, port, make_initiator())
        with pytest.raises(trio.NeedHandshakeError):
            _ = client.peer
        await client.aclose()


async def test_a_connection_that_cannot_be_made_is_an_os_error():
    (listener,) = await trio.open_tcp_listeners(0, host=LOCALHOST)
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    with pytest.raises(OSError, match="connect"):
        await open_sspi_over_tcp_channel(LOCALHOST, port, make_initiator())


async def test_the_default_target_is_the_host_that_is_connected_to():
    async with tcp_server(greet) as port:
        for target, expected in ((None, f"host/{LOCALHOST}"), ("http/www.example", "http/www.example")):
            initiator = make_initiator(target=target)
            async with await open_sspi_over_tcp_channel(LOCALHOST, port, initiator) as client:
                await client.do_handshake()
                assert client.peer.principal == expected
            assert initiator.target == target


def test_a_target_must_be_an_spn():
    with pytest.raises(ConfigurationError, match="SPN"):
        Initiator(target="server.example")


async def test_a_bad_limit_is_refused_before_anybody_connects():
    with trio.move_on_after(0.1) as scope, pytest.raises(ValueError, match="max_message_size"):
        await serve_sspi_over_tcp(echo, 0, make_acceptor(), host=LOCALHOST, max_message_size=0)
    assert not scope.cancelled_caught


@pytest.mark.skipif(sys.platform == "win32", reason="no Unix sockets in Trio there")
class Unusable(PlainCredential):
    """Fails where it is told to."""

    def __init__(self, where: str) -> None:
        super().__init__("initiate", [])
        self.where = where

    def with_default_host(self, host: str) -> Any:
        if self.where == "with_default_host":
            raise ConfigurationError("no target's host")
        return self

    def new_context(self, demanded: object) -> Any:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("credential", "size", "error", "connects"),
    [
        (make_initiator(), 0, ValueError, False),
        (make_initiator(), 2**32, ValueError, False),
        (Unusable("with_default_host"), 100, ConfigurationError, False),
        (Unusable("new_context"), 100, ZeroDivisionError, True),
    ],
)
async def test_a_channel_that_cannot_be_opened_leaves_no_connection_behind(credential, size, error, connects):
    (listener,) = await trio.open_tcp_listeners(0, host=LOCALHOST)
    async with listener:
        port = listener.socket.getsockname()[1]
        with pytest.raises(error):
            await open_sspi_over_tcp_channel(LOCALHOST, port, credential, max_message_size=size)
        if connects:
            async with await listener.accept() as stream:
                assert await stream.receive_some() == b""
        else:
            assert select.select([listener.socket], [], [], 0)[0] == []


async def test_a_unix_socket_can_be_served(tmp_path):
    path = str(tmp_path / "socket")
    listening = trio.socket.socket(trio.socket.AF_UNIX)
    await listening.bind(path)
    listening.listen()
    listener = SSPIListener(trio.SocketListener(listening), make_acceptor())
    async with listener, trio.open_nursery() as nursery:
        await nursery.start(serve_sspi_listeners, greet, [listener])
        client: Channel = SSPIChannel(await trio.open_unix_socket(path), make_initiator())
        async with client:
            assert [message async for message in client] == [SERVER_MESSAGE]
        nursery.cancel_scope.cancel()


# ---- peers that share none of our code: blocking, pyspnego alone, their own reading of the wire ----


class Line:
    """A blocking connection and a pyspnego context, in both wire formats."""

    def __init__(self, connection: socket.socket, context: spnego.ContextProxy) -> None:
        connection.settimeout(30)
        self.connection = connection
        self.context = context

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.connection.recv(size - len(data))
            if not more:
                raise EOFError(f"{len(data)} of {size} bytes")
            data += more
        return data

    def read_block(self) -> bytes:
        (size,) = struct.unpack("<I", self.read(4))
        return self.read(size)

    def write_block(self, data: bytes) -> None:
        self.connection.sendall(struct.pack("<I", len(data)) + data)

    def shake_hands(self, *, first: bool) -> None:
        token = self.context.step() if first else self.context.step(self.read_block())
        while True:
            if token:
                self.write_block(token)
            if self.context.complete:
                return
            token = self.context.step(self.read_block())

    def record(self, message: bytes) -> bytes:
        sealed = self.context.wrap_winrm(message)
        return struct.pack("<I", len(sealed.header)) + sealed.header + sealed.data

    def unseal(self, record: bytes) -> bytes:
        (size,) = struct.unpack_from("<I", record)
        return self.context.unwrap_winrm(record[4 : 4 + size], record[4 + size :])

    def send(self, message: bytes) -> None:
        self.write_block(self.record(message))

    def receive(self) -> bytes:
        return self.unseal(self.read_block())

    def receive_sample(self) -> bytes:
        """As the sample's client: until the buffer of 2048 bytes is full or the end has come."""
        data = b""
        while len(data) < 2048 and (more := self.connection.recv(2048 - len(data))):
            data += more
        return self.unseal(data)


foreign_packagings = pytest.mark.parametrize(
    ("protocol", "options"),
    [("ntlm", NegotiateOptions.use_ntlm), ("negotiate", NegotiateOptions.use_negotiate)],
    ids=["raw", "spnego"],
)


def foreign_client(port: int, talk: Callable[[Line], Any], password: str, protocol: str, options: Any) -> Any:
    context = spnego.client("DOM\\alice", password, "server", "host", protocol=protocol, options=options)
    with socket.create_connection((LOCALHOST, port)) as connection:
        line = Line(connection, context)
        line.shake_hands(first=True)
        return talk(line)


@foreign_packagings
async def test_a_foreign_client_receives_the_samples_message(protocol, options):
    async with tcp_server(greet, wire=WireFormat.SAMPLE) as port:
        received = await trio.to_thread.run_sync(foreign_client, port, Line.receive_sample, PASSWORD, protocol, options)
    assert received == SERVER_MESSAGE


@foreign_packagings
async def test_a_foreign_client_talks_in_the_framed_format(protocol, options, caplog):
    def talk(line: Line) -> list[bytes]:
        received = []
        for i in range(20):
            line.send(b"%d" % i * (i + 1))
            received.append(line.receive())
        # Two in one segment, then the goodbye; the server answers with the end of the stream.
        line.connection.sendall(b"".join(frame(line.record(message)) for message in (b"a", b"b")))
        received += [line.receive(), line.receive()]
        line.send(b"")
        with pytest.raises(EOFError, match="0 of 4 bytes"):
            line.receive()
        return received

    async with tcp_server(echo) as port:
        received = await trio.to_thread.run_sync(foreign_client, port, talk, PASSWORD, protocol, options)
        await trio.testing.wait_all_tasks_blocked()
    assert received == [b"%d" % i * (i + 1) for i in range(20)] + [b"a", b"b"]
    assert "closed by the peer" in server_log(caplog)[0][1]


@foreign_packagings
async def test_a_foreign_client_hears_our_goodbye(protocol, options):
    def talk(line: Line) -> list[bytes]:
        return [line.receive(), line.receive()]

    async with tcp_server(greet) as port:
        received = await trio.to_thread.run_sync(foreign_client, port, talk, PASSWORD, protocol, options)
    assert received == [SERVER_MESSAGE, b""]


@pytest.mark.parametrize("wire", [WireFormat.SAMPLE, WireFormat.FRAMED])
@foreign_packagings
async def test_a_foreign_client_with_a_wrong_password_gets_nothing(wire, protocol, options):
    def talk(line: Line) -> None:
        # Raw NTLM's client believes itself logged in.
        assert line.connection.recv(1) == b""
        raise EOFError

    async with tcp_server(greet, wire=wire) as port:
        with pytest.raises((EOFError, ConnectionResetError)):
            await trio.to_thread.run_sync(foreign_client, port, talk, "wrong", protocol, options)


def foreign_server(listening: socket.socket, talk: Callable[[Line], Any], protocol: str, options: Any) -> Any:
    listening.settimeout(30)
    connection, _ = listening.accept()
    with connection:
        line = Line(connection, spnego.server(protocol=protocol, options=options))
        line.shake_hands(first=False)
        return talk(line)


@pytest.fixture
def listening(tmp_path, monkeypatch):
    """A listening socket; and the account file that pyspnego's own acceptor reads."""
    accounts = tmp_path / "accounts"
    accounts.write_text(f"DOM:alice:{PASSWORD}\n")
    monkeypatch.setenv("NTLM_USER_FILE", str(accounts))
    with socket.create_server((LOCALHOST, 0)) as server:
        yield server


async def against_foreign_server(
    listening: socket.socket, talk: Callable[[Line], Any], use: Any, protocol: str, options: Any, **channel: Any
) -> Any:
    results = []

    async def serve() -> None:
        results.append(await trio.to_thread.run_sync(foreign_server, listening, talk, protocol, options))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        port = listening.getsockname()[1]
        initiator = make_initiator(raw=protocol == "ntlm")
        async with await open_sspi_over_tcp_channel(LOCALHOST, port, initiator, **channel) as client:
            await use(client)
    return results[0]


@foreign_packagings
async def test_a_foreign_server_sends_us_the_samples_message(listening, protocol, options):
    def talk(line: Line) -> str | None:
        record = line.record(SERVER_MESSAGE)
        assert len(record) == 48
        line.connection.sendall(record)
        line.connection.shutdown(socket.SHUT_WR)
        assert line.connection.recv(1) == b""
        return line.context.client_principal

    async def use(client: Channel) -> None:
        assert [message async for message in client] == [SERVER_MESSAGE]

    who = await against_foreign_server(listening, talk, use, protocol, options, wire=WireFormat.SAMPLE)
    assert who == "DOM\\alice"


@foreign_packagings
async def test_a_foreign_server_talks_in_the_framed_format(listening, protocol, options):
    def talk(line: Line) -> list[bytes]:
        received = []
        while message := line.receive():
            received.append(message)
            line.send(message)
        # Our goodbye was an empty message; behind it comes the end of our sending.
        assert line.connection.recv(1) == b""
        return received

    async def use(client: Channel) -> None:
        for i in range(20):
            await client.send(b"%d" % i)
            assert await client.receive() == b"%d" % i

    received = await against_foreign_server(listening, talk, use, protocol, options)
    assert received == [b"%d" % i for i in range(20)]


@foreign_packagings
async def test_a_foreign_servers_goodbye_is_an_end(listening, protocol, options):
    def talk(line: Line) -> None:
        line.send(b"last words")
        line.send(b"")

    async def use(client: Channel) -> None:
        assert [message async for message in client] == [b"last words"]

    await against_foreign_server(listening, talk, use, protocol, options)


@foreign_packagings
async def test_a_foreign_server_that_replays_is_found_out(listening, protocol, options):
    def talk(line: Line) -> None:
        record = frame(line.record(b"pay 10"))
        line.connection.sendall(record + record)

    async def use(client: Channel) -> None:
        assert await client.receive() == b"pay 10"
        error = await raised(client.receive)
        assert isinstance(error.__cause__, UnsealError)

    await against_foreign_server(listening, talk, use, protocol, options)
