r"""The NTLM account file, indexed.

NTLM's acceptor must know each account's NT hash (MD4 of the UTF-16 password): on Linux that is a file.
Its lines are those of Samba's smbpasswd(5), which pyspnego and gss-ntlmssp read too::

    DOM\alice:65534:00000000000000000000000000000000:8846F7EAEE8FB117AD06BDD830B7586C:[U          ]:LCT-65000000

and, still read but warned about, clear ones: ``DOM:alice:password``. The LM field is never used.

An NT hash is as good as the password to whoever has it, so a file of hashes is as secret as one of
passwords: 0600, and nothing here ever shows one.
"""

from __future__ import annotations

import binascii
import hashlib
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from ... import _texts
from ..._errors import ConfigurationError, handles_secrets, printable
from ..names import simple_upper
from .primitives import nt_hash

log = logging.getLogger("triosspi.accounts")

_NT_HASH_SIZE: Final = 16
_CLEAR_FIELDS: Final = 3
_SMBPASSWD_FIELDS: Final = 6
# Seconds after which the file is read whatever its date says.
_LOOK_INTERVAL: Final = 60.0
# Seconds between two attempts while the system will not give it: too many open files, a disk's error, no such file.
_RETRY_INTERVAL: Final = 1.0
# Bad lines that one error tells of.
_MOST_TOLD: Final = 20

# What is unpacked where there is no account; its name is of the common length.
_NOBODY: Final = bytes(_NT_HASH_SIZE + 1) + b"NOWHERE\\nobody"

# A character of these in a name could end a field of the file, or make "DOM\user" ambiguous.
_FORBIDDEN: Final = frozenset("\\:\0\r\n")


@dataclass(frozen=True, slots=True)
class Account:
    r"""One account that may log in by NTLM.

    Attributes:
      domain: as spelled in the file; empty when the account answers for any domain.
      name: as spelled in the file; may be ``user@realm``.
      nt_hash: MD4 of the UTF-16LE password, 16 bytes ([MS-NLMP] 3.3.1 NTOWFv1).
      enabled: False refuses every login.
    """

    domain: str
    name: str
    nt_hash: bytes = field(repr=False)
    enabled: bool = True

    @property
    def principal(self) -> str:
        r"""``DOM\name``, or the bare name of an account without a domain."""
        return f"{self.domain}\\{self.name}" if self.domain else self.name


class AccountSource(Protocol):
    """Where an acceptor finds the accounts that may log in by NTLM.

    `AccountFile` is one; a program with its own store brings another. The one method is enough: it is
    then called in a worker thread, since it may block. A source that answers from memory says so by
    an attribute ``may_block`` that is false, which saves the thread (about 165 microseconds).
    """

    def lookup(self, domain: str, user: str) -> Account | None:
        r"""Find an account.

        Args:
          domain: as the client sent it, maybe empty; workgroup clients send their computer's name.
          user: as the client sent it, never empty; may be ``user@realm``.
        """
        ...  # pragma: no cover


def split_principal(principal: str) -> tuple[str, str]:
    r"""Split ``DOM\user`` into domain and user; ``user`` and ``user@realm`` have no domain.

    Raises:
      ConfigurationError: there is no user, or a character that no account name can have.
    """
    domain, backslash, user = principal.rpartition("\\")
    if not user or (backslash and not domain) or _FORBIDDEN.intersection(domain + user):
        raise ConfigurationError(f"{printable(principal)} is no account name: write 'DOM\\user' or 'user'")
    return domain, user


def account_key(domain: str, user: str) -> str:
    """What two spellings of one account have in common."""
    return simple_upper(f"{domain}\\{user}")


