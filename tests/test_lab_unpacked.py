"""Where the lab finds a program of Debian 13 that machines of an older Debian have unpacked."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.lab import LabError, unpacked
from bridge.lab.unpacked import RELEASE, VALKEY

OTHER = "bookworm"


@pytest.fixture
def installed(tmp_path: Path) -> str:
    """The path of a program that the machine has."""
    file = tmp_path / "valkey-server"
    file.touch()
    return str(file)


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The unpacked package's loader."""
    monkeypatch.setattr(unpacked, "CACHE", tmp_path)
    file = tmp_path / "valkey/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
    file.parent.mkdir(parents=True)
    file.touch()
    return str(file)


def test_a_debian_13_that_has_the_package_runs_that(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked, "machine", lambda: RELEASE)
    assert VALKEY.program(installed) == [installed]


@pytest.mark.parametrize("release", [RELEASE, OTHER])
def test_a_machine_without_the_package_runs_the_unpacked_one(
    release: str, loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacked, "machine", lambda: release)
    first, *_, last = VALKEY.program("/not-installed/valkey-server")
    assert (first, last) == (loader, f"{tmp_path}/valkey/not-installed/valkey-server")


def test_an_older_debians_own_package_is_another_version(
    installed: str, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacked, "machine", lambda: OTHER)
    assert VALKEY.program(installed)[0] == loader


@pytest.mark.parametrize("release", [RELEASE, OTHER])
def test_what_is_neither_installed_nor_unpacked_is_named_with_its_fix(
    release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacked, "CACHE", tmp_path)
    monkeypatch.setattr(unpacked, "machine", lambda: release)
    with pytest.raises(LabError, match=r"valkey is missing: run `.*python.* -m bridge\.lab\.unpacked valkey`"):
        VALKEY.program("/not-installed/valkey-server")
