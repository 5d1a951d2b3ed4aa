"""Rebuilt SAs into charon, all that are ready as one batch with one activation; then their clients are answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from bridge.charon.channel import ChannelError
from bridge.charon.charon import Charon
from bridge.charon.ha import HaError
from bridge.decision import Refusal
from bridge.metrics import GatewayMetrics
from bridge.net.interface import Packet
from bridge.unconfirmed import Rebuilt, Unconfirmed

log = structlog.get_logger()

INSTALL_BATCH = 512
"""SAs installed with one activation at most: what comes first shall not wait long for what comes last"""
INSTALL_RATE = 2048
"""SAs a second, about, that are ready: what came in a pause between activations goes with one of them"""

Prepared = tuple[Packet, Rebuilt]


class Batches:
    """Installs what is added; `answer` sends the response to a packet's sender."""

    def __init__(
        self,
        charon: Charon,
        unconfirmed: Unconfirmed,
        metrics: GatewayMetrics,
        answer: Callable[[Packet, bytes], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._charon = charon
        self._unconfirmed = unconfirmed
        self._metrics = metrics
        self._answer = answer
        self._clock = clock
        self._prepared: list[Prepared] = []
        self._installable = asyncio.Event()
        self._installing = False

    @property
    def busy(self) -> bool:
        """Whether something was added and is not answered yet."""
        return self._installing or bool(self._prepared)

    def add(self, packet: Packet, made: Rebuilt) -> None:
        """Install `made` soon, and answer `packet` then; or let the packet go on to charon."""
        self._unconfirmed.add(made)
        self._prepared.append((packet, made))
        self._installable.set()

    def close(self) -> None:
        """Let go of packets that were not answered yet; `run` must have ended."""
        for packet, _ in self._prepared:
            packet.accept()
        self._prepared.clear()

    async def run(self) -> None:
        """Install batch after batch; meanwhile the next stubs are fetched."""
        while True:
            await self._installable.wait()
            pause = await self._charon.installer.turn()
            most = max(INSTALL_BATCH, int(pause * INSTALL_RATE))
            batch, self._prepared = self._prepared[:most], self._prepared[most:]
            if not self._prepared:
                self._installable.clear()
            if not batch:
                continue
            self._installing = True
            try:
                await self._install(batch)
            except HaError:
                # one stub that charon cannot be told must not cost the others their turn
                for one in batch:
                    await self._install_alone(one)
            except Exception:
                log.exception("install-failed", sas=len(batch))
                self._give_up(batch)
            finally:
                self._installing = False

    async def _install_alone(self, one: Prepared) -> None:
        try:
            await self._install([one])
        except HaError as error:
            log.warning("stub-not-installable", index=str(one[1].old.index), reason=str(error))
            self._give_up([one])

    def _give_up(self, batch: list[Prepared]) -> None:
        for packet, made in batch:
            self._unconfirmed.forget(made)
            packet.accept()
            self._metrics.refused(Refusal.CHARON_UNAVAILABLE)

    async def _install(self, rebuilt: list[Prepared]) -> None:
        void = [pair for pair in rebuilt if pair[1] not in self._unconfirmed]
        self._give_up(void)
        rebuilt = [pair for pair in rebuilt if pair[1] in self._unconfirmed]
        if not rebuilt:
            return
        began = self._clock()
        try:
            await self._charon.installer.install([made.install for _, made in rebuilt])
        except ChannelError as error:
            log.error("install-failed", sas=len(rebuilt), reason=str(error))
            self._give_up(rebuilt)
            return
        self._metrics.install_seconds.observe(self._clock() - began)
        self._metrics.activation_seconds.observe(self._charon.installer.toggle_seconds)
        # another attempt of the same client may have been confirmed meanwhile; or the interceptor ended, and charon has
        # the request and answers it
        void = [pair for pair in rebuilt if pair[1] not in self._unconfirmed or not pair[0].held]
        if void:
            await self._unconfirmed.drop([made.sa.id for _, made in void])
            self._give_up(void)
            rebuilt = [pair for pair in rebuilt if pair[1] in self._unconfirmed and pair[0].held]
        for packet, made in rebuilt:
            self._unconfirmed.installed(made)
            packet.drop()
            self._answer(packet, made.response)
            log.debug(
                "sa-rebuilt",
                peer=packet.src,
                connection=made.sa.connection,
                spi_i=made.sa.id.spi_i.hex(),
                spi_r=made.sa.id.spi_r.hex(),
                old_gateway=made.old.index.gateway,
                old_spi=made.old.index.spi.hex(),
            )