class AccountTable:
    """Accounts in memory, found in the same time whether there is one or a hundred thousand.

    An account without a domain answers for every domain that has no account of its own for that user.
    """

    #: A `lookup` never waits for anything.
    may_block: Final = False

    # One bytes object per account, not an Account: 100,000 of them must stay under 40 MB.
    __slots__ = ("_packed",)

    def __init__(self) -> None:
        self._packed: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self._packed)

    def __iter__(self) -> Iterator[Account]:
        return map(self._unpack, self._packed.values())

    def add(self, account: Account) -> bool:
        """Add an account; the first of two with the same name stays. Returns whether it was added.

        If either of the two is disabled, the one that stays is: it is accounts that operators disable, not lines.
        """
        key = account_key(account.domain, account.name)
        first = self._packed.get(key)
        if first is not None:
            if not account.enabled:
                self._packed[key] = first[:_NT_HASH_SIZE] + bytes([False]) + first[_NT_HASH_SIZE + 1 :]
            return False
        self._packed[key] = account.nt_hash + bytes([account.enabled]) + account.principal.encode()
        return True

    def lookup(self, domain: str, user: str) -> Account | None:
        """See `AccountSource.lookup`."""
        # Found or not, in its domain or without one, the same steps: a client must not learn by a clock which
        # accounts there are.
        own = self._packed.get(account_key(domain, user))
        shared = self._packed.get(account_key("", user))
        packed = shared if own is None else own
        account = self._unpack(_NOBODY if packed is None else packed)
        return None if packed is None else account

    @staticmethod
    def _unpack(packed: bytes) -> Account:
        domain, _, name = packed[_NT_HASH_SIZE + 1 :].decode().rpartition("\\")
        return Account(domain, name, packed[:_NT_HASH_SIZE], bool(packed[_NT_HASH_SIZE]))


@handles_secrets
def parse_line(line: str) -> tuple[Account, bool] | None:
    """Read one line of an account file.

    Returns:
      The account and whether its password stood there in clear; None for an empty line or a comment.

    Raises:
      ConfigurationError: the line is neither form; the text quotes nothing of it.
    """
    if not line.strip() or line.startswith("#"):
        return None
    fields = line.split(":")
    if len(fields) == _CLEAR_FIELDS:
        domain, user, password = fields
        if not user or _FORBIDDEN.intersection(domain + user):
            raise ConfigurationError("no such account name is possible")
        if not password:
            raise ConfigurationError("the password is empty")
        return Account(domain, user, nt_hash(password)), True
    # Samba ends its lines with a colon, pyspnego's reader wants none.
    if len(fields) == _SMBPASSWD_FIELDS or (len(fields) == _SMBPASSWD_FIELDS + 1 and not fields[-1]):
        try:
            domain, user = split_principal(fields[0])
        except ConfigurationError:
            raise ConfigurationError("no such account name is possible") from None
        flags = fields[4]
        if not (flags.startswith("[") and flags.endswith("]")):
            raise ConfigurationError("the flags are not in brackets, as in [U]")
        hashed = fields[3]
        if hashed.startswith(("NO PASSWORD", "X")):
            return Account(domain, user, bytes(_NT_HASH_SIZE), enabled=False), False
        try:
            digest = binascii.unhexlify(hashed)
        except ValueError:
            digest = b""
        if len(digest) != _NT_HASH_SIZE:
            raise ConfigurationError("the NT hash is not 32 hexadecimal digits")
        # D: disabled; N: no password, which smbpasswd(5) means as "anyone may": never here.
        return Account(domain, user, digest, enabled=not {"D", "N"} & set(flags)), False
    raise ConfigurationError(f"{len(fields)} fields between colons; an smbpasswd line has 6, DOMAIN:USER:PASSWORD 3")


@handles_secrets
def parse(text: str, source: str) -> AccountTable:
    r"""Read a whole account file.

    One line that cannot be read, and none of them counts: had it disabled ``DOM\alice``, then an ``alice`` of any
    domain would answer for that account instead.

    Raises:
      ConfigurationError: of each line that is no account's, its number and why.
    """
    table = AccountTable()
    clear = 0
    bad: list[str] = []
    for number, line in _texts.lines(text):
        try:
            parsed = parse_line(line)
        except ConfigurationError as exc:
            bad.append(f"line {number}: {exc}")
            continue
        if parsed is None:
            continue
        account, in_clear = parsed
        clear += in_clear
        if not table.add(account):
            but = "" if account.enabled else ", but the account is disabled"
            log.warning(
                "%s:%d: line ignored: %s stands further up%s", source, number, printable(account.principal), but
            )
    if bad:
        # All of them, but no megabytes of log of what may be no account file at all.
        more = f"; and {len(bad) - _MOST_TOLD} more" if len(bad) > _MOST_TOLD else ""
        raise ConfigurationError(
            f"the account file {source} cannot be used until these lines are mended or removed: "
            + "; ".join(bad[:_MOST_TOLD])
            + more
        )
    if clear:
        log.warning("%s: %d passwords in clear; 'triosspi accounts import' replaces them by hashes", source, clear)
    return table


