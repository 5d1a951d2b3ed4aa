"""`ike-sa-sync revoke` in the standard lab: real charons, a real Redis."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from failover_support import connect, counter, established, fresh, resume

pytestmark = pytest.mark.lab

IDENTITY = "client@example.org"


@pytest.fixture(autouse=True)
def let_in(topology: Topology) -> Iterator[None]:
    fresh(topology)
    wait_until(lambda: topology.bank.cli("ZRANGE", "ike:gateways", "0", "-1").count("192.") == 2, "the heartbeats")
    yield
    topology.gateways["gw2"].command("unrevoke", IDENTITY, check=False)


def revoke(topology: Topology, at: str = "gw2") -> dict[str, Any]:
    done = topology.gateways[at].command("revoke", "Client@Example.org", "--for", "1h", "--json")
    return dict(json.loads(done.stdout))


def test_a_client_is_locked_out_of_all_gateways_until_it_is_let_in_again(topology: Topology) -> None:
    connect(topology)
    done = revoke(topology)
    # that gateway may have been faster than the command
    assert done["stubs_deleted"] in (0, 1)
    assert [(row["gateway"], row["enforced"], row["ended"]) for row in done["gateways"]] == [
        (topology.gw1.address, True, 1),
        (topology.gw2.address, True, 0),
    ]
    assert topology.gw1.charon.sas() == []
    assert topology.bank.stubs() == []
    assert [counter(topology, "gw1", name) for name in ("identities_revoked", "revoked_ended_total")] == [1, 1]
    # its client got a DELETE
    wait_until(lambda: topology.client.charon.sas() == [], "the end of the session at the client")
    # a full handshake succeeds, and is ended at once
    topology.client.swanctl("--initiate", "--child", "home", check=False)
    wait_until(lambda: not established(topology.gw1) and not established(topology.client), "the end of the new session")
    assert topology.bank.stubs() == []
    [row] = json.loads(topology.gateways["gw1"].command("revoked", "--json").stdout)
    assert row["identity"] == "Client@Example.org"
    topology.gateways["gw1"].command("unrevoke", IDENTITY)
    assert json.loads(topology.gateways["gw2"].command("revoked", "--json").stdout) == []
    connect(topology)


def test_a_client_that_does_not_answer_is_locked_out_too_and_resumes_nowhere(topology: Topology) -> None:
    connect(topology)
    charon = topology.client.charon
    os.kill(charon.pid, signal.SIGSTOP)
    try:
        revoke(topology)
        assert topology.gw1.charon.sas() == []
    finally:
        os.kill(charon.pid, signal.SIGCONT)
    # whatever it still believes to have
    outcome = resume(topology, "--to", topology.gw2.address)
    assert outcome["result"] != "resumed"
    wait_until(lambda: not established(topology.gw2), "the end of the handshake's session")


def test_a_mark_outlives_an_emptied_bank_and_a_restart_of_the_sidecar(topology: Topology) -> None:
    revoke(topology)
    gw1 = topology.gateways["gw1"]
    for sidecar in topology.gateways.values():
        sidecar.stop()
    topology.bank.cli("FLUSHDB")
    for sidecar in topology.gateways.values():
        sidecar.start()
    wait_until(lambda: json.loads(gw1.command("revoked", "--json").stdout) != [], "the mark in the bank again")
    topology.client.swanctl("--initiate", "--child", "home", check=False)
    wait_until(lambda: not established(topology.gw1), "the end of the session")


def test_stubs_are_found_by_identity(topology: Topology) -> None:
    connect(topology)
    listing = topology.gateways["gw2"].command
    for pattern, count in (("*@EXAMPLE.org", 1), ("client@*", 1), ("nobody*", 0)):
        assert len(json.loads(listing("stubs", "list", "--identity", pattern, "--json").stdout)) == count
