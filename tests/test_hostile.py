"""Peers and attackers who break the rules of docs/protocol.md, at real gateways and clients.

Each test says what is there afterwards: IKE_SAs in charon, stubs in the bank, what the sidecar counts. test_safety.py
has the rules that a gateway keeps with one client and one request; here are two of something, or somebody in between.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge.ike.message import ExchangeType, Flag, PayloadType, parse
from bridge.ike.resumption_answer import parse_response
from bridge.ike.sync_messages import OrdinaryResponse, SyncResponse
from bridge.ike.sync_payload import Attribute, SyncPayload
from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.topology import SITE, client_host
from failover_support import connect, counter, established, fresh, resume, spis, status, stub_key, the_sa
from probe_support import altered, configured, rebuilt, refused, remade, request, send, stub_at, the_stub
from wire_support import proof_range

pytestmark = pytest.mark.lab

FORGER = str(Path(__file__).with_name("forger.py"))


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


@pytest.fixture(scope="module")
def other(topology: Topology) -> Host:
    """Another client, without a sidecar."""
    host = client_host(topology.lab, "other", "192.168.50.11", topology.secret)
    host.charon.start()
    return host


@pytest.fixture
def others_sa(topology: Topology, other: Host) -> Iterator[dict[str, Any]]:
    """A session of the other client's at gw1, its stub in the bank."""
    other.charon.initiate("net", "home")
    sa = the_sa(other)
    key = stub_key(topology.gw1.address, sa["responder-spi"])
    wait_until(lambda: bool(topology.bank.cli("HGET", key, "vips")), "the other client's stub")
    yield sa
    other.swanctl("--terminate", "--ike", "home", "--force", "--timeout", "1", check=False)
    wait_until(lambda: not other.charon.sas(), "the end of its SA")


def sealed(topology: Topology) -> dict[str, str]:
    """What the bank has, octet for octet."""
    return {key: topology.bank.cli("--no-raw", "HGET", key, "sealed") for key in topology.bank.stubs()}


def attempts(topology: Topology) -> list[tuple[str, str]]:
    """Addresses and SPIs of the rebuilt SAs on gw2, once they are active: until then they have another address."""
    return [(sa["remote-host"], sa["responder-spi"]) for sa in established(topology.gw2)]


def told(topology: Topology, gateway: str) -> list[tuple[str, str]]:
    """SPIs of the IKE_SAs that a gateway's sidecar knows."""
    return [(sa["spi_i"], sa["spi_r"]) for sa in status(topology, gateway)["sas"]]


# replays


def test_a_replay_from_another_address_gets_the_same_octets_and_moves_nothing(topology: Topology) -> None:
    connect(topology)
    message = request(the_stub(topology))
    with configured(topology.gateways["gw2"], "sync", confirm_timeout=120):
        [answer] = send(topology, message)
        before, stubs = attempts(topology), sealed(topology)
        assert [address for address, _ in before] == [topology.client.address]
        assert send(topology, message, by=topology.bank.host) == [answer]
        assert attempts(topology) == before
        assert status(topology, "gw2")["unconfirmed"] == 1
        assert sealed(topology) == stubs


def test_a_request_that_an_attacker_sent_first_does_not_keep_the_client_from_resuming(topology: Topology) -> None:
    connect(topology)
    # seen on the wire towards another gateway, and sent here before the client comes
    send(topology, request(the_stub(topology)), by=topology.bank.host)
    assert [address for address, _ in attempts(topology)] == [topology.bank.host.address]
    topology.kill_gateway(topology.gw1)
    outcome = resume(topology)
    assert outcome["result"] == "resumed"
    wait_until(lambda: len(attempts(topology)) == 1, "the end of the attacker's SA")
    assert attempts(topology) == [(topology.client.address, outcome["spi_r"])]
    assert topology.bank.stubs() == [stub_key(topology.gw2.address, outcome["spi_r"])]
    assert topology.client.ping(SITE) == 3


def test_of_several_attempts_one_has_child_sas(topology: Topology) -> None:
    """Two with the same selectors would share policies, and the end of one be the end of the other's traffic."""
    connect(topology)
    stub = the_stub(topology)
    granted = []
    for number in (1, 2):
        message = request(stub, spi_i=bytes((number,)) * 8, children=[(0, 0x40000000 + number)])
        [octets] = send(topology, message)
        answer = parse_response(octets, message)
        assert isinstance(answer, SyncResponse)
        assert answer.sync is not None
        granted.append(len(answer.sync.children))
    assert granted == [1, 0]
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    wait_until(lambda: len(attempts(topology)) == 1, "the end of the other attempts")
    assert topology.client.ping(SITE) == 3


