"""The octets of strongSwan's ha plugin: to typed attributes and back, no I/O.

One message is one datagram:

    +---------+--------+-----------+------------+-----------+-----
    | version | type   | attribute | value      | attribute | ...
    +---------+--------+-----------+------------+-----------+-----
       1 octet  1 octet  1 octet     by its kind

The version is that of the charon which sends: 3 up to strongSwan 6.0.0, 4 in 6.0.1, 5 from 6.0.2 on. From 4 on two
attributes more are in the list, which shifts all numbers behind them. Integers are big-endian.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from ipaddress import ip_address

from bridge.charon.ha_message import (
    ADDITIONAL_KEY_EXCHANGES_SINCE,
    VERSIONS,
    Attr,
    HaError,
    HaMessage,
    IkeId,
    MessageType,
    Value,
)
from bridge.ike.address import packed
from bridge.stub.types import Endpoint, Identity, TrafficSelector

MAX_MESSAGE = 2048
"""charon's receive buffer for one message, in octets (charon.plugins.ha.buflen)."""
_REMEMBERED = 4096
"""addresses, identities and selectors"""
AF_INET = 2
AF_INET6 = 10
"""Address families go over the wire as Linux numbers them."""


def _numbering(version: int) -> dict[Attr, int]:
    added = {Attr.ADD_SECRET, Attr.ALG_ADD_KES}
    names = [name for name in Attr if version >= ADDITIONAL_KEY_EXCHANGES_SINCE or name not in added]
    return {name: number for number, name in enumerate(names, start=1)}


_NUMBERS = {version: _numbering(version) for version in VERSIONS}
_NAMES = {version: {number: name for name, number in numbers.items()} for version, numbers in _NUMBERS.items()}


# What messages bring again and again is one object, not one for each SA, and is made once.


@lru_cache(maxsize=_REMEMBERED)
def _address(octets: bytes) -> str:
    return str(ip_address(octets))


@lru_cache(maxsize=_REMEMBERED)
def _identity(kind: int, octets: bytes) -> Identity:
    return Identity(kind, octets)


@lru_cache(maxsize=_REMEMBERED)
def _endpoint(address: bytes, port: int) -> Endpoint:
    return Endpoint(_address(address), port)


@lru_cache(maxsize=_REMEMBERED)
def _selector(
    kind: int, protocol: int, from_port: int, to_port: int, dynamic: int, first: bytes, last: bytes
) -> TrafficSelector:
    return TrafficSelector(kind, protocol, from_port, to_port, bool(dynamic), _address(first), _address(last))


# One kind of value each: a reader (data, offset) -> (value, next offset) and a writer value -> octets.
# Readers may raise IndexError, struct.error or ValueError on cut octets; decode() makes HaError of them.


def _integer(form: str) -> tuple[Callable[[bytes, int], tuple[int, int]], Callable[[int], bytes]]:
    codec = struct.Struct(form)

    def read(data: bytes, offset: int) -> tuple[int, int]:
        return codec.unpack_from(data, offset)[0], offset + codec.size

    return read, codec.pack


def _take(data: bytes, offset: int, length: int) -> bytes:
    end = offset + length
    if end > len(data):
        raise ValueError("cut")
    return data[offset:end]


def _read_chunk(data: bytes, offset: int) -> tuple[bytes, int]:
    length = int.from_bytes(_take(data, offset, 2))
    return _take(data, offset + 2, length), offset + 2 + length


def _write_chunk(value: bytes) -> bytes:
    return len(value).to_bytes(2) + value


def _read_text(data: bytes, offset: int) -> tuple[str, int]:
    end = data.index(b"\0", offset)
    return sys.intern(data[offset:end].decode()), end + 1


def _write_text(value: str) -> bytes:
    raw = value.encode()
    if b"\0" in raw:
        raise HaError("a configuration name cannot hold a NUL character")
    return raw + b"\0"


