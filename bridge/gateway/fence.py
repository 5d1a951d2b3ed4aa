"""The fence around addresses that other gateways have now: rules, watched, that let nothing of them leave this host."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Final

import structlog

from bridge.charon.ports import charon_ports
from bridge.config import InterceptConfig
from bridge.net import fence_rules, firewall
from bridge.net.firewall import RulesError
from bridge.net.rules_watch import RulesWatch
from bridge.service.tasks import end, spawn

log = structlog.get_logger()


RETRY_SECONDS: Final = 1.0
"""between two attempts to change the rules"""


class Fence:
    """Around a set of addresses, which changes. The rules stay when the sidecar ends: charon goes on."""

    def __init__(self, config: InterceptConfig) -> None:
        self._config = config
        self._addresses: frozenset[str] | None = None
        self._as_wanted = False
        """whether the rules were set for these addresses, or removed where there are none"""
        self._watch: RulesWatch | None = None
        self._task: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self._work: asyncio.Future[None] | None = None
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """Packets that were kept from leaving, as of the last look."""
        return self._dropped + (self._watch.counted("dropped") if self._watch is not None else 0)

    @property
    def in_place(self) -> bool:
        """Whether the rules are as wanted: around the addresses of other gateways, and around no other."""
        if self._config.rules == "external":
            return True
        return self._as_wanted and (self._watch is None or self._watch.in_place)

    async def around(self, addresses: Collection[str]) -> None:
        """From now on around these and no others. What cannot be set is logged, and tried again until it can."""
        wanted = frozenset(addresses)
        async with self._changing:
            if wanted == self._addresses:
                return
            self._addresses = wanted
            if self._task is not None:
                await end(self._task)
                self._task = None
            self._dropped, self._watch, self._as_wanted = self.dropped, None, False
            if self._config.rules == "external":
                return
            fits = await self._change(wanted)
            self._task = spawn("fence-rules", self._keep(wanted, fits=fits))

    async def _keep(self, wanted: frozenset[str], *, fits: bool) -> None:
        while not fits:
            await asyncio.sleep(RETRY_SECONDS)
            fits = await self._change(wanted, again=True)
        if self._watch is not None:
            await self._watch.run()

    async def _change(self, wanted: frozenset[str], *, again: bool = False) -> bool:
        """Set the rules, or remove them; whether that could be done."""
        assert self._config.rules != "external"
        rules = fence_rules.rules(wanted, self._config.ports or charon_ports())
        watch = RulesWatch("fence", rules, self._config.rules, dropped=fence_rules.dropped) if wanted else None
        if self._work is not None:
            # a change that was cancelled goes on in its thread
            await asyncio.wait([self._work])
        self._work = asyncio.ensure_future(
            asyncio.to_thread(watch.place) if watch is not None else asyncio.to_thread(firewall.remove, rules)
        )
        try:
            await asyncio.shield(self._work)
        except RulesError as error:
            if not again:
                log.error("fence-not-set", addresses=",".join(sorted(wanted)), reason=str(error))
            return False
        self._watch, self._as_wanted = watch, True
        if again:
            log.info("fence-set", addresses=",".join(sorted(wanted)))
        return True

    async def close(self) -> None:
        """Watch the rules no longer."""
        if self._task is not None:
            await end(self._task)
