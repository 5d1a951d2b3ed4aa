"""Two devices of one user, with one identity, which were given the same virtual IP: at a gateway one of them has it,
and none takes it from the other by a resumption."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from failover_support import (
    complete,
    counter,
    established,
    fresh_both,
    resumed_to,
    second_client,
    spis,
    start_both,
    stub_key,
    the_sa,
)
from families_support import ask_for, give_out, server_of
from releases_support import OTHERS

pytestmark = pytest.mark.lab

TAKEN = "refusals_total[address-taken]"
OWN = "pools { clients { addrs = 10.20.2.0/24 }\n clients6 { addrs = fd20:0:2::/112 } }\n"
"""pools that give out other addresses than those of the other gateway"""
USER = "connections { home { unique = never\n local { id = client@example.org } } }\n"
"""neither device says INITIAL_CONTACT, which would end the session of the other one"""


def runs() -> Iterator[Any]:
    yield pytest.param(("IPv4", None), id="IPv4")
    yield pytest.param(("dual stack", None), id="dual stack")
    for family, name in zip(("IPv6", "dual stack"), OTHERS, strict=True):
        yield pytest.param((family, name), marks=pytest.mark.releases, id=f"{family}, {name}")


@pytest.fixture(scope="module", params=runs())
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab and a second device of the client's user, `other`. Both gateways have the same pools, in the
    memory of their charons: the first session at each gets the same address."""
    family, name = request.param
    with Lab() as lab:
        releases = dict.fromkeys(("gw1", "gw2", "client"), name) if name is not None else None
        built = standard(lab, start=False, releases=releases)
        built.agent.config["resume_on_down"] = False
        other = second_client(built, name)
        for host in (built.gw1, built.gw2):
            give_out(host, family, 1)
            host.configure("pools { clients { addrs = 10.20.1.0/24 } }\n", "zz-pools.conf")
            built.gateways[host.name].config["sync"] |= {"duplicate_address": "report"}
        for client in (built.client, other):
            ask_for(client, family)
            client.configure(USER, "zz.conf")
        start_both(built)
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    """No session, and no lease: of a user whose address is in use a pool gives another one."""
    fresh_both(topology)
    (topology.gw2.etc / "swanctl/conf.d/zzz-pools.conf").unlink(missing_ok=True)
    for gateway in (topology.gw1, topology.gw2):
        restart(topology, gateway)


def device(topology: Topology) -> Host:
    """The user's other device."""
    return topology.lab.hosts["other"]


def restart(topology: Topology, gateway: Host) -> None:
    """A gateway dies and comes back, its pools empty."""
    topology.kill_gateway(gateway)
    topology.gateways[gateway.name].start(wait=False)
    gateway.charon.start()
    topology.gateways[gateway.name].wait_ready()


def connect(topology: Topology, client: Host, connection: str) -> dict[str, Any]:
    """A session of one of the devices, its stub in the bank."""
    client.charon.initiate("net", connection)
    sa = the_sa(client)
    wait_until(lambda: complete(topology, stub_key(sa["remote-host"], sa["responder-spi"])), "the stub of the session")
    return sa


def each_has_its_own(topology: Topology, gateway: Host) -> None:
    """Both devices have a session at a gateway, with addresses of their own, and reach the server."""
    clients = (topology.client, device(topology))
    sessions = [the_sa(client) for client in clients]
    assert not set(sessions[0]["local-vips"]) & set(sessions[1]["local-vips"])
    there = {spis(sa) for sa in established(gateway)}
    assert there == {spis(sa) for sa in sessions}
    for client, sa in zip(clients, sessions, strict=True):
        for vip in sa["local-vips"]:
            wait_until(lambda client=client, vip=vip: client.ping(server_of(vip), count=1) == 1, f"traffic of {vip}")  # type: ignore[misc]


@pytest.mark.parametrize("first", ["client", "other"])
def test_the_one_that_comes_is_refused_whichever_is_the_older_one(topology: Topology, first: str) -> None:
    other = device(topology)
    if first == "client":
        mine, theirs = connect(topology, topology.client, "home"), connect(topology, other, "home-gw2")
    else:
        theirs, mine = connect(topology, other, "home-gw2"), connect(topology, topology.client, "home")
    assert mine["local-vips"] == theirs["local-vips"]
    before = counter(topology, "gw2", TAKEN)
    outcome = resumed_to(topology.agent, topology.gw2)
    assert (outcome["result"], outcome["gateway"]) == ("fallback", topology.gw2.address)
    assert counter(topology, "gw2", TAKEN) > before
    assert "reason=address-taken" in topology.gateways["gw2"].text()
    now = the_sa(other)
    assert (spis(now), now["local-vips"]) == (spis(theirs), theirs["local-vips"])
    each_has_its_own(topology, topology.gw2)


def test_of_two_that_come_at_the_same_time_one_is_resumed(topology: Topology) -> None:
    """Both had their address of one gateway, which was restarted between them. A handshake with one whose pool knows
    nothing of it would give it to both again."""
    other = device(topology)
    topology.gw2.configure(OWN, "zzz-pools.conf")
    restart(topology, topology.gw2)
    mine = connect(topology, topology.client, "home")
    restart(topology, topology.gw1)
    theirs = connect(topology, other, "home")
    assert mine["local-vips"] == theirs["local-vips"]
    topology.kill_gateway(topology.gw1)
    with ThreadPoolExecutor() as pool:
        outcomes = list(pool.map(lambda one: resumed_to(one, topology.gw2), (topology.agent, other.sidecars[0])))
    assert sorted(outcome["result"] for outcome in outcomes) == ["fallback", "resumed"]
    assert counter(topology, "gw2", TAKEN) >= 1
    each_has_its_own(topology, topology.gw2)


def test_a_session_that_its_own_device_left_behind_holds_no_address(topology: Topology) -> None:
    """gw2 did not notice the end, and neither did the client's sidecar."""
    client, gw2 = topology.client, topology.gw2
    left = connect(topology, client, "home-gw2")
    second = int(time.time())
    topology.agent.stop()
    client.charon.crash()
    client.charon.start()
    topology.agent.start()
    # of two sessions of one second none is known to be the older one
    wait_until(lambda: int(time.time()) > second, "the next second")
    mine = connect(topology, client, "home")
    assert mine["local-vips"] == left["local-vips"]
    assert [spis(sa) for sa in established(gw2)] == [spis(left)]
    assert resumed_to(topology.agent, gw2)["result"] == "resumed"
    wait_until(lambda: [spis(sa) for sa in established(gw2)] == [spis(the_sa(client))], "the end of the older one")
    for vip in the_sa(client)["local-vips"]:
        wait_until(lambda vip=vip: client.ping(server_of(vip), count=1) == 1, f"traffic of {vip}")  # type: ignore[misc]
