"""charon dies and its host lives on: what it left in the kernel goes once its sessions are elsewhere."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.esp import Esp
from bridge.lab.host import Host
from bridge.lab.topology import SERVER, SERVER6
from failover_support import fresh, resume, the_sa
from families_support import ask_for, connect, give_out
from releases_support import RELEASED, on_all

pytestmark = [pytest.mark.vm, pytest.mark.lab]


@pytest.fixture(scope="module", params=RELEASED)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab with virtual IPs of both families; the client moves when it is told to only."""
    with Lab() as lab:
        built = standard(lab, start=False, releases=on_all(request.param))
        built.agent.config["resume_on_down"] = False
        for number, host in ((1, built.gw1), (2, built.gw2)):
            give_out(host, "dual stack", number)
        ask_for(built.client, "dual stack")
        # it finds out when it is told to
        built.client.configure("connections { home { dpd_delay = 0s } }\n", "patient.conf")
        built.start()
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    assert topology.lab.esp is Esp.KERNEL
    fresh(topology)


def left(gateway: Host) -> str:
    """The ESP SAs, policies and routes of charon that a gateway's kernel has."""
    shown = [gateway.run("ip", *what.split(), check=False).stdout for what in ("xfrm state", "xfrm policy list")]
    routes = [gateway.run("ip", family, "route", "show", "table", "220", check=False).stdout for family in ("-4", "-6")]
    policies = [one for one in shown[1].split("\nsrc ") if "socket" not in one]
    return "\n".join([shown[0], *policies, *routes]).strip()


def reached(topology: Topology, vips: list[str]) -> None:
    """The server behind the gateways reaches the client, and the client the server."""
    for vip in vips:
        wait_until(lambda vip=vip: topology.server.ping(vip, count=1) == 1, f"the way back to {vip}", 10)  # type: ignore[misc]
        assert topology.server.ping(vip) == 3
    for server in (SERVER, SERVER6):
        assert topology.client.ping(server) == 3


@pytest.mark.parametrize("restarted", [False, True], ids=["charon stays away", "charon is back before the move"])
def test_a_server_reaches_a_client_that_left_a_gateway_whose_charon_died_alone(
    topology: Topology, restarted: bool
) -> None:
    vips = connect(topology)["local-vips"]
    reached(topology, vips)
    topology.gw1.charon.crash()
    if restarted:
        topology.gw1.charon.start()
        topology.gateways["gw1"].wait_ready()
        wait_until(lambda: "charon-restarted" in topology.gateways["gw1"].text(), "the sidecar knows")
    # until the client has moved its traffic goes on: the kernel has all it needs
    reached(topology, vips)
    assert resume(topology)["result"] == "resumed"
    assert the_sa(topology.client)["local-vips"] == vips
    reached(topology, vips)
    wait_until(lambda: not left(topology.gw1), "gw1's kernel has nothing of it")


def test_a_server_reaches_a_client_that_left_a_gateway_whose_charon_hangs(topology: Topology) -> None:
    vips = connect(topology)["local-vips"]
    os.kill(topology.gw1.charon.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: "charon-not-answering" in topology.gateways["gw1"].text(), "the sidecar knows")
        assert resume(topology)["result"] == "resumed"
        reached(topology, vips)
    finally:
        os.kill(topology.gw1.charon.pid, signal.SIGCONT)
    wait_until(lambda: not topology.gw1.charon.sas(), "the end of the old IKE_SA")
    assert not left(topology.gw1)
    reached(topology, vips)


def test_a_session_that_comes_back_to_a_charon_that_was_restarted_leaves_nothing_behind(topology: Topology) -> None:
    vips = connect(topology)["local-vips"]
    topology.gw1.charon.crash()
    topology.gw1.charon.start()
    topology.gateways["gw1"].wait_ready()
    assert resume(topology, "--to", topology.gw1.address)["result"] == "resumed"
    reached(topology, vips)
    topology.client.swanctl("--terminate", "--ike-id", the_sa(topology.client)["uniqueid"])
    wait_until(lambda: not left(topology.gw1), "gw1's kernel has nothing of it")


def test_a_server_reaches_a_client_that_left_a_host_whose_charon_and_sidecar_died(topology: Topology) -> None:
    """Both are back after the move, and neither knows of the session."""
    vips = connect(topology)["local-vips"]
    topology.gateways["gw1"].kill()
    topology.gw1.charon.crash()
    assert resume(topology)["result"] == "resumed"
    topology.gateways["gw1"].start(wait=False)
    topology.gw1.charon.start()
    topology.gateways["gw1"].wait_ready()
    reached(topology, vips)
    routes = [topology.gw1.run("ip", family, "route", "show", "table", "220").stdout for family in ("-4", "-6")]
    assert routes == ["", ""]
