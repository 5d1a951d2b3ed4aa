"""Stubs of failed gateways, fetched before their clients come (Download Stub, draft-xu-ike-sa-sync-01 section 3.4).

The bank is asked for every stub all the same. Where it does not answer within the time of a look-up, such a stub is
served from memory. What happens to a fetched stub in the bank is received through the keyspace, and the stub is let go;
while nothing can be received nothing is served from here.

In mode distributed they are fetched into the gateway's own bank instead, where the others delete what has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from typing import Final, Protocol

import structlog
from msgspec import Struct

from bridge.bank.interface import BankUnavailable, StubBank
from bridge.bank.keyspace import Event
from bridge.bank.write_queue import Writable
from bridge.service.tasks import end, spawn
from bridge.stub import bank_keys
from bridge.stub.stub import Index, Stub, StubError

log = structlog.get_logger()

LIMIT: Final = 200_000
"""stubs kept at most, of all gateways together"""
PROGRESS_MAX: Final = 1_000
"""downloads that are remembered"""
GATEWAYS_MAX: Final = 64
"""gateways whose stubs are fetched at most: anyone with write access to the bank can make one fail"""
PATIENCE: Final = 0.5
"""seconds that the bank may take for a stub that is held here: half the time of a look-up"""
PROGRESS_SECONDS: Final = 1.0
"""between two lines in the log about a download that goes on"""


class Patterns(Protocol):
    """The part of a Keyspace that chooses what it receives."""

    async def add(self, pattern: str) -> None: ...
    async def remove(self, pattern: str) -> None: ...


class Progress(Struct):
    """How far the download of one gateway's stubs is."""

    gateway: str
    state: str = "running"
    """running, done, failed, or full: more than there is room for"""
    stubs: int = 0
    seconds: float = 0.0


