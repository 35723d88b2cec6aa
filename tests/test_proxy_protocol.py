"""Who a load balancer speaks for: the PROXY protocol, from hostile bytes and from the real HAProxy."""

from __future__ import annotations

import os
import random
import re
import socket
import struct
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from harness import PASSWORD, ScriptedStream, has_ipv6, make_acceptor, make_initiator, random_pieces
from peers.kerberos.realm import find_program, missing_program
from peers.requirements import require
from programs import running
from triosspi import RemoteProtocolError, SSPIChannel, open_sspi_over_tcp_channel
from triosspi.service import account_editor
from triosspi.service.network.proxy_protocol import (
    HeaderReader,
    ProxyError,
    ProxyHeader,
    ProxyProtocol,
    crc32c,
    read_proxy_header,
)
from triosspi.tcp import format_address

BEHIND = b"\x28\x00\x00\x00NTLMSSP\x00 and so on"

# ---- headers, built without the code under test ----

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
IPV4 = IPv4Address("192.0.2.1").packed + IPv4Address("198.51.100.2").packed + struct.pack("!HH", 50000, 2000)
IPV6 = IPv6Address("2001:db8::1").packed + IPv6Address("2001:db8::2").packed + struct.pack("!HH", 50000, 2000)
UNIX = b"/run/client".ljust(108, b"\0") + b"/run/server".ljust(108, b"\0")


def v2(rest: bytes = b"", *, command: int = 0x21, family: int = 0x11, length: int | None = None) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(rest) if length is None else length) + rest


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def slow_crc32c(data: bytes) -> int:
    """Bit by bit, by long division."""
    remainder = 0xFFFFFFFF
    for byte in data:
        for bit in range(8):
            remainder ^= (byte >> bit) & 1
            remainder = (remainder >> 1) ^ (0x82F63B78 * (remainder & 1))
    return remainder ^ 0xFFFFFFFF


def with_checksum(before: bytes, after: bytes = b"", *, command: int = 0x21, family: int = 0x11) -> bytes:
    """A header with a checksum between two parts of its body."""
    zeroed = v2(before + tlv(3, bytes(4)) + after, command=command, family=family)
    return v2(before + tlv(3, struct.pack("!I", slow_crc32c(zeroed))) + after, command=command, family=family)


CLIENT4 = (IPv4Address("192.0.2.1"), 50000)
CLIENT6 = (IPv6Address("2001:db8::1"), 50000)
FULL6 = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"

