"""Sealing and opening natively, over libcrypto: what NTLM and Kerberos do with messages once a context is established.

A sealer takes over from a finished context, with its keys and its numbers, and each message has the next number. A
*token* is ``trailer | ciphertext``, laid out as SSPI's `EncryptMessage` does with SECBUFFER_TOKEN and SECBUFFER_DATA; a
*frame* is ``length | trailer_length | token``, every length a u32, little-endian, counting what follows it; a *record* is
``length | token``, [MS-NNS] 2.2.2.

It is there when the package was built where OpenSSL's headers are; whoever imports it must be able to do without.

A sealer may be used by one thread for sealing and by another for opening; the loser of two that do the same gets a
`RuntimeError`. From 256 KiB in one call on, other threads run meanwhile. In a forked child a sealer must not be used if
the parent goes on using it: key streams and numbers would be used twice.
"""

from collections.abc import Iterable
from typing import final

class SealingError(Exception):
    """A message did not open, or none can be sealed any more. The text holds no secrets.

    After the first message that does not open, none ever does: its sealer refuses each with this. What was good before
    it can still be answered: sealing goes on.
    """

def available() -> dict[str, bool]:
    """For ``"ntlm"`` and ``"kerberos"``, whether libcrypto here has what they need. Found out on the first call only.

    NTLM needs RC4, which is in OpenSSL's legacy provider. That is loaded privately: nobody else gets RC4 by it. Where
    the system demands FIPS mode there is no NTLM.
    """

@final
class NTLMSealer:
    """NTLM's message security, [MS-NLMP] 3.4.4.2, with extended session security, key exchange and 128 bits.

    Both RC4 streams begin anew. So this takes over where no message was sealed or signed yet, or where SPNEGO's
    mechListMIC was, after which RC4 starts afresh and only the numbers go on.

    Args:
      session_key: the exported session key, 16 bytes.
      initiator: which side this is.
      send_sequence: the number of the first message to seal, 0..4294967295.
      receive_sequence: the number that the first message to open must have.
      encrypt: False: messages are signed only, [MS-NLMP] 3.4.4.2; one that is encrypted does not open.

    Raises:
      ValueError: the key has another length, or a number is out of range.
      RuntimeError: see `available`.
    """

    @property
    def trailer_size(self) -> int:
        """Bytes that sealing adds: 16."""

    @property
    def traffic(self) -> tuple[int, int, int, int]:
        """How many messages were sealed, of how many bytes in all, and how many opened. Empty ones do not count."""

    def __init__(
        self, session_key: bytes, *, initiator: bool, send_sequence: int, receive_sequence: int, encrypt: bool = True
    ) -> None: ...
    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        """Seal a message: (trailer, ciphertext).

        Raises:
          SealingError: there is no number left: 4294967295 was the last. (Or libcrypto has failed, now or before.)
          ValueError: the message is too long for a frame.
        """

    def seal_frames(self, messages: Iterable[bytes]) -> bytes:
        """Seal messages, in order, into frames, one behind the other in one buffer. If it raises, none was sealed.

        Raises:
          SealingError: see `seal`.
          ValueError: a message is too long for a frame.
        """

    def seal_records(self, data: bytes | bytearray | memoryview, piece: int) -> bytes:
        """Seal a stretch of a byte stream into records, one behind the other in one buffer. If it raises, none was sealed.

        Args:
          data: whatever has its bytes in one piece; none make no record.
          piece: bytes of data in each record but the last.

        Raises:
          SealingError: see `seal`.
          ValueError: there can be no record of so many bytes.
          BufferError: the bytes are not in one piece.
          TypeError: these are none.
        """

    def open(self, trailer: bytes, ciphertext: bytes) -> bytes:
        """Open a message.

        Raises:
          SealingError: it was altered, or is not the next one, or one before it did not open.
        """

    def open_frames(self, frames: list[bytes], start: int = 0) -> tuple[list[bytes], SealingError | None]:
        """Open the payloads of frames (``trailer_length | token``), in order, beginning with ``frames[start]``.

        Stops behind the first empty message, which is returned too, or before the first that does not open. No error of
        the peer's is raised: what was good comes first, and with it why there is no more.

        Raises:
          TypeError: frames is no list of bytes; then nothing was opened.
        """

    def open_records(self, tokens: list[bytes]) -> tuple[bytes, SealingError | None]:
        """Open the tokens of records, in order, into one piece of data. An empty message is no end, and adds nothing.

        Stops before the first that does not open: what was good comes first, and with it why there is no more.

        Raises:
          TypeError: tokens is no list of bytes; then nothing was opened.
        """

@final
class KerberosSealer:
    """Wrap tokens of RFC 4121, for AES (RFC 3962 and RFC 8009). In all else see `NTLMSealer`.

    Seals without filler and turned right (RRC) so that the ciphertext is as long as the message, as SSPI's buffers are.
    Opens with any filler and any rotation that is less than what it turns, divided so that the ciphertext is as long
    as the message; the flags must be exactly those of the other side, and the number the next one.

    Args:
      key: the acceptor's subkey if there is one, else the initiator's.
      enctype: the key's encryption type, 17, 18, 19 or 20.
      initiator: which side this is.
      acceptor_subkey: whether the key is the acceptor's subkey.
      send_sequence: the number of the first message to seal, up to 18446744073709551614.
      receive_sequence: the number that the first message to open must have.
      encrypt: False: messages are signed only, RFC 4121 4.2.4; one that is encrypted does not open.

    Raises:
      ValueError: the enctype is another, or its keys have another length, or a number is out of range.
      RuntimeError: see `available`.
    """

    @property
    def trailer_size(self) -> int:
        """Bytes that sealing adds: 60 for enctypes 17 and 18, 64 for 19, 72 for 20; signing 28, 28, 32 and 40."""

    @property
    def traffic(self) -> tuple[int, int, int, int]:
        """See `NTLMSealer.traffic`."""

    def __init__(
        self,
        key: bytes,
        enctype: int,
        *,
        initiator: bool,
        acceptor_subkey: bool,
        send_sequence: int,
        receive_sequence: int,
        encrypt: bool = True,
    ) -> None: ...
    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        """See `NTLMSealer.seal`."""

    def seal_frames(self, messages: Iterable[bytes]) -> bytes:
        """See `NTLMSealer.seal_frames`."""

    def open(self, trailer: bytes, ciphertext: bytes) -> bytes:
        """See `NTLMSealer.open`."""

    def open_frames(self, frames: list[bytes], start: int = 0) -> tuple[list[bytes], SealingError | None]:
        """See `NTLMSealer.open_frames`."""
    def seal_records(self, data: bytes | bytearray | memoryview, piece: int) -> bytes:
        """See `NTLMSealer.seal_records`."""

    def open_records(self, tokens: list[bytes]) -> tuple[bytes, SealingError | None]:
        """See `NTLMSealer.open_records`."""
