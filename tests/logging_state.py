"""Commands set up the log of their process; within the tests' process that ends with the test."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """The root logger has its level again, and structlog and the warnings go where they went."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    if (logs := sys.modules.get("triosspi.service.observe.logs")) is not None:
        for handler in root.handlers[:]:
            if isinstance(handler, logs._Handler):
                root.removeHandler(handler)
        logging.captureWarnings(False)
        logs.structlog.reset_defaults()
