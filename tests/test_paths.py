"""Over which paths a session is resumed: IPv6, translated addresses, other ports, moved clients, small packets."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bridge.charon.vici_types import parse_event
from bridge.ike.key_confirmation import Confirmation
from bridge.ike.keys import derive_keys, skeyseed_resume
from bridge.ike.resumption_answer import parse_response
from bridge.ike.sync_messages import SyncResponse
from bridge.lab import Host, Lab, Topology, standard
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until
from bridge.lab.topology import CHOICES, SITE, client_config, client_host
from failover_support import Outcome, connect, established, fresh, resume, spis, stub_key, the_sa
from probe_support import request, send, the_stub

pytestmark = pytest.mark.lab

NATS = {"nat1": "192.168.50.31", "nat2": "192.168.50.32"}
"""routers that translate, by their outer address; the networks behind them all have the same addresses"""
INSIDE, ROUTER = "10.99.0", "10.99.0.1"
SIX = {"fd00:50::1": "home", "fd00:50::2": "home-gw2"}


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab with two translating routers, and two clients behind the first."""
    with Lab() as lab:
        built = standard(lab, start=False)
        for name, address in NATS.items():
            router = lab.add_host(name, f"{address}/24", forward=True)
            lab.add_network(f"in-{name}")
            lab.attach(router, f"{ROUTER}/24", network=f"in-{name}")
            router.run("iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
        built.agent.config["resume_on_down"] = False
        built.start()
        for number in (1, 2):
            host = client_host(lab, f"inner{number}", f"{INSIDE}.1{number}", built.secret, network="in-nat1")
            host.run("ip", "route", "add", "default", "via", ROUTER)
            agent = host.sidecar("client", client_config(CHOICES) | {"resume_on_down": False})
            agent.start(wait=False)
            host.charon.start()
            agent.wait_ready()
        yield built


def seen_from(topology: Topology, name: str) -> Topology:
    """The lab with another host in the client's place."""
    host = topology.lab.hosts[name]
    return dataclasses.replace(topology, client=host, agent=host.sidecars[0])


@pytest.fixture
def inner(topology: Topology) -> Topology:
    """The lab seen from a client behind a translating router."""
    fresh(seen_from(topology, "inner2"))
    view = seen_from(topology, "inner1")
    fresh(view)
    return view


def resumed(
    topology: Topology, about: str, name: str, tell: Callable[..., None], *arguments: str
) -> tuple[Outcome, dict[str, Any]]:
    """The client resumes at the second gateway, with traffic; the outcome, and the IKE_SA on that gateway."""
    outcome = resume(topology, *arguments)
    tell(about, name, outcome)
    assert outcome["result"] == "resumed"
    assert topology.client.ping(SITE) == 3
    sa = next(sa for sa in established(topology.gw2) if spis(sa) == (outcome["spi_i"], outcome["spi_r"]))
    assert spis(the_sa(topology.client)) == spis(sa)
    return outcome, sa


def rekeyed(topology: Topology) -> None:
    """charon itself goes on over the same path."""
    before = the_sa(topology.client)
    topology.client.swanctl("--rekey", "--ike", before["name"])
    wait_until(lambda: [sa for sa in topology.client.charon.sas() if spis(sa) == spis(before)] == [], "the rekeyed SA")
    wait_until(lambda: topology.client.ping(SITE, count=1) == 1, "traffic under the rekeyed SA")


def test_a_client_behind_a_translating_router_keeps_its_port_and_its_traffic(
    inner: Topology, tell: Callable[..., None]
) -> None:
    connect(inner)
    old = the_sa(inner.gw1)
    assert old["remote-host"] == NATS["nat1"]
    inner.kill_gateway(inner.gw1)
    _, new = resumed(inner, "path", "behind NAT", tell)
    assert (new["remote-host"], new["remote-port"]) == (NATS["nat1"], old["remote-port"])
    assert new["nat-remote"] == the_sa(inner.client)["nat-local"] == "yes"
    rekeyed(inner)


def test_two_clients_behind_one_router_are_distinguished(topology: Topology, inner: Topology) -> None:
    other = seen_from(topology, "inner2")
    connect(inner)
    other.connect()
    assert other.client.ping(SITE) == 3
    wait_until(lambda: len(inner.bank.stubs()) == 2, "both stubs")
    topology.kill_gateway(topology.gw1)
    outcomes = [resume(inner), resume(other)]
    assert [outcome["result"] for outcome in outcomes] == ["resumed", "resumed"]
    assert inner.client.ping(SITE) == other.client.ping(SITE) == 3
    there = {sa["remote-id"]: (sa["remote-host"], spis(sa)) for sa in established(topology.gw2)}
    assert there == {
        f"{view.client.name}@example.org": (NATS["nat1"], (outcome["spi_i"], outcome["spi_r"]))
        for view, outcome in zip((inner, other), outcomes, strict=True)
    }
    assert len({sa["remote-port"] for sa in established(topology.gw2)}) == 2


def test_a_client_that_moved_behind_another_router_resumes_from_there(
    inner: Topology, tell: Callable[..., None]
) -> None:
    connect(inner)
    inner.kill_gateway(inner.gw1)
    try:
        inner.lab.plug(inner.client, "in-nat2")
        inner.client.run("ip", "neighbour", "flush", "dev", "eth0")
        _, new = resumed(inner, "path", "moved behind another NAT", tell)
        assert new["remote-host"] == NATS["nat2"]
        rekeyed(inner)
    finally:
        inner.lab.plug(inner.client, "in-nat1")
        inner.client.run("ip", "neighbour", "flush", "dev", "eth0")


def test_a_client_that_comes_to_be_behind_a_router_is_found_to_be(
    topology: Topology, tell: Callable[..., None]
) -> None:
    fresh(topology)
    connect(topology)
    assert "nat-local" not in the_sa(topology.client)
    topology.kill_gateway(topology.gw1)
    client = topology.client
    try:
        topology.lab.plug(client, "in-nat1")
        client.run("ip", "address", "flush", "dev", "eth0")
        client.run("ip", "address", "add", f"{INSIDE}.10/24", "dev", "eth0")
        client.run("ip", "route", "add", "default", "via", ROUTER)
        _, new = resumed(topology, "path", "moved behind a NAT", tell)
        assert new["remote-host"] == NATS["nat1"]
        assert new["nat-remote"] == the_sa(client)["nat-local"] == "yes"
        assert the_sa(client)["local-host"] == f"{INSIDE}.10"
        rekeyed(topology)
    finally:
        topology.lab.plug(client)
        client.run("ip", "address", "flush", "dev", "eth0")
        client.run("ip", "address", "add", "192.168.50.10/24", "dev", "eth0")
        client.run("ip", "address", "add", "fd00:50::10/64", "dev", "eth0", "nodad")


def test_the_stub_follows_a_client_that_changes_its_address(topology: Topology, tell: Callable[..., None]) -> None:
    fresh(topology)
    client = topology.client
    # else charon may well go on over IPv6, which MOBIKE tells it of
    client.run("ip", "address", "delete", "fd00:50::10/64", "dev", "eth0")
    before = connect(topology)
    told = topology.gw1.charon.vici().listen(["ike-update"], timeout=0.5)
    assert next(told) == (None, None)  # listens from here on
    try:
        # the new one first: the kernel takes a secondary address away with the first one of its network
        client.run("ip", "address", "add", "192.168.50.11/16", "dev", "eth0")
        client.run("ip", "address", "delete", "192.168.50.10/24", "dev", "eth0")
        wait_until(lambda: the_sa(topology.gw1)["remote-host"] == "192.168.50.11", "the move (MOBIKE)")
        wait_until(lambda: "192.168.50.11" in addresses_told(*next(told)), "the event that tells of it")
        told.close()
        spi = before["responder-spi"]

        def address_in_stub() -> str:
            shown = topology.gateways["gw1"].command("stubs", "show", topology.gw1.address, spi, "--json", check=False)
            return str(json.loads(shown.stdout)["remote"]).partition("[")[0] if shown.returncode == 0 else ""

        wait_until(lambda: address_in_stub() == "192.168.50.11", "the stub with the new address")
        topology.kill_gateway(topology.gw1)
        _, new = resumed(topology, "path", "moved by MOBIKE", tell)
        assert new["remote-host"] == "192.168.50.11"
        rekeyed(topology)
    finally:
        client.run("ip", "address", "replace", "192.168.50.10/24", "dev", "eth0")
        client.run("ip", "address", "delete", "192.168.50.11/16", "dev", "eth0")
        client.run("ip", "address", "add", "fd00:50::10/64", "dev", "eth0", "nodad")


def addresses_told(kind: bytes | None, message: dict[str, Any] | None) -> list[str]:
    """The peers' addresses by a VICI event, as the sidecar reads it."""
    return [event.sa.remote.address for event in parse_event(kind.decode(), message)] if kind and message else []


@pytest.fixture
def six(topology: Topology) -> Iterator[Topology]:
    """The client reaches its gateways over IPv6."""
    addresses = {f"connections.{name}.remote_addrs": address for address, name in SIX.items()}
    topology.client.configure(render(addresses) + "\n", "six.conf")
    before = topology.agent.config["gateways"]
    topology.agent.stop()
    topology.agent.config["gateways"] = client_config(SIX)["gateways"]
    topology.agent.start()
    fresh(topology)
    topology.client.charon.load()
    yield topology
    (topology.client.etc / "swanctl/conf.d/six.conf").unlink()
    topology.agent.stop()
    topology.agent.config["gateways"] = before
    topology.agent.start()
    topology.client.charon.load()


def test_a_session_over_ipv6_is_resumed_over_ipv6(six: Topology, tell: Callable[..., None]) -> None:
    before = connect(six)
    assert before["remote-host"] == "fd00:50::1"
    assert six.bank.stubs() == [stub_key("fd00:50::1", before["responder-spi"])]
    six.kill_gateway(six.gw1)
    outcome, new = resumed(six, "path", "IPv6", tell)
    assert (outcome["gateway"], new["remote-host"]) == ("fd00:50::2", "fd00:50::10")
    wait_until(lambda: six.bank.stubs() == [stub_key("fd00:50::2", outcome["spi_r"])], "the stub at the new gateway")
    rekeyed(six)


ON_500 = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("", 501))
sock.settimeout(20)
sock.sendto(bytes.fromhex(sys.argv[2]), (sys.argv[1], 500))
print(sock.recv(65536).hex())
"""


def test_of_a_request_on_port_500_and_one_on_4500_the_confirmed_one_stays(topology: Topology) -> None:
    """What a client does that finds a NAT on port 500 (RFC 7296 section 2.23). ESP in userspace has charon fake a NAT,
    so the lab's own sessions never are on port 500: these requests are made by hand."""
    fresh(topology)
    connect(topology)
    stub, gateway = the_stub(topology), topology.gw2
    first = request(stub, nat=("10.99.0.7", 500, gateway.address, 500))
    done = topology.client.run(sys.executable, "-c", ON_500, gateway.address, first.hex())
    answer = parse_response(bytes.fromhex(done.stdout.strip()), first)
    assert isinstance(answer, SyncResponse)
    [sa] = established(gateway)
    assert (sa["local-port"], sa["remote-port"], sa["nat-remote"]) == ("500", "501", "yes")
    # 4502 is what the NAT makes of the client's port 4500
    message = request(stub, spi_i=b"\x12" * 8, nonce=b"\x23" * 32, nat=("10.99.0.7", 4500, gateway.address, 4500))
    [octets] = send(topology, message, port=4502)
    answer = parse_response(octets, message)
    assert isinstance(answer, SyncResponse)
    pair = (message[:8], answer.spi_r)
    seed = skeyseed_resume(stub.suite.prf, stub.sk_d, b"\x23" * 32, answer.nonce)
    keys = derive_keys(stub.suite, seed, b"\x23" * 32, answer.nonce, *pair)
    confirmation = Confirmation(stub.suite, keys, *pair, random=os.urandom)
    [octets] = send(topology, confirmation.request, port=4502)
    assert confirmation.is_answered_by(octets)
    wait_until(lambda: len(gateway.charon.sas()) == 1, "the end of the SA on port 500")
    [sa] = established(gateway)
    assert (sa["local-port"], sa["remote-port"], sa["responder-spi"]) == ("4500", "4502", answer.spi_r.hex())


