"""What a gateway does with requests it must not serve, seen from outside: on the wire, in charon, in its log.

The requests come from the client's host, made with the keys that a client's sidecar has.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import msgspec
import pytest

from bridge.ike.resumption_answer import parse_response, verify_response
from bridge.ike.sync_messages import OrdinaryResponse, SyncResponse
from bridge.ike.transforms import Group, Suite
from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from bridge.lab.topology import SITE, bank_key
from bridge.stub.stub import Index, Stub
from bridge.stub.types import Endpoint, Identity
from failover_support import connect, counter, established, failed_over, fresh, resume, status, stub_key, the_sa
from probe_support import configured, rebuilt, refused, remade, request, send, the_stub

pytestmark = pytest.mark.lab

METRICS = """
import urllib.request
print(urllib.request.urlopen("http://127.0.0.1:9470/metrics").read().decode())
"""


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def test_a_proven_request_is_answered_with_a_proof(topology: Topology) -> None:
    connect(topology)
    stub = the_stub(topology)
    message = request(stub)
    [octets] = send(topology, message)
    answer = parse_response(octets, message)
    assert isinstance(answer, SyncResponse)
    assert verify_response(answer, message, stub.suite.prf, stub.sk_d)
    assert answer.lifetime
    assert answer.spi_r != stub.spi_r


def test_two_answers_share_neither_spi_nor_nonce(topology: Topology) -> None:
    connect(topology)
    stub = the_stub(topology)
    answers = []
    for spi_i in (b"\x11" * 8, b"\x12" * 8):
        message = request(stub, spi_i=spi_i)
        [octets] = send(topology, message)
        answers.append(parse_response(octets, message))
    first, second = answers
    assert isinstance(first, SyncResponse)
    assert isinstance(second, SyncResponse)
    assert first.spi_r != second.spi_r
    assert first.nonce != second.nonce
    assert bytes(8) not in (first.spi_r, second.spi_r)


def test_a_wrong_proof_rebuilds_nothing(topology: Topology) -> None:
    connect(topology)
    before = counter(topology, "gw2", "refusals_total[proof-wrong]")
    assert refused(topology, request(the_stub(topology), sk_d_old=bytes(32)))
    assert counter(topology, "gw2", "refusals_total[proof-wrong]") == before + 1


@pytest.mark.parametrize("change", [{"encr_len": 256}, {"group": Group.MODP_2048}])
def test_a_request_with_another_proposal_rebuilds_nothing(topology: Topology, change: dict[str, int]) -> None:
    """Proven as it is: it asks for another suite than the SA had, or its public value is of another group."""
    connect(topology)
    stub = the_stub(topology)
    before = counter(topology, "gw2", "refusals_total[proposal-differs]")
    assert refused(topology, request(stub, suite=msgspec.structs.replace(stub.suite, **change)))
    assert counter(topology, "gw2", "refusals_total[proposal-differs]") == before + 1


def test_a_request_in_the_plain_draft_form_rebuilds_nothing_by_default(topology: Topology) -> None:
    connect(topology)
    # SYN is last in it: by default it does not even get to the sidecar
    before = counter(topology, "gw2", "nfqueue_packets_total")
    assert refused(topology, request(the_stub(topology), sk_d_old=None))
    assert counter(topology, "gw2", "nfqueue_packets_total") == before
    with configured(topology.gateways["gw2"], "intercept", match="anywhere"):
        before = counter(topology, "gw2", "refusals_total[proof-missing]")
        assert refused(topology, request(the_stub(topology), sk_d_old=None))
        assert counter(topology, "gw2", "refusals_total[proof-missing]") == before + 1


def test_an_unknown_index_rebuilds_nothing(topology: Topology) -> None:
    connect(topology)
    assert refused(topology, request(the_stub(topology), sync_index=(topology.gw1.address, bytes(8))))


def test_the_plain_draft_form_is_served_where_the_operator_allows_it(topology: Topology) -> None:
    connect(topology)
    stub = the_stub(topology)
    sidecar = topology.gateways["gw2"]
    with configured(sidecar, "intercept", match="anywhere"), configured(sidecar, "sync", proof="optional"):
        message = request(stub, sk_d_old=None)
        [octets] = send(topology, message)
        answer = parse_response(octets, message)
        assert isinstance(answer, SyncResponse)
        assert answer.sync is None
        assert rebuilt(topology) == 1
        # one with a proof is held to it
        send(topology, request(stub, spi_i=b"\x12" * 8, sk_d_old=bytes(32)))
        assert rebuilt(topology) == 1


def test_a_client_of_release_0_1_resumes_with_match_anywhere_and_falls_back_with_first(topology: Topology) -> None:
    """Its request has SYN last, and no REFUSAL."""
    connect(topology)
    stub = the_stub(topology)

    def last(payloads: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        return [*payloads[1:], payloads[0]]

    message = remade(stub, last)
    assert refused(topology, message)
    with configured(topology.gateways["gw2"], "intercept", match="anywhere"):
        [octets] = send(topology, message)
        answer = parse_response(octets, message)
        assert isinstance(answer, SyncResponse)
        assert verify_response(answer, message, stub.suite.prf, stub.sk_d)
        assert status(topology, "gw2")["clients_sync_last"] == 1


def test_a_retransmission_gets_the_same_octets_and_installs_nothing(topology: Topology) -> None:
    connect(topology)
    message = request(the_stub(topology))
    # one after the other: while the first answer is in the making, there is no second
    answers = [octets for _ in range(3) for octets in send(topology, message)]
    assert len(answers) == 3
    assert len(set(answers)) == 1
    assert rebuilt(topology) == 1
    assert status(topology, "gw2")["unconfirmed"] == 1


def test_an_unconfirmed_sa_is_removed_without_a_delete_and_the_stub_stays(topology: Topology) -> None:
    connect(topology)
    sidecar = topology.gateways["gw2"]
    sidecar.stop()
    sidecar.config["sync"]["confirm_timeout"] = 1.0
    sidecar.start()
    try:
        stubs = topology.bank.stubs()
        send(topology, request(the_stub(topology)))
        assert rebuilt(topology) == 1
        wait_until(lambda: rebuilt(topology) == 0, "the end of the unconfirmed SA")
        assert topology.bank.stubs() == stubs
        assert counter(topology, "gw2", "unconfirmed_removed_total") == 1
        assert "sending DELETE" not in topology.gw2.charon.text().split("installed HA passive IKE_SA")[-1]
    finally:
        sidecar.stop()
        sidecar.config["sync"]["confirm_timeout"] = 10
        sidecar.start()


def test_a_session_is_resumed_though_someone_left_an_unconfirmed_sa_of_it(topology: Topology) -> None:
    connect(topology)
    send(topology, request(the_stub(topology)))
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    wait_until(lambda: rebuilt(topology) == 1, "the end of the other SA")
    assert topology.client.ping(SITE) == 3


def test_a_replay_after_confirmation_finds_no_stub(topology: Topology) -> None:
    connect(topology)
    stub = the_stub(topology)
    message = request(stub)
    send(topology, message)
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    after = the_sa(topology.gw2)
    answers = [parse_response(answer, message) for answer in send(topology, message, port=4502)]
    assert answers
    assert all(isinstance(answer, OrdinaryResponse) for answer in answers)
    assert the_sa(topology.gw2)["uniqueid"] == after["uniqueid"]


def test_a_replay_finds_no_stub_where_its_session_went_on_though_the_bank_has_it_again(topology: Topology) -> None:
    """A bank that was started from an older file; and the gateway's sidecar was restarted since."""
    connect(topology)
    message = request(the_stub(topology))
    [key] = topology.bank.stubs()
    topology.bank.cli("COPY", key, "kept")
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    after = the_sa(topology.gw2)
    wait_until(lambda: key not in topology.bank.stubs(), "the end of the old stub")
    gateway = topology.gateways["gw2"]
    spi = key.rpartition(":")[2]
    wait_until(
        lambda: spi in topology.gw2.run("cat", gateway.config["state"] + "/endings", check=False).stdout, "it on disk"
    )
    gateway.kill()
    topology.bank.cli("DEL", re.sub(r"^ike:stub:(\{.*\}):.*$", r"ike:gone:\1", key))
    topology.bank.cli("RENAME", "kept", key)
    gateway.start()
    answers = [parse_response(answer, message) for answer in send(topology, message, port=4502)]
    assert answers
    assert all(isinstance(answer, OrdinaryResponse) for answer in answers)
    assert the_sa(topology.gw2)["uniqueid"] == after["uniqueid"]
    assert topology.client.ping(SITE) == 3
    wait_until(lambda: key not in topology.bank.stubs(), "the end of the stub that came back", 60.0)


