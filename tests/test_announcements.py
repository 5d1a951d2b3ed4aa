"""A gateway fails, and its clients are told by another one: within about a second, with charon's own DPD timers."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bridge.lab import Lab, Topology
from bridge.lab.charon import render
from bridge.lab.daemon import SLOWNESS, wait_until
from bridge.lab.demo import Ping
from bridge.lab.host import Host
from bridge.lab.topology import CHOICES, SITE, client_config, client_host, standard
from failover_support import connect, established, fresh, last_move, status, stub_key, the_sa

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def announced() -> Iterator[Topology]:
    """The standard lab, whose gateways announce failures, and whose client has charon's default timers."""
    with Lab() as lab:
        topology = standard(lab, start=False)
        for sidecar in topology.gateways.values():
            sidecar.config["failover"] = {"detect": 1.0 * SLOWNESS}
        topology.client.charon.settings = {
            key: value for key, value in topology.client.charon.settings.items() if "retransmit" not in key
        }
        topology.client.configure("connections { home { dpd_delay = 30s } }\n", "dpd.conf")
        others = [_behind_a_nat(topology), _behind_a_stateful_filter(topology)]
        topology.start()
        for host in others:
            host.sidecars[0].start(wait=False)
            host.charon.start()
            host.sidecars[0].wait_ready()
        yield topology


