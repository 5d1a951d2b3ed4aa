"""Whether charon answers: a process that is there may hang."""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

import structlog

from bridge.charon.vici_types import ViciError
from bridge.service.tasks import end, spawn

log = structlog.get_logger()

HUNG: Final = 2.0
"""times `detect` within which it has to answer, but not less than so many seconds"""


class Asked(Protocol):
    """See bridge.charon.vici_client."""

    async def version(self) -> str: ...


class CharonPulse:
    """Asks charon for its version on VICI every `detect` s. One that is not there does not hang."""

    def __init__(self, vici: Asked, detect: float) -> None:
        self._vici = vici
        self._detect = detect
        self.hangs = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = spawn("charon-pulse", self._run())

    async def close(self) -> None:
        """End."""
        if self._task is not None:
            await end(self._task)

    async def _run(self) -> None:
        while True:
            await self.ask()
            await asyncio.sleep(self._detect)

    async def ask(self) -> None:
        """Once."""
        hangs = False
        try:
            async with asyncio.timeout(HUNG * max(self._detect, 1.0)):
                await self._vici.version()
        except TimeoutError:
            hangs = True
        except ViciError:
            hangs = False
        if hangs != self.hangs:
            self.hangs = hangs
            if hangs:
                log.error("charon-not-answering", effect="the other gateways are notified")
            else:
                log.warning("charon-answers-again")
