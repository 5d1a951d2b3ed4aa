"""Whether an identity of an HA message is the one that VICI names. No I/O.

VICI gives an identity as text, in strongSwan's own notation; HA messages give its octets. The text is made of the
octets as charon makes it, and both are compared: there is no way back from the text.
"""

from __future__ import annotations

import socket
import string
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from bridge.stub.types import Identity, IdType

LONGEST_TEXT: Final = 511
"""characters: charon cuts the text of an identity here, so that one which reaches it may be the text of another too"""

_FAMILIES: Final = {IdType.ID_IPV4_ADDR: (socket.AF_INET, 4), IdType.ID_IPV6_ADDR: (socket.AF_INET6, 16)}
_SHA1_OCTETS: Final = 20
"""a key ID of this length is shown in hex, printable or not"""
_PRINTABLE: Final = frozenset(string.printable.encode()) - frozenset(b"\t\n\r\v\f")
_SEQUENCE, _SET, _OID = 0x30, 0x31, 0x06


@lru_cache(maxsize=4096)
def is_named(identity: Identity, text: str) -> bool:
    """Whether charon writes `identity` as `text`. False for a type of identity that has no text of its own."""
    if len(text) >= LONGEST_TEXT:
        return False
    if identity.type == IdType.ID_DER_ASN1_DN:
        return _is_distinguished_name(identity.data, text)
    written = _text(identity)
    return written is not None and written == text


def _text(identity: Identity) -> str | None:
    data = identity.data
    match identity.type:
        case IdType.ID_ANY:
            return "%any"
        case IdType.ID_IPV4_ADDR | IdType.ID_IPV6_ADDR:
            family, length = _FAMILIES[IdType(identity.type)]
            return socket.inet_ntop(family, data) if len(data) == length else None
        case IdType.ID_FQDN | IdType.ID_RFC822_ADDR:
            return _shown(data)
        case IdType.ID_KEY_ID:
            if all(octet in _PRINTABLE for octet in data) and len(data) != _SHA1_OCTETS:
                return data.decode("ascii")
            return data.hex(":")
        case _:
            return None


def _shown(data: bytes) -> str:
    return "".join([chr(octet) if octet in _PRINTABLE else "?" for octet in data])


def _is_distinguished_name(data: bytes, text: str) -> bool:
    """charon writes `CN=name, OU=unit`, nothing escaped. Names of attributes differ between its releases, and are left
    out: a name whose DER is whole cannot be the beginning of a longer one."""
    try:
        values = [_shown(value) for value in _values(data)]
    except ValueError:
        return False
    at = 0
    for number, value in enumerate(values):
        if number:
            if not text.startswith(", ", at):
                return False
            at += 2
        equals = text.find("=", at)
        if equals <= at or not text.startswith(value, equals + 1):
            return False
        at = equals + 1 + len(value)
    return at == len(text)


def _values(data: bytes) -> Iterator[bytes]:
    """The attributes' values of a Name (RFC 5280 section 4.1.2.4). Raises ValueError for what is none, whole."""
    for rdn in _elements(_only(data, _SEQUENCE), _SET):
        for pair in _elements(rdn, _SEQUENCE):
            parts = list(_parts(pair))
            if len(parts) != 2 or parts[0][0] != _OID:
                raise ValueError("an attribute is a type and a value")
            yield parts[1][1]


def _only(data: bytes, tag: int) -> bytes:
    parts = list(_parts(data))
    if len(parts) != 1 or parts[0][0] != tag:
        raise ValueError("another element, or more than one")
    return parts[0][1]


def _elements(data: bytes, tag: int) -> Iterator[bytes]:
    for found, value in _parts(data):
        if found != tag:
            raise ValueError("another element")
        yield value


def _parts(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The (tag, value) pairs of DER octets. Raises ValueError where they are not whole."""
    at = 0
    while at < len(data):
        head = data[at : at + 2]
        if len(head) < 2:
            raise ValueError("cut")
        at += 2
        length = head[1]
        if length & 0x80:
            octets = length & 0x7F
            if not 1 <= octets <= 2 or at + octets > len(data):
                raise ValueError("cut, or longer than an identity can be")
            length = int.from_bytes(data[at : at + octets])
            at += octets
        if at + length > len(data):
            raise ValueError("cut")
        yield head[0], data[at : at + length]
        at += length
