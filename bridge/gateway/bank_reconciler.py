"""What a gateway does for the bank beside its own changes: it fetches the stubs of gateways that fail, puts back what a
Redis lost, and removes what neither side ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from typing import Any, Final

import structlog

from bridge.bank import failover_progress, gateway_facts
from bridge.bank.interface import BankUnavailable, Ending, StubBank
from bridge.bank.key_rotation import KeyRotation
from bridge.bank.keyspace import Event, Keyspace
from bridge.bank.prefetch import Prefetch
from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa
from bridge.charon.placeholders import ha_pools
from bridge.charon.vici_client import START_SECONDS
from bridge.charon.vici_types import ViciError
from bridge.config import GatewayConfig
from bridge.gateway.endings import Endings
from bridge.gateway.failover import Failover
from bridge.gateway.living import LivingSas
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.publisher import Publisher
from bridge.gateway.revocation import LockOut
from bridge.gateway.session_elsewhere import SessionElsewhere
from bridge.service.tasks import end, spawn
from bridge.stub import bank_keys
from bridge.stub.bank_keys import FETCH, GONE, HEARTBEAT, REVOKED_STAMP
from bridge.stub.stub import Index

log = structlog.get_logger()

FETCH_SECONDS: Final = 60.0
HEAR_SECONDS: Final = 2.0
"""within which this gateway receives its own event, where the bank sends keyspace events"""
COMPARE_SECONDS: Final = 30.0
"""between two comparisons with the bank that nothing gave cause for"""
COMPARE_PACE: Final = 100
"""a comparison that took t seconds of CPU time is followed by a pause of this many t"""
COMPARE_BUNDLE: Final = 512
LEARN_SECONDS: Final = 0.5
"""from an end in the bank to the look whether it is of an SA that is here: ends come in bundles"""
LEARN_PACE: Final = 20
"""a look at all SAs that took t seconds is followed by a pause of this many t"""
FACTS_LOOK_SECONDS: Final = 0.5
"""between two looks whether the connections have changed"""
STATS_SECONDS: Final = 1.0
STATS_TTL: Final = 60.0


class BankReconciler:
    """Runs from `start` to `close`, on the event loop. `address` is this gateway's in the index."""

    def __init__(
        self,
        config: GatewayConfig,
        url: str,
        bank: StubBank,
        prefetch: Prefetch,
        rotation: KeyRotation,
        charon: Charon,
        publisher: Publisher,
        endings: Endings,
        living: LivingSas,
        lock_out: LockOut,
        elsewhere: SessionElsewhere,
        failover: Failover,
        metrics: GatewayMetrics,
    ) -> None:
        self._failover = failover
        self._address = config.address
        self._bank = bank
        self._prefetch = prefetch
        self._rotation = rotation
        self._charon = charon
        self._publisher = publisher
        self._endings = endings
        self._living = living
        self._lock_out = lock_out
        self._elsewhere = elsewhere
        self._addresses = ({config.address} if config.address else set()) | set(config.takeover.addresses)
        self._shared = frozenset(config.takeover.addresses)
        self.on_takeover: Callable[[], None] = lambda: None
        """called when a gateway takes sessions at a shared address over"""
        self._assert_all = False
        self._gone_changed: set[bytes] = set()
        self._gone_news = asyncio.Event()
        self._metrics = metrics
        self._compare_now = asyncio.Event()
        self._fetch_heard = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.on_ending: Callable[[str], None] = lambda _: None
        """called with the tag of a bucket of any gateway in which a session ended"""
        gone = bank_keys.gone_pattern(None)
        moved = map(bank_keys.moved_pattern, self._addresses)
        taking = [bank_keys.posted_key(bank_keys.TAKEOVER_KIND, address) for address in sorted(self._shared)]
        patterns = (f"{HEARTBEAT}*", f"{FETCH}*", REVOKED_STAMP, gone, *moved, *taking)
        self._keyspace = Keyspace(url, patterns, self._event, self._on_state)
        prefetch.attach(self._keyspace)

    def start(self) -> None:
        """Begin."""
        self._keyspace.start()
        self._tasks = [
            spawn("compare", self._keep_compared()),
            spawn("keys", self._rotation.run()),
            spawn("stats", self._keep_stats()),
            spawn("facts", self._keep_facts()),
            spawn("endings", self._endings.keep()),
            spawn("ends", self._learn_endings()),
            spawn("lock-out", self._lock_out.run()),
        ]

    async def close(self) -> None:
        """End."""
        await end(*self._tasks)
        await self._keyspace.close()

    # events of the keyspace

    def _on_state(self, listening: bool) -> None:
        self._failover.disturbed()
        self._prefetch.on_state(listening)
        if listening:
            self.returned()
        else:
            self._bank.renew()

    def returned(self) -> None:
        """A bank was away, or is another one than before: it may lack what it had."""
        self._assert_all = True
        self._compare_now.set()
        self._lock_out.soon()
        self._rotation.returned()

    def _event(self, event: Event) -> None:
        self._prefetch.on_event(event)
        self._elsewhere.on_event(event)
        if event.key.startswith(FETCH) and event.event == "set":
            gateway = bank_keys.gateway_name(event.key.removeprefix(FETCH))
            if gateway is None:
                return
            if gateway != self._address:
                self._prefetch.fetch(gateway)
            self._fetch_heard.set()
        elif event.key.startswith(bank_keys.TAKEOVER):
            self.on_takeover()
        elif event.key == REVOKED_STAMP:
            self._lock_out.soon()
        elif event.key.startswith(GONE):
            self._gone(event)
        elif event.key.startswith(HEARTBEAT):
            gateway = bank_keys.gateway_name(event.key.removeprefix(HEARTBEAT))
            if gateway is not None:
                self._failover.heartbeat_event(gateway, event.event)
        else:
            self._failover.stub_event(event.key, event.event)

    def _gone(self, event: Event) -> None:
        """Something ended in a bucket of some gateway's."""
        named = bank_keys.read_tagged(event.key)
        if event.event != "zadd" or named is None:
            return
        self.on_ending(bank_keys.tag(*named))
        if self._address is None or named[0] in self._addresses:
            self._gone_changed.add(bytes.fromhex(named[1]))
            self._gone_news.set()

    async def fetch(self, request: dict[str, Any]) -> dict[str, Any]:
        """Control command: have all other gateways fetch the stubs of one.

        This one begins with that event, as they do: without keyspace events it would not learn either that a
        fetched stub has ended.
        """
        gateway = str(request["from"])
        self._prefetch.progress.pop(gateway, None)
        self._fetch_heard.clear()
        try:
            await self._bank.post(bank_keys.FETCH_KIND, gateway, str(int(time.time())), FETCH_SECONDS)
        except BankUnavailable as error:
            return {"error": f"{error}; see `ike-sa-sync check`"}
        try:
            async with asyncio.timeout(HEAR_SECONDS):
                await self._fetch_heard.wait()
        except TimeoutError:
            return {"error": "no keyspace events of the bank arrive here: is notify-keyspace-events Kg$hzxe set?"}
        return await self.progress(request)

    async def progress(self, request: dict[str, Any]) -> dict[str, Any]:
        """Control command: how far the download from one gateway is here."""
        progress = self._prefetch.progress.get(str(request["from"]))
        if progress is None:
            return {"gateway": request["from"], "state": "own", "stubs": 0, "seconds": 0.0}
        return {
            "gateway": progress.gateway,
            "state": progress.state,
            "stubs": progress.stubs,
            "seconds": round(progress.seconds, 3),
        }

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
        for address in {sa.published_at for sa in every if sa.published_at} - self._addresses:
            # a client came by the address of the other family
            await self._keyspace.add(bank_keys.moved_pattern(address))
            self._addresses.add(address)
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
                Ending(stub.index, stub.expires)
                for stub in unknown
                if stub.index.spi not in listed and stub.established > started + START_SECONDS
            ]
        if over:
            deleted = sum(await self._bank.delete(over))
            log.info("stubs-of-ended-sas-deleted", stubs=deleted)
        return not ending

    # for monitors

    async def _keep_stats(self) -> None:
        while True:
            if self._address is not None:
                counters = {
                    name: value
                    for name, value in self._metrics.values().items()
                    if name.startswith(("resumptions", "refusals", "ike_sas", "unconfirmed", "duplicate", "sessions"))
                }
                with contextlib.suppress(BankUnavailable):
                    await self._bank.post(bank_keys.STATS_KIND, self._address, json.dumps(counters), STATS_TTL)
                    if failures := self._failover.progress():
                        text = failover_progress.encode(failures)
                        await self._bank.post(bank_keys.FAILOVERS_KIND, self._address, text, STATS_TTL)
            await asyncio.sleep(STATS_SECONDS)

    async def _keep_facts(self) -> None:
        """Post this gateway's facts again and again, and immediately when its connections change: another gateway that
        is drained to this one decides by them."""
        await self._charon.reconciled.wait()
        posted: tuple[dict[str, list[str]], list[str]] | None = None
        due = 0.0
        while True:
            connections = {
                name: [child.name for child in info.children] for name, info in self._charon.tracker.connections.items()
            }
            # sessions at a shared address are at whichever gateway has it
            addresses = sorted(self._publisher.addresses - {self._address} - self._shared)[
                : gateway_facts.ADDRESSES_MAX
            ]
            now = connections, addresses
            if self._address is not None and (now != posted or time.monotonic() >= due):
                try:
                    pools = await self._charon.vici.pools() + [pool.range for pool in await asyncio.to_thread(ha_pools)]
                    facts = gateway_facts.Facts(connections, pools, addresses)
                    text = gateway_facts.encode(facts)
                    await self._bank.post(bank_keys.FACTS_KIND, self._address, text, gateway_facts.TTL)
                except (BankUnavailable, ViciError):
                    posted = None
                else:
                    posted, due = now, time.monotonic() + gateway_facts.SECONDS
            await asyncio.sleep(FACTS_LOOK_SECONDS)
