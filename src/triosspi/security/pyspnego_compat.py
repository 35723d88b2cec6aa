"""The only file that touches names of pyspnego that are not its public API.

Written for pyspnego 0.12.4 to 0.12.x; ``tests/test_pyspnego_compat.py`` fails loudly when one of these
names changes its shape underneath. What is used, and why the public API does not do:

* `NegotiateProxy`, the initiator's, and two of its methods, because the public `spnego.client` offers
  whatever the machine has.
* `NTLMProxy` and its fields, because its acceptor reads the account file named by an environment
  variable, for the whole process, from top to bottom on each login; and because its verification of
  AUTHENTICATE is not strict (see `ntlm.verification`). With them the derivation of the keys from the session
  key, which belongs to the step that is not taken.
* `GSSAPIProxy` and `SSPIProxy`, to get at the library's and the system's own contexts.
* the names of its loggers, which at DEBUG write whole tokens.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping
from typing import Any

from spnego import ContextProxy, NTLMHash
from spnego._context import GSSMech
from spnego._gss import GSSAPIProxy
from spnego._negotiate import NegotiateProxy
from spnego._ntlm import NTLMProxy
from spnego._ntlm_raw.crypto import rc4init, sealkey, signkey
from spnego._ntlm_raw.messages import NegotiateFlags
from spnego._sspi import SSPIProxy
from spnego.channel_bindings import GssChannelBindings

from .names import AccountName

__all__ = [
    "MECHANISMS",
    "InitiatorNegotiate",
    "allow_token_logging",
    "give_session_key",
    "gssapi_context",
    "mechanism_of",
    "negotiate_flags",
    "new_ntlm_acceptor",
    "ntlm_without_environment",
    "restart_rc4",
    "sspi_context",
]

MECHANISMS: Mapping[str, GSSMech] = {"kerberos": GSSMech.kerberos, "ntlm": GSSMech.ntlm}


# Its loggers


_TOKEN_LOGGERS = ("spnego._gss", "spnego._negotiate", "spnego._ntlm", "spnego._sspi")
_TOKEN_TEXTS = (" step input: ", " step output: ")
_tokens_may_be_logged = False


def _hide_tokens(record: logging.LogRecord) -> bool:
    return _tokens_may_be_logged or not any(text in str(record.msg) for text in _TOKEN_TEXTS)


# From the import on: a program that turns on DEBUG for everything does not mean this by it. A filter of
# a logger sees only what is logged to it by name, so each of them gets one.
for _name in _TOKEN_LOGGERS:
    logging.getLogger(_name).addFilter(_hide_tokens)


def allow_token_logging(allow: bool = True) -> None:
    """Let pyspnego log every handshake token at DEBUG, in base64, as it does by itself.

    Off by default: whoever has a login's tokens can try passwords against them at leisure.
    """
    global _tokens_may_be_logged  # noqa: PLW0603 - loggers are global too
    _tokens_may_be_logged = allow


# NTLM's acceptor


@functools.cache
def _fresh_ntlm_acceptor() -> NTLMProxy:
    """Made once, to be copied: its initialiser's enum arithmetic takes 40 us."""
    # As an initiator, since for an acceptor it insists on the file named by NTLM_USER_FILE. Any user name will do.
    proxy = NTLMProxy(NTLMHash("nobody"))
    proxy.usage = "accept"
    proxy._credential = None
    # To be spared pyspnego's log of every token, which it encodes whether anybody reads it or not.
    proxy._is_wrapped = True
    return proxy


def new_ntlm_acceptor() -> NTLMProxy:
    """An acceptor that has not begun. Its first `step` gives CHALLENGE; instead of a second, `give_session_key`."""
    return copy.copy(_fresh_ntlm_acceptor())


def give_session_key(proxy: NTLMProxy, session_key: bytes, flags: int) -> None:
    """Finish an acceptor whose client has logged in, by the key and flags of its verified AUTHENTICATE."""
    proxy._session_key = session_key
    proxy._context_attr = flags
    proxy._complete = True
    proxy._temp_negotiate = proxy._temp_challenge = None
    proxy._sign_key_out = signkey(flags, session_key, "accept")
    proxy._sign_key_in = signkey(flags, session_key, "initiate")
    proxy._handle_out = rc4init(sealkey(flags, session_key, "accept"))
    proxy._handle_in = rc4init(sealkey(flags, session_key, "initiate"))


