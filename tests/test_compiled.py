"""The modules that pyproject.toml has compiled: `make test-compiled` runs all tests with them, `make test` without."""

from __future__ import annotations

import importlib
import os
import subprocess
import tomllib
from inspect import getmembers, isclass
from pathlib import Path

import pytest
from msgspec import Struct

from bridge.service import process

ROOT = Path(__file__).parents[1]
TARGETS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
MODULES: list[str] = TARGETS["wheel"]["hooks"]["custom"]["modules"]
CODE = os.environ.get("IKE_SA_SYNC_CODE", "pure Python")


def name_of(path: str) -> str:
    """The module of a file."""
    return path.removesuffix(".py").replace("/", ".")


def structs(path: str) -> list[str]:
    """The classes of msgspec that a module makes."""
    module = importlib.import_module(name_of(path))
    made = [each for _, each in getmembers(module, isclass) if each.__module__ == module.__name__]
    return [each.__name__ for each in made if issubclass(each, Struct)]


@pytest.mark.parametrize("path", MODULES)
def test_each_module_runs_in_the_form_that_is_tested(path: str) -> None:
    file = importlib.import_module(name_of(path)).__file__
    assert file is not None
    assert file.startswith(str(ROOT / path.removesuffix("py")))
    assert file.endswith(".py") == (CODE == "pure Python")


def test_the_process_says_which_form_that_is() -> None:
    assert process.code() == CODE


def test_no_class_of_msgspec_is_compiled() -> None:
    """mypyc ignores what a class statement says to it (`frozen`, `gc`): the class would not be the same."""
    assert "Stub" in structs("bridge/stub/stub.py")
    assert {path: structs(path) for path in MODULES} == {path: [] for path in MODULES}


@pytest.mark.parametrize("asked_for", ["", "1"])
def test_one_of_the_wheels_of_make_dist_is_compiled_whatever_the_environment_says(
    tmp_path: Path, asked_for: str
) -> None:
    """With a build that writes down what it was asked for."""
    made, venv = tmp_path / "dist", tmp_path / "venv"
    venv.mkdir()
    (venv / ".build").touch()
    build = tmp_path / "build"
    build.write_text(
        f'#!/bin/sh -eu\necho "$*: $IKE_SA_SYNC_COMPILE" >>{tmp_path}/log\ntouch {made}/a.whl {made}/a.tar.gz\n'
    )
    build.chmod(0o755)
    subprocess.run(
        ["make", "--silent", f"--old-file={venv}/.build", "dist", f"DIST={made}", f"VENV={venv}", f"BUILD={build}"],
        cwd=ROOT,
        env=os.environ | {"IKE_SA_SYNC_COMPILE": asked_for, "SOURCE_DATE_EPOCH": "0"},
        capture_output=True,
        check=True,
    )
    assert (tmp_path / "log").read_text().splitlines() == [f"--outdir {made}: ", f"--wheel --outdir {made}: 1"]
