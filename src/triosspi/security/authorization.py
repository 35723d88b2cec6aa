r"""Who of the authenticated may come in.

A rule is one of

* ``alice@REALM`` or ``DOM\alice``: that principal;
* ``*@REALM``, ``DOM\*``: everybody of that realm or domain;
* ``S-1-5-21-...``: whoever's PAC has that SID, as the user's own or as a group's.

``deny`` wins over ``allow``; without ``allow`` everybody is admitted who is not denied.

A client may decline the PAC when it asks for its ticket, and an NTLM login has none. So where a SID is
denied, whoever shows no PAC is refused: otherwise just those who are denied would show none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from .._errors import AuthenticationError, ConfigurationError, printable
from .identity import PeerIdentity
from .names import simple_upper

_SID: Final = re.compile(r"S-1-\d+(-\d+)+", re.IGNORECASE)


def _check_rules(rules: Iterable[str]) -> None:
    for rule in rules:
        if not rule or "*" in rule.removeprefix("*@").removesuffix("\\*"):
            raise ConfigurationError(
                f"{rule!r} is no rule: write a principal, '*@REALM', 'DOM\\*' or a SID; '*' stands for a whole name"
            )


@dataclass(frozen=True, slots=True)
class Authorization:
    """The rules of one acceptor.

    Attributes:
      allow: who may come in; None is everybody.
      deny: who may not, whatever `allow` says.
      require_groups: SIDs that a peer's PAC must all have.

    Raises:
      ConfigurationError: a rule that means nothing.
    """

    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()
    require_groups: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _check_rules(self.allow or ())
        _check_rules(self.deny)
        for sid in self.require_groups:
            if not _SID.fullmatch(sid):
                raise ConfigurationError(f"{sid!r} is no SID, such as S-1-5-21-1-2-3-513")

    def check(self, peer: PeerIdentity) -> None:
        """Admit an authenticated peer.

        Raises:
          AuthenticationError: it may not come in.
        """
        if self.allow is None and not self.deny and not self.require_groups:
            return
        who = printable(peer.principal)
        sids = frozenset[str]() if peer.pac is None else peer.pac.groups | {peer.pac.sid}
        missing = {sid.upper() for sid in self.require_groups} - sids
        if missing:
            why = "has no PAC" if peer.pac is None else f"is not in {', '.join(sorted(missing))}"
            raise AuthenticationError(f"{who} {why}")
        # A name denied is denied in any spelling. One that is allowed is so in any spelling only where
        # case does not make another account of it: with NTLM, and in Active Directory, whose tickets
        # have a PAC. To an MIT KDC "Alice" and "alice" are two people.
        folds = peer.mechanism == "ntlm" or peer.pac is not None
        if any(_matches(rule, peer, sids, fold=True) for rule in self.deny):
            raise AuthenticationError(f"{who} is denied")
        if peer.pac is None and any(map(_SID.fullmatch, self.deny)):
            raise AuthenticationError(f"{who} has no PAC that would show whether a denied SID is in it")
        if self.allow is not None and not any(_matches(rule, peer, sids, fold=folds) for rule in self.allow):
            raise AuthenticationError(f"{who} is not among those allowed")


def _matches(rule: str, peer: PeerIdentity, sids: frozenset[str], *, fold: bool) -> bool:
    if _SID.fullmatch(rule):
        return rule.upper() in sids
    patterns = [peer.principal]
    if peer.domain:
        patterns.append(f"*@{peer.domain}" if peer.mechanism == "kerberos" else f"{peer.domain}\\*")
    if fold:
        rule, patterns = simple_upper(rule), list(map(simple_upper, patterns))
    return rule in patterns
