"""What sessions have in the kernel, and what they leave behind: reqids, policies, and the routes of charon's table
(`make test-vm`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.esp import Esp
from bridge.lab.host import Host
from bridge.lab.topology import SITE
from failover_support import complete, fresh_both, resume, second_client, start_both, stub_key, the_sa

pytestmark = [pytest.mark.vm, pytest.mark.lab]

CHARON_TABLE = "220"
POLICY = re.compile(
    r"^src (\S+) dst (\S+)[^\n]*\n\s+dir (\S+) [^\n]*\n(?:\s[^\n]*\n)*?\s+proto esp (?:spi \S+ )?reqid (\d+) ", re.M
)
STATE = re.compile(r"^src (\S+) dst (\S+)\n\s+proto esp spi \S+ reqid (\d+) ", re.M)


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab and a second client, `other`. Clients move when they are told to only."""
    with Lab() as lab:
        built = standard(lab, start=False)
        assert lab.esp is Esp.KERNEL
        built.agent.config["resume_on_down"] = False
        for sidecar in built.gateways.values():
            # an emulated processor may take its time
            sidecar.config["bank"]["get_timeout"] = 5.0
        second_client(built)
        start_both(built)
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh_both(topology)


class Kernel(NamedTuple):
    """What a host's kernel has of the sessions of a client."""

    policies: list[tuple[str, int]]
    """direction and reqid of those about its virtual IP"""
    states: list[int]
    """reqids of the SAs between these hosts"""
    routes: list[str]
    """in charon's table, to its virtual IP"""


def of(host: Host, client: Host, vip: str) -> Kernel:
    found = policies(host)
    return Kernel(
        sorted((direction, reqid) for ends, direction, reqid in found if f"{vip}/32" in ends),
        sorted(
            int(reqid) for *ends, reqid in STATE.findall(out(host, "ip", "xfrm", "state")) if client.address in ends
        ),
        [line for line in out(host, "ip", "route", "show", "table", CHARON_TABLE).splitlines() if vip in line.split()],
    )


def policies(host: Host) -> list[tuple[tuple[str, str], str, int]]:
    """Those that protect: selectors, direction and reqid."""
    text = out(host, "ip", "xfrm", "policy")
    return [((source, target), way, int(reqid)) for source, target, way, reqid in POLICY.findall(text)]


def out(host: Host, *argv: str) -> str:
    # there is no table before its first route
    return host.run(*argv, check=False).stdout


NOTHING = Kernel([], [], [])


def one_pair(kernel: Kernel) -> int:
    """The reqid of a gateway's only CHILD_SA with a client: one pair of SAs, one policy for each direction."""
    [reqid] = set(kernel.states)
    assert kernel.states == [reqid] * 2
    assert kernel.policies == [("fwd", reqid), ("in", reqid), ("out", reqid)]
    assert len(kernel.routes) == 1
    return reqid


def in_the_bank(topology: Topology, client: Host) -> str:
    """Wait for the stub of a client's session; its virtual IP."""
    sa = the_sa(client)
    wait_until(lambda: complete(topology, stub_key(sa["remote-host"], sa["responder-spi"])), "the stub")
    [vip] = sa["local-vips"]
    return str(vip)


def reaches(topology: Topology, client: Host, vip: str) -> None:
    """Traffic begins at either end."""
    assert client.ping(SITE) == 3
    wait_until(lambda: topology.server.ping(vip, count=1) == 1, "the route from the server")
    before = received(client)
    assert topology.server.ping(vip) == 3
    assert received(client) - before == 3


def received(client: Host) -> int:
    """How many packets a client's one CHILD_SA has brought it."""
    [child] = the_sa(client)["child-sas"].values()
    return int(child["packets-in"])


def test_a_resumed_session_has_a_reqid_of_its_own_beside_one_that_was_set_up(topology: Topology) -> None:
    client, other, gw2 = topology.client, topology.lab.hosts["other"], topology.gw2
    other.charon.initiate("net", "home-gw2")
    its = in_the_bank(topology, other)
    topology.connect()
    mine = in_the_bank(topology, client)
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    wait_until(lambda: len(of(gw2, client, mine).states) == 2, "both ESP SAs of the resumed session")
    assert one_pair(of(gw2, client, mine)) != one_pair(of(gw2, other, its))
    reaches(topology, client, mine)
    reaches(topology, other, its)
    # and after its keys have changed
    reqid, child = one_pair(of(gw2, client, mine)), list(the_sa(client)["child-sas"])
    client.swanctl("--rekey", "--child", "net")
    wait_until(lambda: list(the_sa(client)["child-sas"]) not in ([], child), "the rekeyed CHILD_SA")
    wait_until(lambda: of(gw2, client, mine).states == [reqid] * 2, "the end of the old ESP SAs")
    assert one_pair(of(gw2, client, mine)) == reqid
    reaches(topology, client, mine)
    reaches(topology, other, its)


def test_a_session_that_moves_to_and_fro_leaves_nothing_at_the_gateway_that_it_left(topology: Topology) -> None:
    client = topology.client
    topology.connect()
    vip = in_the_bank(topology, client)
    for here, there in ((topology.gw2, topology.gw1), (topology.gw1, topology.gw2)) * 2:
        assert resume(topology, "--to", here.address)["result"] == "resumed"
        wait_until(lambda there=there: of(there, client, vip) == NOTHING, "the end of the session there")  # type: ignore[misc]
        one_pair(of(here, client, vip))
        at_the_client = of(client, here, vip)
        assert len(at_the_client.states) == 2
        assert [way for way, _ in at_the_client.policies] == ["fwd", "in", "out"]
        assert {reqid for _, reqid in at_the_client.policies} == set(at_the_client.states)
        [route] = [
            line for line in out(client, "ip", "route", "show", "table", CHARON_TABLE).splitlines() if vip in line
        ]
        assert route.startswith("10.10.0.0/16 ")
        reaches(topology, client, vip)
        in_the_bank(topology, client)


def test_a_session_that_its_client_ends_leaves_nothing_at_either_end(topology: Topology) -> None:
    client = topology.client
    topology.connect()
    vip = in_the_bank(topology, client)
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
    client.swanctl("--terminate", "--ike-id", the_sa(client)["uniqueid"])
    for host in (topology.gw1, topology.gw2):
        wait_until(lambda host=host: of(host, client, vip) == NOTHING, f"the end at {host.name}")  # type: ignore[misc]
        wait_until(lambda host=host: of(client, host, vip) == NOTHING, "the end at the client")  # type: ignore[misc]
