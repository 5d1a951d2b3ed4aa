"""IP addresses between text and octets, faster than `ipaddress`: every packet and HA message has several."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

import msgspec


def packed(text: str) -> bytes:
    """4 or 16 octets. Raises ValueError for text that is no address."""
    try:
        return inet_pton(AF_INET6 if ":" in text else AF_INET, text)
    except OSError:
        raise ValueError(f"{text!r} is not an IP address") from None


@lru_cache(4096)
def address_text(octets: bytes) -> str:
    """The canonical text of 4 or 16 octets, that of `ipaddress`. Kept: gateways and ends of
    selectors are in many packets and stubs, one string each."""
    if len(octets) == 4:
        return inet_ntop(AF_INET, octets)
    text = inet_ntop(AF_INET6, octets)
    # the two differ only on addresses that embed an IPv4 one
    return str(IPv6Address(octets)) if "." in text else text


class Pool(msgspec.Struct, frozen=True):
    """Virtual IPs that charon gives out from its memory."""

    name: str
    base: str
    """the first address"""
    size: int

    @property
    def text(self) -> str:
        """first-last"""
        return f"{self.base}-{ip_address(self.base) + max(self.size - 1, 0)}"

    def overlaps(self, other: Pool) -> bool:
        """Whether some address is in both."""
        mine, theirs = ip_address(self.base), ip_address(other.base)
        if mine.version != theirs.version:
            return False
        return int(mine) < int(theirs) + other.size and int(theirs) < int(mine) + self.size
