"""Rebuilt SAs into charon, all that are ready together; then their clients are answered. Those that charon has to
confirm itself are activated first (bridge.gateway.activation)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import HaError
from bridge.charon.ha_segments import LONGEST_PAUSE
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.rebuilt import Rebuilt
from bridge.gateway.rebuilt_state import Event
from bridge.gateway.unconfirmed import Unconfirmed
from bridge.net.interface import Packet
from bridge.service.log import writes

log = structlog.get_logger()

INSTALL_BATCH = 512
"""SAs in one installation at most: an activation that is due shall not wait long"""
GATHER_SECONDS = 0.05
"""between two looks whether an activation may be, at most"""
WORTH = 3.0
"""an activation that takes t waits so many t, at most, for others that are on their way: the next one is far"""
POLL_SECONDS = 0.001

Prepared = tuple[Packet, Rebuilt]


class Activations(Protocol):
    """What activates them (bridge.gateway.activation)."""

    def can_confirm(self, made: Rebuilt) -> bool: ...
    def landed(self, made: Rebuilt) -> None: ...
    def has(self, made: Rebuilt) -> bool: ...


class InstallQueue:
    """Installs what is added; `answer` sends the response to a packet's sender, `give_up` refuses one whose SA is not
    installed, `coming` returns whether more may follow soon."""

    def __init__(
        self,
        charon: Charon,
        unconfirmed: Unconfirmed,
        activation: Activations,
        metrics: GatewayMetrics,
        answer: Callable[[Packet, bytes], None],
        give_up: Callable[[Packet, Rebuilt], None],
        coming: Callable[[], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._charon = charon
        self._unconfirmed = unconfirmed
        self._activation = activation
        self._metrics = metrics
        self._answer = answer
        self._refuse = give_up
        self._coming = coming
        self._clock = clock
        self._prepared: list[Prepared] = []
        self._landed: list[Prepared] = []
        """what charon has, to be activated before the answer"""
        self._added = asyncio.Event()
        self._since = 0.0
        """when the first of it began to land"""
        self._took = 0.0
        """seconds that their installation took"""
        self._working = False
        self._landing = 0
        self._activating = 0

    @property
    def unanswered(self) -> int:
        """How many were added and are not answered yet."""
        return len(self._prepared) + self._landing + len(self._landed) + self._activating

    @property
    def busy(self) -> bool:
        """Whether something was added and is not answered yet."""
        return self._working or bool(self._landed or self._prepared)

    def add(self, packet: Packet, made: Rebuilt) -> None:
        """Install `made` soon, and answer `packet` then; or let the packet go on to charon."""
        self._unconfirmed.add(made)
        self._prepared.append((packet, made))
        self._added.set()

    def close(self) -> None:
        """Let go of packets that were not answered yet; `run` must have ended."""
        for packet, _ in self._landed + self._prepared:
            packet.accept()
        self._landed.clear()
        self._prepared.clear()

    async def run(self) -> None:
        """Install batch after batch, activate as often as that may be; meanwhile the next stubs are fetched."""
        installer = self._charon.installer
        while True:
            with contextlib.suppress(TimeoutError):
                # what charon has waits for its activation, what was just added for nothing
                async with asyncio.timeout(self._pause() if self._landed else None):
                    await self._added.wait()
            batch, self._prepared = self._prepared[:INSTALL_BATCH], self._prepared[INSTALL_BATCH:]
            self._working = True
            self._landing = len(batch)
            try:
                await self._land(batch)
                self._landing = 0
                if self._landed and self._enough() and installer.wait() == 0:
                    await self._activate()
            finally:
                self._working, self._landing = False, 0
            if not self._prepared:
                self._added.clear()

    def _pause(self) -> float:
        return min(self._charon.installer.wait(), GATHER_SECONDS) or POLL_SECONDS

    def _enough(self) -> bool:
        """Whether no more are on the way, or those installed have waited for others as long as is worth it."""
        others = bool(self._prepared) or self._coming()
        # the last activation may have found charon stopped
        worth = min(WORTH * self._charon.installer.toggle_seconds, LONGEST_PAUSE)
        return not others or self._clock() - self._since >= worth

    def _give_up(self, batch: list[Prepared]) -> None:
        for packet, made in batch:
            self._unconfirmed.forget(made, Event.GIVEN_UP)
            self._refuse(packet, made)

    def _still_wanted(self, batch: list[Prepared]) -> tuple[list[Prepared], list[Prepared]]:
        """Those to go on with, and the others: another attempt of the same client may have been confirmed meanwhile;
        or the interceptor ended, and charon has the request and answers it."""
        wanted: list[Prepared] = []
        void: list[Prepared] = []
        for pair in batch:
            (wanted if pair[1] in self._unconfirmed and pair[0].held else void).append(pair)
        return wanted, void

    async def _land(self, batch: list[Prepared]) -> None:
        batch, void = self._still_wanted(batch)
        self._give_up(void)
        if not batch:
            return
        began = self._clock()
        try:
            await self._charon.installer.land([made.install for _, made in batch])
        except HaError as error:
            if len(batch) > 1:
                # one stub that cannot be encoded for charon must not cost the others their turn
                for one in batch:
                    await self._land([one])
                return
            log.warning("stub-not-installable", index=str(batch[0][1].old.index), reason=str(error))
            self._give_up(batch)
        except Exception as error:
            await self._failed(batch, error)
        else:
            try:
                await self._sort(batch, began)
            except Exception as error:
                self._landed = [pair for pair in self._landed if pair not in batch]
                await self._failed([pair for pair in batch if pair[0].held], error)

    async def _sort(self, batch: list[Prepared], began: float) -> None:
        """Answer those whose clients can confirm them before they are active."""
        first: list[Prepared] = []
        ready: list[Prepared] = []
        for pair in batch:
            (ready if self._activation.can_confirm(pair[1]) else first).append(pair)
            self._activation.landed(pair[1])
        took = self._clock() - began
        if first:
            if not self._landed:
                self._since = began
            self._landed += first
            self._took += took
        if ready:
            self._metrics.install_seconds.observe(took)
            await self._answer_all(ready)

    async def _failed(self, batch: list[Prepared], error: Exception) -> None:
        if isinstance(error, ChannelError):
            log.error("install-failed", sas=len(batch), reason=str(error))
        else:
            log.error("install-failed", sas=len(batch), exc_info=error)
        ike_ids = [made.sa.id for _, made in batch]
        sharing = self._charon.sharing(ike_ids)
        self._give_up(batch)
        # charon may have them, or have them still to read
        await self._unconfirmed.drop(ike_ids, sharing=sharing)

    async def _activate(self) -> None:
        landed, self._landed = self._landed, []
        self._activating = len(landed)
        try:
            await self._activate_and_answer(landed)
        except Exception as error:
            await self._failed([pair for pair in landed if pair[0].held], error)
        finally:
            self._activating = 0

    async def _activate_and_answer(self, landed: list[Prepared]) -> None:
        took, self._took = self._took, 0.0
        began = self._clock()
        await self._charon.installer.activate()
        if any(made in self._unconfirmed and not self._activation.has(made) for _, made in landed):
            # another activation found that charon is another one
            raise ChannelError("charon lost the rebuilt SAs before they were active")
        self._metrics.install_seconds.observe(took + self._clock() - began)
        await self._answer_all(landed)

    async def _answer_all(self, landed: list[Prepared]) -> None:
        """charon has these: tell their clients."""
        rebuilt, void = self._still_wanted(landed)
        while void:
            await self._unconfirmed.drop([made.sa.id for _, made in void])
            self._give_up(void)
            rebuilt, void = self._still_wanted(rebuilt)
        for packet, made in rebuilt:
            self._unconfirmed.installed(made)
            packet.drop()
            self._answer(packet, made.response)
        # an event that is not written takes time as well
        for packet, made in rebuilt if writes("debug") else ():
            log.debug(
                "sa-rebuilt",
                peer=packet.src,
                connection=made.sa.connection,
                spi_i=made.sa.id.spi_i.hex(),
                spi_r=made.sa.id.spi_r.hex(),
                old_gateway=made.old.index.gateway,
                old_spi=made.old.index.spi.hex(),
            )
