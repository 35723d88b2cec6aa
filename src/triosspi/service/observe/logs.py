"""The log: every line of the standard `logging` and of structlog, through one handler, on standard error."""

# What the handler must hold against:
#
# * Texts that a peer chose. The library quotes them, but an application logs what it likes, and an exception's text is
#   anybody's. So everything is escaped once more here, at the end of every way: on a terminal nothing but printable
#   characters is shown, a record is one line, and the lines of a traceback, which people want to read as lines, begin
#   with white space, where no record begins. As JSON a record is one line of ASCII.
# * Standard error that takes nothing. A reader who is gone (EPIPE), a full disk (ENOSPC) and a closed descriptor must not
#   become an exception in the code that logs; and a reader that does not read (a stopped terminal, a log collector
#   that hangs) must not stop the event loop, and every connection with it: a line waits for a moment, and then lines are
#   dropped and counted until one is taken again. They are not kept: an attacker who causes log lines could fill the memory.
#   A thread that writes would keep more of them, but would lose the last ones of a process that aborts.
# * Several processes with one standard error. A line is written by one write(2), which pipes keep in one piece up to
#   PIPE_BUF bytes and files whatever its length; Python's own stream would cut lines where its buffer ends.
# * Secrets. A traceback is shown without local variables, which may hold keys.
#
# Reconfiguring exchanges what the handler does, never the handler: there is no moment with none or with two.

from __future__ import annotations

import json
import logging
import os
import select
import stat
import sys
import time
import traceback
from datetime import UTC, datetime
from typing import Final, TextIO

import structlog
from structlog.stdlib import BoundLogger, ProcessorFormatter
from structlog.typing import EventDict

from ..._errors import ConfigurationError, printable
from ..reasons import harmless

LEVELS: Final = ("debug", "info", "warning", "error")
FORMATS: Final = ("auto", "console", "json")

# Characters of one text in a record, and of one traceback: a peer's message may be a megabyte long, and end up in an
# exception's text.
_LONGEST_TEXT: Final = 8192
_LONGEST_TRACEBACK: Final = 16384

# Seconds that lines may wait for a reader; what they have waited comes back by and by, with so much of the time. So a reader
# who is slow for a while loses nothing, and one who has stopped costs the server half a second, and then a hundredth.
_PATIENCE: Final = 0.5
_PATIENCE_REGAINED: Final = 0.01
# What poll(2) promises room for in a pipe, and what a pipe keeps in one piece.
_PIPE_BUF: Final = getattr(select, "PIPE_BUF", 512)

# Stand in a record before all else, in this order; an application's field of that name gets a "_" behind it.
_OURS: Final = ("timestamp", "level", "logger", "pid", "event", "exception", "stack")
# On the console these stand before the event, and behind it, instead of as name=value.
_BEFORE: Final = ("source", "principal")
_BEHIND: Final = ("cause", "reason", "error")

_COLOURS: Final = {"WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[1;31m"}


def configure(log_level: str = "info", log_format: str = "auto") -> None:
    """Send everything that is logged in this process to standard error. May be called again at any time.

    A record is a line. As JSON it has the fields ``timestamp`` (ISO 8601, UTC), ``level``, ``logger``, ``pid`` and
    ``event``, those that it was logged with, and ``exception`` (the traceback, as one text) where there was one.

    Args:
      log_level: one of `LEVELS`: what is less than this is not shown, whoever logs it.
      log_format: ``"console"`` for people (coloured on a terminal, unless NO_COLOR is set), ``"json"`` for machines, or
          ``"auto"``: console on a terminal, else JSON.

    Raises:
      ConfigurationError: there is no such level or format.
    """
    if log_level not in LEVELS:
        raise ConfigurationError(f"no log level is called {log_level!r}; there are {', '.join(LEVELS)}")
    if log_format not in FORMATS:
        raise ConfigurationError(f"no log format is called {log_format!r}; there are {', '.join(FORMATS)}")
    terminal = _is_terminal()
    console = log_format == "console" or (log_format == "auto" and terminal)
    render = _Console(coloured=terminal and _wants_colours()) if console else _to_json
    root = logging.getLogger()
    # The formatter and then the level: a line that the new level admits is not to be in the old format.
    _HANDLER.use(ProcessorFormatter(processors=[_record, render]))
    # Which adds it only once.
    root.addHandler(_HANDLER)
    root.setLevel(log_level.upper())
    # Python's own warnings would be several lines, and not escaped.
    logging.captureWarnings(True)
    structlog.configure(
        # What an application binds to its task belongs to its own events.
        processors=[structlog.contextvars.merge_contextvars, *_PROCESSORS],
        wrapper_class=BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        # Safe, although this may be called again: what varies is in the handler.
        cache_logger_on_first_use=True,
    )


