"""Clients of a gateway that is drained, one of them without a sidecar."""

from __future__ import annotations

from dataclasses import dataclass, field

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.sidecar import Sidecar
from bridge.lab.topology import CHOICES, client_config, client_host
from failover_support import complete, established, stub_key, the_sa
from releases_support import on_all


@dataclass
class Clients:
    """`client`, `second` and `third` have a sidecar, `plain` has none."""

    topology: Topology
    hosts: list[Host]
    plain: Host
    sidecars: list[Sidecar] = field(default_factory=list)

    @property
    def all(self) -> list[Host]:
        return [*self.hosts, self.plain]

    def connect(self) -> None:
        """A session of each at gw1, their stubs in the bank."""
        for host in self.all:
            host.charon.initiate("net", "home")
        for host in self.all:
            key = stub_key(self.topology.gw1.address, the_sa(host)["responder-spi"])
            wait_until(lambda key=key: complete(self.topology, key), "the stub of the session")  # type: ignore[misc]

    def at(self, gateway: Host) -> set[str]:
        """Names of the hosts whose one session is at a gateway."""
        return {host.name for host in self.all if [sa["remote-host"] for sa in established(host)] == [gateway.address]}


def four(lab: Lab, release: str | None = None) -> Clients:
    """The standard lab with four clients, all of them started, all hosts with this release's strongSwan."""
    topology = standard(lab, start=False, releases=on_all(release))
    second = client_host(lab, "second", "192.168.50.11", topology.secret, release=release)
    third = client_host(lab, "third", "192.168.50.12", topology.secret, release=release)
    plain = client_host(lab, "plain", "192.168.50.13", topology.secret, release=release)
    topology.start()
    made = Clients(topology, [topology.client, second, third], plain)
    for host in (second, third):
        sidecar = host.sidecar("client", client_config(CHOICES))
        sidecar.start(wait=False)
        made.sidecars.append(sidecar)
    for host in (second, third, plain):
        host.charon.start()
    for sidecar in made.sidecars:
        sidecar.wait_ready()
    return made
