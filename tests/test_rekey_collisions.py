"""Client and gateway rekey the IKE_SA at the same time, some answers are lost, and the gateway dies: the session is
resumed from what both had."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.topology import SITE
from failover_support import (
    connect,
    established,
    fresh,
    lost,
    rekeyed,
    rekeys_unanswered,
    resume,
    spis,
    stub_key,
    the_sa,
)
from releases_support import RELEASED, on_all

pytestmark = pytest.mark.lab

PATIENCE = {"charon.retransmit_timeout": 0.5, "charon.retransmit_base": 1.0, "charon.retransmit_tries": 60}
"""neither side gives the other up while a test runs, and what was lost is sent again soon"""
SENT = "generating CREATE_CHILD_SA request"
REQUEST, RESPONSE = "parsed CREATE_CHILD_SA request", "parsed CREATE_CHILD_SA response"


@pytest.fixture(scope="module", params=RELEASED)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab with hosts that retransmit quickly."""
    with Lab() as lab:
        built = standard(lab, start=False, releases=on_all(request.param))
        built.agent.config["resume_on_down"] = False
        for host in (built.gw1, built.gw2, built.client):
            host.charon.settings.update(PATIENCE)
        built.start()
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def answers_lost(host: Host) -> contextlib.AbstractContextManager[None]:
    """The answers of a host in CREATE_CHILD_SA exchanges are lost, not its requests."""
    # behind IP and UDP header and non-ESP marker: exchange type and flags
    header = "0>>22&0x3C@28>>8&0xFF=36&&0>>22&0x3C@28&0x20=0x20"
    return lost(host, "OUTPUT", "-p", "udp", "--sport", "4500", "-m", "u32", "--u32", header)


def count(host: Host, what: str) -> int:
    return host.charon.text().count(what)


def more(host: Host, what: str, before: int) -> None:
    """Wait until a host's log has this once more."""
    wait_until(lambda: count(host, what) > before, f"{what} at {host.name}")


def begin(topology: Topology) -> None:
    """Both sides begin to rekey the one IKE_SA; neither has received anything of it."""
    with rekeys_unanswered(topology.client), rekeys_unanswered(topology.gw1):
        for host, name in ((topology.client, "home"), (topology.gw1, "gw")):
            before = count(host, SENT)
            host.swanctl("--rekey", "--ike", name, check=False)
            more(host, SENT, before)


@pytest.mark.parametrize("answered", [None, "gw1"])
def test_a_session_is_resumed_whose_gateway_died_in_a_collision(topology: Topology, answered: str | None) -> None:
    first = connect(topology)
    sides = {"client": topology.client, "gw1": topology.gw1}
    with contextlib.ExitStack() as lost:
        losing = {name: lost.enter_context(contextlib.ExitStack()) for name in sides}
        for name, host in sides.items():
            losing[name].enter_context(answers_lost(host))
        before = {host: count(host, REQUEST) for host in sides.values()}
        begin(topology)
        for host, requests in before.items():
            more(host, REQUEST, requests)
        if answered is not None:
            # what one side asked is answered, what the other one asked is not
            [answering] = sides.keys() - {answered}
            received = count(sides[answered], RESPONSE)
            losing[answering].close()
            more(sides[answered], RESPONSE, received)
        topology.kill_gateway(topology.gw1)
    outcome = resume(topology)
    assert outcome["result"] == "resumed"
    assert outcome["children"] == ["net"]
    assert spis(the_sa(topology.client)) == spis(the_sa(topology.gw2)) == (outcome["spi_i"], outcome["spi_r"])
    assert spis(the_sa(topology.client)) != spis(first)
    assert len(topology.client.charon.sas()) == 1
    assert topology.client.ping(SITE) == 3


def test_a_session_is_resumed_after_a_collision_and_has_one_stub(topology: Topology) -> None:
    first = connect(topology)
    begin(topology)
    wait_until(lambda: rekeyed(topology.client, first) and len(established(topology.gw1)) == 1, "the one that won")
    mine = the_sa(topology.client)
    # it is at the SPI of the gateway
    key = stub_key(topology.gw1.address, mine["responder-spi" if mine.get("initiator") == "yes" else "initiator-spi"])
    wait_until(lambda: topology.bank.stubs() == [key], "its stub alone")
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    assert topology.client.ping(SITE) == 3
