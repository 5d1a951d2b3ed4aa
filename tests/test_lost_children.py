"""CHILD_SAs that charon lists and whose report the sidecar has missed: they get new keys, which charon reports.

A datagram of the HA channel is lost where the sidecar is restarted in the midst of rekeyings, or its buffer was full.
"""

from __future__ import annotations

import pytest

from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.topology import SITE
from failover_support import connect, fresh, lost, resume, the_sa

pytestmark = pytest.mark.lab


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)
    connect(topology)


def known(topology: Topology) -> list[list[str]]:
    """The CHILD_SAs of each IKE_SA that gw1's sidecar knows."""
    return [sa["children"] for sa in topology.gateways["gw1"].ask("status")["sas"]]


def numbers(host: Host) -> list[str]:
    """How charon counts the CHILD_SAs of its one IKE_SA."""
    return [child["uniqueid"] for child in the_sa(host)["child-sas"].values() if child["state"] != "DELETED"]


def test_a_child_sa_whose_rekeying_was_not_reported_is_rekeyed_once_and_comes_along(topology: Topology) -> None:
    # what charon says on the HA channel
    with lost(topology.gw1, "INPUT", "-i", "lo", "-d", "127.0.0.2", "-p", "udp", "--dport", "4510"):
        topology.client.swanctl("--rekey", "--child", "net")
        wait_until(lambda: numbers(topology.gw1) == ["2"], "the rekeying")
    wait_until(lambda: known(topology) == [["net"]], "the CHILD_SA", 70)
    wait_until(lambda: numbers(topology.gw1) == ["3"], "the end of the old one")
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["children"] == ["net"]
    assert topology.client.ping(SITE) == 3
