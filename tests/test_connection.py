"""The life of a connection: which hooks are called, in which order, and that it ends whatever they do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing

from harness import Channel, make_channels, tcp_channels
from triosspi import AuthenticationError
from triosspi.tcp.connection import Attempt, ConnectionServer, LiveSession
from triosspi.tcp.endings import End, LoginFailure
from triosspi.tcp.server import CountingServer, ServerStatistics

TIMEOUT = 30.0


class Recorder(ConnectionServer[Channel]):
    """Writes down what is called. What stands in ``raising`` raises instead."""

    def __init__(self, handler: Callable[[Channel], Any], raising: str = "") -> None:
        self.handler = handler
        self.events: list[Any] = []
        self.raising = raising

    def event(self, name: str, *about: Any) -> None:
        self.events.append((name, *about) if about else name)
        if name == self.raising:
            raise ValueError(f"a bug in {name}")

    @property
    def handshake_timeout(self) -> float:
        return TIMEOUT

    def admit(self, arrived: Channel) -> Attempt | None:
        self.event("admit")
        return RecordedAttempt(self, arrived)

    def ended(self, session: LiveSession, end: End) -> None:
        self.event("ended", end.outcome)

    def closing_failed(self) -> None:
        self.event("closing_failed")

    def closed(self, session: LiveSession, end: End) -> None:
        self.event("closed", end.outcome)


class RecordedAttempt(Attempt):
    def __init__(self, server: Recorder, channel: Channel) -> None:
        super().__init__("somewhere")
        self._event = server.event
        self._channel = channel

    def begin(self, deadline: trio.CancelScope) -> None:
        self._event("begin")

    async def open(self) -> Channel | None:
        self._event("open")
        return self._channel

    def check(self, channel: Channel) -> bool:
        self._event("check")
        return True

    def failed(self, failure: LoginFailure) -> None:
        self._event("failed", failure.kind)

    def logged_in(self, channel: Channel) -> LiveSession:
        self._event("logged_in")
        return LiveSession(channel, self.source, None)

    def over(self) -> None:
        self._event("over")

    def leave(self) -> None:
        self._event("leave")


TO_LOGIN = ["admit", "begin", "open", "check", "logged_in", "over"]


async def greet(channel: Channel) -> None:
    await channel.send(b"hello")


async def receive_and_close(client: Channel) -> None:
    with suppress(trio.BrokenResourceError, trio.EndOfChannel):
        await client.receive()
    await client.aclose()


async def serve(recorder: Recorder, *, password: str | None = None) -> tuple[bool, Channel]:
    """Serve one connection; returns what `serve` has, and the server's channel."""
    client, server = make_channels(**({} if password is None else {"password": password}))
    served: list[bool] = []

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive_and_close, client)
        served.append(await recorder.serve(server))
    return served[0], server


async def test_a_peer_that_logs_in_goes_all_the_way():
    recorder = Recorder(greet)
    served, _ = await serve(recorder)
    assert served
    assert recorder.events == [*TO_LOGIN, ("ended", "finished"), ("closed", "finished")]


async def test_a_peer_that_is_refused_gets_to_the_handshake():
    recorder = Recorder(greet)
    served, _ = await serve(recorder, password="wrong")
    assert not served
    assert recorder.events == ["admit", "begin", "open", "over", ("failed", "refused"), "leave"]


async def test_a_peer_that_is_refused_after_its_login_never_meets_the_handler():
    class Choosy(Recorder):
        def event(self, name: str, *about: Any) -> None:
            super().event(name, *about)
            if name == "check":
                raise AuthenticationError("not you")

    recorder = Choosy(lambda _channel: pytest.fail("called"))
    served, _ = await serve(recorder)
    assert not served
    assert recorder.events == ["admit", "begin", "open", "check", "over", ("failed", "refused"), "leave"]


