"""The main job over a network with delay and loss, the kernel's netem (`make test-vm`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, space, standard
from bridge.lab.daemon import wait_until
from bridge.lab.esp import Esp
from bridge.lab.topology import SITE
from failover_support import complete, fresh, resume, stub_key, the_sa

pytestmark = [pytest.mark.vm, pytest.mark.lab]


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab, every link of it with a delay of 40 ms +- 10 ms each way, and 5 % loss."""
    with Lab() as lab:
        topology = standard(lab)
        for name in ("gw1", "gw2", "client"):
            inside = space.in_network(topology.lab.hosts[name].namespace)
            netem = ("netem", "delay", "40ms", "10ms", "loss", "5%")
            space.command(*inside, "tc", "qdisc", "add", "dev", "eth0", "root", *netem)
        yield topology


def test_esp_is_the_kernels(topology: Topology) -> None:
    assert topology.lab.esp is Esp.KERNEL


@pytest.mark.parametrize("attempt", range(5))
def test_a_killed_gateways_session_is_resumed_over_a_bad_network(topology: Topology, attempt: int) -> None:
    fresh(topology)
    topology.connect()
    before = the_sa(topology.client)
    key = stub_key(topology.gw1.address, before["responder-spi"])
    wait_until(lambda: complete(topology, key), "the stub of the session")
    # any of these may be lost
    wait_until(lambda: topology.client.ping(SITE, count=1) == 1, "traffic")
    topology.kill_gateway(topology.gw1)
    outcome = resume(topology)
    assert outcome["result"] == "resumed", outcome
    # a round trip
    assert outcome["exchange_ms"] > 40
    assert the_sa(topology.client)["local-vips"] == before["local-vips"]
    wait_until(lambda: topology.client.ping(SITE, count=1) == 1, "traffic")
