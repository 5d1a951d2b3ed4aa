"""Resumption between strongSwan releases, each Debian's own: 5.9.8, 6.0.1 and 6.1.0, in every role.

A session moves from gw1 to gw2 and back, so every pair of a gateway's and a client's release is there twice and more,
and every pair of gateways' releases in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement, product

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.demo import Ping
from bridge.lab.host import Host
from bridge.lab.releases import RELEASES
from bridge.lab.topology import SITE
from failover_support import connect, established, failed_over, fresh, resume, spis, the_sa

pytestmark = [pytest.mark.lab, pytest.mark.releases]

COMBINATIONS = [
    (gw1, gw2, client) for (gw1, gw2), client in product(combinations_with_replacement(RELEASES, 2), RELEASES)
]


@pytest.fixture(scope="module", params=COMBINATIONS, ids=lambda names: "{}, {}, client {}".format(*names))
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab, its hosts' strongSwan of different releases."""
    with Lab() as lab:
        yield standard(lab, releases=dict(zip(("gw1", "gw2", "client"), request.param, strict=True)))


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def restart(topology: Topology, host: Host) -> None:
    """A killed gateway comes back."""
    topology.gateways[host.name].start(wait=False)
    host.charon.start()
    topology.gateways[host.name].wait_ready()


def test_a_session_goes_to_the_other_gateway_with_its_traffic_and_back(topology: Topology) -> None:
    before = connect(topology)
    ping = Ping(topology.client, SITE)
    for dead, alive in ((topology.gw1, topology.gw2), (topology.gw2, topology.gw1)):
        topology.kill_gateway(dead)
        outcome = resume(topology)
        assert (outcome["result"], outcome["gateway"]) == ("resumed", alive.address)
        at = ping.answers()
        wait_until(lambda at=at: ping.answers() >= at + 5, f"traffic at {alive.name}")  # type: ignore[misc]
        assert spis(the_sa(alive)) == spis(the_sa(topology.client)) == (outcome["spi_i"], outcome["spi_r"])
        assert the_sa(topology.client)["local-vips"] == before["local-vips"]
        restart(topology, dead)
    ping.stop()


@pytest.mark.parametrize("side", ["client", "gw2"])
def test_a_resumed_sa_is_rekeyed_with_its_child(topology: Topology, side: str) -> None:
    failed_over(topology)
    host = topology.lab.hosts[side]
    old = the_sa(host)
    host.swanctl("--rekey", "--ike", old["name"])
    wait_until(lambda: len(established(host)) == 1 and spis(established(host)[0]) != spis(old), "the rekeyed IKE_SA")
    host.swanctl("--rekey", "--child", "net")
    wait_until(lambda: list(the_sa(host)["child-sas"]) not in ([], list(old["child-sas"])), "the rekeyed CHILD_SA")
    assert topology.client.ping(SITE) == 3


@pytest.mark.parametrize("side", ["client", "gw2"])
def test_a_resumed_sa_is_deleted(topology: Topology, side: str) -> None:
    failed_over(topology)
    host = topology.lab.hosts[side]
    host.swanctl("--terminate", "--ike", the_sa(host)["name"])
    wait_until(lambda: not topology.client.charon.sas() and not topology.gw2.charon.sas(), "the end on both sides")
    wait_until(lambda: not topology.bank.stubs(), "the end of the stub")
