"""The network behind the gateways: a server there reaches a client wherever its session is, by real routing daemons."""

from __future__ import annotations

import pytest

from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from bridge.lab.demo import Ping
from bridge.lab.topology import SERVER
from failover_support import connect, fresh, resume, the_sa

pytestmark = pytest.mark.lab


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def way_back(topology: Topology, address: str) -> str:
    """The gateway, by its inner address, that the server sends to for a client's address; empty if it has no route."""
    words = topology.server.run("ip", "route", "show", address).stdout.split()
    return words[words.index("via") + 1] if "via" in words else ""


def test_a_server_reaches_the_client_before_and_after_its_gateway_died(topology: Topology) -> None:
    [address] = connect(topology)["local-vips"]
    wait_until(lambda: way_back(topology, address) == "10.10.1.1", "the route to gw1")
    assert topology.server.ping(address) == 3
    ping = Ping(topology.client, SERVER)
    wait_until(lambda: ping.answers() >= 10, "traffic to the server")
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    at = ping.answers()
    wait_until(lambda: ping.answers() >= at + 10, "traffic to the server at the other gateway")
    ping.stop()
    assert way_back(topology, address) == "10.10.1.2"
    assert topology.server.ping(address) == 3


def test_a_session_that_ended_leaves_no_route_behind(topology: Topology) -> None:
    [address] = connect(topology)["local-vips"]
    wait_until(lambda: way_back(topology, address) != "", "the route")
    topology.client.swanctl("--terminate", "--ike-id", the_sa(topology.client)["uniqueid"])
    wait_until(lambda: way_back(topology, address) == "", "the end of the route")
