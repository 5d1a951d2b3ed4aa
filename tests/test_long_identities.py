"""Clients whose identity is longer than the 255 octets that charon's ha plugin has a length for.

What lies behind them reads as attributes of the HA message, of the client's choice. Such a session works, and is
neither stored nor resumed; others beside it are not disturbed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from bridge.charon.ha_codec import encode
from bridge.charon.ha_message import Attr, MessageType
from bridge.lab import Lab, Topology, standard
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.pki import certify
from bridge.lab.topology import SITE, client_host
from bridge.stub.types import Endpoint, Identity
from failover_support import fresh, status, the_sa

pytestmark = pytest.mark.lab

ADMIN = b"admin@corp.example"
LONG_DN = "C=CH, O=Example, " + ", ".join(f"OU={letter * 60}" for letter in "abcde") + ", CN=client.example.org"
EAP = """
secrets {
    eap-someone { id = someone
        secret = "of this lab only"
    }
}
"""


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab with certificates, and EAP for those who want it."""
    with Lab() as lab:
        built = standard(lab, start=False)
        built.agent.config["resume_on_down"] = False
        vpn = ("C=CH, O=Example, CN=vpn.example.org", "vpn.example.org")
        certify("ecdsa", {built.gw1: vpn, built.gw2: vpn, built.client: (LONG_DN, "client.example.org")})
        for host in (built.gw1, built.gw2, built.client):
            host.configure(EAP, "eap.conf")
        built.start()
        yield built


@pytest.fixture(scope="module")
def neighbour(topology: Topology) -> Host:
    """Another client, without a sidecar."""
    host = client_host(topology.lab, "other", "192.168.50.11", topology.secret)
    host.charon.start()
    return host


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def attributes(*values: tuple[Attr, Any]) -> bytes:
    """Attributes as the ha plugin of strongSwan 5.9.8 writes them."""
    return encode(3, MessageType.IKE_UPDATE, values)[2:]


def overflowing(octets: int, behind: bytes) -> str:
    """A key ID of so many octets: those behind the length that the ha plugin writes are these, as swanctl has it."""
    identity = b"C" * (octets & 0xFF) + behind
    assert len(identity) == octets
    return f"@#{identity.hex()}"


def filled(octets: int, *values: tuple[Attr, Any]) -> bytes:
    """So many octets of attributes: these, and behind them one that takes what is left."""
    named = attributes(*values)
    return attributes((Attr.NONCE_I, bytes(octets - len(named) - 3))) + named


ADMIN_WITH_ADDRESS = filled(256, (Attr.REMOTE_ID, Identity(3, ADMIN)), (Attr.REMOTE_VIP, Endpoint("10.20.2.77", 0)))
ADMIN_BY_EAP = attributes((Attr.REMOTE_EAP_ID, Identity(3, ADMIN.ljust(253))))

PSK: dict[str, str] = {"local.auth": "psk", "remote.auth": "psk"}
CASES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "another identity and address, PSK": (PSK, PSK | {"local.id": overflowing(309, ADMIN_WITH_ADDRESS)}),
    "another EAP identity, PSK": (PSK, PSK | {"local.id": overflowing(300, ADMIN_BY_EAP)}),
    "another identity and address, EAP": (
        {"local.auth": "pubkey", "local.certs": "ecdsa.pem", "remote.auth": "eap-mschapv2", "remote.eap_id": "%any"},
        {
            "local.auth": "eap-mschapv2",
            "local.eap_id": "someone",
            "local.id": overflowing(309, ADMIN_WITH_ADDRESS),
            "remote.auth": "pubkey",
        },
    ),
    "honest, PSK": (PSK, PSK | {"local.id": f"@#{os.urandom(289).hex()}"}),
    "honest, a certificate": (
        {"local.auth": "pubkey", "local.certs": "ecdsa.pem", "remote.auth": "pubkey"},
        {"local.auth": "pubkey", "local.certs": "ecdsa.pem", "local.id": f'"{LONG_DN}"', "remote.auth": "pubkey"},
    ),
}


def configure(topology: Topology, gateway: Mapping[str, str], client: Mapping[str, str]) -> None:
    for host, name, own in ((topology.gw1, "gw", gateway), (topology.client, "home", client)):
        named = {"local.id": "vpn.example.org"} if host is topology.gw1 else {"remote.id": "vpn.example.org"}
        settings = {f"connections.{name}.{key}": value for key, value in (named | dict(own)).items()}
        host.configure(render(settings) + "\n", "zz.conf")
        host.charon.load()


def lines(topology: Topology, event: str) -> list[str]:
    return [line for line in topology.gateways["gw1"].text().splitlines() if f"event={event}" in line]


@pytest.mark.parametrize("case", CASES)
def test_a_session_with_a_long_identity_works_and_is_neither_stored_nor_another_ones(
    topology: Topology, neighbour: Host, case: str
) -> None:
    configure(topology, PSK, PSK)
    neighbour.charon.initiate("net", "home")
    [stub] = wait_for_stubs(topology, 1)
    children = list(the_sa(neighbour)["child-sas"])
    configure(topology, *CASES[case])
    resyncs, refused = len(lines(topology, "resync")), len(lines(topology, "sa-not-resumable"))
    unresumable = status(topology, "gw1")["charon"]["unresumable"]
    topology.connect()
    sa = the_sa(topology.client)
    wait_until(lambda: len(lines(topology, "sa-not-resumable")) > refused, "the line that names the SA")
    wait_until(lambda: rows(topology, sa) == [(False, None)], "the SA as one that is not resumable")
    assert topology.bank.stubs() == [stub]
    assert topology.client.ping(SITE) == 3
    [line] = lines(topology, "sa-not-resumable")[refused:]
    assert sa["initiator-spi"] in line
    assert sa["responder-spi"] in line
    assert status(topology, "gw1")["charon"]["unresumable"] == unresumable + 1
    assert len(lines(topology, "resync")) == resyncs
    assert list(the_sa(neighbour)["child-sas"]) == children
    # a rekey makes another one of it, which is none either
    topology.client.swanctl("--rekey", "--ike", "home")
    wait_until(lambda: the_sa_of(topology) not in ("", sa["responder-spi"]), "the rekeyed SA")
    wait_until(lambda: len(lines(topology, "sa-not-resumable")) == refused + 2, "the line that names the new SA")
    assert topology.bank.stubs() == [stub]
    assert len(lines(topology, "resync")) == resyncs
    assert list(the_sa(neighbour)["child-sas"]) == children
    neighbour.swanctl("--terminate", "--ike", "home")


def wait_for_stubs(topology: Topology, count: int) -> list[str]:
    wait_until(lambda: len(topology.bank.stubs()) == count, "the stubs")
    return topology.bank.stubs()


def rows(topology: Topology, sa: dict[str, Any]) -> list[tuple[bool, str | None]]:
    """What the sidecar tells of an SA: is it resumable, and whose is it."""
    told = status(topology, "gw1")["sas"]
    return [(row["resumable"], row["remote_id"]) for row in told if row["spi_r"] == sa["responder-spi"]]


def the_sa_of(topology: Topology) -> str:
    found = [sa["responder-spi"] for sa in topology.client.charon.sas() if sa["state"] == "ESTABLISHED"]
    return found[0] if len(found) == 1 else ""
