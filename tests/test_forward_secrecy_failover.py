"""Forward secrecy between real charons, in the standard lab."""

from __future__ import annotations

import pytest

from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from bridge.lab.topology import SITE
from failover_support import agent_with, connect, established, fresh, resume, spis, the_sa
from probe_support import configured

pytestmark = pytest.mark.lab

ASKING = {"forward_secrecy": True}


@pytest.fixture(autouse=True)
def start_afresh(topology: Topology) -> None:
    fresh(topology)


def test_a_session_goes_on_with_keys_of_a_new_exchange_and_both_charons_agree_on_them(topology: Topology) -> None:
    with agent_with(topology, resume=ASKING):
        connect(topology)
        topology.kill_gateway(topology.gw1)
        outcome = resume(topology)
        assert outcome["result"] == "resumed"
        assert outcome["gateway"] == topology.gw2.address
        assert topology.client.ping(SITE) == 3
        # an IKE rekey needs SK_d and the protection of both
        before = spis(the_sa(topology.client))
        topology.client.swanctl("--rekey", "--ike", outcome["connection"])
        wait_until(
            lambda: [spis(sa) for sa in established(topology.client)] not in ([], [before]), "the rekeyed IKE_SA"
        )
        assert topology.client.ping(SITE) == 3


def test_a_client_that_wants_it_shakes_hands_where_the_gateway_has_it_off(topology: Topology) -> None:
    with agent_with(topology, resume=ASKING), configured(topology.gateways["gw2"], "sync", forward_secrecy="off"):
        connect(topology)
        topology.kill_gateway(topology.gw1)
        outcome = resume(topology)
        assert outcome["result"] == "fallback"
        assert topology.client.ping(SITE) == 3


def test_a_gateway_that_requires_it_refuses_a_client_that_does_not_ask(topology: Topology) -> None:
    with configured(topology.gateways["gw2"], "sync", forward_secrecy="required"):
        connect(topology)
        topology.kill_gateway(topology.gw1)
        assert resume(topology)["result"] == "fallback"
        assert "reason=forward-secrecy-missing" in topology.gateways["gw2"].text()
