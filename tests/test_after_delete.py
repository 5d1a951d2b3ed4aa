"""`resume.after_delete: handshake`: a session that its gateway ends is set up again, one that the client ends not."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import SLOWNESS, wait_until
from bridge.lab.host import Host
from bridge.lab.topology import SITE
from failover_support import connect, established, fresh, last_move, the_sa

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def lab_topology() -> Iterator[Topology]:
    with Lab() as lab:
        topology = standard(lab, start=False)
        topology.agent.config["resume"] = {"after_delete": "handshake"}
        topology.start()
        yield topology


@pytest.fixture
def topology(lab_topology: Topology) -> Topology:
    fresh(lab_topology)
    lab_topology.agent.stop()
    lab_topology.agent.start()
    return lab_topology


def terminate(host: Host) -> None:
    host.swanctl("--terminate", "--ike-id", the_sa(host)["uniqueid"], "--timeout", "5")


def at(topology: Topology, gateway: Host) -> bool:
    return [sa["remote-host"] for sa in established(topology.client)] == [gateway.address]


@pytest.mark.parametrize("how", ["terminated", "stopped"])
def test_a_session_that_its_gateway_ends_is_set_up_again_at_another(topology: Topology, how: str) -> None:
    connect(topology)
    if how == "terminated":
        terminate(topology.gw1)
    else:
        # what systemctl stop and a reboot do to sessions that did not move before
        topology.gw1.charon.stop()
    wait_until(lambda: at(topology, topology.gw2), "the session at the other gateway")
    wait_until(lambda: last_move(topology).get("reason") == "deleted-by-gateway", "the handshake's outcome")
    assert last_move(topology)["result"] == "fallback"
    assert topology.client.ping(SITE) == 3


def test_a_session_that_its_own_host_ends_stays_ended(topology: Topology) -> None:
    connect(topology)
    before = topology.agent.text().count("deleted-by-gateway")
    terminate(topology.client)
    wait_until(lambda: not topology.client.charon.sas(), "the end")
    settled = time.monotonic() + 5 * SLOWNESS  # longer than the pause before a handshake
    wait_until(lambda: time.monotonic() > settled, "what would follow")
    assert not topology.client.charon.sas()
    assert topology.agent.text().count("deleted-by-gateway") == before
