"""A resumed session ends when its authentication does: charon counts the reauthentication time of a rebuilt IKE_SA from
when it was rebuilt, so the sidecar ends what would outlive the authentication of the session.

A client whose sidecar received the end (AUTH_LIFETIME) has authenticated again before.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable
from typing import Final

import structlog

from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ike_sa import IkeSa
from bridge.gateway.metrics import GatewayMetrics

log = structlog.get_logger()

LOOK_SECONDS: Final = 1.0
SPARE: Final = 1_000
"""entries of IKE_SAs that are gone, beyond as many as are watched, before they are cleared away"""


class AuthenticationEnd:
    """Ends IKE_SAs whose authentication ended; `run` is a task. `wall` gives Unix seconds."""

    def __init__(self, charon: Charon, metrics: GatewayMetrics, *, wall: Callable[[], float] = time.time) -> None:
        self._charon = charon
        self._metrics = metrics
        self._wall = wall
        self._due: list[tuple[int, bytes]] = []
        self._watched: dict[bytes, int] = {}

    def watch(self, sa: IkeSa) -> None:
        """An IKE_SA that is up, or that changed."""
        until = sa.authenticated_until
        if sa.outlives_authentication and self._watched.get(sa.id.spis) != until:
            self._put(sa.id.spis, until)

    def _put(self, spis: bytes, until: int) -> None:
        self._watched[spis] = until
        heapq.heappush(self._due, (until, spis))
        if len(self._due) > 2 * len(self._watched) + SPARE:
            # a session that is resumed again and again leaves one each time
            self._due = [(until, spis) for spis, until in self._watched.items()]
            heapq.heapify(self._due)

    def forget(self, sa: IkeSa) -> None:
        """An IKE_SA that ended."""
        self._watched.pop(sa.id.spis, None)

    async def run(self) -> None:
        """End what is due, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """End what is due now."""
        while self._due and self._due[0][0] <= self._wall():
            until, spis = heapq.heappop(self._due)
            if self._watched.get(spis) != until:
                continue
            del self._watched[spis]
            sa = self._charon.tracker.sas.get(spis)
            if sa is None or not sa.up or not sa.outlives_authentication:
                continue
            if sa.authenticated_until > self._wall():
                self.watch(sa)
                continue
            await self._end(sa)

    async def _end(self, sa: IkeSa) -> None:
        try:
            await self._charon.end_surely(sa)
        except ChannelError as error:
            log.warning("unauthenticated-sa-not-ended", reason=str(error), **sa.id.logged)
            self._put(sa.id.spis, int(self._wall() + LOOK_SECONDS))
            return
        self._metrics.authentication_ended.inc()
        log.info(
            "authentication-ended",
            connection=sa.connection,
            identity=sa.remote_id.text if sa.remote_id else "",
            **sa.id.logged,
        )
