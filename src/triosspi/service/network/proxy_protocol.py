"""The PROXY protocol, versions 1 and 2: who a load balancer speaks for.

Defined by HAProxy's ``doc/proxy-protocol.txt``.
"""

# Who says it must be believed, so only those on a list may say it, and they must: a header that is
# optional is one that any client can write. From everybody else these bytes are the beginning of a
# handshake, and a bad one: both headers, read as a length, announce far more than any token may have.
#
# Behind the last byte of the header the handshake begins, and a stream takes nothing back. So a header is
# read to the byte. Version 2 announces its length. Version 1 ends with its line, and is read in steps of
# what it must still have at the least; for the usual line that is eight steps, not fifty.
#
# Nothing is read, and no memory taken, for a length beyond the limits below, and what does not follow the
# specification to the letter is refused: a proxy that we misunderstand would lend its clients false names.
#
# Why no library: of Python's, `proxy-protocol` (0.11.3, of 2024) is the one that parses without I/O. It
# leaves both limits, and the reading of exactly one line, to its caller; for what is not well-formed it
# raises ValueError, UnicodeDecodeError or struct.error as it happens; it takes "+5", "0_5" and "0005" for
# ports, address families that do not exist for unknown ones, and a TLV that is cut off for a whole one; it
# verifies a checksum only where one more package is installed, and then over TLVs that it has sorted. What
# would be left of it is less than what had to be written around it.

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

import trio

from ..._errors import RemoteProtocolError
from .addresses import IPAddress, IPNetwork, canonical_networks, format_peer, is_in, unmapped

_V1: Final = b"PROXY "
_V2: Final = b"\r\n\r\n\x00\r\nQUIT\n"

# "PROXY UNKNOWN\r\n": no header of either version is shorter, so this much can be read at once.
_SHORTEST: Final = 15
# Version 1's longest line, CRLF included ("worst case" in the specification, 2.1).
_LONGEST_V1: Final = 107
_FIXED_V2: Final = 16
# Bytes behind the addresses, which are 216 at most. The longest value that the specification knows is
# NETNS, a file name; with TLS certificates' names HAProxy sends some hundred bytes in all.
_LONGEST_TLVS: Final = 4096
_LONGEST_V2_REST: Final = 216 + _LONGEST_TLVS

# The least lengths of source, destination and their ports, by protocol.
_LEAST_V1: Final = {
    b"TCP4": (len("0.0.0.0"), len("0.0.0.0"), 1, 1),  # noqa: S104 - measured, not bound
    b"TCP6": (len("::"), len("::"), 1, 1),
}
_UNKNOWN_V1: Final = b"PROXY UNKNOWN"
_PORT_V1: Final = re.compile(rb"0|[1-9][0-9]{0,4}")

_LOCAL: Final = 0
_PROXY: Final = 1
_UNSPEC, _INET, _INET6, _UNIX = range(4)
_STREAM: Final = 1
_DATAGRAM: Final = 2
# Both addresses and, where they have any, ports.
_ADDRESSES_SIZE: Final = {_INET: 12, _INET6: 36, _UNIX: 216}
_TLV_CRC32C: Final = 3


class ProxyError(RemoteProtocolError):
    """A proxy did not begin with a header that can be accepted.

    Attributes:
      nothing_said (bool): the connection ended before its first byte, as a health check does that only
          connects.
    """

    def __init__(self, text: str, *, nothing_said: bool = False) -> None:
        super().__init__(text)
        self.nothing_said = nothing_said


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """What a proxy has said.

    Attributes:
      version: 1 or 2.
      local: the proxy speaks for itself (a health check), or cannot say for whom: the connection's own
        address counts.
      address: the client's; None where ``local``, or where it is none of the network (a unix socket).
      port: the client's; None as the address.
    """

    version: int
    local: bool = False
    address: IPAddress | None = None
    port: int | None = None

    @property
    def source(self) -> str:
        """Where the client connects from, for people."""
        if self.address is None or self.port is None:
            return "the proxy" if self.local else "unix"
        return format_peer(self.address, self.port)