@pytest.mark.parametrize("where", ["cut", "second-sync", "length", "version"])
def test_a_malformed_request_goes_to_charon_untouched_and_is_counted(topology: Topology, where: str) -> None:
    connect(topology)
    message = bytearray(request(the_stub(topology)))
    match where:
        case "cut":
            message = message[:-7]
            message[24:28] = len(message).to_bytes(4)
        case "second-sync":
            # the payload before the last becomes an IKE_SA_SYNC too
            nonce = bytes(message).index(b"\x22" * 32) - 4
            key_exchange = bytes(message).rindex(b"\x28\x00", 0, nonce)
            message[key_exchange] = 200
        case "length":
            message[24:28] = (len(message) + 1).to_bytes(4)
        case "version":
            body = bytes(message).index(stub_index_octets(topology)) - 4
            message[body] = 0x05
    before = counter(topology, "gw2", "malformed_requests_total")
    received = topology.gw2.charon.text().count("received packet: from 192.168.50.10[4501]")
    send(topology, bytes(message))
    assert counter(topology, "gw2", "malformed_requests_total") == before + 1
    assert topology.gw2.charon.text().count("received packet: from 192.168.50.10[4501]") == received + 1
    assert rebuilt(topology) == 0


def the_stub_elsewhere(index: Index) -> Stub:
    """A stub at an index that its maker knows no key of: enough for a request that names it."""
    own = (Endpoint("192.0.2.1", 500), Endpoint("192.0.2.2", 500))
    return Stub(
        index=index,
        spi_i=bytes(8),
        spi_r=index.spi,
        initiator=False,
        local_id=Identity(2, b"a"),
        remote_id=Identity(2, b"b"),
        eap_id=None,
        suite=Suite(12, 128, 12, 5, 31),
        sk_d=bytes(32),
        shared_secret=None,
        local=own[0],
        remote=own[1],
        connection="gw",
        local_vips=(),
        remote_vips=(),
        conditions=(),
        extensions=(),
        peer_addresses=(),
        children=(),
        established=0,
        rekey_at=0,
        reauth_at=0,
        expires=0,
        revision=0,
    )


