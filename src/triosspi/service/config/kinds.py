"""The kinds of values that options have: how people write them, and what a program gets."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from ..network.addresses import IPNetwork
from .system import usable_cores


class Explained(ValueError):
    """A value that cannot be, with a reason that people can use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How values of one kind are written.

    Attributes:
      noun: what a value is, with an example.
      read: makes a plain value of what TOML has, or raises ValueError. Where the type says all, it changes nothing.
      show: writes a plain value as TOML.
      metavar: what ``--help`` shows for it.
      from_text: makes what TOML would have of text, or raises ValueError.
      types: what a plain value is an instance of, where msgspec cannot tell.
      anchor: makes a relative path absolute.
    """

    noun: str
    read: Callable[[object], object]
    show: Callable[[Any], str]
    metavar: str = "TEXT"
    from_text: Callable[[str], object] = str
    types: tuple[type, ...] | None = None
    anchor: Callable[[Any, Path], object] | None = None


def quoted(text: str) -> str:
    """A TOML string; nothing in it commands a terminal."""
    pieces = []
    for char in text:
        if char in '"\\':
            pieces.append(f"\\{char}")
        elif char.isprintable():
            pieces.append(char)
        else:
            pieces.append(f"\\u{ord(char):04X}" if ord(char) < 0x10000 else f"\\U{ord(char):08X}")
    return f'"{"".join(pieces)}"'


def _as_it_is(raw: object) -> object:
    return raw


# Text, numbers, switches


def _read_text(raw: object) -> str:
    if not isinstance(raw, str) or not raw:
        raise ValueError
    if "\0" in raw:
        # No system call takes it, and the error would come late and from far away.
        raise Explained("it has a NUL in it")
    return raw


def _integer(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]+(_[0-9]+)*", text):
        raise ValueError
    return int(text)


_SWITCH: Final = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


def _switch(text: str) -> bool:
    try:
        return _SWITCH[text.lower()]
    except KeyError:
        raise ValueError from None


TEXT: Final = Kind(noun="a string", read=_read_text, show=quoted)
INTEGER: Final = Kind(noun="an integer", read=_as_it_is, show=str, from_text=_integer, metavar="NUMBER")
BOOLEAN: Final = Kind(
    noun="true or false", read=_as_it_is, show=lambda value: str(value).lower(), from_text=_switch, metavar="BOOLEAN"
)


# Quantities with a unit


def _quantity(units: Mapping[str, Fraction], noun: str, metavar: str, make: type[int | float]) -> Kind:
    """A number and one of the units, which stand in ascending order."""

    def read(raw: object) -> int | float:
        if isinstance(raw, (int, float)) or (isinstance(raw, str) and re.fullmatch(r"[0-9.]+", raw)):
            raise Explained("it has no unit")
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)", raw) if isinstance(raw, str) else None
        if match is None or match[2] not in units:
            raise ValueError
        value = Fraction(match[1]) * units[match[2]]
        if make is int and value.denominator != 1:
            raise ValueError
        return make(value)

    def show(value: float) -> str:
        exact = Fraction(repr(value))
        if not exact:
            return f'"0{next(name for name, factor in units.items() if factor == 1)}"'
        for name, factor in reversed(list(units.items())):
            if (exact / factor).denominator == 1:
                return f'"{exact / factor}{name}"'
        name, factor = next(iter(units.items()))
        return f'"{float(exact / factor)}{name}"'

    return Kind(noun=noun, read=read, show=show, metavar=metavar)


DURATION: Final = _quantity(
    {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600), "d": Fraction(86400)},
    'a duration with its unit (ms, s, m, h or d), such as "30s"',
    "DURATION",
    float,
)
SIZE: Final = _quantity(
    {"B": Fraction(1), "KiB": Fraction(2**10), "MiB": Fraction(2**20), "GiB": Fraction(2**30), "TiB": Fraction(2**40)},
    'a size with its unit (B, KiB, MiB, GiB or TiB), such as "64KiB"',
    "SIZE",
    int,
)


# Files


def _read_path(raw: object) -> Path:
    return Path(_read_text(raw))


def _anchor_keytab(name: str, base: Path) -> str:
    # "FILE:krb5.keytab" and "krb5.keytab" are files; "MEMORY:x", "KCM:" and their like are none.
    match = re.fullmatch(r"(?:(FILE|WRFILE):)?([^:].*)", name, re.DOTALL)
    if match is None or (match[1] is None and re.match(r"[A-Za-z][A-Za-z]+:", name)):
        return name
    return f"{match[1]}:{base / match[2]}" if match[1] else str(base / match[2])


def _read_mode(raw: object) -> int:
    # A number would be read by some as octal and by TOML as decimal.
    if not isinstance(raw, str) or not re.fullmatch(r"0?[0-7]{3}", raw):
        raise ValueError
    return int(raw, 8)


PATH: Final = Kind(
    noun="a path",
    read=_read_path,
    show=lambda path: quoted(str(path)),
    metavar="FILE",
    types=(Path,),
    anchor=lambda path, base: base / path,
)
KEYTAB: Final = Kind(noun="a keytab", read=_read_text, show=quoted, metavar="FILE", anchor=_anchor_keytab)
MODE: Final = Kind(
    noun='the permissions of a file in octal digits, such as "0660"',
    read=_read_mode,
    show=lambda mode: f'"{mode:04o}"',
    metavar="MODE",
)


# The network


def _read_network(raw: object) -> IPNetwork:
    if not isinstance(raw, str):
        # The module takes integers for addresses.
        raise ValueError  # noqa: TRY004 - the file's error, not the program's
    try:
        return ipaddress.ip_network(raw)
    except ValueError as exc:
        if "host bits" in str(exc):
            raise Explained(f"it names a host; the network is {ipaddress.ip_network(raw, strict=False)}") from None
        raise


def _read_address(raw: object) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):([0-9]{1,5})", raw) if isinstance(raw, str) else None
    if match is None or int(match[3]) > 65535:
        raise ValueError
    return match[1] or match[2], int(match[3])


def _show_address(address: tuple[str, int]) -> str:
    host, port = address
    return quoted(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


NETWORK: Final = Kind(
    noun='an address or a network, such as "10.0.0.0/8"',
    read=_read_network,
    show=lambda network: f'"{network}"',
    metavar="NETWORK",
    types=(ipaddress.IPv4Network, ipaddress.IPv6Network),
)
ADDRESS: Final = Kind(
    noun='an address and a port, such as "127.0.0.1:9464"', read=_read_address, show=_show_address, metavar="HOST:PORT"
)


# What stands alone


def _read_startups(raw: object) -> object:
    # As OpenSSH's MaxStartups, "start:rate:full": an early drop at random is no more, and a full house is what it was.
    if isinstance(raw, str):
        match = re.fullmatch(r"(?:[0-9]{1,9}:[0-9]{1,3}:)?([0-9]{1,9})", raw)
        if match is None:
            raise ValueError
        return int(match[1])
    return raw


STARTUPS: Final = Kind(
    noun='an integer, or "start:rate:full", of which only full counts',
    read=_read_startups,
    show=str,
    metavar="NUMBER",
)
WORKERS: Final = Kind(
    noun='"auto" or an integer',
    read=lambda raw: usable_cores() if raw == "auto" else raw,
    show=str,
    from_text=lambda text: text if text == "auto" else _integer(text),
    metavar="NUMBER|auto",
)