def restart_rc4(proxy: NTLMProxy, *, outgoing: bool) -> None:
    """Begin RC4 anew in one direction, after a mechListMIC."""
    proxy._reset_ntlm_crypto_state(outgoing=outgoing)


# Initiators


def ntlm_without_environment(proxy: ContextProxy) -> ContextProxy:
    """Have an NTLM initiator that has not begun speak NTLMv2, and nothing weaker; returns it.

    pyspnego obeys LM_COMPAT_LEVEL: up to 2 it sends NTLMv1, of which the password's hash is a matter of hours
    to whoever records it. The user name is upper-cased as Windows, Samba and .NET do; pyspnego takes Unicode's
    full mapping, by which ``straße`` could not log in to any of these.
    """
    if isinstance(proxy, NTLMProxy):
        proxy._lm = proxy._nt_v1 = False
        proxy._nt_v2 = True
        proxy._context_req = _ntlmv2_request(proxy._context_req)
        if proxy._credential is not None and proxy._credential.username:
            proxy._credential.username = AccountName(proxy._credential.username)
    return proxy


def _ntlmv2_request(flags: int) -> Any:
    return (NegotiateFlags(flags) | NegotiateFlags.extended_session_security) & ~NegotiateFlags.lm_key


class InitiatorNegotiate(NegotiateProxy):
    """pyspnego's SPNEGO initiator, offering just the mechanisms that it is given."""

    @property
    def mic_sent(self) -> bool:
        """Has a mechListMIC been sent?"""
        return self._mic_sent

    @property
    def mic_verified(self) -> bool:
        """Has the acceptor's mechListMIC been verified?"""
        return self._mic_recv

    def __init__(self, mechanisms: list[GSSMech], **kwargs: Any) -> None:
        super().__init__(usage="initiate", protocol="negotiate", **kwargs)
        self._mechanisms = mechanisms

    @property
    def inner(self) -> ContextProxy | None:
        """The context of the chosen mechanism."""
        return self._context if self._context_list else None

    def _preferred_mech_list(self) -> list[GSSMech]:
        available = super()._preferred_mech_list()
        return [mech for mech in available if mech in self._mechanisms]

    def _rebuild_context_list(
        self,
        mech_types: list[str] | None = None,
        channel_bindings: GssChannelBindings | None = None,
    ) -> list[str]:
        mechanisms = super()._rebuild_context_list(mech_types, channel_bindings)
        for mech, (context, _) in self._context_list.items():
            if isinstance(context, NTLMProxy):
                weak = context._context_req != _ntlmv2_request(context._context_req)
                ntlm_without_environment(context)
                if weak:
                    # Its first message is made already, and asks for less.
                    context._temp_negotiate = None
                    self._context_list[mech] = context, context.step(channel_bindings=channel_bindings)
        return mechanisms


# What a context is


def mechanism_of(proxy: ContextProxy) -> str | None:
    """The mechanism of a context, ``"ntlm"`` or ``"kerberos"``; None where the system does it."""
    if isinstance(proxy, NTLMProxy):
        return "ntlm"
    return "kerberos" if isinstance(proxy, GSSAPIProxy) else None


def negotiate_flags(proxy: ContextProxy) -> int:
    """The NegotiateFlags of a finished NTLM context, [MS-NLMP] 2.2.2.5."""
    assert isinstance(proxy, NTLMProxy)
    return int(proxy._context_attr)


def gssapi_context(proxy: ContextProxy) -> Any:
    """The library's own context of a finished Kerberos context."""
    assert isinstance(proxy, GSSAPIProxy)
    return proxy._context


def sspi_context(proxy: ContextProxy) -> object | None:
    """The system's own context, where SSPI is the system's: on Windows."""
    return proxy._context if isinstance(proxy, SSPIProxy) else None