@contextlib.contextmanager
def long_requests(topology: Topology) -> Iterator[None]:
    """IKE_SAs of a group whose public values have 1024 octets."""
    topology.client.configure("connections { home { proposals = aes128-sha256-modp8192 } }\n", "group.conf")
    for host in (topology.gw1, topology.gw2):
        host.configure("connections { gw { proposals = aes128-sha256-modp8192,default } }\n", "group.conf")
    fresh(topology)
    hosts = (topology.client, topology.gw1, topology.gw2)
    for host in hosts:
        host.charon.load()
    try:
        yield
    finally:
        topology.client.run("ip", "link", "set", "eth0", "mtu", "1500")
        # the kernel takes IPv6 away below its least MTU
        topology.client.run("ip", "address", "replace", "fd00:50::10/64", "dev", "eth0", "nodad")
        for host in hosts:
            (host.etc / "swanctl/conf.d/group.conf").unlink()
        fresh(topology)
        for host in hosts:
            host.charon.load()


def test_a_request_that_ip_has_to_fragment_is_answered(topology: Topology, tell: Callable[..., None]) -> None:
    with long_requests(topology):
        connect(topology)
        topology.kill_gateway(topology.gw1)
        topology.client.run("ip", "link", "set", "eth0", "mtu", "576")
        before = reassembled(topology.gw2)
        resumed(topology, "path", "IPv4, MTU 576", tell)
        assert reassembled(topology.gw2) > before


