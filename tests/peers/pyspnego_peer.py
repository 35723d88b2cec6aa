"""pyspnego (Jordan Borean's pure Python NTLM and SPNEGO) as the initiator.

The library under test uses pyspnego too, so this is the least foreign of the peers; it is here because a plain
blocking pyspnego client is what people already have.
"""

from __future__ import annotations

from functools import partial

import spnego
from spnego.exceptions import SpnegoError

from .base import PeerError, PeerKind


class _Context:
    """A security context; pyspnego makes stepping and sealing the same on both sides."""

    def __init__(self, context: spnego.ContextProxy) -> None:
        self._context = context

    @property
    def complete(self) -> bool:
        return self._context.complete

    def step(self, token: bytes | None) -> bytes | None:
        try:
            return self._context.step(token) or None
        except Exception as exc:  # struct.error, ValueError, KeyError and more, for tokens that are no tokens
            raise PeerError(f"{type(exc).__name__}: {exc}") from exc

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        sealed = self._context.wrap_winrm(message)
        return sealed.header, sealed.data

    def open(self, trailer: bytes, data: bytes) -> bytes:
        try:
            return self._context.unwrap_winrm(trailer, data)
        except SpnegoError as exc:
            raise PeerError(str(exc)) from exc

    def close(self) -> None:
        """Nothing is held."""


# Without these pyspnego prefers a GSSAPI or SSPI provider that happens to be installed.
_OPTIONS = {"ntlm": spnego.NegotiateOptions.use_ntlm, "negotiate": spnego.NegotiateOptions.use_negotiate}


class PyspnegoInitiator(_Context):
    """A login by pyspnego's own NTLM, raw or under its own SPNEGO."""

    def __init__(self, protocol: str, username: str, password: str, domain: str) -> None:
        # Under SPNEGO it tries Kerberos with the password first, as it does for everybody; `fixtures.no_public_realms`
        # sees to it that no realm is asked for it.
        super().__init__(
            spnego.client(
                f"{domain}\\{username}" if domain else username,
                password,
                hostname="localhost",
                service="host",
                protocol=protocol,
                options=_OPTIONS[protocol],
            )
        )


class PyspnegoAcceptor(_Context):
    """The other side. Who may log in stands in the file that NTLM_USER_FILE names."""

    def __init__(self, protocol: str) -> None:
        super().__init__(spnego.server(protocol=protocol, options=_OPTIONS[protocol]))

    @property
    def client(self) -> str | None:
        return self._context.client_principal


def available() -> str | None:
    """Always there."""
    return None  # a dependency of the library itself


PYSPNEGO_NTLM = PeerKind(
    name="pyspnego-ntlm",
    mechanism="ntlm",
    spnego=False,
    sends_mic=True,
    sets_seal=True,
    eszett="SS",
    blob_tail=True,
    seals_empty=True,
    probe=available,
    make=partial(PyspnegoInitiator, "ntlm"),
)
PYSPNEGO_NEGOTIATE = PeerKind(
    name="pyspnego-negotiate",
    mechanism="ntlm",
    spnego=True,
    sends_mic=True,
    sets_seal=True,
    eszett="SS",
    blob_tail=True,
    seals_empty=True,
    probe=available,
    make=partial(PyspnegoInitiator, "negotiate"),
)
