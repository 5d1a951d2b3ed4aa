"""Whether this gateway can send to its clients at all: their interface may have lost its carrier, or their route may be
gone, while the bank is reached by another interface. No I/O but `reaches`; times are monotonic seconds.

Only clients that the kernel could send to before say anything: where charon's packets are routed by a mark or in a VRF,
the kernel finds no route for others, or another one (`failover.uplink` is for that). What is concluded wrongly costs
little: clients ask their gateway before they move.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

import structlog

from bridge.charon.sa_tracker import SaTracker
from bridge.net.route import reaches

log = structlog.get_logger()

LOOK_SECONDS: Final = 0.2
"""between two looks"""
GONE_SECONDS: Final = 0.5
"""that no client can be sent to before it counts: an interface may be configured again"""
SAMPLE: Final = 16
"""clients that are looked at, spread over all"""
SAMPLE_SECONDS: Final = 5.0
"""between two choices of these"""

Way = tuple[str, str]
"""this gateway's address in an IKE_SA, and its client's"""


class Uplink:
    """Of the SAs of `tracker`, except those at a `shared` address, which moves to another gateway by itself. `reaches`
    says whether the kernel could send from one address to another one."""

    def __init__(
        self,
        tracker: SaTracker,
        reaches: Callable[[str, str], bool] = reaches,
        *,
        shared: Collection[str] = (),
    ) -> None:
        self._tracker = tracker
        self._reaches = reaches
        self._shared = frozenset(shared)
        self._ways: list[Way] = []
        self._chosen_at = float("-inf")
        self._looked_at = float("-inf")
        self._since: float | None = None
        """since when no client could be sent to"""
        self.gone = False

    def look(self, now: float) -> bool:
        """Whether it is gone, by a look if one is due."""
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            # those of before come first: a loss between two looks has to be seen also where others are due
            if not self._ways or any(self._reaches(*way) for way in self._ways):
                self._since = None
            elif self._since is None:
                self._since = now
            gone = self._since is not None and now - self._since >= GONE_SECONDS
            due = now - self._chosen_at >= SAMPLE_SECONDS and (gone or self._since is None)
            if (due or (gone and not self.gone)) and self._choose(now):
                gone = False
            self._say(gone)
        return self.gone

    def _choose(self, now: float) -> bool:
        """Choose others to look at, which may have come since; whether any of them can be sent to."""
        self._chosen_at = now
        ways = [way for way in self._some() if self._reaches(*way)]
        if ways or self._since is None:
            self._ways, self._since = ways, None
        return bool(ways)

    def _some(self) -> list[Way]:
        ways = [
            (sa.local.address, sa.remote.address)
            for sa in self._tracker.established()
            if sa.local is not None and sa.remote is not None and sa.local.address not in self._shared
        ]
        return ways[:: max(len(ways) // SAMPLE, 1)][:SAMPLE]

    def _say(self, gone: bool) -> None:
        if gone and not self.gone:
            log.error("uplink-lost", effect="the other gateways are notified", fix="see the interface, or its route")
        elif self.gone and not gone:
            log.info("uplink-back")
        self.gone = gone
