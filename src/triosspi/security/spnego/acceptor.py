"""SPNEGO's acceptor, RFC 4178: which mechanism, and the proof that nobody took a better one away.

The mechanisms' own steps are pyspnego's. What stands around them is here, and not pyspnego's too, because
its acceptor takes the client's word for things that must be demanded, reads ASN.1 leniently, and takes 120 to
160 microseconds a login for it; this is strict, and takes a tenth.
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
from typing import Final, Protocol

from ..._errors import AuthenticationError

# DER contents of the mechanisms' OIDs. Windows lists Kerberos first under a number that was once a typing
# error, and wants it back in the answer.
OID_KERBEROS: Final = bytes.fromhex("2a864886f712010202")
OID_MS_KERBEROS: Final = bytes.fromhex("2a864882f712010202")
OID_NTLM: Final = bytes.fromhex("2b06010401823702020a")
_OID_SPNEGO: Final = bytes.fromhex("2b0601050502")
_MECHANISMS: Final = {OID_KERBEROS: "kerberos", OID_MS_KERBEROS: "kerberos", OID_NTLM: "ntlm"}

_ACCEPT_COMPLETED, _ACCEPT_INCOMPLETE, _REJECT, _REQUEST_MIC = range(4)

# More than anybody offers; Windows has five.
_MOST_MECHANISMS: Final = 32

_APPLICATION_0: Final = 0x60
_CONTEXT: Final = 0xA0  # + the number of the field
_SEQUENCE: Final = 0x30
_OCTET_STRING: Final = 0x04
_OID: Final = 0x06
_ENUMERATED: Final = 0x0A
_LONG_LENGTH: Final = 0x80
_MOST_LENGTH_BYTES: Final = 4


class Mechanism(Protocol):
    """What is needed of a mechanism's context."""

    @property
    def complete(self) -> bool:
        """Whether it has authenticated the client."""

    def step(self, in_token: bytes) -> bytes | None:
        """Take the client's token, give the answer."""

    def sign(self, data: bytes) -> bytes:
        """GSS_GetMIC."""

    def verify(self, data: bytes, mic: bytes) -> int:
        """GSS_VerifyMIC; raises when it is wrong."""


# DER, as far as it is used here: definite, shortest lengths, nothing left over.


def _malformed() -> AuthenticationError:
    return AuthenticationError("SPNEGO: a malformed token")


def _read(data: bytes, at: int, end: int) -> tuple[int, int, int]:
    """The tag of the value at a position, and where its contents begin and end."""
    if at + 2 > end:
        raise _malformed()
    tag, length = data[at], data[at + 1]
    at += 2
    if length >= _LONG_LENGTH:
        size = length - _LONG_LENGTH
        if not 0 < size <= _MOST_LENGTH_BYTES or at + size > end or data[at] == 0:
            raise _malformed()
        length = int.from_bytes(data[at : at + size], "big")
        at += size
        if length < _LONG_LENGTH:
            raise _malformed()
    if length > end - at:
        raise _malformed()
    return tag, at, at + length


def _enter(data: bytes, tag: int, at: int, end: int) -> tuple[int, int]:
    """The contents of a value that must have this tag, and must be all that there is."""
    found, start, stop = _read(data, at, end)
    if found != tag or stop != end:
        raise _malformed()
    return start, stop


def _fields(data: bytes, at: int, end: int) -> dict[int, tuple[int, int]]:
    """The fields [0], [1], ... of a sequence, in their order, each at most once."""
    at, end = _enter(data, _SEQUENCE, at, end)
    fields: dict[int, tuple[int, int]] = {}
    last = _CONTEXT - 1
    while at < end:
        tag, start, stop = _read(data, at, end)
        if tag <= last:
            raise _malformed()
        fields[tag - _CONTEXT] = (start, stop)
        last, at = tag, stop
    return fields


def _octets(data: bytes, field: tuple[int, int] | None) -> bytes | None:
    if field is None:
        return None
    start, stop = _enter(data, _OCTET_STRING, *field)
    return data[start:stop]


def _write(tag: int, contents: bytes) -> bytes:
    size = len(contents)
    if size < _LONG_LENGTH:
        return bytes((tag, size)) + contents
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, _LONG_LENGTH | len(length))) + length + contents


