"""Authentication has an end: a resumed session is authenticated for as long as it was before, which its gateway says in
AUTH_LIFETIME (RFC 4478). charon reads that notification in IKE_AUTH alone, so the sidecar has charon authenticate again
in time.

A gateway ends an IKE_SA that was not. Its DELETE is not the wish of an operator: a full handshake follows.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Final

import structlog

from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import ViciError
from bridge.service.tasks import end, spawn

log = structlog.get_logger()

EARLIEST_SHARE, LATEST_SHARE = 0.75, 0.85
"""of the time that is left when the session is resumed, charon is asked to authenticate again between these; not all
clients at a time"""
RETRY_SHARE: Final = 0.25
"""of the time that is left then, until charon is asked once more"""
RETRY_MIN: Final = 1.0
"""seconds"""
LAPSE_SECONDS: Final = 2.0
"""a DELETE from so long before the end of the authentication on comes because of it: clocks and the network differ"""


class Reauthentication:
    """Watches the client's resumed IKE_SAs. `wall` gives Unix seconds."""

    def __init__(
        self,
        charon: Charon,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._charon = charon
        self._wall = wall
        self._tasks: dict[bytes, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Stop."""
        await end(*self._tasks.values())

    def watch(self, sa: IkeSa) -> None:
        """An IKE_SA is up."""
        spis = sa.id.spis
        if sa.outlives_authentication and spis not in self._tasks:
            task = spawn(f"reauthenticate {sa.connection}", self._keep(sa))
            self._tasks[spis] = task
            task.add_done_callback(lambda _: self._tasks.pop(spis, None))

    def lapsed(self, sa: IkeSa) -> bool:
        """Whether an IKE_SA that was ended just now was so because its authentication has ended."""
        return sa.outlives_authentication and self._wall() >= sa.authenticated_until - LAPSE_SECONDS

    async def _keep(self, sa: IkeSa) -> None:
        left = sa.authenticated_until - self._wall()
        await asyncio.sleep(left * random.uniform(EARLIEST_SHARE, LATEST_SHARE))
        # charon may have a time of its own for it by now, which is earlier
        while self._charon.tracker.sas.get(sa.id.spis) is sa and sa.outlives_authentication:
            left = sa.authenticated_until - self._wall()
            if left <= 0:
                return
            log.info("reauthentication-requested", connection=sa.connection, seconds=round(left), **sa.id.logged)
            try:
                await self._charon.reauthenticate(sa)
            except ViciError as error:
                log.warning("reauthentication-failed", connection=sa.connection, reason=str(error), **sa.id.logged)
            await asyncio.sleep(max(left * RETRY_SHARE, RETRY_MIN))
