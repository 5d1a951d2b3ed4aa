"""The program of `hooks.session` at real gateways: what it is told, and when."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.space import LabError
from bridge.lab.topology import SITE
from failover_support import connect, counter, fresh, rekeyed, resume, status, the_sa
from releases_support import RELEASED, on_all

pytestmark = pytest.mark.lab

PROGRAM = "/etc/ike-sa-sync/session"
EVENTS = "/run/events"


@pytest.fixture(scope="module", params=RELEASED)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab, whose gateways note what happens to their sessions."""
    with Lab() as lab:
        built = standard(lab, start=False, releases=on_all(request.param))
        built.agent.config["resume_on_down"] = False
        for host in (built.gw1, built.gw2):
            host.write(PROGRAM, f"#!/bin/sh\nexec cat >>{EVENTS}\n", mode=0o755)
            built.gateways[host.name].config["hooks"] = {"session": PROGRAM}
        built.start()
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)
    for host in (topology.gw1, topology.gw2):
        wait_until(lambda host=host: not status(topology, host.name)["hooks"]["pending"], "no event waits")  # type: ignore[misc]
    # what is about to be raised: the end of a session of the test before
    wait_until(lambda: balanced([*events(topology.gw1), *events(topology.gw2)]), "the ends of all sessions")
    for host in (topology.gw1, topology.gw2):
        host.path(EVENTS).write_text("")


def balanced(every: list[dict[str, Any]]) -> bool:
    """Whether every session that began has ended."""
    over = {event["session"] for event in every if event["event"] in ("ended", "moved-away")}
    return {event["session"] for event in every} == over


def events(host: Host) -> list[dict[str, Any]]:
    file = host.path(EVENTS)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def kinds(host: Host) -> list[str]:
    return [event["event"] for event in events(host)]


def await_events(host: Host, *wanted: str) -> list[dict[str, Any]]:
    try:
        wait_until(lambda: kinds(host) == list(wanted), f"{wanted} at {host.name}")
    except LabError as error:
        raise AssertionError(f"{error}: {kinds(host)}") from None
    return events(host)


def test_a_session_is_established_and_ends_with_its_figures(topology: Topology) -> None:
    sa = connect(topology)
    [address] = sa["local-vips"]
    [begun] = await_events(topology.gw1, "established")
    assert begun["session"] == f"{topology.gw1.address}/{sa['responder-spi']}"
    assert (begun["spi_i"], begun["spi_r"]) == (sa["initiator-spi"], sa["responder-spi"])
    assert (begun["local_id"], begun["remote_id"], begun["eap_id"]) == ("vpn.example.org", "client@example.org", None)
    assert (begun["connection"], begun["gateway"]) == ("gw", topology.gw1.address)
    assert begun["remote"]["address"] == topology.client.address
    assert (begun["virtual_ips"], begun["virtual_ips_in_use"]) == ([address], [])
    assert [(child["name"], child["remote_ts"]) for child in begun["children"]] == [("net", [f"{address}/32"])]
    assert topology.client.ping(SITE, 7) == 7
    topology.client.swanctl("--terminate", "--ike-id", the_sa(topology.client)["uniqueid"])
    _, over = await_events(topology.gw1, "established", "ended")
    # ten echo requests and answers of 84 octets
    assert (over["octets_in"], over["octets_out"]) == (840, 840)
    assert (over["session"], over["virtual_ips"]) == (begun["session"], [address])
    assert [child["name"] for child in over["children"]] == ["net"]


def test_a_rekeyed_session_keeps_its_name_and_its_figures(topology: Topology) -> None:
    connect(topology)
    [begun] = await_events(topology.gw1, "established")
    before = the_sa(topology.gw1)
    topology.gw1.swanctl("--rekey", "--ike-id", before["uniqueid"])
    wait_until(lambda: rekeyed(topology.gw1, before), "the rekeying")
    topology.gw1.swanctl("--rekey", "--child", "net")
    assert topology.client.ping(SITE) == 3
    outcome = resume(topology, "--to", topology.gw2.address)
    assert outcome["result"] == "resumed"
    _, over = await_events(topology.gw1, "established", "moved-away")
    assert (over["session"], over["octets_in"], over["to"]) == (begun["session"], 6 * 84, topology.gw2.address)
    [here] = await_events(topology.gw2, "resumed-here")
    assert here["previous"] == {"gateway": topology.gw1.address, "session": begun["session"]}


