"""CHILD_SAs that come back in the same round trip as their IKE_SA, end to end in the standard lab."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.topology import SITE
from failover_support import (
    Outcome,
    agent_with,
    connect,
    established,
    fresh,
    resume,
    resume_now,
    spis,
    status,
    stub_key,
    the_sa,
)
from probe_support import stored_children, the_stub

pytestmark = pytest.mark.lab

CREATED = "generating CREATE_CHILD_SA request"
CONFIRMED = "generating INFORMATIONAL response 1 [ ]"

# Beside `net`, which the shipped configuration has: ESP without AEAD, with several traffic selectors, and with PFS.
MORE = {
    "cbc": ("10.11.0.0/16", "aes256-sha256"),
    "several": ("10.12.0.0/16, 10.13.0.0/16[tcp/80]", "aes128gcm16"),
    "ctr": ("10.14.0.0/16", "aes128ctr-sha512"),
    "pfs": ("10.15.0.0/16", "aes128gcm16-x25519"),
}
AT_SITE = ("10.11.0.1", "10.12.0.1", "10.13.0.1", "10.14.0.1", "10.15.0.1")


def _children(side: str) -> str:
    sections = [f"{name} {{ {side} = {ts}\n esp_proposals = {esp} }}" for name, (ts, esp) in MORE.items()]
    return f"children {{ {' '.join(sections)} }}"


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab with more children. charon logs the keys of CHILD_SAs at level 4: the lab's only."""
    with Lab() as lab:
        topology = standard(lab, start=False)
        for host in (topology.gw1, topology.gw2, topology.client):
            host.charon.settings["charon.filelog.lab.chd"] = 4
        for host in (topology.gw1, topology.gw2):
            host.configure(f"connections {{ gw {{ {_children('local_ts')} }} }}\n", "more.conf")
            for address in AT_SITE:
                host.run("ip", "address", "add", f"{address}/32", "dev", "lo")
        both = " ".join(f"{name} {{ {_children('remote_ts')} }}" for name in ("home", "home-gw2"))
        topology.client.configure(f"connections {{ {both} }}\n", "more.conf")
        for sidecar in topology.gateways.values():
            # on a busy machine even a bank at hand may take its time
            sidecar.config["bank"]["get_timeout"] = 5.0
        topology.start()
        yield topology


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def session(topology: Topology, *more: str) -> dict[str, Any]:
    """A session at gw1 with more CHILD_SAs than `net`, all of them in its stub."""
    before = connect(topology)
    for name in more:
        topology.client.charon.initiate(name, "home")
    key = stub_key(topology.gw1.address, before["responder-spi"])
    wait_until(lambda: stored_children(topology, key) == sorted(["net", *more]), "all CHILD_SAs in the stub")
    return before


def known(topology: Topology, gateway: str) -> list[str]:
    """The CHILD_SAs that a gateway's sidecar knows of its one IKE_SA."""
    sas = status(topology, gateway)["sas"]
    return sorted(sas[0]["children"]) if sas else []


def log_of(host: Host) -> str:
    return host.charon.log.read_text()


def children(host: Host) -> dict[str, dict[str, Any]]:
    """The CHILD_SAs of a host's one IKE_SA, by name."""
    return {child["name"]: child for child in the_sa(host)["child-sas"].values()}


def agree(topology: Topology, gateway: Host) -> None:
    """Client and gateway have the same CHILD_SAs, from either end."""
    here, there = children(topology.client), children(gateway)
    assert here.keys() == there.keys()
    for name, child in here.items():
        other = there[name]
        assert (child["spi-in"], child["spi-out"]) == (other["spi-out"], other["spi-in"])
        assert (child["local-ts"], child["remote-ts"]) == (other["remote-ts"], other["local-ts"])
        same = ("state", "mode", "encr-alg", "encr-keysize", "integ-alg", "esn")
        assert [child.get(key) for key in same] == [other.get(key) for key in same]


def failed_over(topology: Topology) -> tuple[Outcome, str, str]:
    """gw1 killed and the session resumed: the outcome, and what charon logged meanwhile at gw2 and the client."""
    at_gw2, at_client = len(log_of(topology.gw2)), len(log_of(topology.client))
    topology.kill_gateway(topology.gw1)
    outcome = resume(topology)
    assert outcome["result"] == "resumed"
    return outcome, log_of(topology.gw2)[at_gw2:], log_of(topology.client)[at_client:]


