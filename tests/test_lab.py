"""The lab itself: real charons come up, carry traffic, and nothing of them stays."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.lab import Lab, LabError, Topology, space, standard
from bridge.lab.charon import render
from bridge.lab.sidecar import program
from bridge.lab.topology import SITE

pytestmark = pytest.mark.lab

# A lab that does nothing but say that it is up.
IDLE = """
import sys, time
from bridge.lab import Lab, standard
with Lab(sys.argv[1]) as lab:
    standard(lab, sidecars=False)
    print("up", flush=True)
    time.sleep(600)
"""


def traces(name: str) -> list[str]:
    """What is left of a lab: namespaces, its directory, processes that name it or have mounts of it."""
    left = [str(space.NAMESPACES / namespace) for namespace in space.namespaces(name)]
    if (space.STATE / name).exists():
        left.append(str(space.STATE / name))
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            mounts = (process / "mountinfo").read_text()
        except OSError:
            continue
        if f"/{name}/" in mounts or f"bridge.lab.guard {name}" in command:
            left.append(f"process {process.name}: {command}")
    return left


def idle_lab(name: str) -> subprocess.Popen[str]:
    """A lab in a Python of its own, up."""
    owner = subprocess.Popen(
        [sys.executable, "-c", IDLE, name], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    return owner


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with Lab() as lab:
        yield standard(lab, sidecars=False)


@pytest.fixture
def name() -> Iterator[str]:
    chosen = f"test{os.getpid()}"
    yield chosen
    space.remove(chosen)


def test_a_session_carries_traffic_through_the_tunnel(topology: Topology) -> None:
    topology.connect()
    assert topology.client.ping(SITE) == 3
    [sa] = topology.gw1.charon.sas()
    [child] = sa["child-sas"].values()
    assert int(child["packets-in"]) == 3


def test_each_gateway_gives_virtual_addresses_of_its_own(topology: Topology) -> None:
    topology.connect("home-gw2")
    [sa] = topology.gw2.charon.sas()
    assert sa["remote-vips"] == ["10.20.2.1"]


def test_charon_connects_its_ha_channel_to_the_place_of_the_sidecar(topology: Topology) -> None:
    for host in (topology.gw1, topology.gw2, topology.client):
        assert "127.0.0.1:4510" in host.run("ss", "-Huan").stdout


def test_the_hosts_see_nothing_of_the_machine_but_its_programs(topology: Topology) -> None:
    interfaces = topology.client.run("ls", "/sys/class/net").stdout.split()
    assert {"lo", "eth0"} <= set(interfaces) <= {"lo", "eth0", "ipsec0", "ip6tnl0", "sit0", "tunl0"}
    assert not topology.client.path("/run/netns").exists()
    assert topology.client.run("getent", "passwd", "root").stdout.startswith("root:")
    assert "Read-only" in topology.client.run("touch", "/etc/passwd", check=False).stderr


def test_hosts_keep_their_files_to_themselves(topology: Topology) -> None:
    topology.gw1.write("/etc/ike-sa-sync/only-here", "")
    assert topology.gw1.path("/etc/ike-sa-sync/only-here").exists()
    assert not topology.gw2.path("/etc/ike-sa-sync/only-here").exists()
    assert not Path("/etc/ike-sa-sync/only-here").exists()


def test_a_failing_command_has_its_output_in_the_error(topology: Topology) -> None:
    with pytest.raises(LabError, match=r"client: `cat /nowhere` failed.*No such file"):
        topology.client.run("cat", "/nowhere")


def test_a_client_notices_that_its_gateway_is_dead() -> None:
    with Lab() as lab:
        topology = standard(lab, sidecars=False)
        topology.connect()
        topology.gw1.charon.kill()
        deadline = time.monotonic() + 60
        while topology.client.charon.sas() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert topology.client.charon.sas() == []
        assert topology.client.ping(SITE, count=1) == 0


def test_a_killed_charon_can_be_started_again() -> None:
    with Lab() as lab:
        topology = standard(lab, sidecars=False)
        topology.gw1.charon.kill()
        topology.gw1.charon.start()
        topology.connect()
        assert topology.client.ping(SITE) == 3


def test_settings_of_a_test_override_the_shipped_ones() -> None:
    with Lab() as lab:
        topology = standard(lab, start=False)
        topology.gw1.configure(render({"connections.gw.rekey_time": "7200s"}), "test.conf")
        topology.gw1.charon.settings["charon.threads"] = 24
        topology.gw1.charon.start()
        assert "7200s" in topology.gw1.swanctl("--list-conns")
        assert "worker threads: 24 total" in topology.gw1.swanctl("--stats")


def test_two_labs_in_parallel_do_not_meet() -> None:
    with Lab() as first, Lab() as second:
        one, two = standard(first, sidecars=False), standard(second, sidecars=False)
        one.connect()
        assert one.client.ping(SITE) == 3
        assert two.gw1.charon.sas() == []


def test_nothing_stays_after_a_lab() -> None:
    before = rules()
    with Lab() as lab:
        standard(lab, sidecars=False).connect()
        assert traces(lab.name)
    assert traces(lab.name) == []
    assert rules() == before


def test_nothing_stays_after_an_exception(name: str) -> None:
    def fail_in_the_middle() -> None:
        with Lab(name) as lab:
            standard(lab, sidecars=False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in_the_middle()
    assert traces(name) == []


def test_nothing_stays_of_a_lab_that_could_not_be_built(name: str) -> None:
    with Lab(name) as lab:
        with pytest.raises(LabError):
            lab.add_host("client", "not an address")
        with pytest.raises(LabError):
            lab.add_network("lan")
    assert traces(name) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_stays_when_the_owner_gets_sigterm(name: str, number: signal.Signals) -> None:
    owner = idle_lab(name)
    owner.send_signal(number)
    owner.wait(30)
    assert traces(name) == []


def test_nothing_stays_when_the_owner_is_killed(name: str) -> None:
    owner = idle_lab(name)
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 30
    while traces(name) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert traces(name) == []


def test_a_kept_lab_stays_until_it_is_removed(name: str) -> None:
    with Lab(name, keep=True) as lab:
        standard(lab, sidecars=False)
        assert space.is_owned(name)
    assert not space.is_owned(name)
    assert len(space.namespaces(name)) == 6
    space.remove(name)
    assert traces(name) == []


def test_a_command_on_a_host_gets_its_options_and_finds_this_program(name: str) -> None:
    with Lab(name) as lab:
        standard(lab, sidecars=False)
        argv = [*program(), "lab", "shell", "--lab", name, "gw1", "ike-sa-sync", "stubs", "list", "--help"]
        environment = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: ike-sa-sync stubs list ")


def test_a_kept_lab_that_could_not_be_built_is_removed(name: str) -> None:
    with pytest.raises(LabError), Lab(name, keep=True) as lab:
        lab.add_network("lan")
    assert traces(name) == []


def test_a_delayed_hosts_packets_arrive_later_and_whole(name: str) -> None:
    with Lab(name) as lab:
        near, far = (lab.add_host(each, f"192.168.50.{number}/24") for number, each in enumerate(("near", "far"), 1))
        lab.delay(near, 0.05)
        assert near.ping(far.address, timeout=10.0) == 3
        echo = far.popen(sys.executable, "-c", ECHO)
        done = near.run(sys.executable, "-c", ASK, far.address)
        echo.wait()
        assert float(done.stdout) >= 0.1
    assert traces(name) == []


ECHO = """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("", 7))
sock.sendto(*sock.recvfrom(1500))
"""
ASK = """
import socket, sys, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(0.5)
for _ in range(40):
    began = time.monotonic()
    sock.sendto(b"x" * 1001, (sys.argv[1], 7))
    try:
        sock.recv(1500)
    except (TimeoutError, ConnectionRefusedError):
        continue  # the other side is not there yet
    print(time.monotonic() - began)
    break
"""


def test_two_labs_of_one_name_are_refused(name: str) -> None:
    with Lab(name), pytest.raises(LabError, match=f"lab {name} exists"), Lab(name):
        pass


def rules() -> str:
    """The machine's own packet filter rules and interfaces."""
    parts = (["nft", "list", "ruleset"], ["ip", "-o", "link"], ["ip", "rule"])
    outputs = [subprocess.run(part, capture_output=True, text=True, check=True).stdout for part in parts]
    return "".join(line for output in outputs for line in output.splitlines(True) if not line.startswith("#"))
