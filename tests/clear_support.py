"""Packets of the inner network on a client's outer link: traffic all the time, and a capture of what leaves in the
clear."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import struct
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from bridge.lab.daemon import SLOWNESS
from bridge.lab.host import Host
from net_support import inside

INNER = tuple(ipaddress.ip_network(text) for text in ("10.10.0.0/16", "10.20.0.0/16", "fd10:10::/32", "fd20::/32"))
"""the networks behind the gateways, and the clients' virtual IPs"""
GUARD_UNIT = Path(__file__).parents[1] / "systemd/ike-sa-sync-guard.service"
INTERVAL = 0.003 * SLOWNESS
"""seconds between two packets of a socket: as a slow machine takes longer for a move, it has no more to send in one"""
PORT = 9
"""discard (RFC 863)"""
ETH_P_ALL, ETH_P_IP, ETH_P_IPV6 = 0x0003, 0x0800, 0x86DD
SO_RCVBUFFORCE, SOL_PACKET, PACKET_STATISTICS = 33, 263, 6
NAT_T = (4500).to_bytes(2)
ROOM = 1 << 24
"""octets that the kernel keeps for the capture"""

SENDER = f"""
import socket, sys, time
socks = []
for pair in sys.argv[1:]:
    server, vip = pair.split("=")
    for source in (None, vip):
        sock = socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM)
        # the virtual IP may be away for a moment
        sock.setsockopt(socket.SOL_IP, 15, 1)
        if source:
            sock.bind((source, 0))
        socks.append((sock, server))
while True:
    for sock, server in socks:
        try:
            sock.sendto(b"in the clear?", (server, {PORT}))
        except OSError:
            pass
    time.sleep({INTERVAL})
"""
"""Two sockets for each server: one that the kernel gives a source address for each packet, and one that has the
virtual IP."""


class Seen(NamedTuple):
    """A packet that left unencrypted."""

    source: str
    target: str
    protocol: int

    @property
    def is_inner(self) -> bool:
        """Whether it is for the inner network."""
        return any(ipaddress.ip_address(self.target) in network for network in INNER)


class Sent(ABC):
    """Captures what a host sends from an interface, the first `octets` of each packet: without a host, what passes a
    bridge of this machine, which is promiscuous. A context manager."""

    def __init__(self, host: Host | None, interface: str = "eth0", octets: int = 2048) -> None:
        self._kind = socket.PACKET_OUTGOING if host is not None else socket.PACKET_OTHERHOST
        with inside(host.namespace) if host is not None else contextlib.nullcontext():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, ROOM)
            self._socket.bind((interface, ETH_P_ALL))
        self._socket.settimeout(0.1)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._over = False
        self._octets = octets

    @abstractmethod
    def take(self, protocol: int, octets: bytes) -> None:
        """A packet left, of this EtherType; called in a thread of its own."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join()
        self._socket.close()

    def lost(self) -> int:
        """How many packets the capture missed since it was asked last."""
        _, dropped = struct.unpack("II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        return int(dropped)

    def _read(self) -> None:
        while not self._over:
            try:
                octets, address = self._socket.recvfrom(self._octets)
            except TimeoutError:
                continue
            if address[2] == self._kind:
                self.take(address[1], octets)


class OuterLink(Sent):
    """Captures what a host sends from its outer link."""

    def __init__(self, host: Host | None, interface: str = "eth0") -> None:
        super().__init__(host, interface, 128)
        self.clear: list[Seen] = []
        self.protected = 0
        """packets of ESP, or of UDP to port 4500"""

    def take(self, protocol: int, octets: bytes) -> None:
        if protocol == ETH_P_IP and (
            octets[9] == socket.IPPROTO_ESP or (octets[9] == socket.IPPROTO_UDP and octets[22:24] == NAT_T)
        ):
            self.protected += 1
        elif (seen := _parsed(protocol, octets)) is not None and seen.is_inner:
            self.clear.append(seen)


def _parsed(protocol: int, octets: bytes) -> Seen | None:
    """The addresses of an IP packet, and the protocol in it."""
    if protocol == ETH_P_IP:
        return Seen(socket.inet_ntoa(octets[12:16]), socket.inet_ntoa(octets[16:20]), octets[9])
    if protocol == ETH_P_IPV6:
        source, target = (socket.inet_ntop(socket.AF_INET6, octets[at : at + 16]) for at in (8, 24))
        return Seen(source, target, octets[6])
    return None


def guard_unit(host: Host, action: str) -> None:
    """Run what ike-sa-sync-guard.service does when it starts (ExecStart) or stops (ExecStop)."""
    [command] = re.findall(rf'^{action}=/bin/sh -c "(.*)"$', GUARD_UNIT.read_text(), re.MULTILINE)
    assert not set(command) & set("$%\\"), "systemd reads these itself"
    host.run("sh", "-c", command)


@contextlib.contextmanager
def traffic(host: Host, servers: dict[str, str]) -> Iterator[None]:
    """Packets to `servers`, by virtual IP of the same family, all the time."""
    pairs = (f"{server}={vip}" for server, vip in servers.items())
    sender = host.popen(sys.executable, "-c", SENDER, *pairs, stderr=subprocess.STDOUT)
    try:
        yield
        assert sender.poll() is None
    finally:
        sender.kill()
        sender.wait()
