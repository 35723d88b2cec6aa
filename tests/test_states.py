"""The tables of what a session and a channel may become: they are obeyed, whole, and hold nothing that never happens."""

from __future__ import annotations

import enum
import inspect
import re
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing

from harness import (
    close_both,
    connected_channels,
    make_channels,
    make_sessions,
    make_stream_sessions,
    plain_session,
    seal_record,
    tcp_channels,
)
from triosspi import RemoteProtocolError, WireFormat
from triosspi.channel import Endpoint
from triosspi.channel import states as channel_states
from triosspi.channel.states import BECOMES, State
from triosspi.session import BaseSession
from triosspi.session import states as session_states
from triosspi.session.states import HEARING, OURS_BECOMES, OVER, PROVED, THEIRS_BECOMES, Ours, Theirs

Table = dict[Any, frozenset[Any]]
Step = tuple[enum.Enum, enum.Enum]

TABLES: dict[str, tuple[ModuleType, type[enum.Enum], Table]] = {
    "ours": (session_states, Ours, OURS_BECOMES),
    "theirs": (session_states, Theirs, THEIRS_BECOMES),
    "channel": (channel_states, State, BECOMES),
}


def steps_of(table: Table) -> set[Step]:
    return {(state, following) for state, after in table.items() for following in after}


def steps_in_comments(module: ModuleType, states: type[enum.Enum]) -> set[Step]:
    """What the comment at a module's head says: a state in its first column, what it becomes under "becomes"."""
    steps: set[Step] = set()
    column, state, of_this = 0, "", False
    for line in inspect.getsource(module).splitlines():
        if "becomes" in line and line.startswith("#   "):
            column = line.index("becomes")
            of_this = line.startswith(f"#   {states.__name__}")
        elif of_this and (match := re.match(r"#   ([A-Z_]+)?(?= )", line)):
            state = match[1] or state
            if following := re.match(r"[A-Z_]+(?= |$)", line[column:]):
                steps.add((states[state], states[following[0]]))
    return steps


@pytest.mark.parametrize(("module", "states", "table"), TABLES.values(), ids=TABLES)
def test_the_comment_shows_the_table(module, states, table):
    # To CLOSED leads every way, which the comment says in a sentence.
    shown = {step for step in steps_of(table) if step[1] is not State.CLOSED}
    assert set(table) == set(states)
    assert steps_in_comments(module, states) == shown


CHANGES = {
    "ours": (BaseSession, "_ours", "_say"),
    "theirs": (BaseSession, "_theirs", "_hear"),
    "channel": (Endpoint, "_state", "_become"),
}


@pytest.mark.parametrize("name", TABLES)
def test_nothing_becomes_what_the_table_does_not_allow(name):
    _, states, table = TABLES[name]
    cls, field, change = CHANGES[name]
    for state in states:
        for following in states:
            it = cls.__new__(cls)
            setattr(it, field, state)
            if following in table[state]:
                getattr(it, change)(following)
                assert getattr(it, field) is following
            else:
                with pytest.raises(AssertionError, match=str(following)):
                    getattr(it, change)(following)
                assert getattr(it, field) is state


def check_derived(session: BaseSession) -> None:
    assert session._said_all == (session._ours is Ours.SAID_ALL)
    assert session._hearing == (session._theirs in HEARING)
    assert session.receive_ended == (session._theirs in OVER)
    assert session.peer_proved == (session._theirs in PROVED)


def test_what_is_derived_from_a_sessions_states_is_so_from_the_first_to_the_last():
    client, _ = make_sessions(shake=False)
    check_derived(client)
    for state in Theirs:
        for following in THEIRS_BECOMES[state]:
            client._theirs = state
            client._hear(following)
            check_derived(client)
    for state in Ours:
        for following in OURS_BECOMES[state]:
            client._ours = state
            client._say(following)
            check_derived(client)


# ---- what sessions and channels really do ----


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> set[Step]:
    """The steps that are taken."""
    steps: set[Step] = set()

    def recording(cls: type, method: str, field: str) -> None:
        original = getattr(cls, method)

        def record(self: Any, state: enum.Enum) -> None:
            before = getattr(self, field)
            original(self, state)
            steps.add((before, state))

        monkeypatch.setattr(cls, method, record)

    for cls, field, method in CHANGES.values():
        recording(cls, method, field)
    return steps


