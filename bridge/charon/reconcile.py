"""The sidecar's picture of charon, kept in step with what VICI lists: connections and IKE_SAs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import structlog

from bridge.charon.connection_reader import ConnectionReader
from bridge.charon.ha_channel import ChannelError, HaChannel
from bridge.charon.ha_message import IkeId
from bridge.charon.ha_segments import SegmentChooser
from bridge.charon.handshake_list import HALF_OPEN_STATES
from bridge.charon.ike_sa import IkeSa
from bridge.charon.installer import Installer
from bridge.charon.placeholders import Placeholders
from bridge.charon.sa_comparison import Comparison, Unreported
from bridge.charon.sa_tracker import WORD_SECONDS, SaTracker
from bridge.charon.vici_types import SaInfo, ViciError
from bridge.charon.vici_watch import ViciWatch

log = structlog.get_logger()

DELETING_SECONDS = 1.0
"""from a request of charon's own to the look whether it is a DELETE: most are answered by then"""
OWN_REQUESTS_SECONDS = 5.0
"""between two such looks, at least: DPD sends requests all the time"""
RESUMED_SECONDS = 3.0
"""from the first of some resumptions to the comparison that they share: a list of all SAs, for little that is new"""
RECONCILE_SECONDS = 30.0
"""between two comparisons with VICI's list, at least"""
RECONCILE_SHARE = 100
"""a comparison that took t seconds is followed by a pause of this many t, for list-sas walks all SAs"""
LEAST_PAUSE_SECONDS = 0.2
"""between two comparisons"""
UNLOADED_SECONDS = 0.5
"""between two looks for connections that charon did not have yet"""
IN_FLIGHT_SECONDS = 0.5
"""what VICI lists may still be on its way over the HA channel for so long"""
REKEYS_AT_ONCE = 64
"""CHILD_SAs that charon is asked to rekey after one comparison, for it looks through all IKE_SAs for each"""

PASSIVE = "PASSIVE"
"""the state of an IKE_SA that was installed and not activated"""

Recover = Callable[[list[SaInfo]], Awaitable[list[IkeSa] | None]]
"""the SAs of a list whose keys are known elsewhere; None where that cannot be found out now"""


async def no_recovery(_: list[SaInfo]) -> list[IkeSa]:
    """Recover where no keys are known from elsewhere."""
    return []


