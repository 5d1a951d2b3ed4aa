"""The gateway sidecar: its parts put together, started, watched and stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import structlog

from bridge.bank import bank_url, open_bank
from bridge.bank.interface import HEARTBEAT_SECONDS, HEARTBEAT_TTL, BankUnavailable
from bridge.bank.key_rotation import KeyRotation
from bridge.bank.prefetch import Prefetch
from bridge.bank.replicated import ReplicatedBank
from bridge.bank.write_queue import WriteQueue
from bridge.charon import metrics as gauges
from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.status import charon_status, sa_rows, wait_known
from bridge.charon.vici_types import SaInfo
from bridge.config import ConfigError, GatewayConfig
from bridge.gateway import metrics
from bridge.gateway.bank_reconciler import BankReconciler
from bridge.gateway.client_stubs import ClientStubs
from bridge.gateway.drain import Drain
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.publisher import Publisher
from bridge.gateway.responder import Responder
from bridge.gateway.stub_lookup import StubLookup
from bridge.net import firewall
from bridge.net.interface import Packet
from bridge.net.nfqueue import Interceptor, InterceptUnavailable
from bridge.service.control import Answer, Command, ControlServer
from bridge.service.process import RETRY_SECONDS, log_level, raw_udp, retry, run, serve, serve_metrics
from bridge.stub.keyring import Keyring, SealError

log = structlog.get_logger()


class GatewayProcess:
    """The gateway sidecar: extraction to the bank, and resumption from it."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._metrics = GatewayMetrics()
        self._gateway: Responder | None = None
        self._publisher: Publisher | None = None
        self._writer: WriteQueue | None = None
        self._bank: Prefetch | None = None
        self._interceptor: Interceptor | None = None
        self._charon: Charon | None = None
        self._rotation: KeyRotation | None = None
        self._tiers: ReplicatedBank | None = None
        self._bank_reachable = False

    async def run(self) -> None:
        """Serve until a stop signal. Raises ConfigError for a key file that cannot be used."""
        await serve(self._config.log, self._start)

    async def _start(self, stack: AsyncExitStack) -> None:
        config = self._config
        try:
            keyring = Keyring.load(config.bank.key_file)
        except (SealError, OSError) as error:
            raise ConfigError(f"bank.key_file: {error}") from error
        self._charon = charon = Charon(
            config.vici, config.ha, self, self._recover, at_once=config.sync.children_at_once
        )
        # first of all: what charon says while the rest is not there yet must not be lost
        await retry("ha-channel", charon.channel.open, ChannelError)
        stack.push_async_callback(charon.close)
        places = await open_bank(config.bank, keyring, serve=True)
        self._tiers = tiers = places if isinstance(places, ReplicatedBank) else None
        # in mode distributed the bank at hand is as near as this process's memory, and all others know it
        near = tiers.near if tiers is not None and config.bank.mode == "distributed" else None
        cache = Prefetch(places, limit=config.bank.cache, near=near)
        self._bank = bank = cache
        stack.push_async_callback(bank.close)
        self._writer = writer = WriteQueue(bank, limit=config.bank.pending)
        stack.push_async_callback(writer.close)
        self._publisher = publisher = Publisher(writer, bank, config.address, config.sync)
        raw = raw_udp(stack)
        handout = ClientStubs(config.sync.client_stub, keyring, charon.tracker, raw, config.address, self._metrics)
        lookup = StubLookup(
            bank,
            handout,
            self._metrics,
            reachable=lambda: self._bank_reachable,
            timeout=config.bank.get_timeout,
        )
        drain = Drain(charon, bank, raw, config.address)
        self._gateway = gateway = Responder(
            charon, lookup, handout, writer, raw, config.sync, self._metrics, publisher.publish, drain.moving
        )
        self._gauges(charon, gateway, writer, cache)
        stack.callback(serve_metrics(self._metrics, config.metrics))
        self._rotation = rotation = KeyRotation(bank, keyring, config.bank.key_file, config.address)
        upkeep = BankReconciler(config, bank_url(config.bank), cache, rotation, charon, publisher, self._metrics)
        if tiers is not None:
            tiers.on_return = upkeep.returned
        commands: dict[str, Command] = {
            "status": self._status,
            "log-level": log_level,
            "fetch": upkeep.fetch,
            "fetched": upkeep.progress,
            "drain": drain.start,
            "drained": drain.progress,
            "drain-stop": drain.stop,
        }
        control = ControlServer(config.control, commands)
        await control.start()
        stack.push_async_callback(control.close)
        gateway.start()
        stack.push_async_callback(gateway.close)
        stack.push_async_callback(drain.close)
        charon.start()
        # before the gateway and the writer stop: what is heard from here on would not get to the bank any more
        stack.callback(charon.pause)
        upkeep.start()
        stack.push_async_callback(upkeep.close)
        heartbeat = asyncio.create_task(self._heartbeat(), name="heartbeat")
        stack.callback(heartbeat.cancel)
        await self._intercept(stack, gateway.packets, gateway.busy)
        await wait_known(charon)

    async def _intercept(
        self, stack: AsyncExitStack, handler: Callable[[Sequence[Packet]], None], busy: Callable[[], bool]
    ) -> None:
        config = self._config.intercept
        interceptor = self._interceptor = Interceptor(config.queue, handler, busy)
        loop = asyncio.get_running_loop()
        await retry("nfqueue", lambda: interceptor.start(loop), InterceptUnavailable)
        stack.callback(interceptor.stop)
        if config.rules != "external":
            backend = config.rules
            await retry("rules", lambda: firewall.install(config.queue, backend=backend), firewall.RulesError)
            stack.callback(firewall.remove)

    # charon's news (bridge.charon.sa_tracker.Listener)

    def changed(self, sa: IkeSa) -> None:
        """An SA of this gateway came up or changed."""
        assert self._publisher is not None
        self._publisher.publish(sa)

    def gone(self, sa: IkeSa) -> None:
        """An SA of this gateway ended."""
        assert self._publisher is not None
        assert self._gateway is not None
        self._gateway.unconfirmed.gone(sa)
        if sa.up:
            self._publisher.withdraw(sa)

    def verified(self, ike_id: IkeId) -> None:
        """A request of a client's verified."""
        if self._gateway is not None:
            self._gateway.unconfirmed.verified(ike_id)

    def down(self, info: SaInfo) -> None:
        """The HA channel tells the same, with the order kept."""

    async def _recover(self, infos: list[SaInfo]) -> list[IkeSa] | None:
        assert self._publisher is not None
        return await self._publisher.recover(infos)

    # watching

    async def _heartbeat(self) -> None:
        assert self._bank is not None
        assert self._charon is not None
        while True:
            address = self._config.address or self._local_address()
            try:
                self._metrics.ping_seconds.observe(await self._bank.ping())
                if address:
                    await self._bank.heartbeat(address, HEARTBEAT_TTL)
                if not self._bank_reachable:
                    log.info("bank-reachable")
                self._bank_reachable = True
            except BankUnavailable as error:
                if self._bank_reachable:
                    log.warning("bank-lost", reason=str(error))
                self._bank_reachable = False
            await asyncio.sleep(HEARTBEAT_SECONDS if self._bank_reachable else RETRY_SECONDS)

    def _local_address(self) -> str | None:
        assert self._charon is not None
        return next((sa.local.address for sa in self._charon.tracker.established() if sa.local), None)

    def _gauges(self, charon: Charon, gateway: Responder, writer: WriteQueue, cache: Prefetch) -> None:
        gauges.of_charon(self._metrics, charon)
        metrics.of_stubs(self._metrics, charon, writer, cache)
        metrics.of_queue(self._metrics, lambda: self._interceptor)
        gauge = self._metrics.gauge
        gauge(
            "toggle_seconds",
            "how long the last activation kept the IKE_SAs of one segment from answering, at most",
            lambda: charon.installer.toggle_seconds,
        )
        gauge("unconfirmed", "rebuilt IKE_SAs not confirmed yet", lambda: len(gateway.unconfirmed))
        gauge("cookies_demanded", "1 while every request must carry a cookie", lambda: float(gateway.demanding))
        tiers = self._tiers
        gauge(
            "bank_owed",
            "stub changes that one bank has and another has yet to get",
            lambda: tiers.owed if tiers is not None else 0,
        )
        gauge("bank_reachable", "1 while the bank answers", lambda: float(self._bank_reachable))

    async def _status(self, _: dict[str, Any]) -> Answer:
        assert self._charon is not None
        assert self._gateway is not None
        assert self._writer is not None
        assert self._rotation is not None
        return {
            "role": "gateway",
            "address": self._config.address,
            "time": int(time.time()),
            "charon": charon_status(self._charon),
            "bank": {
                "reachable": self._bank_reachable,
                "pending": self._writer.pending,
                "stubs": self._charon.tracker.count()[1],
                **self._rotation.status(),
                "banks": self._tiers.status() if self._tiers else [],
            },
            "unconfirmed": len(self._gateway.unconfirmed),
            "sas": await sa_rows(self._charon),
            "counters": self._metrics.values(),
        }


def run_gateway(config: GatewayConfig) -> None:
    """`ike-sa-sync gateway`."""
    run(GatewayProcess(config).run)
