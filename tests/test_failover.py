"""The main job, end to end: real charons, a real Redis, real ESP traffic (the standard lab)."""

from __future__ import annotations

import re
import time

import pytest

from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from bridge.lab.demo import Ping
from bridge.lab.topology import SITE
from failover_support import (
    agent_with,
    connect,
    counter,
    established,
    failed_over,
    fresh,
    last_move,
    rekeyed,
    rekeys_unanswered,
    resume,
    spis,
    status,
    stub_key,
    the_sa,
)

pytestmark = pytest.mark.lab


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def test_a_killed_gateways_session_goes_on_at_the_other_one_with_its_traffic(topology: Topology) -> None:
    before = connect(topology)
    ping = Ping(topology.client, SITE)
    wait_until(lambda: ping.answers() >= 10, "traffic")
    topology.kill_gateway(topology.gw1)
    outcome = resume(topology)
    at = ping.answers()
    wait_until(lambda: ping.answers() >= at + 10, "traffic at the other gateway")
    ping.stop()
    after = the_sa(topology.client)
    assert outcome["result"] == "resumed"
    assert outcome["gateway"] == topology.gw2.address == after["remote-host"]
    assert outcome["connection"] == "home-gw2"
    assert outcome["children"] == ["net"]
    assert outcome["reason"] is None
    assert outcome["exchange_ms"] <= outcome["total_ms"]
    assert spis(after) == (outcome["spi_i"], outcome["spi_r"])
    assert after["local-vips"] == before["local-vips"]


def test_gateway_and_client_agree_on_the_resumed_sa(topology: Topology) -> None:
    before, outcome = failed_over(topology)
    gateway, client = the_sa(topology.gw2), the_sa(topology.client)
    assert spis(gateway) == spis(client) == (outcome["spi_i"], outcome["spi_r"])
    assert gateway["remote-id"] == client["local-id"] == before["local-id"]
    assert gateway["remote-vips"] == before["local-vips"]
    assert gateway["remote-host"] == topology.client.address
    assert "initiator" not in gateway
    assert client["initiator"] == "yes"


def test_the_stub_moves_to_the_new_gateway_once_the_client_has_proved_the_keys(topology: Topology) -> None:
    before, outcome = failed_over(topology)
    old, new = (
        stub_key(topology.gw1.address, before["responder-spi"]),
        stub_key(topology.gw2.address, outcome["spi_r"]),
    )
    wait_until(lambda: topology.bank.stubs() == [new], f"{new} in place of {old}")


@pytest.mark.parametrize("side", ["client", "gw2"])
@pytest.mark.parametrize("what", ["ike", "child"])
def test_a_resumed_sa_is_rekeyed_from_either_side(topology: Topology, side: str, what: str) -> None:
    _, outcome = failed_over(topology)
    host = topology.lab.hosts[side]
    name = {"ike": {"client": "home-gw2", "gw2": "gw"}[side], "child": "net"}[what]
    child = list(the_sa(host)["child-sas"])
    host.swanctl("--rekey", f"--{what}", name)
    if what == "ike":
        wait_until(
            lambda: (
                [spis(sa) for sa in established(host)] not in ([], [(outcome["spi_i"], outcome["spi_r"])])
                and len(established(host)) == 1
            ),
            "the rekeyed IKE_SA",
        )
        for end in (topology.client, topology.gw2):
            wait_until(lambda end=end: len(end.charon.sas()) == 1, "the end of the old one")  # type: ignore[misc]
    else:
        wait_until(lambda: list(the_sa(host)["child-sas"]) not in ([], child), "the rekeyed CHILD_SA")
    assert topology.client.ping(SITE) == 3
    new = stub_key(topology.gw2.address, the_sa(topology.gw2)["responder-spi"])
    if the_sa(topology.gw2).get("initiator") == "yes":
        new = stub_key(topology.gw2.address, the_sa(topology.gw2)["initiator-spi"])
    wait_until(lambda: topology.bank.stubs() == [new], "the stub at the rekeyed SPIs")