def _behind_a_nat(topology: Topology) -> Host:
    """A second client, behind a router that translates and lets in only what was sent to before."""
    router, inner = _behind_a_router(topology, "nat", "192.168.50.31", "10.99.0")
    router.run("iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
    return inner


def _behind_a_stateful_filter(topology: Topology) -> Host:
    """A third one, behind a router that lets in only what was sent to before, and leaves addresses as they are."""
    router, inner = _behind_a_router(topology, "filter", "192.168.50.32", "10.97.0")
    for gateway in (topology.gw1, topology.gw2):
        gateway.run("ip", "route", "add", "10.97.0.0/24", "via", "192.168.50.32")
    known = ("-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED")
    for rule in (("-i", "eth1"), ("-i", "eth0", *known)):
        router.run("iptables", "-A", "FORWARD", *rule, "-j", "ACCEPT")
    router.run("iptables", "-A", "FORWARD", "-j", "DROP")
    return inner


def _behind_a_router(topology: Topology, name: str, outside: str, network: str) -> tuple[Host, Host]:
    lab = topology.lab
    router = lab.add_host(name, f"{outside}/24", forward=True)
    lab.add_network(f"in-{name}")
    lab.attach(router, f"{network}.1/24", network=f"in-{name}")
    inner = client_host(lab, f"of-{name}", f"{network}.10", topology.secret, network=f"in-{name}")
    inner.run("ip", "route", "add", "default", "via", f"{network}.1")
    inner.configure("connections { home { dpd_delay = 30s } }\n", "dpd.conf")
    inner.sidecar("client", client_config(CHOICES))
    return router, inner


@pytest.fixture(params=["of-nat", "of-filter"])
def inner(announced: Topology, request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The lab seen from a client behind a NAT, or a stateful filter."""
    host = announced.lab.hosts[request.param]
    view = dataclasses.replace(announced, client=host, agent=host.sidecars[0])
    begin(view)
    yield view
    for sa in host.charon.sas():
        host.swanctl("--terminate", "--ike-id", sa["uniqueid"], "--force", "--timeout", "1", check=False)


@pytest.fixture(autouse=True)
def _fresh(announced: Topology) -> None:
    begin(announced)


def begin(topology: Topology) -> None:
    """No SA anywhere, an empty bank, and both gateways with a heartbeat in it."""
    fresh(topology)
    for gateway in (topology.gw1, topology.gw2):
        key = f"ike:gateway:{gateway.address}"
        wait_until(lambda key=key: topology.bank.cli("EXISTS", key) == "1", "the heartbeat")  # type: ignore[misc]


def announcements(topology: Topology) -> int:
    """How often gw2 has begun to announce a failure."""
    return topology.gateways["gw2"].text().count("event=announcing ")


def failovers(topology: Topology, gateway: str) -> list[dict[str, Any]]:
    return [one for one in status(topology, gateway)["failovers"] if one["gateway"] == topology.gw1.address]


def moved_to(topology: Topology, gateway: str) -> bool:
    return [sa["remote-host"] for sa in established(topology.client)] == [gateway]


def test_the_client_of_a_killed_gateway_gets_an_announcement_and_goes_on_with_its_traffic(announced: Topology) -> None:
    connect(announced)
    ping = Ping(announced.client, SITE)
    wait_until(lambda: ping.answers() >= 10, "traffic")
    announced.kill_gateway(announced.gw1)
    began = time.monotonic()
    wait_until(lambda: moved_to(announced, announced.gw2.address), "the session at the other gateway")
    print(f"moved after {time.monotonic() - began:.2f} s")
    at = ping.answers()
    wait_until(lambda: ping.answers() >= at + 10, "traffic at the other gateway")
    ping.stop()
    wait_until(lambda: last_move(announced).get("result") == "resumed", "the outcome")
    wait_until(lambda: failovers(announced, "gw2")[0]["resumed"] == 1, "the count")
    assert failovers(announced, "gw2")[0]["sessions"] == 1


def test_a_session_whose_ike_sa_the_gateway_rekeyed_is_announced(announced: Topology) -> None:
    connect(announced)
    first = the_sa(announced.gw1)["responder-spi"]
    announced.gw1.swanctl("--rekey", "--ike", "gw")
    wait_until(
        lambda: [sa["responder-spi"] for sa in established(announced.gw1)] not in ([], [first]), "the rekeyed IKE_SA"
    )
    key = stub_key(announced.gw1.address, the_sa(announced.gw1)["initiator-spi"])
    wait_until(lambda: announced.bank.stubs() == [key], "its stub")
    announced.kill_gateway(announced.gw1)
    wait_until(lambda: moved_to(announced, announced.gw2.address), "the session at the other gateway")
    wait_until(lambda: last_move(announced).get("result") == "resumed", "the outcome")
    wait_until(lambda: failovers(announced, "gw2")[0]["resumed"] == 1, "the count")


def test_a_charon_that_dies_alone_is_known_immediately(announced: Topology) -> None:
    connect(announced)
    announced.gw1.charon.crash()
    wait_until(lambda: moved_to(announced, announced.gw2.address), "the session at the other gateway")
    wait_until(lambda: last_move(announced).get("result") == "resumed", "the outcome")
    assert "charon-ended" in announced.gateways["gw1"].text()


def test_a_gateway_that_is_cut_off_from_the_bank_alone_keeps_its_sessions(announced: Topology) -> None:
    before = connect(announced)
    # a charon that has just started is compared with the bank first
    wait_until(lambda: len(status(announced, "gw1")["sas"]) == 1, "the session in the sidecar")
    bank = announced.bank.host.address
    for direction in ("INPUT", "OUTPUT"):
        flag = "-s" if direction == "INPUT" else "-d"
        announced.gw1.run("iptables", "-I", direction, flag, bank, "-j", "DROP")
    try:
        wait_until(lambda: [one["state"] for one in failovers(announced, "gw2")] == ["stopped"], "the contradiction")
        assert "lives" in failovers(announced, "gw2")[-1]["reason"]
        assert the_sa(announced.client)["initiator-spi"] == before["initiator-spi"]
        told = json.loads(announced.gateways["gw2"].command("status", "--json").stdout)["counters"]
        assert told["announcements_false_alarms_total"] == 1, announced.gateways["gw2"].text()
    finally:
        for direction in ("INPUT", "OUTPUT"):
            flag = "-s" if direction == "INPUT" else "-d"
            announced.gw1.run("iptables", "-D", direction, flag, bank, "-j", "DROP")


def test_a_bank_that_stands_still_moves_no_session(announced: Topology) -> None:
    before = connect(announced)
    known = announcements(announced)
    os.kill(announced.bank.pid, signal.SIGSTOP)
    time.sleep(4 * SLOWNESS)  # longer than every heartbeat lives
    os.kill(announced.bank.pid, signal.SIGCONT)
    wait_until(lambda: status(announced, "gw2")["bank"]["reachable"], "the bank")
    settled = time.monotonic() + 4 * SLOWNESS
    wait_until(lambda: time.monotonic() > settled, "what would follow")
    assert the_sa(announced.client)["initiator-spi"] == before["initiator-spi"]
    assert announcements(announced) == known


SIX = {"fd00:50::1": "home", "fd00:50::2": "home-gw2"}


@pytest.fixture
def six(announced: Topology) -> Iterator[Topology]:
    """The client reaches its gateways over IPv6, while their `address` is an IPv4 one."""
    addresses = {f"connections.{name}.remote_addrs": address for address, name in SIX.items()}
    announced.client.configure(render(addresses) + "\n", "six.conf")
    before = announced.agent.config["gateways"]
    announced.agent.stop()
    announced.agent.config["gateways"] = client_config(SIX)["gateways"]
    announced.agent.start()
    announced.client.charon.load()
    yield announced
    (announced.client.etc / "swanctl/conf.d/six.conf").unlink()
    announced.agent.stop()
    announced.agent.config["gateways"] = before
    announced.agent.start()
    announced.client.charon.load()


def test_a_session_of_the_other_address_family_is_announced_too(six: Topology) -> None:
    assert connect(six)["remote-host"] == "fd00:50::1"
    facts = f"ike:facts:{six.gw1.address}"
    wait_until(lambda: "fd00:50::1" in six.bank.cli("GET", facts), "its other address in what gw1 posts")
    six.kill_gateway(six.gw1)
    wait_until(lambda: moved_to(six, "fd00:50::2"), "the session at the other gateway")
    wait_until(lambda: last_move(six).get("result") == "resumed", "the outcome")
    wait_until(lambda: failovers(six, "gw2")[0]["resumed"] == 1, "the count")


def test_a_drain_moves_a_session_of_the_other_address_family(six: Topology) -> None:
    connect(six)
    wait_until(lambda: len(status(six, "gw1")["sas"]) == 1, "the session in the sidecar")
    facts = f"ike:facts:{six.gw2.address}"
    wait_until(lambda: "fd00:50::2" in six.bank.cli("GET", facts), "the other address of gw2 in what it posts")
    told = six.gateways["gw1"].command("drain", "--to", "any", "--json")
    assert json.loads(told.stdout)["moved"] == 1
    wait_until(lambda: moved_to(six, "fd00:50::2"), "the session at the other gateway")


def test_a_sidecar_that_is_restarted_in_order_is_no_failure(announced: Topology) -> None:
    before = connect(announced)
    known = announcements(announced)
    announced.gateways["gw1"].stop()
    settled = time.monotonic() + 4 * SLOWNESS
    wait_until(lambda: time.monotonic() > settled, "what would follow")
    announced.gateways["gw1"].start()
    assert the_sa(announced.client)["initiator-spi"] == before["initiator-spi"]
    assert announcements(announced) == known


def findings(topology: Topology) -> int:
    """How often the client has found its gateway's charon alive, and not its sidecar."""
    return topology.agent.text().count("gateway-lives-without-sidecar")


def test_a_sidecar_that_is_killed_alone_loses_no_session_and_comes_back(announced: Topology) -> None:
    before = connect(announced)
    found = findings(announced)
    ping = Ping(announced.client, SITE)
    sidecar = announced.gateways["gw1"]
    sidecar.kill()
    wait_until(lambda: findings(announced) > found, "the client's finding")
    wait_until(lambda: "its charon answers and its sidecar does not" in announced.gateways["gw2"].text(), "the report")
    assert the_sa(announced.client)["initiator-spi"] == before["initiator-spi"]
    # as systemd does
    sidecar.start()
    wait_until(lambda: [one["state"] for one in failovers(announced, "gw2")] == ["stopped"], "its return")
    wait_until(lambda: len(status(announced, "gw1")["sas"]) == 1, "the session in the sidecar")
    assert the_sa(announced.client)["initiator-spi"] == before["initiator-spi"]
    assert ping.stop().lost == 0
    # and it fails over as before
    announced.kill_gateway(announced.gw1)
    wait_until(lambda: moved_to(announced, announced.gw2.address), "the session at the other gateway")


def test_a_sidecar_that_stands_still_loses_no_session(announced: Topology) -> None:
    before = connect(announced)
    found = findings(announced)
    pid = announced.gateways["gw1"].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: findings(announced) > found, "the client's finding")
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: [one["state"] for one in failovers(announced, "gw2")] == ["stopped"], "its return")
    assert the_sa(announced.client)["initiator-spi"] == before["initiator-spi"]


