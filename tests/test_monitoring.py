"""The files in monitoring/ fit what running sidecars export, and Prometheus takes them."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
PORT = 9090


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
        prometheus(topology)
        # what a rate is of, it has to have seen before and after
        wait_until(lambda: ask(topology.gw2, "count(ike_sa_sync_ike_sas) == 2") != [], "both sidecars scraped", 120)
        failed_over(topology)
        moved = 'ike_sa_sync_moves_total{result="resumed"} == 1 and on() (ike_sa_sync_resumptions_total == 1)'
        wait_until(lambda: ask(topology.gw2, moved) != [], "the resumption, scraped", 120)
        yield topology


def prometheus(topology: Topology) -> None:
    """Start a Prometheus with the shipped rules, which ends with the lab."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["rule_files"] = [str(RULES)]
    [job] = config["scrape_configs"]
    job["scrape_interval"] = "1s"
    job["static_configs"][1]["targets"] = [f"{topology.client.address}:9471"]
    folder = topology.gw2.directory / "prometheus"
    folder.mkdir()
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    with (folder / "log").open("w") as log:
        topology.gw2.popen(
            "prometheus",
            f"--config.file={file}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{PORT}",
            stdout=log,
            stderr=log,
        )
    wait_until(lambda: "Server is ready" in (folder / "log").read_text(), "Prometheus", 120)


def ask(host: Host, query: str) -> list[str]:
    """The series that a query gives, as promtool writes them."""
    done = host.run("promtool", "query", "instant", f"http://127.0.0.1:{PORT}", query)
    return done.stdout.strip().splitlines()


@pytest.mark.lab
def test_every_panel_shows_something_after_a_failure(watched: Topology) -> None:
    empty = [query for query in queries() if not ask(watched.gw2, query)]
    assert empty == []


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
    watched.gw2.charon.kill()
    wait_until(lambda: len(ask(watched.gw2, expr)) == 1, "the alert's condition", 60)
