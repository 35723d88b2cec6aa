"""What a server is put together of, made from `Settings`; most of it again at each reload."""

from __future__ import annotations

import os
import secrets
import sys
from dataclasses import dataclass, field

from ...impersonation import AccountMap, Impersonation
from ...security.credentials import Acceptor, Mechanism
from ...security.ntlm.accounts import Account, AccountFile, AccountSource, AccountTable
from ...security.ntlm.primitives import nt_hash
from ...security.sealers import NTLM_TRAILER_SIZE
from ...tcp import AnyHandler
from ...wire import SAMPLE_RECORD_SIZE, WireFormat
from ..apps import SAMPLE_MESSAGE, Greet, echo, load_app
from .options import OptionError
from .settings import Accept, Impersonate, LocalAccounts, Serve, StartSettings

_WINDOWS = sys.platform == "win32"


@dataclass(frozen=True, slots=True)
class DemoAccount:
    """An account made up for one run of the server, so that it can be tried without any set-up.

    Attributes:
      principal: who.
      password: shown to whoever has started the server, and to nobody else.
    """

    principal: str
    password: str = field(repr=False)

    @classmethod
    def make(cls) -> DemoAccount:
        """One with a random password of 96 bits."""
        return cls("DEMO\\guest", secrets.token_urlsafe(12))

    def table(self) -> AccountTable:
        """It alone, as an account source."""
        domain, _, name = self.principal.partition("\\")
        table = AccountTable()
        table.add(Account(domain, name, nt_hash(self.password)))
        return table


def needs_demo_account(accept: Accept) -> bool:
    """Whether nobody else could log in."""
    if _WINDOWS or accept.accounts is not None:
        return False
    # A keytab is of no use to NTLM.
    return accept.mechanisms == "ntlm" or (accept.mechanisms == "negotiate" and accept.keytab is None)


def make_acceptor(accept: Accept, demo: AccountSource | None = None) -> Acceptor:
    """What clients authenticate with. Reads the account file and the keytab.

    Args:
      accept: the settings.
      demo: who may log in by NTLM where the settings name nobody, see `needs_demo_account`.

    Raises:
      ConfigurationError: it cannot work; a file that cannot be read, a rule that means nothing.
    """
    source = demo if accept.accounts is None else AccountFile(accept.accounts)
    mechanisms: tuple[Mechanism, ...] | None = None if accept.mechanisms == "negotiate" else (accept.mechanisms,)
    if not _WINDOWS and accept.mechanisms == "kerberos":
        # On Windows a given source must reach the acceptor, which says that there are no account files.
        source = None
    return Acceptor(
        accounts=source,
        # Likewise; elsewhere NTLM alone is not to fail for a keytab that it never looks at.
        keytab=accept.keytab if _WINDOWS or accept.mechanisms != "ntlm" else None,
        mechanisms=mechanisms,
        spns=accept.spns,
        allow_rc4=accept.allow_rc4,
        allow=accept.allow,
        deny=accept.deny,
        require_groups=accept.require_groups,
        require_mic=not accept.allow_missing_mic,
        target_names=accept.target_names,
        require_target=accept.require_target,
    )


def make_account_map(impersonate: Impersonate, accounts: LocalAccounts) -> AccountMap | None:
    """Which principals are impersonated as which local accounts; None where impersonation is off. Reads the file.

    Raises:
      ConfigurationError: see `AccountMap`.
    """
    if not impersonate.impersonate or _WINDOWS:
        return None
    if accounts.account_map is None and not accounts.auth_to_local:
        names = ("account_map", "auth_to_local")
        raise OptionError("impersonate", "needs account_map, auth_to_local or both", mentions=names)
    return AccountMap(accounts.account_map, auth_to_local=accounts.auth_to_local, min_uid=accounts.min_uid)


def make_impersonation(impersonate: Impersonate, accounts: LocalAccounts) -> Impersonation | None:
    """What the application impersonates clients with, if it does. Needs the privileges that it will use.

    Raises:
      ConfigurationError: see `Impersonation`.
    """
    return Impersonation(make_account_map(impersonate, accounts)) if impersonate.impersonate else None


def app_name(serve: Serve) -> str:
    """What is served: ``greet``, ``echo`` or ``module:function``."""
    return serve.app or ("greet" if message_wire(serve) == WireFormat.SAMPLE.value else "echo")


def message_wire(serve: Serve) -> str:
    """The wire format of what a server that does not know better would speak: with ``auto``, of its messages."""
    return serve.auto_wire if serve.wire == "auto" else serve.wire


def choose_app(settings: StartSettings) -> AnyHandler:
    """The application. One that is not built in is imported.

    Raises:
      ConfigurationError: there is no such thing, or it has no use for what it is given.
    """
    serve, name = settings.serve, app_name(settings.serve)
    sample = message_wire(serve) == WireFormat.SAMPLE.value
    if serve.message is not None and name != "greet":
        raise OptionError("message", "is for the application 'greet'")
    if settings.impersonation.impersonate and name == "echo":
        raise OptionError("impersonate", "is for 'greet' and for applications of your own: echo has no use for it")
    if name != "greet":
        return echo if name == "echo" else load_app(name)
    # The bytes of the command line, whether they are text or not.
    message = SAMPLE_MESSAGE if serve.message is None else os.fsencode(serve.message)
    # Kerberos's trailers are longer: there the limit shows only when a client comes.
    limit = SAMPLE_RECORD_SIZE - 4 - NTLM_TRAILER_SIZE
    if sample and len(message) > limit:
        raise OptionError("message", f"has {len(message)} bytes, and the sample's client reads {limit} at most")
    return Greet(message, impersonate=settings.impersonation.impersonate, listen=not sample)