GOOD: dict[str, tuple[bytes, ProxyHeader]] = {
    "v1 TCP4": (b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 2000\r\n", ProxyHeader(1, False, *CLIENT4)),
    "v1 TCP6": (b"PROXY TCP6 2001:db8::1 2001:DB8::2 50000 2000\r\n", ProxyHeader(1, False, *CLIENT6)),
    "v1 TCP6, as HAProxy writes a mapped address": (
        b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:198.51.100.2 50000 2000\r\n",
        ProxyHeader(1, False, *CLIENT4),
    ),
    "v1 TCP4, the shortest": (b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n", ProxyHeader(1, False, IPv4Address(0), 0)),
    "v1 TCP6, the shortest": (b"PROXY TCP6 :: :: 0 0\r\n", ProxyHeader(1, False, IPv6Address(0), 0)),
    "v1 TCP4, the longest": (
        b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n",
        ProxyHeader(1, False, IPv4Address("255.255.255.255"), 65535),
    ),
    "v1 TCP6, the longest": (
        f"PROXY TCP6 {FULL6} {FULL6} 65535 65535\r\n".encode(),
        ProxyHeader(1, False, IPv6Address(FULL6), 65535),
    ),
    "v1 UNKNOWN": (b"PROXY UNKNOWN\r\n", ProxyHeader(1, local=True)),
    "v1 UNKNOWN, the longest": (f"PROXY UNKNOWN {FULL6} {FULL6} 65535 65535\r\n".encode(), ProxyHeader(1, local=True)),
    "v1 UNKNOWN with anything": (b"PROXY UNKNOWN  \xff:-) \r\n", ProxyHeader(1, local=True)),
    "v2 IPv4": (v2(IPV4), ProxyHeader(2, False, *CLIENT4)),
    "v2 IPv6": (v2(IPV6, family=0x21), ProxyHeader(2, False, *CLIENT6)),
    "v2 IPv6, mapped": (
        v2(IPv6Address("::ffff:192.0.2.1").packed + IPV6[16:], family=0x21),
        ProxyHeader(2, False, *CLIENT4),
    ),
    "v2 unix": (v2(UNIX, family=0x31), ProxyHeader(2)),
    "v2 with TLVs": (
        v2(IPV4 + tlv(2, b"example.org") + tlv(4, b"") + tlv(0xE0, b"x")),
        ProxyHeader(2, False, *CLIENT4),
    ),
    "v2 with as many TLVs as may be": (v2(IPV4 + tlv(4, bytes(4093))), ProxyHeader(2, False, *CLIENT4)),
    "v2 with a checksum": (with_checksum(IPV4), ProxyHeader(2, False, *CLIENT4)),
    "v2 with a checksum between others": (
        with_checksum(IPV6 + tlv(5, b"id"), tlv(2, b"x") * 2, family=0x21),
        ProxyHeader(2, False, *CLIENT6),
    ),
    "v2 unix with a checksum": (with_checksum(UNIX, family=0x31), ProxyHeader(2)),
    "v2 LOCAL": (v2(command=0x20, family=0x00), ProxyHeader(2, local=True)),
    "v2 LOCAL with a checksum": (with_checksum(b"", command=0x20, family=0x00), ProxyHeader(2, local=True)),
    "v2 LOCAL with addresses": (v2(IPV4, command=0x20), ProxyHeader(2, local=True)),
    "v2 LOCAL with anything": (v2(b"\xff" * 4312, command=0x20, family=0xFF), ProxyHeader(2, local=True)),
    "v2 LOCAL with what looks like a TLV": (v2(b"\x03\x00", command=0x20, family=0x00), ProxyHeader(2, local=True)),
    "v2 unspecified": (v2(b"anything", family=0x00), ProxyHeader(2, local=True)),
    "v2 unspecified transport": (v2(IPV4, family=0x10), ProxyHeader(2, local=True)),
    "v2 unspecified family": (v2(b"any", family=0x01), ProxyHeader(2, local=True)),
    "v2 datagrams": (v2(IPV4, family=0x12), ProxyHeader(2, local=True)),
}
good = pytest.mark.parametrize(("header", "expected"), GOOD.values(), ids=GOOD)

BAD: dict[str, bytes] = {
    "nothing of the kind": b"GET / HTTP/1.1\r\n",
    "a handshake": BEHIND,
    "v1 in small letters": b"proxy TCP4 192.0.2.1 198.51.100.2 50000 2000\r\n",
    "v1 without a space": b"PROXY\r\nTCP4 192.0.2.1 198.51.100.2 50000 2000\r\n",
    "v1 with another protocol": b"PROXY UDP4 192.0.2.1 198.51.100.2 50000 2000\r\n",
    "v1 with another word": b"PROXY UNKNOWNX\r\n",
    "v1 with half a word": b"PROXY TCP 192.0.2.1 198.51.100.2 50000 2000\r\n",
    "v1 with a lone LF": b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 2000\n\n",
    "v1 with a lone CR": b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 2000\r\r\n",
    "v1 UNKNOWN with a lone LF": b"PROXY UNKNOWN x\ny\r\n",
    "v1 UNKNOWN with a lone CR": b"PROXY UNKNOWN x\ry\r\n",
    "v1 with a NUL": b"PROXY TCP4 192.0.2.1\x00 198.51.100.2 50000 2000\r\n",
    "v1 with two spaces": b"PROXY TCP4  192.0.2.1 198.51.100.2 50000 2000\r\n",
    "v1 with a tab": b"PROXY TCP4 192.0.2.1\t198.51.100.2 50000 2000\r\n",
    "v1 with a space at the end": b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 2000 \r\n",
    "v1 with too few fields": b"PROXY TCP4 192.0.2.1 198.51.100.2 50000\r\n",
    "v1 with too many fields": b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 2000 1\r\n",
    "v1 with empty fields": b"PROXY TCP4      \r\n",
    "v1 with a zero in front": b"PROXY TCP4 192.0.2.01 198.51.100.2 50000 2000\r\n",
    "v1 with an octet too large": b"PROXY TCP4 192.0.2.256 198.51.100.2 50000 2000\r\n",
    "v1 with a short address": b"PROXY TCP4 192.0.2 198.51.100.2 50000 2000\r\n",
    "v1 with a name": b"PROXY TCP4 localhost 198.51.100.2 50000 2000\r\n",
    "v1 with letters that are none": b"PROXY TCP4 192.0.2.\xff 198.51.100.2 50000 2000\r\n",
    "v1 with digits of another script": "PROXY TCP4 192.0.2.\u0661 198.51.100.2 50000 2000\r\n".encode(),
    "v1 with IPv6 as TCP4": b"PROXY TCP4 2001:db8::1 2001:db8::2 50000 2000\r\n",
    "v1 with IPv4 as TCP6": b"PROXY TCP6 192.0.2.1 198.51.100.2 50000 2000\r\n",
    "v1 with a zone": b"PROXY TCP6 fe80::1%eth0 2001:db8::2 50000 2000\r\n",
    "v1 with a bad destination": b"PROXY TCP4 192.0.2.1 198.51.100.256 50000 2000\r\n",
    "v1 with a signed port": b"PROXY TCP4 192.0.2.1 198.51.100.2 +5000 2000\r\n",
    "v1 with a grouped port": b"PROXY TCP4 192.0.2.1 198.51.100.2 50_00 2000\r\n",
    "v1 with a port with a zero in front": b"PROXY TCP4 192.0.2.1 198.51.100.2 05000 2000\r\n",
    "v1 with a port too large": b"PROXY TCP4 192.0.2.1 198.51.100.2 65536 2000\r\n",
    "v1 with a bad destination port": b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 x\r\n",
    "v1 one byte too long": f"PROXY UNKNOWN {FULL6} {FULL6} 65535 65535 \r\n".encode(),
    "v1 without end": b"PROXY UNKNOWN " + b"x" * 1000,
    "v1 TCP4 without end": b"PROXY TCP4 " + b"1" * 1000,
    "v2 with a wrong signature": b"\r\n\r\n\x00\r\nQUIT\r" + v2(IPV4)[12:],
    "v2 of version 1": v2(IPV4, command=0x11),
    "v2 of version 3": v2(IPV4, command=0x31),
    "v2 with another command": v2(IPV4, command=0x22),
    "v2 with another family": v2(IPV4, family=0x41),
    "v2 with another transport": v2(IPV4, family=0x13),
    "v2 too short for IPv4": v2(IPV4[:-1]),
    "v2 too short for IPv6": v2(IPV6[:-1], family=0x21),
    "v2 too short for unix": v2(UNIX[:-1], family=0x31),
    "v2 without addresses": v2(),
    "v2 with a TLV without length": v2(IPV4 + b"\x04\x00"),
    "v2 with a TLV of one byte": v2(IPV4 + b"\x04"),
    "v2 with a TLV cut off": v2(IPV4 + b"\x04\x00\x05four"),
    "v2 with too many TLVs": v2(IPV4 + tlv(4, bytes(4094))),
    "v2 with a checksum of zero": v2(IPV4 + tlv(3, bytes(4))),
    "v2 with a short checksum": v2(IPV4 + tlv(3, bytes(3))),
    "v2 with two checksums": v2(IPV4 + tlv(3, bytes(4)) * 2),
    "v2 with two checksums, the second of them right": with_checksum(IPV4 + tlv(3, b"junk")),
    "v2 LOCAL with a wrong checksum": v2(tlv(3, b"1234"), command=0x20, family=0x00),
    "v2 LOCAL too long": v2(bytes(4313), command=0x20, family=0x00),
    "v2 unspecified, too long": v2(bytes(4313), family=0x00),
    "v2 with the longest length": v2(IPV4, length=0xFFFF),
}
bad = pytest.mark.parametrize("header", BAD.values(), ids=BAD)


def read(data: bytes, pieces: Callable[[bytes], Sequence[bytes]] = lambda data: [data]) -> tuple[ProxyHeader, bytes]:
    """The header, and what is left behind it, for bytes that a socket gives out in these pieces."""
    reader = HeaderReader()
    ready = b""
    more = iter(pieces(data))
    while reader.header is None:
        if not ready:
            ready = next(more)
        piece, ready = ready[: reader.needed], ready[reader.needed :]
        reader.receive_data(piece)
    assert reader.needed == 0
    return reader.header, ready + b"".join(more)


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


# ---- what is accepted ----


@good
def test_a_header_is_read_to_the_byte_however_it_arrives(header: bytes, expected: ProxyHeader) -> None:
    manners: list[Any] = [lambda data: [data], byte_by_byte]
    manners += [partial(random_pieces, rng=random.Random(seed)) for seed in range(10)]
    for pieces in manners:
        assert read(header + BEHIND, pieces) == (expected, BEHIND)
        assert read(header, pieces) == (expected, b"")


@good
async def test_nothing_behind_the_header_is_taken_from_the_stream(header: bytes, expected: ProxyHeader) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(header + BEHIND)
    assert await read_proxy_header(ours) == expected
    assert await ours.receive_some() == BEHIND


@good
async def test_a_header_that_is_cut_off_anywhere_is_an_error(header: bytes, expected: ProxyHeader) -> None:
    for length in [*range(min(len(header), 60)), len(header) - 1]:
        with pytest.raises(ProxyError, match="before the PROXY header's end") as caught:
            await read_proxy_header(AtMost(byte_by_byte(header[:length])))
        assert caught.value.nothing_said == (length == 0)


def test_the_usual_line_takes_few_reads() -> None:
    reader = HeaderReader()
    line, reads = b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n", 0
    while reader.header is None:
        piece, line = line[: reader.needed], line[reader.needed :]
        reader.receive_data(piece)
        reads += 1
    assert reads <= 9


def test_a_client_is_named_as_logs_name_it() -> None:
    assert ProxyHeader(1, False, *CLIENT4).source == "192.0.2.1:50000"
    assert ProxyHeader(2, False, *CLIENT6).source == "[2001:db8::1]:50000"
    assert ProxyHeader(2).source == "unix"
    assert ProxyHeader(2, local=True).source == "the proxy"


@pytest.mark.parametrize(
    ("data", "checksum"),
    [(b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (b"", 0)],
)
def test_the_checksum_is_the_one_of_the_rfcs(data: bytes, checksum: int) -> None:
    # RFC 3720, B.4, and the usual check value.
    assert crc32c(data) == slow_crc32c(data) == checksum


# ---- what is refused ----


@bad
def test_what_is_no_header_is_refused_however_it_arrives(header: bytes) -> None:
    texts = set()
    for pieces in (lambda data: [data], byte_by_byte, partial(random_pieces, rng=random.Random(1))):
        with pytest.raises(ProxyError) as caught:
            read(header + BEHIND * 9, pieces)
        texts.add(str(caught.value))
        assert isinstance(caught.value, RemoteProtocolError)
    assert len(texts) == 1
    # One short line for a log, without a byte that the peer chose.
    assert texts.pop().isprintable()


@pytest.mark.parametrize("first", [b"\x00", b"G", b"PROXY\r", b"\r\n\r\r", SIGNATURE[:11] + b"\r"])
def test_who_begins_with_something_else_is_refused_at_the_first_wrong_byte(first: bytes) -> None:
    # A peer that speaks another protocol may wait for an answer before it sends 15 bytes.
    reader = HeaderReader()
    reader.receive_data(first[:-1])
    with pytest.raises(ProxyError, match="no PROXY header"):
        reader.receive_data(first[-1:])


def test_any_flipped_bit_of_a_header_with_a_checksum_is_noticed() -> None:
    header = with_checksum(IPV4, tlv(5, b"connection 1"))
    for bit in range(8 * len(header)):
        flipped = bytearray(header)
        flipped[bit // 8] ^= 1 << bit % 8
        if bit // 8 in (14, 15, 28):
            continue  # another length: it waits for more, or has too little; another TLV: there is no checksum
        try:
            told, _ = read(bytes(flipped) + BEHIND)
        except ProxyError:
            continue
        # LOCAL, or a transport that is none of ours: nothing of the rest is used.
        assert told.local
        assert bit // 8 in (12, 13)


@pytest.mark.parametrize("length", [4097 + 12, 0x7FFF, 0x8000, 0xFFFF])
def test_an_announced_length_beyond_the_cap_is_refused_before_anything_is_read_for_it(length: int) -> None:
    reader = HeaderReader()
    reader.receive_data(v2(length=length)[:15])
    with pytest.raises(ProxyError, match=f"announced {length} bytes where at most 4108 are accepted"):
        reader.receive_data(v2(length=length)[15:16])


def test_no_memory_is_held_for_a_length_that_was_only_announced() -> None:
    tracemalloc.start()
    try:
        readers = [HeaderReader() for _ in range(1000)]
        before = tracemalloc.get_traced_memory()[0]
        for reader in readers:
            reader.receive_data(v2(length=4108)[:15])
            reader.receive_data(v2(length=4108)[15:16])
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert all(reader.needed == 4108 for reader in readers)
    assert grown < 300 * len(readers)


def test_more_bytes_than_were_asked_for_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="16 bytes where 15 were asked for"):
        HeaderReader().receive_data(bytes(16))


def mutated(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(changed):
            changed[at] = rng.choice(b"\x00\xff\r\n :.0129%f")
        elif kind == 2:
            changed[at:at] = rng.choice([b" ", b"\r\n", b"0", b"::", b"\x03\x00\x04", rng.randbytes(3)])
        elif kind == 3:
            del changed[at : at + rng.randint(1, 8)]
        elif len(changed) > 16:
            changed[14:16] = rng.choice([b"\x00\x00", b"\x00\x0c", b"\x10\x00", b"\xff\xff"])
    return bytes(changed)


def outcome(data: bytes, pieces: Any) -> Any:
    try:
        return read(data, pieces)
    except ProxyError as exc:
        return str(exc)
    except StopIteration:
        return "more is wanted"


def test_whatever_is_sent_nothing_but_our_own_error_comes_out_and_pieces_make_no_difference() -> None:
    seeds = [header for header, _ in GOOD.values()] + list(BAD.values())
    seen: dict[str, int] = {}
    for seed in range(6000):
        rng = random.Random(seed)
        data = mutated(rng, rng.choice(seeds)) + BEHIND
        whole = outcome(data, lambda data: [data])
        assert outcome(data, byte_by_byte) == whole
        assert outcome(data, partial(random_pieces, rng=rng)) == whole
        if isinstance(whole, tuple):
            assert data.endswith(whole[1])
        name = "accepted" if isinstance(whole, tuple) else whole[:30]
        seen[name] = seen.get(name, 0) + 1
    # The mutations get everywhere.
    assert len(seen) > 12
    assert min(seen["accepted"], seen["more is wanted"]) > 50


# ---- reading from a stream ----


class AtMost(ScriptedStream):
    """Never gives more than was asked for, and fails with what it was given at the end."""

    def __init__(self, pieces: Sequence[bytes], error: Exception | None = None) -> None:
        super().__init__(pieces)
        self.error = error

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = await super().receive_some(max_bytes)
        assert max_bytes is not None
        assert len(data) <= max_bytes <= 4312
        if not data and self.error is not None:
            raise self.error
        return data


@pytest.mark.parametrize("said", [b"", b"PRO", SIGNATURE])
async def test_a_connection_that_breaks_is_the_same_error(said: bytes) -> None:
    reset = trio.BrokenResourceError("reset")
    with pytest.raises(ProxyError, match="broke before") as caught:
        await read_proxy_header(AtMost(byte_by_byte(said), reset))
    assert caught.value.__cause__ is reset
    assert caught.value.nothing_said == (not said)


async def test_a_stream_that_was_closed_here_says_so() -> None:
    ours, _ = trio.testing.memory_stream_pair()
    await ours.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await read_proxy_header(ours)


async def test_the_deadline_is_the_callers(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(b"PROXY TCP4 ")
    with trio.move_on_after(30) as scope:
        await read_proxy_header(ours)
    assert scope.cancelled_caught


# ---- who must send one ----


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (IPv4Address("192.0.2.7"), True),
        (IPv6Address("::ffff:192.0.2.7"), True),
        (IPv4Address("192.0.3.7"), False),
        (IPv6Address("2001:db8::7"), True),
        (IPv6Address("2001:db9::7"), False),
        (IPv6Address("::ffff:198.51.100.1"), True),
        (IPv4Address("198.51.100.1"), True),
        (None, False),
    ],
)
def test_a_header_is_expected_from_those_on_the_list_only(address: Any, expected: bool) -> None:
    networks = [ip_network("192.0.2.0/24"), ip_network("2001:db8::/32"), ip_network("::ffff:198.51.100.0/120")]
    assert ProxyProtocol(networks).expected_from(address) is expected
    assert not ProxyProtocol().expected_from(address)
    # By a flag of their own.
    assert ProxyProtocol(networks, unix=True).expected_from(address) is (expected or address is None)


@pytest.mark.parametrize("header", [GOOD["v1 TCP4"][0], GOOD["v2 IPv4"][0], GOOD["v2 LOCAL"][0]])
async def test_a_header_from_anybody_else_is_a_handshake_that_fails(header: bytes) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(header)
    async with SSPIChannel(ours, make_acceptor()) as channel:
        with pytest.raises(trio.BrokenResourceError, match="looks like a PROXY header; name its sender in proxy_from"):
            await channel.do_handshake()


async def test_the_reader_of_a_server_tells_client_and_name_or_nothing() -> None:
    proxies = ProxyProtocol([ip_network("127.0.0.0/8")])

    async def told(header: bytes) -> Any:
        return await proxies.read_header(AtMost(byte_by_byte(header)))

    assert await told(v2(IPV4)) == (CLIENT4[0], "192.0.2.1:50000")
    assert await told(v2(UNIX, family=0x31)) == (None, "unix")
    assert await told(v2(command=0x20, family=0)) is None
    assert await told(b"PROXY UNKNOWN\r\n") is None


# ---- HAProxy ----


class HAProxy:
    """Debian's, in TCP mode, in the foreground, with one backend."""

    def available(self) -> str | None:
        return missing_program({"haproxy": "haproxy"})

    @contextmanager
    def before(self, server: int | Path, options: str, front: socket.socket, directory: Path) -> Iterator[None]:
        """Run it before a server on this port, or this unix socket.

        HAProxy does not tell what port it was given, so it is given a socket: `fd@N`. That listens
        already, so nobody need wait until HAProxy does.
        """
        address = f"127.0.0.1:{server}" if isinstance(server, int) else f"unix@{server}"
        configuration = directory / "haproxy.cfg"
        configuration.write_text(
            "global\n    log stderr format raw local0\n"
            "defaults\n    mode tcp\n    timeout connect 30s\n    timeout client 30s\n    timeout server 30s\n"
            f"listen test\n    bind fd@{front.fileno()}\n    server trio {address} {options}\n"
        )
        program = find_program("haproxy")
        assert program is not None
        log = directory / "haproxy.log"
        with log.open("wb") as output:
            # -db: in the foreground, one process.
            process = subprocess.Popen(
                [program, "-db", "-f", configuration],
                pass_fds=[front.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            yield
            assert process.poll() is None, log.read_text()
        finally:
            process.kill()
            process.wait()


def front_socket(kind: str, directory: Path) -> socket.socket:
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(os.fspath(directory / "front"))
    else:
        sock = socket.socket(socket.AF_INET6 if kind == "ipv6" else socket.AF_INET)
        sock.bind(("::1" if kind == "ipv6" else "127.0.0.1", 0))
    sock.listen()
    return sock


@pytest.fixture
def haproxy() -> HAProxy:
    haproxy = HAProxy()
    require(haproxy)
    return haproxy


OPTIONS = {
    "v1": "send-proxy",
    "v2": "send-proxy-v2",
    "v2-tlvs": "send-proxy-v2 proxy-v2-options crc32c,unique-id,authority",
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", ["ipv4", "ipv6", "unix"])
async def test_haproxy_names_its_client_and_then_passes_on_every_byte(
    family: str, options: str, haproxy: HAProxy, tmp_path: Path
) -> None:
    if family == "ipv6" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    seen: list[Any] = []

    async def serve(stream: trio.SocketStream) -> None:
        header = await read_proxy_header(stream)
        data = b""
        while chunk := await stream.receive_some():
            data += chunk
        seen.append((header, data))
        await stream.send_all(b"answer")
        await stream.send_eof()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        with ExitStack() as stack:
            front = stack.enter_context(front_socket(family, tmp_path))
            stack.enter_context(haproxy.before(port, options, front, tmp_path))
            client = trio.socket.socket(front.family)
            await client.connect(front.getsockname())
            async with trio.SocketStream(client) as stream:
                # The first bytes come with the header, in one segment.
                await stream.send_all(BEHIND)
                await stream.send_eof()
                with trio.fail_after(30):
                    assert await stream.receive_some() == b"answer"
                mine = client.getsockname()
        nursery.cancel_scope.cancel()
    ((header, data),) = seen
    assert data == BEHIND
    assert header.version == (1 if options == "send-proxy" else 2)
    if family == "unix":
        # HAProxy has no name for this client: UNKNOWN in version 1.
        assert header.address is None
    else:
        assert (str(header.address), header.port) == mine[:2]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
async def test_haproxys_health_check_speaks_for_itself_and_closes(
    options: str, haproxy: HAProxy, tmp_path: Path
) -> None:
    checks: list[Any] = []
    enough = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        try:
            header = await read_proxy_header(stream)
            with trio.fail_after(30):
                try:
                    rest = await stream.receive_some()
                except trio.BrokenResourceError:
                    rest = b""  # it closes by a reset
        except ProxyError as exc:
            checks.append(exc)
        else:
            checks.append((header, rest))
        enough.set()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        with ExitStack() as stack:
            front = stack.enter_context(front_socket("ipv4", tmp_path))
            stack.enter_context(haproxy.before(port, f"{options} check", front, tmp_path))
            with trio.fail_after(30):
                await enough.wait()
        nursery.cancel_scope.cancel()
    header, rest = checks[0]
    assert rest == b""
    if options == "send-proxy":
        # Version 1 has no word for it: the check's own addresses.
        assert str(header.address) == "127.0.0.1"
    else:
        assert header == ProxyHeader(2, local=True)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_haproxy_names_its_clients_on_a_unix_socket_and_checks_there(
    workers: str, haproxy: HAProxy, tmp_path: Path
) -> None:
    # The list of proxies is about addresses, and was without effect there, without a word.
    account_editor.add(tmp_path / "accounts", "DOM\\alice", PASSWORD)
    path = tmp_path / "socket"
    arguments = ["serve", "--wire", "framed", "--unix", path, "--proxy-unix", "--accounts", tmp_path / "accounts"]
    with ExitStack() as stack:
        server = stack.enter_context(running(*arguments, "--workers", workers))
        await trio.to_thread.run_sync(server.expect, "serving echo")
        front = stack.enter_context(front_socket("ipv4", tmp_path))
        options = "send-proxy-v2 check inter 100ms check-send-proxy"
        stack.enter_context(haproxy.before(path, options, front, tmp_path))
        with trio.fail_after(30):
            async with await open_sspi_over_tcp_channel(*front.getsockname(), make_initiator()) as channel:
                await channel.send(b"hello")
                assert await channel.receive() == b"hello"
                source = format_address(*channel.transport_stream.socket.getsockname())
        await trio.to_thread.run_sync(server.expect, rf"INFO {re.escape(source)}: .*: login ", "err")
        await trio.to_thread.run_sync(server.expect, "INFO .*connections dropped: nothing_said", "err")
        assert "refused" not in server.err
        assert server.stop() == 0
