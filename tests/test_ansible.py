"""The Ansible role on hosts of the lab: bank, gateways and a client, with real charons, sidecars and a Redis.

A lab's host has no systemd: its `systemctl` is a stand-in that has the test start and stop the real programs. Packages
are not installed (`--skip-tags packages`). Needs ansible-core of ansible/requirements.txt: `make test-ansible`.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from bridge.lab import Lab
from bridge.lab.charon import Charon
from bridge.lab.daemon import Daemon, wait_until
from bridge.lab.host import Host
from bridge.lab.sidecar import program
from bridge.lab.topology import SITE, client_host, swanctl
from clear_support import guard_unit

ROOT = Path(__file__).parents[1]
PLAYBOOK = Path(os.environ.get("IKE_SA_SYNC_ANSIBLE", "ansible-playbook"))

GUARD = "ike-sa-sync-guard"

pytestmark = [
    pytest.mark.lab,
    pytest.mark.ansible,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root"),
    pytest.mark.skipif(shutil.which(PLAYBOOK) is None, reason="no ansible-playbook: make test-ansible"),
]

SYSTEMCTL = """\
#!{python}
import socket, sys
words = [word for word in sys.argv[1:] if not word.startswith("-")]
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect({control!r})
    asked.sendall(" ".join(words).encode())
    asked.shutdown(socket.SHUT_WR)
    answer = b""
    while part := asked.recv(4096):
        answer += part
status, _, text = answer.decode().partition("\\n")
sys.stdout.write(text)
sys.exit(int(status))
"""


class Unchanged(Charon):
    """charon with the files that the role has written."""

    def configure(self) -> None:
        drop_in = self.host.etc / "strongswan.d/ike-sa-sync.conf"
        before = drop_in.read_text() if drop_in.exists() else None
        super().configure()
        if before is None:
            drop_in.unlink()
        else:
            drop_in.write_text(before)


class Guard(Daemon):
    """The routes of ike-sa-sync-guard.service."""

    @property
    def running(self) -> bool:
        return self.routes() != []

    def spawn(self, *_: str) -> None:
        guard_unit(self.host, "ExecStart")

    def stop(self) -> None:
        guard_unit(self.host, "ExecStop")

    def routes(self) -> list[str]:
        """The networks that lead nowhere."""
        lines = self.host.run("ip", "route").stdout.splitlines()
        return [line.split()[1] for line in lines if line.startswith("blackhole")]


class Unit:
    """A program of a host, as systemd would run it."""

    def __init__(self, daemon: Daemon, *command: str) -> None:
        self.daemon = daemon
        self.enabled = False
        self._command = command

    def start(self) -> None:
        if self.daemon.running:
            return
        if isinstance(self.daemon, Charon):
            self.daemon.start()
        else:
            self.daemon.spawn(*self._command)

    def stop(self) -> None:
        self.daemon.stop()


class Systemd:
    """Answers a host's `systemctl`, and notes what was asked for that changes something."""

    def __init__(self, host: Host, units: dict[str, Unit]) -> None:
        self.units = units
        self.asked: list[str] = []
        path = host.directory / "systemctl.sock"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        stand_in = host.directory / "bin/systemctl"
        stand_in.write_text(SYSTEMCTL.format(python=sys.executable, control=str(path)))
        stand_in.chmod(0o755)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                asking, _ = self._socket.accept()
            except OSError:
                return
            with asking:
                words = asking.makefile().read().split()
                try:
                    status, text = self._answer(words)
                except Exception as error:
                    status, text = 1, f"{error}\n"
                asking.sendall(f"{status}\n{text}".encode())

    def _answer(self, words: list[str]) -> tuple[int, str]:
        action, unit = words[0], self.units.get(words[-1].removesuffix(".service"))
        if unit is None:
            return 0, ""
        if action == "show":
            active = "active" if unit.daemon.running else "inactive"
            return 0, f"LoadState=loaded\nActiveState={active}\nUnitFileState={self._state(unit)}\n"
        if action == "is-enabled":
            return (0 if unit.enabled else 1), f"{self._state(unit)}\n"
        if action == "is-active":
            return (0 if unit.daemon.running else 3), ""
        self.asked.append(" ".join(words))
        if action == "enable":
            unit.enabled = True
        if action in ("stop", "restart"):
            unit.stop()
        if action in ("start", "restart"):
            unit.start()
        return 0, ""

    @staticmethod
    def _state(unit: Unit) -> str:
        return "enabled" if unit.enabled else "disabled"

    def close(self) -> None:
        self._socket.close()


