"""The local charon as a whole: its HA channel, its VICI socket, its SAs, and keeping these in step."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection

import structlog

from bridge.charon.conf_parser import pfs_children
from bridge.charon.ha_channel import ChannelError, HaChannel
from bridge.charon.ha_commands import Install
from bridge.charon.ha_message import HaError, IkeId, version_for
from bridge.charon.ha_rules import HaRules
from bridge.charon.ha_segments import SegmentChooser
from bridge.charon.ike_sa import IkeSa
from bridge.charon.installer import Installer
from bridge.charon.sa_tracker import Listener, Listeners, SaTracker
from bridge.charon.vici_types import ConnectionInfo, Event, SaInfo, ViciError
from bridge.charon.vici_watch import ViciWatch
from bridge.config import HaConfig
from bridge.service.tasks import end, spawn
from bridge.stub.child_sa import SpiChoice

log = structlog.get_logger()

RECONCILE_SECONDS = 30.0
"""between two comparisons with VICI's list, at least"""
RECONCILE_SHARE = 100
"""a comparison that took t seconds is followed by a pause of this many t, for list-sas walks all SAs"""
INSTALL_TRIES = 3
UNLOADED_SECONDS = 0.5
"""between two looks for connections that charon did not have yet"""
ENDING_AT_ONCE = 4
"""IKE_SAs that charon is asked to end at a time: other questions have to be answered meanwhile"""
IN_FLIGHT_SECONDS = 0.5
"""what VICI lists may still be on its way over the HA channel for so long"""

Recover = Callable[[list[SaInfo]], Awaitable[list[IkeSa] | None]]
"""the SAs of a list whose keys are known elsewhere; None where that cannot be told now"""


async def no_recovery(_: list[SaInfo]) -> list[IkeSa]:
    """Recover where no keys are known from elsewhere."""
    return []


