"""Takes an address away from this host's interface (rtnetlink)."""

from __future__ import annotations

import socket
from typing import Final

from bridge.net.address_watch import ADDRESS, IFA_ADDRESS, IFA_LOCAL, RECEIVE, RTM_DELADDR, present
from bridge.net.netlink import attribute, error, request

_NLM_F_ACK: Final = 4
"""linux/netlink.h"""


def remove(address: str) -> None:
    """Take an address away that an interface has by itself, as charon gives it a virtual IP: not one with a network.
    Raises OSError, where no interface has it so too."""
    interface = present().get(address, 0)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    octets = socket.inet_pton(family, address)
    body = ADDRESS.pack(family, 8 * len(octets), 0, 0, interface)
    # with both attributes the prefix length counts for IPv4 too
    body += attribute(IFA_ADDRESS, octets) + attribute(IFA_LOCAL, octets)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.send(request(RTM_DELADDR, body, _NLM_F_ACK))
        answer = sock.recv(RECEIVE)
    if code := error(answer):
        raise OSError(code, f"the kernel keeps the address {address}")
