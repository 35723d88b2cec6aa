"""A Kerberos realm for the length of a benchmark: the tests' own, with a ticket in the environment."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from peers.kerberos import mit


@contextmanager
def kerberos(service: str = "aes256") -> Iterator[tuple[str, str] | None]:
    """Yields a service's keytab and SPN; None where there is no KDC to start, and says why."""
    missing = mit.available()
    if missing is not None:
        print(f"without Kerberos: {missing}")
        yield None
        return
    kdc = mit.MitKdc()
    try:
        os.environ.update(kdc.environment)
        os.environ["KRB5CCNAME"] = kdc.ccache()
        yield kdc.services[service].keytab, kdc.services[service].target
    finally:
        kdc.stop()
