"""A client with a default route sends nothing of the inner network unencrypted while its session moves: IPv4 and IPv6,
packets every few milliseconds, a capture on the outer link.

In `make test-vm` with the kernel's ESP, and with a child that drops as guard too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.esp import Esp
from bridge.lab.host import Host
from bridge.lab.topology import SERVER
from clear_support import OuterLink, traffic
from failover_support import agent_with, fresh, gateways_of, last_move, resume, resume_now, stub_key, the_sa
from families_support import NETWORKS, ask_for, connect, give_out, reaches, server_of
from releases_support import OTHERS, on_all

pytestmark = pytest.mark.lab

ELSEWHERE = ("192.168.50.20", "fd00:50::20")
"""the client's default gateway, which forwards nothing"""
FAMILIES = ("-4", "-6")
UNGUARDED = "connections { guard { children { inner { start_action = none } } } }\n"
POOLS = ("10.20.0.0/16", "fd20::/32")
"""of all gateways"""
CHILD = f"connections {{ guard {{ children {{ inner {{ remote_ts = {NETWORKS} }} }} }} }}\n"


class Guarded:
    """The standard lab with a guard at the client."""

    def __init__(self, topology: Topology, guard: str) -> None:
        self.topology = topology
        self.has_child = guard == "child"
        topology.client.configure(CHILD if self.has_child else UNGUARDED, "guard.conf")

    def on(self) -> None:
        """Put the guard up where it does not come with charon."""
        if not self.has_child:
            self._routes("add")

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Without a guard."""
        client = self.topology.client
        if not self.has_child:
            self._routes("del")
            yield
            self._routes("add")
        else:
            client.swanctl("--uninstall", "--child", "inner")
            yield
            client.swanctl("--install", "--child", "inner")

    def _routes(self, change: str) -> None:
        for family, *networks in zip(FAMILIES, NETWORKS.split(","), POOLS, strict=True):
            for network in networks:
                route = ("blackhole", network, "metric", "4294967295")
                self.topology.client.run("ip", family, "route", change, *route)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("route", None), id="route"),
        pytest.param(("child", None), marks=pytest.mark.vm, id="child"),
        *(pytest.param(("route", name), marks=pytest.mark.releases, id=f"route, {name}") for name in OTHERS),
    ],
)
def guarded(request: pytest.FixtureRequest) -> Iterator[Guarded]:
    """A dual-stack client with a default route and a guard. It moves when it is told to only."""
    with Lab() as lab:
        guard, release = request.param
        topology = standard(lab, start=False, releases=on_all(release))
        topology.agent.config["resume_on_down"] = False
        for number, host in ((1, topology.gw1), (2, topology.gw2)):
            give_out(host, "dual stack", number)
        ask_for(topology.client, "dual stack")
        for family, gateway in zip(FAMILIES, ELSEWHERE, strict=True):
            topology.client.run("ip", family, "route", "add", "default", "via", gateway)
        guarded = Guarded(topology, guard)
        guarded.on()
        topology.start()
        assert guard == "route" or lab.esp is Esp.KERNEL
        yield guarded


@pytest.fixture
def topology(guarded: Guarded) -> Topology:
    fresh(guarded.topology)
    return guarded.topology


@contextlib.contextmanager
def watched(topology: Topology) -> Iterator[OuterLink]:
    """Traffic of a session at gw1 all the time, seen on the client's outer link; it flows at the end too."""
    sa = connect(topology)
    with (
        OuterLink(topology.client) as link,
        traffic(topology.client, {server_of(vip): vip for vip in sa["local-vips"]}),
    ):
        flows(link)
        yield link
        flows(link)
        assert link.lost() == 0
    reaches(topology)


def flows(link: OuterLink) -> None:
    """Wait until there was protected traffic."""
    before = link.protected
    wait_until(lambda: link.protected >= before + 20, "protected traffic")


def moves(topology: Topology, count: int) -> None:
    """The session moves between the gateways, both alive."""
    for number in range(count):
        outcome = resume(topology, "--to", (topology.gw2, topology.gw1)[number % 2].address)
        assert outcome["result"] == "resumed", outcome


@pytest.mark.parametrize("children", ["auto", "never"])
def test_a_planned_move(topology: Topology, children: str) -> None:
    options = topology.agent.config["resume"] | {"children_in_exchange": children}
    with agent_with(topology, resume=options), watched(topology) as link:
        moves(topology, 3)
    assert link.clear == []


def test_a_drain(topology: Topology) -> None:
    with watched(topology) as link:
        topology.gateways["gw1"].command("drain", "--to", topology.gw2.address)
        wait_until(lambda: gateways_of(topology.client) == [topology.gw2.address], "the session at gw2")
    assert link.clear == []


