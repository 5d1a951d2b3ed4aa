"""Messages about IKE_SAs that this gateway does not have: dropped, counted, and a flood if there are too many."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.rate_limit import Rate
from bridge.net.interface import Packet

RATE: Final = 1000.0
"""a second: clients send some after their gateway has lost their SA"""
HOLD_SECONDS: Final = 5.0
"""a flood counts as one for so long after the last message beyond the rate"""


class Strays:
    """Takes what no SA here is named by."""

    def __init__(self, metrics: GatewayMetrics, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._rate = Rate(RATE)
        self._flood_until = float("-inf")

    @property
    def are_a_flood(self) -> bool:
        """Whether more come than clients send."""
        return self._clock() < self._flood_until

    def take(self, packet: Packet) -> None:
        """One more."""
        packet.drop()
        self._metrics.strays.inc()
        self._look()

    def pass_on(self, packet: Packet) -> None:
        """One more, which charon may know of: dropped in a flood only."""
        if self.are_a_flood:
            self.take(packet)
        else:
            packet.accept()
            self._look()

    def _look(self) -> None:
        now = self._clock()
        if not self._rate.take(now):
            self._flood_until = now + HOLD_SECONDS