def test_a_request_that_ipv6_has_to_fragment_is_answered(six: Topology, tell: Callable[..., None]) -> None:
    with long_requests(six):
        connect(six)
        six.kill_gateway(six.gw1)
        six.client.run("ip", "link", "set", "eth0", "mtu", "1280")
        before = fragments6(six.client)
        resumed(six, "path", "IPv6, MTU 1280", tell)
        assert fragments6(six.client) > before


def reassembled(host: Host) -> int:
    """Fragmented IPv4 packets that a host put together."""
    text = host.run("cat", "/proc/net/snmp").stdout
    names, values = (line.split() for line in text.splitlines() if line.startswith("Ip:"))
    return int(values[names.index("ReasmOKs")])


def fragments6(host: Host) -> int:
    """IPv6 packets that a host sent in fragments."""
    text = host.run("cat", "/proc/net/snmp6").stdout
    return int(dict(line.split() for line in text.splitlines())["Ip6FragOKs"])


def test_a_gateway_behind_a_router_is_indexed_by_the_address_that_its_clients_see(
    topology: Topology, tell: Callable[..., None]
) -> None:
    fresh(topology)
    router, gateway, sidecar = topology.lab.hosts["nat2"], topology.gw1, topology.gateways["gw1"]
    hidden = f"{INSIDE}.21"
    topology.lab.attach(gateway, f"{hidden}/24", network="in-nat2")
    for port in ("500", "4500"):
        to = ("-p", "udp", "--dport", port, "-j", "DNAT", "--to-destination", hidden)
        router.run("iptables", "-t", "nat", "-A", "PREROUTING", "-i", "eth0", *to)
    # as if the router were all that leads to the gateway's hidden address
    router.run("iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "eth1", "-p", "udp", "-j", "MASQUERADE")
    public = NATS["nat2"]
    sidecar.stop()
    sidecar.config["address"] = public
    sidecar.start()
    topology.client.configure(f"connections {{ home {{ remote_addrs = {public} }} }}\n", "public.conf")
    topology.client.charon.load()
    try:
        before = connect(topology)
        assert before["remote-host"] == public
        assert the_sa(gateway)["local-host"] == hidden
        assert topology.bank.stubs() == [stub_key(public, before["responder-spi"])]
        topology.kill_gateway(gateway)
        resumed(topology, "path", "from a gateway behind NAT", tell, "--to", topology.gw2.address)
    finally:
        (topology.client.etc / "swanctl/conf.d/public.conf").unlink()
        topology.client.charon.load()
        sidecar.config.pop("address")
