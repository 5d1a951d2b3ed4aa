"""What is noted of single IKE_SAs, by both SPIs, until HA messages and VICI have both named them. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import SaInfo

EARLY_MAX = 200_000
"""reports of VICI's kept for SAs whose HA messages are still to come"""
HALF_OPEN_SECONDS = 60.0
"""an SA that has keys but is not up after this long never will be"""
MALFORMED_MAX = 20_000
"""SAs with malformed messages that are remembered"""


class SaNotes:
    """Each note is of SAs that `drop` forgets when they are gone."""

    def __init__(self) -> None:
        self.early: dict[bytes, tuple[SaInfo, float]] = {}
        """what VICI said of SAs whose HA messages are still to come, and when"""
        self.unconfirmed: dict[bytes, float] = {}
        """SAs of which HA messages say what VICI has not said yet, and since when; oldest first"""
        self.malformed: dict[bytes, tuple[str, float]] = {}
        """SAs that charon sent a malformed message about: why, and when"""
        self.incomplete: dict[bytes, IkeSa] = {}
        """SAs that have keys and are not up, oldest first"""
        self.rekeyed_from: dict[bytes, IkeSa] = {}
        """by the SPIs of SAs that are not up yet: what they were rekeyed from"""
        self.unproven: set[bytes] = set()
        """SAs that this gateway rebuilt and charon reported again, and on which no request verified yet"""
        self._tables: tuple[dict[bytes, Any], ...] = (
            self.incomplete,
            self.unconfirmed,
            self.early,
            self.malformed,
            self.rekeyed_from,
        )

    def ask(self, spis: bytes, now: float) -> None:
        """VICI is to be asked about this SA."""
        self.unconfirmed.setdefault(spis, now)

    def reported(self, info: SaInfo, now: float) -> None:
        """VICI said this of an SA before its HA messages were read."""
        if len(self.early) > EARLY_MAX:
            self.early.clear()
        self.early[info.spis] = (info, now)

    def spoilt(self, spis: bytes, reason: str, now: float) -> bool:
        """What a message said of this SA is lost; whether that is so for the first time."""
        known = spis in self.malformed
        if not known and len(self.malformed) >= MALFORMED_MAX:
            del self.malformed[next(iter(self.malformed))]
        self.malformed[spis] = (reason, now)
        return not known

    def half_open(self, now: float) -> Iterator[bytes]:
        """Take the notes of handshakes away that came to nothing, the oldest first, and give their SPIs."""
        limit = now - HALF_OPEN_SECONDS
        while self.incomplete:
            spis, sa = next(iter(self.incomplete.items()))
            if sa.seen > limit:
                return
            del self.incomplete[spis]
            self.unconfirmed.pop(spis, None)
            self.rekeyed_from.pop(spis, None)
            self.unproven.discard(spis)
            yield spis

    def drop(self, spis: bytes) -> None:
        """That SA is gone."""
        for table in self._tables:
            table.pop(spis, None)
        self.unproven.discard(spis)

    def clear(self) -> None:
        """All are gone."""
        for table in self._tables:
            table.clear()
        self.unproven.clear()
