"""The example programs for `hooks.session`: a real FreeRADIUS and real rules learn where each session is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.pki import certify
from bridge.lab.topology import SERVER
from bridge.service import shipped_files
from failover_support import connect, established, fresh, resume, spis, status, the_sa
from radius_support import SECRET, Radius
from releases_support import RELEASED, on_all

pytestmark = pytest.mark.lab

PASSWORD = "of this lab only"
NAME = "some'one%x"
FRAMED = "10.20.9.9"
USERS = f'"{NAME}" Cleartext-Password := "{PASSWORD}"\n\tFramed-IP-Address = {FRAMED}\n'
GATEWAY = {
    "local.auth": "pubkey",
    "local.certs": "ecdsa.pem",
    "local.id": "vpn.example.org",
    "remote.auth": "eap-radius",
    "remote.eap_id": "%any",
    "pools": "radius",
}
CLIENT = {
    "remote.auth": "pubkey",
    "remote.id": "vpn.example.org",
    "local.auth": "eap-md5",
    "local.id": "someone@example.org",
    "local.eap_id": f'"{NAME}"',
}
PROGRAM = "/etc/ike-sa-sync/session"
BOTH = """#!/bin/sh
set -e
event=$(cat)
for each in firewall radius-accounting; do
    printf '%s\\n' "$event" | /etc/ike-sa-sync/$each
done
"""


def connection(name: str, settings: dict[str, str]) -> str:
    """More of a connection, as swanctl.conf has it."""
    return render({f"connections.{name}.{key}": value for key, value in settings.items()}) + "\n"


@pytest.fixture(scope="module", params=RELEASED)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab. Users are authenticated, and get their addresses, by one FreeRADIUS on the bank's host, which
    has the accounts too; the gateways forward packets of clients whose session they have."""
    with Lab() as lab:
        built = standard(lab, start=False, releases=on_all(request.param))
        built.agent.config["resume_on_down"] = False
        certify(
            "ecdsa",
            dict.fromkeys((built.gw1, built.gw2), ("CN=vpn.example.org", "vpn.example.org"))
            | {built.client: ("CN=client.example.org", "client.example.org")},
        )
        server = Radius(built.bank.host, USERS, clients=(built.gw1, built.gw2))
        server.start()
        built.radius = server  # type: ignore[attr-defined]
        built.client.configure(f'secrets {{ eap-one {{ id = "{NAME}"\n secret = "{PASSWORD}" }} }}\n', "eap.conf")
        built.client.configure(
            render({f"connections.home.{key}": value for key, value in CLIENT.items()}) + "\n", "zz.conf"
        )
        for host in (built.gw1, built.gw2):
            host.configure(connection("gw", GATEWAY), "zz.conf")
            for name in ("firewall", "radius-accounting"):
                shutil.copy(shipped_files.path(f"strongswan-conf/hooks/{name}"), host.etc / "ike-sa-sync" / name)
            host.write(
                "/etc/ike-sa-sync/radius.conf",
                f"[radius]\nserver = {built.bank.host.address}:1813\nsecret = {SECRET}\n",
                0o600,
            )
            host.write(PROGRAM, BOTH, mode=0o755)
            host.run("nft", "-f", str(shipped_files.path("strongswan-conf/hooks/firewall.nft")))
            built.gateways[host.name].config["hooks"] = {"session": PROGRAM}
        built.start()
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)
    for host in (topology.gw1, topology.gw2):
        wait_until(lambda host=host: not admitted(host), "the ends of sessions")  # type: ignore[misc]
        wait_until(lambda host=host: not status(topology, host.name)["hooks"]["pending"], "the end of events")  # type: ignore[misc]
    server(topology).forget_accounts()


def server(topology: Topology) -> Radius:
    return topology.radius  # type: ignore[attr-defined, no-any-return]


def admitted(host: Host) -> list[str]:
    """The addresses that a gateway lets pass."""
    listed = host.run("nft", "list", "set", "inet", "vpn", "clients4").stdout
    return re.findall(r"\d+\.\d+\.\d+\.\d+", listed)


def accounts(topology: Topology) -> list[tuple[str, str]]:
    """(Start or Stop, session) of each request, in their order."""
    return [(entry["Acct-Status-Type"], entry["Acct-Session-Id"]) for entry in server(topology).accounts()]


