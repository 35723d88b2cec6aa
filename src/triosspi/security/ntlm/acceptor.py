"""NTLM's acceptor: pyspnego reads NEGOTIATE and writes CHALLENGE, and we verify AUTHENTICATE."""

from __future__ import annotations

from typing import Final

from .. import pyspnego_compat
from ..identity import ContextFlag
from ..mechanism import WithoutSPNEGO
from ..sealers import NTLM_TRAILER_SIZE, ProxySealer
from . import messages
from .accounts import AccountSource
from .verification import Login, NTLMPolicy, verify

# What NTLM's own flags mean in GSS-API's terms.
_SIGN_MEANS: Final = int(ContextFlag.REPLAY | ContextFlag.SEQUENCE | ContextFlag.INTEG)
_SEAL_MEANS: Final = int(ContextFlag.CONF)
_IDENTIFY_MEANS: Final = int(ContextFlag.IDENTIFY)


class NTLMAcceptor(WithoutSPNEGO):
    """One login.

    Args:
      accounts: who may log in.
      policy: what is demanded beyond the right password.

    Attributes:
      complete: see `Mechanism.complete`.
      login: who has logged in, once that is verified.
    """

    name: Final = "ntlm"
    enctype: Final = None

    def __init__(self, accounts: AccountSource, policy: NTLMPolicy) -> None:
        self._accounts = accounts
        self._policy = policy
        # For these two messages, for the mechListMICs, and for all messages where sealing is not native.
        self._proxy = pyspnego_compat.new_ntlm_acceptor()
        self._negotiate = self._challenge = b""
        self.complete = False
        self.login: Login | None = None
        self._identify = False

    @property
    def flags(self) -> int:
        """See `Mechanism.flags`."""
        flags = 0 if self.login is None else self.login.flags
        return (
            (_SIGN_MEANS if flags & messages.NEGOTIATE_SIGN else 0)
            | (_SEAL_MEANS if flags & messages.NEGOTIATE_SEAL else 0)
            | (_IDENTIFY_MEANS if self._identify else 0)
        )

    @property
    def session_key(self) -> bytes:
        """See `Mechanism.session_key`."""
        return b"" if self.login is None else self.login.session_key

    def step(self, in_token: bytes | None) -> bytes | None:
        """See `Handshake.step`.

        Raises:
          AuthenticationError: the login is refused.
          Exception: whatever pyspnego raises of a NEGOTIATE, or the account source.
        """
        token = in_token or b""
        if not self._challenge:
            self._challenge = self._proxy.step(token) or b""
            self._negotiate = token
            # AUTHENTICATE has the flags that our CHALLENGE had, too, and pyspnego's never has this one. The MIC covers both.
            self._identify = messages.asks_to_identify(token)
            return self._challenge
        message = messages.read_authenticate(token)
        account = self._accounts.lookup(message.domain, message.user) if message.user else None
        self.login = login = verify(
            message, account, self._policy, negotiate=self._negotiate, challenge=self._challenge
        )
        pyspnego_compat.give_session_key(self._proxy, login.session_key, login.flags)
        self._negotiate = self._challenge = b""
        self.complete = True
        return None

    def sign(self, data: bytes) -> bytes:
        """See `Mechanism.sign`."""
        return self._proxy.sign(data)

    def verify(self, data: bytes, mic: bytes) -> None:
        """See `Mechanism.verify`."""
        self._proxy.verify(data, mic)

    def restart_rc4(self, *, outgoing: bool) -> None:
        """See `Mechanism.restart_rc4`."""
        pyspnego_compat.restart_rc4(self._proxy, outgoing=outgoing)

    def make_sealer(self, *, encrypt: bool) -> ProxySealer:
        """See `Mechanism.make_sealer`."""
        return ProxySealer(self._proxy, NTLM_TRAILER_SIZE, encrypt=encrypt)
