"""The local charon as a whole: its HA channel, its VICI socket, its SAs, and keeping these in step."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import structlog

from bridge.charon.ha_channel import ChannelError, HaChannel
from bridge.charon.ha_commands import vips_message
from bridge.charon.ha_message import IkeId
from bridge.charon.ha_reports import HaReports
from bridge.charon.ha_rules import HaRules
from bridge.charon.ha_segments import SegmentChooser
from bridge.charon.handshake_list import HandshakeList
from bridge.charon.handshakes import Handshakes
from bridge.charon.ike_sa import IkeSa
from bridge.charon.install import Install
from bridge.charon.installer import Installer
from bridge.charon.placeholders import NO_ADDRESS, Placeholders
from bridge.charon.reconcile import Reconciler, Recover, no_recovery
from bridge.charon.releases import crashes_on_activation, ends_handshakes_on_activation, version_for
from bridge.charon.sa_ends import STOPS, SaEnds
from bridge.charon.sa_listener import Listener, Listeners
from bridge.charon.sa_tracker import SaTracker
from bridge.charon.vici_types import ConnectionInfo, Event, SaInfo, ViciError
from bridge.charon.vici_watch import ViciWatch
from bridge.charon.vpns import is_address
from bridge.config import ChildrenInExchange, HaConfig
from bridge.service.tasks import end, spawn
from bridge.stub.child_sa import SpiChoice

log = structlog.get_logger()

INSTALL_TRIES = 3
ACTIVATE_SECONDS = 5.0
"""that an IKE_SA which is to be ended has until it is active"""
ACTIVATE_POLL = 0.05


class Charon:
    """One charon. What its SAs do is passed on from `start` on; until then the kernel and charon keep it. `swanctl`:
    the swanctl.conf that it was loaded from, None where swanctl looks for it."""

    def __init__(self, vici: str, ha: HaConfig, swanctl: str | None = None) -> None:
        self._listeners = Listeners()
        self.tracker = SaTracker(self._listeners, wall=time.time, clock=time.monotonic)
        self.reports = HaReports(self.tracker)
        self.channel = HaChannel(
            ha.listen, ha.charon, self.reports.handle, self.reports.malformed, receive_buffer=ha.receive_buffer
        )
        self.landing = SegmentChooser(ha.segments, self.tracker.half_open)
        self.vici = ViciWatch(vici, on_event=self._event, on_connect=self._connected, on_disconnect=self._disconnected)
        self.handshakes = Handshakes(self._look, self._look_surely)
        self.landing.held_back = self.handshakes.can_hold
        self.landing.peers = self._own_peers
        self._peers: tuple[dict[str, ConnectionInfo], tuple[str, ...]] = {}, ()
        self.installer = Installer(self.channel, self.landing, self.handshakes.known, self._blocked)
        self.tracker.lands_at = self.installer.lands_at
        self.spis = SpiChoice(self.tracker.child_spis)
        self.release = ""
        self.ha_rules = HaRules(ha)
        self.channel.guarded = self.ha_rules.in_place_since
        self.placeholders = Placeholders(self.channel, ha.segments)
        self.reports.ignored = self.placeholders.spis
        self._reconciler = Reconciler(
            self.tracker,
            self.channel,
            self.landing,
            self.installer,
            self.vici,
            self.placeholders,
            Path(swanctl) if swanctl is not None else None,
        )
        self._handshake_list = HandshakeList(
            self.tracker, self.landing, self.vici, lambda: self._reconciler.listing_took
        )
        self.reports.on_own_request = self._reconciler.own_request
        self.ends = SaEnds(self.tracker, self.vici, lambda: self.alive() is True)
        self._not_taken: set[tuple[str, str]] = set()
        """CHILD_SAs that charon did not install over the HA channel: they come up by CREATE_CHILD_SA"""
        self.tracker.granted.not_taken = self._child_not_taken
        self.on_connected: Callable[[], None] = lambda: None
        """called when charon is there, perhaps another one than before"""
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def reconciled(self) -> asyncio.Event:
        """Set once the SAs that charon had when the sidecar came are known."""
        return self._reconciler.reconciled

    def start(self, *listeners: Listener, recover: Recover = no_recovery) -> None:
        """Begin to pass on to `listeners` what charon's SAs do; the HA channel is held from before, by
        `channel.open()`. `recover` supplies SAs whose keys are known from elsewhere (the bank), so that charon need
        not be asked, which has it rekey their CHILD_SAs."""
        self._listeners.each = listeners
        self._reconciler.recover = recover
        self.channel.start()
        self.vici.start()
        self._tasks.append(spawn("reconcile", self._reconciler.run()))
        self._tasks.append(spawn("handshakes", self._handshake_list.watch()))

    async def pause(self) -> None:
        """Pass on nothing more. What the HA channel brings from here on the kernel keeps for the next process."""
        await end(*self._tasks)
        await self.ends.close()
        await self.vici.close()
        self.channel.pause()

    async def close(self) -> None:
        """Let go of charon; its SAs stay."""
        await self.pause()
        self.channel.close()

    def ready(self) -> bool:
        """Whether SAs can be installed now."""
        return self.vici.connected and self.channel.ready()

    def alive(self) -> bool | None:
        """Whether the charon runs whose IKE_SAs are known here; None while no charon was there yet."""
        return self._reconciler.alive()

    def connection(self, name: str) -> ConnectionInfo | None:
        """A configured connection by name; one that is not known makes the list be read again soon."""
        found = self.tracker.connections.get(name)
        if found is None:
            self._reconciler.connections_soon()
        return found

    async def read_connections(self) -> None:
        """Have charon's own word on all of its connections, as far as it answers."""
        with contextlib.suppress(ViciError):
            await self._reconciler.connections.read()

    def _own_peers(self) -> tuple[str, ...]:
        """Addresses that charon itself may begin a handshake with, by its connections, where an activation would end
        that; of names they are not known."""
        if not self.handshakes.ends:
            return ()
        connections, peers = self._peers
        if connections is not self.tracker.connections:
            connections = self.tracker.connections
            every = (address for one in connections.values() for address in one.remote_addresses)
            peers = tuple({address for address in every if is_address(address)})
            self._peers = connections, peers
        return peers

    async def know_connections(self, needed: Iterable[tuple[str, Iterable[str]]]) -> None:
        """Have charon's own word on these (connection, children) before something is refused, or fails, for lack of
        one."""
        await self._reconciler.connections.know(needed)

    def know_connections_soon(self) -> None:
        """`know_connections` will be called soon: begin with it."""
        self._reconciler.connections.read_ahead()

    def takes_at_once(self, connection: str, child: str, policy: ChildrenInExchange) -> bool:
        """Whether a CHILD_SA comes up in the round trip of its IKE_SA here: configured, and without a key exchange of
        its own (PFS); with `policy` auto only where no other software waits for charon's event of it, which charon
        raises for exchanges alone. All as far as can be known."""
        found = self.tracker.connections.get(connection)
        return (
            found is not None
            and any(configured.name == child for configured in found.children)
            and policy != "never"
            and not (policy == "auto" and self._reconciler.connections.needs_event(connection, child))
            and not self._reconciler.connections.with_key_exchange(connection, child)
            and (connection, child) not in self._not_taken
        )

    async def install_surely(self, install: Install) -> tuple[SaInfo, float]:
        """Install one SA, with its CHILD_SAs, and see with VICI that charon has it: what VICI says of it, and when it
        was installed (monotonic seconds). Raises ChannelError or ViciError where charon does not have it.

        The client's own charon gets the gateway's answer too. If it comes to it while the SA has its keys but not yet
        its message ID, charon takes it for a reply to nothing and destroys the SA. All of it is then installed again:
        the answer is gone by then, and none of the keys has been used.
        """
        for _ in range(INSTALL_TRIES):
            await self.installer.install([install])
            installed = time.monotonic()
            found = await self.vici.find_sa(install.connection, install.id.spis)
            if found is not None and found.state == "ESTABLISHED":
                return found, installed
            log.info("install-repeated", spi_i=install.id.spi_i.hex(), spi_r=install.id.spi_r.hex())
            if found is not None:
                await self.installer.delete([install.id])
        raise ChannelError(f"charon did not keep the rebuilt IKE_SA of {install.connection!r}: see its log")

    async def end(self, spis: Collection[bytes]) -> int:
        """End IKE_SAs, given by both SPIs, whether their peers answer or not; how many charon had. Their peers get a
        DELETE, updown scripts and accounting see the end, and virtual IPs are released. Raises ViciError."""
        if why_not := await self._not_active(spis):
            raise ViciError(why_not)
        results = await asyncio.gather(*(self.ends.end(one) for one in spis), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return sum(result is True for result in results)

    async def _not_active(self, spis: Collection[bytes]) -> str:
        """charon sends no DELETE for an SA that is PASSIVE: have these activated, at the pace of all activations. Why
        they are not, where they are not in time."""
        try:
            async with asyncio.timeout(ACTIVATE_SECONDS):
                while any(self.installer.is_passive(one) for one in spis):
                    if pause := self.installer.wait():
                        await asyncio.sleep(min(pause, ACTIVATE_POLL))
                    else:
                        await self.installer.activate()
        except TimeoutError:
            return "it is not active yet, and charon would send no DELETE for it"
        except ChannelError as error:
            return f"it cannot be activated: {error}"
        return ""

    async def reauthenticate(self, sa: IkeSa) -> None:
        """Have charon authenticate an IKE_SA again, by a new one in its place, as its configuration says. Raises
        ViciError."""
        unique_id = sa.unique_id
        if not unique_id:
            info = await self.vici.find_sa(sa.connection, sa.id.spis)
            if info is None:
                raise ViciError("charon does not have it")
            unique_id = info.unique_id
        await self.vici.reauthenticate(unique_id)

    async def end_surely(self, sa: IkeSa) -> None:
        """End an IKE_SA as `end` does; where charon cannot be asked over VICI it is removed over the HA channel, and
        neither its peer nor another process receives an event. The listeners are called. Raises ChannelError
        where neither way is open, and where the sidecar stops: charon then keeps it.
        """
        if self.tracker.sas.get(sa.id.spis) is not sa:
            return
        try:
            if not await self.end({sa.id.spis}):
                raise ViciError("charon did not end it")
        except ViciError as error:
            if self.tracker.sas.get(sa.id.spis) is not sa:
                return
            if self.ends.closed:
                raise ChannelError(STOPS) from error
            log.warning("sa-removed-without-events", reason=str(error), connection=sa.connection, **sa.id.logged)
            await self.installer.delete([sa.id])
        self.tracker.end(sa.id)

    def _child_not_taken(self, sa: IkeSa, names: tuple[str, ...]) -> None:
        """VICI does not list CHILD_SAs that charon was given with a rebuilt SA. Its client counts on them, so the SA
        is ended: the client gets a DELETE, and the next one has them by CREATE_CHILD_SA."""
        self._not_taken.update((sa.connection, name) for name in names)
        log.error(
            "child-not-accepted",
            connection=sa.connection,
            children=",".join(names),
            effect="the IKE_SA is ended; the next resumption sets these CHILD_SAs up by CREATE_CHILD_SA",
            fix="see charon's log: is the child loaded, does the kernel have its algorithms?",
            **sa.id.logged,
        )
        spawn("end-sa", self._end_quietly(sa))

    async def _end_quietly(self, sa: IkeSa) -> None:
        try:
            await self.end_surely(sa)
        except ChannelError as error:
            log.warning("sa-not-ended", reason=str(error), **sa.id.logged)

    def request(self, spi_i: bytes, address: str) -> None:
        """An IKE_SA_INIT request goes on to charon, which may begin a handshake."""
        self.tracker.half_open.request(spi_i, address, time.monotonic())

    def sharing(self, ike_ids: Sequence[IkeId]) -> set[bytes]:
        """Those SAs, by both SPIs, with a virtual IP that another SA or a placeholder has too."""
        return {ike_id.spis for ike_id in ike_ids if self._shares_address(ike_id)}

    async def remove(
        self, ike_ids: Sequence[IkeId], *, kept: bool = False, sharing: Collection[bytes] | None = None
    ) -> None:
        """Remove SAs without a DELETE or an event, over the HA channel. A virtual IP that another SA or a placeholder
        has too stays reserved; with `kept` all stay. `sharing` as it was before the SAs were forgotten. Raises
        ChannelError."""
        if sharing is None:
            sharing = self.sharing(ike_ids)
        shared = [ike_id for ike_id in ike_ids if kept or ike_id.spis in sharing]
        if self.channel.version is not None and shared:
            version = self.channel.version
            try:
                await self.channel.send([vips_message(version, ike_id, (NO_ADDRESS,)) for ike_id in shared])
            except ChannelError:
                self.installer.give_up(ike_ids)
                raise
        await self.installer.delete(ike_ids)

    def _shares_address(self, ike_id: IkeId) -> bool:
        addresses = self.tracker.virtual_ips.of(ike_id.spis)
        others = self.tracker.virtual_ips.holders(addresses) - {ike_id.spis}
        return bool(others) or any(address in self.placeholders for address in addresses)

    async def reserve_again(self, addresses: Sequence[str]) -> None:
        """Have charon's HA pools reserve addresses again that an SA released while another one has them. Raises
        ChannelError."""
        await self.placeholders.reserve_again(addresses)
        version = self.channel.version
        for address in addresses:
            for spis in self.tracker.virtual_ips.holders([address]):
                sa = self.tracker.sas.get(spis)
                # the successor of a rekeyed SA has inherited the address, which was not released
                if sa is not None and sa.adopted and version is not None:
                    await self.channel.send([vips_message(version, sa.id, sa.remote_vips)])

    def reconcile_soon(self) -> None:
        """Compare with VICI's list as soon as the pace allows."""
        self._reconciler.soon()

    def sas_soon(self) -> None:
        """Compare the SAs with VICI's list soon, once for all that ask for it within a moment."""
        self._reconciler.sas_soon()

    async def _look(self) -> None:
        with _unknown_handshakes():
            await self._handshake_list.look()

    async def _look_surely(self) -> bool:
        with _unknown_handshakes():
            return await self._handshake_list.look_surely()

    def _blocked(self) -> None:
        self._handshake_list.soon()

    def _event(self, event: Event) -> None:
        if event.kind == "ike-updown" and event.up and event.sa.connection not in self.tracker.connections:
            self._reconciler.soon()
        self.tracker.event(event)

    def _connected(self, release: str) -> None:
        self.release = release
        self.landing.crashes = self.handshakes.crashes = crashes_on_activation(release)
        self.handshakes.ends = ends_handshakes_on_activation(release)
        self.channel.expect(version_for(release))
        # what comes from here on charon alone can have sent
        self.channel.receive()
        end = self.channel.charon_socket()
        if end is None:
            log.error(
                "ha-plugin-missing",
                release=release,
                fix="load charon's ha plugin: install libcharon-extra-plugins and the drop-in of strongswan-conf/, "
                "then restart strongSwan",
            )
        self._reconciler.connected(end.inode if end is not None else None)
        log.info("charon-connected", release=release, ha_version=self.channel.version)
        self.on_connected()

    def _disconnected(self) -> None:
        log.warning("charon-disconnected", fix="restart strongSwan if it does not come back by itself")


@contextlib.contextmanager
def _unknown_handshakes() -> Iterator[None]:
    try:
        yield
    except ViciError as error:
        raise ChannelError(f"cannot find out which handshakes are in progress: {error}") from error
