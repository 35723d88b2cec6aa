"""pyspnego's contexts behind our own Protocol."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import spnego
from spnego import NegotiateOptions
from spnego._gss import GSSAPIProxy

from triosspi.security.proxies import KerberosInitiator, NegotiateInitiator, NTLMInitiator, SystemContext, adopt
from triosspi.security.pyspnego_compat import MECHANISMS, InitiatorNegotiate


def test_each_context_is_adopted_as_what_it_is() -> None:
    ntlm = spnego.client("alice", "secret", protocol="ntlm", options=NegotiateOptions.use_ntlm)
    assert isinstance(adopt(ntlm), NTLMInitiator)
    kerberos = GSSAPIProxy(protocol="kerberos", _gssapi_credential=object())
    assert isinstance(adopt(kerberos), KerberosInitiator)
    system: Any = SimpleNamespace()
    assert isinstance(adopt(system), SystemContext)


def test_an_initiators_negotiate_has_a_mechanism_once_it_has_begun() -> None:
    context = NegotiateInitiator(InitiatorNegotiate([MECHANISMS["ntlm"]], username="alice", password="secret"))
    assert context.inner is None
    context.step(None)
    assert isinstance(context.inner, NTLMInitiator)
    assert (context.complete, context.mic_sent, context.mic_verified) == (False, False, False)


def test_an_initiators_target_is_what_it_has_asked_for() -> None:
    ntlm = spnego.client("alice", "secret", hostname="server", service="host", protocol="ntlm")
    assert NTLMInitiator(ntlm).target == "host/server"


@pytest.mark.parametrize(("protocol", "name"), [("kerberos", "kerberos"), ("ntlm", "ntlm"), (None, "unknown")])
def test_the_system_says_which_mechanism_it_has_chosen(protocol: str | None, name: str) -> None:
    proxy: Any = SimpleNamespace(negotiated_protocol=protocol)
    assert SystemContext(proxy).negotiated == name


def test_a_refused_login_of_the_systems_is_not_asked_for_its_mechanism() -> None:
    # The system may raise anything then, and what comes out of a step is an AuthenticationError and nothing else.
    assert SystemContext(object()).name is None  # type: ignore[arg-type]
