"""What `Acceptor` and `Initiator` keep of what they are given."""

from __future__ import annotations

import dataclasses

import pytest

from harness import make_acceptor, make_initiator
from triosspi import Acceptor, ConfigurationError
from triosspi.security.ntlm.accounts import AccountTable

SID = "S-1-5-21-1-2-3-513"
COLLECTIONS = {
    "spns": ["host/server.example"],
    "allow": ["DOM\\alice"],
    "deny": ["DOM\\bob"],
    "require_groups": [SID],
    "target_names": ["host/server.example"],
    "mechanisms": ["ntlm"],
}
any_collection = pytest.mark.parametrize("option", COLLECTIONS)


@any_collection
def test_a_list_that_is_changed_afterwards_changes_no_acceptor(option):
    given = list(COLLECTIONS[option])
    acceptor = make_acceptor(**{option: given})
    given.append("*@EVIL.EXAMPLE")
    assert list(getattr(acceptor, option)) == COLLECTIONS[option]
    assert not hasattr(getattr(acceptor, option), "append")


@any_collection
def test_a_generator_is_as_good_as_a_list(option):
    # It was read once where the rules are looked at, and was empty for whoever came next.
    acceptor = make_acceptor(**{option: (name for name in COLLECTIONS[option])})
    assert list(getattr(acceptor, option)) == COLLECTIONS[option]
    assert acceptor == make_acceptor(**{option: COLLECTIONS[option]}) == dataclasses.replace(acceptor)


@any_collection
@pytest.mark.parametrize("given", ["ntlm", b"ntlm", 5, [None], [b"ntlm"], [["ntlm"]]], ids=repr)
def test_what_is_no_collection_of_names_is_refused(option, given):
    with pytest.raises(ConfigurationError, match=f"{option} is a collection"):
        make_acceptor(**{option: given})


def test_an_acceptor_may_be_the_key_of_a_dictionary():
    class Unhashable(AccountTable):
        __hash__ = None

        def __eq__(self, other):
            return isinstance(other, Unhashable)

    one, same = (Acceptor(accounts=Unhashable(), **COLLECTIONS, channel_bindings=b"tls") for _ in range(2))
    assert {one: "found"}[same] == "found"
    assert one != Acceptor(accounts=Unhashable(), **{**COLLECTIONS, "deny": ["DOM\\carol"]}, channel_bindings=b"tls")
    # What it has found out for itself makes no difference.
    before = hash(one)
    one.new_context()
    assert (hash(one), one) == (before, same)
    assert len({make_initiator(), make_initiator(), make_initiator("other")}) == 2


@pytest.mark.parametrize("make", [make_acceptor, make_initiator])
def test_channel_bindings_are_kept_as_they_were_given(make):
    given = bytearray(b"tls-unique:1")
    credential = make(channel_bindings=given)
    given[:] = b"others"
    assert credential.channel_bindings == b"tls-unique:1"
    hash(credential)
    # bytes(5) would be five zeros.
    for wrong in ("tls-unique:1", 5, [1, 2]):
        with pytest.raises(ConfigurationError, match="channel_bindings are bytes"):
            make(channel_bindings=wrong)
