"""200 honest clients among 200 hostile ones."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

from crowd import honest_crowd, hostile_crowd, serve

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MEBIBYTE = 2**20


@pytest.mark.long("nine hundred logins, so that memory that grows is seen")
@pytest.mark.parametrize("wire", ["framed", "auto"])
async def test_every_honest_login_succeeds_among_hostile_ones_and_memory_stays_flat(tmp_path: Path, wire: str) -> None:
    log = tmp_path / "log"
    streams = wire == "auto"
    honest = partial(honest_crowd, at_once=20, streams=streams)
    with serve(tmp_path, log, wire=wire) as server:
        await honest(server.port, 100)
        idle = server.descriptors()
        async with hostile_crowd(server.port, 200, streams=streams) as visits:
            assert len((await honest(server.port, 200)).seconds) == 200
            before = server.resident()
            assert len((await honest(server.port, 600)).seconds) == 600
            after = server.resident()
        assert visits[0] > 200
        assert after - before < 4 * MEBIBYTE
        # All that the hostile ones left behind is gone once the honest ones have been served again.
        while server.descriptors() > idle:
            await honest(server.port, 1)
    text = log.read_text()
    assert "Traceback" not in text and "server's own" not in text
    assert "wrong password for 'DOM\\\\alice'" in text
    assert "the peer announced" in text
