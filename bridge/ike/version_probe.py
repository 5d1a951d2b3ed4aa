"""The version probe: a message that any IKE daemon answers without an SA (docs/protocol.md). No I/O.

It is an IKE header of a major version that no daemon has. RFC 7296 section 2.5: a daemon drops such a message and
notifies its sender of INVALID_MAJOR_VERSION, under the same SPIi, without protection. So the answer shows that a daemon
runs at that address, and proves nothing: what saw the probe on its way could have sent it.
"""

from __future__ import annotations

import struct
from typing import Final

from bridge.ike.message import HEADER, ExchangeType, Flag, MalformedMessage, NotifyType, PayloadType, parse

UNSUPPORTED: Final = 0x30
"""major version 3; IKEv1 is 1, IKEv2 is 2"""
SPI_OCTETS: Final = 8
_NOTIFY_TYPE: Final = struct.Struct("!2xH")
"""protocol ID, SPI size, notify message type (section 3.10)"""


def build_version_probe(spi_i: bytes) -> bytes:
    """A probe. `spi_i`: 8 random octets, by which its answer is known."""
    return HEADER.pack(spi_i, bytes(8), 0, UNSUPPORTED, ExchangeType.INFORMATIONAL, Flag.INITIATOR, 0, HEADER.size)


def answers_version_probe(data: bytes, spi_i: bytes) -> bool:
    """Whether a message is the answer to the probe with this SPIi. Never raises."""
    try:
        message = parse(data)
    except MalformedMessage:
        return False
    if message.header.spi_i != spi_i or not message.header.flags & Flag.RESPONSE:
        return False
    bodies = [payload.body for payload in message.payloads if payload.type == PayloadType.NOTIFY]
    return any(
        len(body) >= _NOTIFY_TYPE.size and _NOTIFY_TYPE.unpack_from(body) == (NotifyType.INVALID_MAJOR_VERSION,)
        for body in bodies
    )
