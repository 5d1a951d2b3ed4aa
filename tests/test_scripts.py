"""What charon calls at the gateway where a session goes on: updown scripts, with real charons."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.topology import SITE
from failover_support import connect, fresh, resume
from releases_support import RELEASED, on_all

pytestmark = pytest.mark.lab

SCRIPT = "/etc/swanctl/updown"  # which another release's charon has too
CALLS = "/run/updown"


@pytest.fixture(scope="module", params=RELEASED)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab, whose gateways have an updown script."""
    with Lab() as lab:
        built = standard(lab, start=False, releases=on_all(request.param))
        built.agent.config["resume_on_down"] = False
        for host in (built.gw1, built.gw2):
            host.write(SCRIPT, f'#!/bin/sh\necho "$PLUTO_VERB $PLUTO_PEER_CLIENT" >>{CALLS}\n', mode=0o755)
            host.configure(f"connections {{ gw {{ children {{ net {{ updown = {SCRIPT} }} }} }} }}\n", "script.conf")
        built.start()
        yield built


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def calls(host: Host) -> list[str]:
    """What the script of a gateway was called with."""
    file = host.path(CALLS)
    return file.read_text().splitlines() if file.exists() else []


def test_an_updown_script_is_called_where_the_session_goes_on(topology: Topology) -> None:
    [address] = connect(topology)["local-vips"]
    assert calls(topology.gw1)[-1] == f"up-client {address}/32"
    before = len(calls(topology.gw2))
    topology.kill_gateway(topology.gw1)
    outcome = resume(topology)
    assert (outcome["result"], outcome["children"]) == ("resumed", ["net"])
    wait_until(lambda: len(calls(topology.gw2)) > before, "the script")
    assert calls(topology.gw2)[before:] == [f"up-client {address}/32"]
    assert topology.client.ping(SITE) == 3


def test_in_the_exchange_charon_calls_no_script(topology: Topology) -> None:
    gateway = topology.gateways["gw2"]
    gateway.stop()
    gateway.config["sync"] |= {"children_in_exchange": "always"}
    gateway.start()
    connect(topology)
    before = len(calls(topology.gw2))
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["children"] == ["net"]
    assert topology.client.ping(SITE) == 3
    assert len(calls(topology.gw2)) == before
