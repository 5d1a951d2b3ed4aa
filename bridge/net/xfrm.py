"""What charon left in the kernel: ESP SAs, policies, and routes in its table, which outlive it (xfrm, rtnetlink)."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection, Container, Iterable
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
_SELECTOR: Final = struct.Struct("=16s16s4s4sHBBB3x8s")
"""struct xfrm_selector: destination, source, ports with masks, family, prefix lengths, protocol, interface, user"""
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
_NLM_F_ACK, _NLM_F_DUMP_INTR, _NLM_F_DUMP = 4, 0x10, 0x300
_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 24, 25, 26
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_TABLE, _RTA_VIA = 1, 4, 5, 6, 15, 18
_NAMED: Final = (_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_TABLE, _RTA_VIA)
"""attributes that tell a route from others to the same destination"""
_RTPROT_STATIC, _RTN_UNICAST = 4, 1
"""what a route of charon is: not one by hand, not one that blocks"""
_ROUTE: Final = struct.Struct("=BBBBBBBBI")
"""struct rtmsg: family, lengths of destination and source, TOS, table, protocol, scope, type, flags"""
_NOWHERE: Final = 255
"""RT_SCOPE_NOWHERE: a route of any scope"""
_CODE: Final = struct.Struct("=i")
_RECEIVE: Final = 1 << 16
_DUMPS: Final = 5
"""attempts to read a list that changes meanwhile"""
_GONE: Final = frozenset({errno.ESRCH, errno.ENOENT})


class EspSa(NamedTuple):
    """An ESP SA: where its packets go, and its SPI as a number."""

    destination: str
    spi: int


_Network = tuple[int, bytes, int]
"""family, address as 16 octets, prefix length"""
_Way = tuple[object, ...]
"""which packets from where to where a policy is for, through which tunnel, with which reqid"""


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
    def id(self) -> bytes:
        """What it is named by in requests."""
        return _POLICY_ID.pack(self.selector, self.number, self.direction) + self.name

    @property
    def destination(self) -> _Network:
        """Where it is to."""
        address, _, _, _, family, length, *_ = _SELECTOR.unpack(self.selector)
        return family, address, length

    def ways(self, *, back: bool) -> list[_Way]:
        """One for each of its templates, or for the way back."""
        to, of, to_ports, of_ports, family, to_length, of_length, *rest = _SELECTOR.unpack(self.selector)
        ends = (of, of_length, of_ports), (to, to_length, to_ports)
        if back:
            return [(family, *rest, *ends[::-1], one.to, one.of, one.reqid) for one in self.templates]
        return [(family, *rest, *ends, one.of, one.to, one.reqid) for one in self.templates]

    def names(self, sas: Container[tuple[bytes, int]]) -> bool:
        """Whether it is for one of these ESP SAs."""
        return any((one.to, one.spi) in sas for one in self.templates)


def remove(outbound: Collection[EspSa], inbound: Collection[EspSa], table: int) -> int:
    """Take the policies of these outbound ESP SAs out of the kernel, those of the other directions that go with them,
    charon's routes to their destinations in `table` that no other policy needs, and all of these SAs; how many policies
    that were. A policy that a later SA has by now stays. Blocks: the kernel lists all policies. Raises OSError."""
    sock = _open()
    if sock is None:
        return 0
    with sock:
        wanted = {(_padded(sa.destination), socket.htonl(sa.spi)) for sa in outbound if sa.spi}
        policies = _policies(sock)
        out = [each for each in policies if each.direction == _OUT]
        removed, destinations = 0, set()
        with_them = _Companions(policies, [each for each in out if not each.names(wanted)])
        for dead in out:
            # charon may have replaced it since the list was read, and it keeps its number then
            if dead.names(wanted) and (now := _policy(sock, dead)) is not None and now.names(wanted):
                destinations.add(dead.destination)
                for each in (dead, *with_them.of(dead)):
                    _ask(sock, _DELPOLICY, each.id)
                    removed += 1
        _delete_sas(sock, (*outbound, *inbound))
        if destinations:
            destinations -= {each.destination for each in _policies(sock) if each.direction == _OUT}
    if destinations:
        _remove_routes(destinations, table)
    return removed


class _Companions:
    """The policies of the other directions, which name no SPI, by the outbound ones that they go with. charon counts
    reqids from 1 again after a restart: a reqid alone tells no session from another."""

    def __init__(self, policies: Iterable[_Policy], living: Iterable[_Policy]) -> None:
        self._by_way: dict[_Way, list[_Policy]] = {}
        for each in policies:
            if each.direction != _OUT:
                for way in (*each.ways(back=True), *each.ways(back=False)):
                    self._by_way.setdefault(way, []).append(each)
        self._living = {way for each in living for way in each.ways(back=False)}

    def of(self, outbound: _Policy) -> list[_Policy]:
        """Those that go with this one. Marks and XFRM interfaces may differ between the directions, unless another
        session that lives has the same selectors."""
        return list(
            {
                each.id: each
                for way in outbound.ways(back=False)
                for each in self._by_way.get(way, ())
                if way not in self._living or each.name == outbound.name
            }.values()
        )


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
    routed = {to for to, _ in _routes(table)} if policies else set()
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


def _remove_routes(destinations: Container[_Network], table: int) -> None:
    doomed = [body for to, body in _routes(table) if to in destinations]
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        for body in doomed:
            _ask(sock, _RTM_DELROUTE, body)


def _routes(table: int) -> list[tuple[_Network, bytes]]:
    """The routes in `table` that are as those of charon: their destinations, and what each is named by in requests."""
    found: list[tuple[_Network, bytes]] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        for message in _dump(sock, _RTM_GETROUTE, bytes(_ROUTE.size), _RTM_NEWROUTE):
            family, length, _, _, short, protocol, _, kind, _ = _ROUTE.unpack_from(message)
            values = dict(attributes(message, _ROUTE.size))
            named = values.get(_RTA_TABLE)
            if (struct.unpack("=I", named)[0] if named else short) != table:
                continue
            if (protocol, kind) == (_RTPROT_STATIC, _RTN_UNICAST):
                to = values.get(_RTA_DST, b"").ljust(16, b"\0")
                body = _ROUTE.pack(family, length, 0, 0, short, protocol, _NOWHERE, kind, 0)
                body += b"".join(_attribute(of, values[of]) for of in _NAMED if of in values)
                found.append(((family, to, length), body))
    return found


def _policies(sock: socket.socket) -> list[_Policy]:
    return [_read(each) for each in _dump(sock, _GETPOLICY, bytes(_POLICY_ID.size), _NEWPOLICY)]


def _policy(sock: socket.socket, listed: _Policy) -> _Policy | None:
    """What has the name of this policy now. Raises OSError."""
    sock.send(request(_GETPOLICY, listed.id))
    data = sock.recv(_RECEIVE)
    if code := error(data):
        if code in _GONE:
            return None
        raise OSError(code, "the kernel does not show a policy")
    return _read(data[HEADER.size : HEADER.unpack_from(data)[0]])


def _dump(sock: socket.socket, kind: int, body: bytes, wanted: int) -> list[bytes]:
    """All that the kernel lists. Raises OSError, also where the list is not whole."""
    for _ in range(_DUMPS):
        sock.send(request(kind, body, _NLM_F_DUMP))
        found, whole = _listed(sock, wanted)
        if whole:
            return found
    raise OSError(errno.EAGAIN, "what the kernel has changes while it is listed")


def _listed(sock: socket.socket, wanted: int) -> tuple[list[bytes], bool]:
    """One list, and whether nothing changed meanwhile that is missing in it."""
    found: list[bytes] = []
    whole = True
    while True:
        data = sock.recv(_RECEIVE)
        offset = 0
        while offset < len(data):
            length, kind, flags, *_ = HEADER.unpack_from(data.ljust(offset + HEADER.size, b"\0"), offset)
            message = data[offset + HEADER.size : offset + length]
            if length < HEADER.size or offset + length > len(data):
                raise OSError(errno.EBADMSG, "the kernel's list is malformed")
            whole = whole and not flags & _NLM_F_DUMP_INTR
            if kind in (_NLMSG_DONE, NLMSG_ERROR):
                # both begin with an error number, or 0
                code = -_CODE.unpack_from(message)[0] if len(message) >= _CODE.size else 0
                if code:
                    raise OSError(code, "the kernel does not list what it has")
                return found, whole
            if kind == wanted:
                found.append(message)
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
            name += _attribute(kind, value)
    return _Policy(selector, index, direction, name, tuple(templates))


def _ask(sock: socket.socket, kind: int, body: bytes) -> None:
    """One request that may be about nothing. Raises OSError."""
    sock.send(request(kind, body, _NLM_F_ACK))
    if (code := error(sock.recv(_RECEIVE))) and code not in _GONE:
        raise OSError(code, "the kernel keeps what charon left")


def _attribute(kind: int, value: bytes) -> bytes:
    return attribute(kind, value) + bytes(aligned(len(value)) - len(value))


def _padded(address: str) -> bytes:
    return packed(address).ljust(16, b"\0")


def _address(octets: bytes, family: int) -> str:
    return address_text(octets[: _octets(family)])


def _octets(family: int) -> int:
    return 16 if family == socket.AF_INET6 else 4