class Installation:
    """The lab's hosts before the role has run: strongSwan is configured and runs, Redis as apt has started it."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.directory = directory
        secret = "of the operator"
        self.hosts = {"bank": lab.add_host("bank", "192.168.50.20/24")}
        for number in (1, 2):
            address = f"192.168.50.{number}/24"
            gateway = lab.add_host(f"gw{number}", address, local=(f"{SITE}/32",), forward=True)
            swanctl(gateway, "gateway", f'ike-clients {{ secret = "{secret}" }}')
            self.hosts[gateway.name] = gateway
        self.hosts["client"] = client_host(lab, "client", "192.168.50.10", secret)
        self.systemd = {name: self._systemd(host) for name, host in self.hosts.items()}
        self._inventory()

    def _systemd(self, host: Host) -> Systemd:
        if host.name == "bank":
            redis = host.etc / "redis"
            redis.unlink()
            redis.mkdir()
            (redis / "redis.conf").write_text("bind 127.0.0.1\n")
            data = host.directory / "redis"
            data.mkdir()
            return Systemd(host, {"redis-server": Unit(Daemon(host, "redis"), "redis-server", "/etc/redis/redis.conf")})
        host.charon = Unchanged(host)
        sidecar = Unit(Daemon(host, "sidecar"), *program(), "run")
        units = {"ike-sa-sync": sidecar, "strongswan": Unit(host.charon), GUARD: Unit(Guard(host, "guard"))}
        return Systemd(host, units)

    def _inventory(self) -> None:
        example = yaml.safe_load((ROOT / "ansible/inventory.example.yml").read_text())
        groups = example["all"]["children"]
        for group in groups.values():
            # the example's variables, and the lab's names
            group["hosts"] = {name.split(".")[0]: value or {} for name, value in group["hosts"].items()}
        example["all"]["vars"] |= {
            "ike_sa_sync_bank_directory": str(self.hosts["bank"].directory / "redis"),
            "ike_sa_sync_check_retries": 12,
        }
        (self.directory / "inventory.yml").write_text(yaml.safe_dump(example))

    def play(self, host: str, *arguments: str) -> str:
        """Run the playbook for a host, in that host; what it says, and how often it changed something."""
        python = self.hosts[host].run(
            *("env", f"HOME={self.directory}", "ANSIBLE_NOCOLOR=1", "ANSIBLE_DISPLAY_SKIPPED_HOSTS=0"),
            # the commands that the role runs are found as an operator's are
            f"PATH={self.hosts[host].environment()['PATH']}:{Path(sys.executable).parent}",
            *(str(shutil.which(PLAYBOOK)), "-i", str(self.directory / "inventory.yml"), "-c", "local"),
            *("-e", f"ansible_python_interpreter={sys.executable}", "-e", "ansible_become=false"),
            *("--skip-tags", "packages", "--limit", host, *arguments, str(ROOT / "ansible/site.yml")),
            check=False,
            timeout=600,
        )
        assert python.returncode == 0, python.stdout + python.stderr
        return python.stdout

    def play_all(self) -> dict[str, int]:
        """For every host, what the playbook changed."""
        return {name: changed(self.play(name)) for name in self.hosts}


def changed(told: str) -> int:
    found = re.search(r"changed=(\d+)", told)
    assert found is not None, told
    return int(found[1])


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with Lab() as lab:
        installation = Installation(lab, tmp_path_factory.mktemp("ansible"))
        for systemd in installation.systemd.values():
            for name in ("redis-server", "strongswan"):
                if name in systemd.units:
                    systemd.units[name].start()
        yield installation
        for systemd in installation.systemd.values():
            systemd.close()


def test_the_playbook_sets_up_bank_gateways_and_client(installation: Installation) -> None:
    assert all(number > 0 for number in installation.play_all().values())
    for name in ("gw1", "gw2", "client"):
        systemd = installation.systemd[name]
        # the sidecar holds its address before charon sends keys there
        assert systemd.asked.index("start ike-sa-sync") < systemd.asked.index("restart strongswan")
        guard = systemd.units[GUARD]
        assert isinstance(guard.daemon, Guard)
        assert guard.daemon.routes() == ["10.10.0.0/16", "10.20.0.0/16"][name != "client" :]
        assert guard.enabled
    gw1, gw2, client = (installation.hosts[name] for name in ("gw1", "gw2", "client"))
    assert (gw1.etc / "ike-sa-sync/bank.key").read_text() == (gw2.etc / "ike-sa-sync/bank.key").read_text()
    for path in ("gateway.yaml", "bank.key"):
        assert (gw1.etc / "ike-sa-sync" / path).stat().st_mode & 0o777 == 0o600
    client.charon.initiate("net", "home")
    assert client.ping(SITE) == 3
    wait_until(
        lambda: "192.168.50.1" in gw1.run(*program(), "stubs", "list", "-c", "/etc/ike-sa-sync/gateway.yaml").stdout,
        "the stub of the session",
    )
    told = client.run(*program(), "resume", "-c", "/etc/ike-sa-sync/client.yaml", "--to", gw2.address).stdout
    assert told.startswith("resumed")
    assert client.ping(SITE) == 3


def test_a_second_run_changes_nothing(installation: Installation) -> None:
    for systemd in installation.systemd.values():
        systemd.asked.clear()
    assert installation.play_all() == dict.fromkeys(installation.hosts, 0)
    assert not any(systemd.asked for systemd in installation.systemd.values())


def test_a_changed_option_restarts_the_sidecar_only(installation: Installation) -> None:
    told = installation.play("gw1", "-e", '{"ike_sa_sync_options": {"sync": {"confirm_timeout": 20}}}')
    assert installation.systemd["gw1"].asked == ["restart ike-sa-sync"]
    assert "confirm_timeout: 20" in (installation.hosts["gw1"].etc / "ike-sa-sync/gateway.yaml").read_text()
    assert changed(told) == 2


def test_no_secret_is_shown(installation: Installation) -> None:
    secrets = installation.directory / ".secrets"
    told = installation.play("gw2", "-vvv", "--diff", "-e", '{"ike_sa_sync_options": {"log": {"level": "debug"}}}')
    for name in ("bank.key", "bank-password", "monitor-password", "psk"):
        assert (secrets / name).read_text().split()[-1] not in told


def test_the_example_and_the_playbook_are_what_ansible_takes(tmp_path: Path) -> None:
    told = subprocess.run(
        [PLAYBOOK, "-i", ROOT / "ansible/inventory.example.yml", "--list-tasks", ROOT / "ansible/site.yml"],
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
