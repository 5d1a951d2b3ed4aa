"""CREATE_CHILD_SA (RFC 7296 section 1.3.1) as the load generator's clients ask for it, without PFS. No I/O."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from bridge.ike.address import packed
from bridge.ike.message import Payload, PayloadType
from bridge.ike.transforms import TransformType
from bridge.stub.types import ChildSa, TrafficSelector

PROTOCOL_ESP = 3
_KEY_LENGTH = 0x800E
_SELECTOR = struct.Struct("!BBHHH")
_GRANTED = frozenset({PayloadType.SA, PayloadType.NONCE, PayloadType.TS_I, PayloadType.TS_R})


def _proposal(child: ChildSa, spi: int) -> bytes:
    """The body of an SA payload (section 3.3) with the algorithms of `child`."""
    transforms = [(TransformType.ENCR, child.encr, child.encr_len)]
    if child.integ:
        transforms.append((TransformType.INTEG, child.integ, 0))
    transforms.append((TransformType.ESN, child.esn, 0))
    octets = b""
    for left, (kind, number, key_length) in zip(reversed(range(len(transforms))), transforms, strict=True):
        attribute = struct.pack("!HH", _KEY_LENGTH, key_length) if key_length else b""
        octets += struct.pack("!BBHBBH", 3 if left else 0, 0, 8 + len(attribute), kind, 0, number) + attribute
    head = struct.pack("!BBHBBBBI", 0, 0, 12 + len(octets), 1, PROTOCOL_ESP, 4, len(transforms), spi)
    return head + octets


def _selectors(selectors: Sequence[TrafficSelector]) -> bytes:
    """The body of a TS payload (section 3.13)."""
    octets = struct.pack("!B3x", len(selectors))
    for one in selectors:
        ends = packed(one.first) + packed(one.last)
        size = _SELECTOR.size + len(ends)
        octets += _SELECTOR.pack(one.type, one.protocol, size, one.from_port, one.to_port) + ends
    return octets


def request(child: ChildSa, spi: int, nonce: bytes) -> list[tuple[int, bytes]]:
    """The payloads that ask for `child`, which is as the gateway has it, with the client's inbound ESP SPI."""
    return [
        (PayloadType.SA, _proposal(child, spi)),
        (PayloadType.NONCE, nonce),
        (PayloadType.TS_I, _selectors(child.remote_ts)),
        (PayloadType.TS_R, _selectors(child.local_ts)),
    ]


def granted(payloads: Sequence[Payload]) -> bool:
    """Whether the payloads of an answer grant a CHILD_SA."""
    return {payload.type for payload in payloads} >= _GRANTED
