"""Machines with systemd inside the test machine: containers that boot, each with a network of its own.

Their root file system is the test machine's with changes of their own (overlayfs), so they have the package installed.
What `vagrant up` does with virtual machines is done here with these, by the same scripts.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import socket
import subprocess
import uuid
from pathlib import Path
from typing import Any

import vici

from bridge.lab.daemon import SLOWNESS, wait_until
from bridge.service import control
from bridge.service.control import ControlError

log = logging.getLogger(__name__)
"""what takes minutes on an emulated processor: shown while the tests run"""

PROJECT = Path("/project")
PROVISION = PROJECT / "source/vagrant/provision"
PACKAGE = str(PROJECT / "ike-sa-sync.deb")
STATE = Path("/run/machines")
SECRETS = STATE / "secrets"
BRIDGE = "lan"
SITE = "10.10.0.1"
NOT_NEEDED = ("dbus.service", "dbus.socket", "systemd-logind.service", "console-getty.service", "apparmor.service")
"""units that only make the boot longer"""
ADDRESSES = """\
[Unit]
DefaultDependencies=no
After=systemd-remount-fs.service network-pre.target
Before=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=ip link set host0 up
"""
"""what Vagrant or an installer configures: addresses that are there from the start"""
SLOW = f"[Service]\nTimeoutStartSec={60 * SLOWNESS:.0f}\n"
"""for all services: the sidecar's start takes an emulated processor with other work more than its unit's minute"""
PATIENCE = 60.0
"""seconds, ten times as many on an emulated processor: a boot takes that"""


def run(*argv: str, check: bool = True) -> str:
    """Run a command in the test machine, give its output. TimeoutExpired where it does not end."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=PATIENCE * SLOWNESS)
    assert not check or done.returncode == 0, f"{' '.join(argv)} ({done.returncode}): {done.stderr}{done.stdout}"
    return done.stdout


