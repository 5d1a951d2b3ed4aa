"""Real clients among the simulated ones: charon, sidecar and traffic, each on a host of its own."""

from __future__ import annotations

import asyncio
from typing import Any

from bridge.lab.daemon import wait_until
from bridge.lab.demo import Ping
from bridge.lab.host import Host
from bridge.lab.sidecar import Sidecar
from bridge.lab.topology import CHOICES, SITE, Topology, client_config, client_host
from bridge.service import control

FIRST = 100
"""last octet of the first one's address"""
RETURN_PATIENCE = 60.0
"""seconds that traffic may take to come back after a resumption"""


class Clients:
    """`count` clients of the standard lab's gateways, with sessions at gw1 that carry traffic."""

    def __init__(self, topology: Topology, count: int) -> None:
        self._topology = topology
        self._hosts: list[tuple[Host, Sidecar]] = []
        self._pings: list[Ping] = []
        for number in range(count):
            host = client_host(topology.lab, f"client{number}", f"192.168.50.{FIRST + number}", topology.secret)
            # the storm begins on command
            sidecar = host.sidecar("client", client_config(CHOICES) | {"resume_on_down": False})
            self._hosts.append((host, sidecar))

    def start(self) -> None:
        """All of them up, with traffic."""
        for host, sidecar in self._hosts:
            sidecar.start(wait=False)
            host.charon.start()
        for host, sidecar in self._hosts:
            sidecar.wait_ready()
            host.charon.initiate("net", "home")
            self._pings.append(Ping(host, SITE))
        for ping in self._pings:
            wait_until(lambda ping=ping: ping.answers() > 0, "traffic")  # type: ignore[misc]

    def resume(self) -> list[dict[str, Any]]:
        """Have all resume together; the outcomes, as `ike-sa-sync resume --json` prints them."""

        async def ask() -> list[dict[str, Any]]:
            paths = [str(host.path(sidecar.config["control"])) for host, sidecar in self._hosts]
            request = {"command": "resume", "connection": None, "to": None}
            return list(await asyncio.gather(*(control.call(path, request) for path in paths)))

        return asyncio.run(ask())

    def traffic(self) -> dict[str, int]:
        """Once traffic flows again at all of them: packets sent and lost, and the longest time without an answer in
        ms."""
        seen = [ping.answers() for ping in self._pings]
        for ping, before in zip(self._pings, seen, strict=True):
            wait_until(lambda p=ping, b=before: p.answers() > b, "traffic again", RETURN_PATIENCE)  # type: ignore[misc]
        ended = [ping.stop() for ping in self._pings]
        return {
            "sent": sum(each.sent for each in ended),
            "lost": sum(each.lost for each in ended),
            "silence_ms": round(max(each.silence for each in ended) * 1000),
        }
