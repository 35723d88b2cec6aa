"""The log: one line for each record, whatever is in it, and no exception for whoever logs, whatever takes the lines."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triosspi import ConfigurationError
from triosspi.security import pyspnego_compat
from triosspi.service.observe import logs

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}Z"

# Texts that break lines, command terminals, or reverse what is read.
HOSTILE = {
    "a forged line": "a\n2026-01-01 00:00:00.000Z INFO root: login",
    "a carriage return": "a\r\nb",
    "a command": "\x1b[2J\x1b]0;title\x07",
    "a command of eight bits": "\x9b31m",
    "controls": "\x00\x7f\x08",
    "a direction": "\u202ereversed\u2066",
    "other ends of lines": "\u2028\u2029\x0b\x0c\x85",
    "half a pair": "\ud800",
}

log = logging.getLogger("triosspi.test")


@pytest.fixture(autouse=True)
def fresh_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It remembers what was lost."""
    monkeypatch.setattr(logs, "_HANDLER", logs._Handler())


def alone(patch: pytest.MonkeyPatch) -> None:
    """Take pytest's own handlers away, which raise, and whose texts its processes cannot tell each other."""
    patch.setattr(logging.getLogger(), "handlers", [])


class Stderr:
    """Standard error that is a file."""

    def __init__(self, path: Path, stream: TextIO, patch: pytest.MonkeyPatch) -> None:
        self.path = path
        self._stream = stream
        self._patch = patch

    def configure(self, level: str, form: str) -> None:
        """Take the place of standard error, which pytest exchanges when a test begins, and configure the log."""
        self._patch.setattr(sys, "stderr", self._stream)
        logs.configure(level, form)

    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def lines(self) -> list[str]:
        # Not splitlines, which knows more ends of lines than a log's reader does.
        *lines, rest = self.text().split("\n")
        assert rest == ""
        return lines

    def records(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.lines()]


@pytest.fixture
def stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stderr]:
    path = tmp_path / "stderr"
    with path.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        yield Stderr(path, stream, monkeypatch)


class Terminal(io.StringIO):
    """A terminal, as far as one can ask it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """With a terminal that can show colours, if there is one."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return monkeypatch


# What a line has


def test_a_record_is_one_line_of_json_with_the_time_in_utc(stderr: Stderr) -> None:
    stderr.configure("info", "json")
    log.warning("%s: login refused: %s", "192.0.2.1:5", "wrong password")
    (record,) = stderr.records()
    assert list(record) == ["timestamp", "level", "logger", "pid", "event"]
    assert re.fullmatch(TIME.replace(" ", "T"), str(record["timestamp"]))
    assert record["event"] == "192.0.2.1:5: login refused: wrong password"
    assert (record["level"], record["logger"], record["pid"]) == ("warning", "triosspi.test", os.getpid())


def test_on_the_console_a_line_is_as_readable_as_it_was(stderr: Stderr) -> None:
    stderr.configure("info", "console")
    log.info("%s: stopping", "SIGTERM")
    (line,) = stderr.lines()
    assert re.fullmatch(rf"{TIME} INFO SIGTERM: stopping", line)


def test_structlog_events_and_standard_records_come_through_one_handler(stderr: Stderr) -> None:
    stderr.configure("info", "json")
    structlog.get_logger("app").info("started %s", "well", size=3, names=["a", "b"], nothing=None)
    logging.getLogger("app").info("standard", extra={"size": 4})
    logs.get_logger("app").info("ours", size=5)
    first, second, third = stderr.records()
    assert (first["event"], first["logger"], first["size"]) == ("started well", "app", 3)
    assert (first["names"], first["nothing"]) == (["a", "b"], None)
    assert (second["event"], second["logger"], second["size"]) == ("standard", "app", 4)
    assert (third["event"], third["logger"], third["size"]) == ("ours", "app", 5)


def test_on_the_console_an_event_reads_as_a_sentence_with_its_fields_behind(stderr: Stderr) -> None:
    stderr.configure("info", "console")
    audit = logs.get_logger("triosspi.audit")
    audit.warning("login refused", source="192.0.2.1:5", reason="wrong password", seconds=0.0123456789, mechanism=None)
    audit.info("login", source="[::1]:5", principal="DOM\\alice", flags=("CONF", "INTEG"), note="two words")
    structlog.get_logger("app").info("hello")
    assert [re.sub(f"^{TIME} ", "", line) for line in stderr.lines()] == [
        "WARNING 192.0.2.1:5: login refused: wrong password (seconds=0.0123457)",
        "INFO [::1]:5: DOM\\alice: login (flags=CONF,INTEG note='two words')",
        "INFO app: hello",
    ]


