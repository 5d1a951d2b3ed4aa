"""The bank compared with charon: a gateway puts back what a Redis lost, removes what neither side ended, and learns of
the ends that it took no part in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from bridge.bank.interface import BankUnavailable, Ending, StubBank
from bridge.bank.keyspace import Event
from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_client import START_SECONDS
from bridge.charon.vici_types import ViciError
from bridge.config import GatewayConfig
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.publisher import Publisher
from bridge.gateway.session_elsewhere import SessionElsewhere
from bridge.service.tasks import end, spawn
from bridge.stub import bank_keys
from bridge.stub.stub import Index

log = structlog.get_logger()

COMPARE_SECONDS: Final = 30.0
"""between two comparisons with the bank that nothing gave cause for"""
COMPARE_PACE: Final = 100
"""a comparison that took t seconds of CPU time is followed by a pause of this many t"""
COMPARE_BUNDLE: Final = 512
LEARN_SECONDS: Final = 0.5
"""from an end in the bank to the look whether it is of an SA that is here: ends come in bundles"""
LEARN_PACE: Final = 20
"""a look at all SAs that took t seconds is followed by a pause of this many t"""


async def _no_address(_: str) -> None:
    """No part has to know."""


class BankReconciler:
    """Runs from `start` to `close`, on the event loop."""

    def __init__(
        self,
        config: GatewayConfig,
        bank: StubBank,
        charon: Charon,
        publisher: Publisher,
        known: KnownSessions,
        elsewhere: SessionElsewhere,
    ) -> None:
        self._address = config.address
        self._bank = bank
        self._charon = charon
        self._publisher = publisher
        self._endings = known.endings
        self._living = known.living
        self._elsewhere = elsewhere
        self.addresses = ({config.address} if config.address else set()) | set(config.takeover.addresses)
        """this gateway's in the index"""
        self._shared = frozenset(config.takeover.addresses)
        self.on_address: Callable[[str], Awaitable[None]] = _no_address
        """called with another one of them: a client came by the address of the other family"""
        self.on_ending: Callable[[str], None] = lambda _: None
        """called with the tag of a bucket of any gateway in which a session ended"""
        self._assert_all = False
        self._new_addresses: asyncio.Queue[str] = asyncio.Queue()
        publisher.on_address = self.at_address
        self._gone_changed: set[bytes] = set()
        self._gone_news = asyncio.Event()
        self._compare_now = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin."""
        self._tasks = [
            spawn("compare", self._keep_compared()),
            spawn("ends", self._learn_endings()),
            spawn("addresses", self._name_addresses()),
        ]

    async def close(self) -> None:
        """End."""
        await end(*self._tasks)

    def at_address(self, address: str) -> None:
        """This gateway has a session at this address of its own."""
        if address not in self.addresses:
            self.addresses.add(address)
            self._new_addresses.put_nowait(address)

    async def _name_addresses(self) -> None:
        while True:
            await self.on_address(await self._new_addresses.get())

    def returned(self) -> None:
        """A bank was away, or is another one than before: it may lack what it had."""
        self._assert_all = True
        self._compare_now.set()

    def gone_event(self, event: Event) -> None:
        """Something ended in a bucket of some gateway's."""
        named = bank_keys.read_tagged(event.key)
        if event.event != "zadd" or named is None:
            return
        self.on_ending(bank_keys.tag(*named))
        if self._address is None or named[0] in self.addresses:
            self._gone_changed.add(bytes.fromhex(named[1]))
            self._gone_news.set()

    # comparing the bank with charon

    async def _keep_compared(self) -> None:
        await self._charon.reconciled.wait()
        swept = False
        while True:
            self._compare_now.clear()
            worked = time.thread_time()
            try:
                # ends before stubs: no request shall find a stub whose end is known here
                await self._assert_endings()
                await self._refill()
                self._elsewhere.suspect_rekeyed()
                await self._living.forget_ended()
                swept = swept or await self._sweep()
            except (BankUnavailable, ViciError) as error:
                log.debug("comparison-delayed", reason=str(error))
                await asyncio.sleep(0.2)
                continue
            # of this thread: how long a bank took to answer says nothing of what a comparison costs
            worked = time.thread_time() - worked
            try:
                async with asyncio.timeout(max(COMPARE_SECONDS, worked * COMPARE_PACE)):
                    await self._compare_now.wait()
            except TimeoutError:
                pass

    async def _refill(self) -> None:
        """Store again what the bank lacks: a Redis without its data, or a replica that was behind when it took over."""
        every = [sa for sa in self._charon.tracker.established() if sa.resumable and sa.revision]
        # those that were recovered were not published since the start
        for address in {sa.published_at for sa in every if sa.published_at}:
            self.at_address(address)
        sas = [sa for sa in every if self._index(sa) not in self._endings]
        self._elsewhere.suspect(sa for sa in every if self._index(sa) in self._endings)
        refilled = 0
        for first in range(0, len(sas), COMPARE_BUNDLE):
            bundle = sas[first : first + COMPARE_BUNDLE]
            seen = [sa.revision for sa in bundle]
            revisions = await self._bank.revisions([self._index(sa) for sa in bundle])
            behind = [
                sa
                for sa, ours, theirs in zip(bundle, seen, revisions, strict=True)
                if theirs is not None and theirs < ours == sa.revision
            ]
            if behind:
                ended = await self._bank.ended([self._index(sa) for sa in behind])
                for sa, over in zip(behind, ended, strict=True):
                    if over:
                        # it went on at another gateway; charon has yet to notice
                        self._learned(sa)
                    elif over is False and self._charon.tracker.sas.get(sa.id.spis) is sa:
                        self._publisher.publish(sa)
                        refilled += 1
            await asyncio.sleep(0)
        if refilled:
            log.warning("bank-refilled", stubs=refilled, of=len(sas), reason="the bank did not have them")

    async def _assert_endings(self) -> None:
        """Delete again what ended, where a bank may have forgotten it: one that was away, or one that lacks what ended
        last, for it was started from an older file, or a replica took over that was behind."""
        latest = self._endings.latest(COMPARE_BUNDLE)
        everything, self._assert_all = self._assert_all, False
        if not everything and latest:
            everything = not all(await self._bank.ended(latest))
        if not everything:
            return
        # without its epoch nothing says whether another gateway has taken a session over since
        ends = [end for end in self._endings.all() if end.epoch or end.index.gateway not in self._shared]
        try:
            for first in range(0, len(ends), COMPARE_BUNDLE):
                await self._bank.delete(ends[first : first + COMPARE_BUNDLE])
        except BankUnavailable:
            self._assert_all = True
            raise
        if ends:
            log.info("endings-repeated", sessions=len(ends))

    async def _learn_endings(self) -> None:
        """Learn from the bank which sessions of this gateway ended or went on elsewhere while charon still has their
        SAs: they are never published again, whatever the bank forgets."""
        await self._charon.reconciled.wait()
        while True:
            await self._gone_news.wait()
            await asyncio.sleep(LEARN_SECONDS)
            self._gone_news.clear()
            changed, self._gone_changed = self._gone_changed, set()
            began = time.monotonic()
            sas = [
                sa
                for sa in self._charon.tracker.established()
                if sa.local_spi[:1] in changed and self._index(sa) not in self._endings
            ]
            took = time.monotonic() - began
            try:
                for first in range(0, len(sas), COMPARE_BUNDLE):
                    bundle = sas[first : first + COMPARE_BUNDLE]
                    for sa, over in zip(
                        bundle, await self._bank.ended([self._index(sa) for sa in bundle]), strict=True
                    ):
                        if over:
                            self._learned(sa)
            except BankUnavailable as error:
                # its return is news, and has all compared
                log.debug(error.event, component="endings", reason=str(error))
            # while many sessions move away, this does not look at all SAs all the time
            await asyncio.sleep(took * LEARN_PACE)

    def _learned(self, sa: IkeSa) -> None:
        epoch = sa.derivation.epoch if sa.derivation is not None else 0
        self._endings.add(self._index(sa), max(sa.stub_expires, sa.expires), epoch)
        self._elsewhere.suspect([sa])

    def _index(self, sa: IkeSa) -> Index:
        return sa.index_here(self._address)

    async def _sweep(self) -> bool:
        """Delete the stubs of SAs that ended while no sidecar ran: charon has run since before they were set up, and
        does not have them. Those of a charon before it stay: their clients may resume. Once, at start; False while
        charon lists an SA that is not known here and has a stub, for no event would report the end of that one."""
        if self._address is None or not self._charon.vici.connected:
            return False
        started = await self._charon.vici.started()
        # those whose keys are still missing here are in this list only
        listed: set[bytes] = set()
        await self._charon.vici.each_sas(
            # one that waits to be deleted has ended
            lambda infos: listed.update(
                [info.spi_i if info.initiator else info.spi_r for info in infos if info.state != "DELETING"]
            )
        )
        over: list[Ending] = []
        ending = 0
        async for stubs in self._bank.download(self._address):
            known = {self._index(sa) for sa in self._charon.tracker.established()}
            unknown = [stub for stub in stubs if stub.index not in known]
            ending += sum(stub.index.spi in listed for stub in unknown)
            over += [
                Ending(stub.index, stub.expires, stub.derivation.epoch if stub.derivation is not None else 0)
                for stub in unknown
                if stub.index.spi not in listed and stub.established > started + START_SECONDS
            ]
        for one in over:
            # a replica that was behind and takes over still has the stub
            self._endings.add(one.index, one.expires, one.epoch)
        if over:
            deleted = sum(await self._bank.delete(over))
            log.info("stubs-of-ended-sas-deleted", stubs=deleted)
        return not ending
