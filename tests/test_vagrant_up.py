"""The Vagrant lab for real: `vagrant up` on emulated machines, and what docs/vagrant.md shows (`make test-vagrant`).

The machines stay up from test to test. While `vagrant/emulated/run .vm/vagrant sh` runs, a single test runs beside it:

    vagrant/emulated/enter .vm/vagrant .venv/bin/python -m pytest -m vagrant tests/test_vagrant_up.py -k reload
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vagrant_support import HOUR, MACHINES, PATIENCE, VagrantLab, inside, virsh, wait_until

pytestmark = [
    pytest.mark.vagrant,
    pytest.mark.skipif(not inside(), reason="runs in vagrant/emulated/run: make test-vagrant"),
    pytest.mark.timeout(2 * HOUR),
]

log = logging.getLogger(__name__)

GW1, GW2, SERVER = "192.168.56.11", "192.168.56.12", "10.10.1.100"
MARK = "5ea15afe0b5e55ed"
"""what the payload of echo requests through the tunnel is made of"""
UNITS = {
    "bank": ("redis-server", "ike-sa-sync-package"),
    "server": ("bird",),
    "gw1": ("ike-sa-sync", "strongswan", "bird"),
    "gw2": ("ike-sa-sync", "strongswan", "bird"),
    "client": ("ike-sa-sync", "strongswan"),
}
ROLES = {"gw1": "gateway", "gw2": "gateway", "client": "client"}


@pytest.fixture(scope="module")
def lab() -> VagrantLab:
    lab = VagrantLab()
    lab.vagrant("up")
    lab.learn_addresses()
    # The first ESP SA after a boot takes the kernel 13 s on an emulated processor (it loads and tests its ciphers),
    # longer than a client waits for an answer (resume.answer_timeout).
    for gateway in (GW2, GW1):
        session_at(lab, gateway)
    return lab


@pytest.fixture(scope="module")
def outside(lab: VagrantLab) -> Iterator[Path]:
    """A folder with captures of every packet of the networks that are not behind the gateways, from here on, and those
    of the runs before this one."""
    kept = lab.directory / "packets"
    kept.mkdir(exist_ok=True)
    new = tempfile.mkdtemp(dir=kept)
    # libvirt's bridge of each network that guests have an interface in
    bridges = {
        name: re.search(r"bridge name='([^']+)'", virsh("net-dumpxml", name))
        for name in virsh("net-list", "--name").split()
    }
    assert "ike-sa-sync-site" in bridges
    outer = [found[1] for name, found in bridges.items() if found and name != "ike-sa-sync-site"]
    assert len(outer) == 2
    dumps = [
        subprocess.Popen(["tcpdump", "-q", "-n", "-U", "-i", it, "-w", f"{new}/{it}"], stderr=subprocess.PIPE)
        for it in outer
    ]
    for dump in dumps:
        assert dump.stderr is not None
        assert any(b"listening" in line for line in dump.stderr)
    yield kept
    for dump in dumps:
        dump.terminate()


def packets(kept: Path, *expression: str) -> list[str]:
    """The packets of all captures that fit."""
    found: list[str] = []
    for file in kept.glob("*/*"):
        told = subprocess.run(
            ["tcpdump", "-q", "-n", "-x", "-r", str(file), *expression], capture_output=True, text=True, check=True
        )
        found += re.split(r"\n(?=\S)", told.stdout.strip()) if told.stdout.strip() else []
    return found


def session_at(lab: VagrantLab, gateway: str) -> None:
    """Bring the client's session there, and see that the server is reached through it. A gateway that has just booted
    may take longer to answer than its client waits."""
    wait_until(
        lambda: lab.session()["remote"] == gateway or lab.resume(gateway)["gateway"] == gateway,
        f"the session at {gateway}",
    )
    wait_until(lambda: " bytes from " in lab.run("client", f"ping -n -c 1 -W 5 {SERVER}", check=False), "the server")


def demo(lab: VagrantLab, event: str, gateway: str) -> subprocess.Popen[str]:
    """Begin reboot-demo on the client, up to where it waits for `event`."""
    shown = lab.start("client", "reboot-demo")
    assert shown.stdout is not None
    for line in shown.stdout:
        log.info("client: %s", line.rstrip())
        if line.startswith("waiting"):
            log.info("%s: %s", event, gateway)
            return shown
    raise AssertionError("reboot-demo ended early")


def ended(shown: subprocess.Popen[str]) -> str:
    """The rest of what it prints."""
    told, _ = shown.communicate(timeout=HOUR)
    log.info("client:\n%s", told)
    assert shown.returncode == 0, told
    return told


def gap(told: str) -> float:
    """Seconds without an answer."""
    found = re.search(r"longest time without an answer: ([\d.]+) s", told)
    assert found is not None, told
    return float(found[1])


def until_seen(monitor: subprocess.Popen[str], wanted: set[tuple[str, str, str]]) -> None:
    """Read `monitor --json`, a line a second at least, until it has told of these: kind, event, gateway."""
    assert monitor.stdout is not None
    end = time.monotonic() + PATIENCE
    for line in monitor.stdout:
        told = json.loads(line)
        wanted = wanted - {(told["kind"], told.get("event", ""), told.get("gateway", ""))}
        if not wanted:
            return
        assert time.monotonic() < end, f"the monitor did not tell of {wanted}"
    raise AssertionError("the monitor ended")


def test_no_machines_clock_depends_on_what_else_this_host_does(lab: VagrantLab, outside: Path) -> None:
    """That of the bank was four times too fast once, so that heartbeats of 10 s expired after 2.5 s."""
    for machine in MACHINES:
        assert lab.run(machine, "cat /sys/devices/system/clocksource/clocksource0/current_clocksource") == "hpet\n"


def test_each_machines_own_check_passes(lab: VagrantLab, outside: Path) -> None:
    for machine, role in ROLES.items():
        told = lab.run(machine, f"ike-sa-sync check -c /etc/ike-sa-sync/{role}.yaml")
        log.info("%s:\n%s", machine, told)
        assert " 0 fail" in told


def test_a_failover_is_resumed_with_its_traffic_and_seen_at_the_bank(lab: VagrantLab, outside: Path) -> None:
    session_at(lab, GW1)
    watch = lab.start("bank", "exec watch-bank")
    assert watch.stdout is not None
    assert any("psubscribe" in line for line in watch.stdout)
    told = lab.run("client", "failover-demo")
    log.info("client:\n%s", told)
    found = re.search(r"session +at (\S+),.*outcome +resumed at (\S+),", told, re.DOTALL)
    assert found is not None, told
    before, now = found.groups()
    lab.run("bank", "pkill -x redis-cli")
    seen = watch.communicate(timeout=60)[0].splitlines()
    log.info("bank:\n%s", "\n".join(seen))
    assert before != now
    assert any(f"ike:stub:{{{now}/" in line and '"hset"' in line for line in seen)
    assert any(f"ike:stub:{{{before}/" in line and '"del"' in line for line in seen)
    # stubs, and not what gateways write every second
    assert all("ike:stub:" in line for line in seen)


def test_the_traffic_does_not_leave_the_tunnel(lab: VagrantLab, outside: Path) -> None:
    session_at(lab, GW1)
    lab.run("client", f"ping -n -c 20 -i 0.2 -p {MARK} {SERVER}")
    session_at(lab, GW2)
    lab.run("client", f"ping -n -c 20 -i 0.2 -p {MARK} {SERVER}")
    assert len(packets(outside, "esp or udp port 4500 or udp port 500")) > 40


def test_a_hard_power_off_is_survived_with_no_command_and_the_machine_comes_back_by_itself(
    lab: VagrantLab, outside: Path
) -> None:
    session_at(lab, GW1)
    monitor = lab.start("gw2", "exec ike-sa-sync monitor --json -c /etc/ike-sa-sync/gateway.yaml")
    assert monitor.stdout is not None
    assert any('"reachable"' in line for line in monitor.stdout)
    shown = demo(lab, "virsh destroy", GW1)
    virsh("destroy", "vagrant_gw1")
    told = ended(shown)
    until_seen(monitor, {("gateway", "failed", GW1), ("stub", "stored", GW2)})
    lab.run("gw2", "pkill -f 'ike-sa-sync [m]onitor'")
    assert f"session   at {GW2}" in told
    # announced by gw2, or found by the client's own dead peer detection
    assert re.search(r"event=gateway-(dead|not-answering) .*\n(.*\n)*.*event=moved result=resumed ", told)
    # emulated processors: on real ones about 2 s
    assert gap(told) < 60
    [row] = lab.status("gw2", "gateway")["sas"]
    assert row["virtual_ips"]

    virsh("start", "vagrant_gw1")
    wait_until(lambda: lab.reachable("gw1"), "gw1 booted")
    wait_until(lambda: lab.ready("gw1", "gateway"), "gw1's check")
    session_at(lab, GW1)


def test_a_reload_moves_the_session_first(lab: VagrantLab, outside: Path) -> None:
    session_at(lab, GW1)
    shown = demo(lab, "vagrant reload", GW1)
    lab.vagrant("reload", "gw1")
    told = ended(shown)
    assert f"session   at {GW2}" in told
    # gw1's BIRD announces the client until its session has moved
    assert gap(told) < 10
    wait_until(lambda: lab.ready("gw1", "gateway"), "gw1's check")


def test_a_drain_moves_the_session_with_its_traffic(lab: VagrantLab, outside: Path) -> None:
    session_at(lab, GW1)
    told = lab.run("gw1", f"drain-demo {GW2}")
    log.info("gw1:\n%s", told)
    assert "done: 1 of 1 session " in told
    assert lab.session()["remote"] == GW2
    session_at(lab, GW1)


def test_a_second_provisioning_changes_nothing(lab: VagrantLab, outside: Path) -> None:
    before, session = lab.pids(UNITS), lab.session()
    assert "0" not in before.values()
    lab.vagrant("rsync")
    lab.vagrant("provision")
    assert lab.pids(UNITS) == before
    assert lab.session()["spi_i"] == session["spi_i"]


def test_a_bank_that_is_made_again_gets_the_stubs_again(lab: VagrantLab, outside: Path) -> None:
    session = lab.session()
    lab.vagrant("destroy", "-f", "bank")
    assert lab.session()["spi_i"] == session["spi_i"]
    session_at(lab, session["remote"])
    lab.vagrant("up", "bank")
    lab.learn_addresses()

    def stubs() -> str:
        return lab.run("gw2", "ike-sa-sync stubs list -c /etc/ike-sa-sync/gateway.yaml --json", check=False)

    wait_until(lambda: str(session["spi_r"]) in stubs(), "the stub, in the new bank")
    other = GW1 if session["remote"] == GW2 else GW2
    assert lab.resume(other)["result"] == "resumed"
    session_at(lab, other)


def test_no_packet_of_the_inner_network_was_in_the_clear_outside(lab: VagrantLab, outside: Path) -> None:
    lab.session()
    lab.run("client", f"ping -n -c 60 -i 0.2 -p {MARK} {SERVER}")
    assert len(packets(outside, "esp or udp port 4500 or udp port 500")) > 100
    assert packets(outside, "net 10.10.1.0/24 or net 10.20.0.0/16") == []
    payload = [it for it in packets(outside) if MARK[:8] in re.sub(r"\n\s+0x[0-9a-f]+:|\s", "", it)]
    assert payload == []


def test_destroy_leaves_nothing(lab: VagrantLab, outside: Path) -> None:
    lab.vagrant("destroy", "-f")
    assert virsh("list", "--all", "--name").split() == []
    images = os.listdir(Path(os.environ["IKE_SA_SYNC_VAGRANT"]) / "images")
    assert not [name for name in images if any(machine in name for machine in MACHINES)]
