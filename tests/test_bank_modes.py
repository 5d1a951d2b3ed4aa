"""Modes distributed and mixed end to end: real charons, a Redis at each gateway, and for mixed a central one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.bank import Bank
from bridge.lab.daemon import SLOWNESS, wait_until
from bridge.lab.host import Host
from bridge.lab.topology import SITE
from bridge.stub.bank_keys import heartbeat_key
from failover_support import established, fresh, resume, status, stub_key, the_sa

pytestmark = pytest.mark.lab


@dataclass
class Modes:
    """The standard lab with a Redis at each gateway."""

    mode: str
    topology: Topology
    near: dict[str, Bank]  # by the gateway's name

    @property
    def banks(self) -> list[Bank]:
        """Every bank that stubs go to."""
        return [*self.near.values(), *([self.topology.bank] if self.mode == "mixed" else [])]

    def connect(self) -> str:
        """A session at gw1 whose stub is in every bank that lives. Gives the stub's key."""
        self.topology.connect()
        key = stub_key(self.topology.gw1.address, the_sa(self.topology.client)["responder-spi"])
        for bank in self.banks:
            if bank.running:
                wait_until(lambda bank=bank: bank.cli("HGET", key, "vips") != "", f"the stub at {bank.host.name}")  # type: ignore[misc]
        return key

    def kill(self, host: Host) -> None:
        """A gateway is gone, its bank with it."""
        self.topology.kill_gateway(host)
        self.near[host.name].kill()


@pytest.fixture(scope="module", params=["distributed", "mixed"])
def shared(request: pytest.FixtureRequest) -> Iterator[Modes]:
    with Lab() as lab:
        topology = standard(lab, start=False)
        near = {host.name: Bank(host) for host in (topology.gw1, topology.gw2)}
        for name, sidecar in topology.gateways.items():
            [other] = [bank for gateway, bank in near.items() if gateway != name]
            bank = sidecar.config["bank"]
            bank |= {"mode": request.param, "peers": {other.host.address: other.url}}
            bank["url" if request.param == "distributed" else "local"] = near[name].url
        for each in near.values():
            each.start()
        topology.start()
        yield Modes(request.param, topology, near)


@pytest.fixture
def modes(shared: Modes) -> Modes:
    for bank in shared.banks:
        if not bank.running:
            bank.start()
    fresh(shared.topology)
    for name in shared.topology.gateways:
        wait_until(
            lambda name=name: all(  # type: ignore[misc]
                bank["reachable"] and not bank["pending"] for bank in status(shared.topology, name)["bank"]["banks"]
            ),
            f"all banks within reach of {name}",
        )
    for bank in shared.near.values():
        bank.cli("FLUSHDB")
    return shared


def test_a_session_survives_its_gateway_and_that_gateways_bank(modes: Modes) -> None:
    modes.connect()
    modes.kill(modes.topology.gw1)
    assert resume(modes.topology)["result"] == "resumed"
    assert modes.topology.client.ping(SITE) == 3


@pytest.fixture
def announcing(modes: Modes) -> Iterator[Modes]:
    """gw2 announces failures, which the other tests do not want."""
    sidecar = modes.topology.gateways["gw2"]
    before = sidecar.config["failover"]
    client = modes.topology.client
    # its own dead peer detection comes later, on a busy machine too
    client.configure("connections { home { dpd_delay = 60s } }\n", "patient.conf")
    client.charon.load()
    for config in ({"detect": 1.0 * SLOWNESS}, before):
        sidecar.stop()
        sidecar.config["failover"] = config
        sidecar.start()
        if config is not before:
            yield modes
    (client.etc / "swanctl/conf.d/patient.conf").unlink()
    client.charon.load()


def test_the_failure_of_a_gateway_whose_bank_hangs_is_noticed_and_announced(announcing: Modes) -> None:
    """As of a host whose power goes: connections to its bank are not refused."""
    modes = announcing
    modes.connect()
    modes.topology.kill_gateway(modes.topology.gw1)
    os.kill(modes.near["gw1"].pid, signal.SIGSTOP)
    try:
        wait_until(lambda: announced(modes.topology) == 1, "the announcement")
        there = [modes.topology.gw2.address]
        wait_until(lambda: [sa["remote-host"] for sa in established(modes.topology.client)] == there, "the move")
        # this gateway's own heartbeats come in time to the bank that lives
        assert int(modes.near["gw2"].cli("PTTL", heartbeat_key(modes.topology.gw2.address))) > 0
    finally:
        os.kill(modes.near["gw1"].pid, signal.SIGCONT)
    assert modes.topology.client.ping(SITE) == 3