def _read_ike_id(data: bytes, offset: int) -> tuple[IkeId, int]:
    raw = _take(data, offset, 18)
    return IkeId(raw[1:17], raw[17] == 1), offset + 18


def _write_ike_id(value: IkeId) -> bytes:
    if len(value.spis) != 16:
        raise HaError("an IKE SPI has 8 octets")
    return b"\x02" + value.spis + (b"\x01" if value.initiator else b"\x00")


def _read_identity(data: bytes, offset: int) -> tuple[Identity, int]:
    length = data[offset + 1]
    return _identity(data[offset], _take(data, offset + 2, length)), offset + 2 + length


def _write_identity(value: Identity) -> bytes:
    if len(value.data) > 255:
        raise HaError("the ha plugin carries identities of at most 255 octets")
    return bytes((value.type, len(value.data))) + value.data


def _read_endpoint(data: bytes, offset: int) -> tuple[Endpoint, int]:
    port, family = struct.unpack_from("!HB", data, offset)
    length = {AF_INET: 4, AF_INET6: 16}[family]
    return _endpoint(_take(data, offset + 3, length), port), offset + 3 + length


def _write_endpoint(value: Endpoint) -> bytes:
    octets = packed(value.address)
    return struct.pack("!HB", value.port, AF_INET if len(octets) == 4 else AF_INET6) + octets


def _read_selector(data: bytes, offset: int) -> tuple[TrafficSelector, int]:
    kind, protocol, from_port, to_port, dynamic = struct.unpack_from("!BBHHB", data, offset)
    length = {7: 4, 8: 16}[kind]
    first, last = _take(data, offset + 7, length), _take(data, offset + 7 + length, length)
    return _selector(kind, protocol, from_port, to_port, dynamic, first, last), offset + 7 + 2 * length


def _write_selector(value: TrafficSelector) -> bytes:
    head = struct.pack("!BBHHB", value.type, value.protocol, value.from_port, value.to_port, 1 if value.dynamic else 0)
    return head + packed(value.first) + packed(value.last)


_U8 = _integer("!B")
_U16 = _integer("!H")
_U32 = _integer("!I")
_CHUNK = (_read_chunk, _write_chunk)
_TEXT = (_read_text, _write_text)
_IKE_ID = (_read_ike_id, _write_ike_id)
_IDENTITY = (_read_identity, _write_identity)
_ENDPOINT = (_read_endpoint, _write_endpoint)
_SELECTOR = (_read_selector, _write_selector)

Reader = Callable[[bytes, int], tuple[Value, int]]
Writer = Callable[[Value], bytes]

_KINDS: dict[Attr, tuple[Reader, Writer]] = {
    Attr.IKE_ID: _IKE_ID,
    Attr.IKE_REKEY_ID: _IKE_ID,
    Attr.LOCAL_ID: _IDENTITY,
    Attr.REMOTE_ID: _IDENTITY,
    Attr.REMOTE_EAP_ID: _IDENTITY,
    Attr.LOCAL_ADDR: _ENDPOINT,
    Attr.REMOTE_ADDR: _ENDPOINT,
    Attr.CONFIG_NAME: _TEXT,
    Attr.CONDITIONS: _U32,
    Attr.EXTENSIONS: _U32,
    Attr.LOCAL_VIP: _ENDPOINT,
    Attr.REMOTE_VIP: _ENDPOINT,
    Attr.PEER_ADDR: _ENDPOINT,
    Attr.INITIATOR: _U8,
    Attr.NONCE_I: _CHUNK,
    Attr.NONCE_R: _CHUNK,
    Attr.SECRET: _CHUNK,
    Attr.ADD_SECRET: _CHUNK,
    Attr.OLD_SKD: _CHUNK,
    Attr.ALG_PRF: _U16,
    Attr.ALG_OLD_PRF: _U16,
    Attr.ALG_ENCR: _U16,
    Attr.ALG_ENCR_LEN: _U16,
    Attr.ALG_INTEG: _U16,
    Attr.ALG_KE: _U16,
    Attr.ALG_ADD_KES: _CHUNK,
    Attr.IPSEC_MODE: _U8,
    Attr.IPCOMP: _U8,
    Attr.INBOUND_SPI: _U32,
    Attr.OUTBOUND_SPI: _U32,
    Attr.INBOUND_CPI: _U16,
    Attr.OUTBOUND_CPI: _U16,
    Attr.LOCAL_TS: _SELECTOR,
    Attr.REMOTE_TS: _SELECTOR,
    Attr.MID: _U32,
    Attr.SEGMENT: _U16,
    Attr.ESN: _U16,
    Attr.IKE_VERSION: _U8,
    Attr.LOCAL_DH: _CHUNK,
    Attr.REMOTE_DH: _CHUNK,
    Attr.PSK: _CHUNK,
    Attr.IV: _CHUNK,
    Attr.AUTH_METHOD: _U16,
}

