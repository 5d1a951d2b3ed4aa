"""docs/performance.md and its plots, as `ike-sa-sync bench report` writes them from docs/bench/*.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from bridge.bench.aims import BANK_RATES, aims
from bridge.bench.cli import bench
from bridge.bench.report import SECTIONS
from bridge.bench.usage import machine
from bridge.service.process import code

DOCS = Path(__file__).parents[1] / "docs"
MEASURED = sorted(DOCS.glob("bench/*.json"))
NAMES = [file.stem for file in MEASURED]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the project's own results, and nothing made of them."""
    (tmp_path / "bench").mkdir()
    for file in MEASURED:
        shutil.copy(file, tmp_path / "bench")
    return tmp_path


def test_every_result_has_a_section() -> None:
    assert MEASURED
    assert {file.stem for file in MEASURED} <= SECTIONS.keys()


def test_the_projects_performance_page_and_plots_are_those_of_its_results(copy: Path) -> None:
    done = CliRunner().invoke(bench, ["report", "--docs", str(copy)])
    assert done.exit_code == 0, done.output
    assert (copy / "performance.md").read_text() == (DOCS / "performance.md").read_text()
    for file in MEASURED:
        plot = file.with_suffix(".svg").name
        assert (copy / "bench" / plot).read_text() == (DOCS / "bench" / plot).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_result_of_an_older_version_is_named_with_the_command_that_measures_it(copy: Path, name: str) -> None:
    file = copy / "bench" / f"{name}.json"
    measured = json.loads(file.read_text())
    file.write_text(json.dumps(measured | {"result": {}}))
    done = CliRunner().invoke(bench, ["report", "--docs", str(copy)])
    assert done.exit_code == 1
    assert f"{name}.json" in done.output
    assert f"ike-sa-sync bench {name.removesuffix('-long')}" in done.output
    assert not (copy / "performance.md").exists()


def test_the_cost_of_forward_secrecy_is_that_of_the_same_resumption_with_it(copy: Path) -> None:
    file = copy / "bench" / "handshake-vs-resume.json"
    measured = json.loads(file.read_text())
    together = measured["result"]["simulated together"]
    together["none"]["cpu_ms"] = 0.64
    together["forward-secrecy"] = together["none"] | {"cpu_ms": 0.752}
    file.write_text(json.dumps(measured))
    assert CliRunner().invoke(bench, ["report", "--docs", str(copy)]).exit_code == 0
    page = (copy / "performance.md").read_text()
    assert "costs the gateway 0.11 ms of CPU more a resumption (0.75 ms against 0.64, 90 in parallel)" in page


PURE, COMPILED = "pure Python", "compiled"


@pytest.mark.parametrize(
    ("forms", "said"),
    [
        ({}, "All other figures on this page are of pure Python."),
        (dict.fromkeys(NAMES, PURE), "All other figures on this page are of pure Python."),
        (dict.fromkeys(NAMES, COMPILED), "All other figures on this page are of compiled code."),
        (
            {"storm": COMPILED, "bank": COMPILED, "growth": PURE},
            "All other figures on this page are of pure Python, but for those of storm, bank, which are of compiled "
            "code.",
        ),
        (
            dict.fromkeys(NAMES, COMPILED) | {"growth": PURE},
            "All other figures on this page are of compiled code, but for those of growth, which are of pure Python.",
        ),
    ],
    ids=["not recorded", "pure", "compiled", "two compiled", "one pure"],
)
def test_the_page_says_which_form_of_the_code_each_result_is_of(copy: Path, forms: dict[str, str], said: str) -> None:
    places = where_taken(DOCS / "performance.md")
    for name, form in forms.items():
        file = copy / "bench" / f"{name}.json"
        measured = json.loads(file.read_text())
        measured["machine"]["code"] = form
        file.write_text(json.dumps(measured))
    assert CliRunner().invoke(bench, ["report", "--docs", str(copy)]).exit_code == 0
    page = copy / "performance.md"
    assert said in page.read_text()
    # the same machine, whatever runs on it
    assert where_taken(page) == places


def where_taken(page: Path) -> list[str]:
    return [line for line in page.read_text().splitlines() if line.startswith(("Taken ", "Measured "))]


def test_a_result_records_the_form_of_the_code_as_status_says_it() -> None:
    assert machine()["code"] == code()


def test_without_results_it_says_how_to_get_some(tmp_path: Path) -> None:
    done = CliRunner().invoke(bench, ["report", "--docs", str(tmp_path)])
    assert done.exit_code == 1
    assert "--short" in done.output


def row_of(stubs: int, octets: float, rate: int) -> dict[str, object]:
    return {"stubs": stubs, "octets_per_stub": octets} | {step: {"per_s": rate} for step in BANK_RATES}


def test_a_bank_is_held_to_its_aims_at_a_hundred_thousand_stubs_and_a_larger_one_to_that() -> None:
    rows = [row_of(20_000, 800.0, 1), row_of(100_000, 690.0, 50_000), row_of(1_000_000, 829.0, 39_999)]
    found = {aim.what: (aim.wanted, aim.measured, aim.met) for aim in aims({"bank": {"rows": rows}})}
    assert found == {
        "bank, 100,000 stubs: octets each": ("700", "690", True),
        "bank, 100,000 stubs: Initiate a second": ("20,000", "50,000", True),
        "bank, 100,000 stubs: GET a second": ("8,000", "50,000", True),
        "bank, 100,000 stubs: Download a second": ("50,000", "50,000", True),
        "bank, 1,000,000 stubs to 100,000: octets each": ("1.2", "1.20", False),
        "bank, 1,000,000 stubs to 100,000: Initiate a second": ("0.8", "0.80", False),
        "bank, 1,000,000 stubs to 100,000: GET a second": ("0.8", "0.80", False),
        "bank, 1,000,000 stubs to 100,000: Download a second": ("0.8", "0.80", False),
    }


def test_a_small_bank_is_held_to_no_size() -> None:
    found = [aim.what for aim in aims({"bank": {"rows": [row_of(20_000, 710.0, 30_000)]}})]
    assert found == [f"bank, 20,000 stubs: {step} a second" for step in BANK_RATES]