@pytest.mark.parametrize("side", ["client", "gw2"])
def test_a_resumed_sa_is_deleted_from_either_side_and_its_stub_with_it(topology: Topology, side: str) -> None:
    failed_over(topology)
    host = topology.lab.hosts[side]
    host.swanctl("--terminate", "--ike", the_sa(host)["name"])
    wait_until(lambda: not topology.client.charon.sas() and not topology.gw2.charon.sas(), "the end on both sides")
    wait_until(lambda: not topology.bank.stubs(), "the end of the stub")
    # wanted by a side, so nothing is resumed
    time.sleep(1)
    assert not established(topology.client)
    if side == "gw2":
        # so soon after the resumption its client takes that for a gateway that could not keep it, and shakes hands
        wait_until(lambda: bool(established(topology.client)), "its handshake")


def test_a_resumed_session_is_resumable(topology: Topology) -> None:
    before, _ = failed_over(topology)
    topology.gateways["gw1"].start(wait=False)
    topology.gw1.charon.start()
    topology.gateways["gw1"].wait_ready()
    topology.kill_gateway(topology.gw2)
    outcome = resume(topology)
    assert outcome["result"] == "resumed"
    assert outcome["gateway"] == topology.gw1.address
    assert the_sa(topology.client)["local-vips"] == before["local-vips"]
    assert topology.client.ping(SITE) == 3


def test_a_session_rekeyed_before_the_failure_is_resumed(topology: Topology) -> None:
    first = connect(topology)
    topology.client.swanctl("--rekey", "--ike", "home")
    wait_until(lambda: rekeyed(topology.client, first), "the rekeyed IKE_SA")
    key = stub_key(topology.gw1.address, the_sa(topology.client)["responder-spi"])
    wait_until(lambda: topology.bank.stubs() == [key], "the stub at the new SPIs alone")
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    assert topology.client.ping(SITE) == 3


def test_a_session_whose_client_did_not_receive_the_answer_to_its_rekey_is_resumed(topology: Topology) -> None:
    """The gateway has the new IKE_SA, its client the old one alone."""
    first = connect(topology)
    with rekeys_unanswered(topology.gw1):
        topology.client.swanctl("--rekey", "--ike", "home")
        wait_until(lambda: len(topology.bank.stubs()) == 2, "the stubs of both IKE_SAs")
        topology.kill_gateway(topology.gw1)
        assert resume(topology)["result"] == "resumed"
    assert spis(the_sa(topology.client)) != spis(first)
    assert topology.client.ping(SITE) == 3


def test_a_session_that_went_on_from_before_its_rekey_is_ended_where_it_was(topology: Topology) -> None:
    """Its client did not receive the answer, and its gateway lives, which has both IKE_SAs."""
    connect(topology)
    with rekeys_unanswered(topology.gw1):
        topology.client.swanctl("--rekey", "--ike", "home")
        wait_until(lambda: len(topology.bank.stubs()) == 2, "the stubs of both IKE_SAs")
        assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
        wait_until(lambda: not established(topology.gw1), "the end of the new one at the old gateway")
    now = spis(the_sa(topology.client))
    wait_until(lambda: topology.bank.stubs() == [stub_key(topology.gw2.address, now[1])], "its stub alone")
    assert topology.client.ping(SITE) == 3


