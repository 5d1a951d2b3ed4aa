"""One owner for each session: both gateways alive, planned maintenance, a charon that hangs (a real one of each)."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology
from bridge.lab.daemon import wait_until
from bridge.lab.esp import Esp
from bridge.lab.host import Host
from bridge.lab.topology import SITE, client_host
from failover_support import counter, established, spis
from takeover_support import (
    SHARED,
    answered,
    connect,
    forget_neighbours,
    give,
    give_up,
    shared_topology,
    sharing,
    start,
    take,
    take_away,
)

pytestmark = pytest.mark.lab


@pytest.fixture
def topology(each_release: str | None) -> Iterator[Topology]:
    with sharing(each_release) as topology:
        yield topology


def test_planned_maintenance_loses_no_session(topology: Topology) -> None:
    """`yield` at one gateway, `takeover` at the other one, and back; the client notices nothing."""
    before = connect(topology)
    for old, new in ((topology.gw1, topology.gw2), (topology.gw2, topology.gw1)):
        given_up = give_up(topology, old)
        assert (given_up["state"], given_up["sessions"], given_up["stored"]) == ("away", 1, True)
        assert old.charon.sas() == []
        take_away(old)
        outcome = take(topology, new)
        assert (outcome["found"], outcome["taken"]) == (1, 1)
        assert answered(topology, topology.client)
        [after] = established(topology.client)
        assert spis(after) == spis(before)
    assert "received DELETE for IKE_SA" not in topology.client.charon.text()


def test_a_gateway_that_lost_its_sessions_without_a_word_drops_them(topology: Topology) -> None:
    """Both gateways have the address, as in a split brain, and the second one takes the sessions over."""
    old, new = topology.gw1, topology.gw2
    before = connect(topology)
    outcome = take(topology, new)
    # the neighbours may have learned either
    take_away(old)
    forget_neighbours(topology.client)
    assert (outcome["found"], outcome["taken"]) == (1, 1)
    wait_until(lambda: not old.charon.sas(), "the end of the session at the gateway that lost it")
    assert answered(topology, topology.client)
    [after] = established(topology.client)
    assert spis(after) == spis(before)
    assert counter(topology, "gw1", "sessions_lost_to_takeover_total") == 1


def test_nothing_of_the_address_leaves_a_gateway_whose_charon_hangs(topology: Topology) -> None:
    old, new = topology.gw1, topology.gw2
    before = connect(topology)
    os.kill(old.charon.pid, signal.SIGSTOP)
    try:
        give_up(topology, old)
        take_away(old)
        assert take(topology, new)["taken"] == 1
        assert answered(topology, topology.client)
    finally:
        os.kill(old.charon.pid, signal.SIGCONT)
    wait_until(lambda: not old.charon.sas(), "charon to drop the session")
    # an answer of this host's under the address, as a charon would send it that does not know better
    give(old)
    blocked = old.run(sys.executable, "-c", SEND, SHARED, topology.client.address, check=False)
    take_away(old)
    assert "Operation not permitted" in blocked.stderr
    forget_neighbours(topology.client)
    assert answered(topology, topology.client)
    [after] = established(topology.client)
    assert spis(after) == spis(before)


def test_no_esp_of_the_address_leaves_a_gateway_whose_charon_hangs(topology: Topology) -> None:
    """Where the kernel does ESP, it encrypts under the old keys for as long as charon does not remove them."""
    old, new, client = topology.gw1, topology.gw2, topology.client
    connect(topology)
    [sa] = established(client)
    [child] = sa["child-sas"].values()
    [address] = sa["local-vips"]
    count_esp(client, child["spi-in"])
    assert old.run("ping", "-n", "-c", "3", "-i", "0.1", "-I", SITE, address).returncode == 0
    before = esp_counted(client)
    assert before >= 3
    os.kill(old.charon.pid, signal.SIGSTOP)
    try:
        give_up(topology, old)
        old.run("ping", "-n", "-c", "3", "-i", "0.1", "-W", "1", "-I", SITE, address, check=False)
        assert esp_counted(client) == before
        take_away(old)
        assert take(topology, new)["taken"] == 1
        assert answered(topology, client)
        # its old keys are still in the kernel, and its server sends to the client
        old.run("ping", "-n", "-c", "3", "-i", "0.1", "-W", "1", "-I", SITE, address, check=False)
        assert esp_counted(client) == before
        if topology.lab.esp is Esp.KERNEL:
            wait_until(lambda: counter(topology, "gw1", "fence_dropped_total") >= 3, "what the fence dropped, counted")
    finally:
        os.kill(old.charon.pid, signal.SIGCONT)
    wait_until(lambda: not old.charon.sas(), "charon to drop the session")
    assert answered(topology, client)


def count_esp(host: Host, spi: str) -> None:
    """Count what comes to a host under an SPI, in UDP or not."""
    matches = (f"esp spi 0x{spi}", f"udp sport 4500 @th,64,32 0x{spi}")
    rules = "; ".join(f"{match} counter" for match in matches)
    chain = f"type filter hook prerouting priority raw; {rules};"
    host.run("nft", f"table inet arrived {{ chain counted {{ {chain} }}; }}")


def esp_counted(host: Host) -> int:
    shown = host.run("nft", "list", "table", "inet", "arrived").stdout
    return sum(map(int, re.findall(r"counter packets (\d+)", shown)))


def test_a_takeover_at_the_wrong_gateway_is_refused(topology: Topology) -> None:
    """Its sessions stay where the address is."""
    before = connect(topology)
    refused = topology.gateways["gw2"].command("takeover", "--address", SHARED, check=False)
    assert refused.returncode == 1
    assert "not at this host" in refused.stderr
    assert [spis(sa) for sa in established(topology.gw1)] == [spis(before)]
    assert answered(topology, topology.client)


def test_after_a_split_brain_the_gateway_that_kept_the_address_has_the_sessions(topology: Topology) -> None:
    """Cut off from the bank and from the other one, which takes them over, and lets go when the network is whole."""
    kept, other = topology.gw1, topology.gw2
    before = connect(topology)
    for chain in ("INPUT", "OUTPUT"):
        kept.run("iptables", "-I", chain, "-p", "tcp", "-j", "DROP")
    assert take(topology, other)["found"] == 1
    give_up(topology, other)
    take_away(other)
    for chain in ("INPUT", "OUTPUT"):
        kept.run("iptables", "-D", chain, "-p", "tcp", "-j", "DROP")
    # what it writes is refused: the session has a newer epoch
    forget_neighbours(topology.client, kept)
    wait_until(lambda: "sessions-taken-back" in topology.gateways["gw1"].text(), "the session to be taken back")
    wait_until(lambda: answered(topology, topology.client, 1), "traffic", 30)
    assert [spis(sa) for sa in established(kept)] == [spis(before)]


def test_an_address_of_a_session_that_was_given_up_is_given_to_no_other_client(each_release: str | None) -> None:
    """Also while the bank is away, which knows where the session is."""
    with Lab(release=each_release) as lab:
        topology = shared_topology(lab, ha_pools=True)
        other = client_host(lab, "other", "192.168.50.40", topology.secret)
        start(topology, topology.gw1)
        other.charon.start()
        connect(topology)
        [address] = established(topology.client)[0]["local-vips"]
        topology.bank.stop()
        given_up = give_up(topology, topology.gw1)
        assert (given_up["sessions"], given_up["stored"]) == (1, False)
        other.charon.initiate("net", "home")
        [sa] = established(other)
        assert sa["local-vips"] != [address]


SEND = """
import sys
from bridge.net.raw_socket import RawUdp
RawUdp().send(sys.argv[1], 4500, sys.argv[2], 4500, bytes(32), True)
"""
