"""IKE datagrams as they cross the network layer: from the octets of an IP packet, and to those of a UDP datagram."""

from __future__ import annotations

import errno
import struct
from socket import AF_INET, AF_INET6, inet_pton
from typing import NamedTuple

from bridge.ike.address import address_text

PORT_IKE = 500
PORT_NAT_T = 4500
"""where every IKE message follows the non-ESP marker (RFC 3948 section 2.2)"""
MARKER = bytes(4)

EXCHANGES = (34, 240)
"""IKE_SA_INIT, and the exchange that hands a client its stub (docs/protocol.md): all that a gateway's sidecar reads"""
ANSWERED = (*EXCHANGES, 37)
"""what a client's sidecar reads the answers of: INFORMATIONAL, which confirms a rebuilt SA, among them"""
FLAG_RESPONSE = 0x20
BEGINNINGS = ((34, 0), (2, 0), (4, 0), (2, FLAG_RESPONSE), (4, FLAG_RESPONSE))
"""what may have charon begin a handshake, by exchange type and response flag: IKE_SA_INIT, and Main and Aggressive Mode
of IKEv1 (RFC 2408 section 3.1), which has no such flag, so that charon does not look at it"""
IKE_HEADER = 28
EXCHANGE_OFFSET = 18
"""of the exchange type in an IKE message; the flags follow in the next octet (RFC 7296 section 3.1)"""
UDP_HEADER = 8

_IPV4 = struct.Struct("!BxHxxHxBxx4s4s")
"""version and header length, total length, fragment, protocol, source, destination (RFC 791 section 3.1)"""
_IPV6 = struct.Struct("!4xHBx16s16s")
"""payload length, next header, source, destination (RFC 8200 section 3)"""
_IPV6_FULL = struct.Struct("!IHBx16s16s")
IPPROTO_UDP = 17
"""a plain number: comparing with that of `socket`, an enum, takes far longer"""
_UDP = struct.Struct("!HHH")
_UDP_FULL = struct.Struct("!HHHH")

_MORE_OR_OFFSET = 0x3FFF
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION_OPTIONS = 0, 43, 44, 60


class Datagram(NamedTuple):
    """One IKE message and the addresses and ports it travels between; `marker`: after a non-ESP marker."""

    src: str
    sport: int
    dst: str
    dport: int
    ike: bytes
    marker: bool


def may_begin_handshake(ike: bytes) -> bool:
    """Whether an IKE message may be a request that charon makes an IKE_SA of."""
    return (ike[EXCHANGE_OFFSET], ike[EXCHANGE_OFFSET + 1] & FLAG_RESPONSE) in BEGINNINGS


def has_marker(client: int, gateway: int) -> bool:
    """Whether an IKE message between these ports follows a non-ESP marker, as charon has it: where neither is 500. On a
    gateway's port 4500 it always does, whatever a NAT makes of the client's port."""
    return gateway == PORT_NAT_T or PORT_IKE not in (client, gateway)


def parse_datagram(packet: bytes, *, answers: bool = False) -> Datagram | None:
    """The IKE message in a whole IPv4 or IPv6 packet, between any ports, sent to a gateway (`answers`: by one).

    None when there is none: another protocol, a fragment, a packet or datagram that is cut, no non-ESP marker where
    neither port is 500, as ESP and keepalives have none, less than an IKE header. The kernel checks checksums.
    Never raises.
    """
    size = len(packet)
    if size < 28:
        return None
    version = packet[0] >> 4
    if version == 4:
        first, end, fragment, protocol, src, dst = _IPV4.unpack_from(packet)
        start = (first & 0x0F) * 4
        if protocol != IPPROTO_UDP or fragment & _MORE_OR_OFFSET or start < 20 or end > size:
            return None
    elif version == 6 and size >= 40:
        length, protocol, src, dst = _IPV6.unpack_from(packet)
        start, end = 40, 40 + length
        if end > size:
            return None
        if protocol != IPPROTO_UDP:
            start = _skip_extensions(packet, protocol, end)
            if not start:
                return None
    else:
        return None
    if end - start < UDP_HEADER:
        return None
    sport, dport, length = _UDP.unpack_from(packet, start)
    stop = start + length
    if stop > end:
        return None
    start += UDP_HEADER
    marker = has_marker(dport, sport) if answers else has_marker(sport, dport)
    if marker:
        if packet[start : start + 4] != MARKER:
            return None
        start += 4
    if stop - start < IKE_HEADER:
        return None
    return Datagram(address_text(src), sport, address_text(dst), dport, packet[start:stop], marker)


def ipv6_packet(src: bytes, dst: bytes, udp: bytes) -> bytes:
    """A UDP datagram of at most 65535 octets under the IPv6 header that raw sockets take away (RFC 8200 section 3)."""
    return _IPV6_FULL.pack(6 << 28, len(udp), IPPROTO_UDP, src, dst) + udp


def _skip_extensions(packet: bytes, protocol: int, end: int) -> int:
    """Offset of the UDP header behind IPv6 extension headers (RFC 8200 section 4), 0 when there is none."""
    at = 40
    while protocol != IPPROTO_UDP:
        if at + 8 > end:
            return 0
        if protocol == _FRAGMENT:
            if packet[at + 2] or packet[at + 3] & 0xF9:
                return 0
            size = 8
        elif protocol in (_HOP_BY_HOP, _ROUTING, _DESTINATION_OPTIONS):
            size = (packet[at + 1] + 1) * 8
        else:
            return 0
        protocol = packet[at]
        at += size
    return at


def udp_datagram(src: str, sport: int, dst: str, dport: int, payload: bytes, marker: bool) -> bytes:
    """A UDP datagram (RFC 768), its checksum over the IPv4 or IPv6 pseudo header (RFC 8200 section 8.1) filled in.

    Raises OSError for text that is no address, addresses of two families, or a payload that is too long.
    """
    family = AF_INET6 if ":" in dst else AF_INET
    addresses = inet_pton(family, src) + inet_pton(family, dst)
    if marker:
        payload = MARKER + payload
    length = UDP_HEADER + len(payload)
    if length > 0xFFFF:
        raise OSError(errno.EMSGSIZE, f"{len(payload)} octets are too long for a UDP datagram")
    # The ones' complement sum of 16-bit words is their number modulo 65535: one division in C instead of a loop.
    words = addresses + payload if len(payload) % 2 == 0 else addresses + payload + b"\0"
    total = int.from_bytes(words) + IPPROTO_UDP + sport + dport + 2 * length
    checksum = 0xFFFF - total % 0xFFFF
    # total is never 0, so a remainder of 0 stands for the sum 0xFFFF: 0xFFFF here is what RFC 768 asks for there
    return _UDP_FULL.pack(sport, dport, length, checksum) + payload
