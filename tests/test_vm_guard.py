"""ike-sa-sync-guard.service on machines that boot: nothing of the inner network leaves in the clear while strongSwan is
stopped, while the machine shuts down, and while it boots (`make test-vm`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.lab.daemon import wait_until
from clear_support import OuterLink
from vm_support import BRIDGE, PATIENCE, SITE, Machine, Machines, active, reachable, run

pytestmark = pytest.mark.vm

GUARD = "ike-sa-sync-guard"
UNITS = Path("/etc/systemd/system")
SENDER = "sender.service"
PROGRAM = f"""\
import socket, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sent = refused = 0
while True:
    try:
        sock.sendto(b"in the clear?", ("{SITE}", 9))
        sent += 1
    except OSError:
        refused += 1
    open("/run/sender", "w").write(f"{{sent}} {{refused}}\\n")
    time.sleep(0.01)
"""
UNIT = """\
[Unit]
DefaultDependencies=no
After=addresses.service
[Service]
ExecStart=/usr/bin/python3 /var/lib/sender.py
[Install]
WantedBy=sysinit.target
"""
"""from the machine's first address on until the last of its processes are killed"""


@pytest.fixture
def client(provisioned: Machines) -> Iterator[Machine]:
    """The client, with a session and a default route to a host that forwards nothing, and a program that sends to the
    network behind the gateways all the time."""
    client, elsewhere = provisioned["client"], provisioned["bank"].address
    drop_in = Path(client.path(str(UNITS / "addresses.service.d")))
    drop_in.mkdir()
    (drop_in / "route.conf").write_text(f"[Service]\nExecStart=ip route add default via {elsewhere}\n")
    Path(client.path("/var/lib/sender.py")).write_text(PROGRAM)
    Path(client.path(str(UNITS / SENDER))).write_text(UNIT)
    client.run("ip", "route", "add", "default", "via", elsewhere)
    connect(client)
    client.run("systemctl", "daemon-reload")
    client.run("systemctl", "enable", "--now", SENDER)
    run("ip", "link", "set", BRIDGE, "promisc", "on")
    yield client
    run("ip", "link", "set", BRIDGE, "promisc", "off")
    client.run("systemctl", "disable", "--now", SENDER)
    client.run("rm", "-r", str(UNITS / SENDER), "/var/lib/sender.py", str(UNITS / "addresses.service.d"))
    client.run("systemctl", "daemon-reload")
    client.run("ip", "route", "del", "default")


def connect(client: Machine) -> None:
    client.run("systemctl", "start", "ike-sa-sync-client", "strongswan")
    wait_until(lambda: reachable(client, "client"), "charon, reached", PATIENCE)
    if not client.sas():
        client.run("swanctl", "--initiate", "--child", "net", "--ike", "home")


def refused(client: Machine) -> int:
    """How many packets had no route."""
    told = Path(client.path("/run/sender")).read_text().split()
    return int(told[1]) if told else 0


def stopped(client: Machine) -> None:
    """strongSwan is stopped for many packets."""
    client.run("systemctl", "stop", "strongswan")
    before = refused(client)
    wait_until(lambda: refused(client) >= before + 50, "packets without a route", PATIENCE)


def flows(link: OuterLink) -> None:
    """Wait until there was protected traffic."""
    before = link.protected
    wait_until(lambda: link.protected >= before + 20, "protected traffic", PATIENCE)


def test_every_machine_has_its_guard(provisioned: Machines) -> None:
    for name, network in (("gw1", "10.20.0.0/16"), ("gw2", "10.20.0.0/16"), ("client", "10.10.0.0/16")):
        machine = provisioned[name]
        assert active(machine, GUARD)
        assert machine.is_enabled(GUARD)
        assert network in machine.run("ip", "route", "show", "type", "blackhole")


def test_nothing_leaves_in_the_clear_while_strongswan_is_stopped_and_while_the_machine_reboots(client: Machine) -> None:
    with OuterLink(None, BRIDGE) as link:
        flows(link)
        stopped(client)
        connect(client)
        flows(link)
        client.run("systemctl", "reboot", check=False)
        wait_until(lambda: not client.leader(), "its end", PATIENCE)
        client.power_on()
        assert active(client, GUARD)
        connect(client)
        flows(link)
        assert link.lost() == 0
    assert link.clear == []


def test_without_the_guard_packets_leave_in_the_clear(client: Machine) -> None:
    """That the capture sees them."""
    with OuterLink(None, BRIDGE) as link:
        flows(link)
        client.run("systemctl", "stop", GUARD, "strongswan")
        wait_until(lambda: bool(link.clear), "packets in the clear", PATIENCE)
    client.run("systemctl", "start", GUARD)
    connect(client)
