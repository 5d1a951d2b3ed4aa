"""One virtual IP, one session, with real charons: what happens to an address when its gateway dies and comes back.

With `make test-releases` also of strongSwan 6.0.1 and 6.1.0, and with addresses of IPv6 alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from failover_support import counter, established, fresh_both, resumed_to, second_client, start_both, the_sa
from families_support import ask_for, connect, give_out, reaches

pytestmark = pytest.mark.lab


def release(family: str, name: str) -> Any:
    """A run with the strongSwan of another Debian release on all hosts."""
    return pytest.param((family, name), marks=pytest.mark.releases, id=f"{family}, {name}")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("IPv4", None), id="IPv4"),
        pytest.param(("dual stack", None), id="dual stack"),
        release("IPv6", "bookworm"),
        release("dual stack", "trixie"),
        release("dual stack", "forky"),
    ],
)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab and a second client, `other`; clients move when they are told to only. What they get: addresses
    of one family, or of both."""
    family, name = request.param
    with Lab() as lab:
        releases = dict.fromkeys(("gw1", "gw2", "client"), name) if name is not None else None
        built = standard(lab, start=False, releases=releases)
        built.agent.config["resume_on_down"] = False
        for gateway in built.gateways.values():
            gateway.config["sync"] |= {"duplicate_address": "report"}
        other = second_client(built, name)
        for number, host in ((1, built.gw1), (2, built.gw2)):
            give_out(host, family, number)
        for client in (built.client, other):
            ask_for(client, family)
        start_both(built)
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh_both(topology)


def restart(topology: Topology, host: Host, duplicate_address: str = "report") -> None:
    """A gateway that died comes back, with an empty pool."""
    topology.gateways[host.name].config["sync"] |= {"duplicate_address": duplicate_address}
    topology.gateways[host.name].start(wait=False)
    host.charon.start()
    topology.gateways[host.name].wait_ready()


def emptied(topology: Topology) -> None:
    """No pool knows any client: who comes first gets the first address."""
    topology.kill_gateway(topology.gw1)
    restart(topology, topology.gw1)


def test_a_session_does_not_come_back_to_an_address_that_a_restarted_gateway_gave_away(topology: Topology) -> None:
    other = topology.lab.hosts["other"]
    emptied(topology)
    mine = connect(topology)["local-vips"]
    topology.kill_gateway(topology.gw1)
    assert resumed_to(topology.agent, topology.gw2)["result"] == "resumed"
    restart(topology, topology.gw1)
    said = len(other.charon.text())
    other.charon.initiate("net", "home")
    # the session itself may be over by now
    for address in mine:
        assert f"installing new virtual IP {address}" in other.charon.text()[said:]
    before = counter(topology, "gw1", "refusals_total[address-taken]")
    outcome = resumed_to(topology.agent, topology.gw1)
    assert outcome["result"] == "fallback"
    assert counter(topology, "gw1", "refusals_total[address-taken]") > before
    assert the_sa(other)["local-vips"] == mine
    assert the_sa(topology.client)["local-vips"] != mine
    assert "reason=address-taken" in topology.gateways["gw1"].text()


def test_a_session_comes_back_to_a_gateway_that_still_has_its_old_sa(topology: Topology) -> None:
    before = connect(topology)
    assert resumed_to(topology.agent, topology.gw2)["result"] == "resumed"
    assert resumed_to(topology.agent, topology.gw1)["result"] == "resumed"
    after = the_sa(topology.client)
    assert after["local-vips"] == before["local-vips"]
    assert the_sa(topology.gw1)["responder-spi"] == after["responder-spi"]
    reaches(topology)


def given_away(topology: Topology, duplicate_address: str) -> list[str]:
    """The client's gateway dies and comes back; the other client has the addresses of the first one then, which it
    gives."""
    other = topology.lab.hosts["other"]
    emptied(topology)
    mine: list[str] = connect(topology)["local-vips"]
    topology.kill_gateway(topology.gw1)
    restart(topology, topology.gw1, duplicate_address)
    said = len(other.charon.text())
    other.charon.initiate("net", "home")
    # the session itself may be over by now
    for address in mine:
        assert f"installing new virtual IP {address}" in other.charon.text()[said:]
    return mine


def test_a_handshake_that_was_given_the_address_of_another_session_is_reported(topology: Topology) -> None:
    given_away(topology, "report")
    wait_until(lambda: counter(topology, "gw1", "duplicate_addresses_total") == 1, "the report")
    assert "event=duplicate-address" in topology.gateways["gw1"].text()
    assert counter(topology, "gw1", "duplicate_address_sessions") == 1
    assert the_sa(topology.lab.hosts["other"])
    wait_until(lambda: "duplicate addresses" in checked(topology), "check's word of it")


def checked(topology: Topology) -> list[str]:
    """What `check` finds to fail at gw1."""
    found = json.loads(topology.gateways["gw1"].command("check", "--json", check=False).stdout)
    return [row["check"] for row in found if row["grade"] == "fail"]


def test_the_newer_of_two_sessions_with_one_address_is_ended(topology: Topology) -> None:
    given_away(topology, "end-newer")
    other = topology.lab.hosts["other"]
    wait_until(lambda: not other.charon.sas(), "the end of the newer session")
    assert not established(topology.gw1)
    # and the older one goes on
    assert resumed_to(topology.agent, topology.gw1)["result"] == "resumed"
    reaches(topology)


def test_the_client_of_the_newer_session_comes_again_and_gets_another_address(topology: Topology) -> None:
    other = topology.lab.hosts["other"]
    sidecar = other.sidecars[0]
    before = dict(sidecar.config)
    sidecar.stop()
    sidecar.config["resume"] = {"after_delete": "handshake"}
    sidecar.start()
    try:
        taken = given_away(topology, "end-newer")
        wait_until(lambda: addresses_of(other) not in ([], taken), "another session, with another address")
        assert not set(addresses_of(other)) & set(taken)
        assert the_sa(other)["remote-host"] == topology.gw2.address
    finally:
        sidecar.stop()
        sidecar.config = before
        sidecar.start()


def addresses_of(client: Host) -> list[str]:
    """The virtual IPs of a client's sessions."""
    return [vip for sa in established(client) for vip in sa["local-vips"]]
