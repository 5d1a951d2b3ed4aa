"""When the heartbeats of other gateways are due to expire in the bank, and a look at those that did.

A Redis removes a key that has expired when somebody reads it, or when its walk through all keys that expire comes by:
among ten thousands of stubs that takes seconds, and until then there is no event. So a heartbeat that did not come
again is read at the moment at which it expires.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from bridge.bank.interface import BankUnavailable

log = structlog.get_logger()

LATE_SECONDS: Final = 0.005
"""after a heartbeat expires, until it is read: its event came later than it was written, but Redis counts in ms"""


class DueHeartbeats:
    """Calls `look`, which reads the heartbeats of all gateways, when one was not written again within `detect` s."""

    def __init__(
        self, detect: float, look: Callable[[], Awaitable[object]], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.written: dict[str, float] = {}
        """when (monotonic seconds) a heartbeat was last written, by gateway"""
        self._after = detect + LATE_SECONDS
        self._look = look
        self._clock = clock
        self._due: dict[str, float] = {}
        self._first = asyncio.Event()

    def beat(self, gateway: str) -> None:
        """A heartbeat was written just now."""
        now = self._clock()
        self.written[gateway] = now
        self._due[gateway] = now + self._after
        self._first.set()

    def gone(self, gateway: str) -> None:
        """It is no longer there: it need not be looked for."""
        self._due.pop(gateway, None)

    def forget(self, gateway: str) -> None:
        """Nothing is known of a gateway any more."""
        self.gone(gateway)
        self.written.pop(gateway, None)

    async def run(self) -> None:
        """Look at what is due, until it is cancelled."""
        while True:
            await self._first.wait()
            if not self._due:
                self._first.clear()
                continue
            now = self._clock()
            if (left := min(self._due.values()) - now) > 0:
                # those that are written again meanwhile are due later
                await asyncio.sleep(left)
                continue
            self._due = {gateway: due for gateway, due in self._due.items() if due > now}
            try:
                await self._look()
            except BankUnavailable as error:
                # with the next heartbeat of this gateway it is asked again
                log.info(error.event, component="heartbeats", reason=str(error))
