"""What charon left in the kernel: ESP SAs, policies, and routes in its table, which outlive it (xfrm, rtnetlink)."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection, Iterable, Iterator
from typing import Final, NamedTuple

from bridge.ike.address import address_text, packed
from bridge.net.netlink import HEADER, NLMSG_ERROR, aligned, attribute, attributes, error, request

# linux/xfrm.h
_DELSA, _NEWPOLICY, _DELPOLICY, _GETPOLICY = 0x11, 0x13, 0x14, 0x15
_TEMPLATES, _POLICY_TYPE, _MARK, _INTERFACE_ID = 5, 16, 21, 31
"""XFRMA_TMPL, XFRMA_POLICY_TYPE, XFRMA_MARK, XFRMA_IF_ID"""
_KEPT: Final = (_POLICY_TYPE, _MARK, _INTERFACE_ID)
"""attributes that belong to the name of a policy"""
_OUT: Final = 1
"""XFRM_POLICY_OUT"""
_ESP: Final = 50
_SELECTOR: Final = struct.Struct("=16s16s8xHBBB11x")
"""struct xfrm_selector: destination, source, family, their prefix lengths, protocol"""
_POLICY: Final = struct.Struct("=56s64x32x4xIB7x")
"""struct xfrm_userpolicy_info: selector, index, direction"""
_POLICY_ID: Final = struct.Struct("=56sIB3x")
"""struct xfrm_userpolicy_id: selector, index, direction"""
_TEMPLATE: Final = struct.Struct("=16sIB3xHxx16sI16x")
"""struct xfrm_user_tmpl: destination, SPI, protocol, family, source, reqid"""
_SA_ID: Final = struct.Struct("=16sIHBx")
"""struct xfrm_usersa_id: destination, SPI, family, protocol"""

# linux/netlink.h, linux/rtnetlink.h
_NLMSG_DONE: Final = 3
_NLM_F_ACK, _NLM_F_DUMP = 4, 0x300
_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 24, 25, 26
_RTA_DST, _RTA_TABLE = 1, 15
_RTPROT_STATIC: Final = 4
_ROUTE: Final = struct.Struct("=BBBBBBBBI")
"""struct rtmsg: family, lengths of destination and source, TOS, table, protocol, scope, type, flags"""
_NOWHERE: Final = 255
"""RT_SCOPE_NOWHERE: a route of any scope"""
_RECEIVE: Final = 1 << 16
_GONE: Final = frozenset({errno.ESRCH, errno.ENOENT})


class EspSa(NamedTuple):
    """An ESP SA: where its packets go, and its SPI as a number."""

    destination: str
    spi: int


_Network = tuple[int, bytes, int]
"""family, address as 16 octets, prefix length"""
_Way = tuple[object, ...]
"""from where to where a policy is, through which tunnel, with which reqid"""


class _Template(NamedTuple):
    to: bytes
    """16 octets, of which IPv4 has the first four"""
    spi: int
    """as it is in memory"""
    family: int
    of: bytes
    reqid: int


class _Policy(NamedTuple):
    selector: bytes
    number: int
    direction: int
    name: bytes
    """the attributes that belong to its name"""
    templates: tuple[_Template, ...]
    """of ESP"""

    @property
    def destination(self) -> _Network:
        """Where it is to."""
        address, _, family, length, *_ = _SELECTOR.unpack(self.selector)
        return family, address, length

    @property
    def source(self) -> _Network:
        """Where it is from."""
        _, address, family, _, length, _ = _SELECTOR.unpack(self.selector)
        return family, address, length

    def ways(self, *, back: bool) -> list[_Way]:
        """One for each of its templates, or for the way back."""
        if back:
            return [(self.destination, self.source, one.to, one.of, one.reqid) for one in self.templates]
        return [(self.source, self.destination, one.of, one.to, one.reqid) for one in self.templates]


def remove(outbound: Collection[EspSa], inbound: Collection[EspSa], table: int) -> int:
    """Take the policies of these outbound ESP SAs out of the kernel, those of the other directions that go with them,
    the routes to their destinations in `table` that no other policy needs, and all of these SAs; how many policies that
    were. A policy that a later SA has by now stays. Blocks: the kernel lists all policies. Raises OSError."""
    sock = _open()
    if sock is None:
        return 0
    with sock:
        wanted = {(_padded(sa.destination), socket.htonl(sa.spi)) for sa in outbound}
        policies = list(_policies(sock))
        out = [each for each in policies if each.direction == _OUT]
        dead = [each for each in out if any((one.to, one.spi) in wanted for one in each.templates)]
        # the other directions name no SPI
        ways = {way for each in dead for way in each.ways(back=False)}
        back = [
            each
            for each in policies
            if each.direction != _OUT and not ways.isdisjoint((*each.ways(back=True), *each.ways(back=False)))
        ]
        for each in (*dead, *back):
            _ask(sock, _DELPOLICY, _POLICY_ID.pack(each.selector, each.number, each.direction) + each.name)
        _delete_sas(sock, (*outbound, *inbound))
    removed = {each.number for each in dead}
    needed = {each.destination for each in out if each.number not in removed}
    _remove_routes({each.destination for each in dead} - needed, table)
    return len(dead) + len(back)


def remove_sas(sas: Collection[EspSa]) -> None:
    """Take these ESP SAs out of the kernel; their policies stay. Raises OSError."""
    sock = _open()
    if sock is not None:
        with sock:
            _delete_sas(sock, sas)


def outbound(table: int) -> dict[EspSa, str]:
    """The outbound ESP SAs that policies name whose destination has a route in `table`, each with the address that its
    packets are from. Blocks: the kernel lists all policies. Raises OSError."""
    sock = _open()
    if sock is None:
        return {}
    with sock:
        policies = [each for each in _policies(sock) if each.direction == _OUT]
    routed = _routed(table) if policies else set()
    return {
        EspSa(_address(one.to, one.family), socket.ntohl(one.spi)): _address(one.of, one.family)
        for each in policies
        if each.destination in routed
        for one in each.templates
        if one.spi
    }


def _open() -> socket.socket | None:
    """None where the kernel has no IPsec: all of it was charon's own, and went with it. Raises OSError."""
    try:
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_XFRM)
    except OSError as failed:
        if failed.errno == errno.EPROTONOSUPPORT:
            return None
        raise