def test_where_a_gateway_failed_the_next_one_reports_the_end_of_its_session(topology: Topology) -> None:
    sa = connect(topology)
    [begun] = await_events(topology.gw1, "established")
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    here, over = await_events(topology.gw2, "resumed-here", "ended")
    assert here["previous"] == {"gateway": topology.gw1.address, "session": begun["session"]}
    assert (here["virtual_ips"], here["remote_id"]) == (sa["local-vips"], "client@example.org")
    assert [child["name"] for child in here["children"]] == ["net"]
    assert (over["session"], over["gateway"]) == (begun["session"], topology.gw1.address)
    assert (over["reason"], over["octets_in"]) == ("gateway-failed", None)
    # its address is not free
    assert over["virtual_ips_in_use"] == sa["local-vips"]


def test_a_session_that_is_resumed_at_its_own_gateway_begins_again_there(topology: Topology) -> None:
    connect(topology)
    [begun] = await_events(topology.gw1, "established")
    assert resume(topology, "--to", topology.gw1.address)["result"] == "resumed"
    wait_until(lambda: len(events(topology.gw1)) == 3, "three events")
    _, *others = events(topology.gw1)
    by_kind = {event["event"]: event for event in others}
    assert by_kind["resumed-here"]["previous"]["session"] == begun["session"]
    assert by_kind["moved-away"]["session"] == begun["session"]
    assert by_kind["moved-away"]["virtual_ips_in_use"] == begun["virtual_ips"]


def test_a_sidecar_that_was_restarted_reports_no_session_twice(topology: Topology) -> None:
    connect(topology)
    [begun] = await_events(topology.gw1, "established")
    topology.gateways["gw1"].stop()
    topology.gateways["gw1"].start()
    assert topology.client.ping(SITE) == 3
    topology.client.swanctl("--terminate", "--ike-id", the_sa(topology.client)["uniqueid"])
    _, over = await_events(topology.gw1, "established", "ended")
    assert over["session"] == begun["session"]


def test_a_session_that_ended_while_the_sidecar_was_away_is_reported_when_it_is_back(topology: Topology) -> None:
    connect(topology)
    [begun] = await_events(topology.gw1, "established")
    topology.gateways["gw1"].stop()
    topology.client.swanctl("--terminate", "--ike-id", the_sa(topology.client)["uniqueid"])
    topology.gateways["gw1"].start()
    _, over = await_events(topology.gw1, "established", "ended")
    assert (over["session"], over["reason"]) == (begun["session"], "sidecar-was-away")
    assert over["virtual_ips"] == begun["virtual_ips"]


def test_a_charon_that_was_restarted_has_ended_its_sessions(topology: Topology) -> None:
    connect(topology)
    [begun] = await_events(topology.gw1, "established")
    topology.gw1.charon.crash()
    topology.gw1.charon.start()
    _, over = await_events(topology.gw1, "established", "ended")
    assert (over["session"], over["reason"]) == (begun["session"], "charon-restarted")


def test_a_program_that_fails_or_hangs_is_reported_and_harms_nothing(topology: Topology) -> None:
    gateway = topology.gateways["gw1"]
    gateway.stop()
    # a number that no other process of this machine has
    child = f"sleep 1{time.time_ns()}"
    script = f"#!/bin/sh\necho no such thing >&2\n{child} &\nwait\n"
    topology.gw1.write("/etc/ike-sa-sync/bad", script, mode=0o755)
    gateway.config["hooks"] = {"session": "/etc/ike-sa-sync/bad", "timeout": 0.5}
    gateway.start()
    try:
        connect(topology)
        wait_until(lambda: counter(topology, "gw1", "hook_failures_total[timeout]") == 1, "the failure")
        failure = status(topology, "gw1")["hooks"]["last_failure"]
        assert (failure["event"], failure["reason"]) == ("established", "it ran for more than 0.5 s")
        assert 'said="no such thing"' in gateway.text()
        assert topology.client.ping(SITE) == 3
        assert child not in topology.gw1.run("ps", "-eo", "args").stdout
    finally:
        gateway.stop()
        gateway.config["hooks"] = {"session": PROGRAM}
        gateway.start()