def get_logger(name: str) -> BoundLogger:
    """A structlog logger in front of the standard logger of that name, whether `configure` was called or not.

    structlog's own default, until it is configured, is to print.
    """
    logger: BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=list(_PROCESSORS),
        wrapper_class=BoundLogger,
        cache_logger_on_first_use=True,
    )
    return logger


# All that happens to an event before it becomes a record of the standard library.
_PROCESSORS: Final = (
    structlog.stdlib.filter_by_level,
    structlog.stdlib.PositionalArgumentsFormatter(),
    ProcessorFormatter.wrap_for_formatter,
)


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        # There is none, or it is closed.
        return False


def _wants_colours() -> bool:
    # no-color.org; and a Windows console shows escapes as they are unless it was told not to.
    return os.name != "nt" and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


# From a record to a line


def _record(_: object, __: str, event_dict: EventDict) -> EventDict:
    """What is known of a record, in the order in which it is shown."""
    source: logging.LogRecord = event_dict.pop("_record")
    fields = event_dict
    if not event_dict.pop("_from_structlog"):
        # What was given as `extra`.
        fields = {name: value for name, value in vars(source).items() if name not in _NOT_EXTRA}
    ours: EventDict = {
        "timestamp": datetime.fromtimestamp(source.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
        "level": source.levelname.lower(),
        "logger": source.name,
        "pid": source.process,
        "event": _text(event_dict.pop("event", "")),
    }
    if (exc := _exception(event_dict.pop("exc_info", None))) is not None:
        ours["exception"] = _short("".join(traceback.format_exception(exc)), _LONGEST_TRACEBACK)
    if isinstance(stack := event_dict.pop("stack_info", None), str):
        ours["stack"] = _short(stack, _LONGEST_TRACEBACK)
    for name, value in fields.items():
        ours[f"{name}_" if name in _OURS else name] = _text(value) if isinstance(value, str) else value
    return ours


def _exception(exc_info: object) -> BaseException | None:
    """The exception that any of the forms means in which logging and structlog take one."""
    if exc_info is True:
        exc_info = sys.exc_info()
    if isinstance(exc_info, tuple):
        exc_info = exc_info[1]
    return exc_info if isinstance(exc_info, BaseException) else None


def _text(value: object) -> str:
    return _short(str(value), _LONGEST_TEXT)


def _short(text: str, limit: int) -> str:
    """The text, or its beginning and its end, where a traceback says what happened."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}... {len(text) - 2 * half} characters left out ...{text[-half:]}"


def _to_json(_: object, __: str, fields: EventDict) -> str:
    return json.dumps(_plain(fields), default=_text, allow_nan=False)


def _plain(value: object) -> object:
    """The same in texts that every reader of JSON takes.

    Half a surrogate pair, as Python has for a file name's odd bytes, is refused by many.
    """
    match value:
        case str() if not value.isascii():
            return value.encode(errors="backslashreplace").decode()
        case list() | tuple():
            return [_plain(item) for item in value]
        case dict():
            return {_plain(name): _plain(item) for name, item in value.items()}
    return value


class _Console:
    """Renders a record for people: ``time LEVEL source: principal: event: reason (name=value ...)``.

    Args:
      coloured: whether the level is.
    """

    def __init__(self, *, coloured: bool) -> None:
        self._coloured = coloured

    def __call__(self, _: object, __: str, fields: EventDict) -> str:
        when, level, logger = (fields.pop(name) for name in ("timestamp", "level", "logger"))
        del fields["pid"]
        words = [] if logger.startswith("triosspi") else [harmless(logger)]
        words += [_shown(value) for name in _BEFORE if (value := fields.pop(name, None)) is not None]
        words.append(harmless(fields.pop("event")))
        words += [harmless(_text(value)) for name in _BEHIND if (value := fields.pop(name, None)) is not None]
        below = [text for name in ("exception", "stack") if (text := fields.pop(name, None))]
        rest = [f"{harmless(name)}={_shown(value)}" for name, value in fields.items() if value is not None]
        line = f"{when.replace('T', ' ')} {self._level(level)} {': '.join(words)}"
        if rest:
            line += f" ({' '.join(rest)})"
        parts = [part for text in below for part in text.rstrip("\n").split("\n")]
        return "\n    ".join([line, *(harmless(part) for part in parts)])

    def _level(self, level: str) -> str:
        level = harmless(level.upper())
        if self._coloured and (colour := _COLOURS.get(level)) is not None:
            return f"{colour}{level}\x1b[0m"
        return level


def _shown(value: object) -> str:
    """A value as it is, or quoted where it could be taken for something else."""
    if isinstance(value, (list, tuple)):
        return ",".join(_shown(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    text = _text(value)
    if text and text.isprintable() and not any(mark in text for mark in " \"'=(),"):
        return text
    # repr escapes all that is not printable.
    return repr(text)


# From a line to standard error


class _Handler(logging.Handler):
    """Writes lines to what is standard error at the time. Nothing is ever raised."""

    def __init__(self) -> None:
        super().__init__()
        # Lines that were not taken since one was.
        self._lost = 0
        # Whether the last one was taken in part: the next must not go on where it was cut.
        self._cut = False
        # What is left of it, in seconds, and when that was.
        self._patience = _PATIENCE
        self._patience_at = time.monotonic()

    def use(self, formatter: logging.Formatter) -> None:
        """Format lines in another way, from the next one on."""
        self.acquire()
        self.formatter = formatter
        self.release()

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            taken = self._write(self._lines(record))
        except Exception:  # noqa: BLE001 - must not be raised where something is logged, and there is no place to report it
            taken = False
        self._lost = 0 if taken else self._lost + 1

    def _lines(self, record: logging.LogRecord) -> str:
        try:
            lines = self.format(record)
        except Exception as exc:  # noqa: BLE001 - an argument that does not fit, a value whose repr raises, ...
            # An event of structlog's has it among its fields.
            event = record.msg.get("event") if isinstance(record.msg, dict) else record.msg
            shown = printable(event if isinstance(event, str) else type(event).__name__, 200)
            text = f"a log record could not be shown ({type(exc).__name__}): {shown}"
            lines = self.format(_note(record.name, record.levelno, text))
        if self._lost:
            text = f"{self._lost} lines of this log were lost: standard error did not take them"
            lines = f"{self.format(_note('triosspi.logs', logging.WARNING, text))}\n{lines}"
        return f"{lines}\n"

    def _write(self, lines: str) -> bool:
        """Write lines.

        Returns:
          Whether there was anything to write to.

        Raises:
          OSError, ValueError: they were not taken, or only in part.
        """
        stream = sys.stderr
        if stream is None:
            return False
        if (fileno := _descriptor(stream)) is None:
            stream.write(lines)
            stream.flush()
            return True
        data = lines.encode(stream.encoding or "utf-8", "backslashreplace")
        if self._cut:
            data = b"\n" + data
        regular = stat.S_ISREG(os.fstat(fileno).st_mode)
        taken = 0
        try:
            while taken < len(data):
                if not regular:
                    self._wait(fileno)
                taken += os.write(fileno, data if regular and not taken else data[taken : taken + _PIPE_BUF])
        finally:
            if taken:
                self._cut = taken < len(data)
        return True

    def _wait(self, fileno: int) -> None:
        """Wait until a reader has made room; raises TimeoutError when it does not in time."""
        poll = select.poll()
        poll.register(fileno, select.POLLOUT)
        before = time.monotonic()
        left = min(_PATIENCE, self._patience + (before - self._patience_at) * _PATIENCE_REGAINED)
        ready = poll.poll(left * 1000)
        self._patience_at = time.monotonic()
        self._patience = max(0.0, left - (self._patience_at - before))
        if not ready:
            raise TimeoutError


def _note(name: str, level: int, text: str) -> logging.LogRecord:
    """A record of the log's own."""
    return logging.LogRecord(name, level, __file__, 0, text, None, None)


def _descriptor(stream: TextIO) -> int | None:
    """The descriptor to write to directly; None where the stream must be used, as on Windows, or has none."""
    if os.name == "nt":
        return None
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None


_HANDLER: Final = _Handler()
# What every record has, and what formatters leave there.
_NOT_EXTRA: Final = frozenset({*vars(_note("", logging.INFO, "")), "message", "asctime", "taskName"})
