"""What `check` says of packets that could leave in the clear."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.charon.vici_types import ChildConfig, ConnectionInfo
from bridge.charon.vpns import Vpn
from bridge.check.guard import guard
from bridge.config import GatewayEntry

VPN = Vpn("default", (GatewayEntry(address="192.0.2.1", connection="home"),), True)
DEFAULT = {"dst": "default", "gateway": "198.51.100.1"}
DEFAULT6 = {"dst": "default", "gateway": "fe80::1", "metric": 1024}


def said(children: list[ChildConfig], four: list[dict[str, Any]], six: list[dict[str, Any]] | None = None) -> str:
    """The grade for a client with these children and routes; empty without a finding."""
    info = ConnectionInfo("home", 0, 0, tuple(child for child in children if child.mode != "DROP"))
    drop = ConnectionInfo("guard", 0, 0, tuple(child for child in children if child.mode == "DROP"))
    found = guard(VPN, {"home": info, "guard": drop}, lambda family: four if family == "-4" else six or [])
    return str(found[0].grade) if found else ""


def child(*networks: str, mode: str = "TUNNEL") -> ChildConfig:
    return ChildConfig("net", remote_ts=networks, mode=mode)


@pytest.mark.parametrize(
    ("routes", "grade"),
    [
        ([], "ok"),
        ([{"dst": "192.0.2.0/24", "dev": "eth0"}], "ok"),
        ([DEFAULT], "warn"),
        ([DEFAULT, {"type": "blackhole", "dst": "10.10.0.0/16", "metric": 4294967295}], "ok"),
        ([DEFAULT, {"type": "unreachable", "dst": "10.0.0.0/8"}], "ok"),
        ([DEFAULT, {"type": "blackhole", "dst": "10.10.1.0/24"}], "warn"),
        ([DEFAULT, {"type": "blackhole", "dst": "10.10.0.0/16"}, {"dst": "10.10.7.0/24", "dev": "eth1"}], "warn"),
        # the same network by two routes
        ([{"type": "blackhole", "dst": "10.10.0.0/16", "metric": 9}, {"dst": "10.10.0.0/16", "dev": "e"}], "warn"),
    ],
)
def test_a_route_to_the_network_behind_the_gateways_needs_a_guard(routes: list[dict[str, Any]], grade: str) -> None:
    assert said([child("10.10.0.0/16")], routes) == grade


def test_a_child_that_drops_is_a_guard() -> None:
    net = child("10.10.0.0/16", "fd10::/32")
    assert said([net, child("10.0.0.0/8", "fd10::/16", mode="DROP")], [DEFAULT], [DEFAULT6]) == "ok"
    assert said([net, child("10.0.0.0/8", mode="DROP")], [DEFAULT], [DEFAULT6]) == "warn"
    assert said([net, child("10.0.0.0/8", mode="DROP")], [DEFAULT], []) == "ok"


def test_a_vpn_for_everything_and_one_without_networks_are_not_looked_at() -> None:
    assert said([child("0.0.0.0/0", "::/0")], [DEFAULT], [DEFAULT6]) == ""
    assert said([child("dynamic")], [DEFAULT]) == ""
    assert said([child("10.10.0.0/16[tcp/443]")], [DEFAULT]) == "warn"
