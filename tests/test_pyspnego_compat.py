"""The private names of pyspnego that are used, held to the shape that they had when that was written.

When one of these fails after an upgrade of pyspnego, read its changes before anything else: the acceptor may
still seem to work.
"""

from __future__ import annotations

import ast
import inspect
import logging
from importlib.metadata import version
from pathlib import Path

import pytest
import spnego
from spnego._context import ContextReq
from spnego._gss import GSSAPIProxy
from spnego._negotiate import NegotiateProxy
from spnego._ntlm import NTLMProxy
from spnego._ntlm_raw import crypto, messages
from spnego._sspi import SSPIProxy

from forge import GOOD_FLAGS, negotiate
from triosspi.security import pyspnego_compat
from triosspi.security.ntlm import messages as ntlm
from triosspi.security.pyspnego_compat import InitiatorNegotiate


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_pyspnego_is_of_the_range_that_was_read() -> None:
    assert version("pyspnego").startswith("0.12.")
    assert tuple(map(int, version("pyspnego").split(".")[:3])) >= (0, 12, 4)


@pytest.fixture
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "users"
    path.write_text("DOM:alice:secret\n")
    monkeypatch.setenv("NTLM_USER_FILE", str(path))


def test_our_ntlm_acceptor_has_the_fields_that_pyspnegos_own_has(user_file: None) -> None:
    theirs = vars(NTLMProxy(usage="accept"))
    ours = vars(pyspnego_compat.new_ntlm_acceptor())
    assert set(ours) == set(theirs)
    # What differs is of no account to CHALLENGE: what to ask a server for, which old responses to admit (ours admits none).
    different = {"_context_req", "options", "_hostname", "_service", "spn", "_is_wrapped", "_lm", "_nt_v1", "_nt_v2"}
    assert {name for name in theirs if theirs[name] != ours[name]} <= different


def test_our_ntlm_acceptors_share_nothing_that_changes() -> None:
    one, other = pyspnego_compat.new_ntlm_acceptor(), pyspnego_compat.new_ntlm_acceptor()
    before = dict(vars(other))
    one.step(negotiate())
    pyspnego_compat.give_session_key(one, bytes(16), GOOD_FLAGS)
    one.sign(b"data")
    assert vars(other) == before
    assert not vars(pyspnego_compat.new_ntlm_acceptor())["_complete"]


def test_an_acceptor_that_is_given_its_key_has_what_pyspnegos_own_has_after_the_same_login(user_file: None) -> None:
    client, theirs = NTLMProxy("DOM\\alice", "secret"), NTLMProxy(usage="accept")
    ours = pyspnego_compat.new_ntlm_acceptor()
    first = client.step()
    ours.step(first)
    theirs.step(client.step(theirs.step(first)))
    pyspnego_compat.give_session_key(ours, theirs.session_key, int(theirs._context_attr))
    different = {"_context_req", "options", "_is_wrapped", "_lm", "_nt_v1", "_nt_v2", "_credential"}
    assert {name for name in vars(theirs) if vars(theirs)[name] != vars(ours)[name]} <= different | {
        # Two ciphers of one key.
        "_handle_in",
        "_handle_out",
    }
    for direction in (True, False, True):
        assert ours.sign(b"data") == theirs.sign(b"data")
        assert ours.wrap_winrm(b"data") == theirs.wrap_winrm(b"data")
        assert ours.verify(b"data", client.sign(b"data")) == 0
        pyspnego_compat.restart_rc4(ours, outgoing=direction)
        theirs._reset_ntlm_crypto_state(outgoing=direction)
        if not direction:
            client._reset_ntlm_crypto_state(outgoing=True)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (crypto.rc4init, "k"),
        (crypto.signkey, "flags session_key usage"),
        (crypto.sealkey, "flags session_key usage"),
        (NegotiateProxy._preferred_mech_list, ""),
        (NegotiateProxy._rebuild_context_list, "mech_types channel_bindings"),
        (NTLMProxy._reset_ntlm_crypto_state, "outgoing"),
    ],
)
def test_a_method_that_is_overridden_or_called_has_the_parameters_that_it_had(function: object, names: str) -> None:
    found = parameters(function)
    assert [name for name in found if name != "self"] == names.split()


def test_the_negotiate_context_has_the_fields_that_are_read() -> None:
    fields = vars(NegotiateProxy(usage="accept"))
    assert {"_context_list", "_mic_sent", "_mic_recv"} <= set(fields)
    assert isinstance(inspect.getattr_static(NegotiateProxy, "_context"), property)
    assert isinstance(inspect.getattr_static(NegotiateProxy, "_chosen_mech"), property)


def test_the_ntlm_initiator_has_the_fields_that_decide_what_it_sends() -> None:
    proxy = NTLMProxy("alice", "password")
    assert {"_lm", "_nt_v1", "_nt_v2", "_context_req", "_temp_negotiate", "_credential"} <= set(vars(proxy))
    pyspnego_compat.ntlm_without_environment(proxy)
    assert (proxy._lm, proxy._nt_v1, proxy._nt_v2) == (False, False, True)


def test_every_override_still_overrides_something() -> None:
    for name in vars(InitiatorNegotiate):
        if name.startswith(("_step", "_rebuild", "_preferred")):
            assert name in vars(NegotiateProxy), name


def test_the_flags_have_the_values_of_the_specification() -> None:
    flags = messages.NegotiateFlags
    assert flags.sign == ntlm.NEGOTIATE_SIGN
    assert flags.seal == ntlm.NEGOTIATE_SEAL
    assert flags.extended_session_security == ntlm.NEGOTIATE_EXTENDED_SESSIONSECURITY
    assert flags.key_128 == ntlm.NEGOTIATE_128
    assert flags.key_exch == ntlm.NEGOTIATE_KEY_EXCH
    assert (int(ContextReq.mutual_auth), int(ContextReq.confidentiality), int(ContextReq.integrity)) == (2, 16, 32)


def test_the_librarys_and_the_systems_own_contexts_stand_where_they_are_looked_for() -> None:
    assert "self._context: typing.Optional[gssapi.SecurityContext] = None" in inspect.getsource(GSSAPIProxy.__init__)
    assert "self._context = " in inspect.getsource(SSPIProxy)


def test_every_logger_of_pyspnego_that_writes_tokens_is_filtered() -> None:
    package = Path(spnego.__file__).parent
    writers = {
        f"spnego.{path.stem}"
        for path in package.glob("*.py")
        if any(t in path.read_text() for t in pyspnego_compat._TOKEN_TEXTS)
    }
    # CredSSP is never used here.
    assert writers - {"spnego._credssp"} == set(pyspnego_compat._TOKEN_LOGGERS)
    for name in pyspnego_compat._TOKEN_LOGGERS:
        assert pyspnego_compat._hide_tokens in logging.getLogger(name).filters


def test_private_names_of_pyspnego_are_imported_by_one_file_only() -> None:
    package = Path(pyspnego_compat.__file__).parent.parent
    users = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("spnego._"):
                users.add(path.name)
    assert users == {"pyspnego_compat.py"}