def test_a_session_whose_gateway_did_not_receive_the_answer_to_its_rekey_is_resumed(topology: Topology) -> None:
    """The client has the new IKE_SA, and a stub there is of the old one alone."""
    first = connect(topology)
    with rekeys_unanswered(topology.client):
        topology.gw1.swanctl("--rekey", "--ike", "gw", check=False)
        wait_until(lambda: rekeyed(topology.client, first), "the rekeyed IKE_SA")
        topology.kill_gateway(topology.gw1)
    new = spis(the_sa(topology.client))
    outcome = resume(topology)
    assert outcome["result"] == "resumed"
    assert outcome["children"] == ["net"]
    assert spis(the_sa(topology.client)) == spis(the_sa(topology.gw2)) == (outcome["spi_i"], outcome["spi_r"])
    # neither the IKE_SA that was rekeyed nor the one that came of it is left
    assert len(topology.client.charon.sas()) == 1
    assert (outcome["spi_i"], outcome["spi_r"]) not in (spis(first), new)
    assert topology.client.ping(SITE) == 3


def test_a_session_that_the_gateway_initiated_its_rekey_of_is_resumed(topology: Topology) -> None:
    first = connect(topology)
    topology.gw1.swanctl("--rekey", "--ike", "gw")
    wait_until(lambda: rekeyed(topology.client, first), "the rekeyed IKE_SA")
    key = stub_key(topology.gw1.address, the_sa(topology.client)["initiator-spi"])
    wait_until(lambda: topology.bank.stubs() == [key], "the stub at the gateway's SPI, now the initiator's")
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    assert topology.client.ping(SITE) == 3


def test_a_client_notices_by_itself_that_its_gateway_died(topology: Topology) -> None:
    before = counter(topology, "gw2", "resumptions_total")
    with agent_with(topology, resume_on_down=True):
        connect(topology)
        topology.kill_gateway(topology.gw1)
        wait_until(
            lambda: [sa["remote-host"] for sa in established(topology.client)] == [topology.gw2.address],
            "the session at gw2",
            timeout=120,
        )
        wait_until(lambda: topology.client.ping(SITE, count=1) == 1, "traffic")
        # traffic flows before the client has been told that the keys are confirmed
        spi_i = the_sa(topology.client)["initiator-spi"]
        wait_until(lambda: last_move(topology).get("spi_i") == spi_i, "the end of the move")
        assert last_move(topology)["result"] == "resumed"
    assert counter(topology, "gw2", "resumptions_total") == before + 1


def test_a_session_moves_to_a_chosen_gateway_while_its_own_lives(topology: Topology) -> None:
    before = connect(topology)
    outcome = resume(topology, "--to", topology.gw2.address)
    assert outcome["result"] == "resumed"
    assert outcome["gateway"] == topology.gw2.address
    assert the_sa(topology.client)["local-vips"] == before["local-vips"]
    assert topology.client.ping(SITE) == 3


@pytest.mark.parametrize("role", ["gateway", "client"])
def test_a_sidecar_restarted_in_mid_life_knows_its_sas_again(topology: Topology, role: str) -> None:
    before = connect(topology)
    sidecar = topology.gateways["gw1"] if role == "gateway" else topology.agent
    sidecar.kill()
    sidecar.start()
    assert spis(the_sa(topology.client)) == spis(before)
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    assert topology.client.ping(SITE) == 3


def test_a_session_that_came_up_without_a_sidecar_is_resumable_once_it_runs(topology: Topology) -> None:
    topology.gateways["gw1"].kill()
    topology.connect()
    topology.gateways["gw1"].start()
    wait_until(lambda: len(topology.bank.stubs()) == 1, "the stub")
    # charon rekeys the CHILD_SAs of what it tells again
    wait_until(lambda: topology.client.ping(SITE, count=1) == 1, "traffic")
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    assert topology.client.ping(SITE) == 3


def test_a_missing_stub_means_a_full_handshake(topology: Topology) -> None:
    connect(topology)
    before = counter(topology, "gw2", "refusals_total[no-stub]")
    topology.kill_gateway(topology.gw1)
    topology.bank.cli("FLUSHALL")
    outcome = resume(topology)
    assert outcome["result"] == "fallback"
    assert outcome["reason"] == "refused"
    assert outcome["gateway"] == topology.gw2.address
    assert spis(the_sa(topology.client)) == (outcome["spi_i"], outcome["spi_r"])
    assert topology.client.ping(SITE) == 3
    # once for each time that the client sent it: on a slow machine more than once
    assert counter(topology, "gw2", "refusals_total[no-stub]") > before


