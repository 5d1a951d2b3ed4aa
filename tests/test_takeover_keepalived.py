"""VRRP by a real keepalived, with the shipped example: its master dies, and the ordinary clients of it go on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology
from bridge.lab.daemon import wait_until
from bridge.lab.keepalived import Keepalived
from failover_support import established, spis
from takeover_support import SHARED, answered, connect, shared_topology, start, take_away

pytestmark = pytest.mark.lab


@pytest.fixture
def topology(each_release: str | None) -> Iterator[Topology]:
    with Lab(release=each_release) as lab:
        topology = shared_topology(lab, trigger="netlink")
        start(topology)
        yield topology


def test_keepalived_takes_the_shipped_example_as_it_is() -> None:
    with Lab() as lab:
        gateway = lab.add_host("gw1", "192.168.50.1/24")
        assert Keepalived(gateway, 100).complaints() == ""


def test_clients_go_on_when_the_master_of_vrrp_dies(topology: Topology) -> None:
    first, second = Keepalived(topology.gw1, 110), Keepalived(topology.gw2, 100)
    first.start()
    wait_until(lambda: SHARED in topology.gw1.run("ip", "address").stdout, "VRRP's master")
    second.start()
    before = connect(topology)

    topology.kill_gateway(topology.gw1)
    first.kill()
    # it had no time to give it up
    assert SHARED in topology.gw1.run("ip", "address").stdout
    take_away(topology.gw1)

    wait_until(lambda: SHARED in topology.gw2.run("ip", "address").stdout, "the other gateway to be VRRP's master")
    wait_until(lambda: bool(established(topology.gw2)), "the takeover")
    wait_until(lambda: answered(topology, topology.client, 1), "traffic")
    [after] = established(topology.client)
    assert spis(after) == spis(before)
    assert "MASTER" in second.text()
    second.stop()
