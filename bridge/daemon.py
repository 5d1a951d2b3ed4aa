"""The two long-running commands: the parts put together, started, watched and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import structlog
import uvloop

from bridge import gauges
from bridge import log as logging
from bridge.bank import bank_url, open_bank
from bridge.bank.cache import CachedBank
from bridge.bank.interface import HEARTBEAT_SECONDS, HEARTBEAT_TTL, BankUnavailable
from bridge.bank.tiers import TieredBank
from bridge.bank.writer import Writer
from bridge.charon.channel import ChannelError
from bridge.charon.charon import Charon
from bridge.charon.ha import IkeId
from bridge.charon.sa import Sa
from bridge.charon.vici import SaInfo
from bridge.client import Client
from bridge.config import ClientConfig, GatewayConfig, canonical_address
from bridge.control import Answer, Command, ControlServer
from bridge.gateway import Gateway
from bridge.handout import Handout
from bridge.lookup import Lookup
from bridge.metrics import ClientMetrics, GatewayMetrics, Metrics
from bridge.net import rules
from bridge.net.intercept import Interceptor, InterceptUnavailable
from bridge.net.interface import Packet
from bridge.net.rawudp import RawUdp, ResponseListener
from bridge.publish import Publisher
from bridge.rotation import Rotation
from bridge.seal import Keyring, SealError
from bridge.tasks import end
from bridge.upkeep import Upkeep

log = structlog.get_logger()

RETRY_SECONDS = 1.0
"""between attempts at something that is missing at start"""
READY_SECONDS = 10.0
"""how long `ready` waits for charon's SAs to be known; charon may well be down"""


class StartError(Exception):
    """The sidecar cannot run at all; the text names the cause and the mend."""


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run one sidecar to its end. Raises StartError."""
    # keys are in this process's memory: no core dump may hold them
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # seconds: a long list that VICI's thread parses must not keep the event loop waiting for 5 ms each time
    sys.setswitchinterval(0.0005)
    uvloop.run(main())


def notify(state: str) -> None:
    """sd_notify(3), where systemd asked for it."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


def announce_ready() -> None:
    """Tell systemd and whoever reads stdout that the sidecar serves."""
    notify("READY=1")
    print("ready", flush=True)


async def _until_stopped() -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    watchdog = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(watchdog or None):
                await stop.wait()
        if watchdog:
            notify("WATCHDOG=1")
    notify("STOPPING=1")


async def _or_stopped(work: Coroutine[Any, Any, None]) -> bool:
    """Run `work` until it ends or a stop signal comes; whether it ended. Its exceptions pass through."""
    task = asyncio.ensure_future(work)
    stop = asyncio.ensure_future(_until_stopped())
    done, pending = await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
    await end(*pending)
    if task in done:
        task.result()
    return task in done


async def _retry(name: str, attempt: Callable[[], object], *errors: type[Exception]) -> None:
    """Try until it works; say why not whenever the reason changes."""
    told = ""
    while True:
        try:
            attempt()
        except errors as error:
            if str(error) != told:
                log.warning(f"{name}-unavailable", reason=str(error), retrying_every_s=RETRY_SECONDS)
            told = str(error)
            await asyncio.sleep(RETRY_SECONDS)
        else:
            return


def _serve_metrics(metrics: Metrics, address: str | None) -> Callable[[], None]:
    try:
        return metrics.serve(address)
    except OSError as error:
        raise StartError(f"metrics: {address} cannot be served ({error.strerror}): set another address") from error


def _raw_udp(stack: AsyncExitStack) -> RawUdp:
    try:
        raw = RawUdp()
    except OSError as error:
        raise StartError(f"raw sockets: {error}") from error
    stack.callback(raw.close)
    return raw


async def _log_level(request: dict[str, Any]) -> Answer:
    """The level that is written, after it was changed if the request names one."""
    if (level := request.get("level")) is not None:
        before = logging.level()
        logging.set_level(str(level))
        log.info("log-level", level_before=before, level_now=level)
    return {"level": logging.level()}


async def _wait_known(charon: Charon) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READY_SECONDS):
            await charon.reconciled.wait()


def _sa_rows(charon: Charon) -> list[dict[str, Any]]:
    return [
        {
            "connection": sa.connection,
            "spi_i": sa.id.spi_i.hex(),
            "spi_r": sa.id.spi_r.hex(),
            "initiator": sa.id.initiator,
            "remote": sa.remote.address if sa.remote else None,
            "remote_id": sa.remote_id.text if sa.remote_id else None,
            "virtual_ips": list(sa.remote_vips or sa.local_vips),
            "children": [child.name for child in sa.children.values()],
            "expires": sa.expires,
            "resumable": sa.resumable,
        }
        for sa in charon.tracker.established()
    ]


