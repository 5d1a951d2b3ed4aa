"""The modules that pyproject.toml has compiled: `make test-compiled` runs all tests with them, `make test` without."""

from __future__ import annotations

import importlib
import os
import re
import tomllib
from pathlib import Path

import pytest

from bridge.service import process

ROOT = Path(__file__).parents[1]
TARGETS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
MODULES: list[str] = TARGETS["wheel"]["hooks"]["custom"]["modules"]
CODE = os.environ.get("IKE_SA_SYNC_CODE", "pure Python")


@pytest.mark.parametrize("path", MODULES)
def test_each_module_runs_in_the_form_that_is_tested(path: str) -> None:
    file = importlib.import_module(path.removesuffix(".py").replace("/", ".")).__file__
    assert file is not None
    assert file.startswith(str(ROOT / path.removesuffix("py")))
    assert file.endswith(".py") == (CODE == "pure Python")


def test_the_process_says_which_form_that_is() -> None:
    assert process.code() == CODE


def test_no_class_of_msgspec_is_compiled() -> None:
    """mypyc ignores what a class statement says to it (`frozen`, `gc`): the class would not be the same."""
    assert not [path for path in MODULES if re.search(r"^class .*\bStruct\b", (ROOT / path).read_text(), re.M)]
