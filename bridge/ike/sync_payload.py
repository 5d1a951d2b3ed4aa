"""The IKE_SA_SYNC payload (draft-xu-ike-sa-sync-01 section 3.7; layout: docs/protocol.md).

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    | Next Payload  |0|  RESERVED   |         Payload Length        |
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    |C| Version = 0 | Address family|           RESERVED            |
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    |                                                               |
    |                      Old gateway's SPI (8)                    |
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    ~              Old gateway's IP address (4 or 16)               ~
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    ~        Attributes: type (2), length of value (2), value       ~
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+

The codec is of the body, which begins with C.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple

from bridge.ike.address import address_text, packed
from bridge.ike.message import MalformedMessage

_FIXED: Final = struct.Struct("!BBH8s")
_ATTRIBUTE: Final = struct.Struct("!HH")
_CHILD: Final = struct.Struct("!HI")
_FROM_GATEWAY: Final = 0x80
_VERSION: Final = 0
_ADDRESS_LENGTHS: Final = {4: 4, 6: 16}


class Attribute(IntEnum):
    PROOF = 1
    CHILD = 2
    SEALED_STUB = 3
    LIFETIME = 4
    MOVE = 5
    OLD_CHILDREN = 6
    REFUSAL = 7
    GATEWAYS = 8
    FORWARD_SECRECY = 9


_LENGTHS: Final = {Attribute.CHILD: _CHILD.size, Attribute.LIFETIME: 4, Attribute.FORWARD_SECRECY: 0}
_ONCE: Final = frozenset(
    {
        Attribute.PROOF,
        Attribute.SEALED_STUB,
        Attribute.LIFETIME,
        Attribute.MOVE,
        Attribute.OLD_CHILDREN,
        Attribute.REFUSAL,
        Attribute.GATEWAYS,
        Attribute.FORWARD_SECRECY,
    }
)
GATEWAYS_MAX: Final = 16
"""gateways named in one message at most"""
SPI_OCTETS: Final = 4
"""of an ESP SPI"""


class SyncPayload(NamedTuple):
    """`gateway` and `spi` (8 octets) are the index of the stub. `attributes` are (type, value), unknown types too."""

    from_gateway: bool
    gateway: str
    spi: bytes
    attributes: tuple[tuple[int, bytes], ...] = ()

    def encode(self) -> bytes:
        """The payload's body. Raises ValueError for an address or SPI that is none, or a value over 65535 octets."""
        address = packed(self.gateway)
        if len(self.spi) != 8:
            raise ValueError("an IKE SPI has 8 octets")
        parts = [
            _FIXED.pack(_FROM_GATEWAY if self.from_gateway else 0, 4 if len(address) == 4 else 6, 0, self.spi),
            address,
        ]
        for kind, value in self.attributes:
            if len(value) > 0xFFFF:
                raise ValueError(f"{len(value)} octets do not fit into an attribute")
            parts += (_ATTRIBUTE.pack(kind, len(value)), value)
        return b"".join(parts)

    @classmethod
    def decode(cls, body: bytes) -> SyncPayload:
        """Raises MalformedMessage: another version or address family, cut, octets left over, an attribute twice that
        may be there once, or one of a wrong length. Reserved octets are not looked at."""
        if len(body) < _FIXED.size:
            raise MalformedMessage("an IKE_SA_SYNC payload is cut")
        first, family, _, spi = _FIXED.unpack_from(body)
        if first & ~_FROM_GATEWAY != _VERSION:
            raise MalformedMessage(f"IKE_SA_SYNC version {first & ~_FROM_GATEWAY}, not 0")
        length = _ADDRESS_LENGTHS.get(family)
        if length is None:
            raise MalformedMessage(f"IKE_SA_SYNC with address family {family}, not 4 or 6")
        offset = _FIXED.size + length
        if offset > len(body):
            raise MalformedMessage("an IKE_SA_SYNC payload is cut")
        address = address_text(body[_FIXED.size : offset])
        attributes = _decode_attributes(body, offset)
        return cls(bool(first & _FROM_GATEWAY), address, spi, attributes)

    def first(self, kind: int) -> bytes | None:
        """The value of the first attribute of a type."""
        return next((value for name, value in self.attributes if name == kind), None)

    @property
    def children(self) -> tuple[tuple[int, int], ...]:
        """The CHILD attributes: (child number, ESP SPI)."""
        return tuple(_CHILD.unpack(value) for name, value in self.attributes if name == Attribute.CHILD)

    @property
    def old_children(self) -> tuple[int, ...] | None:
        """The ESP SPIs in OLD_CHILDREN, by child number; None without."""
        value = self.first(Attribute.OLD_CHILDREN)
        if value is None:
            return None
        return tuple(int.from_bytes(value[at : at + SPI_OCTETS]) for at in range(0, len(value), SPI_OCTETS))

    @property
    def gateways(self) -> tuple[str, ...]:
        """The addresses in GATEWAYS; none without."""
        return _decode_gateways(self.first(Attribute.GATEWAYS) or b"")


