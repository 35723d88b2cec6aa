"""How an AUTHENTICATE message is read; what is refused of it in a login is in ``test_hostile.py``."""

from __future__ import annotations

import struct

import pytest

from forge import GOOD_FLAGS, UNICODE, Client
from triosspi import AuthenticationError
from triosspi.security.ntlm import messages
from triosspi.security.ntlm.messages import promises_mic, read_authenticate, read_av_pairs

CHALLENGE = (
    messages.SIGNATURE
    + struct.pack("<I", 2)
    + bytes(8)
    + struct.pack("<I", GOOD_FLAGS)
    + bytes(16)
    + struct.pack("<HHI", 4, 4, 48)
    + bytes(4)
)


def authenticate(**options: object) -> bytes:
    client = Client(**options)  # type: ignore[arg-type]
    client.negotiate()
    return client.authenticate(CHALLENGE)


def test_a_message_is_read_field_by_field() -> None:
    raw = authenticate(user="älice", domain="DOM")
    message = read_authenticate(raw)
    assert (message.user, message.domain, message.flags, message.raw) == ("älice", "DOM", GOOD_FLAGS, raw)
    assert message.lm_response == bytes(24)
    assert len(message.encrypted_session_key) == 16
    assert promises_mic(read_av_pairs(message.nt_response[16:]))


@pytest.mark.parametrize(
    ("options", "offset"),
    [
        ({}, 72),
        ({"version_field": False}, 64),
        ({"mic": "absent"}, None),
        ({"mic": "absent", "version_field": False}, None),
    ],
    ids=str,
)
def test_the_mic_stands_behind_the_version_where_there_is_room(options: dict[str, object], offset: int | None) -> None:
    assert read_authenticate(authenticate(**options)).mic_offset == offset


def test_names_in_an_oem_code_page_are_refused() -> None:
    with pytest.raises(AuthenticationError, match="OEM code page"):
        read_authenticate(authenticate(flags=GOOD_FLAGS & ~UNICODE))


@pytest.mark.parametrize("name", ["a\\b", "a:b", "a\0b"])
@pytest.mark.parametrize("field", ["user", "domain"])
def test_a_name_with_the_account_files_punctuation_is_refused(field: str, name: str) -> None:
    with pytest.raises(AuthenticationError, match=f"can be no {field} name"):
        read_authenticate(authenticate(**{field: name}))


def test_a_mic_is_promised_by_the_flag_alone() -> None:
    assert promises_mic({messages.AV_FLAGS: b"\2\0\0\0"})
    assert not promises_mic({messages.AV_FLAGS: b"\1\0\0\0"})
    assert not promises_mic({})


AV_PAIRS = {
    "a pair longer than the blob": struct.pack("<HH", 1, 0xFFFF),
    "no end": b"",
    "half a pair": b"\x01\x00\x00",
    "the same pair twice": struct.pack("<HHIHHI", 6, 4, 2, 6, 4, 0) + bytes(4),
    "an end in the middle of a pair": struct.pack("<HH", 9, 8) + bytes(4),
}


@pytest.mark.parametrize("pairs", AV_PAIRS.values(), ids=AV_PAIRS)
def test_the_reader_refuses_av_pairs_with(pairs: bytes) -> None:
    with pytest.raises(AuthenticationError, match="AV pair"):
        read_av_pairs(bytes(28) + pairs)
