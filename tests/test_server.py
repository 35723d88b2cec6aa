"""What `triosspi serve` runs."""

from __future__ import annotations

import errno
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import trio

from harness import PASSWORD, SERVER_MESSAGE, make_acceptor, make_initiator
from triosspi import ConfigurationError, SSPIChannel, WireFormat, open_sspi_over_tcp_channel
from triosspi.service import server
from triosspi.service.apps import Greet
from triosspi.service.server import ANY_HOST, DemoAccount, ServeOptions, bound_address, open_listeners, run_server

LOCAL = "127.0.0.1"


def options(*hosts: str, written: list[str] | None = None, **others: Any) -> ServeOptions:
    given: dict[str, Any] = {
        "handler": Greet(),
        "acceptor": make_acceptor(),
        "wire": WireFormat.SAMPLE,
        "hosts": hosts,
        "port": 0,
        "once": False,
        "verbose": False,
        "dump_tokens": False,
        "write": ([] if written is None else written).append,
    }
    return ServeOptions(**{**given, **others})


async def close(listeners: list[Any]) -> None:
    for listener in listeners:
        await listener.aclose()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


async def greeting(address: tuple[str, int], password: str = PASSWORD) -> list[bytes]:
    channel = await open_sspi_over_tcp_channel(*address, make_initiator(password), wire=WireFormat.SAMPLE)
    async with channel:
        return [message async for message in channel]


# Listening


async def test_by_default_every_interface_is_bound_ipv4_and_ipv6_on_one_port() -> None:
    listeners = await open_listeners(options())
    addresses = [bound_address(listener) for listener in listeners]
    await close(listeners)
    assert [host for host, _ in addresses] == list(ANY_HOST[: 1 + has_ipv6()])
    assert len({port for _, port in addresses}) == 1


async def test_every_host_named_is_bound() -> None:
    listeners = await open_listeners(options(LOCAL, "127.0.0.2"))
    addresses = [bound_address(listener) for listener in listeners]
    await close(listeners)
    assert [host for host, _ in addresses] == [LOCAL, "127.0.0.2"]
    assert addresses[0][1] == addresses[1][1] > 0


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
async def test_a_machine_without_ipv6_is_served_on_ipv4_unless_ipv6_was_asked_for(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = server.open_sspi_over_tcp_listeners

    async def without_ipv6(*args: Any, host: str, **others: Any) -> Any:
        if ":" in host:
            raise OSError(number, "what Trio says about it")
        return await real(*args, host=host, **others)

    monkeypatch.setattr(server, "open_sspi_over_tcp_listeners", without_ipv6)
    listeners = await open_listeners(options())
    assert [bound_address(listener)[0] for listener in listeners] == ["0.0.0.0"]
    await close(listeners)
    with pytest.raises(ConfigurationError, match=r"^cannot listen on \[::1\]:\d+: "):
        await open_listeners(options(LOCAL, "::1"))


async def test_a_port_in_use_is_an_error_and_what_was_bound_already_is_free_again() -> None:
    # Two hosts, and only the second one's port is taken.
    with socket.socket() as taken, socket.socket() as again:
        taken.bind(("127.0.0.2", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError) as caught:
            await open_listeners(options(LOCAL, "127.0.0.2", port=port))
        again.bind((LOCAL, port))
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.2:{port}: Address already in use; choose others with --host and --port"
    )


async def test_an_address_of_another_machine_is_an_error_with_the_systems_reason() -> None:
    with pytest.raises(ConfigurationError, match=r"192\.0\.2\.1:0: Cannot assign requested address; choose "):
        await open_listeners(options("192.0.2.1"))


async def test_an_unknown_host_is_an_error_with_the_resolvers_reason() -> None:
    class NoSuchName(trio.abc.HostnameResolver):
        async def getaddrinfo(self, *_args: Any) -> Any:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        async def getnameinfo(self, *_args: Any) -> Any:
            raise AssertionError

    trio.socket.set_custom_hostname_resolver(NoSuchName())
    with pytest.raises(ConfigurationError, match=r"^cannot listen on nowhere:0: Name or service not known; choose "):
        await open_listeners(options("nowhere"))


async def test_a_host_that_no_name_can_be_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"^cannot listen on a\.\.b:0: no host can be called so; choose "):
        await open_listeners(options("a..b"))


