"""Which handshakes are in progress, as VICI says."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final

from bridge.charon.ha_segments import SegmentChooser
from bridge.charon.installer import LOOK_SHARE
from bridge.charon.sa_tracker import SaTracker
from bridge.charon.vici_types import SaInfo, ViciError
from bridge.charon.vici_watch import ViciWatch

LEAST_LOOK_SECONDS: Final = 0.25
QUICK_SECONDS: Final = 0.05
"""a list of all SAs that took less is asked for before an activation, too"""
SETTLE_SECONDS: Final = 0.25
"""that charon gets to process what it has received, while requests that may begin a handshake are held back"""
SETTLE_PAUSE_SECONDS, SETTLE_GROWTH = 0.001, 1.5
"""between two looks whether it has"""
UNSETTLED_SECONDS: Final = 10.0
"""a charon that counts more handshakes than it lists for so long counts wrongly"""
UNNAMED: Final = "(unnamed)"
"""the connection that VICI names for an SA whose peer has not said who it is"""
HALF_OPEN_STATES: Final = ("CREATED", "CONNECTING")
"""of an IKE_SA, as VICI names them; charon makes the second of the first while it works on a request"""


class HandshakeList:
    """Keeps the tracker's half-open SAs. `listing_took`: the seconds that the last list of all SAs took."""

    def __init__(
        self, tracker: SaTracker, segments: SegmentChooser, vici: ViciWatch, listing_took: Callable[[], float]
    ) -> None:
        self._tracker = tracker
        self._segments = segments
        self._vici = vici
        self._listing_took = listing_took
        self._due = asyncio.Event()
        self._unsettled_since: float | None = None

    def soon(self) -> None:
        """Ask VICI which handshakes are still in progress, as soon as the pace allows."""
        self._due.set()

    async def watch(self) -> None:
        """Ask for handshakes in progress whenever `soon` was called, for as long as the sidecar runs."""
        while True:
            await self._due.wait()
            self._due.clear()
            began = time.monotonic()
            # what is wrong with VICI the comparison says
            with contextlib.suppress(ViciError):
                await self.look()
            await asyncio.sleep(max(LEAST_LOOK_SECONDS, LOOK_SHARE * (time.monotonic() - began)))

    async def look(self) -> None:
        """Ask VICI which SAs are in state CONNECTING, once charon has processed the commands. Raises ViciError.

        How many there are costs next to nothing to ask; those of peers that are not authenticated yet are listed alone.
        Where others are in that state, this host initiates them, or they are between two messages of IKE_AUTH, which HA
        messages report too: all SAs are listed where that is quick, for clients wait for it, and in any case where
        charon would crash.
        """
        await self._look(all_sas=self._segments.crashes or self._listing_took() < QUICK_SECONDS)

    async def look_surely(self) -> bool:
        """`look`, while charon receives no request that may begin a handshake, until it lists as many as it counts: it
        counts a request before it processes it. Whether that came to be in SETTLE_SECONDS. Raises ViciError."""
        began, pause, all_sas = time.monotonic(), SETTLE_PAUSE_SECONDS, False
        while not await self._look(all_sas=all_sas):
            now = time.monotonic()
            if now - began > SETTLE_SECONDS:
                return self._counts_wrongly(now)
            await asyncio.sleep(pause)
            # a request is processed in less; what is still missing has a name, and takes a list of all
            pause, all_sas = pause * SETTLE_GROWTH, True
        self._unsettled_since = None
        return True

    def _counts_wrongly(self, now: float) -> bool:
        if self._unsettled_since is None:
            self._unsettled_since = now
        return now - self._unsettled_since > UNSETTLED_SECONDS

    async def _look(self, *, all_sas: bool) -> bool:
        """Whether all that charon counts were found. `all_sas`: among all SAs, if need be."""
        since, half_open = time.monotonic(), self._tracker.half_open
        count = await self._vici.half_open()
        found: dict[bytes, SaInfo] = {}

        def take(infos: list[SaInfo]) -> None:
            found.update((info.spis, info) for info in infos if info.state in HALF_OPEN_STATES)

        if count:
            take(await self._vici.list_sas(UNNAMED))
        listed_all = len(found) >= count
        if not listed_all and all_sas:
            await self._vici.each_sas(take)
            listed_all = True
        connecting = {spis: info.remote.address for spis, info in found.items() if not self._tracker.is_up(spis)}
        if listed_all:
            half_open.listed(connecting, since)
        else:
            half_open.also(connecting, since)
        return len(found) >= count
