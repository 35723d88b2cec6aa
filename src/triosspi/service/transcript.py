"""What Microsoft's sample server prints while it serves a client, in its words and its order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from ..channel import Endpoint
from .reasons import harmless

SEC_E_OK: Final = 0x00000000
SEC_I_CONTINUE_NEEDED: Final = 0x00090312


def hex_dump(data: bytes) -> str:
    """Bytes in the layout of the sample's PrintHexDump: 16 to a line, in hexadecimal and in ASCII."""
    lines = []
    for start in range(0, len(data), 16):
        piece = data[start : start + 16]
        digits = "".join(f"{byte:02x}{':' if column == 7 else ' '}" for column, byte in enumerate(piece))
        text = "".join(chr(byte) if 32 <= byte <= 126 else "." for byte in piece)
        # From 64 KiB on the offset has five digits: the sample lets the line begin at column 6 all the same.
        lines.append(f"{start:04x}  "[:6] + f"{digits:<48} {text}")
    return "\n".join(lines)


class Transcript:
    """The transcript of one connection; a `Tracer`.

    The sample serves one client at a time. Here many are served at once, so each one's lines are kept
    until they can be written in one piece: when the handshake has ended and when the connection has.

    Args:
      write: takes whole lines.
      dump_tokens: whether to show the bytes as well as their number. Whoever sees the tokens of a
          handshake can try passwords against them at leisure.
    """

    def __init__(self, write: Callable[[str], None], *, dump_tokens: bool = False) -> None:
        self._write = write
        self._dump_tokens = dump_tokens
        self._lines: list[str] = []
        self._established = False

    def _flush(self) -> None:
        if self._lines:
            self._write("\n".join(self._lines))
            self._lines.clear()

    def _dump(self, data: bytes) -> None:
        if self._dump_tokens and data:
            self._lines.append(hex_dump(data))

    def token_received(self, token: bytes) -> None:
        """See `Tracer`."""
        self._lines.append(f"Token buffer received ({len(token)} bytes):")
        self._dump(token)

    def token_made(self, token: bytes, established: bool) -> None:
        """See `Tracer`."""
        self._lines.append(f"Token buffer generated ({len(token)} bytes):")
        self._dump(token)
        status = SEC_E_OK if established else SEC_I_CONTINUE_NEEDED
        self._lines.append(f"AcceptSecurityContext result = 0x{status:08x}")
        self._established = established

    def authenticated(self, channel: Endpoint[Any], *, name: bool = True) -> None:
        """The handshake of this transcript's connection has succeeded.

        Args:
          channel: the connection.
          name: whether to say who it is; False where `impersonated` will.
        """
        self._lines.append(f"Package Name: {channel.package_name}")
        if name:
            self._lines.append(f"Client connected as :  {harmless(channel.peer.principal)}")
        self._flush()

    def impersonated(self, user_name: str) -> None:
        """The server was the client for a while, and is itself again.

        Args:
          user_name: who the client is on this machine.
        """
        self._lines.append("Impersonation worked. ")
        self._lines.append(f"Client connected as :  {harmless(user_name)}")
        self._lines.append("Reverted to self.")
        self._flush()

    def message_sealed(self, message: bytes, trailer: bytes, ciphertext: bytes) -> None:
        """See `Tracer`."""
        size = 4 + len(trailer) + len(ciphertext)
        if message:
            self._lines.append(f"Data before encryption: {harmless(message.decode(errors='backslashreplace'))}")
            self._lines.append(f"Length of data before encryption: {len(message)} ")
            self._lines.append("The message has been encrypted. ")
            self._lines.append(f"data after encryption including trailer ({size} bytes):")
            self._dump(len(trailer).to_bytes(4, "little") + trailer + ciphertext)
            self._lines.append(f" {size} encrypted bytes sent. ")

    def closed(self) -> None:
        """See `Tracer`."""
        if not self._established:
            self._lines.append("Could not authenticate the socket.")
        self._flush()
