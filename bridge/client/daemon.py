"""The client sidecar: its parts put together, started and stopped."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Any

import msgspec

from bridge.charon import metrics as gauges
from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.status import charon_status, sa_rows, wait_known
from bridge.charon.vici_types import SaInfo
from bridge.client.initiator import Initiator
from bridge.client.metrics import ClientMetrics
from bridge.config import ClientConfig, canonical_address
from bridge.net.raw_socket import RawUdp, ResponseListener
from bridge.service.control import Answer, Command, ControlServer
from bridge.service.process import StartError, log_level, raw_udp, retry, run, serve, serve_metrics


class ClientProcess:
    """The client sidecar."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._metrics = ClientMetrics()
        self._client: Initiator | None = None
        self._charon: Charon | None = None

    async def run(self) -> None:
        """Serve until a stop signal. Raises StartError."""
        await serve(self._config.log, self._start)

    async def _start(self, stack: AsyncExitStack) -> None:
        config = self._config
        raw = raw_udp(stack)
        self._charon, self._client = _client(config, raw, self._metrics)
        await retry("ha-channel", self._charon.channel.open, ChannelError)
        stack.push_async_callback(self._charon.close)
        listener = ResponseListener(asyncio.get_running_loop(), self._client.datagrams)
        try:
            listener.start()
        except OSError as error:
            raise StartError(f"raw sockets: {error}") from error
        stack.callback(listener.stop)
        gauges.of_charon(self._metrics, self._charon)
        stack.callback(serve_metrics(self._metrics, config.metrics))
        commands: dict[str, Command] = {"status": self._status, "log-level": log_level, "resume": self._resume}
        control = ControlServer(config.control, commands)
        await control.start()
        stack.push_async_callback(control.close)
        self._charon.start()
        stack.push_async_callback(self._client.keeper.close)
        restoring = asyncio.create_task(self._client.restore(), name="restore")
        stack.callback(restoring.cancel)
        await wait_known(self._charon)

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
            "charon": charon_status(self._charon),
            "sas": await sa_rows(self._charon),
            "last": msgspec.to_builtins(self._client.last) if self._client.last else None,
            "counters": self._metrics.values(),
        }


class _Relay:
    """Listener that exists before the client it speaks to: the client needs charon, and charon a listener."""

    client: Initiator

    def changed(self, sa: IkeSa) -> None:
        self.client.changed(sa)

    def gone(self, sa: IkeSa) -> None:
        self.client.gone(sa)

    def verified(self, ike_id: IkeId) -> None:
        self.client.verified(ike_id)

    def down(self, sa: SaInfo) -> None:
        self.client.down(sa)


def _client(config: ClientConfig, raw: RawUdp, metrics: ClientMetrics) -> tuple[Charon, Initiator]:
    relay = _Relay()
    charon = Charon(config.vici, config.ha, relay, at_once=config.resume.children_at_once)
    relay.client = Initiator(charon, raw, config, metrics)
    return charon, relay.client


def run_client(config: ClientConfig) -> None:
    """`ike-sa-sync client`."""
    run(ClientProcess(config).run)
