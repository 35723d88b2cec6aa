"""KERB_VALIDATION_INFO: written here by [MS-PAC] 2.5, read by us; and everything that could be wrong with it."""

from __future__ import annotations

import random
import struct

import pytest

from triosspi import AuthenticationError
from triosspi.security.kerberos.pac import read_logon_info

ENABLED = 7
DISABLED = 3
EXTRA_SIDS, RESOURCE_GROUPS = 0x20, 0x200


def sid(text: str) -> bytes:
    authority, *subs = map(int, text.split("-")[2:])
    return bytes([1, len(subs)]) + authority.to_bytes(6, "big") + b"".join(struct.pack("<I", sub) for sub in subs)


class Writer:
    """NDR: the fixed part, and behind it what its pointers point at."""

    def __init__(self) -> None:
        self.fixed = b""
        self.deferred: list[bytes] = []
        self._referent = 0x20000

    def pointer(self, target: bytes | None) -> bytes:
        if target is None:
            return bytes(4)
        self._referent += 4
        self.deferred.append(target)
        return struct.pack("<I", self._referent)

    def string(self, text: str | None) -> None:
        if text is None:
            self.fixed += bytes(8)
            return
        data = text.encode("utf-16-le")
        count = len(data) // 2
        self.fixed += struct.pack("<HH", len(data), len(data))
        self.fixed += self.pointer(struct.pack("<III", count, 0, count) + data)

    def sid(self, text: str | None) -> None:
        self.fixed += self.pointer(None if text is None else struct.pack("<I", text.count("-") - 2) + sid(text))

    def groups(self, groups: list[tuple[int, int]] | None) -> None:
        self.fixed += struct.pack("<I", len(groups or []))
        target = None
        if groups is not None:
            target = struct.pack("<I", len(groups)) + b"".join(struct.pack("<II", *group) for group in groups)
        self.fixed += self.pointer(target)

    def pack(self) -> bytes:
        body = struct.pack("<I", 0x20000) + self.fixed
        for target in self.deferred:
            body += bytes(-len(body) % 4) + target
        header = bytes.fromhex("01100800cccccccc")
        return header + struct.pack("<II", len(body), 0) + body


def logon_info(
    *,
    domain: str | None = "S-1-5-21-1-2-3",
    groups: list[tuple[int, int]] | None = None,
    flags: int = EXTRA_SIDS | RESOURCE_GROUPS,
    extra: list[tuple[str, int]] | None = None,
    resource_domain: str | None = None,
    resources: list[tuple[int, int]] | None = None,
) -> bytes:
    writer = Writer()
    writer.fixed += bytes(48)
    for text in ("älice", "Alice Ä", "", None, None, None):
        writer.string(text)
    writer.fixed += struct.pack("<HHII", 3, 0, 1104, 513)
    writer.groups([(513, ENABLED), (512, ENABLED), (600, DISABLED)] if groups is None else groups)
    writer.fixed += struct.pack("<I", flags) + bytes(16)
    writer.string("DC1")
    writer.string("EXAMPLE")
    writer.sid(domain)
    writer.fixed += bytes(8 + 4 + 4 + 8 + 8 + 4 + 4)
    writer.fixed += struct.pack("<I", len(extra or []))
    if extra is None:
        writer.fixed += bytes(4)
    else:
        array = struct.pack("<I", len(extra))
        array += b"".join(struct.pack("<II", 0x30000 + 4 * i, attributes) for i, (_, attributes) in enumerate(extra))
        for text, _ in extra:
            array += struct.pack("<I", text.count("-") - 2) + sid(text)
        writer.fixed += writer.pointer(array)
    writer.sid(resource_domain)
    writer.groups(resources)
    return writer.pack()


