"""Stubs of failed gateways, fetched before their clients come (Download Stub, draft-xu-ike-sa-sync-01 section 3.4).

A look-up of such a stub needs no round trip to the bank. What happens to a fetched stub in the bank is heard through
the keyspace, and the stub is let go; while nothing can be heard nothing is answered from here.

In mode distributed they are fetched into the gateway's own bank instead, where the others delete what has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

import structlog
from msgspec import Struct

from bridge.bank.interface import DOWNLOAD_BATCH, BankUnavailable, Ending, GatewaySign, StubBank
from bridge.bank.keyspace import Event, Keyspace
from bridge.bank.write_queue import Writable
from bridge.service.tasks import end, spawn
from bridge.stub import bank_keys
from bridge.stub.stub import Index, Stub, StubError

log = structlog.get_logger()

LIMIT: Final = 200_000
"""stubs kept at most, of all gateways together"""
PROGRESS_SECONDS: Final = 1.0
"""between two lines in the log about a download that goes on"""


class Progress(Struct):
    """How far the download of one gateway's stubs is."""

    gateway: str
    state: str = "running"
    """running, done, failed, or full: more than there is room for"""
    stubs: int = 0
    seconds: float = 0.0


class Prefetch:
    """StubBank that answers from what it fetched of failed gateways, else from `bank`.

    `fetch` starts a download, `drop` ends what it brought. `hear` and `heard` are fed by a Keyspace. Where `near` is
    given, what is fetched is stored there, and not here.
    """

    def __init__(self, bank: StubBank, *, limit: int = LIMIT, near: Writable | None = None) -> None:
        self.progress: dict[str, Progress] = {}
        """the last download of each gateway"""
        self.hits = 0
        """look-ups answered without the bank"""
        self._bank = bank
        self._limit = limit
        self._near = near
        self._stubs: dict[str, dict[Index, Stub]] = {}
        self._changed: dict[str, set[Index]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._keyspace: Keyspace | None = None

    @property
    def unreadable(self) -> int:
        """Stubs found in the bank that did not open."""
        return self._bank.unreadable

    @property
    def spoilt(self) -> int:
        """Keys and members found in the bank that no gateway writes."""
        return self._bank.spoilt

    @property
    def size(self) -> int:
        """Stubs held."""
        return sum(map(len, self._stubs.values()))

    # what the keyspace tells

    def attach(self, keyspace: Keyspace) -> None:
        """Where to hear what becomes of fetched stubs."""
        self._keyspace = keyspace

    def heard(self, hears: bool) -> None:
        """Whether the keyspace is heard. What is held may be outdated where it was not."""
        if not hears:
            for gateway in list(self._stubs):
                self.drop(gateway)

    def hear(self, event: Event) -> None:
        """Something happened to a key: a fetched stub that it names is outdated."""
        if not event.key.startswith(bank_keys.STUB):
            return
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
        if gateway not in self._tasks:
            self.progress[gateway] = Progress(gateway)
            task = spawn(f"download {gateway}", self._fetch(gateway))
            self._tasks[gateway] = task
            task.add_done_callback(lambda done: self._ended(gateway, done))

    def drop(self, gateway: str) -> None:
        """Let go of a gateway's stubs."""
        if task := self._tasks.get(gateway):
            task.cancel()
        self._changed.pop(gateway, None)
        if self._stubs.pop(gateway, None) is not None and self._keyspace is not None:
            task = spawn(f"remove {gateway}", self._keyspace.remove(bank_keys.stubs_pattern(gateway)))
            self._tasks[f"remove {gateway}"] = task
            task.add_done_callback(lambda _: self._tasks.pop(f"remove {gateway}", None))

    def _ended(self, gateway: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(gateway, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("download-failed", gateway=gateway, reason=f"{type(error).__name__}: {error}")
            self.progress[gateway].state = "failed"

    async def _fetch(self, gateway: str) -> None:
        began = told = time.monotonic()
        progress = self.progress[gateway]
        held = self._stubs.setdefault(gateway, {})
        changed = self._changed.setdefault(gateway, set())
        changed.clear()
        log.info("download-begins", gateway=gateway)
        try:
            if self._keyspace is not None and self._near is None:
                # first: what changes while the stubs come must be heard
                await self._keyspace.add(bank_keys.stubs_pattern(gateway))
            async for stubs in self._bank.download(gateway):
                if self._near is not None:
                    await self._near.store(stubs)
                else:
                    held |= {stub.index: stub for stub in stubs if stub.index not in changed}
                progress.stubs += len(stubs)
                progress.seconds = time.monotonic() - began
                if self.size > self._limit:
                    progress.state = "full"
                    log.warning("download-full", gateway=gateway, stubs=progress.stubs, mend="raise bank.cache")
                    return
                if time.monotonic() - told > PROGRESS_SECONDS:
                    told = time.monotonic()
                    log.info("download", gateway=gateway, stubs=progress.stubs)
        except BankUnavailable as error:
            progress.state = "failed"
            log.warning("download-failed", gateway=gateway, stubs=progress.stubs, reason=str(error))
            return
        except asyncio.CancelledError:
            progress.state = "failed"
            raise
        progress.state, progress.seconds = "done", time.monotonic() - began
        log.info("downloaded", gateway=gateway, stubs=progress.stubs, seconds=round(progress.seconds, 3))

    # StubBank

    async def get(self, indexes: Sequence[Index]) -> list[Stub | None]:
        """See StubBank."""
        now = time.time()
        found: dict[Index, Stub | None] = {}
        for index in indexes:
            stub = self._stubs.get(index.gateway, {}).get(index)
            if stub is not None and stub.expires > now:
                found[index] = stub
        self.hits += len(found)
        missing = [index for index in indexes if index not in found]
        if missing:
            found |= dict(zip(missing, await self._bank.get(missing), strict=True))
        return [found[index] for index in indexes]

    async def store(self, stubs: Sequence[Stub]) -> list[bool]:
        """See StubBank."""
        for stub in stubs:
            self._stubs.get(stub.index.gateway, {}).pop(stub.index, None)
        return await self._bank.store(stubs)

    async def delete(self, endings: Sequence[Ending]) -> list[bool]:
        """See StubBank."""
        for ending in endings:
            self._stubs.get(ending.index.gateway, {}).pop(ending.index, None)
        return await self._bank.delete(endings)

    async def look(self, indexes: Sequence[Index]) -> list[tuple[Stub | None, bool]]:
        """See StubBank."""
        return await self._bank.look(indexes)

    def endings(self) -> AsyncGenerator[list[Ending]]:
        """See StubBank."""
        return self._bank.endings()

    def download(self, gateway: str, batch: int = DOWNLOAD_BATCH) -> AsyncGenerator[list[Stub]]:
        """See StubBank."""
        return self._bank.download(gateway, batch)

    async def revisions(self, indexes: Sequence[Index]) -> list[int | None]:
        """See StubBank."""
        return await self._bank.revisions(indexes)

    async def ended(self, indexes: Sequence[Index]) -> list[bool | None]:
        """See StubBank."""
        return await self._bank.ended(indexes)

    async def reseal(self, gateway: str) -> int:
        """See StubBank."""
        return await self._bank.reseal(gateway)

    async def gateways(self) -> dict[str, GatewaySign]:
        """See StubBank."""
        return await self._bank.gateways()

    async def post(self, kind: str, gateway: str, value: str, ttl: float) -> None:
        """See StubBank."""
        await self._bank.post(kind, gateway, value, ttl)

    async def posted(self, kind: str, gateway: str) -> bytes | None:
        """See StubBank."""
        return await self._bank.posted(kind, gateway)

    async def heartbeat(self, gateway: str, ttl: float) -> None:
        """See StubBank."""
        await self._bank.heartbeat(gateway, ttl)

    async def ping(self) -> float:
        """See StubBank."""
        return await self._bank.ping()

    async def close(self) -> None:
        """End all downloads, and let go of the bank."""
        await end(*self._tasks.values())
        await self._bank.close()

    def list(self, gateway: str | None = None) -> AsyncGenerator[Any]:
        """See StubBank: lists of Readable."""
        rows: AsyncGenerator[Any] = self._bank.list(gateway)
        return rows
