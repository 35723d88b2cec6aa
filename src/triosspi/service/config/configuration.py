"""From a TOML file, variables and flags to `Settings`, with where each value came from."""

# Flags win over variables, variables over the file, the file over the defaults. Whoever mistypes an option must hear of it
# before a client does: an option that was not understood may have been a limit or a `deny`. So everything that is wrong is an
# error, and all errors are told at once, each in a line of its own.
#
# tomllib says where a syntax error is, but not where a key stands. So a document that it has understood is cut into its
# statements, each of which is a document too: a line, or the shortest run of lines, that it understands.

from __future__ import annotations

import bisect
import difflib
import os
import re
import stat
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from ... import _texts
from ..._errors import ConfigurationError
from ..reasons import only_configuration_errors
from .options import Option, OptionError
from .settings import PARTS, REMOVED, SECTIONS, Settings, all_options

_WINDOWS: Final = sys.platform == "win32"

PREFIX: Final = "TRIOSSPI_"
#: The variable for the file itself.
CONFIG_VARIABLE: Final = "TRIOSSPI_CONFIG"
# The file, and what `triosspi connect` reads.
_OTHER_VARIABLES: Final = {CONFIG_VARIABLE, "TRIOSSPI_PASSWORD"}
# In Kubernetes every container is told of every service: one called "triosspi" makes TRIOSSPI_PORT=tcp://10.0.0.7:2000.
_SERVICE_LINK: Final = re.compile(r"(tcp|udp|sctp)://.*")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from.

    Attributes:
      kind: what sort of place.
      text: the file and line, the variable or the flag.
    """

    kind: Literal["default", "file", "variable", "flag"]
    text: str


_DEFAULT: Final = Origin("default", "default")


class ConfigurationErrors(ConfigurationError):
    """One or more things are wrong.

    Attributes:
      lines (tuple[str, ...]): what, each in one line.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = tuple(lines)
        super().__init__("; ".join(self.lines))


class UnreadableConfiguration(ConfigurationErrors, _texts.CannotReadError):
    """The system would not give the file, which may pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What was found.

    Attributes:
      settings: the effective values.
      origins: where each came from, by the option's name.
      sources: what they were read from; reading them again is a reload.
    """

    settings: Settings
    origins: Mapping[str, Origin]
    sources: Sources

    def explain(self, error: OptionError) -> str:
        """One line for an error, that begins with where the option was given."""
        return _explain(error, self.origins)

    def given_by_flag(self, name: str) -> bool:
        """Whether an option was given on the command line."""
        return self.origins[name].kind == "flag"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What a configuration is read from.

    Attributes:
      file: the TOML file, if there is one.
      environ: the environment; what of it is ours, as it is now, by default.
      flags: what the command line gave, by the options' names, understood already.
    """

    file: Path | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: own_variables(os.environ), repr=False)
    flags: Mapping[str, object] = field(default_factory=dict)

    def load(self) -> Configuration:
        """Read them, now.

        Raises:
          ConfigurationErrors: something is wrong.
          ConfigurationError: something is so wrong that it cannot be said where.
        """
        return only_configuration_errors("the configuration", self._load)

    def _load(self) -> Configuration:
        errors: list[str] = []
        error: type[ConfigurationErrors] = ConfigurationErrors
        values: dict[str, Any] = {}
        origins = dict.fromkeys(all_options(), _DEFAULT)

        def take(option: Option, origin: Origin, read: Callable[..., object], *arguments: object) -> None:
            origins[option.name] = origin
            try:
                values[option.name] = read(*arguments)
            except OptionError as exc:
                errors.append(_explain(exc, origins))

        if self.file is not None:
            try:
                for option, value, origin in _read_file(self.file, errors):
                    take(option, origin, option.read, value, self.file.absolute().parent)
            except _texts.CannotReadError as exc:
                error = UnreadableConfiguration
                errors.append(str(exc))
            except ConfigurationErrors as exc:
                errors += exc.lines
        for option, text, name in _read_environment(self.environ, values, errors):
            take(option, Origin("variable", name), option.read_variable, text)
        for name, value in self.flags.items():
            option = all_options()[name]
            flag = name.upper() if option.about.argument else option.off_flag if value is False else option.flag
            origins[name] = Origin("flag", flag)
            values[name] = value
        if errors:
            raise error(errors)
        return Configuration(settings=_make(values, origins), origins=origins, sources=self)


def _make(values: Mapping[str, Any], origins: Mapping[str, Origin]) -> Settings:
    """The settings, if what was read makes sense together."""
    made: dict[str, Any] = {}
    errors = []
    for place, part in PARTS.items():
        own = {name: values[name] for name in part.__struct_fields__ if name in values}
        try:
            made[place] = part(**own)
        except OptionError as exc:
            errors.append(_explain(exc, origins))
    if errors:
        raise ConfigurationErrors(errors)
    return Settings(**made)


def _explain(error: OptionError, origins: Mapping[str, Origin]) -> str:
    origin = origins[error.option]
    options = all_options()
    problem = error.problem
    if origin.kind == "flag":
        for name in error.mentions:
            problem = problem.replace(name, options[name].flag)
        return f"{origin.text} {problem}"
    key = options[error.option].key
    where = {"default": key, "variable": origin.text, "file": f"{origin.text}: {key}"}[origin.kind]
    return f"{where} {problem}"


# The environment


def own_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What of an environment is about the server: it may go to another process, and holds no password."""
    others = {option.about.fallback for option in all_options().values()}
    return {
        name: text
        for name, text in environ.items()
        if (name.startswith(PREFIX) and name != "TRIOSSPI_PASSWORD") or name in others
    }