def test_a_replay_to_another_gateway_leaves_the_session_where_it_is(topology: Topology) -> None:
    before = connect(topology)
    stubs = sealed(topology)
    message = request(the_stub(topology))
    with configured(topology.gateways["gw2"], "sync", confirm_timeout=1.0):
        assert send(topology, message)
        # to the gateway that has the session, and to another one: an SA each that nobody confirms
        assert send(topology, message, to=topology.gw1)
        wait_until(lambda: counter(topology, "gw2", "unconfirmed_removed_total") == 1, "the end of the SA at gw2", 60)
        wait_until(lambda: counter(topology, "gw1", "unconfirmed") == 0, "the end of the SA at gw1", 60)
    assert attempts(topology) == []
    assert spis(the_sa(topology.gw1)) == spis(the_sa(topology.client)) == spis(before)
    assert sealed(topology) == stubs
    assert topology.client.ping(SITE) == 3


def test_a_replay_to_the_gateway_that_has_the_session_takes_no_traffic_from_it(topology: Topology) -> None:
    """CHILD_SAs in the round trip would have the selectors of the session's own, and lead to the attacker."""
    before = connect(topology)
    message = request(the_stub(topology), children=[(0, 0x40000001)])
    with configured(topology.gateways["gw1"], "sync", confirm_timeout=120):
        wait_until(lambda: spis(the_sa(topology.gw1)) in told(topology, "gw1"), "the session, known again")
        [octets] = send(topology, message, to=topology.gw1, by=topology.bank.host)
        answer = parse_response(octets, message)
        assert isinstance(answer, SyncResponse)
        assert answer.sync is not None
        assert answer.sync.children == ()
        assert status(topology, "gw1")["unconfirmed"] == 1
        assert topology.client.ping(SITE) == 3
    assert spis(the_sa(topology.client)) == spis(before)
    assert topology.client.ping(SITE) == 3


def test_a_client_resumes_at_the_gateway_that_still_has_its_session(topology: Topology) -> None:
    before = connect(topology)
    outcome = resume(topology, "--to", topology.gw1.address)
    assert outcome["result"] == "resumed"
    wait_until(lambda: len(topology.gw1.charon.sas()) == 1, "the end of the old SA")
    sa = the_sa(topology.gw1)
    assert sa["responder-spi"] == outcome["spi_r"] != before["responder-spi"]
    assert len(sa["child-sas"]) == 1
    assert topology.client.ping(SITE) == 3


def test_a_replay_after_confirmation_is_refused_by_every_gateway_from_any_address(topology: Topology) -> None:
    connect(topology)
    message = request(the_stub(topology))
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
    new = the_sa(topology.client)
    key = stub_key(topology.gw2.address, new["responder-spi"])
    wait_until(lambda: topology.bank.stubs() == [key], "the new stub alone")
    for gateway in (topology.gw1, topology.gw2):
        answers = send(topology, message, to=gateway, by=topology.bank.host)
        assert answers
        assert all(isinstance(parse_response(octets, message), OrdinaryResponse) for octets in answers)
    assert spis(the_sa(topology.gw2)) == spis(new)
    assert topology.bank.stubs() == [key]
    assert topology.client.ping(SITE) == 3


# what an attacker alters


def offset_of(message: bytes, kind: int) -> int:
    return next(payload.offset for payload in parse(message).payloads if payload.type == kind)


@pytest.mark.parametrize("what", ["SPIi", "proposal", "public value", "nonce", "index", "PROOF"])
def test_a_request_altered_on_its_way_rebuilds_nothing_and_leaves_the_stub(topology: Topology, what: str) -> None:
    connect(topology)
    message = request(the_stub(topology))
    at = {
        "SPIi": 0,
        "proposal": offset_of(message, PayloadType.SA) + 7,
        "public value": offset_of(message, PayloadType.KE) + 10,
        "nonce": offset_of(message, PayloadType.NONCE),
        "index": offset_of(message, PayloadType.SYNC) + 11,
        "PROOF": proof_range(message).stop - 1,
    }[what]
    stubs = sealed(topology)
    reason = "no-stub" if what == "index" else "proof-wrong"
    before = counter(topology, "gw2", f"refusals_total[{reason}]")
    changed = altered(message, (at, bytes((message[at] ^ 0xFF,))))
    send(topology, changed)
    assert counter(topology, "gw2", f"refusals_total[{reason}]") == before + 1
    assert rebuilt(topology) == 0
    assert sealed(topology) == stubs


