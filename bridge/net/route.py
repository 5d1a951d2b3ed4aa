"""How the kernel would send packets from here to there: by which interface, and through a router or not (rtnetlink)."""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
from typing import Final

from bridge.net.netlink import HEADER, attribute, attributes, error, request

# linux/rtnetlink.h, linux/if.h
_RTM_GETROUTE: Final = 26
_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_VIA = 1, 2, 4, 5, 18
_ROUTE: Final = struct.Struct("=BBBBBBBBI")
"""struct rtmsg: family, lengths of destination and source, TOS, table, protocol, scope, type, flags"""
_TYPE: Final = 0
"""where its type is kept, among the attributes: RTA_UNSPEC, which no route has"""
_RTN_LOCAL: Final = 2
_NUMBER: Final = struct.Struct("=i")
_INTERFACE: Final = struct.Struct("16sH22x")
"""struct ifreq with flags"""
_SIOCGIFFLAGS: Final = 0x8913
_SENDS: Final = 0x1 | 0x40
"""IFF_UP, IFF_RUNNING"""
_NO_ROUTE: Final = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN})
_RECEIVE: Final = 1 << 16


def reaches(local: str, remote: str) -> bool:
    """Whether packets from `local` to `remote` have a route out of an interface with a carrier, in the network
    namespace of the caller; packets from any address, if `local` is none of this host any more. True also where the
    kernel does not say. Never raises."""
    try:
        interface = _route(local if _is_here(local) else None, remote).get(_RTA_OIF)
        return interface is None or _has_carrier(_NUMBER.unpack(interface)[0])
    except OSError as error:
        return error.errno not in _NO_ROUTE


def _is_here(address: str) -> bool:
    """Whether this host has the address, as far as the kernel says."""
    try:
        return _route(None, address)[_TYPE][0] == _RTN_LOCAL
    except OSError as error:
        return error.errno not in _NO_ROUTE


def through_router(local: str, remote: str) -> bool:
    """Whether packets from `local`, an address of this host, to `remote` go to a router first: the two are not on one
    network. True also where the kernel does not say. Never raises."""
    try:
        route = _route(local, remote)
    except OSError:
        return True
    return _RTA_GATEWAY in route or _RTA_VIA in route


def _route(local: str | None, remote: str) -> dict[int, bytes]:
    """The attributes of the kernel's route, and its _TYPE. Raises OSError where it has none."""
    family = socket.AF_INET6 if ":" in remote else socket.AF_INET
    target = socket.inet_pton(family, remote)
    bits = 8 * len(target)
    body = _ROUTE.pack(family, bits, bits if local else 0, 0, 0, 0, 0, 0, 0) + attribute(_RTA_DST, target)
    if local:
        body += attribute(_RTA_SRC, socket.inet_pton(family, local))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.send(request(_RTM_GETROUTE, body))
        answer = sock.recv(_RECEIVE)
    if (code := error(answer)) is not None:
        raise OSError(code, "the kernel has no route")
    kind_of_route = _ROUTE.unpack_from(answer, HEADER.size)[7]
    return {_TYPE: bytes([kind_of_route]), **dict(attributes(answer, HEADER.size + _ROUTE.size))}


def _has_carrier(interface: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        asked = _INTERFACE.pack(socket.if_indextoname(interface).encode(), 0)
        flags = int(_INTERFACE.unpack(fcntl.ioctl(sock, _SIOCGIFFLAGS, asked))[1])
    return flags & _SENDS == _SENDS
