"""The fence around addresses that other gateways have now: rules, watched, that let nothing of them leave this host."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import structlog

from bridge.charon.ports import charon_ports
from bridge.config import InterceptConfig
from bridge.net import fence_rules, firewall
from bridge.net.firewall import RulesError
from bridge.net.rules_watch import RulesWatch
from bridge.service.tasks import end, spawn

log = structlog.get_logger()


class Fence:
    """Around a set of addresses, which changes. The rules stay when the sidecar ends: charon goes on."""

    def __init__(self, config: InterceptConfig) -> None:
        self._config = config
        self._watch: RulesWatch | None = None
        self._task: asyncio.Task[None] | None = None
        self._addresses: frozenset[str] | None = None
        self._changing = asyncio.Lock()
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """Packets that were kept from leaving, as of the last look."""
        return self._dropped + (self._watch.counted("dropped") if self._watch is not None else 0)

    @property
    def in_place(self) -> bool:
        """Whether the rules are there, as far as some are needed."""
        if self._config.rules == "external":
            return True
        return not self._addresses or (self._watch is not None and self._watch.in_place)

    async def start(self, addresses: Collection[str]) -> None:
        """Begin around these; rules of a sidecar before this one go."""
        await self.around(addresses)

    async def around(self, addresses: Collection[str]) -> None:
        """From now on around these and no others. What cannot be set is logged, and tried again."""
        wanted = frozenset(addresses)
        async with self._changing:
            if wanted == self._addresses:
                return
            self._addresses = wanted
            if self._task is not None:
                await end(self._task)
                self._task = None
            self._dropped, self._watch = self.dropped, None
            if self._config.rules == "external":
                return
            rules = fence_rules.rules(wanted, self._config.ports or charon_ports())
            try:
                if not wanted:
                    await asyncio.to_thread(firewall.remove, rules)
                    return
                watch = RulesWatch("fence", rules, self._config.rules, dropped=fence_rules.dropped)
                await asyncio.to_thread(watch.place)
            except RulesError as error:
                log.error("fence-not-set", addresses=",".join(sorted(wanted)), reason=str(error))
                # the next change of an address tries again
                self._addresses = None
                return
            self._watch = watch
            self._task = spawn("fence-rules", watch.run())

    async def close(self) -> None:
        """Watch the rules no longer."""
        if self._task is not None:
            await end(self._task)