def test_the_child_sa_is_up_without_an_exchange_of_its_own(topology: Topology) -> None:
    session(topology)
    outcome, at_gw2, at_client = failed_over(topology)
    assert outcome["children"] == ["net"]
    assert topology.client.ping(SITE) == 3
    assert CREATED not in at_client
    # one protected exchange confirmed it, and charon goes on from there
    assert at_gw2.count(CONFIRMED) == 1
    agree(topology, topology.gw2)
    new = stub_key(topology.gw2.address, outcome["spi_r"])
    wait_until(lambda: topology.bank.stubs() == [new], "the new stub")


def test_child_sas_of_every_kind_come_back_in_one_round_trip(topology: Topology) -> None:
    session(topology, "cbc", "several", "ctr")
    selectors = children(topology.client)["several"]["remote-ts"]
    outcome, _, at_client = failed_over(topology)
    assert sorted(outcome["children"]) == ["cbc", "ctr", "net", "several"]
    assert CREATED not in at_client
    agree(topology, topology.gw2)
    assert children(topology.client)["several"]["remote-ts"] == selectors
    for address in (SITE, "10.11.0.1", "10.12.0.1", "10.14.0.1"):
        assert topology.client.ping(address) == 3, address
    assert known(topology, "gw2") == ["cbc", "ctr", "net", "several"]


KEY = re.compile(r"CHD.* (encryption|integrity) (initiator|responder) key => (\d+) bytes")
OCTETS = re.compile(r"\s*\d+: ((?:[0-9A-F]{2} ?)+)")


def keys(log: str) -> list[str]:
    """The keys of CHILD_SAs in charon's log, in order."""
    found: list[str] = []
    left = 0
    for line in log.splitlines():
        if start := KEY.search(line):
            left = int(start[3])
            found.append("")
        elif left and (octets := OCTETS.search(line.partition("CHD]")[2].partition(">")[2])):
            text = octets[1].replace(" ", "")[: 2 * left]
            found[-1] += text
            left -= len(text) // 2
    assert left == 0
    return found


def test_no_two_child_sas_share_a_key_in_either_charons_eyes(topology: Topology) -> None:
    at_client, at_gw1 = len(log_of(topology.client)), len(log_of(topology.gw1))
    session(topology, "cbc", "several", "ctr")
    before = keys(log_of(topology.client)[at_client:])
    assert sorted(before) == sorted(keys(log_of(topology.gw1)[at_gw1:]))
    _, at_gw2, client = failed_over(topology)
    after = keys(client)
    # encryption for each direction of four, integrity for two of them
    assert len(before) == len(after) == 4 * 2 + 2 * 2
    assert sorted(after) == sorted(keys(at_gw2))
    assert len({*before, *after}) == len(before) + len(after)


def test_a_child_sa_with_pfs_comes_back_by_an_exchange_of_its_own(topology: Topology) -> None:
    session(topology, "pfs")
    outcome, _, at_client = failed_over(topology)
    assert sorted(outcome["children"]) == ["net", "pfs"]
    assert at_client.count(CREATED) == 1
    agree(topology, topology.gw2)
    assert topology.client.ping(SITE) == 3
    assert topology.client.ping("10.15.0.1") == 3


def test_where_the_stub_missed_a_change_its_child_sa_comes_back_by_an_exchange_of_its_own(topology: Topology) -> None:
    session(topology)
    topology.gateways["gw1"].kill()
    topology.client.swanctl("--rekey", "--child", "net")
    # charon keeps the old one for delayed packets
    wait_until(lambda: len(the_sa(topology.client)["child-sas"]) == 1, "the end of the old CHILD_SA", timeout=60)
    outcome, _, at_client = failed_over(topology)
    assert outcome["children"] == ["net"]
    assert at_client.count(CREATED) == 1
    agree(topology, topology.gw2)
    assert topology.client.ping(SITE) == 3


def test_either_side_can_ask_for_exchanges_of_their_own(topology: Topology) -> None:
    for sidecar, section in ((topology.agent, "resume"), (topology.gateways["gw2"], "sync")):
        before = sidecar.config.get(section, {})
        sidecar.stop()
        sidecar.config[section] = before | {"children_at_once": False}
        sidecar.start()
        session(topology)
        outcome, _, at_client = failed_over(topology)
        sidecar.stop()
        sidecar.config[section] = before
        sidecar.start()
        assert outcome["children"] == ["net"]
        assert at_client.count(CREATED) == 1
        assert topology.client.ping(SITE) == 3
        fresh(topology)