class Charon:
    """One charon. What its SAs do is passed on from `start` on; until then the kernel and charon keep it."""

    def __init__(self, vici: str, ha: HaConfig) -> None:
        self._listeners = Listeners()
        self.tracker = SaTracker(self._listeners, wall=time.time, clock=time.monotonic)
        self.channel = HaChannel(ha.listen, ha.charon, self.tracker.handle, receive_buffer=ha.receive_buffer)
        self.landing = SegmentChooser(ha.segments)
        self.installer = Installer(self.channel, self.landing)
        self.spis = SpiChoice(self.tracker.child_spis)
        self.vici = ViciWatch(vici, on_event=self._event, on_connect=self._connected, on_disconnect=self._disconnected)
        self.release = ""
        self.ha_rules = HaRules(ha)
        self.reconciled = asyncio.Event()
        """set once the SAs that charon had when the sidecar came are known"""
        self._recover: Recover = no_recovery
        self._pfs: dict[tuple[str, str], str] = {}
        self._inode: int | None = None
        self._asked: set[bytes] = set()
        self._strays: set[bytes] = set()
        self._due = asyncio.Event()
        self._unknown = False
        self._waited = 0.0
        self._ending = asyncio.Semaphore(ENDING_AT_ONCE)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, *listeners: Listener, recover: Recover = no_recovery) -> None:
        """Begin to pass on to `listeners` what charon's SAs do; the HA channel is held from before, by
        `channel.open()`. `recover` supplies SAs whose keys are known from elsewhere (the bank), so that charon need
        not be asked, which has it rekey their CHILD_SAs."""
        self._listeners.each = listeners
        self._recover = recover
        self.channel.start()
        self.vici.start()
        self._tasks.append(spawn("reconcile", self._keep_in_step()))

    async def pause(self) -> None:
        """Pass on nothing more. What the HA channel brings from here on the kernel keeps for the next process."""
        await end(*self._tasks)
        await self.vici.close()
        self.channel.pause()

    async def close(self) -> None:
        """Let go of charon; its SAs stay."""
        await self.pause()
        self.channel.close()

    def ready(self) -> bool:
        """Whether SAs can be installed now."""
        return self.vici.connected and self.channel.ready()

    def connection(self, name: str) -> ConnectionInfo | None:
        """A configured connection by name; one that is not known makes the list be read again soon."""
        found = self.tracker.connections.get(name)
        if found is None:
            self._unknown = True
            self._due.set()
        return found

    def takes_at_once(self, connection: str, child: str) -> bool:
        """Whether a CHILD_SA can come up in the round trip of its IKE_SA here: configured, and without a key exchange
        of its own (PFS), as far as swanctl.conf tells."""
        found = self.tracker.connections.get(connection)
        return (
            found is not None
            and any(configured.name == child for configured in found.children)
            and (connection, child) not in self._pfs
        )

    async def install_surely(self, install: Install) -> None:
        """Install one SA and see with VICI that charon has it; ChannelError or ViciError where it does not.

        The client's own charon gets the gateway's answer too. If it comes to it while the SA has its keys but not yet
        its message ID, charon takes it for a reply to nothing and destroys the SA. The same SA is then installed again:
        the answer is gone by then, and none of its keys has been used.
        """
        for _ in range(INSTALL_TRIES):
            await self.installer.install([install])
            found = await self.vici.find_sa(install.connection, install.id.spis)
            if found is not None and found.state == "ESTABLISHED":
                return
            log.info("install-repeated", spi_i=install.id.spi_i.hex(), spi_r=install.id.spi_r.hex())
            if found is not None:
                await self.installer.delete([install.id])
        raise ChannelError(f"charon did not keep the rebuilt IKE_SA of {install.connection!r}: see its log")

    async def end(self, spis: Collection[bytes]) -> int:
        """End IKE_SAs, given by both SPIs, whether their peers answer or not; how many charon had. Their peers get a
        DELETE, updown scripts and accounting see the end, and virtual IPs are released. Raises ViciError."""
        found: dict[bytes, str] = {}
        for one in spis:
            sa = self.tracker.sas.get(one)
            info = await self.vici.sa_by_id(sa.unique_id) if sa is not None and sa.unique_id else None
            if info is not None and info.spis == one:
                found[one] = info.unique_id
        # to look for the others is to walk all
        others = set(spis) - found.keys()

        def take(infos: list[SaInfo]) -> None:
            found.update((info.spis, info.unique_id) for info in infos if info.spis in others)

        if others:
            await self.vici.each_sas(take)
        ended = 0
        for unique_id in found.values():
            # one that has ended meanwhile
            with contextlib.suppress(ViciError):
                await self.vici.end_sa(unique_id)
                ended += 1
        return ended

    async def end_surely(self, sa: IkeSa) -> None:
        """End an IKE_SA as `end` does; where charon cannot be asked over VICI it is removed over the HA channel, and
        neither its peer nor anybody else hears of it. The listeners are told. Raises ChannelError where neither way is
        open.
        """
        async with self._ending:
            try:
                if not await self.end({sa.id.spis}):
                    raise ViciError("charon did not end it")
            except ViciError as error:
                log.warning("sa-removed-without-events", reason=str(error), connection=sa.connection, **sa.id.logged)
                await self.installer.delete([sa.id])
        self.tracker.end(sa.id)

    def reconcile_soon(self) -> None:
        """Compare with VICI's list as soon as the pace allows."""
        self._due.set()

    def _event(self, event: Event) -> None:
        if event.kind == "ike-updown" and event.up and event.sa.connection not in self.tracker.connections:
            self._due.set()
        self.tracker.event(event)

    def _connected(self, release: str) -> None:
        self.release = release
        try:
            self.channel.version = version_for(release)
        except HaError as error:
            log.error("charon-release-unknown", release=release, reason=str(error))
        end = self.channel.charon_socket()
        if end is None:
            log.error(
                "ha-plugin-missing",
                release=release,
                mend="load charon's ha plugin: install libcharon-extra-plugins and the drop-in of strongswan-conf/, "
                "then restart strongSwan",
            )
        elif self._inode not in (None, end.inode):
            # another process than before: what it had it lost, and clients will resume from the stubs
            log.warning("charon-restarted", sas_lost=sum(1 for _ in self.tracker.established()))
            self.tracker.forget_all()
            self.tracker.connections = {}
            self._asked.clear()
        self._inode = end.inode if end is not None else self._inode
        log.info("charon-connected", release=release, ha_version=self.channel.version)
        self._due.set()

    def _disconnected(self) -> None:
        log.warning("charon-disconnected", mend="restart strongSwan if it does not come back by itself")

    async def _keep_in_step(self) -> None:
        drops = 0
        while True:
            self._due.clear()
            took, most = 0.0, float("inf")
            if self.vici.connected:
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
            if (dropped := self.channel.drops()) > drops:
                log.warning("ha-datagrams-dropped", count=dropped - drops, mend="raise ha.receive_buffer")
                drops = dropped
                self._due.set()
            await self._pause(min(max(0.2, took * RECONCILE_SHARE), most))

    async def _pause(self, at_least: float) -> None:
        until = time.monotonic() + at_least
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, UNLOADED_SECONDS))
            # these are read at little cost, however many SAs there are. A charon that has none has just been started:
            # they are loaded next, which no event tells
            if self.vici.connected and (self._unknown or not self.tracker.connections):
                # what is wrong the next comparison says
                with contextlib.suppress(Exception):
                    await self._read_connections()
        at_most = RECONCILE_SECONDS if self.tracker.connections else UNLOADED_SECONDS
        try:
            async with asyncio.timeout(max(at_most - at_least, 0)):
                await self._due.wait()
        except TimeoutError:
            pass

    async def reconcile(self) -> None:
        """Compare with VICI: connections, lifetimes, SAs that ended unseen, SAs whose keys are missing."""
        self._waited = 0.0
        await self._read_connections()
        missing, since = await self._compare()
        if missing and self.channel.version is not None:
            await asyncio.sleep(IN_FLIGHT_SECONDS)
            self._waited += IN_FLIGHT_SECONDS
            # what ended meanwhile, or while the first list was on its way, is not missing
            still, since = await self._compare()
            missing = {spis: info for spis, info in still.items() if spis in missing}
        if missing:
            recovered = await self._recover(list(missing.values()))
            if recovered is None:
                # charon would have to rekey CHILD_SAs for what the bank may well have
                self._due.set()
                return
            for sa in recovered:
                spis = sa.id.spis
                if self._known(spis) or self.tracker.take_back(sa, missing[spis], since=since):
                    del missing[spis]
            # of one that was rekeyed, charon has nothing to tell
            missing = {spis: info for spis, info in missing.items() if not self.tracker.recall.was_rekeyed(spis)}
        unasked = {spis: info for spis, info in missing.items() if spis not in self._asked}
        if unasked and self.channel.ready():
            segments = {self.landing.segment_of(info.remote.address) for info in unasked.values()}
            log.info("resync", sas=len(unasked), segments=sorted(segments))
            await self.installer.resync(segments)
            await self.channel.drained()
            self._asked |= unasked.keys()
        self.tracker.recall.end()
        self.reconciled.set()

    async def _read_connections(self) -> None:
        self._unknown = False
        self.tracker.connections = await self.vici.list_connections()
        self._pfs = await asyncio.to_thread(pfs_children, list(self.tracker.connections))

    def _known(self, spis: bytes) -> bool:
        sa = self.tracker.sas.get(spis)
        return sa is not None and sa.up

    async def _compare(self) -> tuple[dict[bytes, SaInfo], float]:
        """What is missing here of what VICI lists, and when it was asked (monotonic seconds)."""
        since = time.monotonic()
        comparison = self.tracker.compare(since=since)
        established: Counter[int] = Counter()
        strays: dict[bytes, SaInfo] = {}

        def take(infos: list[SaInfo]) -> None:
            left_over = [info for info in infos if self._is_stray(info)]
            if left_over:
                strays.update((info.spis, info) for info in left_over)
                infos = [info for info in infos if info.spis not in strays]
            comparison.take(infos)
            established.update(
                self.landing.segment_of(info.remote.address) for info in infos if info.state == "ESTABLISHED"
            )

        self._waited += await self.vici.each_sas(take)
        end = self.channel.charon_socket()
        if not self.vici.connected or end is None or end.inode != self._inode:
            # another charon's list: nothing of it says that the SAs of the first one ended in order
            raise ViciError("charon was restarted while it was asked, or has no ha plugin")
        self.landing.established = established
        missing = comparison.end()
        await self._remove_strays(strays)
        return missing, since

    def _is_stray(self, info: SaInfo) -> bool:
        """Whether an SA is where they land, and nobody's: whoever was about to activate it was killed, or gave up."""
        return self.installer.lands_at(info.remote.address) and info.spis not in self.tracker.sas

    async def _remove_strays(self, strays: dict[bytes, SaInfo]) -> None:
        """Remove those that were strays the last time too: a client's new SA lands before it is known."""
        old = [info for spis, info in strays.items() if spis in self._strays]
        self._strays = set(strays)
        if old:
            await self.installer.delete([IkeId.of(info.spi_i, info.spi_r, info.initiator) for info in old])
            log.info("strays-removed", sas=len(old))
        elif strays:
            self._due.set()
