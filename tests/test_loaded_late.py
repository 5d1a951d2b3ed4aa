"""Connections that were loaded just before they are needed: no event tells of that, so charon is asked."""

from __future__ import annotations

import pytest

from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from bridge.lab.topology import SITE
from failover_support import connect, fresh, resume, status

pytestmark = pytest.mark.lab


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def test_a_gateway_resumes_a_session_right_after_its_connection_was_loaded(topology: Topology) -> None:
    connect(topology)
    gateway = topology.gw2
    gateway.charon.stop()
    wait_until(lambda: not status(topology, "gw2")["charon"]["reachable"], "the end of charon at gw2")
    gateway.charon.start(load=False)
    wait_until(lambda: status(topology, "gw2")["charon"]["reachable"], "charon, back at gw2")
    topology.kill_gateway(topology.gw1)
    gateway.charon.load()
    assert resume(topology, "--to", gateway.address)["result"] == "resumed"
    assert topology.client.ping(SITE) == 3


def test_a_client_resumes_right_after_its_connection_was_loaded(topology: Topology) -> None:
    connect(topology)
    client = topology.client
    path = client.etc / "swanctl/swanctl.conf"
    whole = path.read_text()
    assert "home-gw2 : " in whole
    path.write_text(whole.replace("home-gw2 : ", "home-elsewhere : "))
    try:
        client.charon.load()
        # its sidecar asks charon for a connection that is gone, too
        assert resume(topology, "--to", topology.gw2.address)["result"] == "failed"
    finally:
        path.write_text(whole)
    client.charon.load()
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
    assert client.ping(SITE) == 3
