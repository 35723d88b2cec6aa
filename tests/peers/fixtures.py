"""What a conftest.py imports, so that no test asks the DNS for a stranger's KDC."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

NO_KERBEROS = Path(__file__).with_name("no_kerberos.krb5.conf")


@pytest.fixture(scope="session", autouse=True)
def no_public_realms() -> Iterator[None]:
    """Take the machine's own krb5.conf out of the tests, and of the programs that they start.

    Debian's names public realms as soon as a Kerberos package is installed, and with python-gssapi installed a
    pyspnego client with a password asks for them.
    """
    with pytest.MonkeyPatch.context() as patch:
        # Also where a developer has chosen another: no test is about that realm.
        patch.setenv("KRB5_CONFIG", os.fspath(NO_KERBEROS))
        yield