def test_a_field_cannot_pass_for_one_of_the_logs_own(stderr: Stderr) -> None:
    stderr.configure("info", "json")
    structlog.get_logger("app").info("real", level="forged", timestamp=0, logger="forged", pid=0)
    logging.getLogger("app").info("real", extra={"event": "forged", "exception": "forged"})
    for record in stderr.records():
        assert (record["event"], record["level"], record["logger"]) == ("real", "info", "app")
        assert "exception" not in record
    assert stderr.text().count('_":') == 6


def test_what_an_application_binds_to_its_task_is_in_its_events_and_not_in_the_audit_log(stderr: Stderr) -> None:
    stderr.configure("info", "json")
    with structlog.contextvars.bound_contextvars(request=7):
        structlog.get_logger("app").info("hello")
        logs.get_logger("triosspi.audit").info("login")
    first, second = stderr.records()
    assert first["request"] == 7
    assert "request" not in second


def test_a_warning_of_pythons_is_a_record_too(stderr: Stderr) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        stderr.configure("info", "json")
        warnings.warn("old-fashioned", DeprecationWarning, stacklevel=1)
    (record,) = stderr.records()
    assert record["logger"] == "py.warnings"
    assert "old-fashioned" in str(record["event"])


# For whom


def test_auto_is_console_on_a_terminal_and_json_elsewhere(patch: pytest.MonkeyPatch) -> None:
    for stream, pattern in ((Terminal(), f"{TIME} INFO hello\n"), (io.StringIO(), r"\{.*\}\n")):
        patch.setattr(sys, "stderr", stream)
        logs.configure("info", "auto")
        log.info("hello")
        assert re.fullmatch(pattern, stream.getvalue())


def test_only_a_terminal_is_coloured_and_not_where_nobody_wants_it(patch: pytest.MonkeyPatch) -> None:
    def shown(stream: io.StringIO) -> str:
        with patch.context() as inner:
            inner.setattr(sys, "stderr", stream)
            logs.configure("info", "console")
            log.error("bad")
        return stream.getvalue()

    assert "Z \x1b[31mERROR\x1b[0m bad" in shown(Terminal())
    assert "Z ERROR bad" in shown(io.StringIO())
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with patch.context() as inner:
            inner.setenv(name, value)
            assert "Z ERROR bad" in shown(Terminal())


@pytest.mark.parametrize(("level", "form"), [("loud", "console"), ("INFO", "console"), ("info", "xml"), ("", "")])
def test_what_there_is_not_is_refused_and_changes_nothing(level: str, form: str, stderr: Stderr) -> None:
    stderr.configure("warning", "json")
    with pytest.raises(ConfigurationError, match="there are"):
        stderr.configure(level, form)
    log.info("no")
    log.warning("yes")
    assert [record["event"] for record in stderr.records()] == ["yes"]


# Hostile texts


def assert_harmless_console(text: str) -> None:
    *lines, rest = text.split("\n")
    assert rest == ""
    assert all(line.isprintable() for line in lines)
    # The first of them is the record's; whatever follows is seen to be a part of it.
    assert re.match(f"{TIME} [A-Z]+ ", lines[0])
    assert all(line.startswith("    ") for line in lines[1:])


