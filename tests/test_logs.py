"""The sidecars' logs: one event a line, named and keyed in one way, with the SPI pair, without secrets."""

from __future__ import annotations

import ast
import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge.bank.interface import BankUnavailable, BankUnwritable
from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.sidecar import Sidecar
from failover_support import failed_over

BRIDGE = Path(__file__).parents[1] / "bridge"
METHODS = {"debug", "info", "warning", "error", "exception"}
BANK_EVENTS = [BankUnavailable.event, BankUnwritable.event]
ABOUT_AN_SA = {
    "gateway-dead",
    "gateway-not-answering",
    "moved",
    "resumed-sa-unusable",
    "answer-proof-wrong",
    "sa-rebuilt",
    "sa-resumed",
    "sa-unconfirmed-removed",
    "sa-not-resumable",
    "stub-held",
}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call of a logger, with where it is."""
    for path in sorted(BRIDGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                target = node.func.value
                if isinstance(target, ast.Name) and target.id == "log":
                    yield f"{path.name}:{node.lineno}", node


def test_events_have_names_of_one_form_and_no_text_but_values() -> None:
    found = list(calls())
    assert len(found) > 60
    for where, call in found:
        [event] = call.args
        if isinstance(event, ast.JoinedStr):
            continue  # bridge/service/process.py: NAME-unavailable
        names = (
            [event.value]
            if isinstance(event, ast.Constant)
            else BANK_EVENTS
            if ast.unparse(event) == "error.event"
            else []
        )
        assert names, where
        assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", str(name)) for name in names), (where, names)
        for keyword in call.keywords:
            assert keyword.arg is None or re.fullmatch(r"[a-z]+(_[a-z]+)*", keyword.arg), where
            # event and level are structlog's own
            assert keyword.arg not in ("event", "level", "timestamp"), where


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab, all that can be said said in JSON."""
    with Lab() as lab:
        topology = standard(lab, start=False)
        for sidecar in (*topology.gateways.values(), topology.agent):
            sidecar.config["log"] = {"format": "json", "level": "debug"}
        topology.start()
        failed_over(topology)
        wait_until(lambda: "sa-resumed" in topology.gateways["gw2"].text(), "word of the resumption")
        yield topology


def events(sidecar: Sidecar) -> list[dict[str, Any]]:
    """What a sidecar said, but for `ready`."""
    return [json.loads(line) for line in sidecar.text().splitlines() if line != "ready"]


@pytest.mark.lab
def test_a_session_can_be_followed_by_its_spis(topology: Topology) -> None:
    said = [*events(topology.gateways["gw2"]), *events(topology.agent)]
    seen = {event["event"] for event in said}
    assert {"sa-rebuilt", "sa-resumed", "moved"} <= seen
    for event in said:
        assert {"event", "level", "timestamp"} <= event.keys()
        if event["event"] in ABOUT_AN_SA:
            assert re.fullmatch(r"[0-9a-f]{16}", event["spi_i"]), event
            assert re.fullmatch(r"[0-9a-f]{16}", event["spi_r"]), event
    resumed = next(event for event in said if event["event"] == "sa-resumed")
    moved = next(event for event in said if event["event"] == "moved")
    assert (resumed["spi_i"], resumed["spi_r"]) == (moved["spi_i"], moved["spi_r"])


@pytest.mark.lab
def test_no_key_is_in_a_log(topology: Topology) -> None:
    files = (topology.gw1.etc / "ike-sa-sync/bank.key", topology.client.etc / "swanctl/conf.d/secrets.conf")
    secrets = [word for file in files for word in re.findall(r"[A-Za-z0-9+/]{40,}=*", file.read_text())]
    assert len(secrets) == 2
    forms = [*secrets, *(base64.b64decode(secret).hex() for secret in secrets)]
    for sidecar in (*topology.gateways.values(), topology.agent):
        assert not any(form in sidecar.text() for form in forms)


@pytest.mark.lab
def test_the_level_of_a_running_sidecar_is_changed(topology: Topology) -> None:
    sidecar = topology.gateways["gw2"]
    assert sidecar.command("log-level").stdout == "debug\n"
    assert sidecar.command("log-level", "error").stdout == "error\n"
    said = len(events(sidecar))
    topology.gw2.charon.stop()
    topology.gw2.charon.start()
    wait_until(lambda: sidecar.ask("status")["charon"]["reachable"], "charon, back")
    assert len(events(sidecar)) == said
    assert json.loads(sidecar.command("log-level", "--json", "info").stdout) == {"level": "info"}
    assert events(sidecar)[-1]["event"] == "log-level"
