"""VPNs that charon's connections show (bridge.charon.vpns), and which connections fit a session."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import ChildConfig, ConnectionInfo
from bridge.charon.vpns import LearnedVpns, fits, vpns_of
from bridge.config import ClientConfig, GatewayEntry, VpnConfig
from bridge.ike.transforms import Suite
from bridge.stub.types import Endpoint, Identity

NET = (ChildConfig("net", ("dynamic",), ("10.10.0.0/16",)),)


def connection(name: str, *addresses: str, **more: Any) -> ConnectionInfo:
    info = ConnectionInfo(name, 14400, 0, NET, remote_addresses=addresses, remote_ids=("vpn.example.org",))
    return info._replace(**more)


def learned(*connections: ConnectionInfo) -> LearnedVpns:
    loaded = {info.name: info for info in connections}
    return LearnedVpns(lambda: loaded, True)


def gateways(vpns: LearnedVpns, name: str) -> list[tuple[str, str]]:
    vpn = vpns.of(name)
    return [(entry.address, entry.connection) for entry in vpn.gateways] if vpn is not None else []


def test_connections_with_the_same_peer_and_the_same_children_are_of_one_vpn() -> None:
    vpns = learned(connection("home", "192.0.2.1"), connection("home-gw2", "192.0.2.2"))
    assert gateways(vpns, "home-gw2") == [("192.0.2.1", "home"), ("192.0.2.2", "home-gw2")]
    assert [vpn.name for vpn in vpns] == ["home"]


def test_children_that_have_the_names_of_their_connections_are_the_same_as_in_ipsec_conf() -> None:
    loaded = [
        connection(name, address, children=(NET[0]._replace(name=name),))
        for name, address in (("net", "192.0.2.1"), ("net-gw2", "192.0.2.2"))
    ]
    assert gateways(learned(*loaded), "net") == [("192.0.2.1", "net"), ("192.0.2.2", "net-gw2")]


@pytest.mark.parametrize(
    "other",
    [
        connection("work", "192.0.2.3", remote_ids=("vpn.example.net",)),
        connection("work", "192.0.2.3", children=(ChildConfig("net", ("dynamic",), ("10.30.0.0/16",)),)),
        connection("work", "192.0.2.3", children=(ChildConfig("voice", ("dynamic",), ("10.10.0.0/16",)),)),
    ],
    ids=["another peer", "another network", "another child"],
)
def test_others_are_vpns_of_their_own(other: ConnectionInfo) -> None:
    vpns = learned(connection("home", "192.0.2.1"), other)
    assert [vpn.name for vpn in vpns] == ["home", "work"]
    assert gateways(vpns, "work") == [("192.0.2.3", "work")]


def test_connections_whose_peer_may_be_anyone_are_not_taken_together() -> None:
    vpns = learned(connection("a", "192.0.2.1", remote_ids=()), connection("b", "192.0.2.2", remote_ids=()))
    assert [vpn.name for vpn in vpns] == ["a", "b"]


def test_a_connection_without_an_address_to_go_to_is_of_no_vpn() -> None:
    vpns = learned(connection("gw"), connection("branches", "192.0.2.0/24", "192.0.2.1-192.0.2.9"))
    assert list(vpns) == []
    assert vpns.of("gw") is None


def test_every_address_and_name_of_a_connection_is_a_gateway() -> None:
    vpns = learned(connection("home", "192.0.2.1", "vpn.example.org", "192.0.2.0/24"))
    assert gateways(vpns, "home") == [("192.0.2.1", "home"), ("vpn.example.org", "home")]


def test_gateways_that_were_named_come_last_and_once() -> None:
    vpns = learned(connection("home", "192.0.2.1"))
    assert gateways(vpns, "home") == [("192.0.2.1", "home")]
    vpns.named("home", ["192.0.2.1", "192.0.2.2"])
    assert gateways(vpns, "home") == [("192.0.2.1", "home"), ("192.0.2.2", "home")]


def test_a_charon_that_is_away_changes_nothing() -> None:
    loaded = {"home": connection("home", "192.0.2.1")}
    vpns = LearnedVpns(lambda: loaded, True)
    assert gateways(vpns, "home")
    loaded = {}
    assert gateways(vpns, "home")


def test_what_is_configured_counts_alone() -> None:
    entry = GatewayEntry("192.0.2.1", "home")
    config = ClientConfig(gateways=(entry,), vpns={"work": VpnConfig((GatewayEntry("192.0.2.3", "work"),), False)})
    vpns = vpns_of(config, lambda: {"other": connection("other", "192.0.2.9")})
    vpns.named("home", ["192.0.2.7"])
    assert [(vpn.name, len(vpn.gateways), vpn.resume_on_down) for vpn in vpns] == [
        ("default", 1, True),
        ("work", 1, False),
    ]
    assert vpns.of("other") is None


SA = IkeSa(
    IkeId.of(b"initiate", b"responds", True),
    Suite(12, 128, 12, 5, 31),
    b"d" * 32,
    local_id=Identity(3, b"client@example.org"),
    local=Endpoint("192.0.2.10", 4500),
    connection="a",
)


@pytest.mark.parametrize(
    ("own", "other", "fit"),
    [
        ((), (), True),
        ((), ("192.0.2.10",), True),
        ((), ("192.0.2.11",), False),
        (("192.0.2.10",), ("192.0.2.10",), True),
        (("192.0.2.10",), ("192.0.2.11",), False),
        (("192.0.2.10",), (), True),
        ((), ("192.0.2.0/24",), True),
        ((), ("uplink.example.org",), True),
    ],
)
def test_a_session_goes_on_over_its_own_uplink(own: tuple[str, ...], other: tuple[str, ...], fit: bool) -> None:
    first, second = connection("a", local_addresses=own), connection("b", local_addresses=other)
    assert fits(SA, first, second) is fit
    assert fits(SA, first, None)
    assert fits(SA, None, second) is fit
