"""vagrant/Vagrantfile, read by Vagrant itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from ipaddress import IPv4Network
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VAGRANTFILE = ROOT / "vagrant/Vagrantfile"


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


def test_the_outer_network_is_one_that_virtualbox_allows() -> None:
    """VirtualBox on Linux takes host-only networks of 192.168.56.0/21 only, from 6.1.28 on."""
    [prefix] = re.findall(r'^NETWORK = ENV\.fetch\("\w+", "([\d.]+)"\)', VAGRANTFILE.read_text(), re.MULTILINE)
    assert IPv4Network(f"{prefix}.0/24").subnet_of(IPv4Network("192.168.56.0/21"))


def test_the_emulated_machines_box_has_nothing_that_the_provisioning_installs() -> None:
    """Or `make test-vagrant` would not notice that it no longer installs it."""
    recipe = (ROOT / "vagrant/emulated/box").read_text()
    box = {package for listed in re.findall(r"--include=(\S+)", recipe) for package in listed.split(",")}
    scripts = [path.read_text() for path in (ROOT / "vagrant/provision").iterdir()]
    installed = {
        word
        for script in scripts
        for command in re.findall(r"apt-get -q -y install ((?:.*\\\n)*.*)", script)
        for word in command.replace("\\\n", " ").split()
        if re.fullmatch(r"[a-z][a-z0-9.+-]+", word)
    }
    assert {"redis-server", "bird2", "charon-systemd", "openssl"} <= installed
    assert not box & installed
