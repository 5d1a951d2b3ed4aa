"""A gateway whose sidecar stands still, or whose rules were flushed: handshakes go on, and resumption comes back."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from bridge.ike.resumption_answer import parse_response
from bridge.ike.sync_messages import OrdinaryResponse, SyncResponse
from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from bridge.lab.topology import SITE
from failover_support import connect, counter, fresh, resume, status
from probe_support import configured, rebuilt, request, send, the_stub

pytestmark = pytest.mark.lab

FORGE = """
import os, socket
os.setuid(65534)
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
try:
    sock.sendto(b"\\3\\1forged", ("127.0.0.2", 4510))
except PermissionError:
    print("refused")
"""


@pytest.fixture(autouse=True)
def each_test_begins_without_sas(topology: Topology) -> None:
    fresh(topology)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP, as a debugger or a freezer does it: nothing in that process runs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def initiated(topology: Topology) -> int:
    """Requests for a handshake that gw2's charon took."""
    return topology.gw2.charon.text().count("is initiating an IKE_SA")


def test_full_handshakes_do_not_wait_for_a_sidecar_that_stands_still(topology: Topology) -> None:
    with stopped(topology.gateways["gw2"].pid):
        began = time.monotonic()
        topology.connect("home-gw2")
        # charon retransmits after 2 s in the lab: nothing was held up, in the first second neither
        assert time.monotonic() - began < 1
        assert topology.client.ping(SITE) == 3


def test_with_match_anywhere_full_handshakes_wait_for_it_for_a_second_at_most(topology: Topology) -> None:
    sidecar = topology.gateways["gw2"]
    with configured(sidecar, "intercept", match="anywhere"), stopped(sidecar.pid):
        time.sleep(1.2)
        began = time.monotonic()
        topology.connect("home-gw2")
        assert time.monotonic() - began < 1
        assert topology.client.ping(SITE) == 3


def test_requests_to_resume_go_to_charon_after_a_second_and_to_the_sidecar_once_it_runs_again(
    topology: Topology,
) -> None:
    connect(topology)
    stub = the_stub(topology)
    before = status(topology, "gw2")["counters"]
    with stopped(topology.gateways["gw2"].pid):
        time.sleep(1.2)
        message = request(stub, spi_i=b"\x21" * 8)
        answers = send(topology, message)
        assert [type(parse_response(octets, message)) for octets in answers] == [OrdinaryResponse]
    wait_until(
        lambda: counter(topology, "gw2", "event_loop_stalls_total") > before["event_loop_stalls_total"], "it ran"
    )
    assert rebuilt(topology) == 0
    message = request(stub, spi_i=b"\x22" * 8)
    [octets] = send(topology, message)
    assert isinstance(parse_response(octets, message), SyncResponse)
    wait_until(lambda: counter(topology, "gw2", "nfqueue_bypassed_total") > before["nfqueue_bypassed_total"], "counted")


def test_what_was_held_when_the_sidecar_stood_still_goes_to_charon(topology: Topology) -> None:
    connect(topology)
    stub = the_stub(topology)
    message = request(stub, spi_i=b"\x23" * 8)
    handshakes = initiated(topology)
    with stopped(topology.gateways["gw2"].pid):
        # within the first second it is held; nothing answers
        assert send(topology, message) == []
        time.sleep(1.2)
    # its sender may have sent it again meanwhile, past the queue: charon answers it, once
    wait_until(lambda: initiated(topology) == handshakes + 1, "charon")
    assert rebuilt(topology) == 0
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"


@pytest.mark.parametrize("tool", ["nft", "iptables"])
def test_flushed_rules_are_back_within_seconds(topology: Topology, tool: str) -> None:
    connect(topology)
    before = status(topology, "gw2")["counters"]
    if tool == "nft":
        topology.gw2.run("nft", "flush", "ruleset")
    else:
        topology.gw2.run("iptables", "-t", "security", "-F")
    for name in ("queue_rules_restored_total", "ha_rules_restored_total"):
        if tool == "nft" or name.startswith("queue"):
            wait_until(lambda name=name: counter(topology, "gw2", name) > before[name], name, 15)  # type: ignore[misc]
    told = status(topology, "gw2")["counters"]
    assert told["queue_rules_in_place"] == told["ha_rules_in_place"] == 1
    assert resume(topology, "--to", topology.gw2.address)["result"] == "resumed"
    assert "rules-lost" in topology.gateways["gw2"].text()


def test_another_user_cannot_speak_to_the_sidecar_while_it_runs_or_is_stopped(topology: Topology) -> None:
    gateway = topology.gateways["gw2"]
    assert topology.gw2.run(sys.executable, "-c", FORGE).stdout == "refused\n"
    wait_until(lambda: counter(topology, "gw2", "ha_foreign_datagrams_total") > 0, "the count", 15)
    gateway.stop()
    try:
        assert topology.gw2.run(sys.executable, "-c", FORGE).stdout == "refused\n"
    finally:
        gateway.start()
