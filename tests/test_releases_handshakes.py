"""Handshakes that begin while rebuilt SAs are activated, on releases of strongSwan that end them, or crash.

One segment for all, two clients that connect without a pause, and one that moves to and fro: without the guard
strongSwan 6.0.1 ends at one of the first activations.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.host import Host
from bridge.lab.space import LabError
from bridge.lab.topology import client_host
from bridge.service import control

pytestmark = [pytest.mark.lab, pytest.mark.releases, pytest.mark.timeout(600)]

VISITORS = 2
ACTIVATIONS = 25
SECONDS = 120.0
UNGUARDED = [
    sys.executable,
    "-c",
    "from bridge.gateway.interception import Interception\n"
    "Interception.can_hold = lambda _: False\n"
    "from bridge.__main__ import main\n"
    "main()",
]


@contextlib.contextmanager
def gateway(release: str, program: list[str] | None = None) -> Iterator[tuple[Topology, list[Host]]]:
    """The standard lab, all of gw2's clients in one segment, and hosts of clients that only connect."""
    with Lab() as lab:
        topology = standard(lab, start=False, releases={"gw2": release})
        topology.agent.config["resume_on_down"] = False
        topology.agent.config["resume"] = {"answer_timeout": 20.0}
        topology.gw2.charon.settings["charon.plugins.ha.segment_count"] = 1
        topology.gw2.charon.settings["charon.block_threshold"] = 0
        topology.gw2.charon.settings["charon.cookie_threshold"] = 0
        topology.gateways["gw2"].config["ha"]["segments"] = 1
        if program is not None:
            topology.gateways["gw2"].program = program
        visitors = [client_host(lab, f"visit{n}", f"192.168.50.{40 + n}", topology.secret) for n in range(VISITORS)]
        topology.start()
        for host in visitors:
            host.charon.start()
        topology.connect()
        yield topology, visitors


def initiate_again_and_again(
    host: Host, connection: str, stop: threading.Event, begun: list[int], *, pause: float = 0.0, timeout_ms: int = 5000
) -> None:
    """Full handshakes of a host, one right after the other, or `pause` seconds at most later."""
    vici = host.charon.vici()
    while not stop.wait(random.uniform(0, pause)):
        with contextlib.suppress(Exception):
            for _ in vici.initiate({"ike": connection, "child": "net", "timeout": str(timeout_ms), "loglevel": "-1"}):
                pass
            begun.append(1)
        with contextlib.suppress(Exception):
            for _ in vici.terminate({"ike": connection, "force": "yes", "timeout": "-1", "loglevel": "-1"}):
                pass


def move(topology: Topology, to: Host) -> None:
    request: dict[str, Any] = {"command": "resume", "connection": None, "to": to.address}
    path = str(topology.client.path(topology.agent.config["control"]))
    if asyncio.run(control.call(path, request))["result"] == "failed":
        # beside a charon that ended
        with contextlib.suppress(LabError):
            topology.connect()


def activations(topology: Topology) -> int:
    return topology.gw2.charon.text().count("HA segment 1 activated")


def bombard(topology: Topology, visitors: list[Host]) -> int:
    """Moves among handshakes, until there were ACTIVATIONS or charon ended; how many handshakes there were."""
    stop, connected = threading.Event(), list[int]()
    threads = [
        threading.Thread(target=initiate_again_and_again, args=(host, "home-gw2", stop, connected), daemon=True)
        for host in visitors
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + SECONDS
    try:
        while activations(topology) < ACTIVATIONS and topology.gw2.charon.running and time.monotonic() < deadline:
            for to in (topology.gw2, topology.gw1):
                move(topology, to)
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    return len(connected)


@pytest.mark.parametrize("release", ["trixie", "forky"])
def test_no_activation_meets_a_handshake_in_progress(release: str) -> None:
    with gateway(release) as (topology, visitors):
        connected = bombard(topology, visitors)
        assert topology.gw2.charon.running
        assert activations(topology) >= ACTIVATIONS
        assert connected > ACTIVATIONS
        assert "destroying incomplete IKE_SA" not in topology.gw2.charon.text()


def test_strongswan_6_0_1_ends_where_nothing_is_held_back() -> None:
    with gateway("trixie", UNGUARDED) as (topology, visitors):
        bombard(topology, visitors)
        assert not topology.gw2.charon.running
        assert "destroying incomplete IKE_SA" not in topology.gw2.charon.text()
        assert "killing ourself, received critical signal" in topology.gw2.charon.text()