def _charon_status(charon: Charon) -> dict[str, Any]:
    end = charon.channel.charon_socket()
    return {
        "reachable": charon.vici.connected,
        "release": charon.release,
        "ha_plugin": end is not None,
        "ha_version": charon.channel.version,
        "ha_received": charon.channel.received,
        "ha_malformed": charon.channel.malformed,
        "ha_drops": charon.channel.drops(),
        "ha_drops_charon": end.drops if end else 0,
        "unresumable": charon.tracker.unresumable,
    }


class GatewayProcess:
    """The gateway sidecar: extraction to the bank, and resumption from it."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._metrics = GatewayMetrics()
        self._gateway: Gateway | None = None
        self._publisher: Publisher | None = None
        self._writer: Writer | None = None
        self._bank: CachedBank | None = None
        self._interceptor: Interceptor | None = None
        self._charon: Charon | None = None
        self._rotation: Rotation | None = None
        self._tiers: TieredBank | None = None
        self._bank_reachable = False

    async def run(self) -> None:
        """Serve until a stop signal. Raises StartError."""
        logging.configure(self._config.log.level, self._config.log.format)
        async with AsyncExitStack() as stack:
            if await _or_stopped(self._start(stack)):
                announce_ready()
                await _until_stopped()

    async def _start(self, stack: AsyncExitStack) -> None:
        config = self._config
        try:
            keyring = Keyring.load(config.bank.key_file)
        except (SealError, OSError) as error:
            raise StartError(f"bank.key_file: {error}") from error
        self._charon = charon = Charon(config.vici, config.ha, self, self._recover)
        # first of all: what charon says while the rest is not there yet must not be lost
        await _retry("ha-channel", charon.channel.open, ChannelError)
        stack.push_async_callback(charon.close)
        places = await open_bank(config.bank, keyring, serve=True)
        self._tiers = tiers = places if isinstance(places, TieredBank) else None
        # in mode distributed the bank at hand is as near as this process's memory, and all others know it
        near = tiers.near if tiers is not None and config.bank.mode == "distributed" else None
        cache = CachedBank(places, limit=config.bank.cache, near=near)
        self._bank = bank = cache
        stack.push_async_callback(bank.close)
        self._writer = writer = Writer(bank, limit=config.bank.pending)
        stack.push_async_callback(writer.close)
        self._publisher = publisher = Publisher(writer, bank, config.address, config.sync)
        raw = _raw_udp(stack)
        handout = Handout(config.sync.client_stub, keyring, charon.tracker, raw, config.address, self._metrics)
        lookup = Lookup(
            bank,
            handout,
            self._metrics,
            reachable=lambda: self._bank_reachable,
            timeout=config.bank.get_timeout,
        )
        self._gateway = gateway = Gateway(
            charon, lookup, handout, writer, raw, config.sync, self._metrics, publisher.publish
        )
        self._gauges(charon, gateway, writer, cache)
        stack.callback(_serve_metrics(self._metrics, config.metrics))
        self._rotation = rotation = Rotation(bank, keyring, config.bank.key_file, config.address)
        upkeep = Upkeep(config, bank_url(config.bank), cache, rotation, charon, publisher, self._metrics)
        if tiers is not None:
            tiers.on_return = upkeep.returned
        commands: dict[str, Command] = {
            "status": self._status,
            "log-level": _log_level,
            "fetch": upkeep.fetch,
            "fetched": upkeep.progress,
        }
        control = ControlServer(config.control, commands)
        await control.start()
        stack.push_async_callback(control.close)
        gateway.start()
        stack.push_async_callback(gateway.close)
        charon.start()
        upkeep.start()
        stack.push_async_callback(upkeep.close)
        heartbeat = asyncio.create_task(self._heartbeat(), name="heartbeat")
        stack.callback(heartbeat.cancel)
        await self._intercept(stack, gateway.packets)
        await _wait_known(charon)

    async def _intercept(self, stack: AsyncExitStack, handler: Callable[[Sequence[Packet]], None]) -> None:
        config = self._config.intercept
        interceptor = self._interceptor = Interceptor(config.queue, handler)
        loop = asyncio.get_running_loop()
        await _retry("nfqueue", lambda: interceptor.start(loop), InterceptUnavailable)
        stack.callback(interceptor.stop)
        if config.rules != "external":
            backend = config.rules
            await _retry("rules", lambda: rules.install(config.queue, backend=backend), rules.RulesError)
            stack.callback(rules.remove)

    # charon's news (bridge.charon.extract.Listener)

    def changed(self, sa: Sa) -> None:
        """An SA of this gateway came up or changed."""
        assert self._publisher is not None
        self._publisher.publish(sa)

    def gone(self, sa: Sa) -> None:
        """An SA of this gateway ended."""
        assert self._publisher is not None
        assert self._gateway is not None
        self._gateway.gone(sa)
        self._publisher.withdraw(sa)

    def verified(self, ike_id: IkeId) -> None:
        """A request of a client's verified."""
        if self._gateway is not None:
            self._gateway.verified(ike_id)

    def down(self, info: SaInfo) -> None:
        """The HA channel tells the same, with the order kept."""

    async def _recover(self, infos: list[SaInfo]) -> list[Sa] | None:
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

    def _gauges(self, charon: Charon, gateway: Gateway, writer: Writer, cache: CachedBank) -> None:
        gauges.of_charon(self._metrics, charon)
        gauges.of_stubs(self._metrics, charon, writer, cache)
        gauges.of_queue(self._metrics, lambda: self._interceptor)
        gauge = self._metrics.gauge
        gauge(
            "toggle_seconds",
            "how long the last activation kept the IKE_SAs of one segment from answering, at most",
            lambda: charon.installer.toggle_seconds,
        )
        gauge("unconfirmed", "rebuilt IKE_SAs not confirmed yet", lambda: gateway.unconfirmed)
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
            "charon": _charon_status(self._charon),
            "bank": {
                "reachable": self._bank_reachable,
                "pending": self._writer.pending,
                "stubs": sum(sa.published is not None for sa in self._charon.tracker.established()),
                **self._rotation.status(),
                "banks": self._tiers.status() if self._tiers else [],
            },
            "unconfirmed": self._gateway.unconfirmed,
            "sas": _sa_rows(self._charon),
            "counters": self._metrics.values(),
        }


