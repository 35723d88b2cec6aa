"""Messages with their length in front (u32, little-endian), as the servers here written in Python read and write them."""

import struct
from collections.abc import Iterable

READ_SIZE = 65536

_length = struct.Struct("<I")
_pack, _unpack_from = _length.pack, _length.unpack_from


def split(data: bytes) -> tuple[list[bytes], bytes]:
    """The whole messages at the front of what has arrived, and the rest."""
    messages = []
    at, end = 0, len(data) - 4
    while at <= end:
        start = at + 4
        stop = start + _unpack_from(data, at)[0]
        if stop > end + 4:
            break
        messages.append(data[start:stop])
        at = stop
    return messages, data[at:]


def join(messages: Iterable[bytes]) -> bytes:
    """Each message with its length, in one buffer."""
    return b"".join([part for message in messages for part in (_pack(len(message)), message)])
