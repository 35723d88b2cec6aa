"""``triosspi serve``."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from functools import partial
from pathlib import Path

import click
import trio

from ...security.pyspnego_compat import allow_token_logging
from ..config.assembly import DemoAccount, app_name, choose_app, message_wire, needs_demo_account
from ..config.options import OptionError
from ..config.settings import Serve
from ..config.system import descriptor_limit, raise_descriptor_limit
from ..network.listening import where
from ..program import Program
from ..transcript import Transcript
from .common import log_to_stderr
from .config import SettingsCommand, explained, load_configuration, with_settings

log = logging.getLogger("triosspi.server")


@click.command(cls=SettingsCommand)
@with_settings
@click.option("--once", is_flag=True, help="End after the first connection.")
@click.option("-v", "--verbose", is_flag=True, help="Print the sample server's own transcript.")
@click.option("--dump-tokens", is_flag=True, help="With the bytes in it (implies -v). They are secret!")
@click.pass_context
def serve(context: click.Context, /, *, once: bool, verbose: bool, dump_tokens: bool, **_values: object) -> int:
    r"""Serve APP to authenticated clients until Ctrl-C or SIGTERM.

    APP is 'greet' (sends one message and closes; the default with --wire sample), 'echo' (sends
    everything back; the default otherwise), or 'module:function', an async function that takes the
    channel: an SSPIChannel, or of a NegotiateStream an SSPIStream.

    Options may stand in the file of --config, too, and in variables: see 'triosspi check-config --help'.

    --accounts admits NTLM, --keytab (or a keytab that KRB5_KTNAME names) Kerberos; with neither, there is
    one demo account, made up for this run.

    --require-target guards against NTLM logins relayed from another service: 'allow' refuses a client
    that names another service than a --target-name, 'require' also one that names none.

    WHO is a principal ('alice@REALM', 'DOM\alice'), everybody of a realm or domain ('*@REALM', 'DOM\*'),
    or a SID of a user or group in Active Directory.

    --impersonate needs root, or the capabilities CAP_SETUID and CAP_SETGID, and an --account-map with
    lines such as 'DOM\alice  alice' (or --auth-to-local); the first line that matches decides.
    """
    configuration = load_configuration(context)
    settings = configuration.settings
    log_to_stderr(settings.log.log_level, settings.log.log_format)
    if dump_tokens:
        allow_token_logging()
        click.echo("triosspi: --dump-tokens: whoever reads this output can try passwords against it", err=True)
    several = settings.workers.workers > 1
    if several and (once or verbose or dump_tokens):
        raise click.UsageError("--once, --verbose and --dump-tokens are for one process: add --workers 1", context)
    demo = DemoAccount.make() if needs_demo_account(settings.accept) else None
    raise_descriptor_limit()
    program = Program(start=settings.start, sources=configuration.sources, demo=demo, descriptors=descriptor_limit())
    try:
        # Whatever is wrong with it is to be told now, and where it was given; a worker could only die of it.
        choose_app(settings.start)
        loaded = program.make(configuration)
    except OptionError as exc:
        raise explained(configuration, exc, context) from None
    program.tell_misfits(settings)
    started = partial(_print_started, settings.serve, demo, transcript=verbose or dump_tokens)
    if several:
        trio.run(program.supervise, configuration, started)
        return 0
    make_tracer = partial(Transcript, _write, dump_tokens=dump_tokens) if verbose or dump_tokens else None
    served = trio.run(partial(program.serve, loaded, started, once=once, make_tracer=make_tracer))
    return 0 if served else 1


def _write(text: str) -> None:
    """Print for a server, which goes on when nobody reads that any more."""
    try:
        click.echo(text)
    except BrokenPipeError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        log.warning("standard output was closed: serving goes on without it")


def _print_started(
    serve: Serve, demo: DemoAccount | None, listeners: list[trio.SocketListener], *, transcript: bool
) -> None:
    if transcript:
        _write("Waiting for client to connect...\nListening ! ")
    name, wire = app_name(serve), serve.wire
    places = [where(listener) for listener in listeners]
    _write(f"triosspi: serving {name} (wire format: {wire}) on {' and '.join(dict.fromkeys(places))}")
    if demo is not None:
        _write(f"triosspi: demo account {demo.principal}, password {demo.password}; in another terminal:")
        place = places[0].replace("0.0.0.0:", "localhost:").replace("[::]:", "localhost:")
        options = ["--wire", message_wire(serve), "--mechanism", "ntlm", "--user", demo.principal]
        command = shlex.join([*_this_program(), "connect", place, *options])
        _write(f"  TRIOSSPI_PASSWORD={shlex.quote(demo.password)} {command}")


def _this_program() -> list[str]:
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return [sys.executable, "-m", "triosspi"]
    return [str(program)]
