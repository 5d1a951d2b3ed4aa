"""Several VPNs and several sessions on one client host: real charons, two clusters of gateways."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.lab import Lab
from bridge.lab.daemon import wait_until
from vpns_support import ADDRESSES, Clusters, clusters

pytestmark = pytest.mark.lab

PATIENCE = 120


@pytest.fixture(scope="module")
def both() -> Iterator[Clusters]:
    with Lab() as lab:
        built = clusters(lab)
        built.start()
        yield built


@pytest.fixture(autouse=True)
def _fresh(both: Clusters) -> None:
    both.fresh()


def test_a_session_whose_gateway_died_is_resumed_while_that_of_another_vpn_is_up(both: Clusters) -> None:
    both.connect("x1")
    both.connect("y1")
    both.kill("y1")
    wait_until(lambda: both.at() == {"home": "x1", "work-gw2": "y2"}, "the session at y2", PATIENCE)
    wait_until(lambda: both.works("y"), "traffic")
    assert both.works("x")


def test_with_a_dead_gateway_in_each_vpn_each_session_is_resumed(both: Clusters) -> None:
    both.connect("x1")
    both.connect("y1")
    both.kill("x1", "y1")
    wait_until(lambda: both.at() == {"home-gw2": "x2", "work-gw2": "y2"}, "both sessions at the others", PATIENCE)
    wait_until(lambda: both.works("x") and both.works("y"), "traffic")


def test_after_20_seconds_without_its_link_each_session_is_up_once(both: Clusters) -> None:
    both.connect("x1")
    both.connect("y1")
    said = len(both.agent.text())
    both.lab.unplug(both.client)
    try:
        wait_until(lambda: both.agent.text()[said:].count("event=moved") >= 2, "attempts in vain", PATIENCE)
    finally:
        both.lab.plug(both.client)
    wait_until(lambda: {name[0] for name in both.at().values()} == {"x", "y"}, "both sessions", PATIENCE)
    wait_until(lambda: both.works("x") and both.works("y"), "traffic")
    assert len(both.sas()) == 2


def test_resume_leaves_the_session_of_another_vpn_alone(both: Clusters) -> None:
    both.connect("x1")
    both.connect("y1")
    healthy = [sa["initiator-spi"] for sa in both.sas() if sa["name"] == "home"]
    both.kill("y1")
    outcome = both.resume("--vpn", "y")
    assert (outcome["result"], outcome["vpn"], outcome["connection"]) == ("resumed", "y", "work-gw2")
    assert [sa["initiator-spi"] for sa in both.sas() if sa["name"] == "home"] == healthy
    assert both.works("x")
    assert both.works("y")


def test_resume_without_a_name_takes_the_session_that_was_lost_to_a_gateway_of_its_vpn(both: Clusters) -> None:
    vpns = {name: vpn | {"resume_on_down": False} for name, vpn in both.agent.config["vpns"].items()}
    with both.agent_with(vpns=vpns):
        both.connect("x1")
        both.connect("y1")
        both.kill("y1")
        wait_until(lambda: both.at() == {"home": "x1"}, "the end of the other session", PATIENCE)
        outcome = both.resume()
        assert (outcome["result"], outcome["vpn"], outcome["gateway"]) == ("resumed", "y", ADDRESSES["y2"])
        assert both.at() == {"home": "x1", "work-gw2": "y2"}


def test_a_gateway_of_another_vpn_is_none_that_a_session_may_go_to(both: Clusters) -> None:
    both.connect("x1")
    outcome = both.resume("--vpn", "x", "--to", ADDRESSES["y1"])
    assert (outcome["result"], outcome["reason"]) == ("failed", "gateway-not-configured")
    assert both.at() == {"home": "x1"}


def test_a_refused_session_does_not_end_one_of_the_same_connection_that_works(both: Clusters) -> None:
    both.connect("x1")
    both.connect("y1")
    both.kill("y1", "y2")
    with both.agent_with(resume={"answer_timeout": 0.5, "initiate_timeout": 2.0}):
        outcome = both.resume("--vpn", "y")
    assert outcome["result"] == "failed"
    assert both.at()["home"] == "x1"
    assert both.works("x")
