"""Addresses that this host answers for in the networks it is directly connected to: ARP (RFC 826, gratuitous: RFC 5227)
and neighbour discovery (RFC 4861), on packet sockets.

A client's virtual IP out of a LAN is on no interface there: the gateway that has the client's session announces it,
answers for it, and stops when the session is gone. The other hosts then send to this gateway's link-layer address.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Final, NamedTuple

from bridge.net.bpf import attach, is_solicitation

Network = IPv4Network | IPv6Network

ETH_P_ARP: Final = 0x0806
ETH_P_IPV6: Final = 0x86DD
ARP_REQUEST: Final = 1
ARP_REPLY: Final = 2
SOLICITATION: Final = 135
ADVERTISEMENT: Final = 136
"""ICMPv6 types (RFC 4861 sections 4.3 and 4.4)"""
TARGET_LINK_LAYER: Final = 2
"""the option of an advertisement that has the link-layer address"""
ROUTER, SOLICITED, OVERRIDE = 0x80, 0x40, 0x20
"""flags of an advertisement"""
HOP_LIMIT: Final = 255
ICMPV6: Final = 58
ALL_NODES: Final = bytes.fromhex("ff020000000000000000000000000001")
BROADCAST: Final = b"\xff" * 6
ALL_NODES_MAC: Final = bytes.fromhex("333300000001")
SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_MR_ALLMULTI = 263, 1, 2
PACKET_OUTGOING: Final = 4
"""packet type of what this host sends itself"""
_ARP: Final = struct.Struct("!HHBBH6s4s6s4s")
_ROUTE_UP: Final = 1
_ETHERNET: Final = 1
"""the type of an interface that neighbours ask on; a tunnel and an XFRM interface have others"""
_INTERFACES: Final = Path("/sys/class/net")


class Connected(NamedTuple):
    """A network that an interface is directly connected to."""

    interface: str
    network: Network


def connected_networks(proc: Path = Path("/proc/net"), interfaces: Path = _INTERFACES) -> list[Connected]:
    """The networks of this host's interfaces, but for the loopback, for those of one address, and for what is routed to
    a tunnel."""
    found = []
    for line in _lines(proc / "route")[1:]:
        name, destination, gateway, flags, *_, mask = line.split()[:8]
        if int(flags, 16) & _ROUTE_UP and int(gateway, 16) == 0 and name != "lo":
            prefix = int(mask, 16).bit_count()
            if 0 < prefix < 32:
                found.append(Connected(name, IPv4Network((bytes.fromhex(destination)[::-1], prefix))))
    for line in _lines(proc / "if_inet6"):
        octets, _, prefix6, _, _, name = line.split()
        network = IPv6Network((bytes.fromhex(octets), int(prefix6, 16)), strict=False)
        if name != "lo" and network.prefixlen < 128 and not network.is_link_local:
            found.append(Connected(name, network))
    tunnels = {name for name in {name for name, _ in found} if _is_tunnel(interfaces / name)}
    return [one for one in found if one.interface not in tunnels]


def _is_tunnel(interface: Path) -> bool:
    try:
        return int((interface / "type").read_text()) != _ETHERNET
    except (OSError, ValueError):
        return False


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def link_address(interface: str) -> bytes | None:
    """The interface's 6 octets; None where it has none, as a tunnel."""
    try:
        octets = bytes.fromhex((_INTERFACES / interface / "address").read_text().strip().replace(":", ""))
    except (OSError, ValueError):
        return None
    return octets if len(octets) == 6 and any(octets) else None


# packets


def arp(operation: int, mac: bytes, address: bytes, to_mac: bytes, to: bytes) -> bytes:
    """An Ethernet frame with an ARP message."""
    wanted = bytes(6) if operation == ARP_REQUEST else to_mac
    head = to_mac + mac + ETH_P_ARP.to_bytes(2, "big")
    return head + _ARP.pack(1, 0x0800, 6, 4, operation, mac, address, wanted, to)


def gratuitous_arp(mac: bytes, address: bytes) -> bytes:
    """An ARP announcement (RFC 5227 section 3): hosts that know the address take the new link-layer address."""
    return arp(ARP_REQUEST, mac, address, BROADCAST, address)


def read_arp_request(frame: bytes) -> tuple[bytes, bytes, bytes] | None:
    """The asker's link-layer address, its IPv4 address and the one that it asks for."""
    if len(frame) < 14 + _ARP.size:
        return None
    kind, protocol, hlen, plen, operation, mac, sender, _, target = _ARP.unpack_from(frame, 14)
    if (kind, protocol, hlen, plen, operation) != (1, 0x0800, 6, 4, ARP_REQUEST):
        return None
    # an announcement asks nothing
    return None if sender == target else (mac, sender, target)


