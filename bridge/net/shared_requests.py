"""Overhears what clients send to addresses that gateways share: requests of established IKE_SAs, which charon gets too.

A raw socket gets a copy of what the packet filter lets in. A filter in the kernel (classic BPF) passes nothing else.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Collection
from typing import Final

import structlog

from bridge.net.bpf import LOAD_X_IPV4_HEADER, LOAD_X_NUMBER, attach, requests_filter
from bridge.net.packet import Datagram, ipv6_packet, parse_datagram
from bridge.net.raw_socket import discard_waiting, raw_socket, raw_socket_ipv6

log = structlog.get_logger()

READ_AT_ONCE: Final = 256
"""datagrams, then the event loop has its turn"""
RECEIVE_BUFFER: Final = 4 << 20
_SO_RCVBUFFORCE: Final = 33


class SharedRequests:
    """`handler` gets what is sent to one of `addresses` on one of `ports`."""

    def __init__(
        self, addresses: Collection[str], ports: Collection[int], handler: Callable[[list[Datagram]], None]
    ) -> None:
        self._addresses = frozenset(addresses)
        self._ports = tuple(ports)
        self._handler = handler
        self._sockets: list[socket.socket] = []

    def start(self) -> None:
        """Begin, in the network namespace of the caller. Raises OSError."""
        ipv4, ipv6 = raw_socket(socket.AF_INET), raw_socket_ipv6()
        self._sockets.append(ipv4)
        if ipv6 is not None:
            ipv6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            self._sockets.append(ipv6)
        for sock in self._sockets:
            load_x = LOAD_X_IPV4_HEADER if sock.family == socket.AF_INET else LOAD_X_NUMBER
            attach(sock, requests_filter((load_x, 0, 0, 0), self._ports))
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER)
            discard_waiting(sock)
            asyncio.get_running_loop().add_reader(sock, self._readable, sock)

    def close(self) -> None:
        """End."""
        for sock in self._sockets:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        self._sockets.clear()

    def _readable(self, sock: socket.socket) -> None:
        requests: list[Datagram] = []
        for _ in range(READ_AT_ONCE):
            try:
                packet = sock.recv(65535) if sock.family == socket.AF_INET else _read_ipv6(sock)
            except BlockingIOError:
                break
            except OSError as error:
                log.warning("clients-unreadable", reason=error.strerror)
                break
            datagram = parse_datagram(packet)
            if datagram is not None and datagram.dst in self._addresses:
                requests.append(datagram)
        if requests:
            self._handler(requests)


def _read_ipv6(sock: socket.socket) -> bytes:
    udp, ancillary, _, peer = sock.recvmsg(65535, socket.CMSG_SPACE(20))
    src = socket.inet_pton(socket.AF_INET6, peer[0].partition("%")[0])
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            return ipv6_packet(src, data[:16], udp)
    return b""
