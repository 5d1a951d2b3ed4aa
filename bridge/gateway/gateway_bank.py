"""A gateway's bank with what every gateway needs around it: the queue of its changes, prefetched stubs, the sign of
life, the keys, and the events of the bank. What they say of the bank is in its status and metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack
from typing import Any

from bridge.bank import bank_url
from bridge.bank.interface import StubBank
from bridge.bank.key_file import KeyFile
from bridge.bank.key_rotation import KeyRotation
from bridge.bank.prefetch import Prefetch
from bridge.bank.replicated import ReplicatedBank
from bridge.bank.write_queue import WriteQueue
from bridge.charon.charon import Charon
from bridge.config import GatewayConfig
from bridge.gateway import metrics
from bridge.gateway.bank_events import BankEvents
from bridge.gateway.event_watch import EventWatch
from bridge.gateway.heartbeat import Heartbeat
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.uplink import Uplink
from bridge.stub import bank_keys
from bridge.stub.keyring import Keyring


async def _nothing(*_: Any) -> None:
    return


class GatewayBank:
    """`stubs` is the bank itself. `on_heartbeat` gets each attempt to write a heartbeat (bridge.gateway.heartbeat)."""

    def __init__(
        self, config: GatewayConfig, keyring: Keyring, charon: Charon, stubs: StubBank, counts: GatewayMetrics
    ) -> None:
        self.stubs = stubs
        self.on_heartbeat: Callable[[bool, float, Collection[str] | None], Awaitable[None]] = _nothing
        self._charon = charon
        self._replicas = stubs if isinstance(stubs, ReplicatedBank) else None
        # in mode distributed the bank at hand is as near as this process's memory, and all others know it
        near = self._replicas.near if self._replicas is not None and config.bank.mode == "distributed" else None
        self.prefetch = Prefetch(stubs, limit=config.bank.cache, near=near, patience=config.bank.get_timeout / 2)
        self.writer = WriteQueue(stubs, limit=config.bank.pending)
        uplink = Uplink(charon.tracker, shared=config.takeover.addresses)
        self.heartbeat = Heartbeat(
            stubs,
            charon,
            config.address,
            counts,
            config.failover.detect,
            self._written,
            cut_off=uplink.look if config.failover.uplink else lambda _: False,
        )
        self.rotation = KeyRotation(
            stubs,
            KeyFile(keyring, config.bank.key_file),
            config.address,
            shared=config.takeover.addresses,
            doubtful=lambda: self.heartbeat.doubtful,
        )
        self.events = BankEvents(bank_url(config.bank))
        self.events.on_state(lambda listening: None if listening else stubs.renew())
        self._event_watch = EventWatch(lambda: self.heartbeat.own_address)
        self.events.follow(bank_keys.HEARTBEAT, self._event_watch.event)
        self.events.on_state(self._event_watch.state)

    def close_with(self, stack: AsyncExitStack) -> None:
        """Have the bank closed with `stack`, after the queue was emptied as far as the bank takes it."""
        stack.push_async_callback(self.stubs.close)
        stack.push_async_callback(self.prefetch.close)
        stack.push_async_callback(self.writer.close)

    async def _written(self, written: bool, seconds: float, alive: Collection[str] | None) -> None:
        if written and alive is not None:
            self._event_watch.written()
        await self.on_heartbeat(written, seconds, alive)

    def status(self) -> dict[str, Any]:
        """For `ike-sa-sync status`."""
        return {
            "reachable": self.heartbeat.bank_reachable,
            "writable": self.heartbeat.bank_writable,
            "events": self._event_watch.arrive,
            "pending": self.writer.pending,
            "stubs": self._charon.tracker.count()[1],
            **self.rotation.status(),
            "banks": self._replicas.status() if self._replicas else [],
        }

    def gauges(self, counts: GatewayMetrics) -> None:
        """Show them."""
        metrics.of_stubs(counts, self._charon, self.writer, self.stubs, self.prefetch)
        self.heartbeat.gauges(counts)
        replicas = self._replicas
        counts.gauge(
            "bank_owed",
            "stub changes that one bank has and another has yet to get",
            lambda: replicas.pending if replicas is not None else 0,
        )
        counts.gauge(
            "bank_key_seals",
            "stubs sealed with the bank's key in use, by all gateways; 2^32 are the most for one key",
            lambda: self.rotation.seals,
        )
        counts.gauge(
            "keyspace_events_arrive",
            "0 while the bank takes heartbeats and reports no keyspace event of them",
            lambda: float(self._event_watch.arrive),
        )
