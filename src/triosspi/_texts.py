"""The one reader of the text files that people write: what is on the disk, and what of it is text."""

# What an editor adds to a file must not change its meaning. A byte order mark would become a part of the first name in the
# file; a line break that an editor shows, and this program does not see, would hide a `deny` rule. So whatever people and this
# program could read differently is an error that says where it is and what to do.
#
# And whatever is at a file's path must not block the reader: a FIFO waits for its writer, a device never ends.

from __future__ import annotations

import codecs
import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from ._errors import ConfigurationError, handles_secrets

#: Bytes of a configuration, an account map or a password: all options with their explanations are 8 KiB.
SMALL: Final = 2**20
#: Bytes of accounts: half a million of them.
LARGE: Final = 2**26

_CHUNK: Final = 2**20
# Windows knows other ones.
_OPEN: Final = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
_NO_WAITING: Final = getattr(os, "O_NONBLOCK", 0)
_UTF16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Bytes that are searched for UTF-16 without a mark: in it, every other byte of Latin letters is NUL.
_SAMPLE: Final = 1024
_MARK: Final = "\ufeff"
# Line ends to some editors and to str.splitlines(), and never here.
_OTHER_LINE_ENDS: Final = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"


class CannotReadError(ConfigurationError):
    """The system would not give the file. That may pass: its content is not what is wrong."""


@dataclass(frozen=True, slots=True)
class Content:
    """What was in a file.

    Attributes:
      data: its bytes.
      status: owner and permissions; of the very file that was read.
    """

    data: bytes = field(repr=False)
    status: os.stat_result


@handles_secrets
def read(path: str | os.PathLike[str], what: str, limit: int, *, pipes: bool = False) -> Content:
    """Read a file.

    Args:
      path: the file.
      what: it is, in an error's words: "the account map".
      limit: bytes that it may have; of more than that nothing is kept.
      pipes: read pipes and terminals too, and wait for them. For commands only: a server would stop serving while it
          waits.

    Raises:
      CannotReadError: the system says why.
      ConfigurationError: it is no file, or too long.
    """
    try:
        fd = os.open(path, _OPEN if pipes else _OPEN | _NO_WAITING)
        try:
            return read_open(fd, f"{what} {path}", limit, pipes=pipes)
        finally:
            os.close(fd)
    except OSError as exc:
        reason = exc.strerror or "it cannot be opened"
    except ConfigurationError:
        raise
    except ValueError:
        reason = "no file can be called so"
    raise CannotReadError(f"cannot read {what} {path}: {reason}")


@handles_secrets
def read_open(fd: int, name: str, limit: int, *, pipes: bool = False) -> Content:
    """Read an open file, see `read`.

    Args:
      fd: where it is open.
      name: what it is, and its path.
      limit: as there.
      pipes: as there.

    Raises:
      OSError: it cannot be read.
      ConfigurationError: it is no file, or too long.
    """
    status = os.fstat(fd)
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not (stat.S_ISREG(mode) or (pipes and (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)))):
        raise ConfigurationError(f"{name} is no regular file: put what is to be read into one")
    chunks = []
    # One more than the limit shows that there is more; that much is never taken for a file's end.
    left = limit + 1 if status.st_size <= limit else 0
    while left and (chunk := os.read(fd, min(left, _CHUNK))):
        chunks.append(chunk)
        left -= len(chunk)
    if not left:
        raise ConfigurationError(f"{name} is longer than {limit >> 20} MiB")
    return Content(b"".join(chunks), status)


@handles_secrets
def refuse_utf16(data: bytes, name: str) -> None:
    """See to it that bytes are not what Windows's editors call "Unicode".

    Raises:
      ConfigurationError: they are.
    """
    sample = data[:_SAMPLE]
    if data.startswith(_UTF16) or sample.count(0) * 4 > len(sample):
        raise ConfigurationError(f"{name} is UTF-16 text: save it as UTF-8")


@handles_secrets
def decode(data: bytes, name: str) -> str:
    r"""The text that bytes are: UTF-8, with a byte order mark or without, and with CRLF where it has line ends of Windows.

    Args:
      data: the bytes.
      name: what they are, for errors.

    Returns:
      The text without the mark. CRLF is still in it, see `lines`; no other "\r" is.

    Raises:
      ConfigurationError: they are no such text. The error quotes nothing of it, and nothing of it hangs on the error.
    """
    refuse_utf16(data, name)
    if 0 in data:
        raise ConfigurationError(f"{name} has a NUL in line {_line(data, 0)}: it is no text, or is damaged")
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as exc:
        where = data.count(b"\n", 0, exc.start) + 1
        raise ConfigurationError(f"{name} is not UTF-8 text, as line {where} shows: save it as UTF-8") from None
    if text.count("\r") != text.count("\r\n"):
        lone = re.search(r"\r(?!\n)", text)
        number = text.count("\n", 0, lone.start() if lone else None) + 1
        raise ConfigurationError(
            f"{name} has a carriage return within line {number}: save it with line feeds as line ends"
        )
    return text


@handles_secrets
def decode_lines(data: bytes, name: str) -> str:
    """The text of which each line means something, see `decode`; its lines are those that every editor shows.

    Raises:
      ConfigurationError: they are no such text, or some editor would show other lines, or an invisible byte order mark
          is within it, as where two files were put together.
    """
    text = decode(data, name)
    # One look for each: to look for several at once takes fifty times as long, and no other thread runs meanwhile.
    for char in _OTHER_LINE_ENDS:
        if char in text:
            number = text.count("\n", 0, text.index(char)) + 1
            raise ConfigurationError(
                f"{name} has U+{ord(char):04X} in line {number}, which some take for a line's end: put a line feed there, or nothing"
            )
    if _MARK in text:
        number = text.count("\n", 0, text.index(_MARK)) + 1
        raise ConfigurationError(f"{name} has a byte order mark within it, in line {number}: take it away")
    return text


def lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a decoded text, each with its number and without its end."""
    for number, line in enumerate(text.split("\n"), start=1):
        yield number, line.removesuffix("\r")


def _line(data: bytes, byte: int) -> int:
    return data.count(b"\n", 0, data.index(byte)) + 1