def hear(session: BaseSession, *data: bytes) -> None:
    """Piece by piece, as if each had come by itself."""
    for piece in data:
        session.receive_data(piece)
        try:
            while session.next_opened():
                pass
        except RemoteProtocolError:
            pass


def test_every_step_of_the_sessions_tables_is_taken(taken):
    # A goodbye first of all, to both sides; raw, since an SPNEGO acceptor is proven by its last token.
    client, server = make_sessions(raw=True)
    for session, other in ((client, server), (server, client)):
        hear(session, seal_record(other, b""))
        session.goodbye()
    # A message, then a goodbye; a message, then a forged one.
    for last in (lambda session: seal_record(session, b""), lambda _: bytes([20, 0, 0, 0]) + bytes(20)):
        client, server = make_sessions(raw=True)
        hear(server, client.seal([b"hello"]), last(client))
        client.goodbye()
    # An end without a word.
    client, server = make_sessions(raw=True)
    hear(client, b"")
    # An SPNEGO acceptor's last token.
    make_sessions()
    # The sample's format, where each side has one thing to do.
    acceptor, initiator = (plain_session(usage, WireFormat.SAMPLE) for usage in ("accept", "initiate"))
    hear(initiator, acceptor.seal([b"hello"]), b"")
    # A stream, which has no goodbye: its end after some data, and without any.
    for data in ([b"hello"], []):
        streams = make_stream_sessions()
        hear(streams[1], *map(streams[0].seal_checked, data), b"")
        streams[0].end()
    assert {step for step in taken if not isinstance(step[0], State)} == steps_of(OURS_BECOMES) | steps_of(
        THEIRS_BECOMES
    )


async def test_every_step_of_the_channels_table_is_taken(taken, autojump_clock):
    # NEW, HANDSHAKE, OPEN, STOPPED, CLOSED; and OPEN, CLOSED.
    client, server = await connected_channels()
    server.stop_receiving()
    await close_both(client, server)
    # STOPPED before the handshake; STOPPED and OPEN, BROKEN, CLOSED.
    client, server = make_channels()
    server.stop_receiving()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    for channel in (client, server):
        channel.give_up(OSError("gone"))
        await channel.aclose()
    # NEW to BROKEN, and to CLOSED.
    client, server = make_channels()
    client.give_up(OSError("gone"))
    await close_both(client, server)
    # HANDSHAKE to BROKEN.
    client, server = make_channels()
    await server.transport_stream.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await client.do_handshake()
    # HANDSHAKE to CLOSED.
    client, server = make_channels()

    async def shake() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await client.do_handshake()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(shake)
        await trio.testing.wait_all_tasks_blocked()
        await client.aclose()
    assert {step for step in taken if isinstance(step[0], State)} == steps_of(BECOMES)


# ---- what depends on the states ----


async def test_a_peer_that_has_proved_its_key_has_done_so_whatever_comes_behind_its_message():
    """A forged record may come in the same piece as an honest message, or in the next: the message's handler may not
    see a difference before it receives again."""
    client, server = make_sessions()
    hear_first = client.seal([b"hello"]) + bytes([20, 0, 0, 0]) + bytes(20)
    server.receive_data(hear_first)
    assert server.next_opened() == [b"hello"]
    assert server.peer_proved
    server.check_may_act_as_peer()
    with pytest.raises(RemoteProtocolError):
        server.next_opened()


async def test_a_send_that_breaks_the_channel_wakes_the_task_in_receive():
    """It would wait for a message that nobody would take any more."""
    client, server = await tcp_channels()
    woken = trio.Event()

    async def receive() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await client.receive()
        woken.set()

    async def broken(_data: bytes) -> None:
        raise trio.BrokenResourceError("no route to host")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        client.transport_stream.send_all = broken
        with pytest.raises(trio.BrokenResourceError):
            await client.send(b"hello")
        with trio.fail_after(10):
            await woken.wait()
    await trio.aclose_forcefully(client)
    await trio.aclose_forcefully(server)
