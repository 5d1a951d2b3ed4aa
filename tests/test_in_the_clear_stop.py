"""Where strongSwan stops, its policies go, and with them a child that drops: the routes of ike-sa-sync-guard.service
stay. A gateway and a client with a default route, IPv4 and IPv6, packets every few milliseconds, a capture on the outer
link.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from clear_support import OuterLink, guard_unit, traffic
from failover_support import fresh, gateways_of, the_sa
from families_support import NETWORKS, ask_for, connect, give_out, server_of
from net_support import inside

pytestmark = pytest.mark.lab

GUARD = "/etc/ike-sa-sync/guard"
POOLS = ("10.20.0.0/16", "fd20::/32")
ELSEWHERE = {"-4": "192.168.50.20", "-6": "fd00:50::20"}
"""the default gateway, which forwards nothing"""


@contextlib.contextmanager
def guard(host: Host, *networks: str) -> Iterator[None]:
    """The unit runs."""
    host.write(GUARD, "# networks\n" + "".join(f"{network}  # of the lab\n" for network in networks))
    guard_unit(host, "ExecStart")
    yield
    guard_unit(host, "ExecStop")


def routes(host: Host) -> list[str]:
    """Those of table main."""
    return [line for family in ELSEWHERE for line in host.run("ip", family, "route").stdout.splitlines()]


@pytest.fixture(scope="module")
def lab() -> Iterator[Topology]:
    """The standard lab, dual stack. All hosts have a default route to the outer network, and the server sends what no
    gateway announces to gw1."""
    with Lab() as lab:
        topology = standard(lab, start=False)
        topology.agent.config["resume_on_down"] = False
        for number, host in ((1, topology.gw1), (2, topology.gw2)):
            give_out(host, "dual stack", number)
        ask_for(topology.client, "dual stack")
        for family, gateway in ELSEWHERE.items():
            for host in (topology.gw1, topology.gw2, topology.client):
                host.run("ip", family, "route", "add", "default", "via", gateway)
        for network, gateway in zip(POOLS, ("10.10.1.1", "fd10:10:1::1"), strict=True):
            topology.server.run("ip", "route", "add", network, "via", gateway)
        topology.start()
        yield topology


@pytest.fixture
def topology(lab: Topology) -> Topology:
    fresh(lab)
    return lab


def session(topology: Topology) -> dict[str, str]:
    """A session at gw1: where the server sends, and from."""
    sa: dict[str, Any] = connect(topology)
    return {vip: server_of(vip) for vip in sa["local-vips"]}


def leaves(topology: Topology, vips: dict[str, str]) -> OuterLink:
    """What gw1 forwards in the clear while the session moves to gw2 and charon stops on gw1, as in an orderly
    shutdown, and the server sends to the client all the time."""
    with OuterLink(topology.gw1) as link, traffic(topology.server, vips):
        wait_until(lambda: link.protected >= 20, "protected traffic")
        topology.gateways["gw1"].command("drain", "--to", topology.gw2.address)
        wait_until(lambda: gateways_of(topology.client) == [topology.gw2.address], "the session at gw2")
        topology.gw1.charon.stop()
        # for a client that is nowhere
        topology.client.swanctl("--terminate", "--ike-id", the_sa(topology.client)["uniqueid"])
        arrives(topology, vips)
    return link


def arrives(topology: Topology, vips: dict[str, str]) -> None:
    """Wait until packets to all of the client's addresses arrive at gw1."""
    with OuterLink(topology.server) as link:
        wait_until(lambda: {seen.target for seen in link.clear} >= set(vips), "packets to the client, at gw1")


def test_a_gateway_that_stops_forwards_packets_to_its_clients_in_the_clear_without_a_guard(topology: Topology) -> None:
    vips = session(topology)
    assert {seen.target for seen in leaves(topology, vips).clear} == set(vips)


def test_a_gateway_that_stops_forwards_nothing_in_the_clear_with_the_guard(topology: Topology) -> None:
    with guard(topology.gw1, *POOLS):
        assert leaves(topology, session(topology)).clear == []


def test_a_client_that_stops_sends_nothing_in_the_clear_with_the_guard(topology: Topology) -> None:
    client = topology.client
    with contextlib.ExitStack() as guarded:
        guarded.enter_context(guard(client, *NETWORKS.split(",")))
        servers = {server: vip for vip, server in session(topology).items()}
        with OuterLink(client) as link, traffic(client, servers):
            wait_until(lambda: link.protected >= 20, "protected traffic")
            client.charon.stop()
            wait_until(lambda: all(refused(client, server) for server in servers), "no way to the servers")
            assert link.clear == []
            # and that the capture sees it
            guarded.close()
            wait_until(lambda: {seen.target for seen in link.clear} == set(servers), "packets in the clear")


NOBODY = {
    "-4": ("10.20.9.1/32", "10.30.9.0/24", "10.30.9.1"),
    "-6": ("fd20:0:9::1/128", "fd30:9::/64", "fd30:9::1"),
}
"""by family: a virtual IP, a network on the outer link, and an address there that nobody has"""


@pytest.mark.parametrize("guarded", [True, False], ids=["with the guard", "without"])
def test_no_error_about_a_packet_from_a_virtual_ip_that_is_gone_leaves_with_the_guard(
    topology: Topology, guarded: bool
) -> None:
    """A packet waits for its neighbour's address. 3 s later the kernel reports it as undeliverable to its source, and
    quotes it."""
    client = topology.client
    with contextlib.ExitStack() as stack:
        if guarded:
            stack.enter_context(guard(client, *NETWORKS.split(","), *POOLS))
        link = stack.enter_context(OuterLink(client))
        for family, (vip, network, target) in NOBODY.items():
            stack.callback(client.run, "ip", family, "route", "del", network, "dev", "eth0")
            client.run("ip", family, "route", "add", network, "dev", "eth0")
            client.run("ip", family, "address", "add", vip, "dev", "eth0", *(["nodad"] if family == "-6" else []))
            sends_once(client, vip.partition("/")[0], target)
            client.run("ip", family, "address", "del", vip, "dev", "eth0")
        for family, (_, _, target) in NOBODY.items():
            asked = ("ip", family, "neighbour", "show", target)
            wait_until(lambda asked=asked: "FAILED" in client.run(*asked).stdout, "nobody")  # type: ignore[misc]
            # behind the errors, if there are any
            assert client.ping(ELSEWHERE[family], count=1) == 1
        vips = set() if guarded else {vip.partition("/")[0] for vip, _, _ in NOBODY.values()}
        wait_until(lambda: {seen.target for seen in link.clear} >= vips, "errors to the virtual IPs")
    assert {seen.target for seen in link.clear} == vips
    assert {seen.protocol for seen in link.clear} <= {socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6}


def sends_once(host: Host, source: str, target: str) -> None:
    """A packet from one of the host's addresses."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    with inside(host.namespace), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((source, 0))
        sock.sendto(b"in the clear?", (target, 9))


def refused(host: Host, target: str) -> bool:
    """Whether the host has no way to an address."""
    return host.run("ip", "route", "get", target, check=False).returncode != 0


def test_the_guard_is_put_up_twice_and_taken_down_and_other_routes_stay(topology: Topology) -> None:
    client = topology.client
    before = routes(client)
    with guard(client, *POOLS):
        guard_unit(client, "ExecStart")
        added = sorted(set(routes(client)) - set(before))
        assert [route.split()[:2] for route in added] == [["blackhole", network] for network in POOLS]
    assert routes(client) == before
