"""The network behind the gateways: a server there reaches a client wherever its session is, by real routing daemons."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.demo import Ping
from bridge.lab.router import Frr, gateway_frr, router_frr
from bridge.lab.topology import SERVER
from failover_support import connect, fresh, resume, the_sa

pytestmark = pytest.mark.lab

APP = "10.10.2.10"


@pytest.fixture(scope="module", params=["bird", "frr"])
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab with BIRD or FRR. Its server is the router to a further network too, with a host that knows
    nothing but that router."""
    with Lab() as lab:
        built = standard(lab, start=False)
        built.agent.config["resume_on_down"] = False
        if request.param == "frr":
            gateways = [gateway_frr(built.gw1, "10.10.1.1"), gateway_frr(built.gw2, "10.10.1.2")]
            built.routers = [router_frr(built.server), *gateways]
        lab.add_network("apps")
        lab.attach(built.server, "10.10.2.1/24", network="apps")
        app = lab.add_host("app", f"{APP}/24", network="apps")
        app.run("ip", "route", "add", "default", "via", "10.10.2.1")
        for host in (built.gw1, built.gw2):
            host.run("ip", "route", "add", "10.10.2.0/24", "via", SERVER)
        built.start()
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def way_back(topology: Topology, address: str) -> str:
    """The gateway, by its inner address, that the server sends to for a client's address; empty if it has no route."""
    words = topology.server.run("ip", "route", "show", address).stdout.split()
    return words[words.index("via") + 1] if "via" in words else ""


def test_a_server_reaches_the_client_before_and_after_its_gateway_died(topology: Topology) -> None:
    if isinstance(topology.routers[0], Frr):
        pytest.skip("FRR keeps the routes of a gateway that lives on without its charon: docs/network.md")
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


def test_a_host_behind_an_inner_router_reaches_the_client_wherever_its_session_is(topology: Topology) -> None:
    app = topology.lab.hosts["app"]
    [address] = connect(topology)["local-vips"]
    wait_until(lambda: app.ping(address) == 3, "the way from the host behind the router")
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
    wait_until(lambda: way_back(topology, address) == "10.10.1.2", "the route to gw2")
    assert app.ping(address) == 3
    assert topology.client.ping(APP) == 3
    if isinstance(topology.routers[0], Frr):
        return
    topology.kill_gateway(topology.gw2)
    assert resume(topology)["result"] == "resumed"
    wait_until(lambda: way_back(topology, address) == "10.10.1.1", "the route to gw1")
    assert app.ping(address) == 3
    assert topology.client.ping(APP) == 3