class ClientProcess:
    """The client sidecar."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._metrics = ClientMetrics()
        self._client: Client | None = None
        self._charon: Charon | None = None

    async def run(self) -> None:
        """Serve until a stop signal. Raises StartError."""
        logging.configure(self._config.log.level, self._config.log.format)
        async with AsyncExitStack() as stack:
            if await _or_stopped(self._start(stack)):
                announce_ready()
                await _until_stopped()

    async def _start(self, stack: AsyncExitStack) -> None:
        config = self._config
        raw = _raw_udp(stack)
        self._charon, self._client = _client(config, raw, self._metrics)
        await _retry("ha-channel", self._charon.channel.open, ChannelError)
        stack.push_async_callback(self._charon.close)
        listener = ResponseListener(asyncio.get_running_loop(), self._client.datagrams)
        try:
            listener.start()
        except OSError as error:
            raise StartError(f"raw sockets: {error}") from error
        stack.callback(listener.stop)
        gauges.of_charon(self._metrics, self._charon)
        stack.callback(_serve_metrics(self._metrics, config.metrics))
        commands: dict[str, Command] = {"status": self._status, "log-level": _log_level, "resume": self._resume}
        control = ControlServer(config.control, commands)
        await control.start()
        stack.push_async_callback(control.close)
        self._charon.start()
        stack.push_async_callback(self._client.keeper.close)
        restoring = asyncio.create_task(self._client.restore(), name="restore")
        stack.callback(restoring.cancel)
        await _wait_known(self._charon)

    async def _resume(self, request: dict[str, Any]) -> Answer:
        assert self._client is not None
        to = request.get("to")
        outcome = await self._client.resume(request.get("connection"), canonical_address(to) if to else None)
        answer: Answer = msgspec.to_builtins(outcome)
        return answer

    async def _status(self, _: dict[str, Any]) -> Answer:
        assert self._charon is not None
        assert self._client is not None
        return {
            "role": "client",
            "time": int(time.time()),
            "charon": _charon_status(self._charon),
            "sas": _sa_rows(self._charon),
            "last": msgspec.to_builtins(self._client.last) if self._client.last else None,
            "counters": self._metrics.values(),
        }


class _Relay:
    """Listener that exists before the client it speaks to: the client needs charon, and charon a listener."""

    client: Client

    def changed(self, sa: Sa) -> None:
        self.client.changed(sa)

    def gone(self, sa: Sa) -> None:
        self.client.gone(sa)

    def verified(self, ike_id: IkeId) -> None:
        self.client.verified(ike_id)

    def down(self, sa: SaInfo) -> None:
        self.client.down(sa)


def _client(config: ClientConfig, raw: RawUdp, metrics: ClientMetrics) -> tuple[Charon, Client]:
    relay = _Relay()
    charon = Charon(config.vici, config.ha, relay)
    relay.client = Client(charon, raw, config, metrics)
    return charon, relay.client


def run_gateway(config: GatewayConfig) -> None:
    """`ike-sa-sync gateway`."""
    run(GatewayProcess(config).run)


def run_client(config: ClientConfig) -> None:
    """`ike-sa-sync client`."""
    run(ClientProcess(config).run)


def fail(error: Exception, code: int = 1) -> None:
    """One line on stderr, and the exit code."""
    print(f"ike-sa-sync: {error}", file=sys.stderr)
    sys.exit(code)
