"""Virtual IPs out of the gateways' own LAN: the sidecar announces them and answers for them, with real charons."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.gateway.return_path import ReturnPath
from bridge.ike.transforms import Suite
from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.topology import SERVER
from bridge.net.neighbour import Connected
from failover_support import counter, established, fresh, resume, the_sa
from releases_support import RELEASED, on_all

GATEWAY = """
pools {{
    clients {{ addrs = 10.10.1.{first}/27 }}
    clients6 {{ addrs = fd10:10:1::{first}:0/120 }}
}}
connections {{ gw {{
    pools = clients,clients6
    children {{ net {{ local_ts = 10.10.0.0/16,fd10:10:1::/64 }} }}
}} }}
"""
CLIENT = """
connections { home {
    vips = 0.0.0.0,::
    children { net { remote_ts = 10.10.0.0/16,fd10:10:1::/64 } }
} }
"""


@pytest.fixture(scope="module", params=RELEASED)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab without routing daemons; its pools are of the network behind the gateways."""
    with Lab() as lab:
        built = standard(lab, start=False, releases=on_all(request.param))
        built.agent.config["resume_on_down"] = False
        built.routers.clear()
        for host, first in ((built.gw1, 128), (built.gw2, 160)):
            host.configure(GATEWAY.format(first=first), "pool.conf")
        built.client.configure(CLIENT, "vips.conf")
        built.start()
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


@pytest.mark.asyncio
async def test_the_hosts_networks_are_not_read_for_each_session_of_a_storm() -> None:
    now, read = [100.0], list[float]()

    def networks() -> list[Connected]:
        read.append(now[0])
        return []

    path = ReturnPath(enabled=True, networks=networks, clock=lambda: now[0])
    for number in range(1, 4):
        sa = IkeSa(IkeId.of(bytes(8), bytes([number]) * 8, False), Suite(12, 128, 12, 5, 31), b"d" * 32)
        sa.up, sa.remote_vips = True, ("10.20.1.1",)
        path.changed(sa)
    assert read == [100.0]
    now[0] += 1.0
    sa.remote_vips = ("10.20.1.2",)
    path.changed(sa)
    assert read == [100.0, 101.0]


@pytest.mark.lab
def test_a_server_in_the_lan_of_the_virtual_ips_reaches_the_client_wherever_its_session_is(topology: Topology) -> None:
    topology.connect()
    four, six = the_sa(topology.client)["local-vips"]
    assert topology.server.ping(four) == 3
    assert topology.server.ping(six) == 3
    assert topology.client.ping(SERVER) == 3
    assert counter(topology, "gw1", "addresses_announced") == 2
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    assert the_sa(topology.client)["local-vips"] == [four, six]
    wait_until(lambda: topology.server.ping(four, count=1) == 1, "the new way by ARP", 3)
    wait_until(lambda: topology.server.ping(six, count=1) == 1, "the new way by neighbour discovery", 3)
    assert topology.server.ping(four) == topology.server.ping(six) == 3
    assert counter(topology, "gw2", "addresses_announced") == 2


@pytest.mark.lab
def test_an_address_is_answered_for_no_longer_than_its_session_is_here(topology: Topology) -> None:
    topology.connect()
    four, six = the_sa(topology.client)["local-vips"]
    assert topology.server.ping(four) == 3
    topology.client.swanctl("--terminate", "--ike-id", the_sa(topology.client)["uniqueid"])
    wait_until(lambda: not established(topology.gw1), "the end of the session")
    wait_until(lambda: counter(topology, "gw1", "addresses_announced") == 0, "the end of the announcement")
    topology.server.run("ip", "neigh", "flush", "dev", "eth0")
    for address in (four, six):
        topology.server.run("ping", "-c", "1", "-W", "1", address, check=False)
        shown = topology.server.run("ip", "neigh", "show", address).stdout
        assert "lladdr" not in shown
