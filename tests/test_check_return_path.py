"""What `check` knows of routing daemons."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from bridge.check.finding import Grade
from bridge.check.return_path import exporting, return_path
from bridge.config import GatewayConfig
from bridge.ike.address import Pool
from bridge.service import shipped_files

BIRD = "bird-gateway.conf"
FRR = "frr-gateway.conf"
FRR10 = "frr10-gateway.conf"
# the function of that name hides it in its package
CHECKED = import_module("bridge.check.return_path")
POOL4, POOL6 = Pool("four", "10.20.0.1", 100), Pool("six", "fd20::1", 100)


def shipped(configuration: str) -> str:
    return Path(shipped_files.path(f"strongswan-conf/network/{configuration}")).read_text()


def families(tmp_path: Path, daemon: str, text: str) -> set[int]:
    file = tmp_path / "daemon.conf"
    file.write_text(text)
    takers = exporting([(daemon, file)])
    assert set(takers.values()) <= {daemon}
    return set(takers)


@pytest.mark.parametrize(
    ("daemon", "configuration", "taken"),
    [
        ("bird", BIRD, {4, 6}),
        ("bird", "bird-router.conf", set()),
        ("zebra", FRR, {4}),
        ("zebra", FRR10, {4, 6}),
        ("zebra", "frr-router.conf", set()),
    ],
)
def test_a_daemon_with_the_shipped_configuration_of_a_gateway_takes_charons_table(
    tmp_path: Path, daemon: str, configuration: str, taken: set[int]
) -> None:
    assert families(tmp_path, daemon, shipped(configuration)) == taken


@pytest.mark.parametrize(
    ("daemon", "configuration", "old", "new", "taken"),
    [
        # of one family only
        ("zebra", FRR10, "  redistribute table-direct 220 route-map CLIENTS6\n", "", {4}),
        ("zebra", FRR10, "  redistribute table-direct 220 route-map CLIENTS4\n", "", {6}),
        ("zebra", FRR10, "address-family ipv6 unicast", "address-family ipv6 vpn", {4}),
        ("bird", BIRD, "    ipv6 { import where net ~ POOLS6; export none; };\n", "", {4}),
        # in a comment
        ("zebra", FRR10, "  redistribute", "  ! redistribute", set()),
        ("zebra", FRR10, "  redistribute", "#  redistribute", set()),
        ("zebra", FRR, "ip import-table", "!ip import-table", set()),
        ("bird", BIRD, "    kernel table", "    # kernel table", set()),
        ("bird", BIRD, "    kernel table 220;", "    /* kernel\n table 220; */", set()),
        # denied
        ("zebra", FRR, "ip import-table", "no ip import-table", set()),
        ("zebra", FRR10, "  redistribute", "  no redistribute", set()),
        # another table
        ("zebra", FRR10, "table-direct 220", "table-direct 2200", set()),
        ("zebra", FRR, "import-table 220", "import-table 2201", set()),
        ("bird", BIRD, "kernel table 220", "kernel table 2200", set()),
        # written in other ways
        ("bird", BIRD, "kernel table 220;", "kernel  table\n220 ;", {4, 6}),
        ("zebra", FRR, "ip import-table 220", "ip  import-table 220 distance 5", {4}),
        ("zebra", FRR10, "address-family ipv4 unicast", "address-family ipv4", {4, 6}),
    ],
)
def test_only_what_takes_the_table_counts_and_for_its_address_family(
    tmp_path: Path, daemon: str, configuration: str, old: str, new: str, taken: set[int]
) -> None:
    text = shipped(configuration)
    assert old in text
    assert families(tmp_path, daemon, text.replace(old, new)) == taken


def test_a_configuration_of_bird_1_and_one_that_is_cut_are_read(tmp_path: Path) -> None:
    assert families(tmp_path, "bird", "protocol kernel { learn; kernel table 220; export none; }") == {4}
    assert families(tmp_path, "bird", "protocol kernel { kernel table 220; ipv6 { import all") == {6}
    assert exporting([("bird", tmp_path / "none")]) == {}


@pytest.mark.parametrize(
    ("configuration", "warned"),
    [(FRR, "six (fd20::1-fd20::64)"), (FRR10, ""), (None, "four (10.20.0.1-10.20.0.100), six (fd20::1-fd20::64)")],
)
def test_a_pool_of_a_family_that_no_daemon_takes_is_named(
    monkeypatch: pytest.MonkeyPatch, configuration: str | None, warned: str
) -> None:
    file = Path(shipped_files.path(f"strongswan-conf/network/{configuration}"))
    monkeypatch.setattr(CHECKED, "_daemons", lambda: [("zebra", file)] if configuration else [])
    monkeypatch.setattr(CHECKED, "connected_networks", list)
    monkeypatch.setattr(CHECKED, "without_proxy", lambda pools: pools)
    [finding] = return_path(GatewayConfig(), [POOL4, POOL6])
    assert finding.grade is (Grade.WARN if warned else Grade.OK)
    assert warned in finding.text
    if configuration == FRR:
        assert "four" not in finding.text
        [finding] = return_path(GatewayConfig(), [POOL4])
        assert finding.grade is Grade.OK
