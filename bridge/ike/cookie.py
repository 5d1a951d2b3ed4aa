"""Cookies, by which a gateway under load makes sure of a client's address before it works for it (RFC 7296 section
2.6). No I/O, and no state but the secrets.

    Initiator                                   Responder
    HDR(SPIi, 0), SAi1, KEi, Ni, SYN      -->
                                          <--   HDR(SPIi, 0), N(COOKIE)
    HDR(SPIi, 0), N(COOKIE), SAi1, KEi, Ni, SYN  -->

    COOKIE = number of the secret (1) | keyed BLAKE2s-128(source address | source port | SPIi | Ni)

What stands before that check meets every packet of a flood, so it is one pass over the payloads, and one hash.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from typing import Final, NamedTuple

from bridge.ike.message import (
    HEADER,
    MAX_NONCE,
    MAX_PAYLOADS,
    MIN_NONCE,
    PAYLOAD_HEADER,
    VERSION,
    ExchangeType,
    Flag,
    MalformedMessage,
    NotifyType,
    PayloadType,
)

SECRET_SECONDS = 60.0
"""a secret makes cookies for so long, and its cookies are taken for as long again"""
_SECRET_OCTETS: Final = 32
_DIGEST_OCTETS: Final = 16
COOKIE_OCTETS: Final = 1 + _DIGEST_OCTETS
_NOTIFY: Final = struct.pack("!BBHBBH", 0, 0, 8 + COOKIE_OCTETS, 0, 0, NotifyType.COOKIE)
"""payload header and body of a Notify payload up to its data (section 3.10)"""
_HEAD: Final = bytes(8) + struct.pack(
    "!BBBBII",
    PayloadType.NOTIFY,
    VERSION,
    ExchangeType.IKE_SA_INIT,
    Flag.RESPONSE,
    0,
    HEADER.size + len(_NOTIFY) + COOKIE_OCTETS,
)
"""an IKE header behind SPIi"""

# plain numbers: comparing with enums takes far longer
_INIT, _RESPONSE = int(ExchangeType.IKE_SA_INIT), int(Flag.RESPONSE)
_NONE, _NONCE, _NOTIFICATION, _SYNC = (
    int(kind) for kind in (PayloadType.NONE, PayloadType.NONCE, PayloadType.NOTIFY, PayloadType.SYNC)
)
_SEALED = (int(PayloadType.SK), int(PayloadType.SKF))
_SYNC_MARK: Final = bytes((_SYNC,))
_COOKIE_MARK: Final = b"\0" + NotifyType.COOKIE.to_bytes(2)
"""in a COOKIE notification, behind the protocol ID, which is ignored without an SPI (section 3.10)"""


class Glance(NamedTuple):
    """What of a request with IKE_SA_SYNC a cookie is made of and compared with; all else is not looked at yet."""

    spi_i: bytes
    nonce: bytes
    cookie: bytes | None
    """of a COOKIE notification in front of all other payloads, where RFC 7296 wants it"""


def glance(data: bytes) -> Glance | None:
    """What a first look at an IKE message shows; None for all but IKE_SA_INIT requests with IKE_SA_SYNC.

    Raises MalformedMessage where the payloads are cut or more than MAX_PAYLOADS, or Ni is missing or of a wrong length.
    """
    end = len(data)
    # most requests for a full handshake do not even hold that octet
    if end < HEADER.size or data[18] != _INIT or data[19] & _RESPONSE or _SYNC_MARK not in data:
        return None
    kind, at, left = data[16], HEADER.size, MAX_PAYLOADS
    found, nonce, cookie = False, b"", None
    unpack = PAYLOAD_HEADER.unpack_from
    while kind != _NONE:
        if at + 4 > end or not left:
            raise MalformedMessage("the payload chain is cut, or too long")
        following, _, length = unpack(data, at)
        stop = at + length
        if length < 4 or stop > end:
            raise MalformedMessage(f"a payload of {length} octets does not fit")
        if kind == _SYNC:
            found = True
        elif kind == _NONCE:
            nonce = data[at + 4 : stop]
        elif kind == _NOTIFICATION and at == HEADER.size and data[at + 5 : at + 8] == _COOKIE_MARK:
            cookie = data[at + 8 : stop]
        elif kind in _SEALED:
            break
        kind, at, left = following, stop, left - 1
    if not found:
        return None
    if not MIN_NONCE <= len(nonce) <= MAX_NONCE:
        raise MalformedMessage(f"a nonce of {len(nonce)} octets")
    return Glance(data[:8], nonce, cookie)


class Cookies:
    """Makes cookies, and knows its own again. `now` is monotonic seconds throughout."""

    def __init__(self) -> None:
        self._number = 0
        self._secret = self._before = os.urandom(_SECRET_OCTETS)
        self._until = float("-inf")

    def challenge(self, seen: Glance, address: str, port: int, now: float) -> bytes:
        """The answer to a request from `address` and `port` that asks for it again, with a cookie."""
        self._turn(now)
        digest = _digest(self._secret, seen, address, port)
        return b"".join((seen.spi_i, _HEAD, _NOTIFY, bytes((self._number,)), digest))

    def valid(self, seen: Glance, address: str, port: int, now: float) -> bool:
        """Whether the request holds a cookie that was made here, for this SPIi and Ni, and was sent to this address."""
        cookie = seen.cookie
        if cookie is None or len(cookie) != COOKIE_OCTETS:
            return False
        self._turn(now)
        if cookie[0] == self._number:
            secret = self._secret
        elif cookie[0] == (self._number - 1) & 0xFF:
            secret = self._before
        else:
            return False
        return hmac.compare_digest(_digest(secret, seen, address, port), cookie[1:])

    def _turn(self, now: float) -> None:
        """A fresh secret when it is time."""
        if now < self._until:
            return
        stale = now >= self._until + SECRET_SECONDS
        self._before = os.urandom(_SECRET_OCTETS) if stale else self._secret
        self._secret = os.urandom(_SECRET_OCTETS)
        self._number = (self._number + 1) & 0xFF
        self._until = now + SECRET_SECONDS


def _digest(secret: bytes, seen: Glance, address: str, port: int) -> bytes:
    # no two inputs give the same octets: the address ends with a character it does not have, port and SPIi are of
    # fixed lengths, and the nonce is what is left
    octets = b"".join((address.encode(), b"|", port.to_bytes(2), seen.spi_i, seen.nonce))
    return hashlib.blake2s(octets, key=secret, digest_size=_DIGEST_OCTETS).digest()
