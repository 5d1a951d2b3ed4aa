"""What `check` finds about addresses that gateways share (bridge.check.takeover)."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from bridge.charon.conf_parser import ChildProposals
from bridge.charon.vici_types import ConnectionInfo
from bridge.check.finding import Finding, Grade
from bridge.check.takeover import takeover
from bridge.config import GatewayConfig, InterceptConfig, TakeoverConfig
from bridge.service import shipped_files

SHARED = "192.168.50.100"
CONFIG = GatewayConfig(address="192.168.50.1", takeover=TakeoverConfig(addresses=(SHARED,)))
GW = ConnectionInfo("gw", 14400, 0, ())


@pytest.fixture
def found(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Runs the check with these files and addresses."""

    def run(
        mobike: str = "no",
        local: tuple[str, ...] = (),
        interface: int = 2,
        vrrp: str = "",
        config: GatewayConfig = CONFIG,
    ) -> list[Finding]:
        conf, keepalived = tmp_path / "swanctl.conf", tmp_path / "keepalived.conf"
        conf.write_text(f"connections {{ gw {{\n mobike = {mobike}\n }} }}\n" if mobike else "connections { gw { } }\n")
        keepalived.write_text(vrrp)
        connection = GW._replace(local_addresses=local)
        return takeover(
            config,
            {"gw": connection},
            proposals=ChildProposals(conf, tmp_path / "ipsec.conf"),
            present={SHARED: interface},
            keepalived=keepalived,
        )

    return run


def grades(findings: list[Finding]) -> list[Grade]:
    return [finding.grade for finding in findings]


def test_a_gateway_that_is_ready(found) -> None:  # type: ignore[no-untyped-def]
    vrrp = shipped_files.path("strongswan-conf/keepalived/keepalived.conf").read_text()
    assert grades(found(vrrp=vrrp)) == [Grade.OK]


@pytest.mark.parametrize("mobike", ["", "yes"])
def test_mobike_is_refused(found, mobike: str) -> None:  # type: ignore[no-untyped-def]
    [finding] = found(mobike=mobike)
    assert (finding.grade, "MOBIKE" in finding.text) == (Grade.FAIL, True)
    assert grades(found(mobike=mobike, local=("192.168.50.1",))) == [Grade.OK]


def test_an_address_on_lo_is_refused(found) -> None:  # type: ignore[no-untyped-def]
    [finding] = found(interface=1)
    assert (finding.grade, "on lo" in finding.text) == (Grade.FAIL, True)


@pytest.mark.parametrize(("old", "new"), [("nopreempt", ""), ("state BACKUP", "state MASTER")])
def test_a_vrrp_that_preempts_is_refused(found, old: str, new: str) -> None:  # type: ignore[no-untyped-def]
    vrrp = shipped_files.path("strongswan-conf/keepalived/keepalived.conf").read_text()
    [finding] = found(vrrp=vrrp.replace(f"    {old}\n", f"    {new}\n"))
    assert (finding.grade, "preempts" in finding.text) == (Grade.FAIL, True)
    assert grades(found(vrrp=vrrp.replace(old, new).replace(SHARED, "192.0.2.1"))) == [Grade.OK]


def test_intervals_that_vrrp_rounds_are_named(found) -> None:  # type: ignore[no-untyped-def]
    vrrp = shipped_files.path("strongswan-conf/keepalived/keepalived.conf").read_text()
    rounded = vrrp.replace("    version 3\n", "")
    assert rounded != vrrp
    [finding] = found(vrrp=rounded)
    assert (finding.grade, "advert_int" in finding.text) == (Grade.WARN, True)
    assert grades(found(vrrp=rounded.replace("advert_int 0.3", "advert_int 1"))) == [Grade.OK]
    assert grades(found(vrrp="global_defs { vrrp_version 3 }\n" + rounded)) == [Grade.OK]


def test_an_instance_of_ipv6_is_rounded_by_no_version(found) -> None:  # type: ignore[no-untyped-def]
    vrrp = shipped_files.path("strongswan-conf/keepalived/keepalived.conf").read_text().replace("    version 3\n", "")
    more = (
        "    unicast_src_ip 192.168.50.1\n    unicast_peer {\n        192.168.50.2\n    }\n"
        "    virtual_ipaddress_excluded {\n        192.168.50.101/24\n    }\n"
        "    virtual_routes {\n        10.20.0.0/16 via 192.168.50.9\n    }\n    garp_master_delay"
    )
    ipv6 = vrrp.replace("        192.168.50.100/24", "        fe80::1/64\n        fd50::100/64")
    assert ipv6 != vrrp
    ipv6 = ipv6.replace("    garp_master_delay", more)
    of_both = replace(CONFIG, takeover=TakeoverConfig(addresses=(SHARED, "fd50::100")))
    assert grades(found(vrrp=ipv6, config=of_both)) == [Grade.OK]
    # one that preempts as well is found
    assert grades(found(vrrp=ipv6.replace("    nopreempt\n", ""), config=of_both)) == [Grade.FAIL]
    [finding] = found(vrrp=vrrp.replace("    garp_master_delay", more))
    assert "advert_int" in finding.text
    # the address is on one line with others, or the first of several
    [finding] = found(vrrp=vrrp.replace("192.168.50.100/24", "192.168.50.100/24 dev eth0 label eth0:1"))
    assert "advert_int" in finding.text


def test_nothing_is_said_where_no_address_is_shared() -> None:
    assert takeover(GatewayConfig(address="192.168.50.1"), {"gw": GW}) == []


def test_without_rules_of_the_sidecar_the_fence_is_missing(tmp_path: Path) -> None:
    config = replace(CONFIG, intercept=InterceptConfig(rules="external"))
    conf = tmp_path / "swanctl.conf"
    conf.write_text("connections { gw { mobike = no } }\n")
    proposals = ChildProposals(conf, tmp_path / "ipsec.conf")
    [finding] = takeover(config, {"gw": GW}, proposals=proposals, present={}, keepalived=tmp_path / "none")
    assert (finding.grade, "external" in finding.text) == (Grade.WARN, True)
