"""``triosspi connect``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import trio

from ...security.credentials import Initiator
from ...wire import WireFormat
from ..client import ConnectOptions, parse_address, run_client
from ..config.settings import DEFAULT_PORT
from ..reasons import harmless
from .common import MECHANISMS, WIRES, message_bytes
from .passwords import (
    InputLines,
    prompt_password,
    read_password_file,
    read_password_stdin,
    read_password_variable,
    require_terminal,
)


@click.command()
@click.argument("address", metavar="HOST[:PORT]")
@click.option("--wire", type=WIRES, default=WireFormat.SAMPLE.value, show_default=True, help="The wire format.")
@click.option("--user", metavar=r"'DOM\name'", help="Who to log in as. [default: the system's own credentials]")
@click.option("--password-file", type=click.Path(path_type=Path), help="Its first line is the password.")
@click.option("--password-stdin", is_flag=True, help="Standard input's first line is the password.")
@click.option("--ccache", help="A Kerberos credential cache. [default: KRB5CCNAME]")
@click.option("--keytab", help="A keytab with the user's Kerberos key.")
@click.option("--target", metavar="host/server", help="The service's SPN. [default: host/HOST]")
@click.option("--mechanism", type=MECHANISMS, default="negotiate", show_default=True, help="How to log in.")
@click.option(
    "--message", "messages", multiple=True, help="What to send (not in sample); may be repeated. [default: stdin]"
)
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True, help="Seconds."
)
def connect(
    *,
    address: str,
    wire: str,
    user: str | None,
    password_file: Path | None,
    password_stdin: bool,
    ccache: str | None,
    keytab: str | None,
    target: str | None,
    mechanism: Any,
    messages: tuple[str, ...],
    timeout: float,
) -> None:
    r"""Log in to a server and talk to it.

    With --wire sample the server speaks: its message is printed. With --wire framed each --message, or
    each line of standard input that is not empty, is sent, and the reply to it printed. With --wire
    negotiate-stream standard input (or each --message) goes to the server as it comes, and what the
    server sends to standard output, until both have ended: Ctrl-D ends what you type.

    The password comes from --password-file, --password-stdin, the environment's TRIOSSPI_PASSWORD or a
    prompt: never from the command line, which other users of the machine can read. --ccache and --keytab
    log in by Kerberos without one; so does no --user at all, with the ticket that you have.
    """
    host, port = parse_address(address, DEFAULT_PORT)
    if messages and wire == WireFormat.SAMPLE.value:
        raise click.UsageError("--message needs another --wire: in the sample's format only the server speaks")
    read_line = InputLines()
    to_send = [message_bytes(message) for message in messages]
    password = None
    if ccache is not None or keytab is not None:
        if password_file is not None or password_stdin:
            raise click.UsageError("--ccache and --keytab take the place of a password")
    elif user is not None:
        password = _find_password(user, password_file, password_stdin, read_line)
    elif password_file is not None or password_stdin:
        raise click.UsageError("a password needs --user")
    initiator = Initiator(
        username=user, password=password, ccache=ccache, keytab=keytab, target=target, mechanism=mechanism
    )
    options = ConnectOptions(
        host=host,
        port=port,
        initiator=initiator,
        wire=WireFormat(wire),
        messages=to_send,
        timeout=timeout,
        read_line=read_line,
        read=read_line.some,
        show=_show,
        write=_write,
    )
    trio.run(run_client, options)


def _show(message: bytes) -> None:
    if sys.stdout.isatty():
        # What a server sends must not be able to command the terminal.
        click.echo(harmless(message.decode(errors="backslashreplace"), keep="\n\t"))
    else:
        click.echo(message)


def _write(data: bytes | bytearray) -> None:
    if sys.stdout.isatty():
        click.echo(harmless(data.decode(errors="backslashreplace"), keep="\n\t"), nl=False)
    else:
        click.echo(bytes(data), nl=False)


def _find_password(user: str, file: Path | None, from_stdin: bool, read_line: InputLines) -> str:
    if file is not None and from_stdin:
        raise click.UsageError("--password-file and --password-stdin exclude each other")
    if file is not None:
        return read_password_file(file)
    if from_stdin:
        return read_password_stdin(read_line)
    if (from_environment := read_password_variable("TRIOSSPI_PASSWORD")) is not None:
        return from_environment
    require_terminal("--password-file, --password-stdin or the environment's TRIOSSPI_PASSWORD")
    return prompt_password(f"Password for {user}")
