"""A gateway that cannot send to its clients any more, while it still reaches the bank, says so itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import msgspec
import pytest
import structlog

from bank_support import keyring, stub_of
from bridge.bank.interface import StubBank
from bridge.charon.ike_sa import sa_of
from bridge.config import GatewayConfig
from bridge.gateway.gateway_bank import GatewayBank
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.uplink import GONE_SECONDS, LOOK_SECONDS, SAMPLE, SAMPLE_SECONDS, Uplink
from bridge.lab import Lab, Topology, space
from bridge.lab.daemon import SLOWNESS, wait_until
from bridge.lab.demo import Ping
from bridge.lab.topology import SITE, standard
from bridge.net.route import reaches, through_router
from bridge.stub.bank_keys import heartbeat_key
from failover_support import connect, established, fresh, last_move
from role_support import fake_charon
from test_sa_tracker import tracker

OWN, OTHER_UPLINK, SHARED = "192.0.2.1", "192.0.2.65", "192.0.2.100"


class Kernel:
    """What it says of the ways to clients, and the uplink of a gateway with so many sessions."""

    def __init__(self, sessions: int) -> None:
        known, _, self._clock = tracker()
        for number in range(1, sessions + 1):
            sa = sa_of(stub_of(number.to_bytes(8)))
            known.sas[sa.id.spis] = sa
        self.known = known
        self.sends = True
        self.asked = 0
        self.cut: set[str] = set()
        """addresses of this gateway from which nothing can be sent"""
        self.uplink = Uplink(known, self._reaches, shared=[SHARED])
        self.now = 1000.0

    def _reaches(self, local: str, remote: str) -> bool:
        self.asked += 1
        return self.sends and local not in self.cut

    def at(self, address: str, sessions: int) -> None:
        """The gateway has so many sessions, all at this address of it, and no others."""
        self.known.sas.clear()
        for number in range(1, sessions + 1):
            stub = stub_of(number.to_bytes(8))
            sa = sa_of(msgspec.structs.replace(stub, local=msgspec.structs.replace(stub.local, address=address)))
            self.known.sas[sa.id.spis] = sa

    def passes(self, seconds: float) -> bool:
        """Whether it is gone after that, looked at as often as a gateway does."""
        end = self.now + seconds
        while self.now < end:
            self.now += LOOK_SECONDS / 4
            self.uplink.look(self.now)
        return self.uplink.gone


def test_an_uplink_over_which_no_client_can_be_sent_to_is_gone_and_comes_back() -> None:
    kernel = Kernel(3)
    assert not kernel.passes(1.0)
    kernel.sends = False
    with structlog.testing.capture_logs() as events:
        assert not kernel.passes(GONE_SECONDS / 2)
        assert kernel.passes(GONE_SECONDS + LOOK_SECONDS)
        # whatever becomes of its sessions
        kernel.known.sas.clear()
        assert kernel.passes(2 * SAMPLE_SECONDS)
        kernel.sends = True
        assert not kernel.passes(2 * LOOK_SECONDS)
    assert [event["event"] for event in events] == ["uplink-lost", "uplink-back"]


def test_an_interface_that_is_away_for_a_moment_is_no_loss() -> None:
    kernel = Kernel(3)
    kernel.passes(1.0)
    for _ in range(10):
        kernel.sends = not kernel.sends
        assert not kernel.passes(GONE_SECONDS / 2)


def test_a_gateway_without_sessions_has_not_lost_its_uplink() -> None:
    kernel = Kernel(0)
    kernel.sends = False
    assert not kernel.passes(10.0)


def test_ways_that_the_kernel_never_knew_say_nothing() -> None:
    """charon's packets may be routed by a mark."""
    kernel = Kernel(3)
    kernel.sends = False
    assert not kernel.passes(10.0)


def test_a_gateway_with_many_sessions_looks_at_some_of_them() -> None:
    kernel = Kernel(5000)
    kernel.uplink.look(kernel.now)
    assert kernel.asked <= SAMPLE + 1
    kernel.sends = False
    kernel.passes(1.0)
    kernel.asked = 0
    kernel.passes(1.0)
    assert kernel.asked <= SAMPLE * (1.0 / LOOK_SECONDS + 1)


def test_new_clients_over_another_uplink_bring_the_heartbeat_back() -> None:
    """Those that the kernel was asked about before never come back: their port is unplugged, or has another address."""
    kernel = Kernel(0)
    kernel.at(OWN, 3)
    kernel.passes(1.0)
    kernel.cut.add(OWN)
    assert kernel.passes(2.0)
    kernel.at(OTHER_UPLINK, 3)
    assert not kernel.passes(SAMPLE_SECONDS + LOOK_SECONDS)
    kernel.cut.clear()
    assert not kernel.passes(2 * SAMPLE_SECONDS)