@pytest.mark.parametrize("kind", [Attribute.CHILD, Attribute.LIFETIME, Attribute.SEALED_STUB, 999])
def test_an_attribute_put_in_on_the_way_rebuilds_nothing(topology: Topology, kind: int) -> None:
    connect(topology)
    stub = the_stub(topology)
    honest = request(stub)
    proof = honest[proof_range(honest)]

    def put_in(payloads: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        sync = SyncPayload.decode(payloads[0][1])
        value = bytes(6) if kind == Attribute.CHILD else bytes(4)
        return [
            (PayloadType.SYNC, sync._replace(attributes=((kind, value), *sync.attributes)).encode()),
            *payloads[1:],
        ]

    changed = remade(stub, put_in)
    before = counter(topology, "gw2", "refusals_total[proof-wrong]")
    # with the proof of what the client had sent
    assert refused(topology, altered(changed, (proof_range(changed).start, proof)))
    assert counter(topology, "gw2", "refusals_total[proof-wrong]") == before + 1


# who has one stub


def test_the_index_of_another_client_with_a_proof_of_ones_own_stub_rebuilds_nothing(
    topology: Topology, others_sa: dict[str, Any]
) -> None:
    connect(topology)
    own, victims = the_stub(topology), stub_at(topology, others_sa["responder-spi"])
    assert own.index != victims.index
    stubs = sealed(topology)
    before = counter(topology, "gw2", "refusals_total[proof-wrong]")
    assert refused(topology, request(own, sync_index=tuple(victims.index)))
    assert counter(topology, "gw2", "refusals_total[proof-wrong]") == before + 1
    assert sealed(topology) == stubs
    assert len(established(topology.gw1)) == 2


def test_a_client_does_not_become_another_by_what_it_sends(topology: Topology, others_sa: dict[str, Any]) -> None:
    """Identity and virtual IP come from the stub: payloads of one's own, of IKE_AUTH for instance, change nothing."""
    connect(topology)
    own, victims = the_stub(topology), stub_at(topology, others_sa["responder-spi"])

    def claim(payloads: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        identity = bytes((victims.remote_id.type, 0, 0, 0)) + victims.remote_id.data
        return [*payloads[:-1], (PayloadType.ID_I, identity), payloads[-1]]

    message = remade(own, claim)
    [octets] = send(topology, message)
    assert isinstance(parse_response(octets, message), SyncResponse)
    [sa] = topology.gw2.charon.sas()
    assert sa["remote-id"] == own.remote_id.text
    assert sa["remote-vips"] == list(own.remote_vips)


# messages that are none


@pytest.mark.parametrize(
    ("exchange", "flags"),
    [
        (ExchangeType.IKE_AUTH, Flag.INITIATOR),
        (ExchangeType.CREATE_CHILD_SA, Flag.INITIATOR),
        (ExchangeType.INFORMATIONAL, Flag.INITIATOR),
        (240, Flag.INITIATOR),
        (241, Flag.INITIATOR),
        (ExchangeType.IKE_SA_INIT, Flag.RESPONSE),
        (ExchangeType.IKE_SA_INIT, Flag.RESPONSE | Flag.INITIATOR),
    ],
)
def test_the_payload_in_any_other_message_is_no_request(topology: Topology, exchange: int, flags: int) -> None:
    connect(topology)
    stub = the_stub(topology)
    stubs, before = sealed(topology), counter(topology, "gw2", "requests_total")
    with_spis = {"spi_i": stub.spi_i, "spi_r": stub.spi_r} if exchange != ExchangeType.IKE_SA_INIT else {}
    send(topology, remade(stub, list, exchange=exchange, flags=flags, **with_spis))
    send(topology, remade(stub, list, exchange=exchange, flags=flags, **with_spis), to=topology.gw1)
    assert counter(topology, "gw2", "requests_total") == before
    assert rebuilt(topology) == 0
    assert sealed(topology) == stubs
    assert topology.client.ping(SITE) == 3


def twice(position: int) -> Any:
    return lambda payloads: [*payloads[: position + 1], payloads[position], *payloads[position + 1 :]]


def second_proof(payloads: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    sync = SyncPayload.decode(payloads[0][1])
    return [(PayloadType.SYNC, sync._replace(attributes=sync.attributes * 2).encode()), *payloads[1:]]


def from_gateway(payloads: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    return [
        (PayloadType.SYNC, SyncPayload.decode(payloads[0][1])._replace(from_gateway=True).encode()),
        *payloads[1:],
    ]


@pytest.mark.parametrize(
    ("edit", "header"),
    [
        (twice(0), {}),
        (twice(1), {}),
        (twice(2), {}),
        (twice(3), {}),
        (second_proof, {}),
        (from_gateway, {}),
        (lambda payloads: [payloads[0], *payloads[2:]], {}),
        (list, {"message_id": 1}),
        (list, {"spi_r": b"R" * 8}),
        (list, {"flags": 0}),
    ],
    ids=[
        "SAi1 twice",
        "KEi twice",
        "Ni twice",
        "IKE_SA_SYNC twice",
        "PROOF twice",
        "C = 1",
        "no SAi1",
        "message ID 1",
        "an SPIr",
        "no flag I",
    ],
)
def test_a_request_that_contradicts_itself_is_malformed_though_it_is_proven(
    topology: Topology, edit: Any, header: dict[str, Any]
) -> None:
    connect(topology)
    before, stubs = counter(topology, "gw2", "malformed_requests_total"), sealed(topology)
    send(topology, remade(the_stub(topology), edit, **header))
    assert counter(topology, "gw2", "malformed_requests_total") == before + 1
    assert status(topology, "gw2")["unconfirmed"] == rebuilt(topology) == 0
    assert sealed(topology) == stubs


def padded(octets: int) -> Any:
    return lambda payloads: [*payloads, (PayloadType.VENDOR_ID, os.urandom(octets))]


def test_a_request_in_several_ip_fragments_is_served(topology: Topology) -> None:
    connect(topology)
    message = remade(the_stub(topology), padded(2800))
    [octets] = send(topology, message)
    assert isinstance(parse_response(octets, message), SyncResponse)
    assert len(attempts(topology)) == 1


def test_a_request_longer_than_any_client_sends_goes_to_charon_unseen(topology: Topology) -> None:
    connect(topology)
    before = counter(topology, "gw2", "requests_total")
    for size in (4000, 9000, 60_000):
        send(topology, remade(the_stub(topology), padded(size)))
    assert counter(topology, "gw2", "requests_total") == before
    assert status(topology, "gw2")["unconfirmed"] == rebuilt(topology) == 0
    assert counter(topology, "gw2", "nfqueue_waiting") == 0


# answers that nobody asked for, or that somebody else gave


def test_answers_without_a_request_change_nothing(topology: Topology) -> None:
    before = connect(topology)
    stub = the_stub(topology)
    for spi_i in (b"\x33" * 8, stub.spi_i):
        answer = remade(stub, from_gateway, spi_i=spi_i, spi_r=b"R" * 8, flags=Flag.RESPONSE)
        send(topology, answer, to=topology.client, by=topology.gw2)
        send(topology, answer)
    assert spis(the_sa(topology.client)) == spis(the_sa(topology.gw1)) == spis(before)
    assert rebuilt(topology) == 0
    assert topology.client.ping(SITE) == 3


@pytest.fixture
def patient(topology: Topology) -> Iterator[None]:
    """A client that listens on for long after an ordinary answer: so a slow machine does not decide."""
    with configured(topology.agent, "resume", answer_timeout=40.0, refusal_grace=20.0, retransmit=5.0):
        yield


@contextlib.contextmanager
def forging(topology: Topology, kind: str, pid: int) -> Iterator[None]:
    """An attacker on gw2's host who waits for the client's next request; the process `pid` sleeps until then."""
    words = (FORGER, kind, str(pid), topology.client.address, topology.gw2.address)
    forger = subprocess.Popen(
        topology.gw2.enter(sys.executable, *words),
        stdout=subprocess.PIPE,
        text=True,
        env=topology.gw2.environment(),
    )
    try:
        assert forger.stdout is not None
        assert forger.stdout.readline() == "ready\n"
        yield
        assert forger.communicate(timeout=60)[0].strip() == "5"
    finally:
        forger.kill()
        forger.wait()


@pytest.mark.parametrize("kind", ["wrong_proof", "draft_form", "ordinary", "error", "cookie", "cut", "reflected"])
def test_a_forged_answer_that_comes_first_does_not_keep_a_client_from_the_true_one(
    topology: Topology, patient: None, kind: str
) -> None:
    connect(topology)
    # charon and not the sidecar, which lets go of everything when it stood still: it answers once charon has the SA
    with forging(topology, kind, topology.gw2.charon.pid):
        outcome = resume(topology, "--to", topology.gw2.address)
    assert outcome["result"] == "resumed"
    wait_until(lambda: len(attempts(topology)) == 1, "the end of all other attempts")
    assert attempts(topology) == [(topology.client.address, outcome["spi_r"])]
    assert topology.client.ping(SITE) == 3


def test_forged_answers_alone_leave_the_client_its_session(topology: Topology) -> None:
    """The gateway is silent, and somebody else answers for it: nothing of that is believed, and the old SA goes on."""
    before = connect(topology)
    topology.kill_gateway(topology.gw2)
    with configured(topology.agent, "resume", answer_timeout=1.0, initiate_timeout=2.0):
        sleeper = subprocess.Popen(["sleep", "600"])
        try:
            with forging(topology, "wrong_proof", sleeper.pid):
                outcome = resume(topology, "--to", topology.gw2.address)
        finally:
            sleeper.kill()
            sleeper.wait()
        assert outcome["result"] == "failed"
        assert outcome["reason"] == "no-answer"
        assert spis(the_sa(topology.client)) == spis(before)
        assert topology.client.ping(SITE) == 3
    assert len(established(topology.gw1)) == 1
