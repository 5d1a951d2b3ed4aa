"""`ike-sa-sync bench bank`: that it measures what it says, on a small bank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.bench.bank import gateways_of, section

pytestmark = pytest.mark.redis

BENCH = (sys.executable, "-m", "bridge", "bench", "bank", "--stubs", "300", "--stubs", "600")


def test_it_gives_its_figures_for_each_size_as_json_with_their_circumstances(tmp_path: Path) -> None:
    done = subprocess.run([*BENCH, "--json"], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["benchmark"] == "bank"
    assert {"cpu", "cores", "kernel", "python", "redis"} <= told["machine"].keys()
    assert [(row["stubs"], row["gateways"]) for row in told["result"]["rows"]] == [(300, 1), (600, 1)]
    for row in told["result"]["rows"]:
        assert row["octets_per_stub"] > 300
        for step in ("Initiate", "GET", "Download"):
            assert row[step]["per_s"] > 0
            assert row[step]["cpu_us"]["sidecar"] > 0
            assert row[step]["cpu_us"]["redis"] > 0


def test_it_prints_a_table_and_draws_a_plot(tmp_path: Path) -> None:
    plot = tmp_path / "bank.svg"
    done = subprocess.run([*BENCH, "--plot", str(plot)], capture_output=True, text=True, check=True)
    for word in ("Initiate", "GET", "Download", "300", "600"):
        assert word in done.stdout
    assert plot.read_text().startswith("<svg")


def test_the_stubs_are_those_of_several_gateways_where_asked_and_all_are_downloaded() -> None:
    done = subprocess.run([*BENCH[:-2], "--gateways", "7", "--json"], capture_output=True, text=True, check=True)
    [row] = json.loads(done.stdout)["result"]["rows"]
    # a download that brings another number than was stored ends the benchmark
    assert (row["stubs"], row["gateways"]) == (300, 7)
    text, plot = section({"rows": [row]})
    assert "| 300 of 7 gateways |" in text
    assert "300 stubs of 7 gateways" in plot


def test_no_gateway_has_more_stubs_than_its_share_unless_asked() -> None:
    assert [gateways_of(count, None) for count in (1, 100_000, 100_001, 1_000_000)] == [1, 1, 2, 10]
    assert gateways_of(1_000_000, 1) == 1
