"""Our NTLM acceptor by itself, with a client that shares nothing with it."""

from __future__ import annotations

import hashlib
import struct

import pytest
from spnego._ntlm import NTLMProxy

from forge import ALWAYS_SIGN, GOOD_FLAGS, SEAL, Client, hmac_md5, rc4
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


def our_signature(number: int) -> bytes:
    """The signature with this number where RC4 has just begun, [MS-NLMP] 3.4.4.2."""
    keys = (f"session key to server-to-client {use} key magic constant\0".encode() for use in ("signing", "sealing"))
    signing, sealing = (hashlib.md5(Client().session_key + key).digest() for key in keys)
    checksum = hmac_md5(signing, struct.pack("<I", number) + DATA)[:8]
    return struct.pack("<I", 1) + rc4(sealing, checksum) + struct.pack("<I", number)


def test_rc4_begins_anew_in_the_direction_that_is_told() -> None:
    acceptor = log_in(Client())
    assert acceptor.sign(DATA) == our_signature(0)
    acceptor.restart_rc4(outgoing=False)
    assert acceptor.sign(DATA) != our_signature(1)
    acceptor.restart_rc4(outgoing=True)
    assert acceptor.sign(DATA) == our_signature(2)


@pytest.mark.parametrize("client", [Client(password="another"), Client(user="bob"), Client(user="")], ids=str)
def test_a_refused_login_leaves_it_incomplete_and_without_a_key(client: Client) -> None:
    acceptor = new_acceptor()
    challenge = acceptor.step(client.negotiate())
    assert challenge is not None
    with pytest.raises(AuthenticationError):
        acceptor.step(client.authenticate(challenge))
    assert not acceptor.complete
    assert (acceptor.session_key, acceptor.flags, acceptor.login) == (b"", 0, None)