def test_names_and_groups_are_read() -> None:
    pac = read_logon_info(
        logon_info(
            extra=[("S-1-18-1", ENABLED), ("S-1-5-21-9-9-9-1000", ENABLED), ("S-1-5-21-9-9-9-1001", DISABLED)],
            resource_domain="S-1-5-21-4-5-6",
            resources=[(1200, ENABLED), (1201, DISABLED)],
        )
    )
    assert (pac.account, pac.domain, pac.sid) == ("älice", "EXAMPLE", "S-1-5-21-1-2-3-1104")
    assert pac.groups == {
        "S-1-5-21-1-2-3-513",
        "S-1-5-21-1-2-3-512",
        "S-1-18-1",
        "S-1-5-21-9-9-9-1000",
        "S-1-5-21-4-5-6-1200",
    }


def test_the_primary_group_counts_though_it_is_not_listed() -> None:
    assert read_logon_info(logon_info(groups=[])).groups == {"S-1-5-21-1-2-3-513"}


def test_extra_and_resource_groups_count_only_where_the_flags_say_that_they_are_there() -> None:
    data = logon_info(
        flags=0, extra=[("S-1-18-1", ENABLED)], resource_domain="S-1-5-21-4-5-6", resources=[(1200, ENABLED)]
    )
    groups = read_logon_info(data).groups
    assert "S-1-18-1" not in groups and "S-1-5-21-4-5-6-1200" not in groups


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda d: d[:15], "ends too early"),
        (lambda d: b"\x02" + d[1:], "another form of NDR"),
        (lambda d: d[:1] + b"\x00" + d[2:], "another form of NDR"),
        (lambda d: d[:16] + bytes(4) + d[20:], "is empty"),
        (lambda d: d[:-1], "ends too early"),
        (lambda d: d.replace(sid("S-1-5-21-1-2-3"), b"\x02" + sid("S-1-5-21-1-2-3")[1:]), "SID that is none"),
        (lambda d: d.replace(sid("S-1-5-21-1-2-3"), b"\x01\xff" + sid("S-1-5-21-1-2-3")[2:]), "SID that is none"),
        (lambda d: d.replace("älice".encode("utf-16-le"), b"\x00\xd8" * 5), "not UTF-16"),
        (
            lambda d: d.replace(struct.pack("<III", 5, 0, 5), struct.pack("<III", 5, 1, 5)),
            "begins in its middle",
        ),
        (
            lambda d: d.replace(struct.pack("<III", 5, 0, 5), struct.pack("<III", 5, 0, 0xFFFFFFFF)),
            "4294967295 groups",
        ),
        (
            lambda d: d.replace(struct.pack("<IIIII", 3, 513, 7, 512, 7), struct.pack("<IIIII", 2, 513, 7, 512, 7)),
            "PAC",
        ),
    ],
)
def test_a_pac_is_refused_that_is_malformed(spoil: object, problem: str) -> None:
    good = logon_info()
    spoiled = spoil(good)  # type: ignore[operator]
    assert spoiled != good
    with pytest.raises(AuthenticationError, match=problem):
        read_logon_info(spoiled)


def test_a_pac_without_a_domain_is_refused() -> None:
    with pytest.raises(AuthenticationError, match="names no domain"):
        read_logon_info(logon_info(domain=None))


def test_every_truncation_is_refused() -> None:
    good = logon_info(extra=[("S-1-18-1", ENABLED)], resource_domain="S-1-5-21-4-5-6", resources=[(1200, ENABLED)])
    for size in range(len(good)):
        with pytest.raises(AuthenticationError):
            read_logon_info(good[:size])


def test_mutants_are_read_or_refused_and_nothing_else() -> None:
    good = logon_info(extra=[("S-1-18-1", ENABLED)], resource_domain="S-1-5-21-4-5-6", resources=[(1200, ENABLED)])
    rng = random.Random("pac")
    refused = 0
    for _ in range(20_000):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + 4] = rng.choice([rng.randbytes(4), bytes(4), b"\xff" * 4, bytes([data[at] ^ 1])])
        try:
            assert len(read_logon_info(bytes(data)).groups) < 10
        except AuthenticationError:
            refused += 1
    assert refused > 5_000
