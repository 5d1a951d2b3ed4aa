"""What becomes of a session whose resumption was answered and then cannot go on: it ended meanwhile, or charon does not
take its CHILD_SAs. End to end in the standard lab."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.sidecar import program
from bridge.lab.topology import SITE
from failover_support import (
    agent_with,
    connect,
    established,
    fresh,
    last_move,
    resume,
    spis,
    status,
    stub_key,
    the_sa,
)

pytestmark = pytest.mark.lab


ODD = "children { odd { %s = 10.11.0.0/16\n esp_proposals = aes128-aesxcbc\n %s } }"
# no interface of the lab does ESP in hardware, so the kernel refuses these SAs; kernel-libipsec ignores the setting
IN_HARDWARE = "hw_offload = yes"


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab with a second child that gw2 cannot install; clients move when they are told to only."""
    with Lab() as lab:
        built = standard(lab, start=False)
        built.agent.config["resume_on_down"] = False
        for host, more in ((built.gw1, ""), (built.gw2, IN_HARDWARE)):
            host.configure(f"connections {{ gw {{ {ODD % ('local_ts', more)} }} }}\n", "odd.conf")
            host.run("ip", "address", "add", "10.11.0.1/32", "dev", "lo")
        both = " ".join(f"{name} {{ {ODD % ('remote_ts', '')} }}" for name in ("home", "home-gw2"))
        built.client.configure(f"connections {{ {both} }}\n", "odd.conf")
        # of ESP in userspace, gw2 lacks the algorithm
        for plugin in ("xcbc", "aesni"):
            built.gw2.charon.settings[f"charon.plugins.{plugin}.load"] = "no"
        built.start()
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def test_a_session_that_ended_before_its_confirmation_arrives_is_not_resumed(topology: Topology) -> None:
    """The request was answered; then an operator ends the session at its old gateway; then the client confirms."""
    connect(topology)
    # behind IP and UDP header and non-ESP marker, the exchange type is in octet 18
    late = ("INPUT", "-p", "udp", "--dport", "4500", "-m", "u32", "--u32", "0>>22&0x3C@28>>8&0xFF=37", "-j", "DROP")
    with agent_with(topology, resume={"answer_timeout": 30.0}):
        wait_until(lambda: established(topology.client) != [], "the session, known")
        topology.gw2.run("iptables", "-I", *late)
        words = ("resume", "--json", "--to", topology.gw2.address, "-c", topology.agent.file)
        moving = topology.client.popen(*program(), *words, stdout=subprocess.PIPE)
        try:
            wait_until(lambda: status(topology, "gw2")["unconfirmed"] == 1, "the rebuilt SA")
            topology.gw1.swanctl("--terminate", "--ike", "gw", "--force", "--timeout", "1", check=False)
            wait_until(lambda: topology.bank.stubs() == [], "the end of the stub")
        finally:
            topology.gw2.run("iptables", "-D", *late)
        wait_until(lambda: "sa-ended-before-confirmed" in topology.gateways["gw2"].text(), "what gw2 says of it")
        moving.communicate(timeout=60)
        wait_until(lambda: not topology.gw2.charon.sas() and not established(topology.client), "the end at both ends")
    assert topology.bank.stubs() == []


def renamed(topology: Topology, host: Host, old: str, new: str) -> None:
    """Rename a child of a gateway's connection, and have charon load it: the sidecar learns of it later."""
    file = host.etc / "swanctl/swanctl.conf"
    file.write_text(file.read_text().replace(f"        {old} {{", f"        {new} {{"))
    host.swanctl("--load-conns")


def test_a_child_that_was_renamed_a_moment_ago_is_asked_of_charon_and_works(topology: Topology) -> None:
    """The gateway's connections were loaded again since the sidecar asked for them last."""
    connect(topology)
    topology.kill_gateway(topology.gw1)
    renamed(topology, topology.gw2, "net", "renamed")
    try:
        assert resume(topology)["result"] == "resumed"
        assert topology.client.ping(SITE) == 3
    finally:
        renamed(topology, topology.gw2, "renamed", "net")


def test_a_client_of_a_child_sa_that_charon_does_not_take_returns_by_a_handshake(topology: Topology) -> None:
    """gw2 cannot install it; nothing tells so but VICI's list."""
    connect(topology)
    topology.client.charon.initiate("odd", "home")
    wait_until(lambda: len(status(topology, "gw1")["sas"][0]["children"]) == 2, "both CHILD_SAs in the stub")
    topology.kill_gateway(topology.gw1)
    outcome = resume(topology)
    # the client cannot know yet
    assert (outcome["result"], sorted(outcome["children"])) == ("resumed", ["net", "odd"])
    wait_until(lambda: "child-not-accepted" in topology.gateways["gw2"].text(), "the gateway's word of it", 60.0)
    assert "children=odd" in topology.gateways["gw2"].text()
    resumed = (outcome["spi_i"], outcome["spi_r"])
    # gw1 is tried first, as the one that did not end it
    wait_until(lambda: last_move(topology)["result"] == "fallback", "a handshake", 60.0)
    assert last_move(topology)["reason"] == "deleted-by-gateway"
    assert spis(the_sa(topology.client)) == spis(the_sa(topology.gw2)) != resumed
    # the CHILD_SA that both can have
    assert topology.client.ping(SITE) == 3
    wait_until(lambda: topology.bank.stubs() == [stub_key(topology.gw2.address, spis(the_sa(topology.gw2))[1])], "stub")
