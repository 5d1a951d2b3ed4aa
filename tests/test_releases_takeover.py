"""Takeover between strongSwan releases: both gateways of one, or of two as in an upgrade, with clients of each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from bridge.lab.releases import RELEASES
from failover_support import established, replaced, spis
from takeover_support import answered, connect, give_up, rekey, rekeyed_child, sharing, take, take_away, wait_stub

pytestmark = [pytest.mark.lab, pytest.mark.releases]

OLDEST, OLD, NEW = RELEASES
COMBINATIONS = [(OLD, OLD, OLDEST), (NEW, NEW, NEW), (OLDEST, NEW, OLD)]
"""of gw1, gw2, and the client"""


@pytest.fixture(scope="module", params=COMBINATIONS, ids="-".join)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    with sharing(releases=dict(zip(("gw1", "gw2", "client"), request.param, strict=True))) as topology:
        connect(topology)
        yield topology


def test_a_session_goes_to_the_other_gateway_and_back_and_is_rekeyed_by_both_sides(topology: Topology) -> None:
    client = topology.client
    for old, new in ((topology.gw1, topology.gw2), (topology.gw2, topology.gw1)):
        [before] = established(client)
        give_up(topology, old)
        take_away(old)
        outcome = take(topology, new)
        assert (outcome["found"], outcome["taken"]) == (1, 1)
        assert answered(topology, client)
        [after] = established(client)
        assert spis(after) == spis(before)
        for host in (client, new):
            rekeyed_child(client, lambda host=host: rekey(host, child="net"))  # type: ignore[misc]
        for host, name in ((client, "home"), (new, "gw")):
            [before] = established(client)
            rekey(host, ike=name)
            wait_until(lambda before=before: replaced(client, spis(before)), "a new IKE_SA")  # type: ignore[misc]
        assert answered(topology, client)
        [there] = established(new)
        wait_stub(topology, there["initiator-spi" if there.get("initiator") == "yes" else "responder-spi"])
