"""No session in two places: IKE_SAs of this gateway whose session went on at another one are ended here.

The gateway where a session goes on leaves a mark in the bank, sealed with the bank's key, so that no process without
that key can have a session ended. A keyspace event reports a mark immediately; without events, the comparison with the
bank finds the session.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import structlog

from bridge.bank.interface import BankUnavailable, StubBank
from bridge.bank.keyspace import Event
from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ike_sa import IkeSa
from bridge.gateway.metrics import GatewayMetrics
from bridge.service.tasks import end, spawn
from bridge.stub import bank_keys
from bridge.stub.stub import Index

log = structlog.get_logger()

SUSPECTED_MAX: Final = 200_000
"""indexes that wait to be looked up; the comparison with the bank finds those beyond"""
PACE: Final = 20
"""a look at all SAs that took t seconds is followed by a pause of this many t"""

Ended = Callable[[bool], None]
"""called with whether charon does not have an SA any more"""


async def _nothing(_: IkeSa, __: Index) -> None:
    """Nothing is to be done before an SA is ended."""


class SessionElsewhere:
    """Ends what went on elsewhere; `run` is a task. `rekeyed` gives the indexes that clients may resume from after a
    rekey, each with both SPIs of the new SA."""

    def __init__(
        self,
        charon: Charon,
        bank: StubBank,
        metrics: GatewayMetrics,
        *,
        rekeyed: Callable[[], Iterable[tuple[Index, bytes]]] = tuple,
    ) -> None:
        self._charon = charon
        self._bank = bank
        self._metrics = metrics
        self.before_end: Callable[[IkeSa, Index], Awaitable[None]] = _nothing
        """called with an SA and what its session goes on as, before the SA is ended"""
        self.charon_answers: Callable[[], bool] = lambda: True
        self.not_asked: Callable[[IkeSa], None] = lambda _: None
        """called with an SA that is to be ended, of a charon that is gone or does not answer"""
        self._rekeyed = rekeyed
        self._suspected: set[Index] = set()
        self._ending: dict[bytes, list[Ended]] = {}
        """what waits for the end of an SA, by both SPIs"""
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False
        self._wake = asyncio.Event()

    def on_event(self, event: Event) -> None:
        """Something happened to a key of the bank."""
        if event.event != "set":
            return
        named = bank_keys.read_moved_key(event.key)
        if named is not None:
            self._suspect(Index(*named))

    def suspect(self, sas: Iterable[IkeSa]) -> None:
        """The bank says that the sessions of these ended; that alone proves nothing."""
        for sa in sas:
            if sa.published is not None:
                self._suspect(sa.published)

    def suspect_rekeyed(self) -> None:
        """Look whether a client went on elsewhere from what it had before a rekey."""
        for index, _ in self._rekeyed():
            self._suspect(index)

    def _suspect(self, index: Index) -> None:
        if len(self._suspected) < SUSPECTED_MAX:
            self._suspected.add(index)
            self._wake.set()

    async def run(self) -> None:
        """Look up what is suspected, and end what went on elsewhere; until it is cancelled, and no end is begun after
        that."""
        try:
            await self._run()
        finally:
            self._stopped = True
            await end(*self._tasks)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            began = time.monotonic()
            found = self._found()
            took = time.monotonic() - began
            try:
                moved = await self._bank.moved([index for index, _ in found]) if found else []
            except BankUnavailable as error:
                log.info(error.event, component="moves", reason=str(error))
                moved = []
            for (_, sa), new in zip(found, moved, strict=False):
                if new:
                    self.end(sa, new)
            await asyncio.sleep(took * PACE)

    def _found(self) -> list[tuple[Index, IkeSa]]:
        """The SAs of this gateway that are suspected now, each with the index that is: its own, or that of the SA which
        was rekeyed to it."""
        suspected, self._suspected = self._suspected, set()
        spis = {index.spi for index in suspected}
        found = [
            (index, sa)
            for sa in self._charon.tracker.established()
            if sa.local_spi in spis
            and (index := sa.published) is not None
            and index in suspected
            and sa.id.spis not in self._ending
        ]
        heirs = [(index, self._charon.tracker.sas.get(heir)) for index, heir in self._rekeyed() if index in suspected]
        return found + [
            (index, sa) for index, sa in heirs if sa is not None and sa.up and sa.id.spis not in self._ending
        ]

    def end(self, sa: IkeSa, new: Index, ended: Ended | None = None) -> None:
        """Begin to end an SA whose session goes on as `new`, as its mark says; `ended` is called once charon was asked,
        or could not be."""
        spis = sa.id.spis
        waiting = [ended] if ended is not None else []
        if self._stopped:
            return
        if spis in self._ending:
            self._ending[spis] += waiting
            return
        self._ending[spis] = waiting
        task = spawn("end-moved-away", self._end(sa, new))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end(self, sa: IkeSa, new: Index) -> None:
        done = False
        try:
            done = await self._end_here(sa, new)
        finally:
            for ended in self._ending.pop(sa.id.spis):
                ended(done)

    async def _end_here(self, sa: IkeSa, new: Index) -> bool:
        """Whether charon does not have it any more."""
        if self._charon.tracker.sas.get(sa.id.spis) is not sa:
            return True
        try:
            await self.before_end(sa, new)
            if not self.charon_answers():
                self.not_asked(sa)
            await self._charon.end_surely(sa)
        except ChannelError as error:
            # the next comparison finds it again
            log.warning("old-sa-not-removed", reason=str(error), **sa.id.logged)
            self._metrics.moved_away_failures.inc()
            return False
        self._metrics.moved_away.inc()
        log.info(
            "session-moved-away",
            connection=sa.connection,
            identity=sa.remote_id.text if sa.remote_id else "",
            to=new.gateway,
            **sa.id.logged,
        )
        return True