def stub_index_octets(topology: Topology) -> bytes:
    return bytes.fromhex(the_sa(topology.client)["responder-spi"])


def test_a_gateway_with_another_bank_key_falls_back_and_says_so_once(topology: Topology) -> None:
    connect(topology)
    key = (topology.gw2.etc / "ike-sa-sync/bank.key").read_text()
    sidecar = topology.gateways["gw2"]
    sidecar.stop()
    topology.gw2.write("/etc/ike-sa-sync/bank.key", bank_key(), mode=0o600)
    sidecar.start()
    try:
        index = Index(topology.gw1.address, stub_index_octets(topology))
        unreadable = counter(topology, "gw2", "stubs_unreadable_total")
        send(topology, request(the_stub_elsewhere(index)))
        topology.kill_gateway(topology.gw1)
        outcome = resume(topology)
        # two attempts, each counted, beside what looked for its virtual IP; one line
        assert counter(topology, "gw2", "stubs_unreadable_total") >= unreadable + 2
        assert outcome["result"] == "fallback"
        assert topology.client.ping(SITE) == 3
        lines = [line for line in sidecar.text().splitlines() if "stub-unreadable" in line and str(index) in line]
        assert len(lines) == 1
        assert "not in the key file" in lines[0]
    finally:
        sidecar.stop()
        topology.gw2.write("/etc/ike-sa-sync/bank.key", key, mode=0o600)
        sidecar.start()


@pytest.mark.parametrize("sealed", ["x" * 300, "", "cut"])
def test_a_stub_that_does_not_open_is_never_used(topology: Topology, sealed: str) -> None:
    connect(topology)
    index = Index(topology.gw1.address, stub_index_octets(topology))
    topology.bank.cli("HSET", index.key, "sealed", sealed)
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "fallback"
    lines = topology.gateways["gw2"].text().splitlines()
    assert sum("stub-unreadable" in line and str(index) in line for line in lines) == 1


def test_a_stub_of_another_client_put_in_its_place_does_not_open(topology: Topology) -> None:
    connect(topology)
    index = Index(topology.gw1.address, stub_index_octets(topology))
    topology.bank.cli("RENAME", index.key, "other")
    # a second session of the same client, with a stub of its own
    topology.client.swanctl("--terminate", "--ike", "home", "--force", "--timeout", "1")
    connect(topology)
    victim = Index(topology.gw1.address, stub_index_octets(topology))
    topology.bank.cli("RENAME", "other", victim.key)
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "fallback"
    lines = topology.gateways["gw2"].text().splitlines()
    assert any("stub-unreadable" in line and str(victim) in line and "moved" in line for line in lines)