class Reconciler:
    """Compares a tracker with its charon, again and again, and whenever `soon` was called. `swanctl`: the swanctl.conf
    that charon was loaded from, None where swanctl looks for it."""

    def __init__(
        self,
        tracker: SaTracker,
        channel: HaChannel,
        segments: SegmentChooser,
        installer: Installer,
        vici: ViciWatch,
        placeholders: Placeholders,
        swanctl: Path | None = None,
    ) -> None:
        self.connections = ConnectionReader(tracker, vici, swanctl)
        self.reconciled = asyncio.Event()
        """set once the SAs that charon had when the sidecar came are known"""
        self.recover: Recover = no_recovery
        self.listing_took = 0.0
        """seconds that the last list of all SAs took"""
        self._tracker = tracker
        self._channel = channel
        self._segments = segments
        self._installer = installer
        self._vici = vici
        self._placeholders = placeholders
        self._whole = True
        """whether the next comparison is about connections too, however lately they were read"""
        self._sas_asked = False
        self._inode: int | None = None
        self._asked: set[bytes] = set()
        self._strays: set[bytes] = set()
        self._unreported: set[Unreported] = set()
        """the CHILD_SAs that were not known at the last comparison"""
        self._rekeyed: set[tuple[bytes, str]] = set()
        """both SPIs of IKE_SAs, and names of CHILD_SAs of theirs, that charon was asked to rekey"""
        self._due = asyncio.Event()
        self._own_request_at: float | None = None
        """when the list is looked at for charon's own requests, if any"""
        self._own_request_looked = float("-inf")
        self._waited = 0.0

    def soon(self) -> None:
        """Compare as soon as the pace allows."""
        self._whole = True
        self._due.set()

    def sas_soon(self) -> None:
        """Compare the SAs in RESUMED_SECONDS, for all that asked for it until then: VICI knows more of a rebuilt SA."""
        if not self._sas_asked:
            self._sas_asked = True
            asyncio.get_running_loop().call_later(RESUMED_SECONDS, self._due.set)

    def own_request(self) -> None:
        """charon sent a request of its own. It may be a DELETE, which only the list shows until it is answered."""
        if self._own_request_at is not None:
            return
        now = time.monotonic()
        delay = max(DELETING_SECONDS, self._own_request_looked + OWN_REQUESTS_SECONDS - now)
        self._own_request_at = now + delay
        asyncio.get_running_loop().call_later(delay, self._look_at_own_requests)

    def _look_at_own_requests(self) -> None:
        self._own_request_looked, self._own_request_at = time.monotonic(), None
        self._due.set()

    def connections_soon(self) -> None:
        """Read the connections as soon as the pace allows: one was named that is not among them."""
        self.connections.wanted = True
        self._due.set()

    def alive(self) -> bool | None:
        """Whether the charon runs whose IKE_SAs are known here. False: it is gone, or another process than then has its
        end of the HA channel. None: no charon was there yet."""
        holder = self._channel.holder()
        if self._inode is None:
            return None
        return holder == self._inode

    def connected(self, inode: int | None) -> None:
        """charon answers on VICI; `inode` is its end of the HA channel, if it has one."""
        if inode is not None and self._inode not in (None, inode):
            # another process than before: what it had it lost, and clients will resume from the stubs
            log.warning("charon-restarted", sas_lost=sum(1 for _ in self._tracker.established()))
            self._tracker.forget_all()
            self._tracker.connections = {}
            self._placeholders.reset()
            self._asked.clear()
            self._unreported, self._rekeyed = set(), set()
        self._inode = inode if inode is not None else self._inode
        self.connections.restarted()
        self.soon()

    async def run(self) -> None:
        """Compare for as long as the sidecar runs."""
        drops = 0
        while True:
            self._due.clear()
            took, most = 0.0, float("inf")
            if self._vici.connected:
                began = time.monotonic()
                try:
                    await self.reconcile()
                except Exception as error:
                    if isinstance(error, (ViciError, ChannelError)):
                        log.warning("reconcile-failed", reason=str(error))
                    else:
                        log.exception("reconcile-failed")
                    # how long it was asked in vain says nothing of its SAs
                    most = RECONCILE_SECONDS
                took = time.monotonic() - began - self._waited
            if (dropped := self._channel.drops()) > drops:
                log.warning("ha-datagrams-dropped", count=dropped - drops, fix="raise ha.receive_buffer")
                drops = dropped
                self._due.set()
            await self._pause(min(max(LEAST_PAUSE_SECONDS, took * RECONCILE_SHARE), most))

    async def _pause(self, at_least: float) -> None:
        until = time.monotonic() + at_least
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, UNLOADED_SECONDS))
            # these are read at little cost, however many SAs there are. A charon that has none has just been started:
            # they are loaded next, which no event reports
            if self._vici.connected and (self.connections.wanted or not self._tracker.connections):
                # what is wrong the next comparison says
                with contextlib.suppress(Exception):
                    await self.connections.read()
        at_most = time.monotonic() + (RECONCILE_SECONDS if self._tracker.connections else UNLOADED_SECONDS) - at_least
        while not self._due.is_set() and (left := at_most - time.monotonic()) > 0:
            if self._vici_owes_word():
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, UNLOADED_SECONDS)):
                    await self._due.wait()

    def _vici_owes_word(self) -> bool:
        """Whether HA messages said something of an SA a while ago that no VICI event has confirmed."""
        since = self._tracker.unconfirmed_since()
        return since is not None and time.monotonic() - since > WORD_SECONDS

    async def reconcile(self) -> None:
        """Compare with VICI: connections, lifetimes, SAs that ended unseen, SAs whose keys are missing."""
        self._waited = 0.0
        self._sas_asked = False
        if self._whole or self.connections.age >= RECONCILE_SECONDS:
            await self.connections.read()
            self._whole = False
        missing, since = await self._compare()
        if missing and self._channel.version is not None:
            await asyncio.sleep(IN_FLIGHT_SECONDS)
            self._waited += IN_FLIGHT_SECONDS
            # what ended meanwhile, or while the first list was on its way, is not missing
            still, since = await self._compare()
            missing = {spis: info for spis, info in still.items() if spis in missing}
        if missing:
            recovered = await self.recover(list(missing.values()))
            if recovered is None:
                # charon would have to rekey CHILD_SAs for what the bank may well have
                self._due.set()
                return
            for sa in recovered:
                spis = sa.id.spis
                if self._tracker.is_up(spis) or self._tracker.take_back(sa, missing[spis], since=since):
                    del missing[spis]
            # charon has nothing more about one that was rekeyed
            missing = {spis: info for spis, info in missing.items() if not self._tracker.recall.was_rekeyed(spis)}
        await self._resynchronise({spis: info for spis, info in missing.items() if spis not in self._asked})
        self._tracker.recall.end()
        self.reconciled.set()

    async def _resynchronise(self, unasked: dict[bytes, SaInfo]) -> None:
        if unasked and self._channel.ready():
            segments = {self._segments.segment_of(info.remote.address) for info in unasked.values()}
            log.info("resync", sas=len(unasked), segments=sorted(segments))
            await self._installer.resync(segments)
            await self._channel.drained()
            self._asked |= unasked.keys()

    async def _compare(self) -> tuple[dict[bytes, SaInfo], float]:
        """What is missing here of what VICI lists, and when it was asked (monotonic seconds)."""
        since = time.monotonic()
        comparison = Comparison(self._tracker, since=since)
        established: Counter[int] = Counter()
        strays: dict[bytes, SaInfo] = {}
        connecting: dict[bytes, str] = {}

        def take(infos: list[SaInfo]) -> None:
            infos = [info for info in infos if not self._placeholders.claims(info)]
            left_over = [info for info in infos if self._is_stray(info)]
            if left_over:
                strays.update((info.spis, info) for info in left_over)
                # charon has those that are known here
                infos = [info for info in infos if info.spis not in strays or info.spis in self._tracker.sas]
            comparison.take(infos)
            established.update(
                self._segments.segment_of(info.remote.address) for info in infos if info.state == "ESTABLISHED"
            )
            # what is about to be activated is in that state until charon has all of it
            connecting.update(self._connecting(info for info in infos if not self._is_installed(info)))

        self._waited += await self._vici.each_sas(take)
        self.listing_took = time.monotonic() - since
        end = self._channel.charon_socket()
        if not self._vici.connected or end is None or end.inode != self._inode:
            # another charon's list: nothing of it says that the SAs of the first one ended in order
            raise ViciError("charon was restarted while it was asked, or has no ha plugin")
        self._segments.established = established
        self._placeholders.listed(since)
        self._tracker.half_open.listed(connecting, since)
        missing = comparison.end()
        await self._have_reported(comparison.unreported)
        await self._installer.delete_left()
        await self._remove_strays(strays)
        return missing, since

    async def _have_reported(self, unreported: set[Unreported]) -> None:
        """Have charon rekey CHILD_SAs that were not known at the last comparison either, so that it reports their
        successors: a stub without them would bring back an IKE_SA alone. Once for each name and IKE_SA."""
        self._rekeyed = {one for one in self._rekeyed if one[0] in self._tracker.sas}
        unreported = {one for one in unreported if (one.ike_spis, one.name) not in self._rekeyed}
        lost, self._unreported = unreported & self._unreported, unreported
        if unreported:
            # their report may still be on its way
            self._due.set()
        wanted = {(one.ike_spis, one.name): one.unique_id for one in lost}
        new = [*wanted][:REKEYS_AT_ONCE]
        if not new or self._channel.version is None:
            return
        self._rekeyed.update(new)
        refused = [said for said in await self._vici.rekey_children([(wanted[one], one[1]) for one in new]) if said]
        log.warning(
            "unreported-child-sas-rekeyed",
            child_sas=len(new) - len(refused),
            reason="charon lists them, and their report was lost",
            **({"refused": len(refused), "charon_says": refused[0]} if refused else {}),
        )

    def _connecting(self, infos: Iterable[SaInfo]) -> dict[bytes, str]:
        return {
            info.spis: info.remote.address
            for info in infos
            if info.state in HALF_OPEN_STATES and not self._tracker.is_up(info.spis)
        }

    def _is_installed(self, info: SaInfo) -> bool:
        return self._installer.lands_at(info.remote.address)

    def _is_stray(self, info: SaInfo) -> bool:
        """Whether an SA waits to be activated, by its state or its address, and no task here is about to do so: charon
        would ignore all messages of its peer for good."""
        if info.state == PASSIVE:
            return not self._installer.is_passive(info.spis)
        return self._is_installed(info) and info.spis not in self._tracker.sas

    async def _remove_strays(self, strays: dict[bytes, SaInfo]) -> None:
        """Remove those that were left over the last time too: a client's new SA is installed before it is known
        here."""
        old = [info for spis, info in strays.items() if spis in self._strays]
        self._strays = set(strays)
        if old and (old := await self._take_up(old)):
            await self._installer.delete([IkeId.of(info.spi_i, info.spi_r, info.initiator) for info in old])
            log.info("leftover-sas-removed", sas=len(old))
        elif strays:
            self._due.set()

    async def _take_up(self, left: list[SaInfo]) -> list[SaInfo]:
        """Activate those of these SAs that are known here, whose activation came to nothing, and those that the bank
        has: a sidecar before this one confirmed them, and ended before they were active. Gives the others, none while
        that cannot be found out."""
        tracked = self._tracker.sas
        unknown = [info for info in left if info.spis not in tracked]
        found = await self.recover(unknown) if unknown else []
        # another task may have begun to install one of them
        new = [sa for sa in found or () if sa.id.spis not in tracked]
        here = [tracked[info.spis] for info in left if info.spis in tracked]
        wanted = [
            (sa.id, sa.remote)
            for sa in here + new
            if sa.remote is not None and not self._installer.is_passive(sa.id.spis)
        ]
        if wanted:
            for sa in new:
                self._tracker.adopt(sa)
            try:
                await self._installer.take_up(wanted)
            except ChannelError:
                # the next comparison finds them again
                for sa in new:
                    self._tracker.forget(sa.id)
                for ike_id, _ in wanted:
                    self._installer.forget(ike_id.spis)
                raise
            log.warning("leftover-sas-activated", sas=len(wanted))
            self._due.set()
        if found is None:
            return []
        return [info for info in unknown if info.spis not in tracked]
