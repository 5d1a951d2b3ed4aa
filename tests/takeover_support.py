"""What the tests of takeover do again and again: gateways that share an address, and clients without a sidecar."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bridge.lab import Lab, Topology, standard
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.topology import SITE
from failover_support import established, stub_key
from probe_support import stored_children

SHARED = "192.168.50.100"
SHARED6 = "fd00:50::100"

Outcome = dict[str, Any]


@contextmanager
def sharing(
    release: str | None = None,
    *,
    gateway: dict[str, Any] | None = None,
    client: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Topology]:
    """The standard lab, up, with SHARED at gw1: `gateway` and `client` are settings of their swanctl connection, and
    the client has no sidecar. `release`: of all hosts."""
    with Lab(release=release) as lab:
        topology = shared_topology(lab, gateway=gateway, client=client, **options)
        start(topology, topology.gw1)
        yield topology


def shared_topology(
    lab: Lab,
    *,
    trigger: str = "command",
    gateway: dict[str, Any] | None = None,
    client: dict[str, Any] | None = None,
    **options: Any,
) -> Topology:
    """The same, not started."""
    topology = standard(lab, start=False, **options)
    for host in (topology.gw1, topology.gw2):
        host.configure(render({f"connections.gw.{key}": value for key, value in gateway_settings(gateway).items()}))
        topology.gateways[host.name].config["takeover"] = {"addresses": [SHARED, SHARED6], "trigger": trigger}
    own = {"local.id": "client@example.org", **client_settings(client)}
    topology.client.configure(render({f"connections.home.{key}": value for key, value in own.items()}) + "\n")
    return topology


def gateway_settings(more: dict[str, Any] | None) -> dict[str, Any]:
    return {"mobike": "no", "dpd_delay": "0s", **(more or {})}


def client_settings(more: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"remote_addrs": SHARED, "mobike": "no", "dpd_delay": "0s", **(more or {})}


def start(topology: Topology, holder: Host | None = None, *, client: bool = True) -> None:
    """All but the client's sidecar, and charon at the client unless it has another daemon; `holder` has the shared
    addresses from the beginning."""
    topology.bank.start()
    for router in topology.routers:
        router.start()
    if holder is not None:
        give(holder)
    for sidecar in topology.gateways.values():
        sidecar.launch()
    for sidecar in topology.gateways.values():
        sidecar.wait_held()
    for host in (topology.gw1, topology.gw2, *((topology.client,) if client else ())):
        host.charon.start()
    for sidecar in topology.gateways.values():
        sidecar.wait_ready()


def give(host: Host) -> None:
    """Let a host have the shared addresses, and say so to its neighbours."""
    host.run("ip", "address", "add", f"{SHARED}/24", "dev", "eth0")
    host.run("ip", "address", "add", f"{SHARED6}/64", "dev", "eth0", "nodad")
    host.run("arping", "-q", "-c", "1", "-U", "-I", "eth0", SHARED, check=False)


def take_away(host: Host) -> None:
    """Take them from it."""
    host.run("ip", "address", "del", f"{SHARED}/24", "dev", "eth0", check=False)
    host.run("ip", "address", "del", f"{SHARED6}/64", "dev", "eth0", check=False)


def forget_neighbours(*hosts: Host) -> None:
    """What a gratuitous ARP does."""
    for host in hosts:
        host.run("ip", "neigh", "flush", "all")


def connect(topology: Topology, connection: str = "home", address: str = SHARED) -> dict[str, Any]:
    """A session of the client at the shared address, its stub in the bank. Gives the client's IKE_SA."""
    topology.connect(connection)
    [sa] = established(topology.client)
    wait_stub(topology, sa["responder-spi"], address)
    assert topology.client.ping(SITE) == 3
    return sa


def wait_stub(topology: Topology, spi: str, address: str = SHARED) -> None:
    wait_until(lambda: bool(topology.bank.cli("HGET", stub_key(address, spi), "vips")), "the stub of the session")


def wait_children(topology: Topology, spi: str, *names: str, address: str = SHARED) -> None:
    """Until the stub has these CHILD_SAs: what its gateway has not stored yet dies with it."""
    key = stub_key(address, spi)
    wait_until(lambda: stored_children(topology, key) == sorted(names), "the CHILD_SAs in the stub")


def die(topology: Topology, host: Host) -> None:
    """A gateway dies, and its address is free."""
    topology.kill_gateway(host)
    take_away(host)


def take(topology: Topology, host: Host, *arguments: str, address: str = SHARED) -> Outcome:
    """The address comes to a gateway, which takes the sessions at it over."""
    give(host)
    forget_neighbours(*topology.lab.hosts.values())
    done = topology.gateways[host.name].command("takeover", "--address", address, "--json", *arguments, check=False)
    assert done.stdout, done.stderr
    outcome: Outcome = json.loads(done.stdout)
    return outcome


def give_up(topology: Topology, host: Host, address: str = SHARED) -> Outcome:
    """`ike-sa-sync yield` at a gateway."""
    done = topology.gateways[host.name].command("yield", "--address", address, "--json", check=False)
    assert done.stdout, done.stderr
    outcome: Outcome = json.loads(done.stdout)
    return outcome


def move(topology: Topology, old: Host, new: Host, *arguments: str) -> Outcome:
    """One gateway dies, the other one takes over."""
    die(topology, old)
    return take(topology, new, *arguments)


def answered(topology: Topology, host: Host, count: int = 3, target: str = SITE) -> bool:
    """Whether all echo requests of the client through the tunnel are answered."""
    return host.ping(target, count=count, timeout=1.0) == count


def wait_log(host: Host, text: str, after: int = 0) -> None:
    """Until charon of a host has written this."""
    wait_until(lambda: text in host.charon.text()[after:], f"{text!r} in the log of {host.name}")


def rekey(host: Host, **what: str) -> None:
    """Rekey an IKE_SA (ike) or CHILD_SA (child) from a host."""
    [(key, name)] = what.items()
    host.swanctl("--rekey", f"--{key}", name)


def rekeyed_child(host: Host, act: Callable[[], None]) -> None:
    """Have `act` rekey the client's CHILD_SA, and wait until it is another one."""

    def spi() -> str:
        [sa] = established(host)
        newest: dict[str, str] = max(sa["child-sas"].values(), key=lambda child: int(child["uniqueid"]))
        return newest["spi-in"]

    before = spi()
    act()
    wait_until(lambda: spi() != before, "another CHILD_SA")
