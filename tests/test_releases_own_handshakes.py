"""Handshakes that a gateway's own charon begins while segments are activated, on releases of strongSwan that end them,
or crash: nothing can hold those back.

The sidecar activates segments in which its charon has no peer that it may begin a handshake with, while there are some.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from bridge.charon.ha_segments import segment_of
from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.space import LabError
from bridge.lab.topology import client_host
from failover_support import established
from test_releases_handshakes import initiate_again_and_again, move

pytestmark = [pytest.mark.lab, pytest.mark.releases, pytest.mark.timeout(600)]

SEGMENTS = 2
ACTIVATIONS = 25
SECONDS = 200.0
PAUSE = 0.05
STARTS = 4
TUNNELS = 40
TUNNEL = """
connections {{ out{number} {{
    version = 2
    unique = never
    remote_addrs = {address}
    local {{
        auth = psk
        id = vpn.example.org
    }}
    remote {{
        auth = psk
        id = site@example.org
    }}
    children {{ net {{
        local_ts = 10.10.0.0/16
        start_action = {action}
    }} }}
}} }}
"""
UNAWARE = [
    sys.executable,
    "-c",
    "from bridge.charon.ha_segments import SegmentChooser\n"
    "SegmentChooser.with_peers = lambda _: frozenset()\n"
    "from bridge.__main__ import main\n"
    "main()",
]
ENDED = "destroying incomplete IKE_SA"


def addresses(count: int) -> list[str]:
    """So many of the lab's network, for hosts beside its own."""
    return [f"192.168.50.{host}" for host in range(60, 60 + count)]


@contextlib.contextmanager
def gateway(
    release: str, at: list[str], action: str, *, segments: int, ha_pools: bool, program: list[str] | None = None
) -> Iterator[Topology]:
    """The standard lab; gw2 has connections to a host of these addresses, `site`, that it initiates."""
    with Lab() as lab:
        topology = standard(lab, start=False, releases={"gw2": release}, ha_pools=ha_pools)
        topology.agent.config["resume_on_down"] = False
        topology.agent.config["resume"] = {"answer_timeout": 20.0}
        topology.gw2.charon.settings["charon.plugins.ha.segment_count"] = segments
        topology.gateways["gw2"].config["ha"]["segments"] = segments
        if program is not None:
            topology.gateways["gw2"].program = program
        tunnels = [TUNNEL.format(number=number, address=each, action=action) for number, each in enumerate(at)]
        topology.gw2.configure("".join(tunnels), "tunnels.conf")
        site = client_host(lab, "site", at[0], topology.secret)
        # one peer with many IKE_SAs
        site.configure("connections { home { unique = never } }\n", "zz.conf")
        for each in at[1:]:
            site.run("ip", "address", "add", f"{each}/24", "dev", "eth0")
        site.charon.start()
        topology.start()
        yield topology


def activations(topology: Topology) -> int:
    text = topology.gw2.charon.text()
    return sum(text.count(f"HA segment {number} activated") for number in range(1, SEGMENTS + 1))


def bombard(topology: Topology, most: float = ACTIVATIONS) -> int:
    """Moves among handshakes that gw2 begins, until there were `most` activations, or charon ended itself, or SECONDS
    are over; how many handshakes there were."""
    stop, begun = threading.Event(), list[int]()
    thread = threading.Thread(
        target=initiate_again_and_again,
        args=(topology.gw2, "out0", stop, begun),
        kwargs={"pause": PAUSE, "timeout_ms": 2000},
        daemon=True,
    )
    topology.connect()
    thread.start()
    deadline = time.monotonic() + SECONDS
    try:
        while activations(topology) < most and topology.gw2.charon.running and time.monotonic() < deadline:
            for to in (topology.gw2, topology.gw1):
                with contextlib.suppress(LabError, OSError):
                    move(topology, to)
    finally:
        stop.set()
        thread.join(10)
    print(f"{activations(topology)} activations, {len(begun)} handshakes")
    return len(begun)


@pytest.mark.parametrize("release", ["trixie", "forky"])
def test_no_segment_is_activated_in_which_the_gateway_itself_may_begin_a_handshake(release: str) -> None:
    with gateway(release, addresses(1), "none", segments=SEGMENTS, ha_pools=False) as topology:
        begun = bombard(topology)
        assert topology.gw2.charon.running
        assert activations(topology) >= ACTIVATIONS
        assert begun > ACTIVATIONS
        assert ENDED not in topology.gw2.charon.text()
        text = topology.gw2.charon.text()
        assert f"HA segment {segment_of(addresses(1)[0], SEGMENTS)} activated" not in text


def test_strongswan_6_0_1_ends_where_its_own_handshakes_are_not_thought_of() -> None:
    with gateway("trixie", addresses(1), "none", segments=SEGMENTS, ha_pools=False, program=UNAWARE) as topology:
        # which activation meets a handshake is a matter of chance
        bombard(topology, most=math.inf)
        assert not topology.gw2.charon.running
        assert "killing ourself, received critical signal" in topology.gw2.charon.text()


@pytest.mark.parametrize("release", ["trixie", "forky"])
def test_tunnels_that_a_charon_begins_at_its_start_come_up_beside_the_activation_of_all_segments(release: str) -> None:
    with gateway(release, addresses(TUNNELS), "start", segments=16, ha_pools=True) as topology:
        for start in range(STARTS):
            if start:
                topology.gw2.charon.kill()
                topology.gw2.charon.start()
            wait_until(lambda: len(established(topology.gw2)) == TUNNELS, "all tunnels", timeout=60)
            assert topology.gw2.charon.running
            assert ENDED not in topology.gw2.charon.text()
