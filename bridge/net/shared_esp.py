"""Which CHILD_SAs clients send ESP on, in UDP or not: the SPIs of what comes in, as long as someone asks.

Raw sockets get copies of what the packet filter lets in, of each packet its first octets only. They are read at the
asker's pace, and what does not fit into their small buffers is lost: a hint is all that is wanted, and a gateway may
get a million of these packets each second.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Final

import structlog

from bridge.net.bpf import LOAD_X_IPV4_HEADER, LOAD_X_NUMBER, Instruction, attach, esp_filter, esp_in_udp_filter
from bridge.net.packet import UDP_HEADER

log = structlog.get_logger()

READ_AT_ONCE: Final = 256
"""packets of each socket"""
RECEIVE_BUFFER: Final = 256 << 10
SPI_OCTETS: Final = 4


class SharedEsp:
    """Between `open` and `close`; `ports` are charon's."""

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = tuple(ports)
        self._sockets: list[tuple[socket.socket, int]] = []
        """each with the octets of UDP before the SPI"""

    def open(self) -> None:
        """Begin, in the network namespace of the caller. What cannot be opened is logged: sessions are taken over
        without it, in another order."""
        if self._sockets:
            return
        for family, load_x in ((socket.AF_INET, LOAD_X_IPV4_HEADER), (socket.AF_INET6, LOAD_X_NUMBER)):
            header: Instruction = (load_x, 0, 0, 0)
            for protocol, program, before in (
                (socket.IPPROTO_UDP, esp_in_udp_filter(header, self._ports), UDP_HEADER),
                (socket.IPPROTO_ESP, esp_filter(), 0),
            ):
                try:
                    sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
                except OSError as error:
                    # a host without IPv6, perhaps
                    log.info("esp-not-received", protocol=int(protocol), reason=error.strerror)
                    continue
                attach(sock, program)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
                self._sockets.append((sock, before))

    def read(self) -> set[int]:
        """The SPIs, as on the wire, of ESP that came since the last time, as far as it was kept."""
        spis = set()
        for sock, before in self._sockets:
            for _ in range(READ_AT_ONCE):
                try:
                    packet = sock.recv(128)
                except OSError:
                    break
                # an IPv4 raw socket gives the IP header as well, an IPv6 one does not
                at = before + ((packet[0] & 0x0F) * 4 if sock.family == socket.AF_INET and packet else 0)
                if len(packet) >= at + SPI_OCTETS:
                    spis.add(int.from_bytes(packet[at : at + SPI_OCTETS]))
        return spis

    def close(self) -> None:
        """End."""
        for sock, _ in self._sockets:
            sock.close()
        self._sockets.clear()
