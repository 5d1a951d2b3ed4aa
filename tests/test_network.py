"""The network behind the gateways: a server there reaches a client wherever its session is, by real routing daemons."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.demo import Ping
from bridge.lab.host import Host
from bridge.lab.router import Frr, gateway_frr, router_frr
from bridge.lab.topology import SERVER
from failover_support import fresh, resume, the_sa
from families_support import ask_for, connect, give_out
from releases_support import OTHERS, on_all

pytestmark = pytest.mark.lab

APP = "10.10.2.10"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("bird", None), id="bird"),
        pytest.param(("frr", None), id="frr"),
        pytest.param(("frr 10", None), marks=pytest.mark.releases, id="frr 10"),
        *(pytest.param(("bird", name), marks=pytest.mark.releases, id=f"bird, {name}") for name in OTHERS),
    ],
)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab with BIRD or FRR 10 and addresses of both families, or with FRR 8, which imports no IPv6 table.
    Its server is the router to a further network too, with a host that knows nothing but that router."""
    daemon, release = request.param
    with Lab() as lab:
        built = standard(lab, start=False, releases=on_all(release))
        built.agent.config["resume_on_down"] = False
        if daemon != "bird":
            ten = daemon == "frr 10"
            gateways = [gateway_frr(built.gw1, "10.10.1.1", ten=ten), gateway_frr(built.gw2, "10.10.1.2", ten=ten)]
            built.routers = [router_frr(built.server), *gateways]
        family = "IPv4" if daemon == "frr" else "dual stack"
        for number, host in ((1, built.gw1), (2, built.gw2)):
            give_out(host, family, number)
        ask_for(built.client, family)
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


def old_frr(topology: Topology) -> bool:
    """Whether the gateways run FRR 8."""
    daemon = topology.routers[-1]
    return isinstance(daemon, Frr) and not daemon.ten


def way_back(topology: Topology, address: str) -> str:
    """The gateway that the server sends to for a client's address; empty if it has no route."""
    words = topology.server.run("ip", "-6" if ":" in address else "-4", "route", "show", address).stdout.split()
    via = words[words.index("via") + 1] if "via" in words else ""
    for host in (topology.gw1, topology.gw2):
        # of IPv6 a link-local one
        if via and f" {via}/" in host.run("ip", "address", "show").stdout:
            return host.name
    return via


def routed(topology: Topology, addresses: list[str], gateway: Host) -> None:
    """Wait until the server sends to this gateway for all of these addresses."""
    for address in addresses:
        wait_until(
            lambda address=address: way_back(topology, address) == gateway.name,  # type: ignore[misc]
            f"the route of {address} to {gateway.name}",
        )
        assert topology.server.ping(address) == 3


def test_a_server_reaches_the_client_before_and_after_its_gateway_died(topology: Topology) -> None:
    if old_frr(topology):
        pytest.skip("FRR 8 keeps the routes of a gateway that lives on without its charon: docs/network.md")
    addresses = connect(topology)["local-vips"]
    assert len(addresses) == 2
    routed(topology, addresses, topology.gw1)
    ping = Ping(topology.client, SERVER)
    wait_until(lambda: ping.answers() >= 10, "traffic to the server")
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    at = ping.answers()
    wait_until(lambda: ping.answers() >= at + 10, "traffic to the server at the other gateway")
    ping.stop()
    routed(topology, addresses, topology.gw2)


def test_a_session_that_ended_leaves_no_route_behind(topology: Topology) -> None:
    addresses = connect(topology)["local-vips"]
    routed(topology, addresses, topology.gw1)
    topology.client.swanctl("--terminate", "--ike-id", the_sa(topology.client)["uniqueid"])
    wait_until(lambda: not any(way_back(topology, address) for address in addresses), "the end of the routes")


def test_a_host_behind_an_inner_router_reaches_the_client_wherever_its_session_is(topology: Topology) -> None:
    app = topology.lab.hosts["app"]
    address = next(vip for vip in connect(topology)["local-vips"] if ":" not in vip)
    wait_until(lambda: app.ping(address) == 3, "the way from the host behind the router")
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
    wait_until(lambda: way_back(topology, address) == "gw2", "the route to gw2")
    assert app.ping(address) == 3
    assert topology.client.ping(APP) == 3
    if old_frr(topology):
        return
    topology.kill_gateway(topology.gw2)
    assert resume(topology)["result"] == "resumed"
    wait_until(lambda: way_back(topology, address) == "gw1", "the route to gw1")
    assert app.ping(address) == 3
    assert topology.client.ping(APP) == 3
