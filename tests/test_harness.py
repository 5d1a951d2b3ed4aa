"""What the tests rely on themselves: signals of children, workers beside each other, and what .ci/run says."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IGNORABLE = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)


def test_a_child_does_not_ignore_the_signals_that_tests_send() -> None:
    shown = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
    [ignored] = [int(line.split()[1], 16) for line in shown.splitlines() if line.startswith("SigIgn:")]
    assert not any(ignored & 1 << (number - 1) for number in IGNORABLE)


def test_nor_does_it_where_the_tests_run_in_the_background() -> None:
    """As in `nohup make test &`, which hung for ever: a child never saw the SIGINT that its test waited for."""
    test = f"{__file__}::{test_a_child_does_not_ignore_the_signals_that_tests_send.__name__}"
    command = f"trap '' HUP INT QUIT; exec {sys.executable} -m pytest -q {test}"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


ALONE = """
import pathlib, time, pytest

def work():
    began = time.monotonic()
    time.sleep(0.05)
    with pathlib.Path("times").open("a") as file:
        file.write(f"{{began}} {{time.monotonic()}}\\n")

@pytest.mark.parametrize("number", range(5))
{mark}
def test_{name}(number):
    work()
"""


def test_a_test_that_is_to_be_alone_shares_the_machine_with_no_other_worker(tmp_path: Path) -> None:
    for name, mark in (("alone", "@pytest.mark.alone"), ("shared", "")):
        (tmp_path / f"test_{name}.py").write_text(ALONE.format(name=name, mark=mark))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", ".", "-p", "conftest", "-n2"]
    done = subprocess.run(
        [*command, "--dist", "loadfile", "."],
        cwd=tmp_path,
        env={name: value for name, value in environment.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "10 passed" in done.stdout, done.stdout
    times = sorted(tuple(map(float, line.split())) for line in (tmp_path / "times").read_text().splitlines())
    assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(times))


MAKE = """#!/bin/sh
case "$*" in
*last-failed*) echo '=== {again} in 1.00s ==='; exit {status} ;;
esac
for number in {failed}; do echo "FAILED tests/test_x.py::test_$number - oh"; done
echo '=== 4 failed, 9 passed in 2.00s (0:00:02) ==='
[ -z '{failed}' ]
"""


@pytest.mark.parametrize(
    ("failed", "again", "status", "expected"),
    [
        ("", "", 0, 0),
        ("1 2 3", "3 passed", 0, 0),
        ("1 2 3 4", "4 passed", 0, 1),
        ("1", "1 failed", 2, 2),
    ],
    ids=["none fails", "three are unsteady", "four are unsteady", "one fails twice"],
)
def test_ci_runs_failures_once_more_and_accepts_three_unsteady_tests(
    tmp_path: Path, failed: str, again: str, status: int, expected: int
) -> None:
    make = tmp_path / "make"
    make.write_text(MAKE.format(failed=failed, again=again, status=status))
    make.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / ".ci/run"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == expected
    closing = done.stdout.splitlines()[-1]
    assert closing == (f"=== {again} in 1.00s ===" if failed else "=== 4 failed, 9 passed in 2.00s (0:00:02) ===")
    assert ("unsteady" in done.stdout) is (bool(failed) and status == 0)