class ProxyProtocol:
    """Reads the header of those who must send one.

    Args:
      networks: where the proxies are. Nobody else is asked for a header, nor believed one.
      unix: whoever connects to a unix socket is one, too.
    """

    def __init__(self, networks: Iterable[IPNetwork] = (), *, unix: bool = False) -> None:
        self._networks = canonical_networks(networks)
        self._unix = unix

    def expected_from(self, address: IPAddress | None) -> bool:
        """Whether who connects from this address must send a header; None is a unix socket."""
        return self._unix if address is None else is_in(unmapped(address), self._networks)

    async def read_header(self, stream: trio.abc.ReceiveStream) -> tuple[IPAddress | None, str] | None:
        """Read a header, and nothing behind it. The caller sets the deadline.

        Returns:
          The client's address (None: it came to the proxy through a unix socket) and the same for people;
          or None, where the connection's own address counts.

        Raises:
          ProxyError: there was none.
          trio.ClosedResourceError: the stream was closed here.
        """
        header = await read_proxy_header(stream)
        return None if header.local else (header.address, header.source)


async def read_proxy_header(stream: trio.abc.ReceiveStream) -> ProxyHeader:
    """Read a header, and nothing behind it.

    See `ProxyProtocol.read_header` for details.
    """
    reader = HeaderReader()
    while reader.header is None:
        try:
            data = await stream.receive_some(reader.needed)
        except trio.BrokenResourceError as exc:
            raise ProxyError("the connection broke before the PROXY header's end", nothing_said=reader.empty) from exc
        if not data:
            raise ProxyError("the connection ended before the PROXY header's end", nothing_said=reader.empty)
        reader.receive_data(data)
    return reader.header


class HeaderReader:
    """Parses one header, without any I/O.

    Attributes:
      needed: how many bytes are certainly still missing: so many can be read without reading too far.
      header: what was read, once nothing is missing.
    """

    def __init__(self) -> None:
        self.needed = _SHORTEST
        self.header: ProxyHeader | None = None
        self._data = bytearray()

    @property
    def empty(self) -> bool:
        """Whether nothing was received yet."""
        return not self._data

    def receive_data(self, data: bytes | bytearray) -> None:
        """Take the next bytes.

        Args:
          data: at most as many as are `needed`.

        Raises:
          ProxyError: no header begins like this.
          ValueError: they are more.
        """
        if len(data) > self.needed:
            raise ValueError(f"{len(data)} bytes where {self.needed} were asked for")
        self._data += data
        self.needed -= len(data)
        # At once, not when 15 bytes are there: a client of another protocol may wait for our answer.
        v1 = self._begins_with(_V1)
        if not v1 and not self._begins_with(_V2):
            raise ProxyError("what a proxy sent first is no PROXY header")
        if not self.needed:
            self._advance_v1() if v1 else self._advance_v2()

    def _begins_with(self, signature: bytes) -> bool:
        return signature.startswith(self._data[: len(signature)])

    # Version 1

    def _advance_v1(self) -> None:
        line = bytes(self._data)
        if line.endswith(b"\r\n"):
            self.header = _parse_v1(line[:-2])
            return
        self.needed = _least_missing(line)
        if len(line) + self.needed > _LONGEST_V1:
            raise ProxyError(f"a PROXY line of more than {_LONGEST_V1} bytes")

    # Version 2

    def _advance_v2(self) -> None:
        data = self._data
        if len(data) < _FIXED_V2:
            self.needed = _FIXED_V2 - len(data)
        elif len(data) == _FIXED_V2:
            self.needed = _check_fixed_v2(data)
            if not self.needed:
                self.header = _parse_v2(data)
        else:
            self.header = _parse_v2(data)


def _least_missing(line: bytes) -> int:
    """How many bytes a line that is not whole must still have, its CRLF included."""
    if b"\n" in line or b"\r" in line[:-1]:
        raise ProxyError("a PROXY line with a lone CR or LF")
    if line.endswith(b"\r"):
        return 1
    if line.startswith(_UNKNOWN_V1 + b" "):
        return 2
    _, protocol, *fields = line.split(b" ")
    least = _LEAST_V1.get(protocol)
    if least is None or len(fields) > len(least):
        raise ProxyError("a PROXY line with another protocol, or too many fields")
    # Of the field that is being received, what it lacks; of those to come all, with a space before each.
    return (
        max(0, least[len(fields) - 1] - len(fields[-1]) if fields else 0)
        + sum(1 + length for length in least[len(fields) :])
        + 2
    )


