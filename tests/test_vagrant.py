"""vagrant/Vagrantfile, read by Vagrant itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("vagrant") is None, reason="Debian 12 has Vagrant, later releases do not")
def test_the_vagrantfile_is_valid(tmp_path: Path) -> None:
    done = subprocess.run(
        # the providers themselves, libvirt and VirtualBox, need a machine that has them
        ["vagrant", "validate", "--ignore-provider"],
        cwd=ROOT / "vagrant",
        env=os.environ | {"VAGRANT_HOME": str(tmp_path / "home"), "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot")},
        capture_output=True,
        text=True,
        check=False,
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "validated successfully" in told
    # such as an address that the host has
    assert "to not work" not in told
