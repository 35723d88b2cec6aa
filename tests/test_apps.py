"""What `triosspi serve` serves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from harness import SERVER_MESSAGE, connected_channels, make_acceptor, make_initiator
from triosspi import ConfigurationError, SSPIStream, WireFormat
from triosspi.service.apps import SAMPLE_MESSAGE, Greet, echo, load_app


def test_the_samples_message_is_28_bytes_without_a_nul() -> None:
    assert SAMPLE_MESSAGE == SERVER_MESSAGE
    assert len(SAMPLE_MESSAGE) == 28


async def test_greet_sends_one_message_and_returns() -> None:
    client, server = await connected_channels(wire=WireFormat.SAMPLE)
    await Greet(b"good day")(server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.aclose)
        assert [message async for message in client] == [b"good day"]
        await client.aclose()


async def test_echo_sends_a_batch_back_in_one_piece_and_ends_with_the_goodbye() -> None:
    client, server = await connected_channels()
    batch = [b"one", b"two" * 1000, b"three"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo, server)
        await client.send_many(batch)
        received: list[bytes] = []
        while len(received) < len(batch):
            received += await client.receive_many()
        assert received == batch
        sends = server.transport_stream.calls.count("send_all")
        await client.send_many([b"four", b"five"])
        assert await client.receive_many() == [b"four", b"five"]
        assert server.transport_stream.calls.count("send_all") == sends + 1
        await client.aclose()
    await server.aclose()


class AsPeer:
    """In the place of an `Impersonation`: does not become anybody."""

    async def run_as_peer(self, peer: object, function: Any, *args: Any, **_: object) -> Any:
        return function(*args)


async def test_greet_on_a_stream_waits_for_the_clients_first_word_before_it_becomes_the_client() -> None:
    client_side, server_side = trio.testing.memory_stream_pair()
    impersonation: Any = AsPeer()
    client = SSPIStream(client_side, make_initiator())
    server: Any = SSPIStream(server_side, make_acceptor(), impersonation=impersonation)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Greet(b"good day", impersonate=True), server)
        await client.send_all(b"hello")
        assert await client.receive_some() == b"good day"
    await trio.aclose_forcefully(client)
    await trio.aclose_forcefully(server)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory that is not importable from, whose modules are forgotten in the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_an_application_is_found_in_the_working_directory_first(here: Path) -> None:
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "ourapp.py").write_text("async def app(channel): return 'theirs'\n")
    (here / "ourapp.py").write_text("async def app(channel): return 'ours'\n")
    sys.path.insert(0, str(elsewhere))
    app = load_app("ourapp:app")
    assert app.__code__.co_filename == str(here / "ourapp.py")  # type: ignore[attr-defined]
    load_app("ourapp:app")
    assert sys.path.count(str(here)) == 1


@pytest.mark.parametrize("name", ["plain", "Holder.method", "instance", "bound"])
def test_an_async_function_method_or_callable_object_is_an_application(here: Path, name: str) -> None:
    (here / "someapps.py").write_text(
        "from functools import partial\n"
        "async def plain(channel): pass\n"
        "class Holder:\n"
        "    @staticmethod\n"
        "    async def method(channel): pass\n"
        "    async def __call__(self, channel): pass\n"
        "instance = Holder()\n"
        "bound = partial(plain)\n"
    )
    assert callable(load_app(f"someapps:{name}"))


@pytest.mark.parametrize("name", ["greeting", "module:", ":function", "", ":"])
def test_a_name_that_is_not_module_and_function_says_how_to_write_one(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no application: write 'greet', 'echo' or 'module:function'$"):
        load_app(name)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "ModuleNotFoundError: No module named 'badapp'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError: "),
        # A script without a guard, which ends the program that imports it.
        ("import sys; sys.exit('usage: badapp FILE')", "SystemExit: usage: badapp FILE"),
        ("", "AttributeError: module 'badapp' has no attribute 'app'"),
    ],
)
def test_an_application_that_does_not_load_is_an_error_with_the_reason(
    here: Path, source: str | None, reason: str
) -> None:
    if source is not None:
        (here / "badapp.py").write_text(source)
    with pytest.raises(ConfigurationError) as caught:
        load_app("badapp:app")
    assert str(caught.value).startswith(f"cannot load the application 'badapp:app': {reason}")


@pytest.mark.parametrize(
    "source",
    [
        "def app(channel): pass",
        "app = 1",
        # The class is no application, though its objects are: calling it gives nothing to await.
        "class app:\n    async def __call__(self, channel): pass",
    ],
)
def test_what_is_not_async_is_no_application(here: Path, source: str) -> None:
    (here / "syncapp.py").write_text(source)
    with pytest.raises(ConfigurationError, match="the application 'syncapp:app' is not an async function"):
        load_app("syncapp:app")