class Machine:
    """One booted container on the bridge `lan`."""

    def __init__(self, name: str, address: str, site: bool = False, enabled: tuple[str, ...] = ()) -> None:
        """`enabled`: units that run from the first boot on, as those of a package that apt has installed do."""
        self.name = name
        self._enabled = enabled
        self.address = address
        self.addresses = {"host0": f"{address}/24"} | ({"lo": f"{SITE}/32"} if site else {})
        self.root = STATE / name / "root"
        self._leader = ""

    def boot(self) -> None:
        """Start it; `wait_up` waits for it."""
        log.info("%s boots", self.name)
        for part in ("upper", "work", "root"):
            (STATE / self.name / part).mkdir(parents=True, exist_ok=True)
        layers = ",".join(
            f"{key}={value}"
            for key, value in {
                "lowerdir": "/",
                "upperdir": STATE / self.name / "upper",
                "workdir": STATE / self.name / "work",
            }.items()
        )
        run("mount", "-t", "overlay", "overlay", "-o", layers, str(self.root))
        etc = self.root / "etc"
        (etc / "fstab").write_text("")
        (etc / "hostname").write_text(f"{self.name}\n")
        (etc / "machine-id").write_text(f"{uuid.uuid4().hex}\n")
        for part in ("graphical.target.wants/", ""):
            (etc / f"systemd/system/{part}ike-sa-sync-test.service").unlink()
        (etc / "systemd/system/service.d").mkdir()
        (etc / "systemd/system/service.d/slow.conf").write_text(SLOW)
        for unit in NOT_NEEDED:
            (etc / "systemd/system" / unit).symlink_to("/dev/null")
        commands = "".join(f"ExecStart=ip address add {it} dev {link}\n" for link, it in self.addresses.items())
        (etc / "systemd/system/addresses.service").write_text(ADDRESSES + commands)
        (etc / "systemd/system/sysinit.target.wants/addresses.service").symlink_to("../addresses.service")
        for unit in self._enabled:
            (etc / "systemd/system/multi-user.target.wants" / unit).symlink_to(f"/lib/systemd/system/{unit}")
        shutil.rmtree(self.root / "project", ignore_errors=True)
        self._start()

    def _start(self) -> None:
        options = (
            "--boot",
            "--quiet",
            "--keep-unit",
            f"--machine={self.name}",
            f"--directory={self.root}",
            f"--network-bridge={BRIDGE}",
            f"--bind-ro={PROJECT}",
            f"--bind-ro={SECRETS}:/secrets",
        )
        run(
            "systemd-run",
            "--quiet",
            "--collect",
            f"--unit=machine-{self.name}",
            "--property=Delegate=yes",
            "systemd-nspawn",
            *options,
        )

    def wait_up(self) -> None:
        """Wait until its systemd has started everything."""
        wait_until(self._booted, f"{self.name}, booted", PATIENCE)
        log.info("%s is up", self.name)

    def _booted(self) -> bool:
        if not self.leader():
            return False
        return self.run("systemctl", "is-system-running", check=False).strip() in ("running", "degraded")

    def leader(self) -> str:
        """The process id of its init; empty while it has none."""
        if not self._leader or not Path("/proc", self._leader, "root").exists():
            self._leader = run("machinectl", "show", self.name, "--property=Leader", "--value", check=False).strip()
        return self._leader

    def path(self, inside: str) -> str:
        """Where a path inside it is seen from outside."""
        return f"/proc/{self.leader()}/root{inside}"

    def run(self, *argv: str, check: bool = True) -> str:
        """Run a command in it, give its output."""
        return run("nsenter", f"--target={self.leader()}", "--all", "--", *argv, check=check)

    def tail(self) -> str:
        """What it is doing, and the end of its journal."""
        if not self.leader():
            return "is off"
        jobs = self.run("systemctl", "--no-pager", "list-jobs", check=False)
        return jobs + self.run("journalctl", "--no-pager", "--lines=40", check=False)

    def provision(self, script: str, *arguments: str) -> str:
        """Run a script of vagrant/provision in it."""
        log.info("%s is provisioned: %s", self.name, script)
        return self.run(str(PROVISION / script), *arguments)

    def is_enabled(self, unit: str) -> bool:
        """Whether a unit that exists starts at boot."""
        return self.run("systemctl", "is-enabled", unit, check=False).strip() == "enabled"

    def power_off(self) -> None:
        """Every process gone at once. Harmless where it is off."""
        if not self.leader():
            return
        # a process that ends meanwhile makes this fail: what counts is that they all end
        run("machinectl", "kill", "--signal=SIGKILL", "--kill-who=all", self.name, check=False)
        wait_until(lambda: not self.leader(), f"the end of {self.name}", PATIENCE)
        # its network may live a little longer, and with it the name of the cable
        run("ip", "link", "delete", f"vb-{self.name}", check=False)

    def power_on(self) -> None:
        """Boot it again, with the file system that it had."""
        wait_until(
            lambda: run("systemctl", "is-active", f"machine-{self.name}", check=False).strip() != "active",
            "its unit, ended",
            PATIENCE,
        )
        self._start()
        self.wait_up()

    def main_pid(self, unit: str) -> str:
        """The main process of a unit; 0 for none."""
        return self.run("systemctl", "show", "--property=MainPID", "--value", unit).strip()

    def sas(self) -> list[dict[str, Any]]:
        """Its established IKE_SAs, as VICI's list-sas gives them, each with its connection as `name`."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path("/run/charon.vici"))
        found: list[dict[str, Any]] = []
        for entry in vici.Session(connection).list_sas():
            found += [{"name": name} | sa for name, sa in entry.items() if sa["state"] == b"ESTABLISHED"]
        connection.close()
        return found

    def status(self, role: str) -> dict[str, Any]:
        """What `ike-sa-sync status --json` prints of its sidecar, without the seconds that its start takes here.
        ControlError while it does not run."""
        socket = self.path(f"/run/ike-sa-sync/{role}.sock")
        return asyncio.run(control.call(socket, {"command": "status"}))

    def resume(self, *arguments: str) -> dict[str, Any]:
        """`ike-sa-sync resume --json` on a client."""
        command = ("ike-sa-sync", "resume", "-c", "/etc/ike-sa-sync/client.yaml", "--json")
        return dict(json.loads(self.run(*command, *arguments, check=False)))

    def ping(self, target: str) -> bool:
        """Whether an echo request is answered."""
        return " bytes from " in self.run("ping", "-n", "-c", "1", "-W", "5", target, check=False)


Machines = dict[str, Machine]
"""bank, gw1, gw2 and client"""


def active(machine: Machine, unit: str) -> bool:
    return machine.run("systemctl", "is-active", unit, check=False).strip() == "active"


def reachable(machine: Machine, role: str) -> bool:
    try:
        return bool(machine.status(role)["charon"]["reachable"])
    except ControlError:
        return False


def bank_cli(machines: Machines, *command: str) -> str:
    bank = machines["bank"]
    password = (SECRETS / "bank-password").read_text().strip()
    return bank.run("env", f"REDISCLI_AUTH={password}", "redis-cli", "--user", "gateway", *command)


def empty_bank(machines: Machines) -> None:
    """No user of the bank may do it with one command."""
    if keys := bank_cli(machines, "--scan", "--pattern", "ike:*").split():
        bank_cli(machines, "DEL", *keys)


def stubs(machines: Machines) -> list[str]:
    """The stubs in the bank, as <gateway's address> <SPI>."""
    keys = bank_cli(machines, "--scan", "--pattern", "ike:stub:*").split()
    return [re.sub(r"ike:stub:\{(.*)/..\}:(.*)", r"\1 \2", key) for key in keys]


def expected(gateway: Machine) -> list[str]:
    """The stubs that the SAs of a gateway should have, as `stubs` gives them."""
    return [
        f"{gateway.address} {sa['initiator-spi' if sa.get('initiator') == b'yes' else 'responder-spi'].decode()}"
        for sa in gateway.sas()
    ]


LEFT_BY_PROVISIONING = {
    "/etc/swanctl/swanctl.conf.before-ike-sa-sync",
    "/etc/sysctl.d/60-ike-sa-sync-gateway.conf",
    "/etc/strongswan.d/ike-sa-sync-pool.conf",
}
"""what was there before it, a gateway's forwarding, and its pool"""


def assert_no_trace(machine: Machine) -> None:
    found = machine.run(
        *("find", "/etc", "/usr", "/var/lib", "/run", "-xdev"),
        *("-name", "*ike-sa-sync*", "!", "-path", "/var/lib/dpkg/*"),
    )
    left = sorted(set(found.split()) - LEFT_BY_PROVISIONING)
    assert not left, f"left behind: {left}"
    assert "ike-sa-sync" not in machine.run("nft", "list", "ruleset")
    # also one that is connected, as a sidecar leaves the socket that systemd holds
    assert ":4510" not in machine.run("ss", "-Huna")
    # active ones, and failed ones
    assert not machine.run("systemctl", "list-units", "--plain", "--no-legend", "ike-sa-sync*").strip()
