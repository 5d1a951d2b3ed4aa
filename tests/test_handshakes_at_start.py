"""A charon with HA pools that was started: its first handshake waits until it assigns addresses, on real charons.

charon refuses an address until then (INTERNAL_ADDRESS_FAILURE), and its client keeps an IKE_SA without a CHILD_SA.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.topology import SITE
from failover_support import counter, established, the_sa

pytestmark = pytest.mark.lab

INITIATE = ("swanctl", "--initiate", "--child", "net", "--ike", "home", "--timeout", "60")


@pytest.fixture
def topology(each_release: str | None) -> Iterator[Topology]:
    with Lab(release=each_release) as lab:
        built = standard(lab, start=False, ha_pools=True)
        built.agent.config["resume_on_down"] = False
        built.start()
        yield built


def test_the_first_handshake_after_a_start_of_charon_gets_an_address(topology: Topology) -> None:
    said, told = topology.gw1.charon.text, topology.gateways["gw1"].text
    known = len(told())
    topology.gw1.charon.crash()
    # a charon that was started waits for the bank, which knows the addresses that sessions elsewhere have
    os.kill(topology.bank.pid, signal.SIGSTOP)
    try:
        topology.gw1.charon.start()
        begun = len(said())
        # until the sidecar has reached it, nothing is held
        wait_until(lambda: "event=handshakes-wait" in told()[known:], "the gateway's queue, closed")
        initiating = topology.client.popen(*INITIATE)
        wait_until(lambda: "initiating IKE_SA" in topology.client.charon.text(), "the client's request")
        wait_until(lambda: requests_wait(topology), "the request in the gateway's queue")
        assert "parsed IKE_SA_INIT" not in said()[begun:]
    finally:
        os.kill(topology.bank.pid, signal.SIGCONT)
    assert initiating.wait(60) == 0
    assert len(the_sa(topology.client)["child-sas"]) == len(established(topology.gw1)) == 1
    assert topology.client.ping(SITE) == 3


def requests_wait(topology: Topology) -> bool:
    return counter(topology, "gw1", "nfqueue_waiting") > 0