class Prefetch:
    """GET Stub from `bank`, or where that does not answer within `patience` s from what was fetched of failed gateways.

    `fetch` starts a download, `drop` ends what it brought. A Keyspace calls `on_event` and `on_state`. Where `near` is
    given, what is fetched is stored there, and not here.
    """

    def __init__(
        self, bank: StubBank, *, limit: int = LIMIT, near: Writable | None = None, patience: float = PATIENCE
    ) -> None:
        self.progress: dict[str, Progress] = {}
        """the last download of each gateway"""
        self.hits = 0
        """stubs served from memory"""
        self._bank = bank
        self._patience = patience
        self._limit = limit
        self._near = near
        self._stubs: dict[str, dict[Index, Stub]] = {}
        self._changed: dict[str, set[Index]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._dropped: set[asyncio.Task[None]] = set()
        self._keyspace: Patterns | None = None

    @property
    def size(self) -> int:
        """Stubs held."""
        return sum(map(len, self._stubs.values()))

    # events of the keyspace

    def attach(self, keyspace: Patterns) -> None:
        """Keys whose events say what becomes of fetched stubs."""
        self._keyspace = keyspace

    def on_state(self, listening: bool) -> None:
        """Whether events of the keyspace arrive. What is held may be outdated where they did not."""
        if not listening:
            for gateway in list(self._stubs):
                self.drop(gateway)

    def on_event(self, event: Event) -> None:
        """Something happened to a key: a fetched stub that it names is outdated."""
        try:
            index = Index.parse(event.key)
        except StubError:
            return
        held = self._stubs.get(index.gateway)
        if held is not None:
            held.pop(index, None)
            self._changed[index.gateway].add(index)

    # fetching

    def fetch(self, gateway: str) -> None:
        """Fetch all stubs of a gateway in the background, unless that goes on already."""
        if gateway not in self._stubs and len(self._stubs.keys() | self._tasks.keys()) >= GATEWAYS_MAX:
            log.warning("download-refused", gateway=gateway, reason=f"the stubs of {GATEWAYS_MAX} gateways are here")
        elif gateway not in self._tasks:
            self.progress.pop(gateway, None)
            while len(self.progress) >= PROGRESS_MAX:
                del self.progress[next(iter(self.progress))]
            self.progress[gateway] = Progress(gateway)
            task = spawn(f"download {gateway}", self._fetch(gateway))
            self._tasks[gateway] = task
            task.add_done_callback(lambda done: self._ended(gateway, done))

    async def fetched(self, gateway: str) -> None:
        """Wait for the end of a download that goes on."""
        if (task := self._tasks.get(gateway)) is not None:
            await asyncio.wait([task])

    def held(self, gateway: str) -> Collection[Stub] | None:
        """All stubs of a gateway, where they are held here; None where they were fetched elsewhere, not at all, or not
        to the end."""
        stubs, progress = self._stubs.get(gateway), self.progress.get(gateway)
        complete = stubs is not None and progress is not None and progress.state == "done"
        return stubs.values() if stubs is not None and complete and self._near is None else None

    def drop(self, gateway: str) -> None:
        """Let go of a gateway's stubs."""
        if task := self._tasks.pop(gateway, None):
            # it ends in the next pass of the event loop: until then the gateway may have failed again
            self._dropped.add(task)
            task.cancel()
        self._let_go(gateway)

    def _let_go(self, gateway: str) -> None:
        self._changed.pop(gateway, None)
        if self._stubs.pop(gateway, None) is not None and self._keyspace is not None:
            task = spawn(f"remove {gateway}", self._keyspace.remove(bank_keys.stubs_pattern(gateway)))
            self._tasks[f"remove {gateway}"] = task
            task.add_done_callback(lambda _: self._tasks.pop(f"remove {gateway}", None))

    def _ended(self, gateway: str, task: asyncio.Task[None]) -> None:
        self._dropped.discard(task)
        if self._tasks.get(gateway) is task:
            del self._tasks[gateway]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("download-failed", gateway=gateway, reason=f"{type(error).__name__}: {error}")
            self.progress[gateway].state = "failed"

    async def _fetch(self, gateway: str) -> None:
        began = logged = time.monotonic()
        progress = self.progress[gateway]
        held = self._stubs.setdefault(gateway, {})
        changed = self._changed.setdefault(gateway, set())
        changed.clear()
        log.info("download-started", gateway=gateway)
        try:
            if self._keyspace is not None:
                # first: changes that happen while the stubs arrive must be seen
                await self._keyspace.add(bank_keys.stubs_pattern(gateway))
            async for stubs in self._bank.download(gateway):
                if self._near is not None:
                    await self._near.change(stubs, ())
                else:
                    held |= {stub.index: stub for stub in stubs if stub.index not in changed}
                progress.stubs += len(stubs)
                progress.seconds = time.monotonic() - began
                if self.size > self._limit:
                    progress.state = "full"
                    log.warning("download-full", gateway=gateway, stubs=progress.stubs, fix="raise bank.cache")
                    return
                if time.monotonic() - logged > PROGRESS_SECONDS:
                    logged = time.monotonic()
                    log.info("download-progress", gateway=gateway, stubs=progress.stubs)
        except BankUnavailable as error:
            progress.state = "failed"
            log.warning("download-failed", gateway=gateway, stubs=progress.stubs, reason=str(error))
            return
        except asyncio.CancelledError:
            progress.state = "failed"
            raise
        progress.state, progress.seconds = "done", time.monotonic() - began
        if not progress.stubs:
            self._let_go(gateway)
        log.info("download-completed", gateway=gateway, stubs=progress.stubs, seconds=round(progress.seconds, 3))

    async def get(self, indexes: Sequence[Index]) -> list[Stub | None]:
        """GET Stub: what the bank says, and where it does not answer in time, what was fetched from it.

        Raises BankUnavailable where neither has anything to say.
        """
        held = self._held(indexes)
        try:
            async with asyncio.timeout(self._patience if held else None):
                return await self._bank.get(indexes)
        except (BankUnavailable, TimeoutError):
            if not (found := self.served(indexes)):
                raise
        return [found.get(index) for index in indexes]

    def served(self, indexes: Sequence[Index]) -> dict[Index, Stub]:
        """Those stubs that are held here, for a bank that does not answer."""
        held = self._held(indexes)
        self.hits += len(held)
        return held

    def _held(self, indexes: Sequence[Index]) -> dict[Index, Stub]:
        now = time.time()
        found = {index: self._stubs.get(index.gateway, {}).get(index) for index in indexes}
        return {index: stub for index, stub in found.items() if stub is not None and stub.expires > now}

    async def close(self) -> None:
        """End all downloads."""
        await end(*self._tasks.values(), *self._dropped)
