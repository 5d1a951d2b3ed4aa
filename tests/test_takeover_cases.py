"""Kinds of sessions that are taken over: address families, proposals, several CHILD_SAs, PFS, rekeyed IKE_SAs."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from bridge.lab.topology import SITE
from failover_support import established, replaced, spis
from takeover_support import SHARED6, answered, connect, die, move, rekey, rekeyed_child, sharing, take, wait_stub

pytestmark = pytest.mark.lab

CBC = "aes128-sha256-x25519"
AEAD = "aes256gcm16-prfsha384-ecp256"
PFS = "aes128gcm16-x25519"
SIDES = ("gateway", "client")


def settings(**both: str) -> dict[str, Any]:
    return {side: {key.replace("__", "."): value for key, value in both.items()} for side in SIDES}


def taken_over(topology: Topology) -> None:
    """gw1 dies; the session goes on at gw2, and both sides rekey it."""
    [before] = established(topology.client)
    outcome = move(topology, topology.gw1, topology.gw2)
    assert (outcome["found"], outcome["taken"]) == (1, 1)
    assert answered(topology, topology.client)
    [after] = established(topology.client)
    assert spis(after) == spis(before)
    rekeyed_child(topology.client, lambda: rekey(topology.client, child="net"))
    rekeyed_child(topology.client, lambda: rekey(topology.gw2, child="net"))
    assert answered(topology, topology.client)


@pytest.mark.parametrize("proposal", [CBC, AEAD])
def test_aead_and_cbc_with_pfs_after_rekeying_the_ike_sa(proposal: str) -> None:
    with sharing(**settings(proposals=proposal, children__net__esp_proposals=PFS)) as topology:
        connect(topology)
        for host, name in ((topology.client, "home"), (topology.gw1, "gw")):
            [before] = established(topology.client)
            rekey(host, ike=name)
            wait_until(lambda before=before: replaced(topology.client, spis(before)), "a new IKE_SA")  # type: ignore[misc]
        [there] = established(topology.gw1)
        wait_stub(topology, there["initiator-spi" if there.get("initiator") == "yes" else "responder-spi"])
        taken_over(topology)


def test_two_child_sas() -> None:
    more = {f"children.{name}.remote_ts": f"10.10.{n}.0/24" for n, name in ((1, "one"),)}
    local = {key.replace("remote", "local"): value for key, value in more.items()}
    with sharing(gateway=local, client=more) as topology:
        connect(topology)
        topology.client.charon.initiate("one", "home")
        [sa] = established(topology.client)
        before = {child["name"] for child in sa["child-sas"].values()}
        assert move(topology, topology.gw1, topology.gw2)["taken"] == 1
        assert answered(topology, topology.client)
        [after] = established(topology.client)
        assert {child["name"] for child in after["child-sas"].values()} == before


def test_ipv6() -> None:
    with sharing(client={"remote_addrs": SHARED6}) as topology:
        connect(topology, address=SHARED6)
        [before] = established(topology.client)
        die(topology, topology.gw1)
        assert take(topology, topology.gw2, address=SHARED6)["taken"] == 1
        wait_until(lambda: topology.client.ping(SITE, count=1, timeout=1.0) == 1, "traffic")
        [after] = established(topology.client)
        assert spis(after) == spis(before)
