"""IP addresses between text and octets, faster than `ipaddress`: every packet and HA message has several."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv6Address
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton


def packed(text: str) -> bytes:
    """4 or 16 octets. Raises ValueError for text that is no address."""
    try:
        return inet_pton(AF_INET6 if ":" in text else AF_INET, text)
    except OSError:
        raise ValueError(f"{text!r} is not an IP address") from None


@lru_cache(1024)
def address_text(octets: bytes) -> str:
    """The canonical text of 4 or 16 octets, that of `ipaddress`. Kept: our own address is in every packet."""
    if len(octets) == 4:
        return inet_ntop(AF_INET, octets)
    text = inet_ntop(AF_INET6, octets)
    # the two differ only on addresses that embed an IPv4 one
    return str(IPv6Address(octets)) if "." in text else text
