"""What the commands have in common."""

from __future__ import annotations

import logging
import os
from typing import Final

import click

from ..._wire import WireFormat

#: The sample's.
DEFAULT_PORT: Final = 2000

WIRES: Final = click.Choice([wire.value for wire in WireFormat])
MECHANISMS: Final = click.Choice(["negotiate", "kerberos", "ntlm"])


def message_bytes(message: str) -> bytes:
    """The message that an option's value means."""
    if not message:
        raise click.UsageError("--message is empty: an empty message cannot be sent")
    # The bytes of the command line, whether they are text or not.
    return os.fsencode(message)


def log_to_stderr() -> None:
    """Show the log of the server, from INFO on, on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("triosspi")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
