"""The guarantees of docs/bank.md have tests (tests/test_docs.py looks whether those that a page names exist)."""

import re
from pathlib import Path

from docs_support import DOCS, TESTS, missing_tests, named_tests, names_in


def test_every_guarantee_of_the_bank_has_its_test() -> None:
    text = (DOCS / "bank.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and line.endswith("` |")]
    assert len(rows) > 20
    assert len(named_tests(DOCS / "bank.md")) > len(rows)


def test_the_tests_that_the_test_machine_chooses_exist() -> None:
    """One name that does not exist, and pytest runs none."""
    chosen = re.findall(
        r"^    (test_\w+\.py)(?:::(\w+))?", (DOCS.parent / "vagrant/vm/inside").read_text(), re.MULTILINE
    )
    assert len(chosen) > 15
    assert [
        (file, name) for file, name in chosen if not (TESTS / file).exists() or (name and name not in names_in(file))
    ] == []


def test_a_test_that_does_not_exist_is_found_missing(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("`test_docs_tests.py::test_nothing_of_the_sort`, `test_nowhere.py::test_a`")
    assert missing_tests(document) == ["test_docs_tests.py::test_nothing_of_the_sort", "test_nowhere.py::test_a"]