# Running


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_the_server_even_as_soon_as_its_address_is_known(number: signal.Signals) -> None:
    def started(_listeners: list[Any]) -> None:
        signal.raise_signal(number)

    before = signal.getsignal(number)
    assert await run_server(options(LOCAL), started)
    assert signal.getsignal(number) is before


async def test_clients_are_served_until_the_signal_and_those_connected_are_cut_off() -> None:
    async def forever(channel: SSPIChannel[Any]) -> None:
        await channel.receive()

    addresses: list[tuple[str, int]] = []
    ready = trio.Event()

    def started(listeners: list[Any]) -> None:
        addresses.append(bound_address(listeners[0]))
        ready.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_server, options(LOCAL, handler=forever, wire=WireFormat.FRAMED), started)
        await ready.wait()
        channels = [await open_sspi_over_tcp_channel(*addresses[0], make_initiator()) for _ in range(3)]
        for channel in channels:
            await channel.do_handshake()
        signal.raise_signal(signal.SIGTERM)
        for channel in channels:
            with pytest.raises((trio.BrokenResourceError, trio.EndOfChannel)):
                await channel.receive()
            await channel.aclose()


async def run_once(talk: Callable[[list[tuple[str, int]]], Any], *hosts: str, **others: Any) -> tuple[bool, Any]:
    """Whether `run_server` served its one client, and what `talk` returned."""
    said: list[Any] = []
    result: list[bool] = []

    async def client(listeners: list[Any]) -> None:
        said.append(await talk([bound_address(listener) for listener in listeners]))

    async with trio.open_nursery() as nursery:

        def started(listeners: list[Any]) -> None:
            nursery.start_soon(client, listeners)

        result.append(await run_server(options(*hosts, once=True, **others), started))
    return result[0], said[0]


@pytest.mark.parametrize("which", [0, 1])
async def test_once_serves_one_client_on_whichever_address_and_ends(which: int) -> None:
    async def talk(addresses: list[tuple[str, int]]) -> list[bytes]:
        return await greeting(addresses[which])

    assert await run_once(talk, LOCAL, "127.0.0.2") == (True, [SERVER_MESSAGE])


async def test_once_tells_that_the_login_was_refused() -> None:
    async def talk(addresses: list[tuple[str, int]]) -> None:
        with suppress(trio.BrokenResourceError):
            await greeting(addresses[0], "wrong")

    assert await run_once(talk, LOCAL) == (False, None)


async def test_once_serves_only_one_of_two_clients_that_come_at_the_same_moment() -> None:
    # Both listeners have accepted before either could call the other off.
    clients: list[socket.socket] = []

    def started(listeners: list[Any]) -> None:
        clients.extend(socket.create_connection(bound_address(listener)) for listener in listeners)
        # Neither will say anything: so the one that is served is refused.
        for client in clients:
            client.shutdown(socket.SHUT_WR)

    assert not await run_server(options(LOCAL, "127.0.0.2", once=True), started)
    assert len(clients) == 2
    for client in clients:
        # Closed, and not merely forgotten.
        with client:
            client.settimeout(10)
            with suppress(ConnectionResetError):
                assert client.recv(1) == b""


async def test_a_verbose_server_announces_itself_as_the_sample_does_and_writes_each_connections_transcript() -> None:
    written: list[str] = []

    async def talk(addresses: list[tuple[str, int]]) -> list[bytes]:
        return await greeting(addresses[0])

    assert await run_once(talk, LOCAL, verbose=True, written=written) == (True, [SERVER_MESSAGE])
    assert written[0] == "Waiting for client to connect...\nListening ! "
    assert written[1].endswith("\nClient connected as :  DOM\\alice")
    assert written[2].endswith("\n 48 encrypted bytes sent. ")
    assert len(written) == 3


# The demo account


def test_every_run_has_a_demo_account_with_a_password_of_its_own() -> None:
    accounts = [DemoAccount.make() for _ in range(10)]
    assert len({account.password for account in accounts}) == 10
    # 96 bits in base64.
    assert all(len(account.password) == 16 for account in accounts)
    assert all(account.password not in repr(account) for account in accounts)


def test_the_demo_account_alone_can_log_in() -> None:
    table = DemoAccount("DEMO\\guest", "password").table()
    assert len(table) == 1
    account = table.lookup("demo", "GUEST")
    assert account is not None
    assert account.nt_hash.hex() == "8846f7eaee8fb117ad06bdd830b7586c"
    assert table.lookup("OTHER", "guest") is None
