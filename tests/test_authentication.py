"""How the first IKE_SA was authenticated, and as whom: all of it goes on after a resumption, and one more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.charon import render
from bridge.lab.pki import KINDS, certify
from bridge.lab.topology import SITE
from failover_support import connect, fresh, resume, the_sa

pytestmark = pytest.mark.lab

GATEWAY_DN, CLIENT_DN = "C=CH, O=Example, CN=vpn.example.org", "C=CH, O=Example, CN=client.example.org"
SECRETS = """
secrets {
    eap-someone { id = someone
        secret = "of this lab only"
    }
}
"""


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab with certificates of every kind."""
    with Lab() as lab:
        built = standard(lab, start=False)
        built.agent.config["resume_on_down"] = False
        for kind in KINDS:
            hosts = dict.fromkeys((built.gw1, built.gw2), (GATEWAY_DN, "vpn.example.org"))
            certify(kind, hosts | {built.client: (CLIENT_DN, "client.example.org")})
        for host in (built.gw1, built.gw2, built.client):
            host.configure(SECRETS, "eap.conf")
        built.start()
        yield built


Settings = Mapping[str, str]


def configure(topology: Topology, gateway: Settings, client: Settings) -> None:
    """Override parts of the connections, those of the client for both gateways, and load them."""
    for host, name, settings in (
        (topology.gw1, "gw", gateway),
        (topology.gw2, "gw", gateway),
        (topology.client, "home", client),
    ):
        host.configure(
            render({f"connections.{name}.{key}": value for key, value in settings.items()}) + "\n", "zz.conf"
        )
        host.charon.load()


def moved(topology: Topology, about: str, name: str, tell: Callable[..., None]) -> tuple[dict[str, Any], ...]:
    """A session to gw2 and back to gw1, with traffic; the gateway's IKE_SA before, in between and after."""
    fresh(topology)
    connect(topology)
    seen = [the_sa(topology.gw1)]
    topology.kill_gateway(topology.gw1)
    outcome = resume(topology)
    tell(about, name, outcome)
    assert (outcome["result"], outcome["gateway"]) == ("resumed", topology.gw2.address)
    assert topology.client.ping(SITE) == 3
    seen.append(the_sa(topology.gw2))
    sidecar = topology.gateways["gw1"]
    sidecar.start(wait=False)
    topology.gw1.charon.start()
    sidecar.wait_ready()
    again = resume(topology, "--to", topology.gw1.address)
    assert again["result"] == "resumed"
    assert topology.client.ping(SITE) == 3
    seen.append(the_sa(topology.gw1))
    return tuple(seen)


def who(sa: dict[str, Any]) -> tuple[str | None, ...]:
    return tuple(sa.get(key) for key in ("local-id", "remote-id", "remote-eap-id"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_authenticated_by_certificates_goes_on(
    topology: Topology, kind: str, tell: Callable[..., None]
) -> None:
    side = {"local.auth": "pubkey", "local.certs": f"{kind}.pem", "remote.auth": "pubkey"}
    configure(
        topology,
        side | {"local.id": "vpn.example.org"},
        side | {"local.id": f'"{CLIENT_DN}"', "remote.id": "vpn.example.org"},
    )
    before, between, after = moved(topology, "authentication", kind, tell)
    assert before["remote-id"] == CLIENT_DN
    assert who(before) == who(between) == who(after)


@pytest.mark.parametrize("method", ["eap-mschapv2", "eap-tls"])
def test_a_session_authenticated_by_eap_goes_on_with_its_eap_identity(
    topology: Topology, method: str, tell: Callable[..., None]
) -> None:
    gateway = {"local.auth": "pubkey", "local.certs": "ecdsa.pem", "local.id": "vpn.example.org"}
    client = {"remote.auth": "pubkey", "remote.id": "vpn.example.org", "local.auth": method}
    if method == "eap-tls":
        own = {"local.certs": "ecdsa.pem", "local.id": "someone@example.org", "local.eap_id": "client.example.org"}
        identity = "client.example.org"
    else:
        own = {"local.id": "someone@example.org", "local.eap_id": "someone"}
        identity = "someone"
    configure(topology, gateway | {"remote.auth": method, "remote.eap_id": "%any"}, client | own)
    before, between, after = moved(topology, "authentication", method, tell)
    assert before["remote-eap-id"] == identity
    assert who(before) == who(between) == who(after)


@pytest.mark.parametrize(
    "identity",
    [
        "192.168.50.10",
        "fd00:50::10",
        "client.example.org",
        "someone@example.org",
        "C=CH, O=Example Corp., CN=someone",
        "@#0badcafe",
    ],
    ids=["ID_IPV4_ADDR", "ID_IPV6_ADDR", "ID_FQDN", "ID_RFC822_ADDR", "ID_DER_ASN1_DN", "ID_KEY_ID"],
)
def test_a_client_of_any_type_of_identity_keeps_it(
    topology: Topology, identity: str, tell: Callable[..., None]
) -> None:
    gateway = {"local.auth": "psk", "local.id": "vpn.example.org", "remote.auth": "psk"}
    client = {"local.auth": "psk", "local.id": f'"{identity}"', "remote.auth": "psk", "remote.id": "vpn.example.org"}
    configure(topology, gateway, client)
    before, between, after = moved(topology, "identity", identity, tell)
    assert before["remote-id"].lstrip("@#").replace(":", "") == identity.lstrip("@#").replace(":", "")
    assert who(before) == who(between) == who(after)
