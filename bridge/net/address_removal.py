"""Takes an address away from this host's interface (rtnetlink)."""

from __future__ import annotations

import socket
import struct
from typing import Final

from bridge.net import address_watch
from bridge.net.netlink import HEADER, NLMSG_ERROR, attribute, request

# linux/netlink.h, linux/rtnetlink.h, linux/if_addr.h
_RTM_DELADDR: Final = 21
_NLM_F_ACK: Final = 4
_ADDRESS: Final = struct.Struct("=BBBBI")
"""struct ifaddrmsg: family, prefix length, flags, scope, interface"""
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
"""with both, the prefix length counts for IPv4 too"""
_ERROR: Final = struct.Struct("=i")
_RECEIVE: Final = 1 << 16


def remove(address: str) -> None:
    """Take an address away that an interface has by itself, as charon gives it a virtual IP: not one with a network.
    Raises OSError, where no interface has it so too."""
    interface = address_watch.present().get(address, 0)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    octets = socket.inet_pton(family, address)
    body = _ADDRESS.pack(family, 8 * len(octets), 0, 0, interface)
    body += attribute(_IFA_ADDRESS, octets) + attribute(_IFA_LOCAL, octets)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.send(request(_RTM_DELADDR, body, _NLM_F_ACK))
        answer = sock.recv(_RECEIVE)
    _, kind, *_ = HEADER.unpack_from(answer)
    if kind == NLMSG_ERROR and (code := _ERROR.unpack_from(answer, HEADER.size)[0]):
        raise OSError(-code, f"the kernel keeps the address {address}")
