"""Foreign acceptors: servers that this project did not write, behind one small blocking interface.

Our client must not only understand our own server. `NTLM_ACCEPTORS` lists those that take NTLM logins; `wire` and
the functions here speak the two wire formats with them, over a blocking socket.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from . import gssapi_peer, ntlm_auth_peer, pyspnego_peer, sspi_rs_peer, wire
from .base import PeerError, Sealing


class Acceptor(Sealing, Protocol):
    """One login seen from the side of somebody else's implementation. See `peers.base.Initiator` for details."""

    @property
    def complete(self) -> bool: ...

    @property
    def client(self) -> str | None:
        """Who has logged in, once complete."""

    def step(self, token: bytes) -> bytes | None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptorKind:
    """One foreign implementation.

    Attributes:
        name: The id of parametrised tests.
        spnego: Whether the tokens are SPNEGO's; else they are NTLM's own.
        eszett: See `peers.base.PeerKind`.
        seals_empty: Whether it can seal an empty message, and so say the authenticated goodbye.
        user_file: Whether it finds its accounts by NTLM_USER_FILE, and not in its arguments.
        probe: Why it cannot run here, or None.
        make: Starts, given user name, password and domain of the one account.
    """

    name: str
    spnego: bool
    eszett: Literal["SS", "ß"]
    seals_empty: bool
    user_file: bool
    probe: Callable[[], str | None]
    make: Callable[[str, str, str], Acceptor]

    def available(self) -> str | None:
        """None when it can run here, else the reason."""
        return self.probe()

    def new(self, username: str, password: str, domain: str) -> Acceptor:
        """Wait for a login of this account. Close it in the end."""
        return self.make(username, password, domain)

    def __str__(self) -> str:
        return self.name


def accept_login(
    sock: socket.socket, acceptor: Acceptor, on_answer: Callable[[bytes, bool], bytes] = lambda token, _last: token
) -> None:
    """Shake hands as the acceptor.

    Args:
        sock: The connection.
        acceptor: Ours.
        on_answer: May replace each token, as somebody on the way could; is told whether it is the last.

    Raises:
        PeerError: the acceptor refuses the login.
    """
    while not acceptor.complete:
        answer = acceptor.step(wire.recv_prefixed(sock))
        if answer:
            wire.send_prefixed(sock, on_answer(answer, acceptor.complete))
        elif not acceptor.complete:
            raise PeerError("the acceptor is not done and has nothing to say")


def send_sample(sock: socket.socket, acceptor: Acceptor, message: bytes) -> None:
    """Send the one record of the `sample` format, which closing the connection ends."""
    wire.send_all(sock, wire.join_sealed(*acceptor.seal(message)))


NTLM_ACCEPTORS = [
    AcceptorKind(
        name="pyspnego-ntlm",
        spnego=False,
        eszett="SS",
        seals_empty=True,
        user_file=True,
        probe=pyspnego_peer.available,
        make=lambda *_account: pyspnego_peer.PyspnegoAcceptor("ntlm"),
    ),
    AcceptorKind(
        name="pyspnego-negotiate",
        spnego=True,
        eszett="SS",
        seals_empty=True,
        user_file=True,
        probe=pyspnego_peer.available,
        make=lambda *_account: pyspnego_peer.PyspnegoAcceptor("negotiate"),
    ),
    AcceptorKind(
        name="sspi-rs-ntlm",
        spnego=False,
        eszett="SS",
        seals_empty=True,
        user_file=False,
        probe=sspi_rs_peer.available,
        make=sspi_rs_peer.SspiRsAcceptor,
    ),
    AcceptorKind(
        name="gss-ntlmssp-raw",
        spnego=False,
        eszett="SS",
        seals_empty=False,
        user_file=True,
        probe=gssapi_peer.available,
        make=lambda *_account: gssapi_peer.GSSAPIAcceptor(gssapi_peer.NTLM),
    ),
    AcceptorKind(
        name="mit-spnego-gss-ntlmssp",
        spnego=True,
        eszett="SS",
        seals_empty=False,
        user_file=True,
        probe=gssapi_peer.available,
        make=lambda *_account: gssapi_peer.GSSAPIAcceptor(gssapi_peer.SPNEGO),
    ),
    AcceptorKind(
        name="samba-ntlm",
        spnego=False,
        eszett="ß",
        seals_empty=True,
        user_file=False,
        probe=ntlm_auth_peer.available,
        make=partial(ntlm_auth_peer.NtlmAuthAcceptor, "squid-2.5-ntlmssp"),
    ),
    AcceptorKind(
        name="samba-spnego",
        spnego=True,
        eszett="ß",
        seals_empty=True,
        user_file=False,
        probe=ntlm_auth_peer.available,
        make=partial(ntlm_auth_peer.NtlmAuthAcceptor, "gss-spnego"),
    ),
]
