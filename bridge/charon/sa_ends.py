"""charon is asked over VICI to end IKE_SAs: many at a time, over a few connections.

charon has a unique ID of its own for each IKE_SA, and walks all of them to find one: about 1 ms for each 1,000, and 100
times that where it has to write them all into a list. So an IKE_SA is ended by its unique ID without another look, and
one list serves all that wait and whose unique ID is not known: those that were rebuilt since the last comparison.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from bridge.charon.sa_tracker import SaTracker
from bridge.charon.vici_client import ViciClient
from bridge.charon.vici_types import SaInfo, ViciError
from bridge.service.tasks import end, spawn

ENDING_AT_ONCE: Final = 4
"""IKE_SAs that charon is asked to end at a time: it has to answer other questions meanwhile"""
STOPS: Final = "the sidecar stops"

Wanted = tuple[bytes, str]
"""both SPIs, and charon's unique ID"""


class SaEnds:
    """What charon is asked to end. `same()` returns whether the charon runs whose unique IDs `tracker` has."""

    def __init__(self, tracker: SaTracker, vici: ViciClient, same: Callable[[], bool]) -> None:
        self._tracker = tracker
        self._vici = vici
        self._same = same
        self._results: dict[bytes, asyncio.Future[bool]] = {}
        self._ready: deque[Wanted] = deque()
        self._unlisted: set[bytes] = set()
        self._listed: set[bytes] = set()
        """those whose unique ID a list has given"""
        self._lister: asyncio.Task[None] | None = None
        self._workers: set[asyncio.Task[None]] = set()
        self.closed = False
        """the sidecar stops, and charon is asked nothing more"""

    async def end(self, spis: bytes) -> bool:
        """Have charon end an IKE_SA, given by both SPIs; whether it had it. charon has sent a DELETE and raised its
        events by then. Raises ViciError."""
        if self.closed:
            raise ViciError(STOPS)
        result = self._results.get(spis)
        if result is None:
            result = self._results[spis] = asyncio.get_running_loop().create_future()
            sa = self._tracker.sas.get(spis)
            if sa is not None and sa.unique_id:
                self._begin((spis, sa.unique_id))
            else:
                self._look_up(spis)
        return await asyncio.shield(result)

    async def close(self) -> None:
        """Ask charon nothing more."""
        self.closed = True
        await end(*self._workers, *([self._lister] if self._lister is not None else []))
        for spis in list(self._results):
            self._fail(spis, ViciError(STOPS))

    def _begin(self, wanted: Wanted) -> None:
        self._ready.append(wanted)
        # one that has finished may still be in the set
        if sum(not worker.done() for worker in self._workers) < ENDING_AT_ONCE:
            worker = spawn("end-sas", self._work())
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)

    def _look_up(self, spis: bytes) -> None:
        self._unlisted.add(spis)
        if self._lister is None or self._lister.done():
            self._lister = spawn("list-sas-to-end", self._list())

    def _settle(self, spis: bytes, had: bool) -> None:
        self._listed.discard(spis)
        result = self._results.pop(spis)
        if not result.done():
            result.set_result(had)

    def _fail(self, spis: bytes, error: ViciError) -> None:
        self._listed.discard(spis)
        result = self._results.pop(spis)
        if not result.done():
            result.set_exception(error)
            # the task that asked may have been cancelled
            result.exception()

    async def _list(self) -> None:
        """Look all up that wait; what the list says of other IKE_SAs spares the next list."""
        while self._unlisted:
            wanted, self._unlisted = self._unlisted, set()

            def take(infos: list[SaInfo], wanted: set[bytes] = wanted) -> None:
                for info in infos:
                    sa = self._tracker.sas.get(info.spis)
                    if sa is not None:
                        sa.unique_id = info.unique_id
                    if info.spis in wanted:
                        wanted.discard(info.spis)
                        self._listed.add(info.spis)
                        self._begin((info.spis, info.unique_id))

            try:
                await self._vici.each_sas(take)
            except ViciError as error:
                for spis in wanted:
                    self._fail(spis, error)
            else:
                for spis in wanted:
                    self._settle(spis, had=False)

    async def _work(self) -> None:
        """Have ended what is ready, over one connection as long as that works."""
        asked: Wanted | None = None
        while self._ready:
            try:
                async with self._vici.ending(self._same) as end_sa:
                    while self._ready:
                        asked = self._ready.popleft()
                        self._answered(asked, await end_sa(asked[1]))
                        asked = None
            except ViciError as error:
                # without a connection nothing that waits can be ended
                failed = [asked] if asked is not None else list(self._ready)
                if asked is None:
                    self._ready.clear()
                for spis, _ in failed:
                    self._fail(spis, error)
                asked = None

    def _answered(self, wanted: Wanted, refused: str) -> None:
        spis, _ = wanted
        if refused and spis not in self._listed:
            # it may have been installed once more since its unique ID was read
            self._look_up(spis)
        else:
            self._settle(spis, had=not refused)
