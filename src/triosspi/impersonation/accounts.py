r"""Which local account a peer becomes.

The file is explicit, a line for each principal or for all of a realm or domain, and the first line that
matches decides::

    # principal or pattern     local account
    alice@EXAMPLE.COM          alice
    DOM\alice                  alice
    "DOM\Bob Smith"            bob
    DOM\guest                  -
    DOM\*                      *
    *@EXAMPLE.COM              visitor

A principal or pattern is a rule of `triosspi.security.rules`: ``alice@EXAMPLE.COM`` matches a client with a Kerberos ticket
for that name, and not an NTLM account that has the same spelling (that would be ``ntlm:alice@EXAMPLE.COM``). A line with
``-``, for no account, matches that name by either mechanism and in any spelling. ``*`` on the right stands for what
``*`` stands for on the left: the principal's name without its domain.

There is no way to a local account but through a line (or, where that was asked for, the ``auth_to_local``
rules of krb5.conf). Above all ``DOM\alice`` is never tried as ``alice``: an attacker who can make an account
in the domain would become any local user by choosing that user's name (CVE-2020-25717). For the same
reason only a line that names a principal can give it root or a system account, never a pattern: ``root``
may well be a name in a domain.
"""

from __future__ import annotations

import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .. import _texts
from .._errors import ConfigurationError, ImpersonationError, printable
from ..security.identity import PeerIdentity
from ..security.rules import Rule
from .auth_to_local import auth_to_local, check_auth_to_local

#: Where accounts of people begin: login.defs's UID_MIN nearly everywhere.
DEFAULT_MIN_UID: Final = 1000
#: Seconds that a looked-up account is kept; a change of the user or of their groups is noticed after that.
_MAX_AGE: Final = 60.0
#: Accounts that are kept. Only authenticated peers in the map are looked up, but there may be many of them.
_CACHE_SIZE: Final = 4096

# "alice@REALM  alice", '"DOM\Bob Smith"  bob', and a comment behind them.
_LINE: Final = re.compile(r'(?:"(?P<quoted>[^"]+)"|(?P<plain>[^\s"]+))\s+(?P<account>[^\s"#]+)(?:\s+#.*)?')
_NOBODY: Final = "-"
# What a peer's own name may be to be looked up as a local one: not "..", no path, no realm, no option, no list.
_NAME: Final = re.compile(r"\w[\w.-]*\$?")


@dataclass(frozen=True, slots=True)
class LocalAccount:
    """The account that a thread switches to: all that the kernel must be told, looked up beforehand.

    Attributes:
      name: the local account's name.
      uid: its user id.
      gid: its primary group's id.
      groups: the ids of all its groups, the primary one included.
    """

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]

    @classmethod
    def lookup(cls, name: str) -> LocalAccount:
        """Ask the system (NSS), which may ask a directory server: it may block.

        Raises:
          ImpersonationError: there is no such account, or nobody could tell.
        """
        import pwd  # noqa: PLC0415 - not on Windows, where this module is imported all the same

        try:
            entry = pwd.getpwnam(name)
            # All of it is looked up now: during the switch a look-up would run with other credentials, and may differ.
            groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
        except (KeyError, ValueError):
            raise ImpersonationError(f"there is no local account {printable(name)}") from None
        except OSError as exc:
            raise ImpersonationError(f"the local account {printable(name)} was not found: {exc.strerror}") from None
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid, tuple(sorted(set(groups))))


@dataclass(frozen=True, slots=True)
class _Line:
    """One line: whom it is about, and what becomes of them.

    Attributes:
      rule: whom.
      account: a local account, `_NOBODY`, or ``*`` for the peer's own name.
      where: file and line.
    """

    rule: Rule
    account: str
    where: str

    @property
    def named(self) -> bool:
        """Whether it is about one principal."""
        return not self.rule.is_pattern

    def decides(self, peer: PeerIdentity) -> bool:
        """Whether it is about a peer."""
        return self.rule.takes(peer) if self.account == _NOBODY else self.rule.gives(peer)


def _parse_line(line: str, where: str) -> _Line | None:
    text = line.strip()
    if not text or text.startswith("#"):
        return None
    match = _LINE.fullmatch(text)
    if match is None:
        raise ConfigurationError(
            f"{where}: write a principal or pattern, then a local account, such as 'DOM\\bob  bob'"
        )
    who, account = match["quoted"] or match["plain"], match["account"]
    try:
        rule = Rule.parse(who)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{where}: {exc}") from None
    if rule.is_sid:
        raise ConfigurationError(f"{where}: a SID; accounts are mapped by the principal's name")
    if "*" in account and (account != "*" or not rule.is_pattern):
        raise ConfigurationError(f"{where}: '*' as local account is for a pattern's own '*', and stands alone")
    return _Line(rule, account, where)


