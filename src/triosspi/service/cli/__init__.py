"""The command line: ``triosspi serve``, ``connect``, ``accounts``, ``check-config`` and ``config-example``."""

from __future__ import annotations

import importlib
import io
import sys
from collections import UserDict
from typing import Any, Final, NoReturn

try:
    import click
    import msgspec  # noqa: F401 - what imports it comes below
except ImportError as exc:  # pragma: no cover - needs an installation without the extra
    sys.exit(f"triosspi: the command line needs {exc.name}: pip install 'triosspi[server]'")

from ... import __version__
from ..._errors import SSPIError


class _Commands(UserDict[str, Any]):
    """Each command, of which the module and the name are given, imported when it is asked for."""

    def __getitem__(self, name: str) -> click.Command:
        module, attribute = self.data[name]
        command: click.Command = getattr(importlib.import_module(f".{module}", __name__), attribute)
        return command


# `accounts` need not wait for the imports of what serves.
_COMMANDS: Final = _Commands(
    {
        "accounts": ("accounts", "accounts"),
        "check-config": ("config", "check_config"),
        "config-example": ("config", "config_example"),
        "connect": ("connect", "connect"),
        "serve": ("serve", "serve"),
    }
)


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
    except SSPIError as exc:
        # Several things may be wrong with a configuration: a line each.
        _fail(*getattr(exc, "lines", (str(exc),)))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(*texts: str, status: int = 1) -> NoReturn:
    for text in texts:
        click.echo(f"triosspi: {' '.join(text.split())}", err=True)
    sys.exit(status)


@click.group(
    commands=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=False,
    invoke_without_command=True,
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
        from ...security.native import available  # noqa: PLC0415 - imports pyspnego

        for mechanism, native in available().items():
            click.echo(f"{mechanism}: sealed {'natively' if native else 'by pyspnego'}")
