r"""Rules: how an operator names clients, for `authorization` and for the account map.

A rule is one of

* ``alice@REALM`` or ``DOM\alice``: that principal;
* ``*@REALM``, ``DOM\*``: everybody of that realm or domain;
* ``S-1-5-21-...``: every client whose PAC has that SID, as the user's own or as a group's.

The first two may begin with ``kerberos:`` or ``ntlm:``, and are then about that mechanism alone.
"""

# What looks like a Kerberos principal need not be one: an NTLM account may be called "admin@REALM" (account files are
# made of all kinds of lists), and its owner may log in by NTLM under the very text by which an operator lets the
# realm's administrator in. So a rule means one thing where it gives something and another where it takes something:
#
# * To let in, or to say whose local account a client gets, it is read narrowly: what has the form of a Kerberos
#   principal is about Kerberos, unless it says ``ntlm:``.
# * To keep out it is read widely: whatever logs in under that name, by any mechanism and in any spelling.

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from .._errors import ConfigurationError
from .identity import PeerIdentity
from .names import simple_upper

_SID: Final = re.compile(r"S-1-\d+(-\d+)+", re.IGNORECASE)
_PREFIX: Final = re.compile(r"([A-Za-z]+):(.*)", re.DOTALL)
_MECHANISMS: Final = ("kerberos", "ntlm")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, understood.

    Attributes:
      who: a principal, a pattern, or a SID.
      mechanism: the one that it is about; None where it does not say.
    """

    who: str
    mechanism: str | None = None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read one.

        Raises:
          ConfigurationError: it means nothing.
        """
        who, mechanism = text, None
        if match := _PREFIX.fullmatch(text):
            mechanism, who = match[1].lower(), match[2]
            if mechanism not in _MECHANISMS:
                raise ConfigurationError(f"{text!r} is no rule: before the colon stands 'kerberos' or 'ntlm'")
        name = who.removeprefix("*@") if who.startswith("*@") else who.removesuffix("\\*")
        # With white space around it, it is a name that no client has: as a denial it would deny no one.
        if (
            not name
            or "*" in name
            or name != name.strip()
            or name.startswith(("@", "\\"))
            or name.endswith(("@", "\\"))
        ):
            raise ConfigurationError(
                f"{text!r} is no rule: write a principal, '*@REALM', 'DOM\\*' or a SID; '*' stands for a whole name"
            )
        if mechanism is not None and _SID.fullmatch(who):
            raise ConfigurationError(f"{text!r} is no rule: SIDs are Kerberos's, and stand alone")
        return cls(who, mechanism)

    @property
    def is_sid(self) -> bool:
        """Whether it is about a SID."""
        return _SID.fullmatch(self.who) is not None

    @property
    def is_pattern(self) -> bool:
        """Whether it is about all of a realm or domain."""
        return "*" in self.who

    def _is_about_a_sid_of(self, peer: PeerIdentity) -> bool:
        # Signed by the KDC, so there is one way to read it.
        return self.who.upper() in sids_of(peer)

    def gives(self, peer: PeerIdentity) -> bool:
        """Whether it means a peer, read narrowly: to let it in."""
        if self.is_sid:
            return self._is_about_a_sid_of(peer)
        if self.mechanism is not None and self.mechanism != peer.mechanism:
            return False
        if self.mechanism is None and peer.mechanism == "ntlm" and "@" in self.who and "\\" not in self.who:
            return False
        # To an MIT KDC "Alice" and "alice" are two people; to NTLM they are one, and to Active Directory, whose tickets
        # have a PAC.
        return _matches(self.who, _texts(peer), fold=peer.mechanism == "ntlm" or peer.pac is not None)

    def takes(self, peer: PeerIdentity) -> bool:
        """Whether it means a peer, read widely: to keep it out."""
        if self.is_sid:
            return self._is_about_a_sid_of(peer)
        if self.mechanism is not None and peer.mechanism in _MECHANISMS and self.mechanism != peer.mechanism:
            return False
        texts = _texts(peer)
        if "@" in peer.name:
            texts += _forms_of(peer.name)
        return _matches(self.who, texts, fold=True)


def sids_of(peer: PeerIdentity) -> frozenset[str]:
    """A peer's SIDs: its own and its groups'; none without a PAC."""
    return frozenset() if peer.pac is None else peer.pac.groups | {peer.pac.sid}


def check_sids(sids: frozenset[str]) -> None:
    """See that all are SIDs.

    Raises:
      ConfigurationError: one is none.
    """
    for sid in sids:
        if not _SID.fullmatch(sid):
            raise ConfigurationError(f"{sid!r} is no SID, such as S-1-5-21-1-2-3-513")


def _texts(peer: PeerIdentity) -> list[str]:
    """What rules about a peer look like."""
    texts = [peer.principal]
    if not peer.domain:
        return texts + (_forms_of(peer.principal)[1:] if "@" in peer.principal else [])
    # By the principal's form and not by the mechanism: Windows says DOM\alice of a Kerberos client, too.
    of_domain = peer.principal == f"{peer.domain}\\{peer.name}"
    return [*texts, f"{peer.domain}\\*" if of_domain else f"*@{peer.domain}"]


def _forms_of(name: str) -> list[str]:
    """A name that looks like a Kerberos principal, and the pattern that it looks like."""
    return [name, f"*@{name.rpartition('@')[2]}"]


def _matches(who: str, texts: list[str], *, fold: bool) -> bool:
    if fold:
        who, texts = simple_upper(who), list(map(simple_upper, texts))
    return who in texts
