"""What a running process reads again: when it is tried again, and when it is not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from harness import make_acceptor
from test_server import serving, settings
from triosspi import ConfigurationError
from triosspi._texts import CannotReadError
from triosspi.service.config.configuration import Sources
from triosspi.service.serving.reloading import FILES_INTERVAL, LONGEST_RETRY, Reading, watch_files
from triosspi.service.serving.server import Loaded


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run_sync(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
        # The clock would jump over a wait for a thread.
        await trio.lowlevel.checkpoint()
        return function(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    monkeypatch.setattr("triosspi._server_threads.run_sync", run_sync)


async def read_when_asked(reading: Reading[None], times: list[float]) -> None:
    while True:
        await reading.asked()
        times.append(trio.current_time())
        try:
            await reading.read()
        except ConfigurationError:
            continue


@pytest.mark.parametrize(
    ("error", "tries"),
    [(CannotReadError("cannot read it: Input/output error"), 4), (ConfigurationError("it makes no sense"), 1)],
    ids=["may pass", "does not pass"],
)
async def test_a_reading_that_failed_by_an_error_that_passes_is_tried_again_until_it_goes_well(
    error: ConfigurationError, tries: int, inline: None, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    # The file is as it was (the disk or the table of open files was full for a moment): nobody would have looked again.
    file = tmp_path / "file"
    file.write_text("as it is")
    failures = [error] * 3
    times: list[float] = []

    def read() -> None:
        if failures:
            raise failures.pop()

    reading = Reading(read)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_when_asked, reading, times)
        nursery.start_soon(watch_files, lambda: (file,), lambda: reading.ask("change"), lambda: reading.may_pass)
        await trio.sleep(1)
        file.write_text("another, and longer")
        await trio.sleep(30 * FILES_INTERVAL)
        nursery.cancel_scope.cancel()
    assert len(times) == tries
    # Less and less often: each try is two lines in the log.
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses == sorted(pauses)
    assert all(FILES_INTERVAL <= pause <= LONGEST_RETRY for pause in pauses)


async def test_where_no_files_are_watched_nothing_is_tried_again(
    inline: None, autojump_clock: trio.testing.MockClock
) -> None:
    times: list[float] = []

    def read() -> None:
        raise CannotReadError("cannot read it: Input/output error")

    reading = Reading(read)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_when_asked, reading, times)
        nursery.start_soon(watch_files, lambda: (), lambda: reading.ask("change"), lambda: reading.may_pass)
        reading.ask("SIGHUP")
        await trio.sleep(LONGEST_RETRY)
        nursery.cancel_scope.cancel()
    assert len(times) == 1


def test_a_configuration_that_cannot_be_read_may_be_readable_later_and_one_that_is_wrong_is_not(tmp_path: Path) -> None:
    with pytest.raises(CannotReadError):
        Sources(file=tmp_path / "nowhere").load()
    (tmp_path / "wrong").write_text("[limits]\nx = 1\n")
    with pytest.raises(ConfigurationError) as caught:
        Sources(file=tmp_path / "wrong").load()
    assert not isinstance(caught.value, CannotReadError)


async def test_a_server_tries_again_what_it_could_not_read(
    inline: None, autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    file = tmp_path / "triosspi.toml"
    file.write_text("one")
    loaded = Loaded(live=settings().live, acceptor=make_acceptor(), files=(file,))
    answers: list[CannotReadError | None] = [None, CannotReadError("cannot read it: Too many open files")]

    def load() -> Loaded:
        if answers and (error := answers.pop()) is not None:
            raise error
        return loaded

    async with serving(reload=load, files=(file,)):
        await trio.sleep(FILES_INTERVAL)
        file.write_text("two, and longer")
        await trio.sleep(4 * FILES_INTERVAL)
        assert not answers
