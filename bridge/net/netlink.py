"""Messages of netlink(7): a header, a structure of each family's own, and attributes."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from typing import Final

# linux/netlink.h
NLMSG_ERROR: Final = 2
NLM_F_REQUEST: Final = 1
HEADER: Final = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port"""
_ERROR: Final = struct.Struct("=i")
_ATTRIBUTE: Final = struct.Struct("=HH")
"""struct nlattr: length, type; padded to four octets"""


def request(kind: int, body: bytes, flags: int = 0) -> bytes:
    """A request to the kernel of this type."""
    return HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | flags, 1, 0) + body


def error(answer: bytes) -> int | None:
    """The error number of an answer that is one, 0 for an acknowledgement; None for any other answer."""
    if len(answer) < HEADER.size or HEADER.unpack_from(answer)[1] != NLMSG_ERROR:
        return None
    return -_ERROR.unpack_from(answer, HEADER.size)[0] if len(answer) >= HEADER.size + _ERROR.size else errno.EIO


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, of a value that needs no padding."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value


def attributes(message: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """Type and value of each attribute from `offset` on, up to one that is malformed."""
    while offset + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, offset)
        if length < _ATTRIBUTE.size:
            return
        yield kind, message[offset + _ATTRIBUTE.size : offset + length]
        offset += aligned(length)


def aligned(length: int) -> int:
    """Octets that so many take with their padding."""
    return (length + 3) & ~3