def announced(topology: Topology) -> int:
    """The sessions of gw1 whose announcement gw2 began with last."""
    rows = [row for row in status(topology, "gw2")["failovers"] if row["gateway"] == topology.gw1.address]
    return int(rows[-1]["sessions"]) if rows else 0


def test_without_the_central_bank_a_session_is_resumed_from_its_copy_at_the_target(modes: Modes) -> None:
    modes.connect()
    modes.kill(modes.topology.gw1)
    modes.topology.bank.kill()
    assert resume(modes.topology)["result"] == "resumed"
    assert modes.topology.client.ping(SITE) == 3


def test_a_bank_that_is_down_meanwhile_gets_the_stub_when_it_is_back(modes: Modes) -> None:
    modes.near["gw2"].kill()
    key = modes.connect()
    modes.near["gw2"].start()
    wait_until(lambda: key in modes.near["gw2"].stubs(), "the stub that was owed")
    modes.kill(modes.topology.gw1)
    modes.topology.bank.kill()
    assert resume(modes.topology)["result"] == "resumed"


def test_with_its_own_bank_down_a_gateway_finds_the_stub_at_another(modes: Modes) -> None:
    modes.connect()
    modes.near["gw2"].kill()
    modes.topology.kill_gateway(modes.topology.gw1)
    assert resume(modes.topology)["result"] == "resumed"
    assert modes.topology.client.ping(SITE) == 3


def test_after_a_resumption_no_bank_has_the_old_stub_even_one_that_was_away(modes: Modes) -> None:
    old = modes.connect()
    modes.kill(modes.topology.gw1)
    outcome = resume(modes.topology)
    assert outcome["result"] == "resumed"
    modes.near["gw1"].start()
    new = stub_key(modes.topology.gw2.address, outcome["spi_r"])
    for bank in modes.banks:
        wait_until(lambda bank=bank: bank.stubs() == [new], f"{new} alone in place of {old} at {bank.host.name}")  # type: ignore[misc]


def test_the_stub_of_a_session_that_ends_is_deleted_everywhere(modes: Modes) -> None:
    modes.connect()
    modes.topology.client.swanctl("--terminate", "--ike", "home")
    for bank in modes.banks:
        wait_until(lambda bank=bank: not bank.stubs(), f"the end of the stub at {bank.host.name}")  # type: ignore[misc]


def test_a_bank_that_lost_everything_is_refilled(modes: Modes) -> None:
    key = modes.connect()
    bank = modes.near["gw2"]
    bank.kill()
    for file in bank.storage.rglob("*"):
        if file.is_file():
            file.unlink()
    bank.start()
    wait_until(lambda: key in bank.stubs(), "the stub again")


def test_a_gateway_fetches_the_stubs_of_another_before_its_clients_come(modes: Modes) -> None:
    key = modes.connect()
    near, address = modes.near["gw2"], modes.topology.gw1.address
    near.cli("DEL", key)
    done = modes.topology.gateways["gw2"].command("stubs", "download", "--from", address, "--json", check=False)
    assert (json.loads(done.stdout)["state"], json.loads(done.stdout)["stubs"]) == ("done", 1)
    if modes.mode == "distributed":
        assert key in near.stubs()
    modes.kill(modes.topology.gw1)
    assert resume(modes.topology)["result"] == "resumed"


def test_the_list_names_each_stub_once_and_a_deletion_reaches_every_bank(modes: Modes) -> None:
    modes.connect()
    gateway = modes.topology.gateways["gw2"]
    [row] = json.loads(gateway.command("stubs", "list", "--json").stdout)
    gateway.command("stubs", "delete", row["gateway"], row["spi"])
    assert [bank.stubs() for bank in modes.banks] == [[] for _ in modes.banks]


def test_check_and_status_name_every_bank(modes: Modes) -> None:
    modes.near["gw1"].kill()
    gateway = modes.topology.gateways["gw2"]
    findings = {
        row["check"]: row["grade"] for row in json.loads(gateway.command("check", "--json", check=False).stdout)
    }
    assert findings["bank of 192.168.50.1"] == "fail"
    assert findings["bank" if modes.mode == "distributed" else "local bank"] == "ok"

    def told() -> dict[str, bool]:
        return {bank["bank"]: bank["reachable"] for bank in status(modes.topology, "gw2")["bank"]["banks"]}

    wait_until(lambda: told()["192.168.50.1"] is False, "word that a bank is away")
    assert told() == {"local": True, "192.168.50.1": False} | ({"central": True} if modes.mode == "mixed" else {})
