"""Stubs that clients hold themselves, end to end: real charons, a real Redis, real packets."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import pytest

from bridge.client.session_file import Session, load
from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.topology import SITE
from failover_support import (
    agent_with,
    connect,
    counter,
    established,
    fresh,
    rekeyed,
    rekeys_unanswered,
    resume,
    spis,
    the_sa,
)
from probe_support import configured

pytestmark = pytest.mark.lab

FILE = "/etc/ike-sa-sync/sessions"


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab; its gateways give clients their stubs, and the client keeps its session in a file."""
    with Lab() as lab:
        topology = standard(lab, start=False)
        for sidecar in topology.gateways.values():
            sidecar.config["sync"]["client_stub"] = "fallback"
        topology.agent.config["held"] = {"file": FILE}
        topology.start()
        yield topology


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def kept(topology: Topology) -> list[Session]:
    """What the client has in its file."""
    return load(topology.client.etc / FILE.removeprefix("/etc/"))


def hold(topology: Topology) -> Session:
    """A session of the client at gw1, and its stub with the client."""
    sa = connect(topology)
    wait_until(
        lambda: [(s.stub.spi_i.hex(), s.sealed is not None) for s in kept(topology)] == [(sa["initiator-spi"], True)],
        "the stub, held and kept",
    )
    return kept(topology)[0]


def crash(topology: Topology) -> None:
    """The client's host fails: no process says goodbye."""
    topology.agent.kill()
    topology.client.charon.kill()


def boot(topology: Topology) -> None:
    topology.agent.start(wait=False)
    topology.client.charon.start()
    topology.agent.wait_ready()


def test_a_client_is_given_its_stub_and_resumes_with_it_where_the_bank_has_lost_everything(topology: Topology) -> None:
    hold(topology)
    before = counter(topology, "gw2", "stubs_presented_total")
    topology.kill_gateway(topology.gw1)
    topology.bank.cli("FLUSHALL")
    assert resume(topology)["result"] == "resumed"
    assert topology.client.ping(SITE) == 3
    assert counter(topology, "gw2", "stubs_presented_total") == before + 1


def test_a_client_resumes_with_its_own_stub_while_the_bank_is_away(topology: Topology) -> None:
    hold(topology)
    topology.kill_gateway(topology.gw1)
    topology.bank.kill()
    assert resume(topology)["result"] == "resumed"
    assert topology.client.ping(SITE) == 3


def test_where_the_bank_has_the_stub_it_is_the_one_that_counts(topology: Topology) -> None:
    hold(topology)
    before = counter(topology, "gw2", "stubs_presented_total")
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    assert counter(topology, "gw2", "stubs_presented_total") == before


def test_a_gateway_that_prefers_what_clients_hold_takes_it_before_the_banks(topology: Topology) -> None:
    with configured(topology.gateways["gw2"], "sync", client_stub="prefer"):
        hold(topology)
        [old] = topology.bank.stubs()
        topology.kill_gateway(topology.gw1)
        assert resume(topology)["result"] == "resumed"
        assert counter(topology, "gw2", "stubs_presented_total") == 1
        wait_until(lambda: old not in topology.bank.stubs(), "the end of the old stub in the bank")


@pytest.mark.parametrize("policy", ["fallback", "prefer"])
def test_a_session_that_its_gateway_ended_does_not_go_on_with_what_the_client_still_holds(
    topology: Topology, policy: str
) -> None:
    dropped = ("INPUT", "-s", topology.gw1.address, "-j", "DROP")
    with (
        configured(topology.gateways["gw2"], "sync", client_stub=policy),
        agent_with(topology, resume_on_down=False),
    ):
        hold(topology)
        topology.client.run("iptables", "-A", *dropped)
        try:
            topology.gw1.swanctl("--terminate", "--ike", "gw", "--force", "--timeout", "1", check=False)
            wait_until(lambda: topology.bank.stubs() == [], "the end of the stub in the bank")
            assert kept(topology)[0].sealed is not None
            assert resume(topology, "--to", topology.gw2.address)["result"] == "fallback"
        finally:
            topology.client.run("iptables", "-D", *dropped)
        assert counter(topology, "gw2", "stubs_presented_total") == 0
        # a request that is sent again is refused again
        assert counter(topology, "gw2", "refusals_total[no-stub]") >= 1


