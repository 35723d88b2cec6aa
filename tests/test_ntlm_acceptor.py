"""Our NTLM acceptor by itself, with a client that shares nothing with it."""

from __future__ import annotations

import pytest
from spnego._ntlm import NTLMProxy

from forge import ALWAYS_SIGN, GOOD_FLAGS, SEAL, Client
from triosspi import Account, AuthenticationError
from triosspi.security.identity import ContextFlag
from triosspi.security.ntlm.acceptor import NTLMAcceptor
from triosspi.security.ntlm.accounts import AccountTable
from triosspi.security.ntlm.primitives import nt_hash
from triosspi.security.ntlm.verification import NTLMPolicy

DATA = b"a list of mechanisms"


def new_acceptor() -> NTLMAcceptor:
    table = AccountTable()
    table.add(Account("DOM", "alice", nt_hash("secret")))
    return NTLMAcceptor(table, NTLMPolicy())


def log_in(client: Client) -> NTLMAcceptor:
    acceptor = new_acceptor()
    challenge = acceptor.step(client.negotiate())
    assert challenge is not None and not acceptor.complete and acceptor.login is None
    assert acceptor.step(client.authenticate(challenge)) is None
    return acceptor


def test_a_login_gives_the_account_and_the_clients_session_key() -> None:
    acceptor = log_in(Client(user="ALICE"))
    assert acceptor.complete and acceptor.inner is acceptor
    assert acceptor.login is not None and acceptor.login.account.principal == "DOM\\alice"
    assert acceptor.session_key == Client().session_key
    assert (acceptor.name, acceptor.enctype, acceptor.mic_sent, acceptor.mic_verified) == ("ntlm", None, False, False)


@pytest.mark.parametrize(
    ("flags", "provided"),
    [
        (GOOD_FLAGS, ContextFlag.REPLAY | ContextFlag.SEQUENCE | ContextFlag.INTEG | ContextFlag.CONF),
        (GOOD_FLAGS & ~SEAL, ContextFlag.REPLAY | ContextFlag.SEQUENCE | ContextFlag.INTEG),
        (GOOD_FLAGS & ~ALWAYS_SIGN, ContextFlag.REPLAY | ContextFlag.SEQUENCE | ContextFlag.INTEG | ContextFlag.CONF),
    ],
)
def test_ntlms_flags_are_told_in_gss_apis_terms_as_pyspnego_does(flags: int, provided: ContextFlag) -> None:
    acceptor = log_in(Client(flags=flags))
    assert acceptor.flags == provided
    theirs = NTLMProxy("alice", "secret")
    theirs._context_attr = flags
    assert int(theirs.context_attr) == provided


def test_the_clients_signature_is_verified_and_a_wrong_one_is_not() -> None:
    client = Client()
    log_in(client).verify(DATA, client.mech_list_mic(DATA))
    with pytest.raises(Exception, match="(?i)integrity"):
        log_in(client).verify(DATA + b"!", client.mech_list_mic(DATA))


def test_each_direction_begins_its_rc4_anew_where_it_is_told_to() -> None:
    one, other = log_in(Client()), log_in(Client())
    first = one.sign(DATA)
    assert other.sign(DATA) == first
    one.restart_rc4(outgoing=True)
    # The checksum's key stream is the first one's again; the number counts on.
    again = one.sign(DATA)
    assert again[12:] == b"\1\0\0\0"
    assert again != other.sign(DATA)


@pytest.mark.parametrize("client", [Client(password="another"), Client(user="bob"), Client(user="")], ids=str)
def test_a_refused_login_leaves_it_incomplete_and_without_a_key(client: Client) -> None:
    acceptor = new_acceptor()
    challenge = acceptor.step(client.negotiate())
    assert challenge is not None
    with pytest.raises(AuthenticationError):
        acceptor.step(client.authenticate(challenge))
    assert not acceptor.complete
    assert (acceptor.session_key, acceptor.flags, acceptor.login) == (b"", 0, None)
