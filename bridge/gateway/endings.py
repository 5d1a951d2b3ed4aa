"""The sessions that ended here or went on from here, by their indexes, for as long as a stub of them could live.

A bank can forget: a replica that was behind is promoted, a Redis starts from an older file, or empty. Its stubs of
sessions that ended are then back, and a request that was captured once could be replayed. So each gateway remembers the
ends that it took part in, also across a restart, refuses those indexes whatever the bank says, never publishes them
again, and reports them to a bank that was away (bridge.gateway.bank_reconciler).

The file has one end a line, `<Unix seconds> <gateway> <SPI hex>`: until when it is remembered, and the index; where
gateways share the address, the epoch of the session here follows. The last line of an index counts; 0 takes an end
back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Final

import structlog

from bridge.bank.interface import Ending
from bridge.service.state_file import append, replace
from bridge.stub.stub import Index, StubError

log = structlog.get_logger()

FILE: Final = "endings"
"""in the folder that `state` names"""
ENDINGS_MAX: Final = 500_000
"""of more, those that were added first are forgotten"""
MARGIN_SECONDS: Final = 60
"""beyond the expiry of the stub: clocks of two gateways differ"""
WRITE_SECONDS: Final = 1.0
"""between two writes to the file"""
AGAIN_SECONDS: Final = 5.0
"""until the next attempt, where the file could not be written"""
COMPACT_LINES: Final = 10_000
"""a file with this many lines more than twice what it had is written again, without what is over"""


class Endings:
    """What ended. `directory` is where the file lies, None for memory alone; `wall` gives Unix seconds.

    Used on one event loop; only `keep` and `close` write the file.
    """

    def __init__(self, directory: str | Path | None = None, *, wall: Callable[[], float] = time.time) -> None:
        self._path = None if directory is None else Path(directory) / FILE
        self._wall = wall
        self._until: dict[Index, int] = {}
        self._epochs: dict[Index, int] = {}
        """of sessions at addresses that gateways share: another gateway may have taken them over"""
        self._unwritten: list[Index] = []
        self._removed: list[Index] = []
        self._lines = 0
        self._compact_at = COMPACT_LINES
        self._failed = False
        self._torn = False
        """the file does not end with a whole line"""
        self._load()

    def __contains__(self, index: Index) -> bool:
        return self._until.get(index, 0) > self._wall()

    def add(self, index: Index, expires: int, epoch: int = 0) -> None:
        """The session of `index` ended or went on; no stub of it lives longer than until `expires` (Unix seconds).
        `epoch` as of bridge.bank.interface.Ending."""
        until = max(self._until.pop(index, 0), expires + MARGIN_SECONDS)
        self._until[index] = until
        if epoch:
            self._epochs[index] = epoch
        self._unwritten.append(index)
        if len(self._until) > ENDINGS_MAX:
            self._purge()
            # some at a time: each look for what has expired is at all of them
            for oldest in list(islice(self._until, max(len(self._until) - ENDINGS_MAX * 9 // 10, 0))):
                del self._until[oldest]
                self._epochs.pop(oldest, None)

    def remove(self, index: Index) -> None:
        """It did not end: another gateway has taken the session over."""
        if self._until.pop(index, None) is not None:
            self._epochs.pop(index, None)
            self._removed.append(index)

    def epoch(self, index: Index) -> int:
        """The epoch that a session had here when it ended; 0: not known, or at no shared address."""
        return self._epochs.get(index, 0)

    def all(self) -> Iterator[Ending]:
        """Every end that is remembered, the latest first."""
        now = self._wall()
        return (
            Ending(index, until - MARGIN_SECONDS, self.epoch(index))
            for index, until in reversed(self._until.copy().items())
            if until > now
        )

    def latest(self, count: int) -> list[Index]:
        """The last `count` of them: what a bank that went back in time lacks first. None that the bank may have
        forgotten by now since their stubs have expired."""
        soon = self._wall() + 2 * MARGIN_SECONDS
        return [index for index in islice(reversed(self._until), count) if self._until[index] > soon]

    # the file

    async def keep(self) -> None:
        """Write what is new to the file, until cancelled."""
        while True:
            await asyncio.sleep(AGAIN_SECONDS if self._failed else WRITE_SECONDS)
            await self._write()

    async def close(self) -> None:
        """Write what is left."""
        await self._write()

    def _purge(self) -> None:
        now = self._wall()
        self._until = {index: until for index, until in self._until.items() if until > now}
        self._epochs = {index: epoch for index, epoch in self._epochs.items() if index in self._until}

    async def _write(self) -> None:
        removed, self._removed = self._removed, []
        if self._path is None or not (self._unwritten or removed or self._failed):
            self._unwritten.clear()
            return
        # after a failure nothing is known of what is in the file: all that is remembered takes its place
        compact = self._failed or self._torn or self._lines + len(self._unwritten) > self._compact_at
        if compact:
            self._purge()
        indexes = self._until if compact else [index for index in self._unwritten if index in self._until]
        lines = [(index, self._until[index], self.epoch(index)) for index in indexes]
        self._unwritten = []
        if not compact:
            lines += [(index, 0, 0) for index in removed if index not in self._until]
        try:
            await asyncio.to_thread(_save, self._path, lines, replace if compact else append)
        except OSError as error:
            if not self._failed:
                log.warning(
                    "endings-not-saved",
                    file=str(self._path),
                    reason=error.strerror,
                    fix="make the folder of `state` writable",
                )
            self._failed = True
        else:
            self._failed = self._torn = False
            self._lines = len(lines) if compact else self._lines + len(lines)
            if compact:
                self._compact_at = 2 * self._lines + COMPACT_LINES

    def _load(self) -> None:
        if self._path is None:
            return
        try:
            text = self._path.read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("endings-not-read", file=str(self._path), reason=error.strerror)
            return
        lines = text.splitlines()
        self._torn = not text.endswith("\n") and bool(text)
        now, unreadable = self._wall(), 0
        for line in lines:
            try:
                until, gateway, spi, *more = line.split()
                index = Index.parse(f"{gateway}/{spi}")
                epoch = int(more[0]) if more else 0
                self._until.pop(index, None)
                self._epochs.pop(index, None)
                if int(until) > now:
                    self._until[index] = int(until)
                    if epoch:
                        self._epochs[index] = epoch
            except (ValueError, StubError):
                # the last line of a host that lost its power, perhaps
                unreadable += 1
        self._lines = len(lines)
        self._compact_at = 2 * len(self._until) + COMPACT_LINES
        if unreadable:
            log.warning("endings-not-read", file=str(self._path), lines=unreadable)


def _save(path: Path, lines: Iterable[tuple[Index, int, int]], write: Callable[[Path, str], None]) -> None:
    write(path, "".join([_line(*line) for line in lines]))


def _line(index: Index, until: int, epoch: int) -> str:
    return f"{until} {index.gateway} {index.spi.hex()}{f' {epoch}' if epoch else ''}\n"