def _read_environment(
    environ: Mapping[str, str], given: Mapping[str, Any], errors: list[str]
) -> Iterator[tuple[Option, str, str]]:
    """Each option for which there is a variable, with its text and the variable's name."""
    options = {option.variable: option for option in all_options().values()}
    for name, option in options.items():
        fallback = option.about.fallback
        if name in environ and not _SERVICE_LINK.fullmatch(environ[name]):
            yield option, environ[name], name
        elif fallback is not None and environ.get(fallback) and option.name not in given and not _WINDOWS:
            # On Windows it is of no use to this server, and there for other programs.
            yield option, environ[fallback], fallback
    for name in environ:
        if name.startswith(PREFIX) and name not in options and name not in _OTHER_VARIABLES:
            key = name.removeprefix(PREFIX).lower()
            if key in REMOVED:
                errors.append(f"{name} is no variable any more: {REMOVED[key]}")
                continue
            # Others may have variables of this prefix (an image its version, Kubernetes its services); but one that looks
            # like an option was meant as one.
            near = difflib.get_close_matches(key, all_options(), 1, cutoff=0.8)
            if near:
                errors.append(f"unknown variable {name}; did you mean {all_options()[near[0]].variable}?")


# The file


class _Statement(NamedTuple):
    """One statement of a file: a table's head, or a key with a value.

    Attributes:
      line: the first of its lines, from 1.
      path: the tables' names, and the key.
      value: the value; None for a head.
      is_array: it is the head of an array of tables.
    """

    line: int
    path: tuple[str, ...]
    value: object
    is_array: bool = False


def _read_file(path: Path, errors: list[str]) -> Iterator[tuple[Option, object, Origin]]:
    """Each option that the file gives, with its value and where that stands."""
    text = _read_text(path)
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigurationErrors([_syntax_error(path, str(exc), text)]) from None
    except ValueError:
        # The interpreter's limit, which is there because reading takes the square of the digits.
        digits = sys.get_int_max_str_digits()
        raise ConfigurationErrors(
            [f"{path}:{_line_of(ValueError, text)}: a number of more than {digits} digits"]
        ) from None
    except RecursionError:
        raise ConfigurationErrors([f"{path}:{_line_of(RecursionError, text)}: too deeply nested"]) from None
    unknown: set[str] = set()
    for statement in _statements(text):
        where = f"{path}:{statement.line}"
        problem = _misplaced(statement, unknown)
        if problem:
            errors.append(f"{where}: {problem}")
        elif problem is None and statement.value is not None:
            yield all_options()[statement.path[1]], statement.value, Origin("file", where)


def _line_of(kind: type[Exception], text: str) -> int:
    """The line at which the parser raises this, and not only for want of the rest."""
    lines = text.split("\n")

    def raises(number: int) -> bool:
        try:
            tomllib.loads("\n".join(lines[:number]))
        except tomllib.TOMLDecodeError:
            return False
        except kind:
            return True
        return False

    # It reads from the beginning to the end: with fewer lines it does not come there, with more it does not go on.
    return 1 + bisect.bisect_left(range(1, len(lines)), True, key=raises)


