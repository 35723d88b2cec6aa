"""Local accounts that are made for a test run, and what a test that needs root does without it."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from peers.requirements import require
from triosspi import LocalAccount

_DIRECTORIES = "/usr/sbin:/usr/local/sbin:/usr/bin:/bin"


class _Root:
    """The right to become somebody else, and to make somebody."""

    def available(self) -> str | None:
        if os.geteuid() != 0:
            return "impersonation is tested as root alone"
        for name in ("useradd", "groupadd", "userdel", "groupdel"):
            if shutil.which(name, path=_DIRECTORIES) is None:
                return f"{name} is not installed (apt passwd)"
        return None


def run(*command: str) -> None:
    """Run a program of the system's administrator."""
    done = subprocess.run(command, env={"PATH": _DIRECTORIES}, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, (command, done.stderr)


def remove_left_over() -> None:
    """Remove the accounts of test processes that were killed."""
    names = [("userdel", entry.pw_name) for entry in pwd.getpwall()] + [
        ("groupdel", entry.gr_name) for entry in grp.getgrall()
    ]
    for command, name in names:
        found = re.fullmatch(r"tsspi(\d+)[abst]", name)
        # A user's own group goes with the user.
        if found and not Path("/proc", found[1]).exists() and (command == "userdel" or name.endswith("t")):
            # Another test process may be doing the same.
            with suppress(AssertionError):
                run(command, name)


@dataclass(frozen=True)
class Users:
    """Two people who share nothing, and a service's account.

    Attributes:
      alice: is in a group of her own and in `team`.
      bob: is in a group of its own.
      service: what a server that is not root would run as.
      team: the number of a group.
      place: a directory that everybody may write to.
    """

    alice: LocalAccount
    bob: LocalAccount
    service: LocalAccount
    team: int
    place: Path


@pytest.fixture
def root() -> None:
    """Skip the test where it cannot run; but not in CI."""
    require(_Root())


@pytest.fixture(scope="session")
def made_users() -> Iterator[Users]:
    """Real accounts, with names that nobody has, gone when the tests are."""
    require(_Root())
    remove_left_over()
    # Two test processes make theirs at once.
    prefix = f"tsspi{os.getpid()}"
    team = f"{prefix}t"
    names = [f"{prefix}{letter}" for letter in "abs"]
    made: list[tuple[str, str]] = []
    try:
        run("groupadd", team)
        made.append(("groupdel", team))
        for name in names:
            run("useradd", "--no-create-home", "--user-group", "--shell", "/bin/false", name)
            made.append(("userdel", name))
        run("usermod", "--append", "--groups", team, names[0])
        with tempfile.TemporaryDirectory(prefix=prefix, dir="/tmp") as directory:
            place = Path(directory)
            place.chmod(0o1777)
            accounts = [LocalAccount.lookup(name) for name in names]
            users = Users(*accounts, grp.getgrnam(team).gr_gid, place)
            assert min(account.uid for account in accounts) >= 1000
            assert users.team in users.alice.groups and users.team not in users.bob.groups
            yield users
    finally:
        for command, name in reversed(made):
            run(command, name)
        assert not {entry.pw_name for entry in pwd.getpwall()} & set(names)


@pytest.fixture
def users(root: None, made_users: Users) -> Users:
    """Them, for one test."""
    return made_users