_Signature: TypeAlias = tuple[int, int, int, int]


class AccountFile:
    """An account file on disk, read again whenever it has changed.

    An edit takes effect at the next login; one that neither size, date nor inode shows, as on a filesystem
    that keeps no time of change, within a minute. One that cannot be read, or of which a line cannot be, is
    reported with the numbers of the lines, and the accounts that were there before still serve.

    May be used by several threads at once.

    Args:
      path: the file.

    Raises:
      ConfigurationError: it cannot be read, or a line of it cannot be.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._table = AccountTable()
        # Of the content that was read last, and why that was refused, if it was.
        self._digest = b""
        self._refused = ""
        self._told: tuple[_Signature | None, str] | None = None
        self._retry_at = self._look_at = 0.0
        self._seen = self._signature()
        self._load()

    def __repr__(self) -> str:
        return f"AccountFile({str(self.path)!r})"

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[Account]:
        return iter(self._table)

    @property
    def may_block(self) -> bool:
        """Whether the next `lookup` will read the file; this looks only at its date (2 microseconds)."""
        now = time.monotonic()
        return now >= self._look_at or (now >= self._retry_at and self._signature() != self._seen)

    def lookup(self, domain: str, user: str) -> Account | None:
        """See `AccountSource.lookup`."""
        if self.may_block:
            with self._lock:
                # Others have waited while one was reading.
                if self.may_block:
                    self._reload()
        return self._table.lookup(domain, user)

    def _signature(self) -> _Signature | None:
        try:
            status = self.path.stat()
        except (OSError, ValueError):
            return None
        # The last one cannot be set back, where the filesystem has it; `_LOOK_INTERVAL` is for the others.
        return status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns

    def _reload(self) -> None:
        # Before the reading: what changes during it is seen at the next login.
        signature = self._signature()
        try:
            changed = self._load()
        except _texts.CannotReadError as exc:
            # What was not read was not seen, or an account that has been removed could log in until the next change.
            self._retry_at = self._look_at = time.monotonic() + _RETRY_INTERVAL
            self._tell(signature, exc)
        except ConfigurationError as exc:
            self._seen = signature
            self._tell(signature, exc)
        else:
            self._seen = signature
            self._told = None
            if changed:
                log.info("%s: %d accounts", self.path, len(self._table))

    def _tell(self, signature: _Signature | None, exc: ConfigurationError) -> None:
        """Log what is wrong; once, as long as neither that nor the file changes."""
        if self._told != (signature, str(exc)):
            self._told = signature, str(exc)
            log.error("%s; the %d accounts read before still serve", exc, len(self._table))

    @handles_secrets
    def _load(self) -> bool:
        """Read the file; returns whether there was anything new in it."""
        # Before the reading, so that no other login waits for a look that only finds what was there before.
        self._look_at = time.monotonic() + _LOOK_INTERVAL
        content = _texts.read(self.path, "the account file", _texts.LARGE)
        # Other threads run during this, and not while a text is decoded.
        digest = hashlib.sha256(content.data).digest()
        if digest == self._digest:
            if self._refused:
                raise ConfigurationError(self._refused)
            return False
        self._digest, self._refused = digest, ""
        self._warn_if_readable(content.status)
        try:
            self._table = parse(_texts.decode_lines(content.data, f"the account file {self.path}"), str(self.path))
        except ConfigurationError as exc:
            self._refused = str(exc)
            raise
        return True

    def _warn_if_readable(self, status: os.stat_result) -> None:
        # Windows has no such bits; there the file is not used either.
        if os.name == "posix" and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            log.warning("%s: others may read it, and log in with what they read: chmod 600", self.path)
