"""`bench takeover`, its other half: the whole way with keepalived. Ordinary clients send packets through a gateway that
is killed; VRRP finds out, the other gateway gets the address and takes their sessions over."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from bridge.bench.clients import FAST_INTERVAL, FIRST, default_timers
from bridge.bench.rig import connect_to, share, wait_stored
from bridge.bench.storm import Progress
from bridge.bench.usage import quantile
from bridge.lab.daemon import wait_until
from bridge.lab.demo import Ping, Traffic
from bridge.lab.host import Host
from bridge.lab.keepalived import Keepalived
from bridge.lab.lab import Lab
from bridge.lab.space import LabError
from bridge.lab.topology import SERVER, Topology, client_host, standard

SHARED: Final = "192.168.50.100"
"""that of the shipped example"""
MASTER, BACKUP = 110, 100
"""VRRP's priorities"""
STORED_PATIENCE: Final = 30.0
"""seconds for the stubs of all clients to be in the bank"""
RETURN_PATIENCE: Final = 60.0
"""seconds that traffic may take to come back"""
WATCHED_SECONDS: Final = 2.0
"""that traffic is watched once it is back: it may break off again"""
_NEWS: Final = re.compile(rf"^\[(?P<at>[0-9T:.-]+)\](?! ?Deleted).*inet {re.escape(SHARED)}/", re.MULTILINE)


class AddressNews:
    """When the shared address came to a host, as its kernel said."""

    def __init__(self, host: Host) -> None:
        self._file: Path = host.directory / "address.log"
        with self._file.open("w") as output:
            self._process = host.popen("ip", "-4", "-ts", "monitor", "address", stdout=output)

    def came(self, since: float) -> float | None:
        """The first time after `since`, both in Unix seconds; None: it did not."""
        times = [datetime.fromisoformat(one["at"]).timestamp() for one in _NEWS.finditer(self._file.read_text())]
        return min((at for at in times if at > since), default=None)

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()


class Vrrp:
    """Two gateways with keepalived, and ordinary clients of the first one with traffic."""

    def __init__(self, topology: Topology, clients: list[Host]) -> None:
        self.topology = topology
        self.clients = clients
        self._keepalived = {
            host.name: Keepalived(host, priority) for host, priority in ((topology.gw1, MASTER), (topology.gw2, BACKUP))
        }
        self._pings: list[Ping] = []

    def start(self) -> None:
        """All of it up, with traffic."""
        self.topology.start()
        for host in (self.topology.gw1, self.topology.gw2):
            self._keepalived[host.name].start()
            wait_until(lambda: self._has(self.topology.gw1), "VRRP's master")
        for client in self.clients:
            client.charon.start()
            client.charon.initiate("net", "home")
            self._pings.append(Ping(client, SERVER, FAST_INTERVAL))
        for ping in self._pings:
            wait_until(lambda ping=ping: ping.answers() > 0, "traffic")  # type: ignore[misc]
        wait_stored(self.topology, len(self.clients), STORED_PATIENCE)

    @staticmethod
    def _has(host: Host) -> bool:
        return SHARED in host.run("ip", "-4", "address").stdout

    def kill_master(self) -> None:
        """SIGKILL to charon, the sidecar and keepalived; then the address goes."""
        gateway = self.topology.gw1
        self._keepalived[gateway.name].kill()
        self.topology.kill_gateway(gateway)
        gateway.run("ip", "address", "del", f"{SHARED}/24", "dev", "eth0")

    def sessions(self) -> list[str]:
        """The SPIs of each client's IKE_SAs."""
        return [" ".join(sa["initiator-spi"] + sa["responder-spi"] for sa in one.charon.sas()) for one in self.clients]

    def traffic(self, came: float) -> list[Traffic]:
        """Of each client, once it has had traffic for a while after `came` (Unix seconds), or has none for long."""
        until = time.monotonic() + RETURN_PATIENCE
        for ping in self._pings:
            with contextlib.suppress(LabError):
                wait_until(
                    lambda p=ping: p.traffic().last > came + WATCHED_SECONDS,  # type: ignore[misc]
                    "traffic again",
                    max(0.0, until - time.monotonic()),
                )
        return [ping.stop() for ping in self._pings]


@contextlib.contextmanager
def vrrp_lab(clients: int) -> Iterator[Vrrp]:
    """A lab of it, up, with the clients' default timers."""
    with Lab() as lab:
        topology = standard(lab, start=False)
        share(topology, SHARED, "netlink")
        hosts = []
        for number in range(clients):
            host = client_host(lab, f"client{number}", f"192.168.50.{FIRST + number + 1}", topology.secret)
            default_timers(host)
            connect_to(host, SHARED)
            hosts.append(host)
        built = Vrrp(topology, hosts)
        built.start()
        yield built


def returned(traffic: Sequence[Traffic], began: float, killed: float, came: float) -> list[tuple[float, float]]:
    """Of each client whose traffic came back, in seconds: its longest time without an answer since the gateway's end
    `began`, and until its first answer once the address had come. The gateway may answer until it is `killed`: that
    takes a while."""
    firsts = [(one, one.first_after(max(came, killed))) for one in traffic]
    return [(one.silence_since(began), first - came) for one, first in firsts if first is not None]


def measure(built: Vrrp, told: Progress) -> dict[str, Any]:
    """The first gateway is killed: how long each client has no traffic, and how much of that VRRP needs."""
    before, news = built.sessions(), AddressNews(built.topology.gw2)
    told("VRRP's master is killed", 0.5)
    began = time.time()
    built.kill_master()
    killed = time.time()
    wait_until(lambda: news.came(began) is not None, "the other gateway to be VRRP's master")
    came = news.came(began)
    assert came is not None
    times = returned(built.traffic(came), began, killed, came)
    news.stop()
    continued = sum(one == other for one, other in zip(before, built.sessions(), strict=True))
    return {
        "clients": len(built.clients),
        "continued": min(continued, len(times)),
        "detection_ms": round((came - began) * 1000),
        "silence_ms": _quantiles([silence for silence, _ in times]),
        "beyond_ms": _quantiles([beyond for _, beyond in times]),
    }


def _quantiles(seconds: list[float]) -> dict[str, int]:
    return {name: round(quantile(seconds, share) * 1000) for name, share in (("p50", 0.5), ("max", 1.0))}


def lines(result: dict[str, Any]) -> list[str]:
    """For docs/performance.md."""
    silence, beyond, clients = result["silence_ms"], result["beyond_ms"], result["clients"]
    return [
        f"With keepalived, as in the shipped example: charon, sidecar and keepalived of a gateway with {clients} real "
        "ordinary clients get SIGKILL. Each client sends a packet every 10 ms to a server behind the gateways.",
        "",
        "| | median | longest |",
        "|---|---|---|",
        f"| a client without traffic | {silence['p50']:,} ms | {silence['max']:,} ms |",
        f"| beyond VRRP's detection, {result['detection_ms']:,} ms | {beyond['p50']:,} ms | {beyond['max']:,} ms |",
        "",
        f"{result['continued']} of {clients} clients continued with the IKE_SA that they had.",
    ]
