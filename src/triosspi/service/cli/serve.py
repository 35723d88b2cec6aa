"""``triosspi serve``."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio

from ..._tcp import Handler, TCPListener, format_address
from ..._wire import SAMPLE_RECORD_SIZE, WireFormat
from ...security.accounts import AccountFile, AccountSource
from ...security.credentials import Acceptor
from ...security.sealers import NTLM_TRAILER_SIZE
from ...security.spnego_compat import allow_token_logging
from ..apps import SAMPLE_MESSAGE, Greet, echo, load_app
from ..server import DemoAccount, ServeOptions, bound_address, run_server
from .common import DEFAULT_PORT, MECHANISMS, WIRES, log_to_stderr, message_bytes

log = logging.getLogger("triosspi.server")

_REQUIRE_TARGET = click.Choice(["off", "allow", "require"])


@click.command()
@click.argument("app", required=False)
@click.option("--host", "hosts", multiple=True, help="Address to bind; may be repeated. [default: all, IPv4 and IPv6]")
@click.option("--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, help="0: any free one.")
@click.option("--wire", type=WIRES, default=WireFormat.SAMPLE.value, show_default=True, help="The wire format.")
@click.option("--accounts", type=click.Path(path_type=Path), help="Who may log in by NTLM; see 'triosspi accounts'.")
@click.option("--keytab", help="The service's Kerberos keys. [default: KRB5_KTNAME]")
@click.option("--spn", "spns", multiple=True, metavar="host/server", help="Refuse tickets for other names.")
@click.option("--allow-rc4", is_flag=True, help="Admit Kerberos session keys of RC4-HMAC.")
@click.option("--mechanisms", type=MECHANISMS, default="negotiate", show_default=True, help="What clients may use.")
@click.option("--allow-missing-mic", is_flag=True, help="Admit NTLM clients without a MIC (gss-ntlmssp alone).")
@click.option("--target-name", "target_names", multiple=True, metavar="SPN", help="A name of this service.")
@click.option("--require-target", type=_REQUIRE_TARGET, default="off", show_default=True, help="See below.")
@click.option("--allow", multiple=True, metavar="WHO", help="Who may come in; see below. [default: all who log in]")
@click.option("--deny", multiple=True, metavar="WHO", help="Who may not; wins over --allow.")
@click.option("--require-group", "groups", multiple=True, metavar="SID", help="What a client's PAC must have.")
@click.option("--message", help="What greet sends. [default: the sample's message]")
@click.option("--once", is_flag=True, help="End after the first connection.")
@click.option("-v", "--verbose", is_flag=True, help="Print the sample server's own transcript.")
@click.option("--dump-tokens", is_flag=True, help="With the bytes in it (implies -v). They are secret!")
def serve(
    *,
    app: str | None,
    hosts: tuple[str, ...],
    port: int,
    wire: str,
    accounts: Path | None,
    keytab: str | None,
    spns: tuple[str, ...],
    allow_rc4: bool,
    mechanisms: str,
    allow_missing_mic: bool,
    target_names: tuple[str, ...],
    require_target: Any,
    allow: tuple[str, ...],
    deny: tuple[str, ...],
    groups: tuple[str, ...],
    message: str | None,
    once: bool,
    verbose: bool,
    dump_tokens: bool,
) -> int:
    r"""Serve APP to authenticated clients until Ctrl-C or SIGTERM.

    APP is 'greet' (sends one message and closes; the default with --wire sample), 'echo' (sends
    every message back; the default with --wire framed), or 'module:function', an async function that
    takes the channel.

    --accounts admits NTLM, --keytab (or a keytab that KRB5_KTNAME names) Kerberos; with neither, there is
    one demo account, made up for this run.

    --require-target guards against NTLM logins relayed from another service: 'allow' refuses a client
    that names another service than a --target-name, 'require' also one that names none.

    WHO is a principal ('alice@REALM', 'DOM\alice'), everybody of a realm or domain ('*@REALM', 'DOM\*'),
    or a SID of a user or group in Active Directory.
    """
    log_to_stderr()
    if dump_tokens:
        allow_token_logging()
        click.echo("triosspi: --dump-tokens: whoever reads this output can try passwords against it", err=True)
    keytab = keytab or os.environ.get("KRB5_KTNAME")
    demo = None
    source: AccountSource | None = None
    if accounts is not None:
        source = AccountFile(accounts)
    elif sys.platform != "win32" and (mechanisms == "ntlm" or (mechanisms == "negotiate" and not keytab)):
        demo = DemoAccount.make()
        source = demo.table()
    options = ServeOptions(
        handler=_choose_app(app, wire, message),
        acceptor=_make_acceptor(
            source,
            keytab,
            mechanisms,
            spns=spns,
            allow_rc4=allow_rc4,
            allow=allow or None,
            deny=deny,
            require_groups=groups,
            require_mic=not allow_missing_mic,
            target_names=target_names,
            require_target=require_target,
        ),
        wire=WireFormat(wire),
        hosts=hosts,
        port=port,
        once=once,
        verbose=verbose or dump_tokens,
        dump_tokens=dump_tokens,
        write=_write,
    )
    name = app or ("greet" if wire == WireFormat.SAMPLE.value else "echo")
    served = trio.run(run_server, options, partial(_print_started, name, wire, demo))
    return 0 if served else 1


def _make_acceptor(source: AccountSource | None, keytab: str | None, mechanisms: str, **policy: Any) -> Acceptor:
    if sys.platform == "win32":  # pragma: no cover - not reachable elsewhere
        # Which says that there are no account files here, where one was given.
        return Acceptor(accounts=source, mechanisms=None if mechanisms == "negotiate" else (mechanisms,), **policy)
    if mechanisms == "negotiate":
        return Acceptor(accounts=source, keytab=keytab, **policy)
    if mechanisms == "ntlm":
        return Acceptor(accounts=source, mechanisms=("ntlm",), **policy)
    return Acceptor(keytab=keytab, mechanisms=("kerberos",), **policy)


def _choose_app(app: str | None, wire: str, message: str | None) -> Handler:
    if app is None:
        app = "greet" if wire == WireFormat.SAMPLE.value else "echo"
    if message is not None and app != "greet":
        raise click.UsageError("--message is for the application 'greet'")
    if app == "greet":
        text = SAMPLE_MESSAGE if message is None else message_bytes(message)
        # Kerberos's trailers are longer: there the limit shows only when a client comes.
        limit = SAMPLE_RECORD_SIZE - 4 - NTLM_TRAILER_SIZE
        if wire == WireFormat.SAMPLE.value and len(text) > limit:
            raise click.UsageError(f"--message has {len(text)} bytes, and the sample's client reads {limit} at most")
        return Greet(text)
    return echo if app == "echo" else load_app(app)


def _write(text: str) -> None:
    """Print for a server, which goes on when nobody reads that any more."""
    try:
        click.echo(text)
    except BrokenPipeError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        log.warning("standard output was closed: serving goes on without it")


def _print_started(name: str, wire: str, demo: DemoAccount | None, listeners: list[TCPListener]) -> None:
    addresses = [bound_address(listener) for listener in listeners]
    where = " and ".join(format_address(*address) for address in addresses)
    _write(f"triosspi: serving {name} (wire format: {wire}) on {where}")
    if demo is not None:
        host, port = addresses[0]
        host = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)  # noqa: S104 - compared, not bound
        _write(f"triosspi: demo account {demo.principal}, password {demo.password}; in another terminal:")
        options = ["--wire", wire, "--mechanism", "ntlm", "--user", demo.principal]
        command = shlex.join([*_this_program(), "connect", format_address(host, port), *options])
        _write(f"  TRIOSSPI_PASSWORD={shlex.quote(demo.password)} {command}")


def _this_program() -> list[str]:
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return [sys.executable, "-m", "triosspi"]
    return [str(program)]
