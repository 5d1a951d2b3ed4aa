"""charon's HA pools give out no address that a session of any gateway has, with real charons."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.topology import SERVER
from failover_support import counter, established, fresh_both, resume, second_client, spis, start_both, status, the_sa
from families_support import ask_for, connect, give_out
from releases_support import OTHERS, on_all

pytestmark = pytest.mark.lab

POOL = "charon.plugins.ha.pools"
LOADED = "loaded HA pool"
FIRST = ("10.20.1.1", "fd20:0:1::1")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("dual stack", None), id="dual stack"),
        *(
            pytest.param((family, name), marks=pytest.mark.releases, id=f"{family}, {name}")
            for family, name in zip(("IPv4", "dual stack"), OTHERS, strict=True)
        ),
    ],
)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab with HA pools of 14 addresses of each family, and a second client, `other`."""
    family, release = request.param
    with Lab() as lab:
        built = standard(lab, start=False, releases=on_all(release))
        built.agent.config["resume_on_down"] = False
        for number, host in ((1, built.gw1), (2, built.gw2)):
            host.charon.settings[f"{POOL}.clients"] = f"10.20.{number}.0/28"
            host.charon.settings[f"{POOL}.clients6"] = f"fd20:0:{number}::/124"
            (host.etc / "swanctl/conf.d/pool.conf").unlink()
            give_out(host, family)
        other = second_client(built, release)
        for client in (built.client, other):
            ask_for(client, family)
        start_both(built)
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh_both(topology)
    for name in topology.gateways:
        wait_until(lambda name=name: given_out(topology, name), "addresses")  # type: ignore[misc]
        wait_until(lambda name=name: not placeholders(topology, name), "the end of placeholders", 60)  # type: ignore[misc]


def given_out(topology: Topology, gateway: str) -> bool:
    """Whether a gateway's charon gives out addresses."""
    starts = topology.lab.hosts[gateway].charon.text().count(LOADED) / len(FIRST)
    return topology.gateways[gateway].text().count("event=address-assignment-started") >= starts


def placeholders(topology: Topology, gateway: str) -> list[str]:
    """The addresses of the SAs of a gateway's charon that stand for sessions elsewhere."""
    return sorted(
        vip
        for sa in topology.lab.hosts[gateway].charon.sas()
        if sa["state"] == "PASSIVE" and sa["remote-id"].startswith("address-in-use")
        for vip in sa["remote-vips"]
    )


def first(topology: Topology) -> list[str]:
    """A session of the client with the first addresses of gw1's pools."""
    addresses = sorted(connect(topology)["local-vips"])
    assert addresses
    assert set(addresses) <= set(FIRST)
    return addresses


def begin_other(topology: Topology, connection: str = "home") -> list[str]:
    """A session of the second client: its addresses."""
    other = topology.lab.hosts["other"]
    other.charon.initiate("net", connection)
    return sorted(the_sa(other)["local-vips"])


def restart(topology: Topology, host: Host) -> None:
    """A gateway that died comes back."""
    before = host.charon.text().count(LOADED)
    topology.gateways[host.name].start(wait=False)
    host.charon.start()
    topology.gateways[host.name].wait_ready()
    wait_until(lambda: host.charon.text().count(LOADED) == before + len(FIRST), "the pools")
    wait_until(lambda: given_out(topology, host.name), "addresses")


