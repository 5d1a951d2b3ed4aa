"""IKE messages: header, payload chain, and the payloads that a resumption reads (RFC 7296 section 3)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple


class MalformedMessage(ValueError):
    """Octets that are no IKE message, or not the one expected; the text says why and quotes none of them."""


class ExchangeType(IntEnum):
    IKE_SA_INIT = 34
    IKE_AUTH = 35
    CREATE_CHILD_SA = 36
    INFORMATIONAL = 37
    STUB = 240
    """private use (docs/protocol.md)"""


class PayloadType(IntEnum):
    NONE = 0
    SA = 33
    KE = 34
    ID_I = 35
    ID_R = 36
    CERT = 37
    CERTREQ = 38
    AUTH = 39
    NONCE = 40
    NOTIFY = 41
    DELETE = 42
    VENDOR_ID = 43
    TS_I = 44
    TS_R = 45
    SK = 46
    CP = 47
    EAP = 48
    SKF = 53
    SYNC = 200
    """private use (docs/protocol.md)"""


class NotifyType(IntEnum):
    INVALID_MAJOR_VERSION = 5
    INVALID_KE_PAYLOAD = 17
    NO_PROPOSAL_CHOSEN = 14
    RESUMPTION_REFUSED = 8200
    """private use (docs/protocol.md), of the errors"""
    NAT_DETECTION_SOURCE_IP = 16388
    NAT_DETECTION_DESTINATION_IP = 16389
    COOKIE = 16390
    AUTH_LIFETIME = 16403
    """RFC 4478"""


class Flag(IntFlag):
    INITIATOR = 0x08
    VERSION = 0x10
    RESPONSE = 0x20


NO_SPI: Final = bytes(8)
"""in place of one that is not chosen yet"""
HEADER: Final = struct.Struct("!8s8sBBBBII")
"""SPIi, SPIr, next payload, version, exchange type, flags, message ID, length (section 3.1)"""
PAYLOAD_HEADER: Final = struct.Struct("!BBH")
"""next payload, critical bit and reserved, length (section 3.2)"""
_NOTIFY_HEADER: Final = struct.Struct("!BBH")
"""protocol ID, SPI size, notify message type (section 3.10)"""
VERSION: Final = 0x20
CRITICAL: Final = 0x80
MIN_NONCE, MAX_NONCE = 16, 256
"""octets (section 3.9)"""
MAX_PAYLOADS: Final = 64
"""in one message; no implementation sends a chain of empty payloads"""

# plain numbers: comparing with enums takes far longer
_NONE, _NOTIFY = int(PayloadType.NONE), int(PayloadType.NOTIFY)
_SEALED: Final = (int(PayloadType.SK), int(PayloadType.SKF))
_PAYLOAD_HEADER_OCTETS: Final = PAYLOAD_HEADER.size


class Header(NamedTuple):
    spi_i: bytes
    spi_r: bytes
    next_payload: int
    version: int
    exchange: int
    flags: int
    message_id: int
    length: int


class Payload(NamedTuple):
    """`offset` is where the body begins in the message."""

    type: int
    critical: bool
    body: bytes
    offset: int


class Message(NamedTuple):
    header: Header
    payloads: tuple[Payload, ...]

    def only(self, kind: int) -> Payload | None:
        """The one payload of a type, None without. Raises MalformedMessage when there are several."""
        found = [payload for payload in self.payloads if payload.type == kind]
        if len(found) > 1:
            raise MalformedMessage(f"{len(found)} payloads of type {int(kind)}")
        return found[0] if found else None

    def notifies(self, kind: int) -> list[bytes]:
        """The data of all notifications of a type (section 3.10). Raises MalformedMessage."""
        found = []
        for payload in self.payloads:
            if payload.type == _NOTIFY:
                number, data = decode_notify(payload.body)
                if number == kind:
                    found.append(data)
        return found


def parse_header(data: bytes) -> Header:
    """The header alone. Raises MalformedMessage when there is none, or the length is not that of `data`."""
    if len(data) < HEADER.size:
        raise MalformedMessage("shorter than an IKE header")
    header = Header._make(HEADER.unpack_from(data))
    if header.version >> 4 != VERSION >> 4:
        raise MalformedMessage(f"IKE version {header.version >> 4}, not 2")
    if header.length != len(data):
        raise MalformedMessage(f"the header says {header.length} octets, there are {len(data)}")
    return header


def parse(data: bytes) -> Message:
    """A whole message; an encrypted payload ends the chain. Raises MalformedMessage."""
    header = parse_header(data)
    return Message(header, parse_payloads(header.next_payload, data, HEADER.size))


def parse_payloads(kind: int, data: bytes, offset: int) -> tuple[Payload, ...]:
    """The chain that begins at `offset` with a payload of type `kind` and ends with `data`. Raises MalformedMessage."""
    payloads: list[Payload] = []
    end = len(data)
    unpack = PAYLOAD_HEADER.unpack_from
    while kind != _NONE:
        start = offset + _PAYLOAD_HEADER_OCTETS
        if start > end:
            raise MalformedMessage("the payload chain is cut")
        following, flags, length = unpack(data, offset)
        stop = offset + length
        if stop < start or stop > end:
            raise MalformedMessage(f"a payload of {length} octets does not fit")
        if len(payloads) >= MAX_PAYLOADS:
            raise MalformedMessage(f"more than {MAX_PAYLOADS} payloads")
        payloads.append(Payload(kind, flags >= CRITICAL, data[start:stop], start))
        offset = stop
        if kind in _SEALED:
            break
        kind = following
    if offset != end:
        raise MalformedMessage("octets behind the last payload")
    return tuple(payloads)


def build(
    *,
    spi_i: bytes,
    spi_r: bytes,
    exchange: int,
    flags: int,
    message_id: int,
    payloads: Sequence[tuple[int, bytes]],
) -> bytes:
    """A message of (type, body) payloads in the clear, none of them critical."""
    parts: list[bytes] = []
    following = _NONE
    for kind, body in reversed(payloads):
        parts += (body, PAYLOAD_HEADER.pack(following, 0, _PAYLOAD_HEADER_OCTETS + len(body)))
        following = kind
    parts.reverse()
    chain = b"".join(parts)
    length = HEADER.size + len(chain)
    return HEADER.pack(spi_i, spi_r, following, VERSION, exchange, flags, message_id, length) + chain


def encode_notify(kind: int, data: bytes = b"") -> bytes:
    """The body of a Notify payload about the IKE_SA itself (section 3.10)."""
    return _NOTIFY_HEADER.pack(0, 0, kind) + data


def decode_notify(body: bytes) -> tuple[int, bytes]:
    """(type, data) of a Notify payload. Raises MalformedMessage."""
    if len(body) < _NOTIFY_HEADER.size:
        raise MalformedMessage("a Notify payload is cut")
    _, spi_octets, kind = _NOTIFY_HEADER.unpack_from(body)
    if len(body) < _NOTIFY_HEADER.size + spi_octets:
        raise MalformedMessage("a Notify payload is cut")
    return kind, body[_NOTIFY_HEADER.size + spi_octets :]


def encode_ke(group: int, value: bytes) -> bytes:
    """The body of a Key Exchange payload (section 3.4)."""
    return struct.pack("!HH", group, 0) + value


def decode_ke(body: bytes) -> tuple[int, bytes]:
    """(group, public value) of a Key Exchange payload. Raises MalformedMessage."""
    if len(body) < 4:
        raise MalformedMessage("a Key Exchange payload is cut")
    return int.from_bytes(body[:2]), body[4:]


def check_nonce(body: bytes) -> bytes:
    """The body of a Nonce payload. Raises MalformedMessage unless it has 16 to 256 octets (section 3.9)."""
    if not MIN_NONCE <= len(body) <= MAX_NONCE:
        raise MalformedMessage(f"a nonce of {len(body)} octets")
    return body
