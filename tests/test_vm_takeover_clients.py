"""Takeover of clients that are not charon, libreswan 5.2 and OpenIKED 7.4, with ESP in the kernel (`make test-vm`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from bridge.lab import Lab, Topology
from bridge.lab.daemon import wait_until
from bridge.lab.esp import Esp
from bridge.lab.host import Host
from failover_support import established, replaced, spis
from other_clients_support import Libreswan, OpenIked, OtherClient
from takeover_support import answered, move, rekey, shared_topology, start, wait_stub

pytestmark = [pytest.mark.vm, pytest.mark.lab]


class Seen(NamedTuple):
    """What there was of a session."""

    spis: tuple[str, str]
    esp: dict[str, str]


@pytest.fixture(scope="module", params=[Libreswan, OpenIked])
def client(request: pytest.FixtureRequest) -> Iterator[OtherClient]:
    """One of them, connected to the shared address at gw1."""
    kind: type[Libreswan | OpenIked] = request.param
    with Lab() as lab:
        assert lab.esp is Esp.KERNEL
        topology = shared_topology(lab, gateway=kind.gateway)
        start(topology, topology.gw1, client=False)
        client = kind(topology)
        connect(client)
        yield client


@pytest.fixture(scope="module")
def before(client: OtherClient) -> Seen:
    """What its session was like before the takeover, which is over."""
    return taken_over(client)


def connect(client: OtherClient) -> None:
    """A session, its stub in the bank."""
    topology = client.topology
    client.start()
    [sa] = established(holder(topology))
    wait_stub(topology, sa["responder-spi"])
    wait_until(lambda: answered(topology, topology.client, 1), "traffic")


def holder(topology: Topology) -> Host:
    """The gateway with the session."""
    [host] = [host for host in (topology.gw1, topology.gw2) if host.charon.running and established(host)]
    return host


def taken_over(client: OtherClient) -> Seen:
    """The gateway with the session dies, and the other one continues it."""
    topology = client.topology
    old = holder(topology)
    new = topology.gw2 if old is topology.gw1 else topology.gw1
    if not new.charon.running:
        sidecar = topology.gateways[new.name]
        sidecar.start(wait=False)
        new.charon.start()
        sidecar.wait_ready()
    [sa] = established(old)
    seen = Seen(spis(sa), client.esp())
    outcome = move(topology, old, new)
    assert (outcome["found"], outcome["taken"], outcome["left"]) == (1, 1, 0)
    return seen


def other_esp(client: OtherClient, act: Callable[[], None]) -> None:
    """Have `act` rekey the CHILD_SA, and wait for the end of the old one."""
    seen = client.esp()
    act()
    wait_until(lambda: not seen.keys() & (now := client.esp()).keys() and len(now) == 2, "another CHILD_SA")


def test_its_session_continues_without_a_handshake_and_with_new_keys_of_the_child_sa(
    client: OtherClient, before: Seen
) -> None:
    topology = client.topology
    assert answered(topology, topology.client)
    [there] = established(topology.gw2)
    assert spis(there) == before.spis
    assert "IKE_SA_INIT" not in topology.gw2.charon.text()
    now = client.esp()
    assert len(now) == len(before.esp) == 2
    assert not now.keys() & before.esp.keys()
    assert not set(now.values()) & set(before.esp.values())


def test_its_liveness_checks_are_answered(client: OtherClient, before: Seen) -> None:
    gateway = holder(client.topology)
    seen = len(gateway.charon.text())
    [sa] = established(gateway)
    esp = client.esp()

    def checks() -> int:
        log = gateway.charon.text()[seen:]
        answers = re.findall(r"generating INFORMATIONAL response (\d+) \[ \]", log)
        return sum(f"parsed INFORMATIONAL request {number} [ ]" in log for number in answers)

    wait_until(lambda: checks() >= client.liveness_checks, "liveness checks, answered", client.liveness_seconds)
    [after] = established(gateway)
    assert (spis(after), client.esp()) == (spis(sa), esp)
    assert answered(client.topology, client.host)


def test_its_child_sa_is_rekeyed_from_either_side(client: OtherClient, before: Seen) -> None:
    gateway = holder(client.topology)
    for act in (lambda: rekey(gateway, child="net"), client.rekey_child):
        other_esp(client, act)
        assert answered(client.topology, client.host)


def test_its_ike_sa_is_rekeyed_and_taken_over_once_more(client: OtherClient, before: Seen) -> None:
    topology = client.topology
    gateway = holder(topology)
    for act in (lambda: rekey(gateway, ike="gw"), *client.ike_rekeys()):
        [sa] = established(gateway)
        act()
        wait_until(lambda sa=sa: replaced(gateway, spis(sa)), "another IKE_SA")  # type: ignore[misc]
        assert answered(topology, client.host)
    [sa] = established(gateway)
    wait_stub(topology, sa["initiator-spi" if sa.get("initiator") == "yes" else "responder-spi"])
    seen = taken_over(client)
    assert answered(topology, client.host)
    [after] = established(holder(topology))
    assert spis(after) == seen.spis
    for act in (lambda: rekey(holder(topology), child="net"), client.rekey_child):
        other_esp(client, act)
    assert answered(topology, client.host)


def test_it_ends_its_session(client: OtherClient, before: Seen) -> None:
    gateway = holder(client.topology)
    client.end()
    wait_until(lambda: not established(gateway), "the end of the session")


def test_the_gateway_ends_its_session(client: OtherClient) -> None:
    connect(client)
    taken_over(client)
    esp = client.esp()
    ended = holder(client.topology).swanctl("--terminate", "--ike", "gw", "--timeout", "5")
    assert "completed successfully" in ended
    wait_until(lambda: not esp.keys() & client.esp().keys(), "the end of its CHILD_SA")
