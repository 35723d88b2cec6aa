"""The options of channels and of streams are described once, and everything that makes them takes them alike."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial
from typing import get_type_hints

import pytest
import trio
import trio.testing

import triosspi
from triosspi import (
    Acceptor,
    Initiator,
    LocalProtocolError,
    NegotiateStreamListener,
    SSPIChannel,
    SSPIListener,
    SSPIStream,
    WireFormat,
)
from triosspi.channel import ChannelKeywords, ChannelOptions, StreamKeywords, StreamOptions
from triosspi.security.ntlm.accounts import AccountTable

ACCEPTOR = Acceptor(accounts=AccountTable())
INITIATOR = Initiator(username="alice", password="secret", mechanism="ntlm")
KINDS = (ChannelOptions, StreamOptions)


def kind_of(thing):
    """Which options it takes."""
    stream = "negotiate_stream" in thing.__name__ or thing in (SSPIStream, NegotiateStreamListener)
    return StreamOptions if stream else ChannelOptions


def defaults_of(kind):
    return {field.name: field.default for field in dataclasses.fields(kind)}


# All that takes them, found and not listed: a new one is tested too.
TAKE_OPTIONS = [
    thing
    for name in dir(triosspi)
    if callable(thing := getattr(triosspi, name)) and "**options" in (inspect.getdoc(thing) or "")
]
everything = pytest.mark.parametrize("thing", TAKE_OPTIONS, ids=lambda thing: thing.__name__)


def test_what_makes_channels_takes_their_options():
    assert {thing.__name__ for thing in TAKE_OPTIONS} == {
        "NegotiateStreamListener",
        "SSPIChannel",
        "SSPIListener",
        "SSPIStream",
        "open_negotiate_stream",
        "open_negotiate_stream_listeners",
        "serve_negotiate_stream_over_tcp",
        "open_sspi_over_tcp_channel",
        "open_sspi_over_tcp_listeners",
        "serve_sspi_over_tcp",
    }


@pytest.mark.parametrize(("keywords", "kind"), [(ChannelKeywords, ChannelOptions), (StreamKeywords, StreamOptions)])
def test_type_checkers_know_the_same_options_with_the_same_types(keywords, kind):
    assert get_type_hints(keywords) == get_type_hints(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_each_option_is_described_where_it_is_defined(kind):
    described = inspect.getdoc(kind).partition("Args:")[2].partition("Raises:")[0]
    names = [
        line.strip().partition(":")[0] for line in described.splitlines() if line.startswith("  ") and line[2] != " "
    ]
    assert sorted(names) == sorted(defaults_of(kind))


@everything
def test_the_signature_shows_each_option_as_a_keyword_with_its_default(thing):
    parameters = inspect.signature(thing).parameters
    defaults = defaults_of(kind_of(thing))
    shown = {name: parameters[name].default for name in parameters if name in defaults}
    assert shown == defaults
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in shown)
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


@everything
def test_the_documentation_refers_to_the_one_description(thing):
    assert f"**options: see `{kind_of(thing).__name__}`." in inspect.getdoc(thing)


CALLS = {
    "SSPIChannel": partial(SSPIChannel, trio.testing.memory_stream_pair()[0], ACCEPTOR),
    "SSPIListener": partial(SSPIListener, object(), ACCEPTOR),
    "open_sspi_over_tcp_channel": partial(triosspi.open_sspi_over_tcp_channel, "127.0.0.1", 1, INITIATOR),
    "open_sspi_over_tcp_listeners": partial(triosspi.open_sspi_over_tcp_listeners, 0, ACCEPTOR),
    "serve_sspi_over_tcp": partial(triosspi.serve_sspi_over_tcp, trio.sleep, 0, ACCEPTOR),
    "SSPIStream": partial(SSPIStream, trio.testing.memory_stream_pair()[0], ACCEPTOR),
    "NegotiateStreamListener": partial(NegotiateStreamListener, object(), ACCEPTOR),
    "open_negotiate_stream": partial(triosspi.open_negotiate_stream, "127.0.0.1", 1, INITIATOR),
    "open_negotiate_stream_listeners": partial(triosspi.open_negotiate_stream_listeners, 0, ACCEPTOR),
    "serve_negotiate_stream_over_tcp": partial(triosspi.serve_negotiate_stream_over_tcp, trio.sleep, 0, ACCEPTOR),
}


IMPOSSIBLE = {ChannelOptions: {"max_message_size": 0}, StreamOptions: {"protection": "none"}}


@everything
@pytest.mark.parametrize(
    ("impossible", "error"),
    [(IMPOSSIBLE, LocalProtocolError), (None, TypeError)],
    ids=["an impossible value", "an unknown option"],
)
async def test_what_cannot_be_is_found_before_anything_is_opened(thing, impossible, error, monkeypatch):
    options = {"wires": WireFormat.SAMPLE} if impossible is None else impossible[kind_of(thing)]

    def opened(*_: object, **__: object) -> None:
        pytest.fail("opened")

    monkeypatch.setattr(trio, "open_tcp_stream", opened)
    monkeypatch.setattr(trio, "open_tcp_listeners", opened)
    with pytest.raises(error, match=next(iter(options))):
        result = CALLS[thing.__name__](**options)
        await result


@pytest.mark.parametrize("connect", [triosspi.open_sspi_over_tcp_channel, triosspi.open_negotiate_stream])
async def test_a_client_cannot_be_told_to_impersonate(connect, monkeypatch):
    monkeypatch.setattr(trio, "open_tcp_stream", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(LocalProtocolError, match="impersonation is an acceptor's"):
        await connect("127.0.0.1", 1, INITIATOR, impersonation=object())


@pytest.mark.parametrize(
    ("made_of", "opens"),
    [
        (SSPIChannel, triosspi.open_sspi_over_tcp_listeners),
        (SSPIStream, triosspi.open_negotiate_stream_listeners),
    ],
)
async def test_a_listener_hands_every_option_on_to_what_it_accepts(made_of, opens, monkeypatch):
    class Impersonator:
        run_as_peer = None

    async def run_blocking(function, token):
        return function(token)

    options = {"run_blocking": run_blocking, "impersonation": Impersonator()}
    if made_of is SSPIStream:
        options["protection"] = "sign"
    else:
        options |= {"wire": WireFormat.SAMPLE, "max_message_size": 77}
    assert set(options) == set(defaults_of(kind_of(made_of))), "a new option: give it a value that is not its default"
    made = []
    init = made_of.__init__

    def recording(self, *args, **kwargs):
        made.append(kwargs)
        init(self, *args, **kwargs)

    monkeypatch.setattr(made_of, "__init__", recording)
    listeners = await opens(0, ACCEPTOR, host="127.0.0.1", **options)
    async with listeners[0] as listener:
        peer = await trio.open_tcp_stream(*listener.transport_listener.socket.getsockname())
        async with peer, await listener.accept():
            assert {name: made[0][name] for name in options} == options