def advertisement(mac: bytes, address: bytes, to_mac: bytes, to: bytes, *, solicited: bool) -> bytes:
    """An Ethernet frame with a neighbour advertisement that overrides what its receivers know."""
    flags = ROUTER | OVERRIDE | (SOLICITED if solicited else 0)
    body = struct.pack("!BBHI", ADVERTISEMENT, 0, 0, flags << 24) + address
    body += struct.pack("!BB", TARGET_LINK_LAYER, 1) + mac
    pseudo = address + to + struct.pack("!I3xB", len(body), ICMPV6)
    body = body[:2] + checksum(pseudo + body).to_bytes(2, "big") + body[4:]
    head = to_mac + mac + ETH_P_IPV6.to_bytes(2, "big")
    return head + struct.pack("!IHBB", 6 << 28, len(body), ICMPV6, HOP_LIMIT) + address + to + body


def read_solicitation(frame: bytes) -> tuple[bytes, bytes, bytes] | None:
    """The asker's link-layer address, its IPv6 address and the one that it asks for (RFC 4861 section 7.1.1)."""
    if len(frame) < 14 + 40 + 24 or frame[20] != ICMPV6 or frame[21] != HOP_LIMIT or frame[54] != SOLICITATION:
        return None
    return frame[6:12], frame[22:38], frame[62:78]


def checksum(octets: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    padded = octets + b"\0" * (len(octets) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Neighbour:
    """Announces addresses on one interface, and answers for them. Raises OSError where packet sockets are refused, or
    the interface is gone; ValueError where it has no link-layer address."""

    def __init__(self, interface: str) -> None:
        mac = link_address(interface)
        if mac is None:
            raise ValueError(f"{interface} has no link-layer address")
        self._mac = mac
        self._addresses: set[bytes] = set()
        self._sockets: list[socket.socket] = []
        try:
            for protocol in (ETH_P_ARP, ETH_P_IPV6):
                sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(protocol))
                self._sockets.append(sock)
                if protocol == ETH_P_IPV6:
                    attach(sock, is_solicitation())
                sock.bind((interface, protocol))
            # solicitations go to groups that no address of this host is in
            membership = struct.pack("iHH8s", socket.if_nametoindex(interface), PACKET_MR_ALLMULTI, 0, bytes(8))
            self._sockets[1].setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, membership)
        except OSError:
            self.close()
            raise

    def sockets(self) -> Iterable[socket.socket]:
        """Readable when a question has come: then call `answer`."""
        return self._sockets

    def close(self) -> None:
        """Answer no more."""
        for sock in self._sockets:
            sock.close()

    def add(self, address: str) -> None:
        """Answer for an address from now on."""
        self._addresses.add(ip_address(address).packed)

    def remove(self, address: str) -> None:
        """Answer for it no more."""
        self._addresses.discard(ip_address(address).packed)

    def announce(self, address: str) -> None:
        """Have the other hosts of the network learn that the address is here. Raises OSError."""
        octets = ip_address(address).packed
        if len(octets) == 4:
            self._sockets[0].send(gratuitous_arp(self._mac, octets))
        else:
            self._sockets[1].send(advertisement(self._mac, octets, ALL_NODES_MAC, ALL_NODES, solicited=False))

    def answer(self, sock: socket.socket) -> None:
        """Take in what came on one of the sockets."""
        with suppress(BlockingIOError):
            while True:
                frame, source = sock.recvfrom(2048)
                if source[2] != PACKET_OUTGOING:
                    self._answer(frame)

    def _answer(self, frame: bytes) -> None:
        if (asked := read_arp_request(frame) if frame[12:14] == b"\x08\x06" else None) is not None:
            mac, asker, target = asked
            if target in self._addresses:
                self._sockets[0].send(arp(ARP_REPLY, self._mac, target, mac, asker))
        elif (asked := read_solicitation(frame) if frame[12:14] == b"\x86\xdd" else None) is not None:
            mac, asker, target = asked
            if target in self._addresses:
                # one that is without an address yet tries whether it may take this one
                unspecified = IPv6Address(asker).is_unspecified
                to_mac, to = (ALL_NODES_MAC, ALL_NODES) if unspecified else (mac, asker)
                self._sockets[1].send(advertisement(self._mac, target, to_mac, to, solicited=not unspecified))
