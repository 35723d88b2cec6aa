"""Reads and writes keytabs, for those that no program makes: a wrong version number, a wrong key.

The format is version 0x502 of MIT's "Keytab file format".
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_VERSION = b"\x05\x02"
_NT_PRINCIPAL = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One entry.

    Attributes:
        principal: With the realm.
        kvno: The key's version number.
        enctype: Its encryption type.
        key: The key itself.
    """

    principal: str
    kvno: int
    enctype: int
    key: bytes = field(repr=False)


def path_of(keytab: str) -> Path:
    """The path in a keytab's name, `FILE:/path` or `/path`."""
    return Path(keytab.removeprefix("FILE:"))


def _counted(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def write_keytab(path: str | os.PathLike[str], keys: Iterable[Key]) -> str:
    """Write a keytab; return its name."""
    content = bytearray(_VERSION)
    for key in keys:
        name, _, realm = key.principal.rpartition("@")
        components = name.split("/")
        entry = struct.pack(">H", len(components)) + _counted(realm.encode())
        entry += b"".join(_counted(component.encode()) for component in components)
        entry += struct.pack(">IIBH", _NT_PRINCIPAL, 0, key.kvno & 0xFF, key.enctype) + _counted(key.key)
        entry += struct.pack(">I", key.kvno)
        content += struct.pack(">i", len(entry)) + entry
    Path(path).write_bytes(content)
    return f"FILE:{os.fspath(path)}"


def read_keytab(keytab: str) -> list[Key]:
    """All entries of a keytab."""
    content = path_of(keytab).read_bytes()
    if content[:2] != _VERSION:
        raise ValueError(f"{keytab}: not a keytab of version 0x502")
    keys = []
    offset = 2
    while offset < len(content):
        (size,) = struct.unpack_from(">i", content, offset)
        offset += 4
        if size > 0:  # else a hole, where an entry was deleted
            keys.append(_read_entry(content[offset : offset + size]))
        offset += abs(size)
    return keys


def _read_entry(entry: bytes) -> Key:
    position = 0

    def number(layout: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from(layout, entry, position)
        position += struct.calcsize(layout)
        return int(value)

    def counted() -> bytes:
        nonlocal position
        length = number(">H")
        position += length
        return entry[position - length : position]

    count = number(">H")
    realm, *components = (counted().decode() for _ in range(count + 1))
    number(">I")  # the kind of the name
    number(">I")  # when it was written
    kvno = number(">B")
    enctype = number(">H")
    key = counted()
    if len(entry) - position >= 4:
        kvno = number(">I") or kvno
    return Key(principal=f"{'/'.join(components)}@{realm}", kvno=kvno, enctype=enctype, key=key)
