"""A session is at one gateway: where it was before, it is ended as an operator would end it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.topology import SITE
from failover_support import (
    agent_with,
    connect,
    counter,
    established,
    fresh,
    resume,
    resume_now,
    spis,
    status,
    stub_key,
    the_sa,
)
from releases_support import RELEASED, on_all

pytestmark = pytest.mark.lab

UPDOWN = "/etc/swanctl/updown"  # which another release's charon has too
SCRIPT = '#!/bin/sh\necho "$PLUTO_VERB $PLUTO_PEER_SOURCEIP" >> /run/updown.log\n'


@pytest.fixture(scope="module", params=RELEASED)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab; the client moves when it is told to only."""
    with Lab() as lab:
        built = standard(lab, start=False, releases=on_all(request.param))
        built.agent.config["resume_on_down"] = False
        built.start()
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def online(gateway: Host) -> int:
    """Addresses of a gateway's pool that are in use."""
    return int(gateway.charon.vici().get_pools()["clients"]["online"])


def with_updown(gateway: Host) -> None:
    """Have charon run a script that notes what it is run for."""
    gateway.write(UPDOWN, SCRIPT, mode=0o755)
    gateway.configure(f"connections {{ gw {{ children {{ net {{ updown = {UPDOWN} }} }} }} }}\n", "updown.conf")
    gateway.swanctl("--load-conns")
    gateway.path("/run/updown.log").write_text("")


def noted(gateway: Host) -> list[str]:
    return gateway.path("/run/updown.log").read_text().splitlines()


def without_updown(gateway: Host) -> None:
    (gateway.etc / "swanctl/conf.d/updown.conf").unlink()
    gateway.swanctl("--load-conns")


def moved_to_gw2(topology: Topology) -> tuple[dict[str, Any], tuple[str, str]]:
    """A session of gw1's that was moved to gw2: the gateway's IKE_SA as it was, and the SPIs of the client's now."""
    connect(topology)
    before = the_sa(topology.gw1)
    outcome = resume(topology, "--to", topology.gw2.address)
    assert outcome["result"] == "resumed"
    return before, spis(the_sa(topology.client))


def test_the_old_gateway_ends_it_with_its_scripts_and_its_lease(topology: Topology) -> None:
    with_updown(topology.gw1)
    try:
        ended = counter(topology, "gw1", "moved_away_total")
        before, now = moved_to_gw2(topology)
        [address] = before["remote-vips"]
        wait_until(lambda: not topology.gw1.charon.sas(), "the end of the old IKE_SA")
        assert noted(topology.gw1) == [f"up-client {address}", f"down-client {address}"]
        assert online(topology.gw1) == 0
        wait_until(lambda: counter(topology, "gw1", "moved_away_total") == ended + 1, "it is counted")
    finally:
        without_updown(topology.gw1)
    # the DELETE of the old IKE_SA reached the client, and is none of the new one's
    said = f"sending DELETE for IKE_SA gw[{before['uniqueid']}]"
    assert said in topology.gw1.charon.text()
    assert topology.client.ping(SITE) == 3
    assert spis(the_sa(topology.client)) == spis(the_sa(topology.gw2)) == now
    assert topology.bank.stubs() == [stub_key(topology.gw2.address, now[1])]


def test_a_gateway_whose_sidecar_was_away_ends_it_when_it_is_back(topology: Topology) -> None:
    connect(topology)
    old = spis(the_sa(topology.gw1))
    sidecar = topology.gateways["gw1"]
    sidecar.stop()
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
    now = spis(the_sa(topology.client))
    assert spis(the_sa(topology.gw1)) == old
    sidecar.start()
    wait_until(lambda: not topology.gw1.charon.sas(), "the end of the old IKE_SA")
    assert topology.client.ping(SITE) == 3
    assert spis(the_sa(topology.client)) == now


def test_without_keyspace_events_the_comparison_finds_it(topology: Topology) -> None:
    events = topology.bank.cli("CONFIG", "GET", "notify-keyspace-events").splitlines()[-1]
    topology.bank.cli("CONFIG", "SET", "notify-keyspace-events", "")
    try:
        _, now = moved_to_gw2(topology)
        wait_until(lambda: not topology.gw1.charon.sas(), "the end of the old IKE_SA", timeout=60)
    finally:
        topology.bank.cli("CONFIG", "SET", "notify-keyspace-events", events)
    assert topology.client.ping(SITE) == 3
    assert spis(the_sa(topology.client)) == now