def instances(host: Host) -> list[tuple[str, ...]]:
    """Every CHILD_SA of a host's one IKE_SA: name, SPIs, selectors."""
    found = [child for child in the_sa(host)["child-sas"].values() if child["state"] == "INSTALLED"]
    return sorted(
        (child["name"], child["spi-in"], child["spi-out"], *child["local-ts"], *child["remote-ts"]) for child in found
    )


@contextlib.contextmanager
def two_of_one(topology: Topology) -> Iterator[None]:
    """A session with two CHILD_SAs of the one configuration `net`, the second with selectors of its own."""
    session(topology)
    narrow = "connections { home { children { net { remote_ts = 10.10.0.1/32 } } } }"
    topology.client.configure(narrow + "\n", "narrow.conf")
    topology.client.charon.load()
    try:
        topology.client.charon.initiate("net", "home")
        wait_until(lambda: len(the_stub(topology).children) == 2, "both CHILD_SAs in the stub")
        yield
    finally:
        (topology.client.etc / "swanctl/conf.d/narrow.conf").unlink()
        topology.client.charon.load()


def test_several_child_sas_of_one_configuration_come_back_each_with_its_selectors(topology: Topology) -> None:
    with two_of_one(topology):
        before = instances(topology.client)
        assert [one[0] for one in before] == ["net", "net"]
        assert len({one[3:] for one in before}) == 2
        outcome, _, at_client = failed_over(topology)
        assert outcome["children"] == ["net"]
        assert CREATED not in at_client
        after, there = instances(topology.client), instances(topology.gw2)
        assert {one[3:] for one in after} == {one[3:] for one in before}
        assert len({one[1] for one in (*before, *after)}) == 4
        assert {one[1:5] for one in after} == {(out, own, *reversed(ts)) for _, own, out, *ts in there}
        assert topology.client.ping(SITE) == 3


def test_by_exchanges_of_their_own_one_child_sa_of_each_configuration_comes_back(topology: Topology) -> None:
    with agent_with(topology, resume={"children_at_once": False}), two_of_one(topology):
        outcome, _, at_client = failed_over(topology)
        assert outcome["children"] == ["net"]
        assert at_client.count(CREATED) == 1
        assert len(instances(topology.client)) == 1
        assert topology.client.ping(SITE) == 3


@pytest.mark.parametrize("side", ["client", "gw2"])
def test_a_child_sa_that_came_back_is_rekeyed_from_either_side_and_resumed_again(topology: Topology, side: str) -> None:
    session(topology)
    failed_over(topology)
    old = children(topology.client)["net"]["spi-in"]
    topology.lab.hosts[side].swanctl("--rekey", "--child", "net")
    wait_until(lambda: children(topology.client)["net"]["spi-in"] != old, "the new CHILD_SA")
    # charon keeps the old one for delayed packets
    wait_until(lambda: known(topology, "gw2") == ["net"], "the end of the old CHILD_SA", timeout=60)
    wait_until(lambda: len(the_sa(topology.client)["child-sas"]) == 1, "its end at the client", timeout=60)
    fresh_gateway(topology, "gw1")
    at_client = len(log_of(topology.client))
    topology.kill_gateway(topology.gw2)
    outcome = resume(topology)
    assert (outcome["result"], outcome["gateway"]) == ("resumed", topology.gw1.address)
    assert CREATED not in log_of(topology.client)[at_client:]
    agree(topology, topology.gw1)
    assert topology.client.ping(SITE) == 3


def fresh_gateway(topology: Topology, name: str) -> None:
    """A gateway that was killed runs again."""
    topology.gateways[name].start(wait=False)
    topology.lab.hosts[name].charon.start()
    topology.gateways[name].wait_ready()


def test_a_child_sa_that_came_back_and_is_closed_leaves_the_stub(topology: Topology) -> None:
    session(topology, "cbc")
    failed_over(topology)
    assert known(topology, "gw2") == ["cbc", "net"]
    topology.client.swanctl("--terminate", "--child", "cbc")
    wait_until(lambda: known(topology, "gw2") == ["net"], "the end of the CHILD_SA")
    assert topology.client.ping(SITE) == 3


