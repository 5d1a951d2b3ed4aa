"""Refused requests at a real gateway: what is answered, and what its charon keeps of them."""

from __future__ import annotations

import pytest

from bridge.ike.message import NotifyType
from bridge.ike.resumption_answer import parse_response, verify_refusal
from bridge.ike.sync_messages import OrdinaryResponse, SyncRefusal
from bridge.lab import Topology
from bridge.lab.topology import SITE
from bridge.stub.stub import Stub
from failover_support import connect, counter, fresh, resume, resume_now
from probe_support import configured, rebuilt, request, send, the_stub

pytestmark = pytest.mark.lab

BLOCK_THRESHOLD = 5
"""charon's default: half-open IKE_SAs of one address, past which it does not answer"""
NOWHERE = ("192.0.2.99", bytes(8))


@pytest.fixture(autouse=True)
def each_test_begins_without_sas(topology: Topology) -> None:
    fresh(topology)


def half_open(topology: Topology) -> int:
    return sum(sa["state"] == "CONNECTING" for sa in topology.gw2.charon.sas())


def of_number(stub: Stub, number: int, **changes: object) -> bytes:
    return request(stub, spi_i=bytes((number,)) * 8, nonce=bytes((number,)) * 32, **changes)


def test_refused_requests_of_one_address_leave_no_half_open_ike_sa_and_block_no_full_handshake(
    topology: Topology,
) -> None:
    connect(topology)
    stub, before = the_stub(topology), half_open(topology)
    for number in range(1, BLOCK_THRESHOLD + 4):
        message = of_number(stub, number, sync_index=NOWHERE, refusable=True)
        [octets] = send(topology, message)
        assert parse_response(octets, message) == OrdinaryResponse(NotifyType.RESUMPTION_REFUSED)
    assert half_open(topology) == before
    assert counter(topology, "gw2", "refusals_told_total") >= BLOCK_THRESHOLD + 3
    topology.connect("home-gw2")


def test_a_client_that_falls_back_leaves_none_either(topology: Topology) -> None:
    before = half_open(topology)
    for _ in range(2):
        connect(topology)
        topology.bank.cli("FLUSHALL")
        outcome = resume_now(topology, topology.gw2)
        assert (outcome["result"], outcome["reason"]) == ("fallback", "refused")
        assert topology.client.ping(SITE, count=1) == 1
        assert half_open(topology) == before
        fresh(topology)


def test_a_refusal_is_proven_where_the_stub_was_found(topology: Topology) -> None:
    connect(topology)
    stub = the_stub(topology)
    gateway = topology.gateways["gw2"]
    gateway.stop()
    topology.gw2.charon.vici().unload_conn({"name": stub.connection})
    gateway.start()
    try:
        message = of_number(stub, 1, refusable=True)
        [octets] = send(topology, message)
        answer = parse_response(octets, message)
        assert isinstance(answer, SyncRefusal)
        assert verify_refusal(answer, message, stub.suite.prf, stub.sk_d)
        assert answer.reason == "connection-missing"
        assert resume(topology, "--to", topology.gw2.address)["reason"] == "refused"
        assert "reason=connection-missing" in topology.agent.text()
    finally:
        topology.gw2.swanctl("--load-all")


def test_with_the_policy_drop_a_refused_request_gets_no_answer_and_leaves_nothing(topology: Topology) -> None:
    connect(topology)
    stub = the_stub(topology)
    with configured(topology.gateways["gw2"], "sync", refused="drop"):
        before = half_open(topology)
        for refusable in (True, False):
            message = of_number(stub, 1 + refusable, sync_index=NOWHERE, refusable=refusable)
            assert send(topology, message) == []
        assert half_open(topology) == before
        assert counter(topology, "gw2", "refusals_total[no-stub]") == 2
        assert rebuilt(topology) == 0
        topology.connect("home-gw2")
