"""Names of gateways, resolved as the sidecar and charon resolve them."""

from __future__ import annotations

import socket
from ipaddress import ip_address

from bridge.charon.vpns import is_address
from bridge.config import is_name


def resolve(text: str) -> list[str]:
    """The addresses that an address or a name stands for, in the resolver's order; none for a range, a subnet, or a
    name that does not resolve."""
    if is_address(text):
        return [str(ip_address(text))]
    if not is_name(text):
        return []
    try:
        found = socket.getaddrinfo(text, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(ip_address(str(row[4][0]).partition("%")[0])) for row in found))
