"""A roll-out from release 0.1, and back: its sidecars, from the project's history, beside those of this release."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.sidecar import Sidecar, program
from bridge.lab.topology import SITE
from failover_support import connect, established, fresh, resume, spis, status, stub_key, the_sa

ROOT = Path(__file__).parents[1]
COMMIT = "46f0584"
"""the last one of release 0.1"""
NEWER_OPTIONS = ("failover", "state")
"""of the lab's gateways, which 0.1 does not know"""
OLD, NEW = "0.1", "0.2"


def in_history() -> bool:
    """Whether this clone has the release."""
    asked = ("git", "-C", str(ROOT), "cat-file", "-e", f"{COMMIT}^{{commit}}")
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root"),
    pytest.mark.skipif(not in_history(), reason="this clone does not have the history back to release 0.1"),
]


THOROUGH = pytest.mark.releases
"""run by `make test-releases` only: every combination takes minutes"""


@pytest.fixture(scope="module")
def release_01(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of its ike-sa-sync."""
    source = tmp_path_factory.mktemp("release-0.1")
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", COMMIT, "bridge", "redis", "strongswan-conf"],
        capture_output=True,
        check=True,
    )
    subprocess.run(["tar", "-xf", "-", "-C", str(source)], input=archive.stdout, check=True)
    # -P: not the package of the directory where it is started
    command = ["env", f"PYTHONPATH={source}", sys.executable, "-P", "-m", "bridge"]
    assert (source / "bridge/data.py").exists()
    return command


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with Lab() as lab:
        built = standard(lab, start=False)
        built.agent.config["resume_on_down"] = False
        built.start()
        yield built


class Rollout:
    """Which release each host of the lab runs."""

    def __init__(self, topology: Topology, release_01: list[str]) -> None:
        self.topology = topology
        self._old = release_01
        self._newer = {
            name: {key: sidecar.config[key] for key in NEWER_OPTIONS} for name, sidecar in topology.gateways.items()
        }

    def install(self, host: str, release: str) -> None:
        """Restart a host's sidecar as that release, with charon and its sessions left alone. A gateway of this release
        takes requests of clients of 0.1, as the upgrade notes say."""
        sidecar = self._sidecar(host)
        sidecar.stop()
        if host != "client":
            for key, value in self._newer[host].items():
                sidecar.config.pop(key, None)
                if release == NEW:
                    sidecar.config[key] = value
            sidecar.config.pop("intercept", None)
            if release == NEW:
                sidecar.config["intercept"] = {"match": "anywhere"}
        sidecar.program = self._old if release == OLD else program()
        sidecar.start()

    def begin(self, gw1: str, gw2: str, client: str) -> dict[str, Any]:
        """A new session at gw1, with these releases."""
        for host, release in (("gw1", gw1), ("gw2", gw2), ("client", client)):
            self.install(host, release)
        fresh(self.topology)
        return connect(self.topology)

    def _sidecar(self, host: str) -> Sidecar:
        return self.topology.agent if host == "client" else self.topology.gateways[host]


@pytest.fixture
def rollout(topology: Topology, release_01: list[str]) -> Iterator[Rollout]:
    rollout = Rollout(topology, release_01)
    yield rollout
    for host in ("gw1", "gw2", "client"):
        rollout.install(host, NEW)


def moved(topology: Topology, to: str) -> str:
    """Have the client move; what became of it. The client has one session with its traffic afterwards, at `to`."""
    outcome = resume(topology, "--to", to)
    assert outcome["gateway"] == to, outcome
    wait_until(lambda: topology.client.ping(SITE) == 3, f"traffic through {to} ({outcome})")
    wait_until(lambda: [sa["remote-host"] for sa in established(topology.client)] == [to], "one session")
    # where it is, its stub is for the next move
    key = stub_key(to, the_sa(topology.client)["responder-spi"])
    wait_until(lambda: bool(topology.bank.cli("HGET", key, "vips")), "its stub")
    return str(outcome["result"])


@pytest.mark.parametrize(
    ("gw1", "gw2", "client", "there", "back"),
    [
        # the stub of an SA that 0.2 has rebuilt is of the second format, which 0.1 refuses
        (OLD, NEW, OLD, "resumed", "fallback"),
        pytest.param(NEW, OLD, OLD, "resumed", "resumed", marks=THOROUGH),
        pytest.param(NEW, NEW, OLD, "resumed", "resumed", marks=THOROUGH),
        pytest.param(OLD, OLD, NEW, "resumed", "resumed", marks=THOROUGH),
        pytest.param(OLD, NEW, NEW, "resumed", "fallback", marks=THOROUGH),
        (NEW, OLD, NEW, "resumed", "resumed"),
    ],
)
def test_a_session_moves_between_releases_there_and_back(
    rollout: Rollout, gw1: str, gw2: str, client: str, there: str, back: str
) -> None:
    topology = rollout.topology
    rollout.begin(gw1, gw2, client)
    assert (moved(topology, topology.gw2.address), moved(topology, topology.gw1.address)) == (there, back)


def test_a_client_of_0_1_falls_back_where_the_gateway_looks_at_the_first_payload_only(rollout: Rollout) -> None:
    topology = rollout.topology
    rollout.begin(NEW, NEW, OLD)
    gw2 = topology.gateways["gw2"]
    gw2.stop()
    del gw2.config["intercept"]
    gw2.start()
    assert moved(topology, topology.gw2.address) == "fallback"


def test_a_roll_out_and_a_roll_back_lose_no_session(rollout: Rollout) -> None:
    topology = rollout.topology
    session = rollout.begin(OLD, OLD, OLD)
    steps = [("gw2", NEW), ("gw1", NEW), ("client", NEW), ("client", OLD), ("gw1", OLD), ("gw2", OLD)]
    outcomes = []
    for host, release in steps:
        rollout.install(host, release)
        # the session that charon had is the sidecar's again, and not disturbed
        assert spis(the_sa(topology.client)) == spis(session)
        assert topology.client.ping(SITE) == 3
        here = session["remote-host"]
        gateway = "gw1" if here == topology.gw1.address else "gw2"
        wait_until(lambda gateway=gateway: len(status(topology, gateway)["sas"]) == 1, "the session, seen")  # type: ignore[misc]
        other = topology.gw2.address if gateway == "gw1" else topology.gw1.address
        outcomes.append(moved(topology, other))
        session = the_sa(topology.client)
    assert outcomes == ["resumed"] * len(steps)


@THOROUGH
@pytest.mark.parametrize(("gw1", "gw2"), [(OLD, NEW), (NEW, OLD)])
@pytest.mark.parametrize("client", [OLD, NEW])
def test_a_killed_gateways_session_is_resumed_by_the_other_release(
    rollout: Rollout, gw1: str, gw2: str, client: str
) -> None:
    topology = rollout.topology
    rollout.begin(gw1, gw2, client)
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    assert topology.client.ping(SITE) == 3
    topology.gateways["gw1"].start(wait=False)
    topology.gw1.charon.start()
    topology.gateways["gw1"].wait_ready()
