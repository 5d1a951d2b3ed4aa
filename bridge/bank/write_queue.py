"""Stub changes on their way to the bank: coalesced, bundled, kept while the bank is away."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from bridge.bank.interface import BankUnavailable, Ending, Move
from bridge.service.tasks import end, spawn
from bridge.stub.codec import encode
from bridge.stub.stub import Index, Stub, StubError

log = structlog.get_logger()

LIMIT: Final = 200_000
"""changes kept while the bank is away"""
DELAY: Final = 0.005
"""seconds that a change waits for others to travel with"""
MANY: Final = 64
"""changes in a bundle after which the next waits LONGER times as long: in a storm each bucket then has several"""
LONGER: Final = 4
BUNDLE: Final = 4096
"""changes in one bundle at most: enough that each bucket has several"""
PROBE: Final = 16
"""changes in one bundle at most, after a bundle of which nothing got through"""
BACK_OFF_MIN: Final = 0.05
BACK_OFF_MAX: Final = 0.5
"""seconds between two attempts to write: what waits is on its way within this time of the bank's return"""
CLOSE_PATIENCE: Final = 2.0
"""seconds that `close` gives the bank to take what waits"""

Change = Stub | Ending
"""a stub to store, or a session whose stub is to be deleted"""


@dataclass(slots=True)
class Counters:
    """What became of the changes."""

    stored: int = 0
    refused: int = 0
    """not stored, since the bank holds a newer revision"""
    deleted: int = 0
    dropped: int = 0
    """lost for want of room, or since they cannot be encoded, or at `close`"""
    failures: int = 0
    """attempts to write that the bank did not take"""


class Writable(Protocol):
    """What a Writer needs of a bank: see StubBank."""

    async def change(self, stubs: Sequence[Stub], endings: Sequence[Ending]) -> tuple[list[bool], list[bool]]: ...


