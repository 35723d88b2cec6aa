"""Which authenticated clients may come in, by `rules`.

``deny`` wins over ``allow``; without ``allow`` every client is admitted that is not denied. A rule in the form of a
Kerberos principal lets in by Kerberos alone, and keeps out by any mechanism.

A client may decline the PAC when it asks for its ticket, and an NTLM login has none. So where a SID is
denied, a client without a PAC is refused: otherwise those who are denied would just not show theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .._errors import AuthenticationError, printable
from .identity import PeerIdentity
from .rules import Rule, check_sids, sids_of


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
    _allowed: tuple[Rule, ...] = field(init=False, repr=False, compare=False, default=())
    _denied: tuple[Rule, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "_allowed", tuple(map(Rule.parse, self.allow or ())))
        object.__setattr__(self, "_denied", tuple(map(Rule.parse, self.deny)))
        check_sids(self.require_groups)

    def check(self, peer: PeerIdentity) -> None:
        """Admit an authenticated peer.

        Raises:
          AuthenticationError: it may not come in.
        """
        if self.allow is None and not self.deny and not self.require_groups:
            return
        who = printable(peer.principal)
        missing = {sid.upper() for sid in self.require_groups} - sids_of(peer)
        if missing:
            why = "has no PAC" if peer.pac is None else f"is not in {', '.join(sorted(missing))}"
            raise AuthenticationError(f"{who} {why}")
        if any(rule.takes(peer) for rule in self._denied):
            raise AuthenticationError(f"{who} is denied")
        if peer.pac is None and any(rule.is_sid for rule in self._denied):
            raise AuthenticationError(f"{who} has no PAC that would show whether a denied SID is in it")
        if self.allow is not None and not any(rule.gives(peer) for rule in self._allowed):
            raise AuthenticationError(f"{who} is not among those allowed")
