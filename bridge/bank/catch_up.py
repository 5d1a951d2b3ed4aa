"""A bank that was away may have missed ends: what the near bank lacks of those that far banks know is brought to it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Final

import structlog

from bridge.bank.interface import BankUnavailable
from bridge.bank.replica import Replica

log = structlog.get_logger()

SETTLE_SECONDS: Final = 2.0
"""after which every gateway that can reach a bank that is back writes to it again: only then it can catch up"""


class CatchUp:
    """`in` it are the far banks that may know of ends which the near one has missed."""

    def __init__(self, near: Replica, far: Sequence[Replica]) -> None:
        self._near = near
        self._far = far
        self._ahead: dict[Replica, float] = {}
        """these banks, and since when"""
        self._news = asyncio.Event()

    def __contains__(self, tier: Replica) -> bool:
        return tier in self._ahead

    @property
    def done(self) -> bool:
        """Whether the near bank knows every end that a bank within reach knows."""
        return not any(tier.up for tier in self._ahead)

    def returned(self, tier: Replica) -> None:
        """A bank answers again, or has lost what it had."""
        now = time.monotonic()
        self._ahead.update((each, now) for each in (self._far if tier is self._near else [tier]))
        self._news.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            await asyncio.sleep(SETTLE_SECONDS)
            for tier, since in list(self._ahead.items()):
                if not tier.up or not self._near.up:
                    continue  # its return is news
                if time.monotonic() - since < SETTLE_SECONDS:
                    self._news.set()
                    continue
                try:
                    deleted = await self._take_endings(tier)
                except BankUnavailable as error:
                    log.debug(error.event, component="catch-up", bank=tier.name, reason=str(error))
                    self._news.set()
                    with contextlib.suppress(BankUnavailable):
                        await tier.answer(tier.bank.ping())
                    continue
                if self._ahead.get(tier) == since:
                    del self._ahead[tier]
                    log.info("bank-reachable", component="catch-up", bank=tier.name, deleted=deleted)

    async def _take_endings(self, tier: Replica) -> int:
        """Delete near what has ended according to a far bank; how many stubs that were."""
        deleted = 0
        async with aclosing(tier.bank.endings()) as pages:
            async for page in pages:
                held = await self._near.answer(self._near.bank.revisions([ending.index for ending in page]))
                over = [ending for ending, revision in zip(page, held, strict=True) if revision]
                if over:
                    deleted += sum(await self._near.answer(self._near.bank.delete(over)))
        return deleted