class AccountMap:
    r"""A file of principals and local accounts, see the head of this module; read once.

    May be used by several threads at once.

    Args:
      path: the file; None where ``auth_to_local`` is all there is.
      auth_to_local: ask the Kerberos library about Kerberos principals that no line is about: the rules
          ``auth_to_local`` of krb5.conf, and its plug-ins, such as SSSD's. Without rules that makes
          ``alice`` of ``alice@REALM`` where REALM is the machine's own.
      min_uid: smaller uids are for lines that name a principal alone; uid 0 is so in any case.

    Raises:
      ConfigurationError: a line means nothing or names an account that does not exist; others may write
          the file; or the Kerberos library is not there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        auth_to_local: bool = False,
        min_uid: int = DEFAULT_MIN_UID,
    ) -> None:
        if path is None and not auth_to_local:
            raise ConfigurationError("nobody could be impersonated: give an account map, auth_to_local or both")
        if min_uid < 0:
            raise ConfigurationError(f"min_uid is {min_uid}, and must not be less than 0")
        if auth_to_local:
            check_auth_to_local()
        self._auth_to_local = auth_to_local
        self.min_uid = min_uid
        self._lines = [] if path is None else _read(Path(path))
        self._cache: dict[tuple[str, str, bool], tuple[LocalAccount, float]] = {}
        #: The accounts that lines name, each once.
        self.named: list[LocalAccount] = self._look_up_named()

    def _look_up_named(self) -> list[LocalAccount]:
        found: dict[str, LocalAccount] = {}
        for line in self._lines:
            if line.account in ("*", _NOBODY):
                continue
            try:
                account = found[line.account] = LocalAccount.lookup(line.account)
                self._check_floor(account, named=line.named)
            except ImpersonationError as exc:
                raise ConfigurationError(f"{line.where}: {exc}") from None
        return list(found.values())

    def _check_floor(self, account: LocalAccount, *, named: bool) -> None:
        if not named and (account.uid < self.min_uid or account.uid == 0):
            raise ImpersonationError(
                f"the local account {printable(account.name)} has the uid {account.uid}, "
                f"and uids below {max(self.min_uid, 1)} are only for principals that a line names"
            )

    def cached(self, peer: PeerIdentity) -> LocalAccount | None:
        """What `lookup` has found within the last minute."""
        account, until = self._cache.get(_key(peer), (None, 0.0))
        return account if time.monotonic() < until else None

    def lookup(self, peer: PeerIdentity) -> LocalAccount:
        """Find a peer's account. May block.

        Raises:
          ImpersonationError: it has none, or none that it may have.
        """
        name, named = self._local_name(peer)
        account = LocalAccount.lookup(name)
        self._check_floor(account, named=named)
        if len(self._cache) >= _CACHE_SIZE:
            self._cache.clear()
        self._cache[_key(peer)] = (account, time.monotonic() + _MAX_AGE)
        return account

    def _local_name(self, peer: PeerIdentity) -> tuple[str, bool]:
        who = printable(peer.principal)
        for line in self._lines:
            if line.decides(peer):
                if line.account == _NOBODY:
                    raise ImpersonationError(f"{who} is nobody here ({line.where})")
                if line.account != "*":
                    return line.account, line.named
                if not _NAME.fullmatch(peer.name):
                    raise ImpersonationError(f"{who} has no name that a local account could have ({line.where})")
                return peer.name, False
        if self._auth_to_local and peer.mechanism == "kerberos":
            name = auth_to_local(peer.principal)
            if name is not None:
                return name, False
        raise ImpersonationError(f"{who} has no local account")


def _key(peer: PeerIdentity) -> tuple[str, str, bool]:
    # All that the rules look at; name and domain follow from these.
    return peer.principal, peer.mechanism, peer.pac is not None


def _read(path: Path) -> list[_Line]:
    content = _texts.read(path, "the account map", _texts.SMALL)
    status = content.status
    # Write access to the map is access to every account in it. Windows has neither these bits nor this file.
    if os.name == "posix" and (
        status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or status.st_uid not in (0, os.geteuid())
    ):
        raise ConfigurationError(f"{path}: others than root and this server may write it: chmod 644, chown root")
    text = _texts.decode_lines(content.data, f"the account map {path}")
    # One bad line refuses the whole map: it may have been the one that denies an account.
    lines = [_parse_line(line, f"{path}:{number}") for number, line in _texts.lines(text)]
    found = [line for line in lines if line is not None]
    if not found:
        raise ConfigurationError(f"{path}: no line maps anybody")
    return found
