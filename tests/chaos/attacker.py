"""An attacker without any key: it records what passes on the outer network, and throws it, or what it makes itself, at
the gateways; and a local user without privileges on a gateway."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
from random import Random
from socket import inet_aton

from bridge.ike.key_exchange import fresh_public_value
from bridge.ike.message import ExchangeType, PayloadType
from bridge.ike.resumption_request import build_request
from bridge.ike.transforms import Suite
from bridge.lab.host import Host
from bridge.net.packet import IPPROTO_UDP, Datagram, parse_datagram, udp_datagram
from chaos.world import World
from net_support import inside

ETH_P_ALL, ETH_P_IP = 0x0003, 0x0800
KEPT = 400
"""messages of each kind that are remembered"""
SUITE = Suite(encr=20, encr_len=128, integ=0, prf=5, group=31)
NOBODY = 65534
FORGE_HA = """
import os, socket, sys
os.setgid({nobody}); os.setuid({nobody})
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for octets in sys.stdin:
    for target in ("127.0.0.1", "127.0.0.2"):
        try:
            sock.sendto(bytes.fromhex(octets), (target, 4510))
        except OSError:
            pass
"""


class Attacker:
    """`record` before the first round; `throw` in each."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.requests: list[Datagram] = []
        """to resume"""
        self._others: list[Datagram] = []
        with inside(world.lab.switch):
            self._ear = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        with inside(world.attacker.namespace):
            # with IP headers of its own, from any address
            self._mouth = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self._thread = threading.Thread(target=self._record, daemon=True)
        self._thread.start()

    def _record(self) -> None:
        while True:
            octets, address = self._ear.recvfrom(65535)
            if address[1] != ETH_P_IP or address[2] == socket.PACKET_OUTGOING:
                continue
            seen = parse_datagram(octets)
            if seen is None or len(seen.ike) < 28:
                continue
            resumes = seen.ike[18] == ExchangeType.IKE_SA_INIT and seen.ike[16] == PayloadType.SYNC
            kept = self.requests if resumes else self._others
            kept.append(seen)
            if len(kept) > KEPT:
                del kept[0]

    def _send(self, src: str, sport: int, dst: str, dport: int, ike: bytes, marker: bool) -> None:
        datagram = udp_datagram(src, sport, dst, dport, ike, marker)
        # the kernel fills in the length and the checksum (raw(7))
        header = struct.pack("!BxHxxxxBBxx4s4s", 0x45, 0, 64, IPPROTO_UDP, inet_aton(src), inet_aton(dst))
        with contextlib.suppress(OSError):
            # to a network that the attacker is not in
            self._mouth.sendto(header + datagram, (dst, 0))

    def throw(self, random: Random) -> str:
        """One attack; what it was."""
        kinds = [self._forged_request, self._forged_ha]
        if self.requests:
            kinds += [self._replayed_request] * 3
        if self._others:
            kinds += [self._replayed_messages]
        return random.choice(kinds)(random)

    def replay(self, seen: Datagram, gateway: Host, source: tuple[str, int] | None = None) -> None:
        """Send a request that was seen to a gateway, from where it came unless told."""
        self._send(*(source or (seen.src, seen.sport)), gateway.address, 4500, seen.ike, True)

    def _replayed_request(self, random: Random) -> str:
        """A request to resume that was seen, from where it came or from here, to any gateway."""
        seen = random.choice(self.requests)
        gateway = random.choice(self._world.gateways)
        source = random.choice([(seen.src, seen.sport), (self._world.attacker.address, 4500)])
        self.replay(seen, gateway, source)
        return f"replayed a request of {seen.src} to {seen.dst}, from {source[0]} to {gateway.name}"

    def _replayed_messages(self, random: Random) -> str:
        """Other IKE messages that were seen, to where they went."""
        some = random.sample(self._others, min(5, len(self._others)))
        for seen in some:
            self._send(seen.src, seen.sport, seen.dst, seen.dport, seen.ike, seen.marker)
        return f"replayed {len(some)} IKE messages"

    def _forged_request(self, random: Random) -> str:
        """A request with the index of a living session, which is no secret, under keys of the attacker's own."""
        keys = sorted(self._world.stubs() or ())
        key = random.choice(keys) if keys else "ike:stub:{192.168.50.1/11}:1111111111111111"
        gateway, _, spi = key.partition("{")[2].partition("/")[0], "", key.rpartition(":")[2]
        octets = build_request(
            spi_i=os.urandom(8),
            suite=SUITE,
            ke_value=fresh_public_value(SUITE.group),
            nonce=os.urandom(32),
            sync_index=(gateway, bytes.fromhex(spi)),
            prf=SUITE.prf,
            sk_d_old=os.urandom(32),
        )
        target = random.choice(self._world.gateways)
        self._send(self._world.attacker.address, 4500, target.address, 4500, octets, True)
        return f"forged a request for {spi} to {target.name}"

    def _forged_ha(self, random: Random) -> str:
        """IKE_DELETE of every IKE_SA of a gateway, to both ends of the HA channel."""
        listed = {host.name: self._world.sas_or_none(host) for host in self._world.gateways}
        busy = [host for host in self._world.gateways if listed[host.name]]
        host = random.choice(busy or self._world.gateways)
        lines = ""
        for version in (3, 4, 5):
            for sa in listed[host.name]:
                spis = sa["initiator-spi"] + sa["responder-spi"]
                lines += f"{version:02x}05" + "01" + "02" + spis + "00" + "\n"
        self._as_nobody(host, lines)
        return f"forged {lines.count(chr(10))} HA messages as uid {NOBODY} on {host.name}"

    @staticmethod
    def _as_nobody(host: Host, lines: str) -> None:
        host.run(sys.executable, "-c", FORGE_HA.format(nobody=NOBODY), stdin=lines, check=False)
