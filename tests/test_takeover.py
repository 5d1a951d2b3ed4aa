"""Sessions of a client without a sidecar go on at another gateway that gets their address, as they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from failover_support import established, replaced, spis, status
from takeover_support import SHARED, answered, connect, move, rekey, rekeyed_child, sharing

pytestmark = pytest.mark.lab


@pytest.fixture
def topology(each_release: str | None) -> Iterator[Topology]:
    with sharing(each_release) as topology:
        yield topology


def test_a_session_goes_on_at_the_gateway_that_gets_its_address(topology: Topology) -> None:
    before = connect(topology)
    requests = topology.client.charon.text().count("IKE_SA_INIT request")

    outcome = move(topology, topology.gw1, topology.gw2)

    assert (outcome["found"], outcome["taken"], outcome["left"]) == (1, 1, 0)
    assert answered(topology, topology.client)
    [after] = established(topology.client)
    assert spis(after) == spis(before)
    [there] = established(topology.gw2)
    assert spis(there) == spis(before)
    assert topology.client.charon.text().count("IKE_SA_INIT request") == requests
    [address, _] = status(topology, "gw2")["takeover"]["addresses"]
    assert (address["address"], address["state"], address["sessions"], address["taken_over"]) == (SHARED, "here", 1, 1)


def test_both_sides_rekey_and_end_it_afterwards(topology: Topology) -> None:
    client, gateway = topology.client, topology.gw2
    connect(topology)
    assert move(topology, topology.gw1, gateway)["taken"] == 1

    rekeyed_child(client, lambda: rekey(client, child="net"))
    assert answered(topology, client)
    rekeyed_child(client, lambda: rekey(gateway, child="net"))
    assert answered(topology, client)
    for host, name in ((client, "home"), (gateway, "gw")):
        [before] = established(client)
        rekey(host, ike=name)
        wait_until(lambda before=before: replaced(client, spis(before)), "another IKE_SA")  # type: ignore[misc]
    assert answered(topology, client)
    client.swanctl("--terminate", "--ike", "home", "--timeout", "5")
    wait_until(lambda: not gateway.charon.sas(), "the end of the session")