@pytest.mark.parametrize("sidecar", ["alive", "killed"])
def test_the_session_at_a_charon_that_hangs_moves(announced: Topology, sidecar: str) -> None:
    connect(announced)
    said = len(announced.agent.text())
    if sidecar == "killed":
        announced.gateways["gw1"].kill()
    pid = announced.gw1.charon.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: moved_to(announced, announced.gw2.address), "the session at the other gateway")
        wait_until(lambda: last_move(announced).get("result") == "resumed", "the outcome")
        # its sidecar does not say that the session is lost: a charon that goes on may have it
        since = announced.agent.text()[said:]
        assert "gateway-not-answering" in since
        assert "sa-lost" not in since
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_charon_that_is_restarted_at_once_has_lost_its_sessions_and_says_so(announced: Topology) -> None:
    connect(announced)
    announced.gw1.charon.crash()
    announced.gw1.charon.start()
    wait_until(lambda: moved_to(announced, announced.gw2.address), "the session at the other gateway")
    wait_until(lambda: last_move(announced).get("result") == "resumed", "the outcome")


def test_an_announcement_reaches_a_client_behind_a_nat_or_a_stateful_filter(inner: Topology) -> None:
    connect(inner)
    # the first keepalive follows the session within a second
    settled = time.monotonic() + 2 * SLOWNESS
    wait_until(lambda: time.monotonic() > settled, "the keepalive")
    inner.kill_gateway(inner.gw1)
    wait_until(lambda: moved_to(inner, inner.gw2.address), "the session at the other gateway")
    wait_until(lambda: last_move(inner).get("result") == "resumed", "the outcome")
    [told] = failovers(inner, "gw2")
    assert (told["announced"], told["silent"]) == (1, 0)
