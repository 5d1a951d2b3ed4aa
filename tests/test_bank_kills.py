"""SIGKILL to the bank's Redis, to the sidecar, or to both, between any two steps of a session's life: then the bank has
the stubs of charon's IKE_SAs, and no others."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from bridge.lab.topology import SITE
from failover_support import connect, established, fresh, resume, spis, status, stub_key, the_sa

pytestmark = pytest.mark.lab

Kill = Callable[[], None]

SETTLED_SECONDS = 6.0
"""of charon's life after which the start that it tells and the age of an SA, both cut to seconds, cannot be confused"""


def stubs_of_charon(topology: Topology) -> dict[str, list[str]]:
    """The stubs that the bank should have of gw1: their keys, with the names of the CHILD_SAs."""
    return {
        stub_key(topology.gw1.address, own_spi(sa)): sorted(
            child["name"] for child in sa["child-sas"].values() if child["state"] == "INSTALLED"
        )
        for sa in established(topology.gw1)
    }


def own_spi(sa: dict[str, Any]) -> str:
    return str(sa["initiator-spi"] if sa.get("initiator") == "yes" else sa["responder-spi"])


def stubs_of_bank(topology: Topology) -> dict[str, list[str]]:
    """The stubs that the bank has, opened with the key file."""
    found = {}
    for key in topology.bank.stubs():
        spi = key.rpartition(":")[2]
        shown = topology.gateways["gw1"].command("stubs", "show", topology.gw1.address, spi, "--json", check=False)
        if shown.returncode == 0:
            found[key] = sorted(child["name"] for child in json.loads(shown.stdout)["children"])
    return found


def agree(topology: Topology) -> bool:
    return stubs_of_bank(topology) == stubs_of_charon(topology)


def age(pid: int) -> float:
    """Seconds since a process was started."""
    began = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - began / os.sysconf("SC_CLK_TCK")


@pytest.fixture(params=["redis", "sidecar", "both"])
def kill(request: pytest.FixtureRequest, topology: Topology) -> Kill:
    """Kills, starts again what was killed, and waits until bank and charon agree."""
    fresh(topology)
    # an SA that charon set up within seconds of its own start may be one of the charon before it: such stubs stay
    wait_until(lambda: age(topology.gw1.charon.pid) > SETTLED_SECONDS, "a charon that is older")
    redis, sidecar = topology.bank, topology.gateways["gw1"]

    def kill() -> None:
        if request.param != "sidecar":
            redis.kill()
        if request.param != "redis":
            sidecar.kill()
        if request.param != "sidecar":
            redis.start()
        if request.param != "redis":
            sidecar.start()
        wait_until(lambda: agree(topology), "bank and charon to agree", timeout=60)

    return kill


def test_bank_and_charon_agree_after_a_kill_between_any_two_steps(topology: Topology, kill: Kill) -> None:
    kill()
    topology.connect()
    kill()
    assert len(topology.bank.stubs()) == 1
    before = spis(the_sa(topology.client))
    topology.client.swanctl("--rekey", "--ike", "home")
    wait_until(lambda: [spis(sa) for sa in established(topology.client)] not in ([], [before]), "the rekeyed IKE_SA")
    kill()
    topology.client.swanctl("--rekey", "--child", "net")
    kill()
    topology.client.swanctl("--terminate", "--child", "net")
    kill()
    topology.client.charon.initiate("net", "home")
    kill()
    topology.client.swanctl("--terminate", "--ike", "home")
    kill()
    assert topology.bank.stubs() == []
    topology.connect()
    kill()
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    assert topology.client.ping(SITE) == 3


def rekey(topology: Topology) -> None:
    """A new IKE_SA of the client in place of its old one, at both ends."""
    before = spis(the_sa(topology.client))
    topology.client.swanctl("--rekey", "--ike", "home")
    for host in (topology.client, topology.gw1):
        wait_until(
            lambda host=host: [spis(sa) for sa in established(host)] not in ([], [before]),  # type: ignore[misc]
            "the rekeyed IKE_SA alone",
        )


def test_changes_kept_while_redis_was_away_are_in_the_bank_soon_after_its_return(topology: Topology) -> None:
    fresh(topology)
    connect(topology)
    [old] = topology.bank.stubs()
    topology.bank.kill()
    rekey(topology)
    # a stub to store and one to delete; no comparison of bank and charon deletes any
    wait_until(lambda: status(topology, "gw1")["bank"]["pending"] == 2, "two changes that wait")
    topology.bank.start()
    began = time.monotonic()
    wait_until(lambda: status(topology, "gw1")["bank"]["pending"] == 0, "nothing waits")
    print(f"written {time.monotonic() - began:.2f} s after Redis answered again")
    assert old not in topology.bank.stubs()
    assert agree(topology)


def test_when_the_whole_gateway_dies_no_acknowledged_write_is_lost(topology: Topology) -> None:
    fresh(topology)
    connect(topology)
    wait_until(lambda: status(topology, "gw1")["bank"]["pending"] == 0, "what is told stored")
    stored = stubs_of_bank(topology)
    assert stored == stubs_of_charon(topology)
    # not told stored, and so lost: a change that Redis was not there to take
    topology.bank.kill()
    rekey(topology)
    wait_until(lambda: status(topology, "gw1")["bank"]["pending"] > 0, "a change that waits")
    topology.kill_gateway(topology.gw1)
    topology.bank.start()
    assert stubs_of_bank(topology) == stored
    # the client knows its new SPI alone
    assert resume(topology)["result"] == "fallback"
    fresh(topology)
    connect(topology)
    wait_until(lambda: status(topology, "gw1")["bank"]["pending"] == 0, "what is told stored")
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
