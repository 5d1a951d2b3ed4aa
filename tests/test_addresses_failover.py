"""One virtual IP, one session, with real charons: what happens to an address when its gateway dies and comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.host import Host
from bridge.lab.sidecar import Sidecar
from bridge.lab.topology import CHOICES, client_config, client_host
from failover_support import connect, counter, fresh, the_sa

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab and a second client, `other`; clients move when they are told to only."""
    with Lab() as lab:
        built = standard(lab, start=False)
        built.agent.config["resume_on_down"] = False
        other = client_host(lab, "other", "192.168.50.11", built.secret)
        other.sidecar("client", client_config(CHOICES) | {"resume_on_down": False})
        built.start()
        other.sidecars[0].start(wait=False)
        other.charon.start()
        other.sidecars[0].wait_ready()
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    for sa in topology.lab.hosts["other"].charon.sas():
        topology.lab.hosts["other"].swanctl("--terminate", "--ike-id", sa["uniqueid"], "--force", check=False)
    fresh(topology)


def resumed_to(sidecar: Sidecar, gateway: Host) -> dict[str, Any]:
    """What `resume --to` gives on a client."""
    done = sidecar.command("resume", "--json", "--to", gateway.address, check=False)
    return dict(json.loads(done.stdout))


def restart(topology: Topology, host: Host) -> None:
    """A gateway that died comes back, with an empty pool."""
    topology.gateways[host.name].start(wait=False)
    host.charon.start()
    topology.gateways[host.name].wait_ready()


def test_a_session_does_not_come_back_to_an_address_that_a_restarted_gateway_gave_away(topology: Topology) -> None:
    other = topology.lab.hosts["other"]
    mine = connect(topology)["local-vips"]
    topology.kill_gateway(topology.gw1)
    assert resumed_to(topology.agent, topology.gw2)["result"] == "resumed"
    restart(topology, topology.gw1)
    other.charon.initiate("net", "home")
    if the_sa(other)["local-vips"] != mine:
        pytest.skip("the pool gave another address")
    before = counter(topology, "gw1", "refusals_total[address-taken]")
    outcome = resumed_to(topology.agent, topology.gw1)
    assert outcome["result"] == "fallback"
    assert counter(topology, "gw1", "refusals_total[address-taken]") > before
    assert the_sa(other)["local-vips"] == mine
    assert the_sa(topology.client)["local-vips"] != mine
    assert "reason=address-taken" in topology.gateways["gw1"].text()


def test_a_session_comes_back_to_a_gateway_that_still_has_its_old_sa(topology: Topology) -> None:
    before = connect(topology)
    assert resumed_to(topology.agent, topology.gw2)["result"] == "resumed"
    assert resumed_to(topology.agent, topology.gw1)["result"] == "resumed"
    after = the_sa(topology.client)
    assert after["local-vips"] == before["local-vips"]
    assert the_sa(topology.gw1)["responder-spi"] == after["responder-spi"]