class WriteQueue:
    """Writes stub changes behind the caller's back; one change an index waits at most, the latest.

    Past `limit` waiting changes the one whose stub expires first is dropped, deletions last. Used within one running
    event loop. `name` is the bank's in the log.
    """

    def __init__(self, bank: Writable, *, limit: int = LIMIT, bundle: int = BUNDLE, name: str = "bank") -> None:
        self.counters = Counters()
        self._name = name
        self._log = log.bind(bank=name)
        self._bank = bank
        self._limit = limit
        self._bundle = bundle
        self._waiting: dict[Index, Change] = {}
        self._under_way: dict[Index, Change] = {}
        # (expiry, order, index) of what waits; what has since been replaced or written is skipped when met
        self._by_expiry: list[tuple[float, int, Index]] = []
        self._order = itertools.count()
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        """Changes that the bank has not confirmed."""
        return len(self._waiting) + sum(index not in self._waiting for index in self._under_way)

    def submit(self, stub: Stub) -> None:
        """Store `stub` soon, in place of whatever waits for its index."""
        self._put(stub.index, stub)

    def submit_delete(self, index: Index, *, expires: int, epoch: int = 0, move: Move | None = None) -> None:
        """Delete the stub of `index` soon, and have the bank remember until `expires` (Unix seconds) that it ended: as
        long as a stub of it may live anywhere. `epoch` and `move` as of Ending."""
        self.submit_ending(Ending(index, expires, epoch, move))

    def submit_ending(self, ending: Ending) -> None:
        """The same, for an ending as another bank was given it."""
        # behind the stubs that were submitted before it: the stub of a rekeyed IKE_SA goes when the new one is there
        self._waiting.pop(ending.index, None)
        self._put(ending.index, ending)

    def discard(self, index: Index) -> None:
        """What waits for an index is of no use: another change was written beside this queue."""
        self._waiting.pop(index, None)

    async def flush(self) -> None:
        """Wait until nothing is pending; for ever if the bank does not come back."""
        await self._idle.wait()

    async def close(self, patience: float = CLOSE_PATIENCE) -> None:
        """Give the bank `patience` s to take what is pending, and end. What it does not take is lost, and logged."""
        try:
            async with asyncio.timeout(patience):
                await self.flush()
        except TimeoutError:
            self._log.warning(
                "stub-changes-lost", count=self.pending, reason="the bank did not take them before the end"
            )
            self.counters.dropped += self.pending
        if self._task is not None:
            await end(self._task)
            self._task = None

    # what waits

    def _put(self, index: Index, change: Change) -> None:
        self._waiting[index] = change
        heapq.heappush(self._by_expiry, (_expiry(change), next(self._order), index))
        if len(self._waiting) > self._limit:
            self._drop()
        if len(self._by_expiry) > 2 * len(self._waiting) + self._bundle:
            self._by_expiry = [(_expiry(held), next(self._order), index) for index, held in self._waiting.items()]
            heapq.heapify(self._by_expiry)
        self._idle.clear()
        self._news.set()
        if self._task is None:
            self._task = spawn(f"write {self._name}", self._write())

    def _drop(self) -> None:
        while self._by_expiry:
            expiry, _, index = heapq.heappop(self._by_expiry)
            held = self._waiting.get(index)
            if held is not None and _expiry(held) == expiry:
                del self._waiting[index]
                self.counters.dropped += 1
                return

    # writing

    async def _write(self) -> None:
        pause = BACK_OFF_MIN
        away = stuck = many = False
        while True:
            await self._news.wait()
            await asyncio.sleep(DELAY * LONGER if many else DELAY)
            many = len(self._waiting) >= MANY
            while self._waiting:
                # while nothing gets through, a few changes show as well as many whether the bank takes them again
                size = min(PROBE, self._bundle) if stuck else self._bundle
                bundle = list(itertools.islice(self._waiting.items(), size))
                self._under_way = dict(bundle)
                for index, _ in bundle:
                    del self._waiting[index]
                error = await self._write_bundle(self._under_way)
                stuck = error is not None and (error.left is None or len(error.left) == len(bundle))
                if error is not None:
                    self.counters.failures += 1
                    self._take_back(error.left)
                    if not away:
                        self._log.warning("bank-writes-wait", reason=str(error), pending=self.pending)
                        away = True
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, BACK_OFF_MAX)
                else:
                    if away:
                        self._log.info("bank-writes-resume", pending=len(self._waiting))
                        away = False
                    pause = BACK_OFF_MIN
                self._under_way = {}
            self._by_expiry.clear()
            self._news.clear()
            self._idle.set()

    def _take_back(self, left: frozenset[Index] | None) -> None:
        """Put what did not get through (`left`, or all of it) in front of what came since, which wins where both are of
        one index. Behind what came since where it alone did not get through, so that it holds up no other bucket's."""
        since = self._waiting
        again = {
            index: change
            for index, change in self._under_way.items()
            if index not in since and (left is None or index in left)
        }
        self._waiting = {**again, **since} if left is None else {**since, **again}
        for index, change in again.items():
            heapq.heappush(self._by_expiry, (_expiry(change), next(self._order), index))
        self._under_way = {}
        while len(self._waiting) > self._limit:
            self._drop()

    async def _write_bundle(self, bundle: dict[Index, Change]) -> BankUnavailable | None:
        """Write a bundle, stubs before deletions; what kept some of it, or all, from being written. A bank that answers
        but takes no stubs may still take deletions, which make room."""
        stubs = [change for change in bundle.values() if isinstance(change, Stub)]
        endings = [change for change in bundle.values() if isinstance(change, Ending)]
        try:
            stored, deleted = await self._change(stubs, endings)
        except BankUnavailable as error:
            if error.left is not None:
                self.counters.stored += sum(stub.index not in error.left for stub in stubs)
                self.counters.deleted += sum(ending.index not in error.left for ending in endings)
            return error
        self.counters.stored += sum(stored)
        self.counters.refused += len(stored) - sum(stored)
        self.counters.deleted += sum(deleted)
        return None

    async def _change(self, stubs: list[Stub], endings: list[Ending]) -> tuple[list[bool], list[bool]]:
        try:
            return await self._bank.change(stubs, endings)
        except StubError:
            return await self._bank.change([stub for stub in stubs if self._fits(stub)], endings)

    def _fits(self, stub: Stub) -> bool:
        try:
            encode(stub)
        except StubError as error:
            self.counters.dropped += 1
            self._log.error("stub-not-storable", index=str(stub.index), reason=str(error))
            return False
        return True


def _expiry(change: Change) -> float:
    # a deletion that is lost leaves a stub of a session that is over, until it expires: the worst to lose
    return change.expires if isinstance(change, Stub) else math.inf
