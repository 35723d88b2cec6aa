"""What a test does about a peer that is not installed: skip at a desk, fail in CI."""

from __future__ import annotations

import os
from typing import Protocol

import pytest


class _Available(Protocol):
    def available(self) -> str | None: ...


def require(peer: _Available) -> None:
    """Skip the running test when the peer cannot run here, with its reason; in CI a missing peer is a failure.

    An interoperability suite that skips itself in CI proves nothing and stays green for ever.
    """
    require_nothing(peer.available())


def require_nothing(reason: str | None) -> None:
    """The same for what has been found missing; None is nothing."""
    if reason is None:
        return
    if os.environ.get("CI", "").lower() not in ("", "0", "false", "no"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