async def test_a_peer_that_says_nothing_in_time_is_out(autojump_clock):
    recorder = Recorder(greet)
    client, server = make_channels()
    began = trio.current_time()
    assert not await recorder.serve(server)
    assert trio.current_time() - began == pytest.approx(TIMEOUT)
    assert recorder.events == ["admit", "begin", "open", "over", ("failed", "timeout"), "leave"]
    await trio.aclose_forcefully(client)


async def test_who_is_turned_away_is_closed_and_nothing_more_is_asked():
    class Closed(Recorder):
        def admit(self, arrived: Channel) -> Attempt | None:
            super().admit(arrived)
            return None

    recorder = Closed(greet)
    client, server = make_channels()
    assert not await recorder.serve(server)
    assert recorder.events == ["admit"]
    assert "aclose" in server.transport_stream.calls
    await trio.aclose_forcefully(client)


async def test_what_is_not_to_be_served_was_told_when_it_was_opened():
    class Turned(RecordedAttempt):
        async def open(self) -> Channel | None:
            await super().open()
            return None

    class Turning(Recorder):
        def admit(self, arrived: Channel) -> Attempt | None:
            super().admit(arrived)
            return Turned(self, arrived)

    recorder = Turning(greet)
    client, server = make_channels()
    assert not await recorder.serve(server)
    assert recorder.events == ["admit", "begin", "open", "over", "leave"]
    assert "aclose" in server.transport_stream.calls
    await trio.aclose_forcefully(client)


async def test_a_cancelled_session_is_told_and_closed_too():
    async def wait(_channel: Channel) -> None:
        nursery.cancel_scope.cancel()
        await trio.sleep_forever()

    recorder = Recorder(wait)
    async with trio.open_nursery() as nursery:
        await serve(recorder)
    assert recorder.events == [*TO_LOGIN, ("ended", "shutdown"), ("closed", "shutdown")]


HOOKS = ["admit", "begin", "open", "check", "logged_in", "over", "failed", "leave", "ended", "closing_failed", "closed"]


@pytest.mark.parametrize("hook", HOOKS)
async def test_whatever_a_hook_raises_the_connection_ends_and_no_other(hook, caplog):
    """An exception out of `serve` would go to the nursery of all connections, and take all of them down."""
    recorder = Recorder(greet, raising=hook)
    tracer = None
    if hook == "closing_failed":

        def closed() -> None:
            raise ValueError("a tracer's bug")

        tracer = type("Tracer", (), {"closed": staticmethod(closed)})()
    client, server = make_channels(**({"password": "wrong"} if hook in ("failed", "leave") else {}))
    if tracer is not None:
        server.tracer = tracer

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_and_close, client)
            await recorder.serve(server)
    assert any((event if isinstance(event, str) else event[0]) == hook for event in recorder.events)
    assert "aclose" in server.transport_stream.calls
    assert any(record.exc_info and f"a bug in {hook}" in str(record.exc_info[1]) for record in caplog.records)
    caplog.clear()


async def test_a_refused_peer_sees_the_end_and_no_reset_though_it_has_said_more_than_was_read():
    """Closing a socket with input that nobody has read resets the connection."""
    client, server = await tcp_channels(handshake=False)
    counts = ServerStatistics()
    await client.transport_stream.send_all(b"\x04\0\0\0GET / HTTP/1.1\r\n" + bytes(100_000))
    await CountingServer(greet, TIMEOUT, counts).serve(server)
    assert counts.refused == 1
    with trio.fail_after(10):
        assert await client.transport_stream.receive_some() == b""
    await trio.aclose_forcefully(client)


def test_the_recorder_knows_all_hooks():
    # These are called by hooks that are known, or only read.
    fixed = {"given_up", "may_try_again", "refusals", "refused"}
    hooks = {name for cls in (Attempt, ConnectionServer) for name in vars(cls) if not name.startswith("_")}
    assert hooks - fixed - {
        "source",
        "started",
        "seconds",
        "serve",
        "handshake_timeout",
        "stopping",
        "out_of_time",
    } == set(HOOKS)
