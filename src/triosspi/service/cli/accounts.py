"""``triosspi accounts``."""

from __future__ import annotations

from pathlib import Path

import click

from ..._errors import ConfigurationError
from ...security.ntlm.accounts import AccountFile
from .. import account_editor
from .common import log_to_stderr
from .passwords import InputLines, prompt_password, read_clear, read_password_stdin, require_terminal


@click.group(no_args_is_help=False)
def accounts() -> None:
    """Manage an NTLM account file."""


_FILE = click.argument("file", type=click.Path(path_type=Path))
_PRINCIPAL = click.argument("principal", metavar=r"'DOM\user'")


@accounts.command("add")
@_FILE
@_PRINCIPAL
@click.option("--password-stdin", is_flag=True, help="Standard input's first line is the password.")
def accounts_add(file: Path, principal: str, password_stdin: bool) -> None:
    r"""Add an account to FILE, or change its password.

    'DOM\user' answers for that domain only, 'user' for every domain that has no account of its own for
    that user. FILE is made, readable by its owner alone, where there is none.
    """
    account_editor.check_principal(principal)
    if password_stdin:
        password = read_password_stdin(InputLines())
    else:
        # Not the environment's, which is somebody's who logs in.
        require_terminal("--password-stdin")
        password = prompt_password(f"Password for {principal}", twice=True)
    new = account_editor.add(file, principal, password)
    click.echo(f"{'added' if new else 'changed'} {principal}", err=True)


@accounts.command("remove")
@_FILE
@_PRINCIPAL
def accounts_remove(file: Path, principal: str) -> None:
    """Remove an account from FILE."""
    account_editor.remove(file, principal)
    click.echo(f"removed {principal}", err=True)


@accounts.command("disable")
@_FILE
@_PRINCIPAL
def accounts_disable(file: Path, principal: str) -> None:
    """Refuse an account's logins, keeping its password."""
    account_editor.set_enabled(file, principal, enabled=False)
    click.echo(f"disabled {principal}", err=True)


@accounts.command("enable")
@_FILE
@_PRINCIPAL
def accounts_enable(file: Path, principal: str) -> None:
    """Accept a disabled account's logins again."""
    account_editor.set_enabled(file, principal, enabled=True)
    click.echo(f"enabled {principal}", err=True)


@accounts.command("list")
@_FILE
def accounts_list(file: Path) -> None:
    """List FILE's accounts, one a line, never a hash."""
    log_to_stderr()
    for account in AccountFile(file):
        click.echo(account.principal if account.enabled else f"{account.principal} (disabled)")


@accounts.command("import")
@_FILE
@click.argument("clear", type=click.Path(path_type=Path, allow_dash=True), required=False)
def accounts_import(file: Path, clear: Path | None) -> None:
    """Add to FILE the accounts of CLEAR, which has DOMAIN:USER:PASSWORD lines; '-' is standard input.

    Without CLEAR, the passwords that stand in clear in FILE itself are replaced by their hashes.
    """
    if clear is None:
        click.echo(f"replaced {account_editor.hash_clear(file)} clear passwords", err=True)
        return
    name, source = read_clear(clear)
    taken, refused = account_editor.import_clear(file, source)
    for text in refused:
        click.echo(f"{name}: {text}", err=True)
    click.echo(f"imported {taken} accounts", err=True)
    if refused:
        raise ConfigurationError(f"{len(refused)} lines of {name} were not imported")