def _delete_sas(sock: socket.socket, sas: Iterable[EspSa]) -> None:
    for sa in sas:
        family = socket.AF_INET6 if ":" in sa.destination else socket.AF_INET
        _ask(sock, _DELSA, _SA_ID.pack(_padded(sa.destination), socket.htonl(sa.spi), family, _ESP))


def _remove_routes(destinations: Collection[_Network], table: int) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        for family, address, length in destinations:
            octets = address[: _octets(family)]
            short = table if table < 256 else 0
            body = _ROUTE.pack(family, length, 0, 0, short, _RTPROT_STATIC, _NOWHERE, 0, 0)
            body += attribute(_RTA_DST, octets) + attribute(_RTA_TABLE, struct.pack("=I", table))
            _ask(sock, _RTM_DELROUTE, body)


def _routed(table: int) -> set[_Network]:
    """The destinations that have a route in `table`."""
    found = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        for message in _dump(sock, _RTM_GETROUTE, bytes(_ROUTE.size), _RTM_NEWROUTE):
            family, length, _, _, short, *_ = _ROUTE.unpack_from(message)
            values = dict(attributes(message, _ROUTE.size))
            named = values.get(_RTA_TABLE)
            if (struct.unpack("=I", named)[0] if named else short) == table and (to := values.get(_RTA_DST)):
                found.add((family, to.ljust(16, b"\0"), length))
    return found


def _policies(sock: socket.socket) -> Iterator[_Policy]:
    return map(_read, _dump(sock, _GETPOLICY, bytes(_POLICY_ID.size), _NEWPOLICY))


def _dump(sock: socket.socket, kind: int, body: bytes, wanted: int) -> Iterator[bytes]:
    sock.send(request(kind, body, _NLM_F_DUMP))
    while True:
        data = sock.recv(_RECEIVE)
        if code := error(data):
            raise OSError(code, "the kernel does not list what it has")
        offset = 0
        while offset + HEADER.size <= len(data):
            length, kind, *_ = HEADER.unpack_from(data, offset)
            if kind in (_NLMSG_DONE, NLMSG_ERROR) or length < HEADER.size:
                return
            if kind == wanted:
                yield data[offset + HEADER.size : offset + length]
            offset += aligned(length)


def _read(message: bytes) -> _Policy:
    selector, index, direction = _POLICY.unpack_from(message)
    name, templates = b"", []
    for kind, value in attributes(message, _POLICY.size):
        if kind == _TEMPLATES:
            for to, spi, protocol, family, of, reqid in _TEMPLATE.iter_unpack(value):
                if protocol == _ESP:
                    templates.append(_Template(to, spi, family, of, reqid))
        elif kind in _KEPT:
            name += attribute(kind, value) + bytes(aligned(len(value)) - len(value))
    return _Policy(selector, index, direction, name, tuple(templates))


def _ask(sock: socket.socket, kind: int, body: bytes) -> None:
    """One request that may be about nothing. Raises OSError."""
    sock.send(request(kind, body, _NLM_F_ACK))
    if (code := error(sock.recv(_RECEIVE))) and code not in _GONE:
        raise OSError(code, "the kernel keeps what charon left")


def _padded(address: str) -> bytes:
    return packed(address).ljust(16, b"\0")


def _address(octets: bytes, family: int) -> str:
    return address_text(octets[: _octets(family)])


def _octets(family: int) -> int:
    return 16 if family == socket.AF_INET6 else 4
