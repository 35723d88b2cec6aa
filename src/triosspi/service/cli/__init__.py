"""The command line: ``triosspi serve``, ``connect``, ``accounts``, ``check-config`` and ``config-example``."""

from __future__ import annotations

import io
import sys
from typing import NoReturn

try:
    import click
    import msgspec  # noqa: F401 - what imports it comes below
except ImportError as exc:  # pragma: no cover - needs an installation without the extra
    sys.exit(f"triosspi: the command line needs {exc.name}: pip install 'triosspi[server]'")

from ... import __version__
from ..._errors import SSPIError
from ...security.native import available as sealing_is_native
from ..client import ConnectError
from ..config.configuration import ConfigurationErrors
from . import accounts, config, connect, serve


def main() -> NoReturn:
    """Run the command line. Every failure is a line on standard error, never a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What others have sent or written may not be in the terminal's alphabet.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = cli(standalone_mode=False)
    except click.UsageError as exc:
        command = exc.ctx.command_path if exc.ctx is not None else "triosspi"
        _fail(f"{exc.format_message()} (see '{command} --help')", status=2)
    except click.ClickException as exc:
        _fail(exc.format_message())
    except click.Abort:
        _fail("aborted")
    except ConfigurationErrors as exc:
        _fail(*exc.lines)
    except (SSPIError, ConnectError) as exc:
        _fail(str(exc))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(*texts: str, status: int = 1) -> NoReturn:
    for text in texts:
        click.echo(f"triosspi: {' '.join(text.split())}", err=True)
    sys.exit(status)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False, invoke_without_command=True
)
@click.option("--version", is_flag=True, help="Show the version and exit.")
@click.option("-v", "--verbose", is_flag=True, help="With --version: how messages are sealed, too.")
@click.pass_context
def cli(context: click.Context, version: bool, verbose: bool) -> None:
    """Windows-authenticated TCP: SSPI Negotiate, then sealed messages."""
    if version:
        _show_version(verbose)
        context.exit()
    if context.invoked_subcommand is None:
        raise click.UsageError("Missing command.", context)
    if verbose:
        raise click.UsageError("-v goes with --version, or behind the command", context)


def _show_version(verbose: bool) -> None:
    click.echo(f"triosspi, version {__version__}")
    if verbose:
        for mechanism, native in sealing_is_native().items():
            click.echo(f"{mechanism}: sealed {'natively' if native else 'by pyspnego'}")


cli.add_command(serve.serve)
cli.add_command(connect.connect)
cli.add_command(accounts.accounts)
cli.add_command(config.check_config)
cli.add_command(config.config_example)
