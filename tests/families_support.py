"""Sessions with virtual IPs of IPv4, of IPv6, or of both, in the standard lab."""

from __future__ import annotations

from typing import Any

from bridge.lab import Topology
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.topology import SERVER, SERVER6, client_config
from failover_support import complete, stub_key, the_sa

POOLS = {"IPv4": "clients", "IPv6": "clients6", "dual stack": "clients,clients6"}
NETWORKS = "10.10.0.0/16,fd10:10:1::/64"
VIPS = {"IPv4": "0.0.0.0", "IPv6": "::", "dual stack": "0.0.0.0,::"}


SIX = {"fd00:50::1": "home", "fd00:50::2": "home-gw2"}
"""the gateways' IPv6 addresses, and the client's connections"""


def reach_over_ipv6(built: Topology, *clients: Host) -> None:
    """Before the start: have clients reach their gateways over IPv6."""
    addresses = {f"connections.{name}.remote_addrs": address for address, name in SIX.items()}
    for client in clients:
        client.configure(render(addresses) + "\n", "six.conf")
    built.agent.config["gateways"] = client_config(SIX)["gateways"]


def address_of(topology: Topology, gateway: Host) -> str:
    """The address by which the client knows a gateway."""
    known: list[dict[str, str]] = topology.agent.config["gateways"]
    return known[int(gateway.name.removeprefix("gw")) - 1]["address"]


def give_out(gateway: Host, family: str, number: int | None = None) -> None:
    """Have a gateway give out addresses of this family. `number`: its own, where the pools are in charon's memory."""
    pools = f"pools {{ clients6 {{ addrs = fd20:0:{number}::/112 }} }}" if number is not None else ""
    children = f"children {{ net {{ local_ts = {NETWORKS} }} }}"
    gateway.configure(f"{pools}\nconnections {{ gw {{\npools = {POOLS[family]}\n{children}\n}} }}\n", "family.conf")


def ask_for(client: Host, family: str) -> None:
    """Have a client ask for addresses of this family."""
    children = f"children {{ net {{ remote_ts = {NETWORKS} }} }}"
    client.configure(f"connections {{ home {{\nvips = {VIPS[family]}\n{children}\n}} }}\n", "vips.conf")


def connect(topology: Topology) -> dict[str, Any]:
    """A session of the client, its stub in the bank, traffic flowing in each of its families."""
    topology.connect()
    sa = the_sa(topology.client)
    wait_until(lambda: complete(topology, stub_key(sa["remote-host"], sa["responder-spi"])), "the stub of the session")
    reaches(topology)
    return sa


def server_of(vip: str) -> str:
    """The server behind the gateways, in the family of a virtual IP."""
    return SERVER6 if ":" in vip else SERVER


def reaches(topology: Topology) -> None:
    """The client reaches the server behind the gateways, in each of its families."""
    for vip in the_sa(topology.client)["local-vips"]:
        server = server_of(vip)
        wait_until(lambda server=server: topology.client.ping(server, count=1) == 1, f"{server} answers {vip}")  # type: ignore[misc]
