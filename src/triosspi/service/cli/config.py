"""The options of ``triosspi serve``, made from the settings; ``triosspi check-config`` and ``config-example``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from click.core import ParameterSource

from ..._errors import ConfigurationError
from ...security.ntlm.accounts import AccountTable
from ..config.assembly import choose_app, make_acceptor, make_account_map, needs_demo_account
from ..config.configuration import CONFIG_VARIABLE, Configuration, ConfigurationErrors, Sources
from ..config.fitting import misfits
from ..config.options import Option, OptionError
from ..config.settings import SECTIONS, all_options
from ..config.system import descriptor_limit
from ..reasons import only_configuration_errors
from .common import log_to_stderr

log = logging.getLogger("triosspi.server")

F = TypeVar("F", bound=Callable[..., Any])

# Where the comments of `check-config` begin, if what stands before them is no longer.
_COLUMN: Final = 44


class _Value(click.ParamType):  # type: ignore[type-arg]  # click 8.1's takes none
    """What an option's value may be, as the file has it too."""

    def __init__(self, option: Option) -> None:
        self._option = option
        self.name = option.about.metavar or option.kind.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Understand it, or say what it must be."""
        try:
            return self._option.read_text(value)
        except OptionError as exc:
            flag = self._option.flag if isinstance(param, click.Option) else self._option.name.upper()
            raise click.UsageError(f"{flag} {exc.problem}", ctx) from None


class _Parameter(click.Option):
    """A flag, and the section that it belongs to in the help."""

    def __init__(self, option: Option) -> None:
        names = [option.name, option.flag]
        if boolean := option.kind.metavar == "BOOLEAN":
            names[1] += f"/{option.off_flag}"
        self.section = option.section
        choice = click.Choice(option.choices) if option.choices else None
        super().__init__(
            names,
            type=None if boolean else choice or _Value(option),
            is_flag=boolean or None,
            default=None,
            multiple=option.many,
            metavar=None if boolean or choice else option.about.metavar or option.kind.metavar,
            help=_help(option),
        )


def _help(option: Option) -> str:
    text = option.about.help
    if option.many:
        text = f"{text.removesuffix('.')}; may be repeated."
    shown = option.about.unset or option.show(option.default)
    if shown in (None, "[]", "false"):
        return text
    return f"{text} [default: {'on' if option.default is True else shown.strip(chr(34))}]"


class SettingsCommand(click.Command):
    """A command whose help has a part for each section of the settings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See click."""
        parts: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                parts.setdefault(getattr(parameter, "section", "options"), []).append(record)
        for part, records in parts.items():
            with formatter.section(part.capitalize()):
                formatter.write_dl(records)


def with_settings(function: F) -> F:
    """Give a command every option of the settings, and ``--config``."""
    options = all_options().values()
    decorators = [click.argument(o.name, required=False, type=_Value(o)) for o in options if o.about.argument]
    decorators.append(
        click.option(
            "--config",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help=f"Where options stand, too; see 'triosspi config-example'. [default: {CONFIG_VARIABLE}, or none]",
        )
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    # Behind the command's own: click shows them in this order.
    parameters = [_Parameter(option) for option in options if not option.about.argument]
    function.__click_params__ = [*reversed(parameters), *function.__click_params__]  # type: ignore[attr-defined]
    return function


def load_configuration(context: click.Context) -> Configuration:
    """What the command line, the environment and the file say.

    Raises:
      ConfigurationErrors: something in them is wrong.
    """
    path: Path | None = context.params["config"]
    if path is None and CONFIG_VARIABLE in os.environ:
        if not os.environ[CONFIG_VARIABLE]:
            raise ConfigurationErrors([f"{CONFIG_VARIABLE} is empty: leave it out, or name a file"])
        path = Path(os.environ[CONFIG_VARIABLE])
    flags = {
        name: context.params[name]
        for name in all_options()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    configuration = Sources(file=path, flags=flags).load()
    if not configuration.settings.impersonation.impersonate and flags.keys() & _FOR_IMPERSONATION:
        raise click.UsageError("--account-map, --auth-to-local and --min-uid go with --impersonate", context)
    return configuration


_FOR_IMPERSONATION: Final = {"account_map", "auth_to_local", "min_uid"}


def explained(configuration: Configuration, error: OptionError, context: click.Context) -> Exception:
    """An error of an option, told where that was given: a usage error, if on the command line."""
    text = configuration.explain(error)
    return click.UsageError(text, context) if configuration.given_by_flag(error.option) else ConfigurationError(text)


# check-config


@click.command("check-config", cls=SettingsCommand)
@with_settings
@click.pass_context
def check_config(context: click.Context, /, **_values: object) -> None:
    """Show the options that 'triosspi serve' would have, and where each comes from; say what is wrong with them.

    A flag wins over a TRIOSSPI_ variable (--idle-timeout: TRIOSSPI_IDLE_TIMEOUT; several values are
    separated by commas), a variable over the file, the file over the default. APP is imported, and the
    account file, the keytab and the account map are read, but nothing is bound or changed. What would not fit
    into the limits that this process has is a warning.
    """
    log_to_stderr()
    configuration = load_configuration(context)
    for line in describe(configuration):
        click.echo(line)
    settings = configuration.settings
    demo = AccountTable() if needs_demo_account(settings.accept) else None
    # Of the limits here: a service manager may set others.
    for misfit in misfits(settings, descriptor_limit(hard=True)):
        log.warning("%s", misfit)
    errors = []
    for check in (
        partial(choose_app, settings.start),
        partial(make_acceptor, settings.accept, demo),
        partial(make_account_map, settings.impersonation, settings.local_accounts),
    ):
        try:
            only_configuration_errors("what the configuration names", check)
        except OptionError as exc:
            errors.append(configuration.explain(exc))
        except ConfigurationError as exc:
            errors.append(str(exc))
    if errors:
        raise ConfigurationErrors(errors)


def describe(configuration: Configuration) -> Iterator[str]:
    """The effective options as TOML, each with where it came from."""
    for section in SECTIONS:
        yield f"[{section}]"
        for option in all_options().values():
            if option.section != section:
                continue
            value = configuration.settings.get(option)
            shown = option.show(value)
            where = configuration.origins[option.name].text
            if configuration.origins[option.name].kind == "default" and option.about.unset is not None:
                where += f": {option.about.unset}"
            left = f"# {option.name} is not set" if shown is None else f"{option.name} = {shown}"
            yield f"{left:{_COLUMN}}  # {where}"


@click.command("config-example")
def config_example() -> None:
    """Print a configuration file with every option, explained, and set to its default."""
    click.echo(example(), nl=False)


def example() -> str:
    """The text of example.toml."""
    return resources.files("triosspi.service.config").joinpath("example.toml").read_text(encoding="utf-8")
