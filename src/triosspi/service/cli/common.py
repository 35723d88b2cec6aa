"""What the commands have in common."""

from __future__ import annotations

import os
from typing import Final

import click

from ...wire import WireFormat

WIRES: Final = click.Choice([wire.value for wire in WireFormat])
MECHANISMS: Final = click.Choice(["negotiate", "kerberos", "ntlm"])


def message_bytes(message: str) -> bytes:
    """The message that an option's value means."""
    if not message:
        raise click.UsageError("--message is empty: an empty message cannot be sent")
    # The bytes of the command line, whether they are text or not.
    return os.fsencode(message)


def log_to_stderr(level: str = "info", form: str = "console") -> None:
    """Show the log, from a level on, on standard error; see `configure`."""
    # Not at the top: structlog takes longer to import than most commands to run.
    from ..observe.logs import configure  # noqa: PLC0415

    configure(level, form)
