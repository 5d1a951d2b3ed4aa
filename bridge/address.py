"""IP addresses between text and octets, faster than `ipaddress`: every packet and HA message has several."""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_pton


def packed(text: str) -> bytes:
    """4 or 16 octets. Raises ValueError for text that is no address."""
    try:
        return inet_pton(AF_INET6 if ":" in text else AF_INET, text)
    except OSError:
        raise ValueError(f"{text!r} is not an IP address") from None
