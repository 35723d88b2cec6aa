"""What every foreign initiator looks like to a test: a handful of blocking calls.

The acceptor under test must not meet only its own reflection, so each module beside this one wraps one
implementation that nobody of this project wrote. All differences between them (how a token is fetched, where
the signature lies in a sealed message) end in the adapter; a test sees `Initiator` and nothing else.

An adapter drives its library as the library's own documentation has it, and says what the library says: above all,
a login is finished when the library calls it finished, and not when the server's last token has come. Whatever makes
up for a server here is missing in everybody's programs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

# The signature in front of every message sealed with NTLM ([MS-NLMP] 2.2.2.9).
NTLM_TRAILER = 16


class PeerError(Exception):
    """The foreign implementation refused: a bad token, a bad signature, a login that it gave up."""


class Sealing(Protocol):
    """Message security, once logged in."""

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        """Return (trailer, ciphertext) as EncryptMessage lays them out in SECBUFFER_TOKEN and SECBUFFER_DATA."""

    def open(self, trailer: bytes, data: bytes) -> bytes:
        """Return the plaintext.

        Raises:
            PeerError: the signature is bad.
        """


class Initiator(Sealing, Protocol):
    """One login attempt by somebody else's implementation."""

    @property
    def complete(self) -> bool:
        """Its own view: established, and no more tokens expected."""

    def step(self, token: bytes | None) -> bytes | None:
        """Feed the acceptor's token (None at first); return the next token to send, if there is one.

        Raises:
            PeerError: the implementation refuses the token.
        """

    def close(self) -> None:
        """Free what the login holds (contexts, processes). May be called twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerKind:
    """One foreign implementation in one way of using it.

    Attributes:
        name: The id of parametrised tests.
        mechanism: The mechanism that the login ends with, as the application sees it.
        spnego: Whether the tokens are SPNEGO's; else they are NTLM's own.
        sends_mic: Whether its AUTHENTICATE message carries a MIC. Without one the acceptor needs
            `require_mic=False`.
        sets_seal: Whether NTLMSSP_NEGOTIATE_SEAL stands in the final flags. All of them seal all the same.
        eszett: How the implementation upper-cases ß in the user name before hashing: "SS" is Unicode's full
            mapping, "ß" the simple one (one code point to one), which leaves it as it is.
        blob_tail: Whether the NTLMv2 blob ends with the four zero bytes of [MS-NLMP] 3.3.2. An acceptor that
            re-serialises the blob, instead of taking it as received, refuses a peer without them.
        seals_empty: Whether it can seal an empty message, and so say the authenticated goodbye.
        splits_upn: Whether it makes of `user@realm` a user and a domain; others send it as typed, and no domain.
        optimistic: The mechanism that its first token is for, where that is not `mechanism`.
        probe: Why it cannot run here, or None. Called anew each time: it must be cheap.
        make: Starts a login, given user name, password and domain (may be empty).
    """

    name: str
    mechanism: Literal["ntlm", "kerberos"]
    spnego: bool
    sends_mic: bool
    sets_seal: bool
    eszett: Literal["SS", "ß"]
    blob_tail: bool
    seals_empty: bool
    splits_upn: bool = False
    optimistic: Literal["ntlm", "kerberos"] | None = None
    probe: Callable[[], str | None]
    make: Callable[[str, str, str], Initiator]

    def available(self) -> str | None:
        """None when it can run here, else the reason, fit for a skipped test."""
        return self.probe()

    def new(self, username: str, password: str, domain: str = "") -> Initiator:
        """Start a login attempt. Close it in the end."""
        return self.make(username, password, domain)

    def __str__(self) -> str:
        return self.name


def missing_module(module: str, package: str) -> str | None:
    """The reason to give when a Python module cannot be imported, or None."""
    try:
        __import__(module)
    except ImportError as exc:
        return f"{package} is not usable: {exc}"
    return None
