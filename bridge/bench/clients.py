"""Real clients among the simulated ones: charon, sidecar and traffic, each on a host of its own."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from bridge.bench.usage import quantile
from bridge.lab.daemon import wait_until
from bridge.lab.demo import INTERVAL, Ping
from bridge.lab.host import Host
from bridge.lab.sidecar import Sidecar
from bridge.lab.space import LabError
from bridge.lab.topology import CHOICES, SITE, Topology, client_config, client_host
from bridge.service import control

FIRST = 100
"""last octet of the first one's address"""
FAST_INTERVAL = 0.01
"""seconds between two packets of a client whose outage is measured"""
RETURN_PATIENCE = 60.0
"""seconds that traffic may take to come back after a resumption"""


def default_timers(host: Host) -> None:
    """Give a client of the lab charon's own retransmission timers, and 30 s between liveness checks."""
    host.charon.settings = {key: value for key, value in host.charon.settings.items() if "retransmit" not in key}
    host.configure("connections { home { dpd_delay = 30s } }\n", "dpd.conf")


class Clients:
    """`count` clients of the standard lab's gateways, with sessions at gw1 that carry traffic. `unprepared`: with
    charon's default timers and a packet every 10 ms, and moved by their own sidecars; else the storm moves them."""

    def __init__(self, topology: Topology, count: int, *, unprepared: bool = False) -> None:
        self._interval = FAST_INTERVAL if unprepared else INTERVAL
        self._topology = topology
        self.hosts: list[tuple[Host, Sidecar]] = []
        self._pings: list[Ping] = []
        for number in range(count):
            host = client_host(topology.lab, f"client{number}", f"192.168.50.{FIRST + number}", topology.secret)
            sidecar = host.sidecar("client", client_config(CHOICES) | {"resume_on_down": unprepared})
            if unprepared:
                default_timers(host)
            self.hosts.append((host, sidecar))

    def start(self) -> None:
        """All of them up, with traffic."""
        for host, sidecar in self.hosts:
            sidecar.start(wait=False)
            host.charon.start()
        for host, sidecar in self.hosts:
            sidecar.wait_ready()
            host.charon.initiate("net", "home")
            self._pings.append(Ping(host, SITE, self._interval))
        for ping in self._pings:
            wait_until(lambda ping=ping: ping.answers() > 0, "traffic")  # type: ignore[misc]

    def resume(self) -> list[dict[str, Any]]:
        """Have all resume together; the outcomes, as `ike-sa-sync resume --json` prints them."""

        async def ask() -> list[dict[str, Any]]:
            paths = [str(host.path(sidecar.config["control"])) for host, sidecar in self.hosts]
            request = {"command": "resume", "connection": None, "to": None}
            return list(await asyncio.gather(*(control.call(path, request) for path in paths)))

        return asyncio.run(ask())

    def sessions(self) -> list[str]:
        """The SPIs of each one's IKE_SA."""
        return [
            " ".join(sa["initiator-spi"] for sa in host.charon.sas() if sa["state"] == "ESTABLISHED")
            for host, _ in self.hosts
        ]

    def at(self, gateway: Host) -> int:
        """How many have their session at a gateway, and no other."""
        there = gateway.address
        return sum([sa["remote-host"] for sa in host.charon.sas()] == [there] for host, _ in self.hosts)

    def longest_since(self, wall: float) -> int:
        """The longest silence of any that ended after a time (Unix seconds), in ms."""
        return round(max((ping.traffic().silence_since(wall) for ping in self._pings), default=0.0) * 1000)

    def after(self, wall: float) -> dict[str, Any]:
        """What became of them after a failure at a time (Unix seconds), once they have traffic again."""

        def moved() -> int:
            return self.at(self._topology.gw2)

        with contextlib.suppress(LabError):
            wait_until(lambda: moved() == len(self.hosts), "all clients at the other gateway", RETURN_PATIENCE)
        answers = [ping.answers() for ping in self._pings]
        for ping, before in zip(self._pings, answers, strict=True):
            with contextlib.suppress(LabError):
                wait_until(lambda p=ping, b=before: p.answers() > b, "traffic", RETURN_PATIENCE / 4)  # type: ignore[misc]
        silences = [ping.stop().silence_since(wall) * 1000 for ping in self._pings]
        return {
            "clients": len(self.hosts),
            "moved": moved(),
            "silence_ms": {
                "p50": round(quantile(silences, 0.5)),
                "p90": round(quantile(silences, 0.9)),
                "max": round(max(silences, default=0.0)),
            },
        }

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
            "silence_ms": round(max((each.silence for each in ended), default=0.0) * 1000),
        }
