"""charon's HA pools give out no address that a session of any gateway has: placeholders keep those in use elsewhere.

    charon starts, and gives out no address
    the sessions with an address of its pools are looked up in the bank, all by one look-up
    a placeholder is put for each that has no IKE_SA here; then charon gives out addresses
    every COMPARE_SECONDS, and when a session ends, what changed is put and taken away

The bank's index is a hint that may come late: what slips through, bridge.gateway.duplicates finds.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from bridge.bank.interface import BankUnavailable
from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import HaError
from bridge.charon.ha_segments import SEGMENTS_MIN, keeping_segment
from bridge.charon.ike_sa import IkeSa
from bridge.charon.placeholders import HaPool, ha_pools
from bridge.charon.vici_types import ViciError
from bridge.gateway.address_book import AddressBook
from bridge.service.metrics import Metrics
from bridge.service.tasks import end, spawn
from bridge.stub.stub import Index, Stub

log = structlog.get_logger()

TICK_SECONDS: Final = 0.1
"""between two looks whether there is something to do"""
COMPARE_SECONDS: Final = 30.0
"""between two comparisons of all placeholders with the bank"""
BANK_PATIENCE: Final = 10.0
"""seconds that a charon without addresses waits for the bank: without an address no handshake of a client succeeds"""
HANDSHAKE_PATIENCE: Final = 5.0
"""seconds that a segment with a handshake in progress is left inactive, where its activation would only end that"""
OWN_HANDSHAKES_SECONDS: Final = 2.0
"""that charon begins handshakes itself for (start_action), once connections are loaded: `swanctl --load-all` goes on
after the first one"""
HANDSHAKE_LOOK_SECONDS: Final = 0.5
"""between two looks whether such handshakes are over"""
HOLD_SECONDS: Final = 12.0
"""that requests which begin a handshake wait for a charon that was started to assign addresses: without one it would
refuse them, and their clients keep an IKE_SA without a CHILD_SA"""
STARTED_SECONDS: Final = 5.0
"""after its start, in which charon counts as just started"""
STUB_SECONDS: Final = 60.0
"""that the stub of a session that went on elsewhere may come later than the mark of its move: two queues bring them"""
STUB_LOOK_SECONDS: Final = 1.0
"""between two looks for that stub"""
RESERVE_AFTER: Final = (0.0, 0.005, 0.02, 0.1, 0.5)
"""seconds, each after the one before, after which an address is reserved again that an SA released"""


class AddressKeeper:
    """Keeps one charon's addresses from `run` on. At most `limit` placeholders."""

    def __init__(
        self,
        charon: Charon,
        book: AddressBook,
        *,
        limit: int,
        pools: Callable[[], list[HaPool]] = ha_pools,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.pools: list[HaPool] = []
        self.missing = 0
        """addresses in use elsewhere that no placeholder keeps: beyond `limit`, or of a connection that is not here"""
        self.settled = asyncio.Event()
        """set while charon gives out addresses, or has no HA pool"""
        self._charon = charon
        self._book = book
        self._limit = limit
        self._read_pools = pools
        self._clock = clock
        self._wall = wall
        self._holding: asyncio.Task[None] | None = None
        self._sessions: dict[str, Index] = {}
        """whose session each placeholder stands for"""
        self._moved: dict[str, float] = {}
        """addresses whose session went on elsewhere, and until when its stub may still be on the way"""
        self._waits_since: float | None = None
        self._compare_at = 0.0
        self._opened_at = 0.0
        self._activate_at = 0.0
        self._released: dict[str, float] = {}
        """addresses to look at, and when"""
        self._ended_tags: set[str] = set()
        """of indexes whose sessions ended since the last step"""
        if charon.landing.count >= SEGMENTS_MIN and pools():
            charon.landing.spared = keeping_segment(charon.landing.count)

    def gauges(self, metrics: Metrics) -> None:
        """How many addresses are kept, for `status`."""
        kept = self._charon.placeholders
        metrics.gauge(
            "placeholders", "addresses in use elsewhere that charon is kept from giving out", lambda: float(len(kept))
        )
        metrics.gauge(
            "placeholders_missing",
            "addresses in use elsewhere that charon could give out: beyond ha.placeholders, or of unknown connections",
            lambda: self.missing,
        )

    # what happens

    def gone(self, sa: IkeSa) -> None:
        """An SA ended, and released its addresses: others may have them."""
        now = self._clock()
        addresses = [address for address in sa.remote_vips if self._ours(address)]
        self._released.update(dict.fromkeys(addresses, now))
        if any(address in self._charon.placeholders or self._is_here(address) for address in addresses):
            spawn("addresses-reserved-again", self._reserve_again(addresses))

    async def _reserve_again(self, addresses: Sequence[str]) -> None:
        """Immediately, for the next handshake would get one of them, and a little later: charon reports the end of an
        SA before it releases the address."""
        for seconds in RESERVE_AFTER:
            await asyncio.sleep(seconds)
            try:
                await self._charon.reserve_again(addresses)
            except ChannelError as error:
                log.warning("placeholder-not-restored", reason=str(error))
                return

    def taken(self, sa: IkeSa) -> None:
        """A session came here: its SA has what placeholders kept."""
        kept = [a for a in sa.remote_vips if a in self._charon.placeholders or a in self._sessions]
        if kept:
            spawn("address-taken-over", self._hand_over(kept))

    async def _hand_over(self, addresses: Sequence[str]) -> None:
        try:
            await self._charon.placeholders.hand_over(addresses)
        except ChannelError as error:
            log.warning("placeholder-not-removed", reason=str(error))
        for address in addresses:
            self._sessions.pop(address, None)
            self._moved.pop(address, None)

    async def keep(self, sa: IkeSa, other: Index | None = None) -> None:
        """Before `sa` is ended: its addresses belong to a session elsewhere, that of `other` if it is known."""
        placeholders = self._charon.placeholders
        addresses = [address for address in sa.remote_vips if self._ours(address)]
        room = max(self._limit - len(placeholders), 0)
        addresses = [address for address in addresses if address in placeholders] + [
            address for address in addresses if address not in placeholders
        ][:room]
        if not addresses or not placeholders.opened:
            return
        with contextlib.suppress(ChannelError, HaError):
            await placeholders.put(dict.fromkeys(addresses, sa.connection), self._clock())
        if other is not None:
            self._sessions.update(dict.fromkeys(addresses, other))
            self._moved.update(dict.fromkeys(addresses, self._clock() + STUB_SECONDS))

    def ended(self, tag: str) -> None:
        """Sessions ended in the bank whose indexes have this tag. In a storm these are many: the placeholders are gone
        through once for all of them."""
        self._ended_tags.add(tag)

    def _ours(self, address: str) -> bool:
        return any(pool.has(address) for pool in self.pools)

    def charon_connected(self) -> None:
        """charon is there, perhaps another one than before."""
        if self._charon.placeholders.opened:
            return
        self.settled.clear()
        if self._holding is None or self._holding.done():
            self._holding = spawn("handshakes-wait", self._hold_handshakes())

    # what is done

    async def _hold_handshakes(self) -> None:
        """Hold back what begins a handshake until a charon that was just started assigns addresses, and gets it then.
        One that has run for longer assigns some already."""
        charon = self._charon
        if not await asyncio.to_thread(self._read_pools):
            return
        with contextlib.suppress(TimeoutError, ViciError):
            async with asyncio.timeout(HOLD_SECONDS):
                if self._wall() - await charon.vici.started() > STARTED_SECONDS:
                    return
                hold = charon.handshakes.hold
                while not hold.can_hold():  # noqa: ASYNC110 - rules have no event
                    await asyncio.sleep(TICK_SECONDS)
                with hold.holding() as holds:
                    holds()
                    log.info("handshakes-wait", reason="charon was started, and assigns no addresses yet")
                    await self.settled.wait()

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                try:
                    await self.step()
                except (BankUnavailable, ChannelError, HaError) as error:
                    log.debug("address-check-delayed", reason=str(error))
                await asyncio.sleep(TICK_SECONDS)
        finally:
            if self._holding is not None:
                await end(self._holding)

    async def step(self) -> None:
        """Do what is due. Raises BankUnavailable, ChannelError, HaError."""
        charon, placeholders, now = self._charon, self._charon.placeholders, self._clock()
        if self._ended_tags:
            tags, self._ended_tags = self._ended_tags, set()
            self._released.update({address: now for address, index in self._sessions.items() if index.tag in tags})
        due = [address for address, when in self._released.items() if when <= now]
        activate = bool(placeholders.inactive and self.pools) and now >= self._activate_at
        compare = bool(self.pools) and now >= self._compare_at
        # whether charon is there is asked of the kernel, so that comes last
        if not (due or activate or compare or not placeholders.opened) or not charon.ready():
            return
        if not charon.tracker.connections or not charon.reconciled.is_set():
            return
        if not placeholders.opened:
            await self._open()
            return
        if activate:
            await self._activate()
        if due:
            await self._look_again(due, now)
        if compare:
            self._compare_at = now + COMPARE_SECONDS
            await self._compare(await self._elsewhere(self.pools))

    async def _open(self) -> None:
        """Have a charon that was started give out addresses."""
        self.settled.clear()
        self.pools = await asyncio.to_thread(self._read_pools)
        if not self.pools:
            self._charon.placeholders.opened = True
            self.settled.set()
            return
        if self._charon.landing.count >= SEGMENTS_MIN:
            await self._compare(await self._elsewhere_or_nothing())
        else:
            log.error("address-assignment-unprotected", reason="charon has one segment", fix="ha.segments: 16")
        if self._charon.handshakes.ends:
            await self._all_loaded()
        await self._open_keeping(self._clock())
        self._opened_at = self._clock()
        self._compare_at = self._opened_at + COMPARE_SECONDS
        await self._activate()
        self.settled.set()
        log.info(
            "address-assignment-started", pools=[pool.text for pool in self.pools], kept=len(self._charon.placeholders)
        )

    async def _all_loaded(self) -> None:
        """Wait until charon has no more connections than a moment before: they are loaded one after the other."""
        tracker = self._charon.tracker
        before = None
        while tracker.connections != before:
            before = tracker.connections
            await asyncio.sleep(TICK_SECONDS)
            await self._charon.read_connections()

    async def _open_keeping(self, began: float) -> None:
        """Have the keeping segment activated, once it has no handshake in progress that this would end."""
        charon = self._charon
        while True:
            async with charon.handshakes.known() as holds:
                spared = self._to_spare(began) if charon.handshakes.ends else set()
                if holds() and keeping_segment(charon.landing.count) not in spared:
                    await charon.placeholders.open()
                    return
            await asyncio.sleep(TICK_SECONDS)

    async def _activate(self) -> None:
        """Activate segments without a handshake in progress."""
        async with self._charon.handshakes.known() as holds:
            spared = self._to_spare(self._opened_at)
            if holds():
                await self._charon.placeholders.activate(set(range(1, self._charon.landing.count + 1)) - spared)
        self._activate_at = self._clock() + HANDSHAKE_LOOK_SECONDS

    def _to_spare(self, since: float) -> set[int]:
        """The segments with a handshake in progress: strongSwan 6 ends those, for which they are not spared for long,
        and 6.0.1 crashes at them. And those in which charon may just be about to begin one itself."""
        now, landing = self._clock(), self._charon.landing
        wait = landing.crashes or now - since < HANDSHAKE_PATIENCE
        spared = landing.with_handshakes(now) if wait else set()
        if self._charon.handshakes.ends and now - since < OWN_HANDSHAKES_SECONDS:
            spared |= landing.with_peers()
        return spared

    async def _elsewhere_or_nothing(self) -> dict[str, Stub]:
        """Raises BankUnavailable until charon has waited for long enough."""
        now = self._clock()
        if self._waits_since is None:
            self._waits_since = now
        try:
            found = await self._elsewhere(self.pools)
        except BankUnavailable as error:
            if now - self._waits_since < BANK_PATIENCE:
                raise
            log.error("address-assignment-unprotected", reason=str(error), fix="see `ike-sa-sync check`: bank")
            found = {}
        self._waits_since = None
        return found

    async def _elsewhere(self, pools: Sequence[HaPool]) -> dict[str, Stub]:
        """The sessions with an address of the pools whose SA is not here."""
        holders = await self._book.holders([(pool.first, pool.last) for pool in pools])
        return {address: stub for address, stub in holders if self._is_elsewhere(address)}

    def _is_elsewhere(self, address: str) -> bool:
        return self._ours(address) and not self._is_here(address)

    def _is_here(self, address: str) -> bool:
        """Whether an SA here has it for good: one that was rebuilt and is not confirmed may be removed again."""
        tracker = self._charon.tracker
        holders = [tracker.sas.get(spis) for spis in tracker.virtual_ips.holders([address])]
        return any(sa is None or sa.up for sa in holders)

    async def _look_again(self, addresses: Sequence[str], now: float) -> None:
        """Some addresses were released here, or their sessions ended elsewhere."""
        holders = dict(await self._book.holders([(address, address) for address in addresses]))
        elsewhere = {address: stub for address, stub in holders.items() if self._is_elsewhere(address)}
        await self._put(elsewhere)
        await self._release([a for a in addresses if a not in holders and a in self._charon.placeholders], now)
        for address in addresses:
            if self._released[address] <= now:
                del self._released[address]

    async def _compare(self, elsewhere: dict[str, Stub]) -> None:
        placeholders = self._charon.placeholders
        here = [a for a in placeholders.addresses if self._is_here(a)]
        await placeholders.hand_over(here)
        await self._release([a for a in placeholders.addresses if a not in elsewhere], self._clock())
        await self._put(elsewhere)

    async def _put(self, elsewhere: dict[str, Stub]) -> None:
        placeholders, connections = self._charon.placeholders, self._charon.tracker.connections
        wanted = {a: stub for a, stub in elsewhere.items() if stub.connection in connections}
        new = [address for address in wanted if address not in placeholders]
        room = max(self._limit - len(placeholders), 0)
        missing = len(elsewhere) - len(wanted) + max(len(new) - room, 0)
        if missing and not self.missing:
            log.error("placeholders-missing", count=missing, limit=self._limit, fix="raise ha.placeholders")
        self.missing = missing
        await placeholders.put({a: wanted[a].connection for a in new[:room]}, self._clock())
        self._sessions.update((a, stub.index) for a, stub in wanted.items() if a in placeholders)

    async def _release(self, addresses: Sequence[str], now: float) -> None:
        """Let go of addresses that no session in the bank has, but for those whose session has just moved away."""
        self._moved = {address: until for address, until in self._moved.items() if until > now}
        moved = {address: self._sessions[address] for address in addresses if address in self._moved}
        live = await self._book.not_over(list(dict.fromkeys(moved.values())))
        over = [address for address in addresses if moved.get(address) not in live]
        await self._charon.placeholders.release(over)
        for address in over:
            self._sessions.pop(address, None)
            self._moved.pop(address, None)
        self._released.update(dict.fromkeys(set(addresses).difference(over), now + STUB_LOOK_SECONDS))
