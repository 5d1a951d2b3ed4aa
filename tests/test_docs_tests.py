"""Every test that a document names exists."""

from pathlib import Path

import pytest

from docs_support import DOCS, missing_tests, named_tests


@pytest.mark.parametrize("document", sorted(DOCS.rglob("*.md")), ids=lambda path: path.name)
def test_the_tests_that_a_document_names_exist(document: Path) -> None:
    assert missing_tests(document) == []


def test_every_guarantee_of_the_bank_has_its_test() -> None:
    text = (DOCS / "bank.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and line.endswith("` |")]
    assert len(rows) > 20
    assert len(named_tests(DOCS / "bank.md")) > len(rows)


def test_a_test_that_does_not_exist_is_found_missing(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("`test_docs_tests.py::test_nothing_of_the_sort`, `test_nowhere.py::test_a`")
    assert missing_tests(document) == ["test_docs_tests.py::test_nothing_of_the_sort", "test_nowhere.py::test_a"]
