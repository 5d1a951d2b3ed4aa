"""Authentication has an end, wherever a session is resumed meanwhile (RFC 4478; RFC 5723 section 6.2)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until
from bridge.lab.demo import Ping
from bridge.lab.pki import certify
from bridge.lab.topology import SITE
from bridge.stub.stub import Stub
from failover_support import connect, counter, established, fresh, last_move, rekeyed, resume, spis, the_sa
from families_support import address_of, reach_over_ipv6
from probe_support import stub_of_key
from releases_support import OTHERS, on_all

pytestmark = pytest.mark.lab

PERIOD = 20
"""seconds that a client is authenticated for"""
LONGER = 90
"""what the other gateway's policy is"""
JITTER = 2
OVER = 4
LOST_AT_MOST = 60
"""echo requests, 50 ms apart, that a break-before-make reauthentication or a move may cost on a busy machine"""

COMMON = {"over_time": f"{OVER}s", "rand_time": f"{JITTER}s"}
GATEWAY = COMMON | {"local.auth": "pubkey", "local.certs": "ecdsa.pem", "local.id": "vpn.example.org"}
CLIENT = COMMON | {"remote.auth": "pubkey", "remote.id": "vpn.example.org"}
METHODS = {
    "eap": (
        {"remote.auth": "eap-mschapv2", "remote.eap_id": "%any"},
        {"local.auth": "eap-mschapv2", "local.id": "someone@example.org", "local.eap_id": "someone"},
    ),
    "certificates": (
        {"remote.auth": "pubkey"},
        {"local.auth": "pubkey", "local.certs": "ecdsa.pem", "local.id": '"CN=client.example.org"'},
    ),
}
SECRETS = 'secrets { eap-someone { id = someone\n secret = "of this lab only" } }\n'


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("eap", "IPv4", None), id="eap"),
        pytest.param(("certificates", "IPv6", None), id="certificates, IPv6"),
        *(pytest.param(("eap", "IPv4", name), marks=pytest.mark.releases, id=f"eap, {name}") for name in OTHERS),
    ],
)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab with a policy of reauthentication on the gateways, and none on the client."""
    method, family, release = request.param
    with Lab() as lab:
        built = standard(lab, start=False, releases=on_all(release))
        built.agent.config["resume_on_down"] = False
        hosts = dict.fromkeys((built.gw1, built.gw2), ("CN=vpn.example.org", "vpn.example.org"))
        certify("ecdsa", hosts | {built.client: ("CN=client.example.org", "client.example.org")})
        gateway, client = METHODS[method]
        for host, name, settings in (
            (built.gw1, "gw", GATEWAY | {"reauth_time": f"{PERIOD}s"} | gateway),
            (built.gw2, "gw", GATEWAY | {"reauth_time": f"{LONGER}s"} | gateway),
            (built.client, "home", CLIENT | client),
        ):
            host.configure(SECRETS, "eap.conf")
            host.configure(
                render({f"connections.{name}.{key}": value for key, value in settings.items()}) + "\n", "zz.conf"
            )
        if family == "IPv6":
            reach_over_ipv6(built, built.client)
        built.start()
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def stub(topology: Topology) -> Stub:
    """The stub of the one session."""
    [key] = topology.bank.stubs()
    return stub_of_key(topology, key)


def until(topology: Topology) -> int:
    """When the authentication of the one session ends."""
    return stub(topology).authenticated_until


def asked(topology: Topology) -> int:
    return topology.agent.text().count("reauthentication-requested")


def test_a_session_that_moves_is_reauthenticated_in_time_period_after_period(topology: Topology) -> None:
    connect(topology)
    ping = Ping(topology.client, SITE)
    for _ in range(2):
        first = until(topology)
        assert PERIOD - JITTER - 2 <= first - stub(topology).established <= PERIOD + 2
        for gateway in (topology.gw2, topology.gw1):
            assert resume(topology, "--to", address_of(topology, gateway))["result"] == "resumed"
            wait_until(lambda: len(topology.bank.stubs()) == 1, "the one stub")
            # inherited, whatever the new gateway's own policy would give to a fresh session
            assert abs(until(topology) - first) <= JITTER
        before, questions = spis(the_sa(topology.client)), asked(topology)
        wait_until(lambda questions=questions: asked(topology) > questions, "the reauthentication", timeout=PERIOD + 10)  # type: ignore[misc]
        assert time.time() < first
        wait_until(
            lambda before=before: [spis(sa) for sa in established(topology.client)] not in ([], [before]),  # type: ignore[misc]
            "the new IKE_SA",
        )
        wait_until(lambda: len(topology.bank.stubs()) == 1, "the one stub")
        wait_until(lambda first=first: until(topology) > first + JITTER, "the new end")  # type: ignore[misc]
    seen = ping.answers()
    wait_until(lambda: ping.answers() >= seen + 20, "traffic goes on")
    answered = sorted(ping.stop().answered)
    lost = answered[-1] - answered[0] + 1 - len(answered)
    print("lost:", lost)
    assert lost <= 6 * LOST_AT_MOST
    assert "authentication-lapsed" not in topology.agent.text()


def test_a_gateway_ends_what_outlives_its_authentication(topology: Topology) -> None:
    connect(topology)
    assert resume(topology, "--to", address_of(topology, topology.gw2))["result"] == "resumed"
    wait_until(lambda: len(topology.bank.stubs()) == 1, "the one stub")
    end, ended = until(topology), counter(topology, "gw2", "authentication_ended_total")
    # nobody is there who would have charon authenticate again
    topology.agent.stop()
    wait_until(lambda: not topology.gw2.charon.sas(), "the end of the session", timeout=PERIOD + 15)
    assert time.time() >= end
    wait_until(lambda: counter(topology, "gw2", "authentication_ended_total") == ended + 1, "it is counted")
    wait_until(lambda: not topology.client.charon.sas(), "the DELETE")
    wait_until(lambda: not topology.bank.stubs(), "the end of the stub")


def test_a_client_whose_session_was_ended_for_that_begins_a_handshake(topology: Topology) -> None:
    connect(topology)
    assert resume(topology, "--to", address_of(topology, topology.gw2))["result"] == "resumed"
    # its sidecar has no time until it is too late
    os.kill(topology.agent.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: not topology.gw2.charon.sas(), "the end of the session", timeout=PERIOD + 15)
    finally:
        os.kill(topology.agent.pid, signal.SIGCONT)
    wait_until(lambda: last_move(topology).get("reason") == "authentication-ended", "the handshake")
    assert last_move(topology)["result"] == "fallback"
    assert topology.client.ping(SITE) == 3
    assert "authentication-lapsed" in topology.agent.text()


def test_the_end_of_authentication_survives_a_rekeying(topology: Topology) -> None:
    connect(topology)
    assert resume(topology, "--to", address_of(topology, topology.gw2))["result"] == "resumed"
    wait_until(lambda: len(topology.bank.stubs()) == 1, "the one stub")
    first, before = until(topology), the_sa(topology.gw2)
    topology.gw2.swanctl("--rekey", "--ike-id", before["uniqueid"])
    wait_until(lambda: rekeyed(topology.gw2, before), "the rekeying")
    wait_until(
        lambda: len(topology.bank.stubs()) == 1 and spis(the_sa(topology.gw2))[0] in topology.bank.stubs()[0],
        "its stub",
    )
    assert abs(until(topology) - first) <= JITTER


@pytest.mark.parametrize(("pool", "keeps"), [("10.20.1.0/24", True), ("10.20.2.0/24", False)])
def test_the_address_after_the_first_reauthentication_is_the_same_where_the_pool_has_it(
    topology: Topology, pool: str, keeps: bool
) -> None:
    topology.gw2.configure(f"pools {{ clients {{ addrs = {pool} }} }}\n", "pool.conf")
    topology.gw2.swanctl("--load-pools")
    connect(topology)
    assert resume(topology, "--to", address_of(topology, topology.gw2))["result"] == "resumed"
    before = the_sa(topology.client)
    topology.client.swanctl("--rekey", "--reauth", "--ike-id", before["uniqueid"])
    wait_until(
        lambda: [spis(sa) for sa in established(topology.client)] not in ([], [spis(before)]), "the reauthentication"
    )
    after = the_sa(topology.client)
    assert after["remote-host"] == address_of(topology, topology.gw2)
    assert (after["local-vips"] == before["local-vips"]) is keeps