def test_accounts_and_rules_follow_a_session_from_a_gateway_that_failed(topology: Topology) -> None:
    sa = connect(topology)
    first = f"{topology.gw1.address}/{sa['responder-spi']}"
    assert sa["local-vips"] == [FRAMED]
    wait_until(lambda: accounts(topology) == [("Start", first)], "the Start")
    assert admitted(topology.gw1) == [FRAMED]
    assert topology.client.ping(SERVER) == 3
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    now = the_sa(topology.client)
    # the address of the RADIUS server stays
    assert now["local-vips"] == [FRAMED]
    second = f"{topology.gw2.address}/{now['responder-spi']}"
    wait_until(lambda: accounts(topology)[1:] == [("Start", second), ("Stop", first)], "Start and Stop")
    assert admitted(topology.gw2) == [FRAMED]
    assert topology.client.ping(SERVER) == 3
    topology.client.swanctl("--terminate", "--ike-id", now["uniqueid"])
    wait_until(lambda: accounts(topology)[3:] == [("Stop", second)], "the last Stop")
    wait_until(lambda: not admitted(topology.gw2), "the address is taken out")
    start, *_, lost, last = server(topology).accounts()
    assert (start["User-Name"], start["Framed-IP-Address"], start["NAS-IP-Address"]) == (
        NAME,
        FRAMED,
        topology.gw1.address,
    )
    assert (lost["NAS-IP-Address"], lost["Acct-Terminate-Cause"]) == (topology.gw1.address, "NAS-Error")
    assert "Acct-Input-Octets" not in lost
    assert int(last["Acct-Input-Octets"]) == int(last["Acct-Output-Octets"]) == 3 * 84


def test_accounts_and_rules_follow_a_session_that_was_moved(topology: Topology) -> None:
    sa = connect(topology)
    first = f"{topology.gw1.address}/{sa['responder-spi']}"
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
    second = f"{topology.gw2.address}/{the_sa(topology.client)['responder-spi']}"
    wait_until(lambda: len(accounts(topology)) == 3, "Start and Stop")
    assert accounts(topology)[0] == ("Start", first)
    assert sorted(accounts(topology)[1:]) == [("Start", second), ("Stop", first)]
    [stop] = [entry for entry in server(topology).accounts() if entry["Acct-Status-Type"] == "Stop"]
    assert (stop["NAS-IP-Address"], int(stop["Acct-Input-Octets"])) == (topology.gw1.address, 3 * 84)
    wait_until(lambda: (admitted(topology.gw1), admitted(topology.gw2)) == ([], [FRAMED]), "the rules")
    assert topology.client.ping(SERVER) == 3
    # back, and without an end in between at the gateway that it comes to
    assert resume(topology, "--to", topology.gw1.address)["result"] == "resumed"
    assert resume(topology, "--to", topology.gw1.address)["result"] == "resumed"
    wait_until(lambda: len(accounts(topology)) == 7, "the accounts of two more moves")
    wait_until(lambda: (admitted(topology.gw1), admitted(topology.gw2)) == ([FRAMED], []), "the rules")
    assert topology.client.ping(SERVER) == 3


def test_an_address_of_the_radius_server_stays_after_a_move_and_a_reauthentication(topology: Topology) -> None:
    connect(topology)
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
    moved = the_sa(topology.client)
    topology.client.swanctl("--rekey", "--ike-id", moved["uniqueid"], "--reauth")
    wait_until(lambda: the_sa_or_none(topology) not in (None, spis(moved)), "the reauthentication")
    assert the_sa(topology.client)["local-vips"] == [FRAMED]
    wait_until(lambda: admitted(topology.gw2) == [FRAMED], "the rule")
    assert topology.client.ping(SERVER) == 3


def the_sa_or_none(topology: Topology) -> tuple[str, str] | None:
    """The SPIs of the client's one IKE_SA."""
    found = [spis(sa) for sa in established(topology.client)]
    return found[0] if len(found) == 1 else None


def test_a_packet_of_a_client_whose_session_is_elsewhere_is_dropped(topology: Topology) -> None:
    connect(topology)
    wait_until(lambda: admitted(topology.gw1) == [FRAMED], "the rule")
    topology.gw1.run("nft", "delete", "element", "inet", "vpn", "clients4", f"{{ {FRAMED} }}")
    assert topology.client.ping(SERVER, timeout=0.5) == 0
