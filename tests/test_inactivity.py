"""`inactivity` of a child, with real charons: charon starts that timer in an exchange only, so such a CHILD_SA comes
back by CREATE_CHILD_SA."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from failover_support import connect, resume, the_sa

pytestmark = pytest.mark.lab

INACTIVE = 6
"""seconds"""


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab, whose gateways end CHILD_SAs without traffic."""
    with Lab() as lab:
        built = standard(lab, start=False)
        built.agent.config["resume_on_down"] = False
        for host in (built.gw1, built.gw2):
            host.configure(
                f"connections {{ gw {{ children {{ net {{ inactivity = {INACTIVE}s }} }} }} }}\n", "inactivity.conf"
            )
        built.start()
        yield built


def test_a_child_sa_without_traffic_is_ended_where_the_session_goes_on_too(topology: Topology) -> None:
    connect(topology)
    topology.kill_gateway(topology.gw1)
    outcome = resume(topology)
    assert (outcome["result"], outcome["children"]) == ("resumed", ["net"])
    wait_until(lambda: not the_sa(topology.gw2)["child-sas"], "the end of the CHILD_SA", timeout=10 * INACTIVE)
    assert f"after {INACTIVE} seconds" in topology.gw2.charon.text()
    assert not the_sa(topology.client)["child-sas"]
