"""Rebuilt SAs beside handshakes in progress, on each release of strongSwan.

Activation walks all IKE_SAs of a segment. strongSwan 6.0.1 crashes at one in state CONNECTING, and later releases
destroy it: no segment that holds one is activated.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from bridge.charon.ha_segments import MAX_SEGMENTS, segment_of
from bridge.ike.key_exchange import fresh_public_value
from bridge.ike.message import ExchangeType, Flag, PayloadType, build, encode_ke
from bridge.ike.transforms import Encr, Group, Integ, Prf, Suite
from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.releases import RELEASES
from bridge.lab.topology import SITE
from failover_support import connect, fresh, resume, the_sa

pytestmark = [pytest.mark.lab, pytest.mark.releases]

HALF_OPEN_SECONDS = 10
SUITE = Suite(Encr.AES_CBC, 128, Integ.HMAC_SHA2_256_128, Prf.HMAC_SHA2_256, Group.CURVE_25519)

# Sends one datagram (hex) from each address: "address hex" a line.
SEND = """
import socket, sys
for line in sys.stdin:
    address, message = line.split()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((address, 0))
        sock.sendto(bytes.fromhex(message), (sys.argv[1], 500))
"""


@pytest.fixture(scope="module", params=RELEASES)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab, gw2 with the strongSwan of a Debian release that gives up handshakes soon."""
    with Lab() as lab:
        built = standard(lab, start=False, releases={"gw2": request.param})
        built.agent.config["resume_on_down"] = False
        built.agent.config["resume"] = {"answer_timeout": 20.0}
        built.gw2.charon.settings["charon.half_open_timeout"] = HALF_OPEN_SECONDS
        built.gw2.charon.settings["charon.cookie_threshold"] = 0
        for address in peers().values():
            built.client.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        built.start()
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)
    wait_until(lambda: not connecting(topology), "the end of all handshakes", timeout=2 * HALF_OPEN_SECONDS)


def peers() -> dict[int, str]:
    """An address of the lab's network in each segment."""
    found: dict[int, str] = {}
    for host in range(30, 250):
        found.setdefault(segment_of(f"192.168.50.{host}"), f"192.168.50.{host}")
    assert len(found) == MAX_SEGMENTS
    return found


def connecting(topology: Topology) -> list[dict[str, Any]]:
    return [sa for sa in topology.gw2.charon.sas() if sa["state"] == "CONNECTING"]


def begin_handshakes(topology: Topology, segments: int) -> None:
    """IKE_SA_INIT requests to gw2 from so many segments, that nothing follows."""
    lines = ""
    for _, address in sorted(peers().items())[:segments]:
        payloads = [
            (PayloadType.SA, SUITE.proposal()),
            (PayloadType.KE, encode_ke(SUITE.group, fresh_public_value(SUITE.group))),
            (PayloadType.NONCE, os.urandom(32)),
        ]
        message = build(
            spi_i=os.urandom(8),
            spi_r=bytes(8),
            exchange=ExchangeType.IKE_SA_INIT,
            flags=Flag.INITIATOR,
            message_id=0,
            payloads=payloads,
        )
        lines += f"{address} {message.hex()}\n"
    topology.client.run(sys.executable, "-c", SEND, topology.gw2.address, stdin=lines)
    wait_until(lambda: len(connecting(topology)) == segments, "the handshakes in progress", timeout=HALF_OPEN_SECONDS)


def test_a_session_is_resumed_beside_handshakes_that_came_to_nothing_and_these_stay(topology: Topology) -> None:
    connect(topology)
    begin_handshakes(topology, MAX_SEGMENTS - 1)
    before = {sa["uniqueid"] for sa in connecting(topology)}
    topology.kill_gateway(topology.gw1)
    outcome = resume(topology)
    assert outcome["result"] == "resumed"
    assert outcome["total_ms"] < HALF_OPEN_SECONDS * 1000
    assert topology.gw2.charon.running
    assert {sa["uniqueid"] for sa in connecting(topology)} == before
    assert topology.client.ping(SITE) == 3


def test_where_each_segment_has_a_handshake_in_progress_the_activation_waits_for_the_end_of_one(
    topology: Topology,
) -> None:
    # the first SA of its kind is activated before the answer
    connect(topology)
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
    fresh(topology)
    connect(topology)
    begin_handshakes(topology, MAX_SEGMENTS)
    topology.kill_gateway(topology.gw1)
    waited = topology.gateways["gw2"].text().count("event=activation-delayed")
    outcome = resume(topology)
    assert topology.gw2.charon.running
    # once it is known that no activation comes, the answer waits for one
    assert outcome["result"] == "resumed"
    assert topology.client.ping(SITE) == 3
    # charon gave up by itself what it gave up
    assert "destroying incomplete IKE_SA" not in topology.gw2.charon.text()
    assert the_sa(topology.gw2)["responder-spi"] == outcome["spi_r"]
    # charon has it active before the sidecar knows
    delayed = "event=activation-delayed"
    wait_until(lambda: topology.gateways["gw2"].text().count(delayed) == waited + 1, "what the sidecar says of it")
    assert topology.client.ping(SITE) == 3
