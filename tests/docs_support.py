"""The tests that a document names, as `test_file.py::test_name`, and whether they are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
_NAMED = re.compile(r"`(?:tests/)?(test_\w+\.py)::(test_\w+)`")


def named_tests(document: Path) -> list[tuple[str, str]]:
    """File and name of every test that a document names."""
    return _NAMED.findall(document.read_text())


@cache
def names_in(file: str) -> frozenset[str]:
    """The names of the tests in a file of this folder; none if there is no such file."""
    path = TESTS / file
    if not path.exists():
        return frozenset()
    tree = ast.parse(path.read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


def missing_tests(document: Path) -> list[str]:
    """The tests that a document names and that do not exist."""
    return [f"{file}::{name}" for file, name in named_tests(document) if name not in names_in(file)]
