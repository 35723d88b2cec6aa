"""Network addresses, each in one form: what admission, the PROXY protocol and the listeners agree on."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, TypeAlias

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPNetwork: TypeAlias = IPv4Network | IPv6Network

_MAPPED: Final = IPv6Network("::ffff:0:0/96")


def unmapped(address: IPAddress) -> IPAddress:
    """The IPv4 address that an IPv4-mapped IPv6 address stands for; any other address is itself.

    A socket for both families, which is what systemd opens by default, shows every IPv4 client as
    ``::ffff:192.0.2.1``. Taken as IPv6, all of IPv4 would be one source: they share the first 64 bits.
    """
    if isinstance(address, IPv6Address) and (mapped := address.ipv4_mapped) is not None:
        return mapped
    return address


def canonical_networks(networks: Iterable[IPNetwork]) -> tuple[IPNetwork, ...]:
    """Networks to look `unmapped` addresses up in: IPv4-mapped ones are written as IPv4."""
    return tuple(_unmapped_network(network) for network in networks)


def is_in(address: IPAddress, networks: tuple[IPNetwork, ...]) -> bool:
    """Whether an `unmapped` address lies in any of `canonical_networks`."""
    return any(address in network for network in networks)


def format_peer(address: IPAddress, port: int) -> str:
    """An address and port for people: ``192.0.2.1:50000`` or ``[2001:db8::1]:50000``."""
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _unmapped_network(network: IPNetwork) -> IPNetwork:
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        mapped = network.network_address.ipv4_mapped
        assert mapped is not None
        return IPv4Network((mapped, network.prefixlen - 96))
    return network
