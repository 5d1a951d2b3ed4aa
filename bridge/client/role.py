"""The client role of a sidecar: its parts put together, started and stopped (bridge.sidecar says in which order)."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Any

import msgspec

from bridge.charon import metrics as charon_metrics
from bridge.charon.charon import Charon
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.reconcile import no_recovery
from bridge.charon.status import charon_status, sa_rows
from bridge.charon.vici_types import SaInfo
from bridge.client.initiator import Initiator
from bridge.client.metrics import ClientMetrics
from bridge.config import ClientConfig, canonical_address
from bridge.net.interface import Sender
from bridge.net.raw_socket import ResponseListener
from bridge.service.control import Answer, Command, ControlServer
from bridge.service.process import StartError, code, log_level, raw_udp, serve_metrics
from bridge.service.tasks import end, spawn


class ClientRole:
    """Moves charon's IKE_SAs to other gateways. It is a Listener of charon's (bridge.charon.sa_tracker)."""

    @classmethod
    async def open(cls, config: ClientConfig, charon: Charon, stack: AsyncExitStack) -> ClientRole:
        """The role with its raw socket, closed with `stack`. Raises StartError."""
        return cls(config, charon, raw_udp(stack))

    def __init__(self, config: ClientConfig, charon: Charon, sender: Sender) -> None:
        self._config = config
        self._charon = charon
        self._metrics = ClientMetrics()
        self._initiator = Initiator(charon, sender, config, self._metrics)
        charon_metrics.of_charon(self._metrics, charon)

    async def start(self, stack: AsyncExitStack) -> None:
        """Begin to read gateways' answers, and to serve metrics and the control socket; ended with `stack`. Raises
        StartError, ControlError."""
        listener = ResponseListener(asyncio.get_running_loop(), self._initiator.datagrams)
        try:
            listener.start()
        except OSError as error:
            raise StartError(f"raw sockets: {error}") from error
        stack.callback(listener.stop)
        serve_metrics(stack, self._metrics, self._config.metrics)
        commands: dict[str, Command] = {"status": self._status, "log-level": log_level, "resume": self._resume}
        control = ControlServer(self._config.control, commands)
        await control.start()
        stack.push_async_callback(control.close)

    async def follow(self, stack: AsyncExitStack) -> None:
        """What follows charon: sessions from before this start are taken up; ended with `stack`."""
        stack.push_async_callback(self._initiator.close)
        stack.push_async_callback(end, spawn("restore", self._initiator.restore()))
        stack.push_async_callback(end, spawn("watch", self._initiator.watch()))
        stack.push_async_callback(end, spawn("nat-keepalive", self._initiator.keep_reachable()))

    def initiated(self, sa: IkeSa) -> bool:
        """Whether an IKE_SA is one that this host initiated in one of its VPNs."""
        return self._initiator.initiated(sa)

    # charon's news (bridge.charon.sa_tracker.Listener)

    def changed(self, sa: IkeSa) -> None:
        """An SA of this client came up or changed."""
        self._initiator.changed(sa)

    def gone(self, sa: IkeSa) -> None:
        """An SA of this client ended."""
        self._initiator.gone(sa)

    def verified(self, ike_id: IkeId) -> None:
        """A request of a gateway's verified."""
        self._initiator.verified(ike_id)

    def down(self, info: SaInfo) -> None:
        """VICI says that an SA went down."""
        self._initiator.down(info)

    async def recover(self, infos: list[SaInfo]) -> list[IkeSa]:
        """A client has no bank to recover SAs from (bridge.charon.charon.Recover)."""
        return await no_recovery(infos)

    # commands

    async def _resume(self, request: dict[str, Any]) -> Answer:
        to = request.get("to")
        to = canonical_address(to) if to else None
        outcome = await self._initiator.resume(request.get("connection"), request.get("vpn"), to)
        answer: Answer = msgspec.to_builtins(outcome)
        return answer

    async def _status(self, _: dict[str, Any]) -> Answer:
        last = self._initiator.last
        return {
            "role": "client",
            "code": code(),
            "time": int(time.time()),
            "charon": charon_status(self._charon),
            "sas": [row | {"vpn": self._initiator.vpn_of(_spis(row))} for row in await sa_rows(self._charon)],
            "last": msgspec.to_builtins(last) if last else None,
            "counters": self._metrics.values(),
        }


def _spis(row: dict[str, Any]) -> bytes:
    return bytes.fromhex(row["spi_i"] + row["spi_r"])
