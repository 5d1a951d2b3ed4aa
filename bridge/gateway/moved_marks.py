"""Reports to the gateways that sessions came from that they went on here, however long the bank is unreachable."""

from __future__ import annotations

import asyncio
import contextlib
from itertools import islice
from typing import Final

import structlog

from bridge.bank.interface import BankUnavailable, Move, StubBank

log = structlog.get_logger()

WAITING_MAX: Final = 200_000
"""marks that wait for the bank; of more, the oldest are dropped"""
BUNDLE: Final = 512
RETRY_SECONDS: Final = 0.5
CLOSE_SECONDS: Final = 1.0
"""that the last marks may take when the sidecar stops"""


class MovedMarks:
    """Marks on their way to the bank; `run` is a task."""

    def __init__(self, bank: StubBank) -> None:
        self._bank = bank
        self._waiting: dict[Move, None] = {}
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, move: Move) -> None:
        """A session went on here."""
        self._waiting[move] = None
        if len(self._waiting) > WAITING_MAX:
            del self._waiting[next(iter(self._waiting))]
        self._wake.set()

    async def run(self) -> None:
        """Write what waits."""
        logged = False
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                try:
                    await self._write()
                    logged = False
                except BankUnavailable as error:
                    if not logged:
                        log.warning(error.event, component="moved-marks", reason=str(error))
                        logged = True
                    await asyncio.sleep(RETRY_SECONDS)

    async def close(self) -> None:
        """Write what waits, if the bank can be reached."""
        with contextlib.suppress(BankUnavailable, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                while self._waiting:
                    await self._write()

    async def _write(self) -> None:
        bundle = list(islice(self._waiting, BUNDLE))
        await self._bank.tell_moved(bundle)
        for move in bundle:
            self._waiting.pop(move, None)