def _parse_v1(line: bytes) -> ProxyHeader:
    if line == _UNKNOWN_V1 or line.startswith(_UNKNOWN_V1 + b" "):
        # Whatever else it says is to be ignored.
        return ProxyHeader(1, local=True)
    fields = line.split(b" ")
    if len(fields) != 6 or fields[1] not in _LEAST_V1:
        raise ProxyError("a PROXY line with another protocol, or another number of fields")
    _, protocol, source, destination, source_port, destination_port = fields
    address = _parse_address(protocol, source)
    # Nobody asks where to; but who gets that wrong may have got the rest wrong.
    _parse_address(protocol, destination)
    _parse_port(destination_port)
    return ProxyHeader(1, address=unmapped(address), port=_parse_port(source_port))


def _parse_address(protocol: bytes, field: bytes) -> IPAddress:
    try:
        text = field.decode("ascii")
        # A zone is this machine's name for a network, and a proxy's means nothing here.
        if protocol == b"TCP6" and "%" not in text:
            return IPv6Address(text)
        return IPv4Address(text)
    except ValueError:
        raise ProxyError("a PROXY line with an address that is none") from None


def _parse_port(field: bytes) -> int:
    if _PORT_V1.fullmatch(field) is None or int(field) > 65535:
        raise ProxyError("a PROXY line with a port that is none")
    return int(field)


def _check_fixed_v2(data: bytearray) -> int:
    """Judge the first 16 bytes; returns how many follow."""
    version, command = divmod(data[12], 16)
    if version != 2 or command not in (_LOCAL, _PROXY):
        raise ProxyError(f"a PROXY header with version and command {data[12]:#04x}")
    family, transport = divmod(data[13], 16)
    length = int.from_bytes(data[14:16], "big")
    if command == _PROXY:
        if family > _UNIX or transport > _DATAGRAM:
            raise ProxyError(f"a PROXY header with family and transport {data[13]:#04x}")
        if length < _ADDRESSES_SIZE.get(family, 0):
            raise ProxyError("a PROXY header too short for its addresses")
        limit = _ADDRESSES_SIZE.get(family, 216) + _LONGEST_TLVS
    else:
        limit = _LONGEST_V2_REST
    if length > limit:
        raise ProxyError(f"a PROXY header announced {length} bytes where at most {limit} are accepted")
    return length


def _parse_v2(data: bytearray) -> ProxyHeader:
    command = data[12] % 16
    family, transport = divmod(data[13], 16)
    if command == _LOCAL or _UNSPEC in (family, transport):
        # What follows is to be skipped, whatever it is; a checksum that is there is still one.
        if family == _UNSPEC:
            _verify(data, _FIXED_V2, strict=False)
        return ProxyHeader(2, local=True)
    _verify(data, _FIXED_V2 + _ADDRESSES_SIZE[family], strict=True)
    if transport != _STREAM:
        # Nobody comes to a stream by datagrams. The specification has it taken as unspecified.
        return ProxyHeader(2, local=True)
    if family == _UNIX:
        return ProxyHeader(2)
    at = _FIXED_V2
    if family == _INET:
        return ProxyHeader(2, address=IPv4Address(bytes(data[at : at + 4])), port=_port_v2(data, at + 8))
    return ProxyHeader(2, address=unmapped(IPv6Address(bytes(data[at : at + 16]))), port=_port_v2(data, at + 32))


def _port_v2(data: bytearray, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "big")


def _verify(data: bytearray, start: int, *, strict: bool) -> None:
    """Check the form of the TLVs, and the checksum if there is one."""
    checksum = None
    at = start
    while at < len(data):
        value = at + 3
        end = value + int.from_bytes(data[at + 1 : value], "big")
        if end > len(data):
            if not strict:
                return
            raise ProxyError("a PROXY header with a TLV that is cut off")
        if data[at] == _TLV_CRC32C:
            if end - value != 4 or checksum is not None:
                raise ProxyError("a PROXY header with a checksum that is none")
            checksum = value
        at = end
    if checksum is None:
        return
    announced = int.from_bytes(data[checksum : checksum + 4], "big")
    if announced != crc32c(data[:checksum] + bytes(4) + data[checksum + 4 :]):
        raise ProxyError("a PROXY header with a wrong checksum")


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            # Castagnoli's polynomial, bits reversed (RFC 9260, appendix A).
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_CRC32C: Final = _crc32c_table()


def crc32c(data: bytes | bytearray) -> int:
    """The checksum of a header whose own checksum is set to zeroes."""
    # In Python: a header has a hundred bytes, once per connection, and comes from a proxy that we trust.
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF
