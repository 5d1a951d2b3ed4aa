"""VRRP by a real keepalived, with the shipped example: its master dies, and the ordinary clients of it go on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology
from bridge.lab.daemon import Daemon, wait_until
from bridge.lab.host import Host
from bridge.lab.sidecar import program
from bridge.service import shipped_files
from failover_support import established, spis
from takeover_support import SHARED, answered, connect, shared_topology, start, take_away

pytestmark = pytest.mark.lab


class Keepalived(Daemon):
    """keepalived of one gateway."""

    def __init__(self, host: Host, priority: int) -> None:
        super().__init__(host, "keepalived")
        text = shipped_files.path("strongswan-conf/keepalived/keepalived.conf").read_text()
        self._file = host.directory / "keepalived.conf"
        self._file.write_text(text.replace("priority 100", f"priority {priority}"))

    def start(self) -> None:
        pids = [f"--{kind}={self.host.directory}/{name}" for kind, name in PIDS.items()]
        self.spawn("keepalived", "--dont-fork", "--log-console", "--vrrp", f"--use-file={self._file}", *pids)


PIDS = {"pid": "keepalived.pid", "vrrp_pid": "vrrp.pid"}


@pytest.fixture
def topology(each_release: str | None) -> Iterator[Topology]:
    with Lab(release=each_release) as lab:
        topology = shared_topology(lab, trigger="netlink")
        start(topology)
        yield topology


def test_clients_go_on_when_the_master_of_vrrp_dies(topology: Topology) -> None:
    script = shipped_files.path("strongswan-conf/keepalived/notify").read_text()
    script = script.replace("exec ike-sa-sync", f"exec {shlex.join(program())}")
    for host in (topology.gw1, topology.gw2):
        host.write("/etc/ike-sa-sync/notify", script, 0o755)
    first, second = Keepalived(topology.gw1, 110), Keepalived(topology.gw2, 100)
    first.start()
    wait_until(lambda: SHARED in topology.gw1.run("ip", "address").stdout, "VRRP's master")
    second.start()
    before = connect(topology)

    topology.kill_gateway(topology.gw1)
    first.kill()
    take_away(topology.gw1)

    wait_until(lambda: SHARED in topology.gw2.run("ip", "address").stdout, "the other gateway to be VRRP's master")
    wait_until(lambda: bool(established(topology.gw2)), "the takeover")
    wait_until(lambda: answered(topology, topology.client, 1), "traffic")
    [after] = established(topology.client)
    assert spis(after) == spis(before)
    assert "MASTER" in second.text()
    second.stop()
