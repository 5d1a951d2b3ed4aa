"""The machines of vagrant/Vagrantfile, brought up by Vagrant inside vagrant/emulated/run (`make test-vagrant`)."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
"""what takes minutes on emulated processors: shown while the tests run"""

ROOT = Path(__file__).parents[1]
MACHINES = ("bank", "server", "gw1", "gw2", "client")
PATIENCE = 600.0
"""seconds: a boot takes about two minutes on an emulated processor, a busy one more"""
HOUR = 3600.0


def wait_until(holds: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait for a condition in a machine; AssertionError with `what` where it does not come."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(2)


def virsh(*arguments: str) -> str:
    """What libvirt says."""
    return subprocess.run(["virsh", "--quiet", *arguments], capture_output=True, text=True, check=True).stdout


class VagrantLab:
    """A copy of the project, and Vagrant in it. Machines that are up stay up, so that a test runs alone."""

    def __init__(self) -> None:
        self.directory = Path(os.environ["IKE_SA_SYNC_VAGRANT"])
        self.project = self.directory / "project"
        self._config = self.directory / "ssh-config"
        self._copy()

    def _copy(self) -> None:
        secrets, kept = self.project / "vagrant/.secrets", self.directory / "secrets"
        if secrets.exists():
            secrets.rename(kept)
        shutil.rmtree(self.project, ignore_errors=True)
        (self.project / "vagrant").mkdir(parents=True)
        if kept.exists():
            kept.rename(secrets)
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        packages = [str(path.relative_to(ROOT)) for path in ROOT.glob("dist/ike-sa-sync_*.deb")]
        for name in [*listed.stdout.split("\0"), *packages]:
            if (ROOT / name).is_file():
                (self.project / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.project / name)

    def vagrant(self, *arguments: str, echo: bool = True) -> str:
        """Run Vagrant, show what it prints, and give it. AssertionError where it fails."""
        log.info("vagrant %s", " ".join(arguments))
        started = time.monotonic()
        process = subprocess.Popen(
            ["vagrant", *arguments],
            cwd=self.project / "vagrant",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            # of a progress bar the last state
            printed.append(line.rstrip("\n").rsplit("\r", 1)[-1].rsplit("\x1b[K", 1)[-1])
            if echo:
                log.info("%s", printed[-1])
        told = "\n".join(printed)
        assert process.wait() == 0, told
        log.info("vagrant %s: %.0f s", " ".join(arguments), time.monotonic() - started)
        return told

    def learn_addresses(self) -> None:
        """`vagrant ssh` takes seconds each time; its configuration for ssh does not change."""
        self._config.write_text(self.vagrant("ssh-config", echo=False))

    def ssh(self, machine: str, command: str) -> list[str]:
        """The command line of a command in a machine, as root."""
        config = ("-F", str(self._config), "-o", "ConnectTimeout=300", "-o", "ServerAliveInterval=60")
        return ["ssh", *config, machine, f"sudo sh -c {_quoted(command)}"]

    def run(self, machine: str, command: str, check: bool = True, seconds: float = PATIENCE) -> str:
        """Run a command in a machine as root, give its output."""
        done = subprocess.run(self.ssh(machine, command), capture_output=True, text=True, check=False, timeout=seconds)
        assert not check or done.returncode == 0, f"{machine}: {command}: {done.stderr}{done.stdout}"
        return done.stdout

    def start(self, machine: str, command: str) -> subprocess.Popen[str]:
        """Begin a command in a machine."""
        return subprocess.Popen(
            self.ssh(machine, command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def reachable(self, machine: str) -> bool:
        """Whether it has booted."""
        with suppress(subprocess.TimeoutExpired):
            return self.run(machine, "echo up", check=False, seconds=300) == "up\n"
        return False

    def ready(self, machine: str, role: str) -> bool:
        """Whether its check has no failure."""
        with suppress(subprocess.TimeoutExpired):
            return ": 0 fail" in self.run(
                machine, f"ike-sa-sync check -c /etc/ike-sa-sync/{role}.yaml", check=False, seconds=300
            )
        return False

    def status(self, machine: str, role: str) -> dict[str, Any]:
        """`ike-sa-sync status --json`."""
        return dict(json.loads(self.run(machine, f"ike-sa-sync status -c /etc/ike-sa-sync/{role}.yaml --json")))

    def session(self) -> dict[str, Any]:
        """The client's only one; a new one where it has none."""

        def found() -> list[dict[str, Any]]:
            sas: list[dict[str, Any]] = self.status("client", "client")["sas"]
            if not sas:
                self.run("client", "swanctl --initiate --child net --ike home", check=False)
            return sas

        # while it moves, there may be two
        wait_until(lambda: len(found()) == 1, "one session")
        [sa] = found()
        return dict(sa)

    def resume(self, gateway: str) -> dict[str, Any]:
        """`ike-sa-sync resume --json` to a gateway."""
        command = f"ike-sa-sync resume -c /etc/ike-sa-sync/client.yaml --to {gateway} --json"
        return dict(json.loads(self.run("client", command, check=False)))

    def pids(self, units: dict[str, tuple[str, ...]]) -> dict[tuple[str, str], str]:
        """The main processes of machines' units."""
        return {
            (machine, unit): self.run(machine, f"systemctl show --property=MainPID --value {unit}").strip()
            for machine, named in units.items()
            for unit in named
        }


def _quoted(command: str) -> str:
    return "'" + command.replace("'", "'\\''") + "'"


def inside() -> bool:
    """Whether this process runs in vagrant/emulated/run."""
    return "IKE_SA_SYNC_VAGRANT" in os.environ
