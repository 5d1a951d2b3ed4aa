"""Overhears what clients send to addresses that gateways share: requests of established IKE_SAs, which charon gets too,
and, while sessions are taken over, ESP in UDP, which tells who waits.

A raw socket gets a copy of what the packet filter lets in. A filter in the kernel (classic BPF) passes nothing else.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Collection
from typing import Final, NamedTuple

import structlog

from bridge.net.bpf import LOAD_X_IPV4_HEADER, LOAD_X_NUMBER, attach, requests_filter
from bridge.net.packet import MARKER, PORT_IKE, UDP_HEADER, Datagram, has_marker, ipv6_packet, parse_datagram
from bridge.net.raw_socket import discard_waiting, raw_socket, raw_socket_ipv6

log = structlog.get_logger()

READ_AT_ONCE: Final = 256
"""datagrams, then the event loop has its turn"""
RECEIVE_BUFFER: Final = 4 << 20
_SO_RCVBUFFORCE: Final = 33


class Heard(NamedTuple):
    """What came from one peer."""

    requests: list[Datagram]
    esp: set[tuple[str, int]]
    """addresses and ports that ESP in UDP came from"""


class SharedRequests:
    """`handler` gets what is sent to one of `addresses` on one of `ports`."""

    def __init__(self, addresses: Collection[str], ports: Collection[int], handler: Callable[[Heard], None]) -> None:
        self._addresses = frozenset(addresses)
        self._ports = tuple(ports)
        self._handler = handler
        self._sockets: list[socket.socket] = []

    def start(self) -> None:
        """Begin, with requests alone, in the network namespace of the caller. Raises OSError."""
        ipv4, ipv6 = raw_socket(socket.AF_INET), raw_socket_ipv6()
        self._sockets.append(ipv4)
        if ipv6 is not None:
            ipv6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            self._sockets.append(ipv6)
        self.hear_esp(False)
        for sock in self._sockets:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER)
            discard_waiting(sock)
            asyncio.get_running_loop().add_reader(sock, self._readable, sock)

    def hear_esp(self, wanted: bool) -> None:
        """Whether ESP in UDP is passed too."""
        for sock in self._sockets:
            load_x = LOAD_X_IPV4_HEADER if sock.family == socket.AF_INET else LOAD_X_NUMBER
            attach(sock, requests_filter((load_x, 0, 0, 0), self._ports, esp=wanted))

    def close(self) -> None:
        """End."""
        for sock in self._sockets:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        self._sockets.clear()

    def _readable(self, sock: socket.socket) -> None:
        heard = Heard([], set())
        for _ in range(READ_AT_ONCE):
            try:
                packet = sock.recv(65535) if sock.family == socket.AF_INET else _read_ipv6(sock)
            except BlockingIOError:
                break
            except OSError as error:
                log.warning("clients-unreadable", reason=error.strerror)
                break
            self._sort(packet, heard)
        if heard.requests or heard.esp:
            self._handler(heard)

    def _sort(self, packet: bytes, heard: Heard) -> None:
        datagram = parse_datagram(packet)
        if datagram is not None:
            if datagram.dst in self._addresses:
                heard.requests.append(datagram)
            return
        if (peer := _esp_peer(packet, self._addresses)) is not None:
            heard.esp.add(peer)


def _esp_peer(packet: bytes, addresses: Collection[str]) -> tuple[str, int] | None:
    """Where ESP in UDP to one of `addresses` came from; the kernel's filter has passed the packet."""
    version = packet[0] >> 4 if packet else 0
    if version == 4:
        start, family, at, octets = (packet[0] & 0x0F) * 4, socket.AF_INET, 12, 4
    elif version == 6:
        start, family, at, octets = 40, socket.AF_INET6, 8, 16
    else:
        return None
    if len(packet) < start + UDP_HEADER + len(MARKER):
        return None
    src, dst = packet[at : at + octets], packet[at + octets : at + 2 * octets]
    sport, dport = int.from_bytes(packet[start : start + 2]), int.from_bytes(packet[start + 2 : start + 4])
    first = packet[start + UDP_HEADER : start + UDP_HEADER + len(MARKER)]
    if not has_marker(sport, dport) or dport == PORT_IKE or first == MARKER:
        return None
    return (socket.inet_ntop(family, src), sport) if socket.inet_ntop(family, dst) in addresses else None


def _read_ipv6(sock: socket.socket) -> bytes:
    udp, ancillary, _, peer = sock.recvmsg(65535, socket.CMSG_SPACE(20))
    src = socket.inet_pton(socket.AF_INET6, peer[0].partition("%")[0])
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            return ipv6_packet(src, data[:16], udp)
    return b""
