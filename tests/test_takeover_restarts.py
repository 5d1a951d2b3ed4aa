"""A charon or a sidecar that ends at a gateway which has a shared address: clients without a sidecar go on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from failover_support import established, spis
from takeover_support import SHARED, answered, connect, move, rekey, rekeyed_child, sharing, take, take_away, wait_stub

pytestmark = pytest.mark.lab


@pytest.fixture
def topology(each_release: str | None) -> Iterator[Topology]:
    with sharing(each_release) as topology:
        yield topology


@pytest.mark.parametrize("kernel_goes_on", [False, True], ids=["kernel-is-empty", "kernel-has-its-esp-sas"])
def test_a_charon_that_is_restarted_after_a_crash_has_its_sessions_again(
    topology: Topology, kernel_goes_on: bool
) -> None:
    before = connect(topology)
    requests = topology.client.charon.text().count("IKE_SA_INIT request")
    if kernel_goes_on:
        topology.gw1.charon.crash()
    else:
        topology.gw1.charon.kill()
    topology.gw1.charon.start()
    wait_until(lambda: bool(established(topology.gw1)), "the session")
    wait_until(lambda: answered(topology, topology.client, 1), "traffic")
    assert [spis(sa) for sa in established(topology.gw1)] == [spis(before)]
    assert topology.client.charon.text().count("IKE_SA_INIT request") == requests


def stopped(topology: Topology) -> None:
    """`systemctl stop strongswan` at gw1: what the drop-in of its unit does, and charon's own end."""
    told = topology.gateways["gw1"].command("drain", "--on-stop")
    assert f"1 session at {SHARED} left to the gateway that has it next" in told.stdout
    topology.gw1.charon.stop()


def test_a_gateway_that_is_stopped_leaves_its_sessions_to_the_other_one(topology: Topology) -> None:
    before = connect(topology)
    stopped(topology)
    take_away(topology.gw1)
    assert take(topology, topology.gw2)["taken"] == 1
    assert answered(topology, topology.client)
    assert [spis(sa) for sa in established(topology.client)] == [spis(before)]
    assert "received DELETE for IKE_SA" not in topology.client.charon.text()


def test_a_strongswan_that_is_restarted_has_its_sessions_again(topology: Topology) -> None:
    before = connect(topology)
    stopped(topology)
    topology.gw1.charon.start()
    wait_until(lambda: bool(established(topology.gw1)), "the session")
    wait_until(lambda: answered(topology, topology.client, 1), "traffic")
    assert [spis(sa) for sa in established(topology.client)] == [spis(before)]
    assert "received DELETE for IKE_SA" not in topology.client.charon.text()


def test_the_session_that_a_client_began_since_is_the_one_that_is_taken_over(topology: Topology) -> None:
    """Its gateway's charon was killed, and it has connected again before the sidecar saw a new charon."""
    connect(topology)
    topology.gateways["gw1"].kill()
    topology.gw1.charon.kill()
    topology.client.swanctl("--terminate", "--ike", "home", "--force", "--timeout", "1", check=False)
    topology.gw1.charon.start()
    topology.gateways["gw1"].start(wait=False)
    topology.gateways["gw1"].wait_ready()
    topology.connect()
    [new] = established(topology.client)
    wait_stub(topology, new["responder-spi"])

    outcome = move(topology, topology.gw1, topology.gw2)
    assert outcome["taken"] == 1
    wait_until(lambda: answered(topology, topology.client, 1), "traffic")
    assert [spis(sa) for sa in established(topology.gw2)] == [spis(new)]


def test_a_sidecar_that_is_killed_before_the_new_keys_rekeys_after_its_restart(topology: Topology) -> None:
    """The client's charon does not answer until then: its CHILD_SA has keys that no host knows at the gateway."""
    before = connect(topology)
    client, gateway = topology.client, topology.gateways["gw2"]
    client.run("iptables", "-I", "INPUT", "-p", "udp", "-j", "DROP")
    outcome = move(topology, topology.gw1, topology.gw2, "--timeout", "0.5")
    assert (outcome["found"], outcome["taken"]) == (1, 0)
    gateway.kill()
    client.run("iptables", "-D", "INPUT", "-p", "udp", "-j", "DROP")
    gateway.start(wait=False)
    gateway.wait_ready()
    wait_until(lambda: answered(topology, client, 1), "traffic", 30)
    assert [spis(sa) for sa in established(topology.gw2)] == [spis(before)]
    rekeyed_child(client, lambda: rekey(client, child="net"))
    assert answered(topology, client)
    address = next(one for one in gateway.ask("status")["takeover"]["addresses"] if one["address"] == SHARED)
    assert address["sessions"] == 1