def log_everywhere(text: str) -> Iterator[Callable[[], object]]:
    """Every way of a text into a record."""
    event = logs.get_logger("triosspi.audit")
    yield lambda: log.info(text.replace("%", "%%"))
    yield lambda: log.info("%s", text)
    yield lambda: log.info("%s: %s", "source", [text])
    yield lambda: log.info("standard", extra={"field": text})
    yield lambda: logging.getLogger(f"other.{text}").info("hello")
    yield lambda: event.info(text)
    yield lambda: event.info("login", source=text, principal=text, reason=text)
    yield lambda: event.info("login", field=text, many=(text, text), raw=text.encode(errors="surrogatepass"))
    yield lambda: event.info("login", **{f"name {text}": 1})

    def fail() -> None:
        exc = ValueError(text)
        exc.add_note(text)
        log.error("failed", exc_info=exc)
        event.error("failed", exc_info=exc)

    yield fail


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_text_breaks_a_line_or_commands_a_terminal(
    text: str, stderr: Stderr, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(monkeypatch)
    for write in log_everywhere(text):
        before = stderr.text()
        stderr.configure("info", "console")
        write()
        for record in re.split(rf"(?m)^(?={TIME} \w+ )", stderr.text().removeprefix(before))[1:]:
            assert_harmless_console(record)
    start = len(stderr.text())
    stderr.configure("info", "json")
    for write in log_everywhere(text):
        write()
    for line in stderr.text()[start:].removesuffix("\n").split("\n"):
        assert line.isascii()
        assert "\\ud800" not in line.replace("\\\\", "")
        assert line.isprintable()
        assert set(json.loads(line)) >= {"timestamp", "level", "logger", "pid", "event"}
    assert "could not be shown" not in stderr.text()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(codec=None), max_size=80),
    which=st.integers(0, 9),
    form=st.sampled_from(["console", "json"]),
)
def test_any_text_is_one_record(text: str, which: int, form: str, patch: pytest.MonkeyPatch) -> None:
    with patch.context() as inner:
        alone(inner)
        inner.setattr(sys, "stderr", stream := io.StringIO())
        logs.configure("info", form)
        list(log_everywhere(text))[which]()
    *lines, rest = stream.getvalue().split("\n")
    assert rest == ""
    assert all(line.isprintable() for line in lines)
    # The last way is two records.
    count = 1 + (which == 9)
    if form == "json":
        assert len([json.loads(line) for line in lines]) == count
    else:
        assert len([line for line in lines if re.match(f"{TIME} [A-Z]+ ", line)]) == count
        assert len([line for line in lines if not line.startswith("    ")]) == count


def test_a_long_text_is_cut_and_says_so(stderr: Stderr) -> None:
    stderr.configure("info", "json")
    log.info("%s", "x" * 1_000_000)
    logs.get_logger("app").info("event", field="y" * 1_000_000)
    log.error("failed", exc_info=ValueError("z" * 1_000_000))
    assert all(len(line) < 20_000 and "characters left out" in line for line in stderr.lines())
    # Its end is what went wrong.
    assert str(stderr.records()[2]["exception"]).endswith("z\n")


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("\x1b[2J")


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_record_that_cannot_be_shown_says_so(form: str, stderr: Stderr, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)
    stderr.configure("info", form)
    log.error("%d users", "x")
    log.error("%s", Unspeakable())
    logs.get_logger("app").error("event", field=Unspeakable())
    logs.get_logger("app").error("event", **{"field": {(1, 2): 3}} if form == "json" else {"field": Unspeakable()})
    log.error("fine")
    lines = stderr.lines()
    assert len(lines) == 5
    assert "could not be shown (TypeError): '%d users'" in lines[0]
    assert all("could not be shown" in line for line in lines[:4])
    assert "fine" in lines[4]


# Secrets


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_traceback_is_one_field_or_one_block_and_shows_no_local_variable(form: str, stderr: Stderr) -> None:
    stderr.configure("info", form)

    def fail(key: str) -> None:
        raise ExceptionGroup("several", [ValueError("one"), RuntimeError(len(key))])

    try:
        fail("sesame" + str(len(form)))
    except ExceptionGroup as exc:
        log.exception("failed")
        logs.get_logger("triosspi.audit").error("failed", exc_info=True)
        logs.get_logger("triosspi.audit").error("failed", exc_info=exc)
        structlog.get_logger("app").exception("failed")
    assert "sesame4" not in stderr.text()
    assert "sesame7" not in stderr.text()
    if form == "json":
        records = stderr.records()
        assert len(records) == 4
        assert all("ValueError: one" in str(record["exception"]) for record in records)
        assert all("exc_info" not in record for record in records)
    else:
        assert len(re.findall(f"(?m)^{TIME} ERROR ", stderr.text())) == 4
        assert stderr.text().count("\n      | ExceptionGroup: several") == 4


