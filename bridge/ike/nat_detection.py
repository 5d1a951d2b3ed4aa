"""NAT detection of IKE_SA_INIT (RFC 7296 section 2.23)."""

from __future__ import annotations

import hashlib

from bridge.ike.address import packed
from bridge.ike.message import NotifyType, PayloadType, encode_notify

Addresses = tuple[str, int, str, int]
"""source address and port, destination address and port"""


def nat_hash(spi_i: bytes, spi_r: bytes, address: str, port: int) -> bytes:
    """SHA-1(SPIi | SPIr | address | port), 20 octets: the data of NAT detection (RFC 7296 section 2.23)."""
    octets = spi_i + spi_r + packed(address) + port.to_bytes(2)
    return hashlib.sha1(octets, usedforsecurity=False).digest()


def nat_notifies(spi_i: bytes, spi_r: bytes, nat: Addresses) -> list[tuple[int, bytes]]:
    """The two notifications of a message between `nat`, as payloads (type, body)."""
    src, sport, dst, dport = nat
    return [
        (
            PayloadType.NOTIFY,
            encode_notify(NotifyType.NAT_DETECTION_SOURCE_IP, nat_hash(spi_i, spi_r, src, sport)),
        ),
        (
            PayloadType.NOTIFY,
            encode_notify(NotifyType.NAT_DETECTION_DESTINATION_IP, nat_hash(spi_i, spi_r, dst, dport)),
        ),
    ]