def test_a_restarted_gateway_gives_out_no_address_of_a_session_that_is_elsewhere(topology: Topology) -> None:
    other = topology.lab.hosts["other"]
    mine = first(topology)
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    restart(topology, topology.gw1)
    assert placeholders(topology, "gw1") == mine
    other.charon.initiate("net", "home")
    assert the_sa(other)["local-vips"] != [FIRST]
    assert counter(topology, "gw1", "duplicate_addresses_total") == 0
    # placeholders are no SAs to anything else
    assert [sorted(sa["virtual_ips"]) for sa in status(topology, "gw1")["sas"]] == [sorted(the_sa(other)["local-vips"])]
    # and the session can come back
    done = topology.agent.command("resume", "--json", "--to", topology.gw1.address)
    assert json.loads(done.stdout)["result"] == "resumed"
    assert sorted(the_sa(topology.client)["local-vips"]) == mine
    wait_until(lambda: placeholders(topology, "gw1") == [], "the end of the placeholder")
    assert topology.client.ping(SERVER) == 3
    # its address is still its own
    other.swanctl("--terminate", "--ike", "home", "--force")
    wait_until(lambda: len(established(topology.gw1)) == 1, "the end of the other session")
    other.charon.initiate("net", "home")
    assert the_sa(other)["local-vips"] != [FIRST]


def test_a_session_that_moved_away_keeps_its_address_at_the_gateway_that_it_left(topology: Topology) -> None:
    other = topology.lab.hosts["other"]
    mine = first(topology)
    done = topology.agent.command("resume", "--json", "--to", topology.gw2.address)
    assert json.loads(done.stdout)["result"] == "resumed"
    wait_until(lambda: not established(topology.gw1), "the end of the old SA")
    wait_until(lambda: placeholders(topology, "gw1") == mine, "the placeholder")
    other.charon.initiate("net", "home")
    assert the_sa(other)["local-vips"] != [FIRST]


def test_an_address_is_free_again_once_its_session_has_ended_elsewhere(topology: Topology) -> None:
    mine = first(topology)
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    restart(topology, topology.gw1)
    assert placeholders(topology, "gw1") == mine
    topology.client.swanctl("--terminate", "--ike-id", the_sa(topology.client)["uniqueid"])
    wait_until(lambda: placeholders(topology, "gw1") == [], "the end of the placeholder")
    assert begin_other(topology) == mine


def test_a_sidecar_that_was_restarted_knows_the_placeholders_of_the_one_before(topology: Topology) -> None:
    mine = first(topology)
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    restart(topology, topology.gw1)
    topology.gateways["gw1"].stop()
    topology.gateways["gw1"].start()
    wait_until(lambda: counter(topology, "gw1", "placeholders") > 0, "the placeholder")
    assert placeholders(topology, "gw1") == mine
    assert counter(topology, "gw1", "ike_sas") == 0


def test_while_many_sessions_come_and_go_the_placeholder_stays_passive(topology: Topology) -> None:
    other = topology.lab.hosts["other"]
    mine = first(topology)
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    restart(topology, topology.gw1)
    begin_other(topology, "home-gw2")
    for gateway in (topology.gw1, topology.gw2) * 9:
        done = other.sidecars[0].command("resume", "--json", "--to", gateway.address)
        assert json.loads(done.stdout)["result"] == "resumed"
        assert set(mine) <= set(placeholders(topology, "gw1"))


def test_a_session_that_moved_has_an_address_of_its_gateways_own_pool_after_its_reauthentication(
    topology: Topology,
) -> None:
    mine = first(topology)
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
    moved = the_sa(topology.client)
    wait_until(lambda: placeholders(topology, "gw1") == mine, "the placeholder")
    topology.client.swanctl("--rekey", "--ike-id", moved["uniqueid"], "--reauth")
    wait_until(
        lambda: [spis(sa) for sa in established(topology.client)] not in ([], [spis(moved)]), "the reauthentication"
    )
    of_gw2 = [vip.replace("20.1.", "20.2.").replace(":1::", ":2::") for vip in mine]
    assert sorted(the_sa(topology.client)["local-vips"]) == of_gw2
    wait_until(lambda: topology.client.ping(SERVER, count=1) == 1, "traffic with the new address")
    # and the first address is free again
    wait_until(lambda: placeholders(topology, "gw1") == [], "the end of the placeholder")


def reauthenticated(topology: Topology, before: tuple[str, str]) -> bool:
    """Whether the client has one IKE_SA, and another one than before."""
    found = [spis(sa) for sa in established(topology.client)]
    return len(found) == 1 and found != [before]
