"""What only a kernel's ESP can show of CHILD_SAs that came back: transport mode, ESN, ESP without UDP around it
(`make test-vm`)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.esp import Esp
from bridge.lab.host import Host
from bridge.lab.topology import SITE
from failover_support import Outcome, agent_with, fresh, resume, spis, status, the_sa

pytestmark = [pytest.mark.vm, pytest.mark.lab]

CREATED = "generating CREATE_CHILD_SA request"
EXTENDED_SITE = "10.11.0.1"

# Without MOBIKE charon stays on port 500 where there is no NAT.
GATEWAY = """\
connections {
    gw {
        children {
            extended { local_ts = 10.11.0.0/16
            esp_proposals = aes128gcm16-esn }
        }
    }
    host {
        version = 2
        local { auth = psk
        id = vpn.example.org }
        remote { auth = psk
        id = host@example.org }
        children {
            host { mode = transport
            esp_proposals = aes128gcm16-esn }
        }
    }
}
"""
CLIENT = """\
connections {
    home {
        mobike = no
        children {
            extended { remote_ts = 10.11.0.0/16
            esp_proposals = aes128gcm16-esn }
        }
    }
    host {
        version = 2
        mobike = no
        remote_addrs = 192.168.50.1
        local { auth = psk
        id = host@example.org }
        remote { auth = psk
        id = vpn.example.org }
        children {
            host { mode = transport
            esp_proposals = aes128gcm16-esn }
        }
    }
    host-gw2 : connections.host { remote_addrs = 192.168.50.2 }
}
"""
HOSTS = [
    {"address": "192.168.50.1", "connection": "host"},
    {"address": "192.168.50.2", "connection": "host-gw2"},
]

at_once_or_not = pytest.mark.parametrize("at_once", [True, False], ids=["same-round-trip", "create-child-sa"])


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab with a CHILD_SA that has ESN, and a connection without virtual IP for transport mode."""
    with Lab() as lab:
        topology = standard(lab, start=False)
        for host in (topology.gw1, topology.gw2):
            host.configure(GATEWAY, "kernel.conf")
            host.run("ip", "address", "add", f"{EXTENDED_SITE}/32", "dev", "lo")
        topology.client.configure(CLIENT, "kernel.conf")
        topology.agent.config["resume_on_down"] = False
        for sidecar in topology.gateways.values():
            # an emulated processor may take its time
            sidecar.config["bank"]["get_timeout"] = 5.0
        topology.start()
        yield topology


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    assert topology.lab.esp is Esp.KERNEL
    fresh(topology)


class State(NamedTuple):
    """One ESP SA of the kernel's."""

    mode: str
    esn: bool
    in_udp: bool
    key: str


STATE = re.compile(r"src \S+ dst \S+\n\tproto esp spi (0x[0-9a-f]+) .*mode (\S+)\n")
KEY = re.compile(r"\taead \S+ (0x[0-9a-f]+) ")


def states(host: Host) -> dict[str, State]:
    """The ESP SAs that a host's kernel has, by SPI as charon writes it."""
    found = {}
    for text in re.split(r"\n(?=src )", host.run("ip", "xfrm", "state").stdout):
        if (head := STATE.match(text)) and (key := KEY.search(text)):
            flags = re.findall(r"flag (.*)", text)
            found[f"{int(head[1], 16):08x}"] = State(head[2], "esn" in " ".join(flags).split(), "encap" in text, key[1])
    return found


def children(host: Host) -> dict[str, dict[str, Any]]:
    """The CHILD_SAs of a host's one IKE_SA, by name."""
    return {child["name"]: child for child in the_sa(host)["child-sas"].values()}


def states_of(host: Host, name: str) -> list[State]:
    """Both ESP SAs of a CHILD_SA, as the host's kernel has them."""
    child, every = children(host)[name], states(host)
    return [every[child["spi-in"]], every[child["spi-out"]]]


def session(topology: Topology, connection: str, *names: str) -> None:
    """A session at gw1 with these CHILD_SAs, all of them in its stub."""
    for name in names:
        topology.client.charon.initiate(name, connection)
    wait_until(lambda: known(topology, "gw1") == sorted(names), "all CHILD_SAs in the stub")


def known(topology: Topology, gateway: str) -> list[str]:
    """The CHILD_SAs that a gateway's sidecar knows of its one IKE_SA."""
    sas = status(topology, gateway)["sas"]
    return sorted(sas[0]["children"]) if sas else []


