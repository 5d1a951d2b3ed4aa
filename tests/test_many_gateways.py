"""One connection that leads to several gateways: by a list of addresses, and by a name that resolves to all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.topology import SITE
from failover_support import agent_with, connect, established, fresh, last_move, replaced, resume, spis, the_sa

pytestmark = pytest.mark.lab

NAME = "vpn.lab.test"
LIST = "192.168.50.1, 192.168.50.2"
GW1, GW2 = "192.168.50.1", "192.168.50.2"
ONE = """\
connections {{
    home {{
        remote_addrs = {remote}
    }}
}}
"""


@pytest.fixture(scope="module", params=[NAME, LIST], ids=["name", "list"])
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab; the client has one connection, and no list of gateways of its own."""
    with Lab() as lab:
        topology = standard(lab, start=False)
        (topology.client.etc / "hosts").unlink()
        names(topology, GW1, GW2)
        topology.client.configure(ONE.format(remote=request.param), "one.conf")
        file = topology.client.etc / "swanctl/swanctl.conf"
        file.write_text(file.read_text().replace("home-gw2 : connections.home", "unused"))
        topology.client.configure("connections { unused { remote_addrs = %any } }\n", "unused.conf")
        topology.agent.config["gateways"] = []
        topology.start()
        yield topology


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    names(topology, GW1, GW2)
    fresh(topology)


def names(topology: Topology, *addresses: str) -> None:
    """What the client's resolver says."""
    lines = "".join(f"{address} {NAME}\n" for address in addresses)
    (topology.client.etc / "hosts").write_text(f"127.0.0.1 localhost\n{lines}")


def by_name(topology: Topology) -> bool:
    return NAME in (topology.client.etc / "swanctl/conf.d/one.conf").read_text()


def at(topology: Topology) -> list[str]:
    """Where the client's sessions are."""
    return [sa["remote-host"] for sa in established(topology.client)]


def test_a_session_goes_on_at_the_other_gateway_of_its_connection_and_stays_there(topology: Topology) -> None:
    connect(topology)
    topology.kill_gateway(topology.gw1)
    wait_until(lambda: at(topology) == [GW2], "the session at gw2", 60)
    wait_until(lambda: last_move(topology).get("result") == "resumed", "the attempt's end")
    assert the_sa(topology.client)["name"] == "home"
    old = spis(the_sa(topology.client))
    topology.client.swanctl("--rekey", "--ike", "home")
    wait_until(lambda: replaced(topology.client, old), "new keys")
    assert at(topology) == [GW2]
    old = spis(the_sa(topology.client))
    topology.client.swanctl("--rekey", "--ike", "home", "--reauth")
    wait_until(lambda: replaced(topology.client, old), "a new authentication", 60)
    assert at(topology) == [GW2]
    wait_until(lambda: topology.client.ping(SITE, count=1) == 1, "traffic")


def test_a_session_that_cannot_be_resumed_is_set_up_where_charon_can(topology: Topology) -> None:
    """charon takes the first address: while that gateway is dead there is no session, and one once it is back."""
    connect(topology)
    topology.kill_gateway(topology.gw1)
    topology.bank.cli("FLUSHDB")
    wait_until(lambda: last_move(topology).get("result") == "failed", "an attempt in vain", 60)
    topology.gateways["gw1"].start(wait=False)
    topology.gw1.charon.start()
    wait_until(lambda: at(topology) == [GW1], "the session at gw1", 90)
    wait_until(lambda: topology.client.ping(SITE, count=1) == 1, "traffic")


def test_a_name_is_resolved_at_each_attempt(topology: Topology) -> None:
    if not by_name(topology):
        pytest.skip("a list of addresses is not resolved")
    names(topology, GW1)
    # what is configured counts alone, so that gw1 cannot name gw2
    with agent_with(topology, gateways=[{"address": NAME, "connection": "home"}]):
        connect(topology)
        outcome = resume(topology, "--to", GW2)
        assert (outcome["result"], outcome["reason"]) == ("failed", "gateway-not-configured")
        names(topology, GW1, GW2)
        outcome = resume(topology, "--to", GW2)
        assert (outcome["result"], outcome["gateway"]) == ("resumed", GW2)


def test_check_says_which_gateway_a_full_handshake_does_not_reach(topology: Topology) -> None:
    findings = json.loads(topology.agent.command("check", "--json", check=False).stdout)
    found = [row["finding"] for row in findings if "first address" in row["finding"]]
    assert len(found) == 1, findings
    assert GW2 in found[0]
    assert f"first address of the connection only, {GW1}" in found[0]
