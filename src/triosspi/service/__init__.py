"""The server program: what a deployment needs around the library. An application imports `shutting_down` from here."""

# When it is asked for, as the package's own names are: a command that serves nobody need not import Trio.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .serving.lifecycle import shutting_down as shutting_down


def __getattr__(name: str) -> Any:
    if name != "shutting_down":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .serving import lifecycle  # noqa: PLC0415 - see above

    return lifecycle.shutting_down
