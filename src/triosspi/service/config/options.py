"""Options: how each is written in a file, in a variable and on the command line, and what it may be."""

# An option is declared once, as a field of a section (see `settings`), and all else follows from the declaration: its
# key in the file, its variable, its flag with its help, what is accepted, and how it is shown.
#
# A value goes through two steps, whatever it comes from. `Kind.read` understands what people write ("30s", "64KiB",
# "10.0.0.0/8") and makes a plain value of it (30.0, 65536, a network); it never guesses a unit: "600" has meant seconds
# in one program and milliseconds in the next. Then msgspec compares the plain value with the field's type and range, as it
# does when a program makes a section itself. So there is one judge, and no way around it.

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from ..._errors import ConfigurationError
from . import kinds
from .kinds import Kind


class OptionError(ConfigurationError):
    """An option's value that cannot be.

    Attributes:
      option (str): the option's name.
      problem (str): what is wrong, to be read behind the option's name.
      mentions (tuple[str, ...]): other options that ``problem`` speaks of by name.
    """

    def __init__(self, option: str, problem: str, *, mentions: tuple[str, ...] = ()) -> None:
        super().__init__(f"{option} {problem}")
        self.option = option
        self.problem = problem
        self.mentions = mentions


@dataclass(frozen=True, slots=True)
class About:
    """What a field's type does not tell of an option.

    Attributes:
      help: one or two sentences for ``--help``.
      kind: how it is written; by default what follows from the type.
      flag: its flag; by default from its name.
      metavar: what ``--help`` shows for the value.
      none: how None is written, as ``off``. Without it None is only what an option is that was not given.
      unset: what it means when it is not given, where the default does not say so.
      fallback: a variable that others read too, and that counts where nothing else is given.
      argument: it is an argument on the command line, and no flag.
    """

    help: str
    kind: Kind | None = None
    flag: str | None = None
    metavar: str | None = None
    none: str | None = None
    unset: str | None = None
    fallback: str | None = None
    argument: bool = False


@dataclass(frozen=True, slots=True)
class Option:
    """One option, from its declaration.

    Attributes:
      section: the section's name.
      name: unique over all sections; the key in the file.
      default: the value where none is given.
      hint: the field's type.
      about: the rest of the declaration.
      kind: how one value is written.
      many: the value is a tuple of such.
      optional: the value may be None.
      choices: the values that may be, where they can be counted.
      bounds: the least and the greatest value, None where there is none.
      reloads: whether a running server takes a new value over.
    """

    section: str
    name: str
    default: Any
    hint: Any
    about: About
    kind: Kind
    many: bool
    optional: bool
    choices: tuple[str, ...]
    bounds: tuple[Any, Any]
    reloads: bool

    @property
    def key(self) -> str:
        """Section and name."""
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        """On the command line."""
        return self.about.flag or f"--{self.name.replace('_', '-')}"

    @property
    def off_flag(self) -> str:
        """What turns a switch off: without it a flag could not win over a file."""
        return f"--no-{self.flag.removeprefix('--')}"

    @property
    def variable(self) -> str:
        """In the environment."""
        return f"TRIOSSPI_{self.name.upper()}"

    @property
    def expected(self) -> str:
        """What a value, or one of many, must be, for people."""
        low, high = self.bounds
        if self.choices:
            text = "one of " + ", ".join(f'"{choice}"' for choice in self.choices)
        elif self.kind in (kinds.INTEGER, kinds.WORKERS):
            least, most = "" if low is None else f"{low}<=", "" if high is None else f"<={high}"
            text = f"{self.kind.noun}, {least}x{most}" if least or most else self.kind.noun
        else:
            text = self.kind.noun
            if self.kind in (kinds.DURATION, kinds.SIZE) and low is not None and high is not None:
                text += f", from {self.kind.show(low)} to {self.kind.show(high)}"
        return text if self.about.none is None else f'{text}, or "{self.about.none}"'

    def read(self, raw: object, base: Path | None = None) -> Any:
        """Understand a value of the file.

        Args:
          raw: as TOML has it.
          base: what relative paths are relative to; None leaves them as they are.

        Raises:
          OptionError: it cannot be.
        """
        if self.about.none is not None and raw == self.about.none:
            return None
        if self.many:
            # A string is a collection too, and each of its letters might be a rule.
            if not isinstance(raw, list):
                raise OptionError(self.name, f"must be a list, each {self.expected}, not {_quoted(raw)}")
            return tuple(self.read_item(item, base) for item in raw)
        return self.read_item(raw, base)

    def read_item(self, raw: object, base: Path | None = None) -> Any:
        """Understand a value, or one of many; see `read`."""
        try:
            value = self.kind.read(raw)
        except (ValueError, OverflowError) as exc:
            raise self._error(raw, str(exc) if isinstance(exc, kinds.Explained) else "") from None
        if base is not None and self.kind.anchor is not None:
            value = self.kind.anchor(value, base)
        self.check((value,) if self.many else value, raw)
        return value

    def read_text(self, text: str) -> Any:
        """Understand a value of the command line, or one of many; see `read`."""
        if self.about.none is not None and text == self.about.none:
            return None
        return self.read_item(self._from_text(text))

    def read_variable(self, text: str) -> Any:
        """Understand a variable, where many are separated by commas; see `read`."""
        if not text:
            # Meant to be unset, or meant to hold what another variable holds no longer: `allow`, say.
            raise OptionError(self.name, "is empty: leave it out, or give it a value")
        if not self.many:
            return self.read_text(text)
        return tuple(self.read_text(item.strip()) for item in text.split(","))

    def _from_text(self, text: str) -> object:
        try:
            return self.kind.from_text(text)
        except ValueError:
            raise self._error(text) from None

    def check(self, value: object, raw: object = None) -> None:
        """Judge a plain value by type and range.

        Args:
          value: the value.
          raw: as it was written.

        Raises:
          OptionError: it cannot be.
        """
        if self.many and not isinstance(value, tuple) and not (self.optional and value is None):
            raise OptionError(self.name, f"must be a tuple, each {self.expected}, not {_quoted(value)}")
        if self.kind.types is not None:
            # msgspec knows no unions of types that are not its own.
            items = value if isinstance(value, tuple) else () if self.optional and value is None else (value,)
            right = all(isinstance(item, self.kind.types) for item in items)
        else:
            try:
                # Of what may be converted nothing may change by that.
                right = msgspec.convert(value, self.hint) == value
            except msgspec.ValidationError:
                right = False
        if not right:
            raise self._error(value if raw is None else raw)

    def _error(self, raw: object, why: str = "") -> OptionError:
        if raw == "":
            return OptionError(self.name, "is empty")
        return OptionError(self.name, f"must be {self.expected}, not {_quoted(raw)}" + (f": {why}" if why else ""))

    def show(self, value: Any) -> str | None:
        """A value as the file has it, or None where the file has no way to write it."""
        if value is None:
            return None if self.about.none is None else kinds.quoted(self.about.none)
        if self.many:
            return f"[{', '.join(map(self.kind.show, value))}]"
        return self.kind.show(value)


