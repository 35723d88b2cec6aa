"""What is demanded of an accepted ticket. With tickets of a realm: ``test_kerberos.py``."""

from __future__ import annotations

import pytest

from triosspi import Acceptor, AuthenticationError, ConfigurationError
from triosspi.security.identity import ContextFlag
from triosspi.security.kerberos.tickets import KerberosPolicy, Ticket, check, enctype_name, folded_spns
from triosspi.security.ntlm.accounts import AccountTable

FLAGS = int(ContextFlag.CONF | ContextFlag.INTEG)


def service() -> str:
    raise AssertionError("finding out what the ticket is for costs, and does not matter here")


@pytest.mark.parametrize("problem", ["conf", "dce"])
def test_row_p_no_confidentiality_and_dce_style_are_refused(problem: str) -> None:
    # MIT's library always offers confidentiality, so the ticket's finding is made up here.
    flags = ContextFlag.CONF | ContextFlag.INTEG | ContextFlag.REPLAY | ContextFlag.SEQUENCE
    bits = int(flags & ~ContextFlag.CONF) if problem == "conf" else int(flags) | 0x1000
    ticket = Ticket("alice@R", bits, 60, 18, False, None)
    with pytest.raises(AuthenticationError, match="lacks CONF: its client must ask for GSS_C_CONF_FLAG|DCE style"):
        check(ticket, KerberosPolicy(), flags, lambda: "host/x@R")


@pytest.mark.parametrize("spn", ["server", "host/", "/server", "host/server@REALM"])
def test_an_spn_that_is_none_is_refused_when_the_acceptor_is_made(spn: str) -> None:
    with pytest.raises(ConfigurationError, match="is no SPN"):
        Acceptor(accounts=AccountTable(), spns=[spn])


def test_spns_are_compared_in_any_case() -> None:
    policy = KerberosPolicy(spns=folded_spns(["host/Server.Example"]))
    ticket = Ticket("alice@R", FLAGS, 60, 18, False, None)
    check(ticket, policy, FLAGS, lambda: "HOST/server.EXAMPLE@R")
    with pytest.raises(AuthenticationError, match="a ticket for 'http/server.example', not for this service"):
        check(ticket, policy, FLAGS, lambda: "http/server.example@R")


def test_what_the_ticket_is_for_is_asked_only_where_that_matters() -> None:
    check(Ticket("alice@R", FLAGS, 60, 18, False, None), KerberosPolicy(), FLAGS, service)


@pytest.mark.parametrize(
    ("enctype", "allow_rc4", "good"), [(17, False, True), (23, False, False), (23, True, True), (16, True, False)]
)
def test_a_session_key_is_of_aes_or_where_that_is_allowed_of_rc4(enctype: int, allow_rc4: bool, good: bool) -> None:
    ticket = Ticket("alice@R", FLAGS, 60, enctype, False, None)
    if good:
        check(ticket, KerberosPolicy(allow_rc4=allow_rc4), FLAGS, service)
    else:
        with pytest.raises(AuthenticationError, match=f"encryption type {enctype}, not AES"):
            check(ticket, KerberosPolicy(allow_rc4=allow_rc4), FLAGS, service)


def test_encryption_types_are_named_as_krb5_conf_does() -> None:
    names = [enctype_name(number) for number in (18, 23, 99)]
    assert names == ["aes256-cts-hmac-sha1-96", "arcfour-hmac", "enctype 99"]