def died(topology: Topology) -> dict[str, Any]:
    """The gateway of the session dies, the client's charon notices by DPD: what became of the session."""
    moved = len(topology.agent.text())
    topology.kill_gateway(topology.gw1)
    wait_until(lambda: "event=moved" in topology.agent.text()[moved:], "what became of the session")
    return last_move(topology)


def test_a_gateway_that_is_found_dead(topology: Topology) -> None:
    with agent_with(topology, resume_on_down=True), watched(topology) as link:
        assert died(topology)["result"] == "resumed"
    assert link.clear == []


def test_a_fallback_from_a_dead_gateway(topology: Topology) -> None:
    with agent_with(topology, resume_on_down=True), watched(topology) as link:
        topology.bank.cli("FLUSHDB")
        assert died(topology)["result"] == "fallback"
    assert link.clear == []


def test_a_fallback_from_a_living_gateway(topology: Topology) -> None:
    with watched(topology) as link:
        # does not open; what is deleted its gateway stores again
        key = stub_key(topology.gw1.address, the_sa(topology.client)["responder-spi"])
        topology.bank.cli("HSET", key, "sealed", "spoilt")
        assert resume_now(topology, topology.gw2)["result"] == "fallback"
    assert link.clear == []


def test_packets_from_an_address_that_no_child_sa_is_for_need_a_child_that_drops(
    guarded: Guarded, topology: Topology
) -> None:
    """Where ESP is in the kernel, charon's route leads them past routes that lead nowhere."""
    if topology.lab.esp is Esp.USERSPACE:
        pytest.skip("charon's route leads to its own ESP")
    connect(topology)
    client = topology.client
    with OuterLink(client) as link, traffic(client, {SERVER: client.address}):
        if guarded.has_child:
            dropped = blocked(client)
            wait_until(lambda: blocked(client) >= dropped + 100, "packets that are dropped")
            assert link.clear == []
        else:
            wait_until(lambda: link.clear != [], "packets in the clear")
            assert {seen.source for seen in link.clear} == {client.address}


def test_an_end_without_a_way_back(topology: Topology) -> None:
    with watched(topology) as link:
        topology.client.swanctl("--terminate", "--ike-id", the_sa(topology.client)["uniqueid"])
        topology.connect()
    assert link.clear == []


def test_without_a_guard_a_session_that_moves_has_its_new_child_sas_before_the_old_ones_go(
    guarded: Guarded, topology: Topology
) -> None:
    with guarded.off(), watched(topology) as link:
        vips = the_sa(topology.client)["local-vips"]
        moves(topology, 8)
    # with the kernel's ESP charon exchanges its route, which gives packets the virtual IP that the policies are about
    in_userspace = topology.lab.esp is Esp.USERSPACE
    assert [seen for seen in link.clear if in_userspace or seen.source in vips] == []


def test_without_a_guard_packets_leave_in_the_clear_while_there_is_no_child_sa(
    guarded: Guarded, topology: Topology
) -> None:
    """What the guard is for, and that the capture sees it."""
    with guarded.off(), watched(topology) as link:
        topology.client.swanctl("--terminate", "--ike-id", the_sa(topology.client)["uniqueid"])
        wait_until(lambda: len({seen.target for seen in link.clear}) == 2, "packets of both families in the clear")
        topology.connect()


@pytest.fixture
def unprotected() -> Iterator[Topology]:
    """The standard lab, whose client has the shipped configuration, a default route, and the kernel's policies: where
    the kernel has no ESP, no CHILD_SA comes up."""
    with Lab() as lab:
        topology = standard(lab, start=False)
        topology.client.esp = Esp.KERNEL
        topology.client.run("ip", "route", "add", "default", "via", ELSEWHERE[0])
        topology.start()
        yield topology


def test_the_shipped_guard_stops_packets_by_the_kernels_policies_and_lets_ike_pass(unprotected: Topology) -> None:
    client = unprotected.client
    with OuterLink(client) as link, traffic(client, {SERVER: client.address}):
        dropped = blocked(client)
        wait_until(lambda: blocked(client) >= dropped + 100, "packets that are dropped")
        client.swanctl("--initiate", "--child", "net", "--timeout", "5", check=False)
        assert the_sa(client)["remote-host"] == unprotected.gw1.address
        assert link.clear == []
        client.swanctl("--uninstall", "--child", "inner")
        if unprotected.lab.esp is Esp.USERSPACE:
            wait_until(lambda: link.clear != [], "packets in the clear")


def blocked(host: Host) -> int:
    """How many packets the kernel's policies have dropped."""
    lines = host.run("cat", "/proc/net/xfrm_stat").stdout.splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("XfrmOutPolBlock"))