def test_a_session_that_comes_back_to_its_gateway_leaves_one_ike_sa_there(topology: Topology) -> None:
    connect(topology)
    outcome = resume(topology, "--to", topology.gw1.address)
    assert outcome["result"] == "resumed"
    wait_until(lambda: len(topology.gw1.charon.sas()) == 1, "the end of the old IKE_SA")
    now = spis(the_sa(topology.client))
    assert spis(the_sa(topology.gw1)) == now
    assert topology.client.ping(SITE) == 3
    wait_until(lambda: topology.bank.stubs() == [stub_key(topology.gw1.address, now[1])], "the one stub")


def test_a_client_that_falls_back_at_another_gateway_leaves_none_at_the_first(topology: Topology) -> None:
    before = connect(topology)
    # what somebody spoilt does not open
    topology.bank.cli("HSET", stub_key(topology.gw1.address, before["responder-spi"]), "sealed", "spoilt")
    # at once: the comparison with the bank puts it right
    assert resume_now(topology, topology.gw2)["result"] == "fallback"
    wait_until(lambda: not topology.gw1.charon.sas(), "the end of the old IKE_SA")
    assert the_sa(topology.client)["remote-host"] == topology.gw2.address
    assert topology.client.ping(SITE) == 3


def test_so_does_one_that_has_the_same_connection_for_both_gateways(topology: Topology) -> None:
    """charon has to end the old IKE_SA before the handshake."""
    client, gateways = topology.client, (topology.gw1.address, topology.gw2.address)
    client.configure(f"connections {{ home {{ remote_addrs = {','.join(gateways)} }} }}\n", "both.conf")
    client.charon.load()
    try:
        with agent_with(topology, gateways=[{"address": one, "connection": "home"} for one in gateways]):
            connect(topology)
            moved = resume(topology, "--to", topology.gw2.address)
            assert moved["result"] == "resumed"
            # whose charon answers as any other does
            topology.gateways["gw1"].stop()
            outcome = resume(topology, "--to", topology.gw1.address)
            assert (outcome["result"], outcome["gateway"]) == ("fallback", topology.gw1.address)
            wait_until(lambda: not topology.gw2.charon.sas(), "the end of the old IKE_SA")
            assert topology.client.ping(SITE) == 3
    finally:
        (client.etc / "swanctl/conf.d/both.conf").unlink()
        client.charon.load()


def test_whoever_writes_to_the_bank_without_its_key_ends_no_session(topology: Topology) -> None:
    connect(topology)
    before = the_sa(topology.gw1)
    stub = stub_key(topology.gw1.address, before["responder-spi"])
    tag = stub.removeprefix("ike:stub:").rpartition(":")[0]
    unreadable = counter(topology, "gw1", "stubs_unreadable_total")
    topology.bank.cli("ZADD", f"ike:gone:{tag}", "1e12", before["responder-spi"])
    topology.bank.cli("SET", stub.replace("stub", "moved", 1), "forged")
    wait_until(lambda: counter(topology, "gw1", "stubs_unreadable_total") > unreadable, "the forged mark is read")
    assert spis(the_sa(topology.gw1)) == spis(before)
    assert topology.client.ping(SITE) == 3


def test_a_gateway_that_had_to_wait_for_the_bank_reports_to_the_other_one_then(topology: Topology) -> None:
    # the client's own stub serves while the bank is away
    changed = [topology.gateways["gw1"], topology.gateways["gw2"]]
    for sidecar in changed:
        sidecar.stop()
        sidecar.config["sync"] |= {"client_stub": "fallback"}
        sidecar.start()
    try:
        connect(topology)
        wait_until(lambda: "stub-held" in topology.agent.text(), "the client has its stub")
        topology.bank.stop()
        wait_until(lambda: not status(topology, "gw2")["bank"]["reachable"], "the bank is missed")
        assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
        now = spis(the_sa(topology.client))
        assert len(established(topology.gw1)) == 1
        topology.bank.start()
        wait_until(lambda: not topology.gw1.charon.sas(), "the end of the old IKE_SA", timeout=60)
        assert topology.client.ping(SITE) == 3
        assert spis(the_sa(topology.client)) == now
    finally:
        for sidecar in changed:
            sidecar.stop()
            del sidecar.config["sync"]["client_stub"]
            sidecar.start()
    assert json.loads(topology.gateways["gw2"].command("status", "--json").stdout)["bank"]["reachable"]