def test_a_resumed_session_is_held_again_with_its_new_keys(topology: Topology) -> None:
    hold(topology)
    topology.kill_gateway(topology.gw1)
    outcome = resume(topology)
    wait_until(
        lambda: [(s.stub.spi_i.hex(), s.sealed is not None) for s in kept(topology)] == [(outcome["spi_i"], True)],
        "the resumed session in the file",
    )
    assert kept(topology)[0].stub.children


def test_a_rekeyed_session_is_held_again(topology: Topology) -> None:
    first = hold(topology)
    topology.client.swanctl("--rekey", "--ike", "home")
    wait_until(
        lambda: (
            [s.sealed is not None for s in kept(topology)] == [True] and kept(topology)[0].stub.sk_d != first.stub.sk_d
        ),
        "the stub of the rekeyed IKE_SA",
    )


def test_where_the_gateway_lacks_the_answer_to_its_rekey_the_stub_of_before_is_held(topology: Topology) -> None:
    hold(topology)
    first = the_sa(topology.client)
    with rekeys_unanswered(topology.client):
        topology.gw1.swanctl("--rekey", "--ike", "gw", check=False)
        wait_until(lambda: rekeyed(topology.client, first), "the rekeyed IKE_SA")
        topology.kill_gateway(topology.gw1)
    wait_until(
        lambda: [s.sealed for s in kept(topology)] == [None], "the rekeyed one alone in the file, without a stub"
    )
    topology.bank.cli("FLUSHALL")
    assert resume(topology)["result"] == "resumed"
    assert topology.client.ping(SITE) == 3


def test_the_file_is_the_owners_alone(topology: Topology) -> None:
    hold(topology)
    file = topology.client.etc / FILE.removeprefix("/etc/")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_session_survives_a_crash_of_the_clients_host(topology: Topology) -> None:
    hold(topology)
    before = the_sa(topology.client)
    crash(topology)
    said = len(topology.agent.text())
    boot(topology)
    wait_until(lambda: "result=resumed" in topology.agent.text()[said:], "the session, back")
    wait_until(lambda: topology.client.ping(SITE, count=1) == 1, "traffic")
    after = the_sa(topology.client)
    assert after["remote-host"] == topology.gw1.address
    assert after["local-vips"] == before["local-vips"]
    assert spis(after) != spis(before)
    # in place of the old one
    wait_until(lambda: len(topology.gw1.charon.sas()) == 1, "the end of the old SA")


def test_a_session_survives_a_crash_of_client_gateway_and_bank(topology: Topology) -> None:
    before = hold(topology).stub
    crash(topology)
    topology.kill_gateway(topology.gw1)
    topology.bank.kill()
    boot(topology)
    wait_until(lambda: established(topology.client) != [], "the session at gw2")
    wait_until(lambda: topology.client.ping(SITE, count=1) == 1, "traffic")
    after = the_sa(topology.client)
    assert after["remote-host"] == topology.gw2.address
    assert tuple(after["local-vips"]) == before.local_vips


def test_a_session_that_a_side_ended_is_not_kept(topology: Topology) -> None:
    hold(topology)
    topology.gw1.swanctl("--terminate", "--ike", "gw")
    wait_until(lambda: kept(topology) == [], "an empty file")


def test_a_file_that_others_can_read_is_not_used(topology: Topology) -> None:
    hold(topology)
    crash(topology)
    file = topology.client.etc / FILE.removeprefix("/etc/")
    file.chmod(0o644)
    boot(topology)
    assert "sessions-not-restored" in topology.agent.text()
    assert topology.client.charon.sas() == []
