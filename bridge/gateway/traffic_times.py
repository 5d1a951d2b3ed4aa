"""When the sessions of this gateway had traffic, by what charon lists of them anyway. No I/O; monotonic seconds."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import Final

from bridge.bank.recent_traffic import SESSIONS_MAX
from bridge.charon.sa_tracker import SaTracker
from bridge.charon.vici_types import SaInfo
from bridge.stub.stub import Index

LATELY_SECONDS: Final = 60.0
"""before charon listed it, within which a session had a packet from its client: it is one with traffic"""


class TrafficTimes:
    """Reads what VICI reports of the IKE_SAs of `tracker`."""

    def __init__(self, tracker: SaTracker, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tracker = tracker
        self._clock = clock
        self._last: dict[bytes, float] = {}
        self.changed = False
        """whether anything was reported since `latest`"""

    def told(self, info: SaInfo) -> None:
        """What VICI reports of one IKE_SA."""
        idle = min((child.idle_in for child in info.children if child.idle_in is not None), default=LATELY_SECONDS)
        if idle < LATELY_SECONDS:
            self._last[info.spis] = self._clock() - idle
            self.changed = True
        elif self._last.pop(info.spis, None) is not None:
            self.changed = True

    def latest(self) -> list[Index]:
        """The sessions with traffic, SESSIONS_MAX at most, that with the latest first; those without a stub left
        out."""
        self.changed = False
        sas = self._tracker.sas
        self._last = {spis: last for spis, last in self._last.items() if spis in sas}
        first = heapq.nlargest(SESSIONS_MAX, self._last, key=self._last.__getitem__)
        return [index for spis in first if (index := sas[spis].published) is not None]
