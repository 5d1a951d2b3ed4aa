"""A bank that takes heartbeats and publishes no keyspace events (bridge.gateway.event_watch)."""

from __future__ import annotations

import pytest

from bridge.bank.keyspace import Event
from bridge.gateway.event_watch import SILENT_SECONDS, EventWatch
from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from bridge.stub import bank_keys
from failover_support import status

OWN, OTHER = "192.0.2.1", "192.0.2.2"
BEAT_SECONDS = 0.3


class Gateway:
    def __init__(self) -> None:
        self.now = 100.0
        self.watch = EventWatch(lambda: OWN, clock=lambda: self.now)
        self.watch.state(True)

    def beats(self, number: int, *heard: tuple[str, str]) -> bool:
        """So many heartbeats, each with these events of a gateway's heartbeat; whether events arrive, by then."""
        for _ in range(number):
            self.now += BEAT_SECONDS
            self.watch.written()
            for gateway, what in heard:
                self.watch.event(Event(f"{bank_keys.HEARTBEAT}{gateway}", what))
        return self.watch.arrive


LONG = round(2 * SILENT_SECONDS / BEAT_SECONDS)


def test_own_heartbeats_that_bring_events_show_that_events_arrive() -> None:
    assert Gateway().beats(LONG, (OWN, "set"), (OWN, "expire"))


@pytest.mark.parametrize("heard", [(), ((OTHER, "set"),), ((OWN, "expired"),)])
def test_where_they_bring_none_that_is_told_and_taken_back(heard: tuple[tuple[str, str], ...]) -> None:
    gateway = Gateway()
    assert not gateway.beats(LONG, *heard)
    assert gateway.beats(1, (OWN, "set"))


def test_a_few_late_events_are_nothing() -> None:
    gateway = Gateway()
    for _ in range(20):
        assert gateway.beats(round(0.8 * SILENT_SECONDS / BEAT_SECONDS))
        assert gateway.beats(1, (OWN, "set"))


def test_while_the_connection_does_not_listen_something_else_is_told() -> None:
    gateway = Gateway()
    gateway.watch.state(False)
    assert gateway.beats(LONG)
    gateway.watch.state(True)
    assert gateway.beats(2)
    assert not gateway.beats(LONG)


@pytest.mark.lab
def test_a_redis_that_lost_its_configuration_is_reported(topology: Topology) -> None:
    assert status(topology, "gw1")["bank"]["events"]
    before = topology.bank.cli("config", "get", "notify-keyspace-events").split("\n")[1]
    topology.bank.cli("config", "set", "notify-keyspace-events", "")
    try:
        wait_until(lambda: not status(topology, "gw1")["bank"]["events"], "the report", SILENT_SECONDS + 30)
        assert "keyspace-events-missing" in topology.gateways["gw1"].text()
    finally:
        topology.bank.cli("config", "set", "notify-keyspace-events", before)
    wait_until(lambda: bool(status(topology, "gw1")["bank"]["events"]), "its end")
