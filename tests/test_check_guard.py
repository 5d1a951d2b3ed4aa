"""What `check` says of packets that could leave in the clear."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bridge.charon.conf_parser import Settings
from bridge.charon.vici_types import ChildConfig, ConnectionInfo, GuardInfo
from bridge.charon.vpns import Vpn
from bridge.check.charon import CharonAnswer
from bridge.check.finding import Finding
from bridge.check.guard import gateway_guard, guard
from bridge.config import GatewayEntry
from bridge.ike.address import Pool

VPN = Vpn("default", (GatewayEntry(address="192.0.2.1", connection="home"),), True)
DEFAULT = {"dst": "default", "gateway": "198.51.100.1"}
BLACKHOLE = {"type": "blackhole", "dst": "10.10.0.0/16", "metric": 4294967295}
DEFAULT6 = {"dst": "default", "gateway": "fe80::1", "metric": 1024}


def found(
    children: list[ChildConfig],
    four: list[dict[str, Any]],
    six: list[dict[str, Any]] | None = None,
    guards: Sequence[GuardInfo] = (),
    plugins: Sequence[str] = (),
) -> list[Finding]:
    """What is found for a client with these children, routes and installed policies."""
    info = ConnectionInfo("home", 0, 0, tuple(children))
    charon = CharonAnswer("5.9.8", list(plugins), 0, Settings(Path("/none")), {"home": info}, guards=list(guards))
    return guard(VPN, charon, lambda family: four if family == "-4" else six or [])


def said(*asked: Any, **more: Any) -> str:
    """The grade; empty without a finding."""
    findings = found(*asked, **more)
    return str(findings[0].grade) if findings else ""


def child(*networks: str, local: tuple[str, ...] = ("dynamic",)) -> ChildConfig:
    return ChildConfig("net", local_ts=local, remote_ts=networks, mode="TUNNEL")


def dropping(*networks: str, local: tuple[str, ...] = ("dynamic",)) -> GuardInfo:
    return GuardInfo(local, networks)


@pytest.mark.parametrize(
    ("routes", "grade"),
    [
        ([], "ok"),
        ([{"dst": "192.0.2.0/24", "dev": "eth0"}], "ok"),
        ([DEFAULT], "warn"),
        ([DEFAULT, BLACKHOLE], "ok"),
        ([DEFAULT, {"type": "unreachable", "dst": "10.0.0.0/8"}], "ok"),
        ([DEFAULT, {"type": "blackhole", "dst": "10.10.1.0/24"}], "warn"),
        ([DEFAULT, {"type": "blackhole", "dst": "10.10.0.0/16"}, {"dst": "10.10.7.0/24", "dev": "eth1"}], "warn"),
        # the same network by two routes
        ([{"type": "blackhole", "dst": "10.10.0.0/16", "metric": 9}, {"dst": "10.10.0.0/16", "dev": "e"}], "warn"),
    ],
)
def test_a_route_to_the_network_behind_the_gateways_needs_a_guard(routes: list[dict[str, Any]], grade: str) -> None:
    assert said([child("10.10.0.0/16")], routes, plugins=("kernel-libipsec",)) == grade


@pytest.mark.parametrize("guard", [BLACKHOLE, {"type": "unreachable", "dst": "10.0.0.0/8"}])
def test_with_esp_in_the_kernel_routes_alone_are_half_a_guard(guard: dict[str, Any]) -> None:
    net = child("10.10.0.0/16")
    [finding] = found([net], [DEFAULT, guard])
    assert str(finding.grade) == "warn"
    assert "routes alone stop packets to 10.10.0.0/16" in finding.text
    assert finding.fix is not None
    assert "a child with `mode = drop`" in finding.fix
    assert said([net], [DEFAULT, guard], guards=[dropping("10.10.0.0/16")]) == "ok"


def test_a_child_that_drops_or_a_trap_is_a_guard_once_charon_has_installed_it() -> None:
    net = child("10.10.0.0/16", "fd10::/32")
    assert said([net], [DEFAULT], [DEFAULT6], [dropping("10.0.0.0/8", "fd10::/16")]) == "ok"
    assert said([net], [DEFAULT], [DEFAULT6], [dropping("10.0.0.0/8"), dropping("fd10::/16")]) == "ok"
    assert said([net], [DEFAULT], [DEFAULT6], [dropping("10.0.0.0/8")]) == "warn"
    assert said([net], [DEFAULT], [], [dropping("10.0.0.0/8")]) == "ok"
    assert said([net], [DEFAULT], [], [dropping("10.10.0.0/16[tcp/443]")]) == "warn"


@pytest.mark.parametrize(
    ("sources", "stopped", "grade"),
    [
        ("10.30.0.0/24", "dynamic", "ok"),
        ("10.30.0.0/24", "10.30.0.0/16", "ok"),
        ("10.30.0.0/24", "10.30.0.0/25", "warn"),
        ("dynamic", "0.0.0.0/0", "ok"),
        ("dynamic", "10.30.0.0/24", "warn"),
    ],
)
def test_a_guard_is_about_the_same_sources(sources: str, stopped: str, grade: str) -> None:
    net, guards = child("10.10.0.0/16", local=(sources,)), [dropping("10.10.0.0/16", local=(stopped,))]
    assert said([net], [DEFAULT], guards=guards) == grade


def test_esp_in_userspace_has_no_policies_that_drop() -> None:
    net, guards = child("10.10.0.0/16"), [dropping("10.10.0.0/16")]
    [finding] = found([net], [DEFAULT], guards=guards, plugins=("kernel-libipsec",))
    assert str(finding.grade) == "warn"
    assert finding.fix is not None
    assert "mode = drop` has no effect" in finding.fix
    assert said([net], [DEFAULT, BLACKHOLE], plugins=("kernel-libipsec",)) == "ok"


def test_a_vpn_for_everything_and_one_without_networks_are_not_looked_at() -> None:
    assert said([child("0.0.0.0/0", "::/0")], [DEFAULT], [DEFAULT6]) == ""
    assert said([child("dynamic")], [DEFAULT]) == ""
    assert said([child("10.10.0.0/16[tcp/443]")], [DEFAULT]) == "warn"


@pytest.mark.parametrize(
    ("routes", "grade"),
    [
        ([], "ok"),
        ([DEFAULT], "warn"),
        ([DEFAULT, {"type": "blackhole", "dst": "10.20.0.0/16", "metric": 4294967295}], "ok"),
        ([DEFAULT, {"type": "blackhole", "dst": "10.20.2.0/24", "metric": 4294967295}], "warn"),
        # a router inside, a connected network
        ([DEFAULT, {"dst": "10.0.0.0/8", "gateway": "10.10.1.10"}], "ok"),
        ([DEFAULT, {"dst": "10.20.1.0/24", "dev": "eth1"}], "ok"),
        ([DEFAULT, {"type": "unreachable", "dst": "default"}], "warn"),
        ([DEFAULT | {"metric": 100}, {"type": "unreachable", "dst": "default"}], "ok"),
    ],
)
def test_a_default_route_at_a_gateway_needs_a_guard_for_its_pools(routes: list[dict[str, Any]], grade: str) -> None:
    [finding] = gateway_guard([Pool("clients", "10.20.1.1", 254)], lambda family: routes if family == "-4" else [])
    assert str(finding.grade) == grade
    assert (finding.fix is not None) == (grade == "warn")


def test_a_gateways_pools_of_both_families_are_looked_at_and_named() -> None:
    pools = [Pool("four", "10.20.1.1", 254), Pool("six", "fd20::1", 100)]
    [finding] = gateway_guard(pools, lambda family: [DEFAULT] if family == "-4" else [DEFAULT6])
    assert "four (10.20.1.1-10.20.1.254), six (fd20::1-fd20::64)" in finding.text
    assert gateway_guard([], lambda family: [DEFAULT]) == []