def test_where_from_is_shown_when_asked_for(stderr: Stderr) -> None:
    stderr.configure("info", "json")
    log.info("here", stack_info=True)
    (record,) = stderr.records()
    assert "test_where_from_is_shown_when_asked_for" in str(record["stack"])


@pytest.mark.parametrize("form", ["console", "json"])
def test_tokens_are_not_logged_even_at_debug(form: str, stderr: Stderr) -> None:
    stderr.configure("debug", form)
    pyspnego = logging.getLogger("spnego._ntlm")
    pyspnego.debug("NTLM step input: %s", "TlRMTVNTUAAD")
    pyspnego.debug("something harmless")
    assert len(stderr.lines()) == 1
    pyspnego_compat.allow_token_logging()
    try:
        pyspnego.debug("NTLM step input: %s", "TlRMTVNTUAAD")
    finally:
        pyspnego_compat.allow_token_logging(False)
    assert "TlRMTVNTUAAD" in stderr.lines()[1]


# Once more


def test_the_level_holds_for_everybody_and_can_be_changed_at_any_time(stderr: Stderr) -> None:
    event = logs.get_logger("triosspi.audit")
    bound = structlog.get_logger("app")
    for number, level in enumerate(("error", "debug", "warning", "info")):
        stderr.configure(level, "json")
        for logger in (log, event, bound, logging.getLogger("other")):
            logger.debug(f"{number} debug")  # noqa: G004 - structlog has no other way
            logger.info(f"{number} info")  # noqa: G004
            logger.warning(f"{number} warning")  # noqa: G004
            logger.error(f"{number} error")  # noqa: G004
    shown = [str(record["event"]) for record in stderr.records()]
    assert [shown.count(f"0 {level}") for level in logs.LEVELS] == [0, 0, 0, 4]
    assert [shown.count(f"1 {level}") for level in logs.LEVELS] == [4, 4, 4, 4]
    assert [shown.count(f"2 {level}") for level in logs.LEVELS] == [0, 0, 4, 4]
    assert [shown.count(f"3 {level}") for level in logs.LEVELS] == [0, 4, 4, 4]


