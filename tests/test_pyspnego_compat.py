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
from spnego._context import ContextProxy, ContextReq
from spnego._gss import GSSAPIProxy
from spnego._negotiate import NegotiateProxy
from spnego._ntlm import NTLMProxy
from spnego._ntlm_raw import messages

from triosspi.security import pyspnego_compat
from triosspi.security.ntlm import messages as ntlm
from triosspi.security.pyspnego_compat import AcceptorNTLM, InitiatorNegotiate


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
    ours = vars(AcceptorNTLM(lambda *_: pytest.fail("not yet")))
    assert set(ours) - set(theirs) == {"_verifier", "_raw_negotiate", "_raw_challenge", "login"}
    # These two are about which old responses to admit; ours admits none.
    assert set(theirs) - set(ours) == {"_lm", "_nt_v1", "_nt_v2"}
    different = {"_context_req", "options", "_hostname", "_service", "spn", "_is_wrapped"}
    assert {name for name in theirs if name in ours and theirs[name] != ours[name]} <= different


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (ContextProxy.__init__, "credentials hostname service channel_bindings context_req usage protocol options"),
        (NTLMProxy._step_accept_negotiate, "token"),
        (NTLMProxy._step_accept_authenticate, "token channel_bindings"),
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
    for ours in (AcceptorNTLM, InitiatorNegotiate):
        base = ours.__mro__[1]
        for name in vars(ours):
            if name.startswith(("_step", "_rebuild", "_preferred")):
                assert name in vars(base), name


def test_the_flags_have_the_values_of_the_specification() -> None:
    flags = messages.NegotiateFlags
    assert flags.sign == ntlm.NEGOTIATE_SIGN
    assert flags.seal == ntlm.NEGOTIATE_SEAL
    assert flags.extended_session_security == ntlm.NEGOTIATE_EXTENDED_SESSIONSECURITY
    assert flags.key_128 == ntlm.NEGOTIATE_128
    assert flags.key_exch == ntlm.NEGOTIATE_KEY_EXCH
    assert (int(ContextReq.mutual_auth), int(ContextReq.confidentiality), int(ContextReq.integrity)) == (2, 16, 32)


def test_the_kerberos_context_takes_a_credential() -> None:
    assert "kwargs" in parameters(GSSAPIProxy.__init__)
    assert '"_gssapi_credential"' in inspect.getsource(GSSAPIProxy.__init__)


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
