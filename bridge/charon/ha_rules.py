"""The rules that let only root speak as either end of the HA channel (bridge.net.owner_rules), set and watched.

They stay when the sidecar ends: charon goes on to send, and systemd holds the sidecar's end.
"""

from __future__ import annotations

import asyncio

from bridge.charon.ha_message import PORT
from bridge.config import HaConfig
from bridge.net import owner_rules
from bridge.net.firewall import RulesError
from bridge.net.rules_watch import RulesWatch
from bridge.service.metrics import Metrics
from bridge.service.process import retry
from bridge.service.tasks import end, spawn


class HaRules:
    """Of one channel; nothing is done where the operator sets such rules himself."""

    def __init__(self, config: HaConfig) -> None:
        self._ends = ends = (config.charon, config.listen)
        self._watch: RulesWatch | None = None
        self._task: asyncio.Task[None] | None = None
        if config.rules != "external":
            self._watch = RulesWatch("ha", owner_rules.rules(ends, PORT), config.rules, dropped=owner_rules.dropped)

    async def place(self) -> bool:
        """Set them as soon as that works. Whether they were there before: else any user may have sent what waits in
        the sidecar's socket."""
        if self._watch is None:
            return True
        before = owner_rules.present(self._ends, PORT)
        await retry("ha-rules", self._watch.place, RulesError)
        self._task = spawn("ha-rules", self._watch.run())
        return before

    async def in_place_since(self, moment: float) -> bool:
        """Whether only root has sent since `moment` (monotonic seconds); False where the operator sets such rules, for
        nothing watches those."""
        return self._watch is not None and await self._watch.in_place_since(moment)

    async def close(self) -> None:
        """Watch them no longer."""
        if self._task is not None:
            await end(self._task)

    def gauges(self, metrics: Metrics) -> None:
        """Their state, for `status`."""
        watch = self._watch
        if watch is None:
            return
        metrics.gauge(
            "ha_rules_in_place",
            "1 while the rules that let only root send as charon or as the sidecar are in place",
            lambda: float(watch.in_place),
        )
        metrics.total("ha_rules_restored", "how often they had to be put back", lambda: watch.restored)
        metrics.total(
            "ha_foreign_datagrams", "datagrams of other users that they dropped", lambda: watch.counted("dropped")
        )