def _quoted(raw: object, limit: int = 64) -> str:
    # As TOML writes it, so that a number and a string of digits look different.
    try:
        text = kinds.quoted(raw) if isinstance(raw, str) else str(raw).lower() if isinstance(raw, bool) else ascii(raw)
    except (ValueError, RecursionError):
        # 0xFFF... is read whatever its length, but not written in decimal digits.
        return "a value that is too long to be shown"
    return text if len(text) <= limit else text[:limit] + "..."


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the settings, a `StartSection` or a `LiveSection`. Each field is an option.

    Two parts may be one section of the file, to whose readers it is of no use to know what can be reloaded: the first of
    them has what cannot.

    Raises:
      OptionError: a value cannot be.
    """

    section: ClassVar[str]

    def __post_init__(self) -> None:
        for option in options_of(type(self)):
            option.check(getattr(self, option.name))


class StartSection(Section, frozen=True, kw_only=True):
    """What a server is started with, and cannot exchange while it runs."""


class LiveSection(Section, frozen=True, kw_only=True):
    """What a running server takes over when it reloads."""


@functools.cache
def options_of(section: type[Section]) -> tuple[Option, ...]:
    """The options of a section, in the order of their declaration."""
    hints = get_type_hints(section, include_extras=True)
    return tuple(
        _resolve(section, field.name, field.default, hints[field.name]) for field in msgspec.structs.fields(section)
    )


_PLAIN: Final[dict[object, Kind]] = {
    bool: kinds.BOOLEAN,
    int: kinds.INTEGER,
    str: kinds.TEXT,
    Path: kinds.PATH,
}


def _resolve(section: type[Section], name: str, default: object, hint: Any) -> Option:
    """Read a declaration."""
    about: About | None = None
    low = high = None
    optional = many = False
    inner = hint
    # From the outside in: Annotated[tuple[Annotated[int, Meta(...)], ...] | None, About(...)].
    while (origin := get_origin(inner)) is not None:
        arguments = get_args(inner)
        if origin is Annotated:
            for extra in arguments[1:]:
                if isinstance(extra, About):
                    about = extra
                elif isinstance(extra, msgspec.Meta):
                    low, high = extra.ge, extra.le
            inner = arguments[0]
        elif origin in (Union, types.UnionType) and type(None) in arguments and len(arguments) == 2:
            optional = True
            inner = next(argument for argument in arguments if argument is not type(None))
        elif origin is tuple and arguments[1:] == (Ellipsis,):
            many = True
            inner = arguments[0]
        else:
            break
    assert about is not None, name
    choices = get_args(inner) if get_origin(inner) is Literal else ()
    return Option(
        section=section.section,
        name=name,
        default=default,
        hint=hint,
        about=about,
        kind=about.kind or (kinds.TEXT if choices else _PLAIN[inner]),
        many=many,
        optional=optional,
        choices=choices,
        bounds=(low, high),
        reloads=issubclass(section, LiveSection),
    )