def _misplaced(statement: _Statement, unknown: set[str]) -> str | None:
    """What is wrong with the place of a statement: None if nothing is, empty if that was told before."""
    sections = SECTIONS
    options = all_options()
    table, *keys = statement.path
    if statement.is_array and table in sections:
        return f"write [{table}], with one pair of brackets"
    if statement.value is not None and not keys:
        if table in options:
            return f"{table} belongs to the section [{options[table].section}]"
        if table in sections:
            return f"{table} is a section: write [{table}]"
        return f"unknown key {_name(table)}{_did_you_mean(table, [*options, *sections])}"
    if table not in sections:
        if table in unknown:
            return ""
        unknown.add(table)
        return f"unknown section [{_name(table)}]{_did_you_mean(table, sections)}"
    key = ".".join(keys)
    if keys and statement.value is None:
        return f"unknown section [{_name(f'{table}.{key}')}]"
    if not keys or (key in options and options[key].section == table):
        return None
    if key in options:
        return f"{key} belongs to the section [{options[key].section}]"
    if key in REMOVED:
        return f"{key} is no option any more: {REMOVED[key]}"
    own = [name for name, option in options.items() if option.section == table]
    return f"unknown key {table}.{_name(key)}{_did_you_mean(key, own, options)}"


def _name(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", text) else ascii(text)[:64]


def _did_you_mean(wrong: str, *where: Iterable[str]) -> str:
    for names in where:
        if near := difflib.get_close_matches(wrong.lower().replace("-", "_"), names, 1):
            return f"; did you mean {near[0]}?"
    return "; 'triosspi config-example' shows all there are"


def _read_text(path: Path) -> str:
    try:
        content = _texts.read(path, "the configuration", _texts.SMALL)
        text = _texts.decode_lines(content.data, f"the configuration {path}")
    except _texts.CannotReadError:
        raise
    except ConfigurationError as exc:
        raise ConfigurationErrors([str(exc)]) from None
    if os.name == "posix" and content.status.st_mode & stat.S_IWOTH:
        # It says whose code runs here, and who may log in.
        raise ConfigurationErrors([f"everybody may write the configuration {path}: chmod o-w {path}"])
    # A statement of several lines is told by its line feeds.
    return text.replace("\r\n", "\n")


def _syntax_error(path: Path, message: str, text: str) -> str:
    match = re.fullmatch(r"(.*) \(at (?:line ([0-9]+), column [0-9]+|end of document)\)", message, re.DOTALL)
    if match is None:
        return f"{path}: {message}"
    line = match[2] or text.rstrip("\n").count("\n") + 1
    return f"{path}:{line}: {match[1]}"


def _statements(text: str) -> Iterator[_Statement]:
    """The statements of a document that is known to be right."""
    head: tuple[str, ...] = ()
    start, piece = 1, ""
    for number, line in enumerate(text.split("\n"), start=1):
        piece += f"{line}\n"
        # What goes over several lines ends in one that has one of these: the others need not be tried.
        if number > start and not re.search(r"[\]}]|\"\"\"|'''", line):
            continue
        try:
            parsed = tomllib.loads(piece)
        except tomllib.TOMLDecodeError:
            continue
        bracket = re.match(r"\s*\[(\[)?", piece)
        if bracket:
            head = _head(parsed)
            yield _Statement(start, head, None, is_array=bool(bracket[1]))
        else:
            for path, value in _flatten(parsed):
                yield _Statement(start, head + path, value)
        start, piece = number + 1, ""


def _head(parsed: Mapping[str, Any]) -> tuple[str, ...]:
    path: tuple[str, ...] = ()
    inner: Any = parsed
    while inner:
        # The last one of an array of tables is a list with a table in it.
        if isinstance(inner, list):
            inner = inner[0]
        else:
            ((name, inner),) = inner.items()
            path += (name,)
    return path


def _flatten(parsed: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], object]]:
    for name, value in parsed.items():
        if value and isinstance(value, dict):
            yield from (((name, *path), inner) for path, inner in _flatten(value))
        else:
            yield (name,), value