_READERS: dict[int, dict[int, tuple[Attr, Reader]]] = {
    version: {number: (name, _KINDS[name][0]) for number, name in names.items()} for version, names in _NAMES.items()
}
_WRITERS: dict[int, dict[Attr, tuple[bytes, Writer]]] = {
    version: {name: (bytes((number,)), _KINDS[name][1]) for name, number in numbers.items()}
    for version, numbers in _NUMBERS.items()
}


def decode(data: bytes) -> HaMessage:
    """A datagram from charon, as a message.

    Raises HaError for anything else: another version, an unknown type or attribute, cut or trailing octets.
    """
    try:
        version = data[0]
        readers = _READERS.get(version)
        if readers is None:
            raise HaError(f"version {version} of the ha protocol is not known (3, 4 and 5 are)")
        kind = MessageType(data[1])
        attributes: list[tuple[Attr, Value]] = []
        offset, end = 2, len(data)
        while offset < end:
            name, read = readers[data[offset]]
            value, offset = read(data, offset + 1)
            attributes.append((name, value))
    except HaError:
        raise
    except (IndexError, KeyError, ValueError, struct.error):
        # from None: the original error may quote octets, and these can be keys
        raise HaError("not a message of the ha plugin, or cut") from None
    return HaMessage(version, kind, attributes)


def leading_ike_id(data: bytes) -> IkeId | None:
    """The IKE_SA that a message is about, which charon writes first; None where it does not begin with one. All else
    may be malformed."""
    if len(data) < 2 or data[0] not in _READERS:
        return None
    offset = 2
    if data[1] == MessageType.IKE_ADD:
        # IKE_VERSION is in front of it
        if data[offset : offset + 1] != bytes((_NUMBERS[data[0]][Attr.IKE_VERSION],)):
            return None
        offset += 2
    if data[offset : offset + 1] != bytes((_NUMBERS[data[0]][Attr.IKE_ID],)) or len(data) < offset + 19:
        return None
    return _read_ike_id(data, offset + 1)[0]


def encode(version: int, kind: MessageType, attributes: Iterable[tuple[Attr, Value]] = ()) -> bytes:
    """A message for a charon that speaks `version`, one datagram.

    Raises HaError when a value does not fit its attribute, the version lacks the attribute, or the message would
    not fit charon's buffer.
    """
    writers = _WRITERS.get(version)
    if writers is None:
        raise HaError(f"version {version} of the ha protocol is not known (3, 4 and 5 are)")
    parts = [bytes((version, kind))]
    try:
        for name, value in attributes:
            number, write = writers[name]
            parts.append(number)
            parts.append(write(value))
    except KeyError:
        raise HaError(f"version {version} of the ha protocol has no {name.name}") from None
    except (struct.error, OverflowError, ValueError, AttributeError, TypeError) as error:
        if isinstance(error, HaError):
            raise
        raise HaError(f"a value does not fit {name.name}") from None
    message = b"".join(parts)
    if len(message) > MAX_MESSAGE:
        raise HaError(f"the message has {len(message)} octets, charon takes {MAX_MESSAGE}")
    return message