def test_clients_that_came_since_the_last_choice_count_before_the_uplink_is_gone() -> None:
    kernel = Kernel(0)
    kernel.at(OWN, 3)
    kernel.passes(1.0)
    kernel.at(OTHER_UPLINK, 3)
    kernel.cut.add(OWN)
    with structlog.testing.capture_logs() as events:
        assert not kernel.passes(2 * SAMPLE_SECONDS)
    assert events == []


def test_a_shared_address_that_moves_to_another_gateway_is_no_loss() -> None:
    kernel = Kernel(0)
    kernel.at(SHARED, 3)
    kernel.passes(1.0)
    kernel.cut.add(SHARED)
    assert not kernel.passes(2.0)


@pytest.mark.parametrize("steps", range(0, int(2 * SAMPLE_SECONDS / LOOK_SECONDS), 4))
def test_a_loss_is_noticed_whenever_it_happens(steps: int) -> None:
    """Also between two looks where the clients that are looked at are chosen again."""
    kernel = Kernel(3)
    kernel.passes(steps * LOOK_SECONDS)
    kernel.passes(LOOK_SECONDS)
    kernel.sends = False
    assert kernel.passes(2.0)


def test_the_kernel_says_what_this_host_reaches() -> None:
    assert reaches("127.0.0.1", "127.0.0.1")
    assert reaches("::1", "::1")
    assert not through_router("127.0.0.1", "127.0.0.1")


@pytest.mark.parametrize("missing", ["192.0.2.77", "2001:db8::77"])
def test_an_address_that_left_this_host_says_nothing_of_the_way(missing: str) -> None:
    """It moved to another gateway, or its interface got another one. The way is there."""
    assert reaches(missing, "::1" if ":" in missing else "127.0.0.1")


@pytest.mark.parametrize("looks", [True, False])
async def test_a_gateway_that_is_not_to_look_at_its_uplink_does_not(
    monkeypatch: pytest.MonkeyPatch, looks: bool
) -> None:
    """Where charon's packets are routed by a mark, and others by a default route over another interface."""
    monkeypatch.setattr(Uplink, "look", lambda *_: True)
    config = msgspec.convert({"address": OWN, "failover": {"uplink": looks}}, GatewayConfig)
    charon, _, _ = fake_charon("home")
    bank = GatewayBank(config, keyring(), charon, cast(StubBank, None), GatewayMetrics())
    assert bank.heartbeat._cut_off(0.0) is looks


@pytest.fixture(scope="module")
def lab() -> Iterator[Topology]:
    """The standard lab, where gw1 reaches the bank by another interface than its clients."""
    with Lab() as lab:
        topology = standard(lab, start=False)
        for sidecar in topology.gateways.values():
            sidecar.config["failover"] = {"detect": 1.0 * SLOWNESS}
        bank = topology.bank.host
        lab.add_network("inner")
        lab.attach(bank, "10.98.0.20/24", network="inner")
        interface = lab.attach(topology.gw1, "10.98.0.1/24", network="inner")
        topology.gw1.run(
            *("ip", "route", "add", f"{bank.address}/32", "via", "10.98.0.20", "dev", interface, "src", "10.98.0.1")
        )
        topology.client.configure("connections { home { dpd_delay = 30s } }\n", "dpd.conf")
        topology.start()
        yield topology


def without_carrier(topology: Topology, there: bool) -> None:
    """The cable is pulled, or is in again."""
    port = f"{topology.gw1.name}-eth0"
    space.command("ip", "-n", topology.lab.switch, "link", "set", port, "up" if there else "down")


def set_down(topology: Topology, there: bool) -> None:
    """An operator's mistake."""
    topology.gw1.run("ip", "link", "set", "eth0", "up" if there else "down")


@pytest.mark.lab
@pytest.mark.parametrize("change", [without_carrier, set_down])
def test_the_clients_of_a_gateway_that_loses_its_uplink_alone_go_on_elsewhere(lab: Topology, change: object) -> None:
    assert callable(change)
    fresh(lab)
    sign = heartbeat_key(lab.gw1.address)
    wait_until(lambda: lab.bank.cli("EXISTS", sign) == "1", "the heartbeat")
    connect(lab)
    ping = Ping(lab.client, SITE)
    wait_until(lambda: ping.answers() >= 10, "traffic")
    # longer than between two choices of clients that are looked at
    wait_until(lambda: ping.answers() >= 10 + SAMPLE_SECONDS / 0.05, "traffic for a while")
    change(lab, False)
    try:
        there = [lab.gw2.address]
        wait_until(lambda: [sa["remote-host"] for sa in established(lab.client)] == there, "the session elsewhere")
        at = ping.answers()
        wait_until(lambda: ping.answers() >= at + 10, "traffic at the other gateway")
        assert last_move(lab)["result"] == "resumed"
        assert "event=uplink-lost" in lab.gateways["gw1"].text()
        assert lab.bank.cli("EXISTS", sign) == "0"
    finally:
        ping.stop()
        change(lab, True)
    wait_until(lambda: lab.bank.cli("EXISTS", sign) == "1", "the heartbeat again")
