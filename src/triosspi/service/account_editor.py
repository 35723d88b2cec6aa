r"""Changes to an NTLM account file: atomic, one writer at a time, mode 0600.

Lines that are not the one being changed are kept as they are, comments and lines that cannot be read
included.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from .. import _texts
from .._errors import ConfigurationError, handles_secrets, printable
from ..security.ntlm.accounts import Account, account_key, parse_line, split_principal
from ..security.ntlm.primitives import nt_hash

# No LM hash: pyspnego's reader wants hexadecimal digits in the field, so not smbpasswd's X's.
_NO_LM_HASH: Final = "0" * 32
# The field is a Unix user of Samba's, and means nothing here: nobody.
_UID: Final = 65534
_SMBPASSWD_FIELDS: Final = 6


def format_line(principal: str, hashed: bytes, flags: str = "U") -> str:
    """An smbpasswd(5) line for an account, with an NT hash and no LM hash."""
    changed = f"LCT-{int(time.time()):08X}"
    return f"{principal}:{_UID}:{_NO_LM_HASH}:{hashed.hex().upper()}:{_format_flags(flags)}:{changed}"


def _format_flags(flags: str) -> str:
    # Samba reads a field of this width and no other.
    return f"[{flags:<11}]"


@contextmanager
def edit(path: Path) -> Iterator[list[str]]:
    """The file's lines, to be changed in place; written back when the block ends without an error.

    Raises:
      ConfigurationError: the file cannot be read or written.
    """
    path = Path(os.path.realpath(path))
    try:
        with _locked(path) as fd:
            name = f"the account file {path}"
            # A byte order mark is not written back. A line keeps its carriage return until it is changed.
            text = _texts.decode_lines(_texts.read_open(fd, name, _texts.LARGE).data, name)
            lines = text.removesuffix("\n").split("\n")
            if lines == [""]:
                lines.clear()
            before = list(lines)
            yield lines
            if lines != before:
                _replace(path, "".join(f"{line}\n" for line in lines), os.fstat(fd))
    except OSError as exc:
        raise ConfigurationError(f"cannot change the account file {path}: {exc.strerror}") from None


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Open the file, made if need be, with an exclusive lock that holds for its name."""
    import fcntl  # noqa: PLC0415 - POSIX; on Windows there are no account files

    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            # The writer that was waited for has put another file in this one's place.
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                yield fd
                return
        finally:
            os.close(fd)


