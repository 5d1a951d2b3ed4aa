"""charon on other ports than 500 and 4500, on either side."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.topology import SITE
from failover_support import connect, fresh, resume, the_sa

pytestmark = pytest.mark.lab

# from its own port for NAT-T: from 500 charon would go on to 4500
PORT = "connections { home { local_port = 4500\n remote_port = 4501 } }\n"


@pytest.fixture(scope="module", params=["the client's charon.port = 0", "the gateways' port_nat_t = 4501"])
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    with Lab() as lab:
        built = standard(lab, start=False)
        built.agent.config["resume_on_down"] = False
        if request.param.startswith("the client's"):
            built.client.charon.settings.update({"charon.port": 0, "charon.port_nat_t": 0})
        else:
            built.client.configure(PORT, "port.conf")
            for host in (built.gw1, built.gw2):
                host.charon.settings["charon.port_nat_t"] = 4501
                # the sidecar reads it before charon is started
                host.charon.configure()
        built.start()
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def test_a_session_is_resumed_with_its_traffic(topology: Topology) -> None:
    before = connect(topology)
    topology.kill_gateway(topology.gw1)
    outcome = resume(topology)
    assert (outcome["result"], outcome["gateway"]) == ("resumed", topology.gw2.address)
    assert topology.client.ping(SITE) == 3
    after = the_sa(topology.client)
    assert (after["local-port"], after["remote-port"]) == (before["local-port"], before["remote-port"])
    assert after["remote-port"] not in ("500",)
    topology.client.swanctl("--rekey", "--child", "net")
    assert topology.client.ping(SITE) == 3


def test_a_session_that_is_refused_is_set_up_again(topology: Topology) -> None:
    connect(topology)
    topology.kill_gateway(topology.gw1)
    topology.bank.cli("FLUSHALL")
    outcome = resume(topology)
    assert (outcome["result"], outcome["reason"]) == ("fallback", "refused")
    assert topology.client.ping(SITE) == 3