def test_with_no_gateway_left_the_outcome_is_failed(topology: Topology) -> None:
    connect(topology)
    with agent_with(topology, resume={"answer_timeout": 1.0, "initiate_timeout": 3.0}):
        topology.kill_gateway(topology.gw1)
        topology.kill_gateway(topology.gw2)
        outcome = resume(topology)
    assert outcome["result"] == "failed"
    assert outcome["reason"] == "no-answer"


def test_ordinary_handshakes_work_while_the_sidecar_is_stopped_or_killed(topology: Topology) -> None:
    topology.gateways["gw1"].kill()
    topology.connect()
    assert topology.client.ping(SITE) == 3
    topology.client.swanctl("--terminate", "--ike", "home")
    topology.gateways["gw2"].stop()
    topology.connect("home-gw2")
    assert topology.client.ping(SITE) == 3


def test_a_stub_expires_when_its_sa_does(topology: Topology) -> None:
    connect(topology)
    sa = the_sa(topology.gw1)
    [key] = topology.bank.stubs()
    left = int(topology.bank.cli("TTL", key))
    conns = topology.gw1.swanctl("--list-conns")
    rekey_time = int(next(iter(re.findall(r"rekeying every (\d+)s", conns))))
    assert abs(left - (int(sa["rekey-time"]) + rekey_time // 10)) <= 5


def test_a_sidecar_restarted_while_the_bank_is_away_waits_for_it(topology: Topology) -> None:
    connect(topology)
    sidecar = topology.gateways["gw1"]
    sidecar.kill()
    topology.bank.kill()
    said = len(sidecar.text())
    sidecar.start()
    wait_until(lambda: "component=recovery" in sidecar.text()[said:], "the log that the bank is unreachable")
    topology.bank.start()
    wait_until(lambda: status(topology, "gw1")["sas"] != [], "the SA, known again")
    # charon was not asked: it would have rekeyed the CHILD_SA
    assert "event=resync" not in sidecar.text()[said:]
    wait_until(lambda: status(topology, "gw2")["bank"]["reachable"], "the bank, as gw2 sees it")
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    assert topology.client.ping(SITE) == 3


def test_a_charon_that_died_alone_leaves_its_stubs_and_is_served_again_when_it_is_back(topology: Topology) -> None:
    connect(topology)
    [key] = topology.bank.stubs()
    topology.gw1.charon.crash()
    wait_until(lambda: not status(topology, "gw1")["charon"]["reachable"], "word that charon is gone")
    assert topology.bank.stubs() == [key]
    assert resume(topology)["gateway"] == topology.gw2.address
    topology.gw1.charon.start()
    wait_until(lambda: status(topology, "gw1")["charon"]["reachable"], "charon, back")
    outcome = resume(topology, "--to", topology.gw1.address)
    assert outcome["result"] == "resumed"
    assert topology.client.ping(SITE) == 3
    new = stub_key(topology.gw1.address, outcome["spi_r"])
    wait_until(lambda: new in topology.bank.stubs(), "the stub at gw1")


def test_a_session_goes_back_to_the_gateway_that_still_has_its_first_sa(topology: Topology) -> None:
    connect(topology)
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
    assert resume(topology, "--to", topology.gw1.address)["result"] == "resumed"
    assert topology.client.ping(SITE) == 3


def test_a_client_that_lost_its_path_resumes_at_the_same_gateway_in_place_of_the_old_sa(topology: Topology) -> None:
    before = connect(topology)
    outcome = resume(topology, "--to", topology.gw1.address)
    assert outcome["result"] == "resumed"
    wait_until(lambda: len(topology.gw1.charon.sas()) == 1, "the end of the old SA")
    assert spis(the_sa(topology.gw1)) == (outcome["spi_i"], outcome["spi_r"])
    assert the_sa(topology.gw1)["remote-vips"] == before["local-vips"]
    assert topology.client.ping(SITE) == 3
    new = stub_key(topology.gw1.address, outcome["spi_r"])
    wait_until(lambda: topology.bank.stubs() == [new], "the new stub alone")


def test_the_resumed_child_sa_is_for_the_virtual_ip_that_the_client_had(topology: Topology) -> None:
    failed_over(topology)
    sa = the_sa(topology.gw2)
    assert sa["remote-vips"] == ["10.20.1.1"]
    [child] = sa["child-sas"].values()
    assert child["remote-ts"] == ["10.20.1.1/32"]


def test_a_gateway_that_does_not_answer_is_passed_over_and_the_next_one_resumes(topology: Topology) -> None:
    connect(topology)
    with agent_with(topology, resume={"answer_timeout": 1.0}):
        topology.kill_gateway(topology.gw2)
        said = len(topology.agent.text())
        outcome = resume(topology)
    assert (outcome["result"], outcome["gateway"]) == ("resumed", topology.gw1.address)
    assert f"gateway-not-answering gateway={topology.gw2.address}" in topology.agent.text()[said:]


def test_a_client_whose_own_network_was_away_comes_back_by_itself(topology: Topology) -> None:
    connect(topology)
    quick = {"answer_timeout": 1.0, "initiate_timeout": 2.0}
    with agent_with(topology, resume=quick, resume_on_down=True):
        wait_until(lambda: established(topology.client) != [], "the session")
        said = len(topology.agent.text())
        topology.lab.unplug(topology.client)
        try:
            wait_until(lambda: "result=failed" in topology.agent.text()[said:], "an attempt in vain", timeout=120)
        finally:
            topology.lab.plug(topology.client)
        wait_until(lambda: established(topology.client) != [], "the session, back", timeout=120)
        wait_until(lambda: topology.client.ping(SITE, count=1) == 1, "traffic")


def test_one_child_sa_that_the_new_gateway_refuses_costs_no_other(topology: Topology) -> None:
    second = "children { net2 { %s = 10.11.0.0/16\n esp_proposals = aes128gcm16 } }"
    topology.gw1.configure(f"connections {{ gw {{ {second % 'local_ts'} }} }}\n", "second.conf")
    both = " ".join(f"{name} {{ {second % 'remote_ts'} }}" for name in ("home", "home-gw2"))
    topology.client.configure(f"connections {{ {both} }}\n", "second.conf")
    # ESP in userspace routes through a local address within the selector
    topology.gw1.run("ip", "address", "add", "10.11.0.1/32", "dev", "lo")
    for host in (topology.gw1, topology.client):
        host.charon.load()
    try:
        connect(topology)
        topology.client.charon.initiate("net2", "home")
        wait_until(lambda: len(the_sa(topology.gw1)["child-sas"]) == 2, "both CHILD_SAs")
        topology.kill_gateway(topology.gw1)
        outcome = resume(topology)
        assert outcome["result"] == "resumed"
        assert outcome["children"] == ["net"]
        assert topology.client.ping(SITE) == 3
    finally:
        for host in (topology.gw1, topology.client):
            (host.etc / "swanctl/conf.d/second.conf").unlink()
        topology.gw1.run("ip", "address", "delete", "10.11.0.1/32", "dev", "lo")
        topology.client.charon.load()
        fresh(topology)
        topology.gw1.charon.load()


def test_a_connection_that_is_not_configured_is_refused(topology: Topology) -> None:
    before = connect(topology)
    outcome = resume(topology, "--connection", "hom")
    assert (outcome["result"], outcome["reason"]) == ("failed", "connection-not-configured")
    assert spis(the_sa(topology.client)) == spis(before)
