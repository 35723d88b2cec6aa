"""python-gssapi where it is not, and what its errors become. With a realm: ``test_kerberos.py``."""

from __future__ import annotations

import sys
from functools import partial

import pytest

from peers.kerberos.kinds import MIT_RAW
from peers.requirements import require
from triosspi import Acceptor, AuthenticationError, ConfigurationError, Initiator
from triosspi.security.kerberos.gssapi import KerberosAcceptor, reason, root_reason


def test_without_python_gssapi_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gssapi", None)
    for make in (partial(Acceptor, keytab="FILE:/etc/krb5.keytab"), Initiator, partial(Initiator, ccache="FILE:x")):
        with pytest.raises(ConfigurationError, match=r"pip install 'triosspi\[kerberos\]'"):
            make()


class LibraryError(Exception):
    """As python-gssapi's: a status of GSS-API's, and one of the mechanism's."""

    __module__ = "gssapi.raw.exceptions"
    maj_code, min_code = 1, 2

    def __init__(self, *messages: str) -> None:
        super().__init__("Major (1): ..., Minor (2): ...")
        self._messages = messages

    def get_all_statuses(self, _code: int, is_major: bool) -> list[str]:
        return ["Unspecified GSS failure"] if is_major else list(self._messages)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (("Request is a replay",), "Request is a replay"),
        (("Success",), "Unspecified GSS failure"),
        (("", "Unknown error"), "Unspecified GSS failure"),
    ],
)
def test_of_both_statuses_the_one_that_says_something_is_told(messages: tuple[str, ...], text: str) -> None:
    assert reason(LibraryError(*messages)) == text


def test_the_librarys_error_is_found_behind_pyspnegos_and_through_a_circle() -> None:
    outer, inner = ValueError("pyspnego's"), LibraryError("Request is a replay")
    outer.__cause__ = inner
    assert root_reason(outer) == "Request is a replay"
    alone = ValueError("alone")
    alone.__context__ = other = ValueError("other")
    other.__context__ = alone
    assert root_reason(alone) is None


def test_a_first_token_that_is_none_is_refused_in_the_librarys_words_and_leaves_nothing() -> None:
    require(MIT_RAW)
    acceptor = KerberosAcceptor(None, None)
    with pytest.raises(AuthenticationError, match="^Kerberos: "):
        acceptor.step(b"nonsense")
    assert not acceptor.complete and acceptor.flags == 0
