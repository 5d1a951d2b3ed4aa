"""Where the lab finds a Debian release's strongSwan (tests/test_releases.py runs them)."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.lab import LabError, releases


def test_the_machines_own_release_is_the_one_installed() -> None:
    assert releases.root(releases.machine()) == Path("/")


def test_another_release_is_in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "CACHE", tmp_path)
    (tmp_path / "trixie").mkdir()
    monkeypatch.setattr(releases, "machine", lambda: "bookworm")
    assert releases.root("trixie") == tmp_path / "trixie"


def test_a_release_that_is_not_installed_is_named_with_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "CACHE", tmp_path)
    with pytest.raises(LabError, match=r"sid is missing: run `.*python.* -m bridge\.lab\.releases`"):
        releases.root("sid")


def test_a_release_that_cannot_be_had_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(releases, "mirror", lambda: f"file://{tmp_path}/nothing-here")
    program = tmp_path / "bin/mmdebstrap"
    program.parent.mkdir()
    # what it was to fill is the last argument but one
    program.write_text('#!/bin/sh\nshift $(($# - 2))\nmkdir -p "$1/etc"\necho no such release >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    with pytest.raises(LabError, match="no such release"):
        releases.install("sid")
    assert not list((tmp_path / "cache").iterdir())