class SPNEGOAcceptor:
    """One login.

    Args:
      factories: for each mechanism, ``"kerberos"`` or ``"ntlm"``, in the order of our preference, what
          makes its context.
      reset: called with a context after each MIC, and whether that was an outgoing one: NTLM then begins
          its RC4 anew ([MS-SPNG] 3.3.5.1).

    Attributes:
      complete: the mechanism has authenticated the client, and the MICs that were due are verified.
      inner: the chosen mechanism's context.
      first_offer_chosen: the chosen mechanism is the one that the client wants most.
      mic_sent: our mechListMIC has gone.
      mic_verified: the client's mechListMIC has been verified.
    """

    def __init__(
        self, factories: Mapping[str, Callable[[], Mechanism]], reset: Callable[[Mechanism, bool], None]
    ) -> None:
        self._factories = factories
        self._reset = reset
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
        at, end = 0, len(data)
        if data[:1] == bytes((_APPLICATION_0,)):
            at, end = _enter(data, _APPLICATION_0, at, end)
            tag, start, at = _read(data, at, end)
            if tag != _OID or data[start:at] != _OID_SPNEGO:
                raise _malformed()
        fields = _fields(data, *_enter(data, _CONTEXT, at, end))
        if 0 not in fields:
            raise _malformed()
        offered = self._read_mech_types(data, *fields[0])
        guess = _octets(data, fields.get(2))
        names = [_MECHANISMS.get(oid) for oid in offered]
        chosen = next((mechanism for mechanism in self._factories if mechanism in names), None)
        if chosen is None:
            raise AuthenticationError("the client offers no mechanism that is enabled here")
        self.inner = inner = self._factories[chosen]()
        self.first_offer_chosen = names[0] == chosen
        self._mic_due = chosen == "ntlm" or not self.first_offer_chosen
        # A guess for another mechanism than the chosen one is to be ignored (4.2.1), not fed to it.
        answer = inner.step(guess) if guess and self.first_offer_chosen else None
        # The OID as the client has it, which may be an alias.
        oid = offered[names.index(chosen)]
        mic = self._make_mic(inner) if inner.complete and self._mic_due else None
        self.complete = inner.complete and not self._mic_due
        state = _ACCEPT_COMPLETED if self.complete else _REQUEST_MIC if self._mic_due else _ACCEPT_INCOMPLETE
        return _response(state, oid, answer, mic)

    def _read_mech_types(self, data: bytes, at: int, end: int) -> list[bytes]:
        # The MIC is over these bytes, as they came.
        self._mech_types = data[at:end]
        at, end = _enter(data, _SEQUENCE, at, end)
        offered: list[bytes] = []
        while at < end:
            tag, start, at = _read(data, at, end)
            if tag != _OID or len(offered) == _MOST_MECHANISMS:
                raise _malformed()
            offered.append(data[start:at])
        if not offered:
            raise _malformed()
        return offered

    def _go_on(self, inner: Mechanism, data: bytes) -> bytes | None:
        fields = _fields(data, *_enter(data, _CONTEXT + 1, 0, len(data)))
        state = None
        if 0 in fields:
            start, stop = _enter(data, _ENUMERATED, *fields[0])
            state = int.from_bytes(data[start:stop], "big")
        if state == _REJECT:
            raise AuthenticationError("SPNEGO: the client rejects")
        if 1 in fields:
            # Only the acceptor says which mechanism it is.
            raise AuthenticationError("SPNEGO: the client names a mechanism")
        token, mic = _octets(data, fields.get(2)), _octets(data, fields.get(3))
        answer = None
        if token and not inner.complete:
            answer = inner.step(token)
        # Very old clients send the token once more in the place of the MIC.
        if mic is not None and mic != token:
            self._verify_mic(inner, mic)
        if not inner.complete:
            if state == _ACCEPT_COMPLETED or not token:
                raise AuthenticationError("the peer says that it is done, but nobody has authenticated")
            return _response(_ACCEPT_INCOMPLETE, None, answer, None)
        return self._finish(inner, state, answer)

    def _finish(self, inner: Mechanism, state: int | None, answer: bytes | None) -> bytes | None:
        """The mechanism is done. Are we?"""
        if self._mic_due and not self.mic_verified and (state == _ACCEPT_COMPLETED or self.mic_sent):
            raise AuthenticationError("the client's mechListMIC is missing")
        said_all = self.mic_sent
        our_mic = self._make_mic(inner) if (self._mic_due or self.mic_verified) and not said_all else None
        self.complete = self.mic_verified or not self._mic_due
        if said_all:
            return None
        return _response(_ACCEPT_COMPLETED if self.complete else _ACCEPT_INCOMPLETE, None, answer, our_mic)

    def _make_mic(self, inner: Mechanism) -> bytes:
        mic = inner.sign(self._mech_types)
        self._reset(inner, True)
        self.mic_sent = True
        return mic

    def _verify_mic(self, inner: Mechanism, mic: bytes) -> None:
        if not inner.complete:
            raise AuthenticationError("SPNEGO: a mechListMIC before there is a key")
        inner.verify(self._mech_types, mic)
        self._reset(inner, False)
        self.mic_verified = True


def _response(state: int, mechanism: bytes | None, token: bytes | None, mic: bytes | None) -> bytes:
    """A NegTokenResp, 4.2.2."""
    contents = _write(_CONTEXT, _write(_ENUMERATED, bytes((state,))))
    if mechanism is not None:
        contents += _write(_CONTEXT + 1, _write(_OID, mechanism))
    if token:
        contents += _write(_CONTEXT + 2, _write(_OCTET_STRING, token))
    if mic is not None:
        contents += _write(_CONTEXT + 3, _write(_OCTET_STRING, mic))
    return _write(_CONTEXT + 1, _write(_SEQUENCE, contents))