def test_at_the_same_gateway_the_new_sas_take_the_place_of_the_old_ones(topology: Topology) -> None:
    """Its CHILD_SAs come up by exchanges of their own, as a replay of the request could not make them."""
    before = session(topology, "cbc")
    at_gw1 = len(log_of(topology.gw1))
    outcome = resume(topology, "--to", topology.gw1.address)
    assert outcome["result"] == "resumed"
    assert sorted(outcome["children"]) == ["cbc", "net"]
    wait_until(lambda: len(topology.gw1.charon.sas()) == 1, "the end of the old SA")
    after = the_sa(topology.gw1)
    assert spis(after) == (outcome["spi_i"], outcome["spi_r"]) != spis(before)
    assert after["remote-vips"] == before["local-vips"]
    assert the_sa(topology.client)["local-vips"] == before["local-vips"]
    agree(topology, topology.gw1)
    for address in (SITE, "10.11.0.1"):
        assert topology.client.ping(address) == 3, address
    assert "unable to install" not in log_of(topology.gw1)[at_gw1:]


def test_back_at_a_gateway_that_still_has_an_older_sa_of_the_session_its_child_sas_work(topology: Topology) -> None:
    session(topology, "cbc")
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
    # gw1 was not told, and has the first SA until its DPD finds nobody
    outcome = resume(topology, "--to", topology.gw1.address)
    assert outcome["result"] == "resumed"
    for address in (SITE, "10.11.0.1"):
        assert topology.client.ping(address) == 3, address


def test_of_two_gateways_that_rebuilt_the_session_one_is_used_and_the_other_lets_go(topology: Topology) -> None:
    """gw2 does rebuild it, but nothing of what it says arrives in time."""
    session(topology)
    topology.agent.stop()
    topology.agent.config["resume"] = {"answer_timeout": 1.0}
    topology.agent.start()
    wait_until(lambda: established(topology.client) != [], "the session, known")
    silence = ("OUTPUT", "-d", topology.client.address, "-j", "DROP")
    topology.gw2.run("iptables", "-I", *silence)
    try:
        outcome = resume(topology)
        assert (outcome["result"], outcome["gateway"]) == ("resumed", topology.gw1.address)
        assert topology.client.ping(SITE) == 3
        new = stub_key(topology.gw1.address, outcome["spi_r"])
        wait_until(lambda: status(topology, "gw2")["unconfirmed"] == 0, "the end of what gw2 rebuilt", timeout=60)
        wait_until(lambda: topology.gw2.charon.sas() == [], "its end in charon")
        wait_until(lambda: topology.bank.stubs() == [new], "the stub of the session alone")
    finally:
        topology.gw2.run("iptables", "-D", *silence)
        topology.agent.stop()
        del topology.agent.config["resume"]
        topology.agent.start()
    assert topology.client.ping(SITE) == 3
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"


def test_a_gateway_that_was_frozen_finds_no_stub_of_a_session_that_went_on_elsewhere(topology: Topology) -> None:
    session(topology)
    topology.agent.stop()
    topology.agent.config["resume"] = {"answer_timeout": 1.0}
    topology.agent.start()
    wait_until(lambda: established(topology.client) != [], "the session, known")
    os.kill(topology.gateways["gw2"].pid, signal.SIGSTOP)
    try:
        outcome = resume_now(topology)
        assert (outcome["result"], outcome["gateway"]) == ("resumed", topology.gw1.address)
    finally:
        os.kill(topology.gateways["gw2"].pid, signal.SIGCONT)
        topology.agent.stop()
        del topology.agent.config["resume"]
        topology.agent.start()
    new = stub_key(topology.gw1.address, outcome["spi_r"])
    wait_until(lambda: topology.bank.stubs() == [new], "the stub of the session alone")
    wait_until(lambda: established(topology.gw2) == [], "no SA at gw2")
    assert topology.client.ping(SITE) == 3


def test_a_session_whose_confirmation_is_lost_is_not_called_resumed(topology: Topology) -> None:
    """What gw2 sends in INFORMATIONAL exchanges is lost."""
    session(topology)
    topology.agent.stop()
    topology.agent.config["resume"] = {"answer_timeout": 2.0}
    topology.agent.start()
    wait_until(lambda: established(topology.client) != [], "the session, known")
    # behind IP and UDP header and non-ESP marker, the exchange type is in octet 18
    lost = ("OUTPUT", "-p", "udp", "--sport", "4500", "-m", "u32", "--u32", "0>>22&0x3C@28>>8&0xFF=37", "-j", "DROP")
    topology.gw2.run("iptables", "-I", *lost)
    try:
        topology.kill_gateway(topology.gw1)
        outcome = resume(topology)
    finally:
        topology.gw2.run("iptables", "-D", *lost)
        topology.agent.stop()
        del topology.agent.config["resume"]
        topology.agent.start()
    assert (outcome["result"], outcome["reason"]) == ("fallback", "sa-unusable")
    wait_until(lambda: topology.client.ping(SITE) == 3, "traffic")
