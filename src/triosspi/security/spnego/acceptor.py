"""SPNEGO's acceptor, RFC 4178: which mechanism, and the proof that no attacker has taken a better one away.

pyspnego has an acceptor for it, too. That one takes the client's word for things that must be demanded, reads ASN.1
leniently, and takes 120 to 160 microseconds a login for it; this is strict, and takes a tenth.
"""

# The exchange, as an acceptor sees it (4.2, and 5 for the MIC):
#
#   NegTokenInit  mechTypes, and a guess: the first token of the first mechanism
#   -> NegTokenResp  state, the chosen mechanism, its answer
#   NegTokenResp  the mechanism's next token; with its last one the mechListMIC
#   -> NegTokenResp  accept-completed, our mechListMIC
#
# The mechTypes are sent in the clear. The mechListMIC is a signature over them by the finished mechanism; so
# an attacker who removed Kerberos from the list would have to forge NTLM's signature. It may be left out only
# when the client's first choice was taken, and NTLM's clients never do leave it out (`policy`).
#
# The state of our first answer is how the client learns when it is done, so it must be true. After
# accept-incomplete a client may take the mechanism's last token for the end of all: .NET's does, and would read
# our MIC as the first message. So wherever a MIC of ours is to come, the state is request-mic; and where it is
# not, none is sent unless the client has sent its own.

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from ..._errors import AuthenticationError
from ..mechanism import Mechanism
from .tokens import (
    ACCEPT_COMPLETED,
    ACCEPT_INCOMPLETE,
    OID_KERBEROS,
    OID_MS_KERBEROS,
    OID_NTLM,
    REJECT,
    REQUEST_MIC,
    read_neg_token_init,
    read_neg_token_resp,
    write_neg_token_resp,
)

_MECHANISMS: Final = {OID_KERBEROS: "kerberos", OID_MS_KERBEROS: "kerberos", OID_NTLM: "ntlm"}


class SPNEGOAcceptor:
    """One login.

    Args:
      factories: for each mechanism, ``"kerberos"`` or ``"ntlm"``, in the order of our preference, what
          makes its context.

    Attributes:
      complete: the mechanism has authenticated the client, and the MICs that were due are verified.
      inner: the chosen mechanism's context.
      first_offer_chosen: the chosen mechanism is the one that the client wants most.
      mic_sent: our mechListMIC has gone.
      mic_verified: the client's mechListMIC has been verified.
    """

    def __init__(self, factories: Mapping[str, Callable[[], Mechanism]]) -> None:
        self._factories = factories
        self._mech_types = b""
        self._mic_due = False
        self.complete = False
        self.inner: Mechanism | None = None
        self.first_offer_chosen = False
        self.mic_sent = False
        self.mic_verified = False

    def step(self, in_token: bytes | None) -> bytes | None:
        """Take the client's token, give the answer.

        Raises:
          AuthenticationError: malformed, or against the protocol.
          Exception: whatever the mechanism raises.
        """
        in_token = in_token or b""
        if self.inner is None:
            return self._begin(in_token)
        return self._go_on(self.inner, in_token)

    def _begin(self, data: bytes) -> bytes:
        first = read_neg_token_init(data)
        # The MIC is over these bytes, as they came.
        self._mech_types = first.mech_types
        names = [_MECHANISMS.get(oid) for oid in first.offered]
        chosen = next((mechanism for mechanism in self._factories if mechanism in names), None)
        if chosen is None:
            raise AuthenticationError("the client offers no mechanism that is enabled here")
        self.inner = inner = self._factories[chosen]()
        self.first_offer_chosen = names[0] == chosen
        self._mic_due = chosen == "ntlm" or not self.first_offer_chosen
        # A guess for another mechanism than the chosen one is to be ignored (4.2.1), not fed to it.
        answer = inner.step(first.mech_token) if first.mech_token and self.first_offer_chosen else None
        # The OID as the client has it, which may be an alias.
        oid = first.offered[names.index(chosen)]
        mic = self._make_mic(inner) if inner.complete and self._mic_due else None
        self.complete = inner.complete and not self._mic_due
        state = ACCEPT_COMPLETED if self.complete else REQUEST_MIC if self._mic_due else ACCEPT_INCOMPLETE
        return write_neg_token_resp(state, mechanism=oid, token=answer, mic=mic)

    def _go_on(self, inner: Mechanism, data: bytes) -> bytes | None:
        state, names_mechanism, token, mic = read_neg_token_resp(data)
        if state == REJECT:
            raise AuthenticationError("SPNEGO: the client rejects")
        if names_mechanism:
            # Only the acceptor says which mechanism it is.
            raise AuthenticationError("SPNEGO: the client names a mechanism")
        answer = None
        if token and not inner.complete:
            answer = inner.step(token)
        # Very old clients send the token once more in the place of the MIC.
        if mic is not None and mic != token:
            self._verify_mic(inner, mic)
        if not inner.complete:
            if state == ACCEPT_COMPLETED or not token:
                raise AuthenticationError("the peer says that it is done, but nobody has authenticated")
            return write_neg_token_resp(ACCEPT_INCOMPLETE, token=answer)
        return self._finish(inner, state, answer)

    def _finish(self, inner: Mechanism, state: int | None, answer: bytes | None) -> bytes | None:
        """The mechanism is done. Are we?"""
        if self._mic_due and not self.mic_verified and (state == ACCEPT_COMPLETED or self.mic_sent):
            raise AuthenticationError("the client's mechListMIC is missing")
        said_all = self.mic_sent
        our_mic = self._make_mic(inner) if (self._mic_due or self.mic_verified) and not said_all else None
        self.complete = self.mic_verified or not self._mic_due
        if said_all:
            return None
        return write_neg_token_resp(ACCEPT_COMPLETED if self.complete else ACCEPT_INCOMPLETE, token=answer, mic=our_mic)

    def _make_mic(self, inner: Mechanism) -> bytes:
        mic = inner.sign(self._mech_types)
        inner.restart_rc4(outgoing=True)
        self.mic_sent = True
        return mic

    def _verify_mic(self, inner: Mechanism, mic: bytes) -> None:
        if not inner.complete:
            raise AuthenticationError("SPNEGO: a mechListMIC before there is a key")
        inner.verify(self._mech_types, mic)
        inner.restart_rc4(outgoing=False)
        self.mic_verified = True