def resumed(topology: Topology, *arguments: str) -> tuple[Outcome, int]:
    """The session resumed: the outcome, and how many CREATE_CHILD_SA exchanges it took. The client's kernel has new ESP
    SAs in place of all old ones, and gateway and client have the same."""
    before, logged = states(topology.client), len(log_of(topology.client))
    assert before
    outcome = resume(topology, *arguments)
    assert outcome["result"] == "resumed", outcome
    after = states(topology.client)
    assert len(after) == len(before) == 2 * len(outcome["children"])
    assert not after.keys() & before.keys()
    keys = [state.key for state in (*before.values(), *after.values())]
    assert len(set(keys)) == len(keys)
    assert states(topology.gw2) == after
    return outcome, log_of(topology.client)[logged:].count(CREATED)


def log_of(host: Host) -> str:
    return host.charon.log.read_text()


def carries(topology: Topology, name: str, target: str) -> None:
    """Echo requests to `target` are answered, each way through this CHILD_SA."""
    before = packets(topology, name)
    assert topology.client.ping(target) == 3
    assert [now - then for now, then in zip(packets(topology, name), before, strict=True)] == [3, 3]


def packets(topology: Topology, name: str) -> list[int]:
    """How many packets a CHILD_SA has brought to the client, and taken from it."""
    child = children(topology.client)[name]
    return [int(child["packets-in"]), int(child["packets-out"])]


@at_once_or_not
def test_esn_and_plain_esp_come_back_as_they_were(topology: Topology, at_once: bool) -> None:
    with agent_with(topology, resume={"children_at_once": at_once}):
        session(topology, "home", "net", "extended")
        carries(topology, "net", SITE)
        carries(topology, "extended", EXTENDED_SITE)
        old = spis(the_sa(topology.client))
        topology.kill_gateway(topology.gw1)
        outcome, created = resumed(topology)
    assert sorted(outcome["children"]) == ["extended", "net"]
    assert created == (0 if at_once else 2)
    sa = the_sa(topology.client)
    assert spis(sa) == (outcome["spi_i"], outcome["spi_r"]) != old
    # no NAT: neither IKE nor ESP changes its port
    assert (sa["local-port"], sa["remote-port"]) == ("500", "500")
    for name, esn in (("net", False), ("extended", True)):
        for state in states_of(topology.client, name):
            assert (state.mode, state.esn, state.in_udp) == ("tunnel", esn, False), name
    carries(topology, "net", SITE)
    carries(topology, "extended", EXTENDED_SITE)


@contextlib.contextmanager
def host_to_host(topology: Topology, at_once: bool) -> Iterator[None]:
    """A session at gw1 in transport mode, between the hosts' own addresses."""
    with agent_with(topology, gateways=HOSTS, resume={"children_at_once": at_once}):
        session(topology, "host", "host")
        assert {state.mode for state in states(topology.client).values()} == {"transport"}
        carries(topology, "host", topology.gw1.address)
        yield


def is_transport(topology: Topology) -> None:
    sa = the_sa(topology.client)
    assert (sa["local-port"], sa["remote-port"]) == ("500", "500")
    for state in states_of(topology.client, "host"):
        assert (state.mode, state.esn, state.in_udp) == ("transport", True, False)


def test_transport_mode_to_another_address_comes_back_by_an_exchange_of_its_own(topology: Topology) -> None:
    with host_to_host(topology, at_once=True):
        topology.kill_gateway(topology.gw1)
        outcome, created = resumed(topology)
    assert (outcome["gateway"], outcome["children"], created) == (topology.gw2.address, ["host"], 1)
    is_transport(topology)
    carries(topology, "host", topology.gw2.address)


@contextlib.contextmanager
def takes_over(topology: Topology) -> Iterator[None]:
    """gw2 has gw1's address too."""
    for old, new in ((topology.gw1, topology.gw2), (topology.gw2, topology.gw1)):
        address = (f"{topology.gw1.address}/24", "dev", "eth0")
        old.run("ip", "address", "del", *address)
        new.run("ip", "address", "add", *address)
        topology.client.run("ip", "neighbour", "flush", "dev", "eth0")
        if new is topology.gw2:
            yield


@at_once_or_not
def test_transport_mode_to_a_gateway_that_took_the_address_over(topology: Topology, at_once: bool) -> None:
    """As with VRRP: the policies on the client are about the very addresses that the request goes between."""
    address = topology.gw1.address
    with host_to_host(topology, at_once):
        topology.kill_gateway(topology.gw1)
        with takes_over(topology):
            outcome, created = resumed(topology, "--to", address)
            assert (outcome["gateway"], outcome["children"]) == (address, ["host"])
            assert created == (0 if at_once else 1)
            is_transport(topology)
            carries(topology, "host", address)
