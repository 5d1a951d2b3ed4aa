"""The files in monitoring/ fit what running sidecars export, and Prometheus takes them."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
import yaml

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from failover_support import failed_over

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "monitoring"
RULES = MONITORING / "ike-sa-sync.rules.yml"
CASES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "tests/monitoring/cases.yml").read_text())
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
METRIC = re.compile(r"\b(?:ike_sa_sync|process)_\w+")


def tool() -> Any:
    """docs/dashboard.py"""
    spec = importlib.util.spec_from_file_location("dashboard", ROOT / "docs/dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = tool()
UNSHOWN = {
    # of use when something is looked into: `ike-sa-sync status` has them
    "ike_sa_sync_bank_deleted_total",
    "ike_sa_sync_bank_refused_total",
    "ike_sa_sync_bank_stored_total",
    "ike_sa_sync_clients_sync_last",
    "ike_sa_sync_ha_datagrams_total",
    "ike_sa_sync_nfqueue_packets_total",
    "ike_sa_sync_refusals_told_total",
}


def alerts() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(RULES.read_text())["groups"]
    return list(group["rules"])


def queries() -> list[str]:
    """What the dashboard asks for, with its variables filled in."""
    exprs = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    return [expr.replace("$__rate_interval", "1m").replace("$instance", ".+") for expr in exprs]


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_finds_nothing_wrong_with_the_rules_and_the_example() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", str(RULES))
    promtool("check", "config", str(MONITORING / "prometheus.yml"))


def test_every_alert_has_a_summary_and_a_severity() -> None:
    for alert in alerts():
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"]["summary"].endswith(".")


def test_every_alert_is_tried(tmp_path: Path) -> None:
    assert set(CASES) == {alert["alert"] for alert in alerts()}


@pytest.mark.parametrize("name", CASES)
def test_an_alert_fires_when_it_should_and_not_otherwise(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    [severity] = [alert["labels"]["severity"] for alert in alerts() if alert["alert"] == name]
    tests = []
    for series, fires in ((case["fires"], True), (case["silent"], False)):
        query = f'count by (alertname, severity) (ALERTS{{alertname="{name}",alertstate="firing"}})'
        sample = {"labels": f'{{alertname="{name}", severity="{severity}"}}', "value": 1}
        expected = {"expr": query, "eval_time": case["at"], "exp_samples": [sample] if fires else []}
        tests.append({"interval": "1m", "input_series": series, "promql_expr_test": [expected]})
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", str(file))


def test_the_dashboard_is_one() -> None:
    schema = json.loads((ROOT / "tests/monitoring/dashboard.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(DASHBOARD, schema, cls=jsonschema.Draft202012Validator)
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_panels_do_not_lie_over_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.fixture(scope="module")
def watched() -> Iterator[Topology]:
    """The standard lab after a failure, with a Prometheus on gw2 that scrapes gw2 and the client."""
    with Lab() as lab:
        topology = standard(lab, start=False)
        topology.agent.config["metrics"] = f"{topology.client.address}:9471"
        topology.start()
        TOOL.watch(topology.gw2, {"gw2": "127.0.0.1:9470", "client": f"{topology.client.address}:9471"})
        # what a rate is of, it has to have seen before and after
        wait_until(lambda: ask(topology.gw2, "count(ike_sa_sync_ike_sas) == 2") != [], "both sidecars scraped", 120)
        failed_over(topology)
        moved = 'ike_sa_sync_moves_total{result="resumed"} == 1 and on() (ike_sa_sync_resumptions_total == 1)'
        wait_until(lambda: ask(topology.gw2, moved) != [], "the resumption, scraped", 120)
        yield topology


def ask(host: Host, query: str) -> list[str]:
    """The series that a query gives, as promtool writes them."""
    done = host.run("promtool", "query", "instant", f"http://127.0.0.1:{TOOL.PORT}", query)
    return done.stdout.strip().splitlines()


@pytest.mark.lab
def test_every_panel_shows_something_after_a_failure(watched: Topology) -> None:
    empty = [query for query in queries() if not ask(watched.gw2, query)]
    assert empty == []


@pytest.mark.lab
def test_every_metric_is_in_a_panel_or_an_alert(watched: Topology) -> None:
    rows = ask(watched.gw2, 'group by (__name__) ({job="ike-sa-sync",__name__=~"ike_sa_sync_.*"})')
    exported = {METRIC.search(row)[0] for row in rows}  # type: ignore[index]
    assert len(exported) > 60
    shown = set(METRIC.findall(" ".join([*queries(), *(alert["expr"] for alert in alerts())])))
    # a histogram's quantiles are drawn
    of_histograms = {f"{name.removesuffix('_bucket')}_{it}" for name in shown for it in ("sum", "count")}
    assert exported - shown - of_histograms - UNSHOWN == set()
    assert UNSHOWN - exported == set()


@pytest.mark.lab
def test_the_dashboard_is_drawn_with_the_data_of_a_failure(watched: Topology) -> None:
    now = time.time()
    drawn = ElementTree.fromstring(TOOL.draw(DASHBOARD, watched.gw2, now - 60, now))
    texts = {element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {panel["title"] for panel in DASHBOARD["panels"]} <= texts
    assert "gw2 resumed" in texts


@pytest.mark.lab
def test_every_alert_asks_for_what_is_exported(watched: Topology) -> None:
    for alert in alerts():
        for metric in METRIC.findall(alert["expr"]):
            assert ask(watched.gw2, metric), metric
        # Prometheus takes the expression
        ask(watched.gw2, alert["expr"])


@pytest.mark.lab
def test_a_charon_that_is_gone_is_seen_in_the_metrics(watched: Topology) -> None:
    [expr] = [alert["expr"] for alert in alerts() if alert["alert"] == "IkeSaSyncCharonUnreachable"]
    assert ask(watched.gw2, expr) == []
    watched.gw2.charon.crash()
    wait_until(lambda: len(ask(watched.gw2, expr)) == 1, "the alert's condition", 60)
