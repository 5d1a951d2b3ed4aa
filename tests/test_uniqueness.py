"""`unique = replace | keep` holds for resumptions as charon has it for handshakes: the same scenes with both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.space import LabError
from bridge.lab.topology import SITE, client_host
from failover_support import connect, counter, established, fresh, resume, spis, the_sa
from families_support import SIX, address_of, reach_over_ipv6
from releases_support import RELEASED, on_all

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module", params=[*RELEASED, pytest.param(SIX, id="IPv6")])
def lab_hosts(request: pytest.FixtureRequest) -> Iterator[tuple[Topology, Host]]:
    """The standard lab, and a second host of the same user, without a sidecar."""
    release = None if request.param is SIX else request.param
    with Lab() as lab:
        built = standard(lab, start=False, releases=on_all(release))
        built.agent.config["resume_on_down"] = False
        second = client_host(lab, "second", "192.168.50.11", built.secret, "fd00:50::11/64")
        if request.param is SIX:
            reach_over_ipv6(built, built.client, second)
        # they do not say INITIAL_CONTACT, which would replace the other IKE_SA whatever the policy
        built.client.configure("connections { home { unique = never } }\n", "zz.conf")
        second.configure("connections { home { unique = never\n local { id = client@example.org } } }\n", "zz.conf")
        built.start()
        second.charon.start()
        yield built, second


@pytest.fixture
def topology(lab_hosts: tuple[Topology, Host]) -> Topology:
    topology, second = lab_hosts
    begin(topology, second)
    return topology


def begin(topology: Topology, second: Host) -> None:
    """No IKE_SA anywhere."""
    for sa in second.charon.sas():
        second.swanctl("--terminate", "--ike-id", sa["uniqueid"], "--force", "--timeout", "1", check=False)
    wait_until(lambda: not second.charon.sas(), "the end of all SAs")
    fresh(topology)


def unique(topology: Topology, policy: str) -> None:
    """What gw2 says of a second IKE_SA of a peer."""
    topology.gw2.configure(f"connections {{ gw {{ unique = {policy} }} }}\n", "zz-unique.conf")
    topology.gw2.swanctl("--load-conns")
    # which looks every 30 s
    sidecar = topology.gateways["gw2"]
    sidecar.stop()
    sidecar.start()


def elsewhere(second: Host) -> tuple[str, str]:
    """The second host has a session at gw2."""
    second.charon.initiate("net", "home-gw2")
    return spis(the_sa(second))


def test_replace_ends_the_other_session_of_the_peer(topology: Topology, lab_hosts: tuple[Topology, Host]) -> None:
    second = lab_hosts[1]
    unique(topology, "replace")
    # as a handshake does it
    elsewhere(second)
    topology.connect("home-gw2")
    wait_until(lambda: [spis(sa) for sa in established(topology.gw2)] == [spis(the_sa(topology.client))], "one of both")
    begin(topology, second)
    connect(topology)
    elsewhere(second)
    assert resume(topology, "--to", address_of(topology, topology.gw2))["result"] == "resumed"
    now = spis(the_sa(topology.client))
    wait_until(lambda: [spis(sa) for sa in established(topology.gw2)] == [now], "one of both")
    wait_until(lambda: not established(second), "the DELETE")
    assert topology.client.ping(SITE) == 3


def test_keep_refuses_the_new_session_of_the_peer(topology: Topology, lab_hosts: tuple[Topology, Host]) -> None:
    second = lab_hosts[1]
    unique(topology, "keep")
    kept = elsewhere(second)
    # as a handshake does it
    with pytest.raises(LabError, match="AUTH_FAILED"):
        topology.connect("home-gw2")
    connect(topology)
    refused = "refusals_total[not-unique]"
    before = counter(topology, "gw2", refused)
    assert resume(topology, "--to", address_of(topology, topology.gw2))["result"] == "failed"
    assert counter(topology, "gw2", refused) > before
    assert [spis(sa) for sa in established(topology.gw2)] == [kept]


def test_keep_takes_the_peers_own_session(topology: Topology) -> None:
    unique(topology, "keep")
    connect(topology)
    for gateway in (topology.gw2, topology.gw1, topology.gw2):
        assert resume(topology, "--to", address_of(topology, gateway))["result"] == "resumed"
        # on the same gateway too
        assert resume(topology, "--to", address_of(topology, gateway))["result"] == "resumed"
    assert topology.client.ping(SITE) == 3


def test_without_a_policy_both_sessions_live(topology: Topology, lab_hosts: tuple[Topology, Host]) -> None:
    second = lab_hosts[1]
    unique(topology, "no")
    connect(topology)
    other = elsewhere(second)
    assert resume(topology, "--to", address_of(topology, topology.gw2))["result"] == "resumed"
    assert {spis(sa) for sa in established(topology.gw2)} == {other, spis(the_sa(topology.client))}