def _decode_attributes(body: bytes, offset: int) -> tuple[tuple[int, bytes], ...]:
    attributes: list[tuple[int, bytes]] = []
    seen: set[int] = set()
    while offset < len(body):
        if offset + _ATTRIBUTE.size > len(body):
            raise MalformedMessage("an IKE_SA_SYNC attribute is cut")
        kind, length = _ATTRIBUTE.unpack_from(body, offset)
        offset += _ATTRIBUTE.size
        if offset + length > len(body):
            raise MalformedMessage("an IKE_SA_SYNC attribute is cut")
        if kind in _ONCE and kind in seen:
            raise MalformedMessage(f"IKE_SA_SYNC attribute {kind} twice")
        if length != _LENGTHS.get(kind, length) or (kind == Attribute.OLD_CHILDREN and length % SPI_OCTETS):
            raise MalformedMessage(f"IKE_SA_SYNC attribute {kind} of {length} octets")
        if kind == Attribute.GATEWAYS:
            _decode_gateways(body[offset : offset + length])
        seen.add(kind)
        attributes.append((kind, body[offset : offset + length]))
        offset += length
    return tuple(attributes)


def encode_child(number: int, spi: int) -> tuple[int, bytes]:
    """A CHILD attribute: child number in the stub's order (16 bits), and an inbound ESP SPI (32 bits).

    Raises ValueError where one does not fit.
    """
    try:
        return Attribute.CHILD, _CHILD.pack(number, spi)
    except struct.error:
        raise ValueError("a child number has 16 bits, an ESP SPI 32") from None


def encode_old_children(spis: Sequence[int]) -> tuple[int, bytes]:
    """An OLD_CHILDREN attribute: of CHILD_SAs 0, 1, ... the ESP SPI that the old gateway received on (32 bits each)."""
    return Attribute.OLD_CHILDREN, b"".join([spi.to_bytes(SPI_OCTETS) for spi in spis])


def encode_gateways(addresses: Sequence[str]) -> tuple[int, bytes]:
    """A GATEWAYS attribute: of each gateway the address family (one octet, 4 or 6) and the address. The first
    GATEWAYS_MAX are named. Raises ValueError for what is no address."""
    octets = [packed(address) for address in addresses[:GATEWAYS_MAX]]
    return Attribute.GATEWAYS, b"".join(bytes((4 if len(one) == 4 else 6,)) + one for one in octets)


def _decode_gateways(value: bytes) -> tuple[str, ...]:
    addresses: list[str] = []
    offset = 0
    while offset < len(value):
        end = offset + 1 + _ADDRESS_LENGTHS.get(value[offset], len(value))
        if end > len(value) or len(addresses) == GATEWAYS_MAX:
            raise MalformedMessage(f"a GATEWAYS attribute of {len(value)} octets")
        addresses.append(address_text(value[offset + 1 : end]))
        offset = end
    return tuple(addresses)


def proof_offset(body: bytes) -> int | None:
    """Where the value of PROOF begins in a body that decodes; None without PROOF."""
    offset = _FIXED.size + _ADDRESS_LENGTHS[body[1]]
    while offset < len(body):
        kind, length = _ATTRIBUTE.unpack_from(body, offset)
        offset += _ATTRIBUTE.size
        if kind == Attribute.PROOF:
            return offset
        offset += length
    return None
