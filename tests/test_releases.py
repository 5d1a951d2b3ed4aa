"""Resumption between strongSwan releases, each Debian's own: 5.9.8, 6.0.1 and 6.1.0, in every role.

A session begins at gw1, moves to gw2 and back: all combinations of three releases in the three roles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.demo import Ping
from bridge.lab.host import Host
from bridge.lab.releases import RELEASES
from bridge.lab.topology import SITE
from failover_support import connect, established, failed_over, fresh, resume, spis, the_sa

pytestmark = [pytest.mark.lab, pytest.mark.releases]

COMBINATIONS = list(product(RELEASES, repeat=3))


@pytest.fixture(scope="module", params=COMBINATIONS, ids="-".join)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab; gw1, gw2 and the client have the strongSwan of three Debian releases."""
    with Lab() as lab:
        yield standard(lab, releases=dict(zip(("gw1", "gw2", "client"), request.param, strict=True)))


@pytest.fixture(autouse=True, params=[True, False], ids=["at once", "one by one"])
def at_once(request: pytest.FixtureRequest, topology: Topology) -> bool:
    """Whether CHILD_SAs come up in the round trip of their IKE_SA, or by CREATE_CHILD_SA after it."""
    wanted: bool = request.param
    resumption = {"children_at_once": wanted}
    if topology.agent.config.get("resume") != resumption:
        topology.agent.config["resume"] = resumption
        if topology.agent.running:
            topology.agent.stop()
    fresh(topology)
    return wanted


def restart(topology: Topology, host: Host) -> None:
    """A killed gateway comes back."""
    topology.gateways[host.name].start(wait=False)
    host.charon.start()
    topology.gateways[host.name].wait_ready()


def test_a_session_goes_to_the_other_gateway_with_its_traffic_and_back(
    topology: Topology, at_once: bool, tell: Callable[..., None]
) -> None:
    before = connect(topology)
    ping = Ping(topology.client, SITE)
    hosts = (topology.gw1, topology.gw2, topology.client)
    runs = {host.name: host.charon.vici().version()["version"].decode() for host in hosts}
    for dead, alive in ((topology.gw1, topology.gw2), (topology.gw2, topology.gw1)):
        topology.kill_gateway(dead)
        outcome = resume(topology)
        about = f"{runs[dead.name]} to {runs[alive.name]}, client {runs['client']}"
        tell(about, "CHILD_SAs at once" if at_once else "CHILD_SAs one by one", outcome)
        assert (outcome["result"], outcome["gateway"]) == ("resumed", alive.address)
        at = ping.answers()
        wait_until(lambda at=at: ping.answers() >= at + 5, f"traffic at {alive.name}")  # type: ignore[misc]
        assert spis(the_sa(alive)) == spis(the_sa(topology.client)) == (outcome["spi_i"], outcome["spi_r"])
        assert the_sa(topology.client)["local-vips"] == before["local-vips"]
        restart(topology, dead)
    ping.stop()


def test_a_resumed_sa_is_rekeyed_from_both_sides_and_deleted(topology: Topology) -> None:
    failed_over(topology)
    for host in (topology.client, topology.gw2):
        old = the_sa(host)
        host.swanctl("--rekey", "--ike", old["name"])
        wait_until(lambda host=host, old=old: rekeyed(host, old), f"the IKE_SA that {host.name} rekeyed")  # type: ignore[misc]
        child = list(the_sa(host)["child-sas"])
        host.swanctl("--rekey", "--child", "net")
        wait_until(
            lambda host=host, child=child: list(the_sa(host)["child-sas"]) not in ([], child),  # type: ignore[misc]
            f"the CHILD_SA that {host.name} rekeyed",
        )
        assert topology.client.ping(SITE) == 3
    topology.client.swanctl("--terminate", "--ike", the_sa(topology.client)["name"])
    wait_until(lambda: not topology.client.charon.sas() and not topology.gw2.charon.sas(), "the end on both sides")
    wait_until(lambda: not topology.bank.stubs(), "the end of the stub")


def rekeyed(host: Host, old: dict[str, Any]) -> bool:
    """Whether the IKE_SA of a host has given way to a new one."""
    return [spis(sa) for sa in established(host)] not in ([], [spis(old)]) and len(established(host)) == 1
