"""Where passwords come from, and standard input as such."""

from __future__ import annotations

import io
import os
import sys
from collections import deque
from pathlib import Path
from typing import Final, cast

import click

from ..._errors import ConfigurationError, handles_secrets
from ..._texts import LARGE, SMALL, decode, decode_lines, lines, read, refuse_utf16

_READ_SIZE: Final = 64 * 1024


def _read() -> bytes:
    # Without a standard input there is none of Python's either.
    return cast("io.BufferedReader", sys.stdin.buffer).raw.read(_READ_SIZE) or b"" if sys.stdin is not None else b""


class InputLines:
    """Called for each line of standard input; nothing at its end.

    It reads past Python's own buffer: when Ctrl-C ends the program while a thread waits in there for
    somebody to type, the interpreter cannot get that buffer's lock, and aborts.
    """

    def __init__(self) -> None:
        self._complete: deque[bytes] = deque()
        self._rest = b""

    def __call__(self, limit: int | None = None) -> bytes:
        """The next line.

        Args:
          limit: bytes that it may have; None for any number.

        Raises:
          ConfigurationError: it has more.
        """
        while not self._complete:
            if limit is not None and len(self._rest) > limit:
                raise ConfigurationError(f"the line on standard input is longer than {limit >> 20} MiB")
            if not (data := _read()):
                line, self._rest = self._rest, b""
                return line
            *complete, self._rest = (self._rest + data).split(b"\n")
            self._complete += complete
        return self._complete.popleft() + b"\n"

    def some(self) -> bytes:
        """Whatever there is, lines or not, as soon as there is something; nothing at the end."""
        if self._complete or self._rest:
            data = b"".join(line + b"\n" for line in self._complete) + self._rest
            self._complete.clear()
            self._rest = b""
            return data
        return _read()

    def all(self, limit: int) -> bytes:
        """All lines that are left.

        Args:
          limit: bytes that they may have together.

        Raises:
          ConfigurationError: they have more.
        """
        found = []
        size = 0
        while line := self(limit):
            found.append(line)
            size += len(line)
            if size > limit:
                raise ConfigurationError(f"standard input is longer than {limit >> 20} MiB")
        return b"".join(found)


def prompt_password(text: str, *, twice: bool = False) -> str:
    """Ask at the terminal, without showing what is typed; a new password is asked for twice."""
    password: str = click.prompt(text, hide_input=True, confirmation_prompt=twice, err=True)
    return password


def require_terminal(instead: str) -> None:
    """See that there is somebody to ask.

    Raises:
      ConfigurationError: there is not; the text names what to use instead.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigurationError(f"no password, and no terminal to ask for it: use {instead}")


@handles_secrets
def decode_password(data: bytes, what: str) -> str:
    """A password's text; a byte order mark in front is none of it.

    Raises:
      ConfigurationError: it is none, or empty; the error quotes nothing of it.
    """
    password = decode(data, what)
    if not password:
        raise ConfigurationError(f"{what} is empty")
    return password


@handles_secrets
def read_password_stdin(read_line: InputLines) -> str:
    """The password that is standard input's first line."""
    what = "the password on standard input"
    return decode_password(_first_line(read_line(SMALL), what), what)


@handles_secrets
def read_password_file(file: Path) -> str:
    """The password that is a file's first line, be it a real file or what a shell's ``<(command)`` stands for."""
    what = "the password file"
    data = read(file, what, SMALL, pipes=True).data
    return decode_password(_first_line(data, f"{what} {file}"), f"{what} {file}")


@handles_secrets
def read_password_variable(name: str) -> str | None:
    """The password in a variable of the environment; None where there is no such variable."""
    value = os.environ.get(name)
    if value is None:
        return None
    what = f"the password in {name}"
    if "\n" in value:
        # It would be refused by the server, and nobody would see why: most come from a file, with its end.
        raise ConfigurationError(f"{what} has a line's end in it: set the variable without, or use --password-file")
    return decode_password(os.fsencode(value), what)


@handles_secrets
def read_clear(file: Path) -> tuple[str, list[str]]:
    """The lines of a file with passwords in clear, and what to call it; "-" is standard input."""
    if str(file) == "-":
        name, data = "<stdin>", InputLines().all(LARGE)
    else:
        name, data = str(file), read(file, "the file", LARGE, pipes=True).data
    return name, [line for _, line in lines(decode_lines(data, name))]


def _first_line(data: bytes, what: str) -> bytes:
    """What comes before the first line's end, which is no part of a password, LF and CRLF alike."""
    # In UTF-16 that byte may be half a character.
    refuse_utf16(data, what)
    return data.split(b"\n", 1)[0].removesuffix(b"\r")
