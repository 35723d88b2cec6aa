"""The part of a PAC that says who the client is: KERB_VALIDATION_INFO, [MS-PAC] 2.5, in NDR, [C706] 14.

Only what authorisation needs is read: the user's and the groups' SIDs. The bytes were signed by the KDC,
and the Kerberos library has verified that; still every length is checked, since the KDC of a trusted
realm is run by others.
"""

# NDR in short. A structure's fixed part comes first, pointers in it as 4 bytes ("referents", zero for
# none); what they point at follows behind in the order of the pointers, each aligned to its own needs. An
# array has its number of elements in front (conformant); a string also an offset and a length (varying).
# Around it stand two headers of 8 bytes ([MS-RPCE] 2.2.6).

from __future__ import annotations

import struct
from typing import Final

from ..._errors import AuthenticationError
from ..identity import PAC

_HEADERS_SIZE: Final = 16
_LITTLE_ENDIAN: Final = 0x10
# More groups than a token of 64 KiB can hold.
_MOST_GROUPS: Final = 65_536
_MOST_SUBAUTHORITIES: Final = 15
# SE_GROUP_ENABLED; a group that is not only denies.
_ENABLED: Final = 0x00000004
# UserFlags, 2.5: extra SIDs are there; resource groups are there.
_EXTRA_SIDS: Final = 0x20
_RESOURCE_GROUPS: Final = 0x200


class _Reader:
    """Takes values off the front; whatever is not there is an error."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise AuthenticationError("the ticket's PAC ends too early")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def align(self, size: int) -> None:
        self._at += -self._at % size

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def count(self) -> int:
        number = self.u32()
        if number > _MOST_GROUPS:
            raise AuthenticationError(f"the ticket's PAC has {number} groups")
        return number

    def string_header(self) -> bool:
        """RPC_UNICODE_STRING: two lengths, a pointer."""
        self.take(4)
        return bool(self.u32())

    def string(self) -> str:
        self.align(4)
        _most, offset, length = self.u32(), self.u32(), self.count()
        if offset:
            raise AuthenticationError("the ticket's PAC has a string that begins in its middle")
        try:
            return self.take(2 * length).decode("utf-16-le")
        except UnicodeDecodeError:
            raise AuthenticationError("the ticket's PAC has a name that is not UTF-16") from None

    def sid(self) -> str:
        """RPC_SID, [MS-DTYP] 2.4.2.3, with its conformance in front."""
        self.align(4)
        subauthorities = self.u32()
        revision, number = self.take(2)
        authority = int.from_bytes(self.take(6), "big")
        if revision != 1 or number != subauthorities or number > _MOST_SUBAUTHORITIES:
            raise AuthenticationError("the ticket's PAC has a SID that is none")
        return "-".join(["S-1", str(authority), *(str(self.u32()) for _ in range(number))])

    def memberships(self) -> list[tuple[int, int]]:
        """An array of GROUP_MEMBERSHIP or KERB_SID_AND_ATTRIBUTES: a relative id or pointer, attributes."""
        self.align(4)
        number = self.count()
        return list(struct.iter_unpack("<II", self.take(8 * number)))


def read_logon_info(data: bytes) -> PAC:
    """Read a KERB_VALIDATION_INFO.

    Raises:
      AuthenticationError: it is malformed.
    """
    reader = _Reader(data)
    headers = reader.take(_HEADERS_SIZE)
    if headers[0] != 1 or headers[1] != _LITTLE_ENDIAN:
        raise AuthenticationError("the ticket's PAC is in another form of NDR")
    if not reader.u32():
        raise AuthenticationError("the ticket's PAC is empty")

    # The fixed part.
    reader.take(6 * 8)  # times of logon and password
    strings = [reader.string_header() for _ in range(6)]
    reader.take(4)  # LogonCount, BadPasswordCount
    user_id, primary_group, group_count = reader.u32(), reader.u32(), reader.u32()
    has_groups, user_flags = bool(reader.u32()), reader.u32()
    reader.take(16)  # UserSessionKey
    has_server, has_domain_name, has_domain = reader.string_header(), reader.string_header(), bool(reader.u32())
    reader.take(8 + 4 + 4 + 8 + 8 + 4 + 4)  # reserved, UserAccountControl, sub-authentication, failed logons
    extra_count, has_extra = reader.u32(), bool(reader.u32())
    has_resource_domain, resource_count, has_resources = bool(reader.u32()), reader.u32(), bool(reader.u32())

    # What the pointers point at, in their order.
    texts = [reader.string() if present else "" for present in strings]
    groups = _known(reader.memberships() if has_groups else [], group_count)
    if has_server:
        reader.string()
    domain_name = reader.string() if has_domain_name else ""
    domain = reader.sid() if has_domain else None
    extra = _known(reader.memberships() if has_extra else [], extra_count)
    extra_sids = [(reader.sid(), attributes) for pointer, attributes in extra if pointer]
    resource_domain = reader.sid() if has_resource_domain else None
    resources = _known(reader.memberships() if has_resources else [], resource_count)

    if domain is None:
        raise AuthenticationError("the ticket's PAC names no domain")
    sids = {f"{domain}-{rid}" for rid, attributes in groups if attributes & _ENABLED}
    sids.add(f"{domain}-{primary_group}")
    if user_flags & _EXTRA_SIDS:
        sids.update(sid for sid, attributes in extra_sids if attributes & _ENABLED)
    if user_flags & _RESOURCE_GROUPS and resource_domain is not None:
        sids.update(f"{resource_domain}-{rid}" for rid, attributes in resources if attributes & _ENABLED)
    return PAC(account=texts[0], domain=domain_name, sid=f"{domain}-{user_id}", groups=frozenset(sids))


def _known(memberships: list[tuple[int, int]], announced: int) -> list[tuple[int, int]]:
    if len(memberships) != announced:
        raise AuthenticationError("the ticket's PAC counts its groups wrongly")
    return memberships