def _replace(path: Path, text: str, old: os.stat_result) -> None:
    """Write a new file and move it over the old one: a reader sees either, whole, at any moment."""
    # One fixed name: the lock keeps others away, and what a killed writer left is overwritten.
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="utf-8", newline="") as file:
            if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(fd, old.st_uid, old.st_gid)
            file.write(text)
            file.flush()
            os.fsync(fd)
        fresh.rename(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _accounts(lines: list[str]) -> Iterator[tuple[int, Account, bool]]:
    """The accounts: where each stands, and whether its password does so in clear."""
    for index, line in enumerate(lines):
        try:
            parsed = parse_line(line.removesuffix("\r"))
        except ConfigurationError:
            continue
        if parsed is not None:
            yield index, *parsed


def check_principal(principal: str) -> None:
    r"""Refuse a name that cannot stand in an account file.

    Raises:
      ConfigurationError: it is not ``DOM\user`` or ``user``, or has a character that is not printable, or
          would make its line a comment.
    """
    split_principal(principal)
    # Among the unprintable ones are all that some reader takes for a line's end, and those that are not Unicode.
    if principal.startswith("#") or not principal.isprintable():
        raise ConfigurationError(f"{printable(principal)} cannot stand in an account file: choose another name")


def _change_password(line: str, account: Account, hashed: bytes) -> str:
    """The line with another hash. What handlers see of the account, and whether it is disabled, stays."""
    fields = line.split(":")
    disabled = len(fields) >= _SMBPASSWD_FIELDS and "D" in fields[4]
    return format_line(account.principal, hashed, "UD" if disabled else "U")


def _find(lines: list[str], principal: str) -> tuple[int, Account] | None:
    """An account and the index of its line, by the rules of a login; None if there is none."""
    wanted = account_key(*split_principal(principal))
    for index, account, _ in _accounts(lines):
        if account_key(account.domain, account.name) == wanted:
            return index, account
    return None


@handles_secrets
def add(path: Path, principal: str, password: str) -> bool:
    r"""Add an account, or give an existing one a new password.

    One that exists keeps its spelling, and stays disabled if it is.

    Args:
      path: the account file; made with mode 0600 if there is none.
      principal: ``DOM\user``, or ``user`` for any domain.
      password: of any characters but not empty.

    Returns:
      Whether the account is new.

    Raises:
      ConfigurationError: the name, the password or the file cannot be used.
    """
    if not password:
        raise ConfigurationError("the password is empty")
    check_principal(principal)
    hashed = nt_hash(password)
    with edit(path) as lines:
        found = _find(lines, principal)
        if found is None:
            lines.append(format_line(principal, hashed))
        else:
            index, account = found
            lines[index] = _change_password(lines[index], account, hashed)
    return found is None


@handles_secrets
def remove(path: Path, principal: str) -> None:
    """Remove an account.

    Raises:
      ConfigurationError: there is none of that name, or the file cannot be used.
    """
    with _existing(path) as lines:
        # All, or the next one of that name would be the one that counts, with a password of long ago.
        for index in reversed(_require(lines, path, principal)):
            del lines[index]


@handles_secrets
def set_enabled(path: Path, principal: str, enabled: bool) -> None:
    """Enable an account, or disable it: its password is kept, and no login succeeds.

    Raises:
      ConfigurationError: there is none of that name, its line has no flags, or the file cannot be used.
    """
    with _existing(path) as lines:
        for index in _require(lines, path, principal):
            fields = lines[index].split(":")
            if len(fields) < _SMBPASSWD_FIELDS:
                raise ConfigurationError(
                    f"{principal} has its password in clear: run 'triosspi accounts import {path}' first"
                )
            flags = fields[4].strip("[]").replace(" ", "").replace("D", "")
            fields[4] = _format_flags(flags if enabled else flags + "D")
            lines[index] = ":".join(fields)


@handles_secrets
def import_clear(path: Path, source: Iterable[str]) -> tuple[int, list[str]]:
    """Add accounts from ``DOMAIN:USER:PASSWORD`` lines; one that exists gets the new password.

    Args:
      path: the account file; made if there is none.
      source: the lines.

    Returns:
      How many accounts were taken over, and for each line that was not, why.

    Raises:
      ConfigurationError: the file cannot be used.
    """
    taken = 0
    refused = []
    # Now, so that what goes wrong with it is not taken for the file's fault.
    source = list(source)
    with edit(path) as lines:
        # From the bottom up, since the first of two lines for one name is the one that counts.
        existing = reversed(list(_accounts(lines)))
        where = {account_key(account.domain, account.name): (index, account) for index, account, _ in existing}
        for number, raw in enumerate(source, start=1):
            try:
                parsed = parse_line(raw.removesuffix("\n").removesuffix("\r"))
                if parsed is not None and not parsed[1]:
                    raise ConfigurationError("not of the form DOMAIN:USER:PASSWORD")  # noqa: TRY301
                if parsed is not None:
                    check_principal(parsed[0].principal)
            except ConfigurationError as exc:
                refused.append(f"line {number}: {exc}")
                continue
            if parsed is None:
                continue
            account = parsed[0]
            key = account_key(account.domain, account.name)
            if key in where:
                index, existing_account = where[key]
                lines[index] = _change_password(lines[index], existing_account, account.nt_hash)
            else:
                where[key] = len(lines), account
                lines.append(format_line(account.principal, account.nt_hash))
            taken += 1
    return taken, refused


@handles_secrets
def hash_clear(path: Path) -> int:
    """Replace the clear passwords within an account file by hashes; returns how many there were.

    Raises:
      ConfigurationError: the file cannot be used.
    """
    with _existing(path) as lines:
        clear = [(index, account) for index, account, in_clear in _accounts(lines) if in_clear]
        for index, account in clear:
            lines[index] = format_line(account.principal, account.nt_hash)
    return len(clear)


@contextmanager
def _existing(path: Path) -> Iterator[list[str]]:
    # `edit` would make it.
    if not path.exists():
        raise ConfigurationError(f"there is no account file {path}")
    with edit(path) as lines:
        yield lines


def _require(lines: list[str], path: Path, principal: str) -> list[int]:
    """Where all lines of an account stand, the one that counts first."""
    wanted = account_key(*split_principal(principal))
    found = [index for index, account, _ in _accounts(lines) if account_key(account.domain, account.name) == wanted]
    if not found:
        raise ConfigurationError(f"{path} has no account {principal}")
    return found
