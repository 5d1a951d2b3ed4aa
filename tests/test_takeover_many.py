"""Twenty ordinary clients over three gateways that share an address: one gateway after the other dies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.router import gateway_bird
from bridge.lab.topology import BANK_KEY, INSIDE, SITE, client_host, gateway_config, swanctl
from failover_support import established, spis
from takeover_support import (
    client_settings,
    gateway_settings,
    move,
    shared_topology,
    start,
    wait_stub,
)

pytestmark = [pytest.mark.lab, pytest.mark.alone]

CLIENTS = 20
FIRST = 110
"""last octet of the first client's address"""


@pytest.fixture
def topology(each_release: str | None) -> Iterator[Topology]:
    with Lab(release=each_release) as lab:
        topology = shared_topology(lab)
        third_gateway(topology)
        for number in range(CLIENTS):
            host = client_host(lab, f"client{number}", f"192.168.50.{FIRST + number}", topology.secret)
            own = {"local.id": f"{host.name}@example.org", **client_settings()}
            host.configure(render({f"connections.home.{key}": value for key, value in own.items()}), "own.conf")
        start(topology, topology.gw1)
        topology.lab.hosts["gw3"].charon.start()
        yield topology


def third_gateway(topology: Topology) -> None:
    """As the two of the standard lab."""
    lab = topology.lab
    host = lab.add_host("gw3", "192.168.50.3/24", local=(f"{SITE}/32",), forward=True)
    lab.attach(host, "10.10.1.3/24", network=INSIDE)
    topology.routers.append(gateway_bird(host, "10.10.1.3"))
    swanctl(host, "gateway", f'ike-clients {{ secret = "{topology.secret}" }}')
    settings = {f"connections.gw.{key}": value for key, value in gateway_settings(None).items()}
    host.configure(render(settings) + "\npools { clients { addrs = 10.20.3.0/24 } }\n")
    host.write(BANK_KEY, (topology.gw1.etc / "ike-sa-sync/bank.key").read_text(), mode=0o600)
    config = gateway_config(host.address, topology.bank.url)
    config["takeover"] = topology.gateways["gw1"].config["takeover"]
    topology.gateways["gw3"] = host.sidecar("gateway", config)


def clients(topology: Topology) -> list[Host]:
    return [topology.lab.hosts[f"client{number}"] for number in range(CLIENTS)]


def all_answered(topology: Topology) -> bool:
    return all(host.ping(SITE, count=1, timeout=1.0) for host in clients(topology))


def test_twenty_clients_go_on_when_two_of_three_gateways_die(topology: Topology) -> None:
    before = {}
    for host in clients(topology):
        host.charon.start()
        host.charon.initiate("net", "home")
        [sa] = established(host)
        before[host.name] = spis(sa)
    for _, spi_r in before.values():
        wait_stub(topology, spi_r)
    assert all_answered(topology)
    requests = {host.name: host.charon.text().count("IKE_SA_INIT request") for host in clients(topology)}

    gateways = [topology.gw1, topology.gw2, topology.lab.hosts["gw3"]]
    for old, new in itertools.pairwise(gateways):
        outcome = move(topology, old, new)
        assert (outcome["found"], outcome["taken"], outcome["not_taken"]) == (CLIENTS, CLIENTS, [])
        wait_until(lambda: all_answered(topology), "traffic of all clients")
        assert {host.name: spis(sa) for host in clients(topology) for sa in established(host)} == before

    # the first one comes back, and the third one dies
    [first, _, third] = gateways
    topology.gateways["gw1"].start(wait=False)
    first.charon.start()
    topology.gateways["gw1"].wait_ready()
    outcome = move(topology, third, first)
    assert (outcome["found"], outcome["taken"]) == (CLIENTS, CLIENTS)
    wait_until(lambda: all_answered(topology), "traffic of all clients")
    assert {host.name: spis(sa) for host in clients(topology) for sa in established(host)} == before
    assert {host.name: host.charon.text().count("IKE_SA_INIT request") for host in clients(topology)} == requests
