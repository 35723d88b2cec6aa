"""Where passwords come from, and standard input as such."""

from __future__ import annotations

import io
import sys
from collections import deque
from collections.abc import Callable
from typing import Final, cast

import click

from ..._errors import ConfigurationError

_READ_SIZE: Final = 64 * 1024


class InputLines:
    """Called for each line of standard input; nothing at its end.

    It reads past Python's own buffer: when Ctrl-C ends the program while a thread waits in there for
    somebody to type, the interpreter cannot get that buffer's lock, and aborts.
    """

    def __init__(self) -> None:
        self._complete: deque[bytes] = deque()
        self._rest = b""

    def __call__(self) -> bytes:
        """The next line."""
        while not self._complete:
            # Without a standard input there is none of Python's either.
            data = cast("io.BufferedReader", sys.stdin.buffer).raw.read(_READ_SIZE) if sys.stdin is not None else b""
            if not data:
                line, self._rest = self._rest, b""
                return line
            *complete, self._rest = (self._rest + data).split(b"\n")
            self._complete += complete
        return self._complete.popleft() + b"\n"


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


def decode_password(data: bytes, what: str) -> str:
    """A password's text.

    Raises:
      ConfigurationError: it is none; the text quotes nothing of it.
    """
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ConfigurationError(f"{what} is not UTF-8 text") from None


def read_password_stdin(read_line: Callable[[], bytes]) -> str:
    """The password that is standard input's first line."""
    return decode_password(read_line().rstrip(b"\r\n"), "the password on standard input")