def test_reconfiguring_neither_loses_nor_doubles_a_line(stderr: Stderr) -> None:
    stderr.configure("info", "json")
    event = logs.get_logger("triosspi.audit")

    def write(who: int) -> None:
        for number in range(300):
            (log if number % 2 else event).info(f"line {who}-{number}.")

    threads = [threading.Thread(target=write, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    forms = ["console", "json"]
    while any(thread.is_alive() for thread in threads):
        forms.reverse()
        stderr.configure("info", forms[0])
    for thread in threads:
        thread.join()
    lines = stderr.lines()
    assert len(lines) == 900
    seen = [re.findall(r"line (\d)-(\d+)\.", line) for line in lines]
    for who in range(3):
        assert [int(number) for ((one, number),) in seen if int(one) == who] == list(range(300))


def test_handlers_of_others_are_left_alone(stderr: Stderr, caplog: pytest.LogCaptureFixture) -> None:
    stderr.configure("info", "json")
    stderr.configure("info", "console")
    log.info("hello")
    assert caplog.messages == ["hello"]
    assert len(stderr.lines()) == 1


def test_without_configuration_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    logs.get_logger("triosspi.audit").info("login", principal="alice")
    assert capsys.readouterr() == ("", "")


# Standard error that takes nothing


@contextlib.contextmanager
def pipe_as_stderr(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Yields the end to read from; it is the caller's."""
    reader, writer = os.pipe()
    with open(writer, "w", encoding="utf-8", errors="backslashreplace") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        yield reader


def fill(stream: object) -> int:
    """Fill a pipe as far as it goes; returns how many bytes that took."""
    fileno = stream.fileno()  # type: ignore[attr-defined]
    os.set_blocking(fileno, False)
    written = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            written += os.write(fileno, b"." * 4096)
    os.set_blocking(fileno, True)
    return written


def drain(reader: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += os.read(reader, size - len(data))
    return data


def test_a_reader_who_is_gone_is_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    logs.configure("info", "json")
    with pipe_as_stderr(monkeypatch) as reader:
        os.close(reader)
        # A BrokenPipeError would come out of these.
        log.info("one")
        log.error("two")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_after_a_full_disk_the_log_says_how_many_lines_are_missing(
    stderr: Stderr, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr.configure("info", "json")
    with monkeypatch.context() as patch, open("/dev/full", "w") as full:
        patch.setattr(sys, "stderr", full)
        for _ in range(3):
            log.info("lost")
    log.info("kept")
    log.info("kept too")
    missing, *kept = stderr.records()
    assert missing["event"] == "3 lines of this log were lost: standard error did not take them"
    assert (missing["logger"], missing["level"]) == ("triosspi.logs", "warning")
    assert [record["event"] for record in kept] == ["kept", "kept too"]


def test_standard_error_may_be_missing_closed_or_of_another_alphabet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.configure("info", "console")
    closed = (tmp_path / "closed").open("w")
    closed.close()
    descriptor = (tmp_path / "descriptor").open("w")
    os.close(descriptor.fileno())
    broken = io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict")
    for stream in (None, closed, descriptor, broken, object()):
        monkeypatch.setattr(sys, "stderr", stream)
        log.info("größe")
        logs.configure("info", "auto")
        log.info("größe")
        logs.configure("info", "console")
    with pytest.raises(OSError, match="Bad file descriptor"):
        descriptor.close()
    latin = (tmp_path / "latin").open("w", encoding="latin-1")
    with latin:
        monkeypatch.setattr(sys, "stderr", latin)
        log.info("größe \u20ac")
    assert (tmp_path / "latin").read_bytes().endswith("größe \\u20ac\n".encode("latin-1"))


def test_a_reader_who_does_not_read_stops_nobody_and_is_told_how_much_he_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logs.configure("info", "json")
    with pipe_as_stderr(monkeypatch) as reader:
        filled = fill(sys.stderr)
        # It would block here.
        for number in range(500):
            log.info("lost %d", number)
        drain(reader, filled)
        log.info("kept")
        first, second = os.read(reader, 65536).decode().splitlines()
        os.close(reader)
    assert json.loads(first)["event"].startswith("500 lines of this log were lost")
    assert json.loads(second)["event"] == "kept"


def test_a_line_that_was_taken_in_part_does_not_spoil_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    logs.configure("info", "json")
    with pipe_as_stderr(monkeypatch) as reader:
        filled = fill(sys.stderr)
        # Room for the beginning of a long line.
        drain(reader, 4096)
        log.info("long", extra={"a": "a" * 8000, "b": "b" * 8000})
        log.info("lost")
        drain(reader, filled - 4096)
        log.info("kept")
        data = os.read(reader, 65536).decode()
        os.close(reader)
    cut, missing, kept, rest = data.split("\n")
    assert '"event": "long"' in cut
    assert json.loads(missing)["event"].startswith("2 lines of this log were lost")
    assert json.loads(kept)["event"] == "kept"
    assert rest == ""


# Processes

SPEAKER = """
import logging, sys
from triosspi.service.observe import logs
logs.configure("info", "json")
for number in range(100):
    logging.getLogger("speaker").info("%s %d %s", sys.argv[1], number, "x" * 150)
print("done")
"""


def speak(name: str, stderr: int | object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SPEAKER, name], stdout=subprocess.PIPE, stderr=stderr)  # type: ignore[call-overload,no-any-return]


def test_the_lines_of_several_processes_stay_whole_in_one_pipe() -> None:
    # All of them fit in: nobody has to wait for the reader.
    reader, writer = os.pipe()
    with open(reader, "rb") as pipe:
        speakers = [speak(name, writer) for name in ("one", "two")]
        os.close(writer)
        lines = pipe.read().decode().splitlines()
        assert [speaker.communicate()[0] for speaker in speakers] == [b"done\n", b"done\n"]
    said = [str(json.loads(line)["event"]).split()[:2] for line in lines]
    for name in ("one", "two"):
        assert [int(number) for who, number in said if who == name] == list(range(100))


@pytest.mark.parametrize("broken", ["full", "gone"])
def test_a_process_ends_well_although_its_log_was_lost(broken: str) -> None:
    if broken == "full":
        if not os.path.exists("/dev/full"):
            pytest.skip("this system has no /dev/full")
        writer = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = os.pipe()
        os.close(reader)
    with speak("one", writer) as process:
        os.close(writer)
        assert process.communicate()[0] == b"done\n"
    # It would be 120 had Python found something left to write.
    assert process.returncode == 0
