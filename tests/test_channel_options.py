"""A channel's options are described once, and everything that makes channels takes them alike."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial
from typing import get_type_hints

import pytest
import trio
import trio.testing

import triosspi
from triosspi import Acceptor, Initiator, LocalProtocolError, SSPIChannel, SSPIListener, WireFormat
from triosspi.channel import ChannelKeywords, ChannelOptions
from triosspi.security.ntlm.accounts import AccountTable

ACCEPTOR = Acceptor(accounts=AccountTable())
INITIATOR = Initiator(username="alice", password="secret", mechanism="ntlm")
FIELDS = dataclasses.fields(ChannelOptions)

# All that takes them, found and not listed: a new one is tested too.
TAKE_OPTIONS = [
    thing
    for name in dir(triosspi)
    if callable(thing := getattr(triosspi, name)) and "**options" in (inspect.getdoc(thing) or "")
]
everything = pytest.mark.parametrize("thing", TAKE_OPTIONS, ids=lambda thing: thing.__name__)


def test_what_makes_channels_takes_their_options():
    assert {thing.__name__ for thing in TAKE_OPTIONS} == {
        "SSPIChannel",
        "SSPIListener",
        "open_sspi_over_tcp_channel",
        "open_sspi_over_tcp_listeners",
        "serve_sspi_over_tcp",
    }


def test_type_checkers_know_the_same_options_with_the_same_types():
    assert get_type_hints(ChannelKeywords) == get_type_hints(ChannelOptions)


def test_each_option_is_described_where_it_is_defined():
    described = inspect.getdoc(ChannelOptions).partition("Args:")[2].partition("Raises:")[0]
    names = [
        line.strip().partition(":")[0] for line in described.splitlines() if line.startswith("  ") and line[2] != " "
    ]
    assert names == [field.name for field in FIELDS]


@everything
def test_the_signature_shows_each_option_as_a_keyword_with_its_default(thing):
    parameters = inspect.signature(thing).parameters
    shown = {name: parameters[name].default for name in parameters if name in {field.name for field in FIELDS}}
    assert shown == {field.name: field.default for field in FIELDS}
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in shown)
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


@everything
def test_the_documentation_refers_to_the_one_description(thing):
    assert "**options: see `ChannelOptions`." in inspect.getdoc(thing)


CALLS = {
    "SSPIChannel": partial(SSPIChannel, trio.testing.memory_stream_pair()[0], ACCEPTOR),
    "SSPIListener": partial(SSPIListener, object(), ACCEPTOR),
    "open_sspi_over_tcp_channel": partial(triosspi.open_sspi_over_tcp_channel, "127.0.0.1", 1, INITIATOR),
    "open_sspi_over_tcp_listeners": partial(triosspi.open_sspi_over_tcp_listeners, 0, ACCEPTOR),
    "serve_sspi_over_tcp": partial(triosspi.serve_sspi_over_tcp, trio.sleep, 0, ACCEPTOR),
}


@everything
@pytest.mark.parametrize(
    ("options", "error"),
    [({"max_message_size": 0}, LocalProtocolError), ({"wires": WireFormat.SAMPLE}, TypeError)],
    ids=["an impossible value", "an unknown option"],
)
async def test_what_cannot_be_is_found_before_anything_is_opened(thing, options, error, monkeypatch):
    def opened(*_: object, **__: object) -> None:
        pytest.fail("opened")

    monkeypatch.setattr(trio, "open_tcp_stream", opened)
    monkeypatch.setattr(trio, "open_tcp_listeners", opened)
    with pytest.raises(error, match=next(iter(options))):
        result = CALLS[thing.__name__](**options)
        await result


async def test_a_client_cannot_be_told_to_impersonate(monkeypatch):
    monkeypatch.setattr(trio, "open_tcp_stream", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(LocalProtocolError, match="impersonation is an acceptor's"):
        await triosspi.open_sspi_over_tcp_channel("127.0.0.1", 1, INITIATOR, impersonation=object())


async def test_a_listener_hands_every_option_on_to_its_channels(monkeypatch):
    class Impersonator:
        run_as_peer = None

    async def run_blocking(function, token):
        return function(token)

    options = {
        "wire": WireFormat.SAMPLE,
        "max_message_size": 77,
        "run_blocking": run_blocking,
        "impersonation": Impersonator(),
    }
    assert set(options) == {field.name for field in FIELDS}, "a new option: give it a value that is not its default"
    made = []
    init = SSPIChannel.__init__

    def recording(self, *args, **kwargs):
        made.append(kwargs)
        init(self, *args, **kwargs)

    monkeypatch.setattr(SSPIChannel, "__init__", recording)
    listeners = await triosspi.open_sspi_over_tcp_listeners(0, ACCEPTOR, host="127.0.0.1", **options)
    async with listeners[0] as listener:
        peer = await trio.open_tcp_stream(*listener.transport_listener.socket.getsockname())
        async with peer, await listener.accept():
            assert {name: made[0][name] for name in options} == options