def test_readable_fields_are_believed_in_nothing(topology: Topology) -> None:
    before = connect(topology)
    [key] = topology.bank.stubs()
    topology.bank.cli("HSET", key, "id_i", "admin@example.org", "connection", "other", "vips", "10.20.1.77")
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    assert the_sa(topology.gw2)["remote-id"] == before["local-id"]
    assert the_sa(topology.gw2)["remote-vips"] == before["local-vips"]


def test_without_a_bank_requests_go_on_to_charon_and_changes_wait(topology: Topology) -> None:
    connect(topology)
    topology.bank.kill()
    try:
        topology.kill_gateway(topology.gw1)
        outcome = resume(topology)
        assert outcome["result"] == "fallback"
        assert topology.client.ping(SITE) == 3
        wait_until(lambda: status(topology, "gw2")["bank"]["pending"] >= 1, "a waiting change")
    finally:
        topology.bank.start()
    key = stub_key(topology.gw2.address, the_sa(topology.client)["responder-spi"])
    wait_until(lambda: key in topology.bank.stubs(), "the stub, once the bank is back")


def test_nobody_but_root_can_open_the_control_sockets(topology: Topology) -> None:
    for host, name in ((topology.gw1, "gateway"), (topology.client, "client")):
        mode = host.path(f"/run/ike-sa-sync/{name}.sock").stat().st_mode
        assert mode & 0o077 == 0


def test_no_secret_is_in_any_output_at_any_level(topology: Topology) -> None:
    sidecars = [*topology.gateways.values(), topology.agent]
    for sidecar in sidecars:
        sidecar.stop()
        sidecar.config["log"] = {"level": "debug"}
        if sidecar is not topology.agent:
            # not by default
            sidecar.config["sync"] = {**sidecar.config["sync"], "shared_secret": True}
        sidecar.start()
    before = connect(topology)
    old = the_stub(topology)
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    assert before["responder-spi"] == old.spi_r.hex()
    assert old.shared_secret
    secrets = [old.sk_d, old.shared_secret, *_bank_secrets(topology)]
    texts = [sidecar.text() for sidecar in sidecars]
    gateway = topology.gateways["gw2"]
    texts += [
        gateway.command(*words).stdout
        for words in (["status", "--json"], ["status"], ["stubs", "list", "--json"], ["check", "--json"])
    ]
    [key] = topology.bank.stubs()
    index = re.search(r"\{(.+)/..\}:(\w+)$", key)
    assert index
    shown = gateway.command("stubs", "show", index[1], index[2], "--json").stdout
    assert json.loads(shown)["remote_id"] == "client@example.org"
    texts += [shown, gateway.host.run(sys.executable, "-c", METRICS).stdout]
    assert "ike_sa_sync_resumptions_total" in texts[-1]
    for process in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.split("\n"):
        texts.append(process)
    for secret in secrets:
        for form in (secret.hex(), secret.hex(" "), repr(secret)[2:-1]):
            assert len(form) >= 16
            assert not any(form in text for text in texts)
    for sidecar in sidecars:
        sidecar.stop()
        del sidecar.config["log"]


def _bank_secrets(topology: Topology) -> list[bytes]:
    lines = (topology.gw1.etc / "ike-sa-sync/bank.key").read_text().splitlines()
    return [line.split()[1].encode() for line in lines if line and not line.startswith("#")]


def test_ctrl_c_and_sigterm_end_a_sidecar_cleanly_and_take_its_rules_away(topology: Topology) -> None:
    sidecar = topology.gateways["gw2"]
    assert "queue" in topology.gw2.run("nft", "list", "ruleset").stdout
    began = time.monotonic()
    sidecar.stop()
    assert time.monotonic() - began < 9
    rules = topology.gw2.run("nft", "list", "ruleset").stdout
    assert "queue" not in rules
    # charon goes on to send to that end
    assert "ike-sa-sync-ha" in rules
    assert "Traceback" not in sidecar.text()
    assert established(topology.gw2) == []
    sidecar.start()


def test_failed_over_sessions_leave_one_sa_on_each_side(topology: Topology) -> None:
    failed_over(topology)
    assert len(topology.client.charon.sas()) == len(topology.gw2.charon.sas()) == 1
