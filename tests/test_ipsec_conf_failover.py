"""Hosts that starter runs from ipsec.conf, the gateways too: what charon learns by its stroke plugin is resumed as what
it learns from swanctl.conf."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.topology import SITE
from failover_support import agent_with, connect, established, fresh, last_move, replaced, resume, spis, status, the_sa

APPARMOR = Path("/sys/module/apparmor/parameters/enabled")

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(
        APPARMOR.exists() and APPARMOR.read_text().strip() == "Y",
        reason="AppArmor confines starter's charon to the files of the machine itself",
    ),
]

CLIENT = """\
config setup

conn %default
    keyexchange = ikev2
    left = 192.168.50.10
    leftid = client@example.org
    leftsourceip = %config
    rightid = vpn.example.org
    rightsubnet = 10.10.0.0/16
    authby = secret
    dpddelay = 2s
    dpdaction = clear
    keyingtries = 1

# a connection in ipsec.conf is one CHILD_SA, of the same name
conn net
    right = 192.168.50.1
    auto = add

conn net-gw2
    right = 192.168.50.2
    auto = add
"""
GATEWAY = """\
config setup

conn gw
    keyexchange = ikev2
    left = 192.168.50.{number}
    leftid = vpn.example.org
    leftsubnet = 10.10.0.0/16
    right = %any
    rightid = *@example.org
    rightsourceip = 10.20.{number}.0/24
    authby = secret
    auto = add
"""
CONNECTIONS = {"192.168.50.1": "net", "192.168.50.2": "net-gw2"}


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab without a line in swanctl.conf."""
    with Lab() as lab:
        topology = standard(lab, start=False)
        for number, host in enumerate((topology.client, topology.gw1, topology.gw2)):
            host.charon.ipsec_conf = True
            for file in [host.etc / "swanctl/swanctl.conf", *(host.etc / "swanctl/conf.d").iterdir()]:
                file.unlink()
            host.write("/etc/ipsec.secrets", f': PSK "{topology.secret}"\n', mode=0o600)
            host.write("/etc/ipsec.conf", GATEWAY.format(number=number) if number else CLIENT)
        topology.agent.config["gateways"] = [{"address": it, "connection": name} for it, name in CONNECTIONS.items()]
        topology.start()
        yield topology


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def test_a_session_goes_on_at_the_other_gateway_by_itself(topology: Topology) -> None:
    before = connect(topology, "net")
    topology.kill_gateway(topology.gw1)
    wait_until(lambda: [sa["name"] for sa in established(topology.client)] == ["net-gw2"], "the session at gw2", 60)
    wait_until(lambda: topology.client.ping(SITE, count=1) == 1, "traffic")
    wait_until(lambda: last_move(topology).get("result") == "resumed", "the attempt's end")
    sa = the_sa(topology.client)
    assert sa["local-vips"] == before["local-vips"]
    assert [it["connection"] for it in status(topology, "gw2")["sas"]] == ["gw"]


def test_a_resumed_session_is_rekeyed_from_either_side(topology: Topology) -> None:
    connect(topology, "net")
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    for host, connection in ((topology.client, "net-gw2"), (topology.gw2, "gw")):
        old = spis(the_sa(topology.client))
        host.swanctl("--rekey", "--ike", connection)
        wait_until(lambda old=old: replaced(topology.client, old), "new keys")  # type: ignore[misc]
        assert topology.client.ping(SITE) == 3


def test_without_a_stub_the_other_connection_makes_a_handshake(topology: Topology) -> None:
    connect(topology, "net")
    topology.kill_gateway(topology.gw1)
    topology.bank.cli("FLUSHDB")
    outcome = resume(topology)
    assert (outcome["result"], outcome["connection"], outcome["children"]) == ("fallback", "net-gw2", ["net-gw2"])
    assert topology.client.ping(SITE) == 3


def test_without_configuration_its_connections_are_the_vpn(topology: Topology) -> None:
    with agent_with(topology, gateways=[]):
        connect(topology, "net")
        topology.kill_gateway(topology.gw1)
        wait_until(lambda: [sa["name"] for sa in established(topology.client)] == ["net-gw2"], "the session at gw2", 60)
        wait_until(lambda: last_move(topology).get("result") == "resumed", "the attempt's end")


def test_check_finds_nothing_to_object_to_and_names_ipsec_conf_where_a_line_has_to_change(topology: Topology) -> None:
    done = topology.agent.command("check", "--json", check=False)
    findings = json.loads(done.stdout)
    assert done.returncode == 0, findings
