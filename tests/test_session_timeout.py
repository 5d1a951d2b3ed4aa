"""A RADIUS server limits a session (Session-Timeout): it ends, or is authenticated again, wherever it was resumed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until
from bridge.lab.pki import certify
from bridge.lab.topology import SITE
from bridge.stub.stub import Stub
from failover_support import connect, established, fresh, resume, spis, the_sa
from probe_support import stub_of_key
from radius_support import Radius
from releases_support import RELEASED, on_all

pytestmark = pytest.mark.lab

SESSION_TIMEOUT = 20
"""seconds"""
OVER = 4
PASSWORD = "of this lab only"
USERS = f'someone Cleartext-Password := "{PASSWORD}"\n\tSession-Timeout = {SESSION_TIMEOUT}\n'
RADIUS: dict[str, Radius] = {}
"""the server of each gateway"""
GATEWAY = {
    "over_time": f"{OVER}s",
    "local.auth": "pubkey",
    "local.certs": "ecdsa.pem",
    "local.id": "vpn.example.org",
    "remote.auth": "eap-radius",
    "remote.eap_id": "%any",
}
CLIENT = {
    "over_time": f"{OVER}s",
    "remote.auth": "pubkey",
    "remote.id": "vpn.example.org",
    "local.auth": "eap-md5",
    "local.id": "someone@example.org",
    "local.eap_id": "someone",
}


@pytest.fixture(scope="module", params=RELEASED)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab, its clients authenticated by a FreeRADIUS on each gateway, which have no policy."""
    with Lab() as lab:
        built = standard(lab, start=False, releases=on_all(request.param))
        built.agent.config["resume_on_down"] = False
        hosts = dict.fromkeys((built.gw1, built.gw2), ("CN=vpn.example.org", "vpn.example.org"))
        certify("ecdsa", hosts | {built.client: ("CN=client.example.org", "client.example.org")})
        for host in (built.gw1, built.gw2):
            radius = RADIUS[host.name] = Radius(host, USERS, accounting=True)
            radius.start()
        built.client.configure(f'secrets {{ eap-someone {{ id = someone\n secret = "{PASSWORD}" }} }}\n', "eap.conf")
        for host, name, settings in (
            (built.gw1, "gw", GATEWAY),
            (built.gw2, "gw", GATEWAY),
            (built.client, "home", CLIENT),
        ):
            text = render({f"connections.{name}.{key}": value for key, value in settings.items()})
            host.configure(text + "\n", "zz.conf")
        built.start()
        yield built


def stub(topology: Topology) -> Stub:
    """The stub of the one session."""
    [key] = topology.bank.stubs()
    return stub_of_key(topology, key)


def accounts(gateway: str) -> list[str]:
    """Start or Stop of each accounting request of a gateway's charon."""
    return [entry["Acct-Status-Type"] for entry in RADIUS[gateway].accounts()]


def until(topology: Topology) -> int:
    """When the authentication of the one session ends."""
    return stub(topology).authenticated_until


def test_a_session_timeout_counts_at_the_gateway_where_the_session_goes_on(topology: Topology) -> None:
    fresh(topology)
    connect(topology)
    # charon asks for a new authentication so long before the limit as it takes to end a session that has none
    first = until(topology)
    assert abs(first - stub(topology).established - (SESSION_TIMEOUT - OVER)) <= 3
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
    wait_until(lambda: len(topology.bank.stubs()) == 1, "the one stub")
    assert abs(until(topology) - first) <= 2
    before = spis(the_sa(topology.client))
    wait_until(
        lambda: [spis(sa) for sa in established(topology.client)] not in ([], [before]),
        "the new authentication",
        timeout=SESSION_TIMEOUT + 10,
    )
    assert time.time() <= first
    assert topology.client.ping(SITE) == 3


def test_charons_own_accounting_has_a_stop_where_the_session_moved_away_and_no_start_where_it_goes_on(
    topology: Topology,
) -> None:
    fresh(topology)
    for radius in RADIUS.values():
        radius.forget_accounts()
    connect(topology)
    wait_until(lambda: accounts("gw1") == ["Start"], "the Start")
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
    wait_until(lambda: accounts("gw1") == ["Start", "Stop"], "the Stop")
    start, stop = RADIUS["gw1"].accounts()
    assert stop["Acct-Session-Id"] == start["Acct-Session-Id"]
    assert int(stop["Acct-Input-Octets"]) == 3 * 84
    topology.client.swanctl("--terminate", "--ike-id", the_sa(topology.client)["uniqueid"])
    wait_until(lambda: not topology.gw2.charon.sas(), "the end of the session")
    assert accounts("gw2") == []
