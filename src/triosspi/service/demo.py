"""An account made up for one run of the server, so that it can be tried without any set-up."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from ..security.ntlm.accounts import Account, AccountTable
from ..security.ntlm.primitives import nt_hash


@dataclass(frozen=True, slots=True)
class DemoAccount:
    """The account.

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
