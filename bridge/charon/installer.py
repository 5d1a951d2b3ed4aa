"""Rebuilt IKE_SAs into an unmodified charon, over its HA channel.

An SA is installed as the HA peer's, which leaves it PASSIVE, with an address of one of charon's segments
(`ha_segments`); activating that segment activates all that were installed into it; then each gets its peer's address.
The CHILD_SAs of an SA that is PASSIVE carry traffic: it has its peer's address while they are installed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import structlog

from bridge.charon.ha_channel import ChannelError, HaChannel
from bridge.charon.ha_commands import (
    add_message,
    address_message,
    child_message,
    delete_message,
    message_id_messages,
    next_id_message,
    segment_message,
    update_message,
)
from bridge.charon.ha_message import (
    IkeId,
    MessageType,
)
from bridge.charon.ha_segments import BLOCKED_SECONDS, LONGEST_PAUSE, SegmentChooser, landing_addresses
from bridge.charon.handshakes import Holds
from bridge.charon.install import Install
from bridge.stub.types import Endpoint

log = structlog.get_logger()

LOOK_SHARE = 10
"""a look for handshakes in progress that took t seconds is repeated after this many t"""
FEW = 8
"""SAs in a batch whose activation is not measured apart from their installation: that costs a client time"""


Known = Callable[[], AbstractAsyncContextManager[Holds]]
"""meanwhile the handshakes in progress are known (bridge.charon.handshakes)"""


def not_known() -> AbstractAsyncContextManager[Holds]:
    """Known where nothing can be asked."""
    return nullcontext(lambda: True)


@dataclass(slots=True)
class _Landed:
    """An SA that charon has PASSIVE."""

    id: IkeId
    remote: Endpoint
    segment: int
    """of the address that it has"""
    afterwards: tuple[bytes, ...] = ()
    """messages that follow once it is active and has its peer's address"""


class Watcher(Protocol):
    """Follows activations. All SAs are given by both SPIs."""

    def begins(self, spis: Sequence[bytes]) -> None:
        """These are being activated."""

    def done(self, spis: Sequence[bytes]) -> None:
        """charon has these established."""

    def failed(self, spis: Sequence[bytes]) -> None:
        """charon was not reached: they stay PASSIVE, for the next activation."""

    def lost(self, spis: Sequence[bytes]) -> None:
        """The charon that had them is gone."""


class _NoWatcher:
    def begins(self, spis: Sequence[bytes]) -> None: ...
    def done(self, spis: Sequence[bytes]) -> None: ...
    def failed(self, spis: Sequence[bytes]) -> None: ...
    def lost(self, spis: Sequence[bytes]) -> None: ...


class Installer:
    """Installs batches into one charon, one after the other. Raises ChannelError when charon is not there.

    `known` is entered for each activation; `blocked` is called while each segment has a handshake in progress.
    """

    def __init__(
        self,
        channel: HaChannel,
        landing: SegmentChooser,
        known: Known = not_known,
        blocked: Callable[[], None] = lambda: None,
    ) -> None:
        self.toggle_seconds = 0.0
        """how long the last activation kept the SAs of its segment from answering, at most"""
        self._channel = channel
        self._landing = landing
        self._known = known
        self._blocked = blocked
        self._addresses = landing_addresses(landing.count)
        self._landing_addresses = frozenset(self._addresses.values())
        self.watcher: Watcher = _NoWatcher()
        self._landed: dict[bytes, _Landed] = {}
        """by both SPIs, the oldest first"""
        self._activating: dict[bytes, _Landed] = {}
        self._undeleted: dict[IkeId, int | None] = {}
        """SAs that were to be deleted while charon did not read its channel, and in which charon"""
        self._where: int | None = None
        """the charon that has them"""
        self._sending = asyncio.Lock()
        """what belongs together reaches charon together"""
        self._activations = asyncio.Lock()
        """one at a time; what lands meanwhile waits for no handshake"""

    async def install(self, batch: Sequence[Install]) -> None:
        """Install and activate all of `batch`, then their CHILD_SAs; done when charon has them established.

        Raises HaError, with nothing sent, where one of them does not fit the format; ChannelError.
        """
        try:
            async with self._sending:
                await self._land(batch, passive_children=False)
            await self.activate()
        except BaseException:
            # who wanted them goes on without: the next activation is not to bring them up
            self.give_up([install.id for install in batch])
            raise

    async def land(self, batch: Sequence[Install]) -> None:
        """Have charon take in all of `batch`, with their CHILD_SAs, for the next activation; done when it has them
        PASSIVE. Raises as `install`."""
        async with self._sending:
            await self._land(batch, passive_children=True)
            await self._channel.drained()

    async def activate(self) -> None:
        """Activate all that landed; done when charon has them established. Raises ChannelError."""
        async with self._activations:
            if self._landed:
                await self._activate()

    async def take_up(self, left: Sequence[tuple[IkeId, Endpoint]]) -> None:
        """Have SAs activated, with the address of their peers, that charon has PASSIVE from a sidecar before this one.
        Raises ChannelError."""
        async with self._sending:
            self._where_now()
            segment = self._landing.next(asyncio.get_running_loop().time())
            landed = [_Landed(ike_id, remote, segment) for ike_id, remote in left]
            await self._channel.send(self._moved(landed))
            self._landed |= {one.id.spis: one for one in landed}
        await self.activate()

    @property
    def where(self) -> int | None:
        """The charon that was installed into last, by the inode of its end of the HA channel."""
        return self._where

    def forget(self, spis: bytes) -> None:
        """charon does not have an SA (both SPIs) any more: it is not activated."""
        self._landed.pop(spis, None)
        self._activating.pop(spis, None)

    def is_passive(self, spis: bytes) -> bool:
        """Whether charon has an SA (both SPIs) that is to be activated yet."""
        return spis in self._landed or spis in self._activating

    def set_next_id_now(self, ike_id: IkeId, number: int, *, idle: bool = False) -> bool:
        """The message ID of the peer's next request on an SA that is PASSIVE; whether the charon that has it was told:
        it is there, and reads what it is sent; with `idle` it has read all of that."""
        version = self._channel.version
        if version is None or ike_id.spis not in self._landed or self._where is None:
            return False
        message = next_id_message(version, ike_id, MessageType.IKE_MID_RESPONDER, number)
        return self._channel.send_now(message, to=self._where, idle=idle)

    def lands_at(self, address: str) -> bool:
        """Whether SAs have this address between their installation and their activation."""
        return address in self._landing_addresses

    def is_blocked(self) -> bool:
        """Whether each segment has a handshake in progress, so that none can be activated."""
        return self._landing.blocked(asyncio.get_running_loop().time())

    def wait(self) -> float:
        """Seconds until an activation costs running SAs no more than their share, and no handshake."""
        now = asyncio.get_running_loop().time()
        if self._landing.blocked(now):
            self._blocked()
        return self._landing.wait(now)

    def _where_now(self) -> None:
        """What landed in another charon is gone."""
        where = self._whose()
        if where != self._where and self._landed:
            lost, self._landed = list(self._landed), {}
            self.watcher.lost(lost)
        self._where = where

    async def _land(self, batch: Sequence[Install], *, passive_children: bool) -> None:
        segment = self._landing.next(asyncio.get_running_loop().time())
        # all of it before any is sent: of an incomplete message charon would derive other keys
        messages = list(self._installs(batch, segment, children=passive_children))
        landed = [
            _Landed(install.id, install.remote, segment, tuple(self._activated(install, children=not passive_children)))
            for install in batch
        ]
        self._where_now()
        await self.delete_left()
        await self._channel.send(messages)
        self._landed |= {one.id.spis: one for one in landed}

    async def _activate(self) -> None:
        self._look_for_charon()
        # charon has all of them before it is asked for handshakes: until then they look like some
        await self._channel.drained()
        clock = asyncio.get_running_loop().time
        began = looked = clock()
        while not await self._activated_beside_handshakes():
            self._blocked()
            await asyncio.sleep(max(BLOCKED_SECONDS, min(LOOK_SHARE * (clock() - looked), LONGEST_PAUSE)))
            looked = clock()
        if looked != began:
            log.info("activation-delayed", seconds=round(clock() - began, 3))

    async def _activated_beside_handshakes(self) -> bool:
        """Activate in a segment without a handshake in progress; whether there is one, as far as can be known. charon
        ends handshakes that come to nothing after a while."""
        clock = asyncio.get_running_loop().time
        async with self._known() as holds:
            # what charon has reported meanwhile
            self._channel.receive()
            segment = self._landing.to_activate(clock())
            if segment is None:
                return False
            async with self._sending:
                self._look_for_charon()
                await self.delete_left()
                # all of it may have taken long
                if self._landing.to_activate(clock()) != segment or not holds():
                    return False
                await self._activate_in(segment)
                return True

    async def _activate_in(self, segment: int) -> None:
        self._activating, self._landed = self._landed, {}
        self.watcher.begins(list(self._activating))
        try:
            await self._activate_now(self._activating, segment)
        except BaseException:
            # SAs that were removed meanwhile are in neither
            self._landed, self._activating = self._activating, {}
            self.watcher.failed(list(self._landed))
            raise
        active, self._activating = list(self._activating), {}
        self.watcher.done(active)

    def _look_for_charon(self) -> None:
        """Raises ChannelError where the charon that has what landed is gone."""
        if self._whose() != self._where:
            lost, self._landed = list(self._landed), {}
            self.watcher.lost(lost)
            raise ChannelError("charon was restarted before the rebuilt SAs were active")

    async def _activate_now(self, landed: dict[bytes, _Landed], segment: int) -> None:
        clock = asyncio.get_running_loop().time
        few = len(landed) <= FEW
        elsewhere = [one for one in landed.values() if one.segment != segment]
        if elsewhere:
            for one in elsewhere:
                one.segment = segment
            await self._channel.send(self._moved(elsewhere))
            if not few:
                await self._channel.drained()
        version = self._version()
        # without those that were removed meanwhile
        afterwards = [
            message
            for one in landed.values()
            for message in (address_message(version, one.id, one.remote), *one.afterwards)
        ]
        began = clock()
        if few:
            await self._channel.send(chain(self._activation(segment), afterwards))
            await self._channel.drained()
            self.toggle_seconds = clock() - began
        else:
            await self._channel.send(self._activation(segment))
            await self._channel.drained()
            self.toggle_seconds = clock() - began
            await self._channel.send(afterwards)
            await self._channel.drained()
        self._landing.disturbed(segment, clock(), self.toggle_seconds)
        self._landing.established.update(self._landing.segment_of(one.remote.address) for one in landed.values())

    def _moved(self, landed: Sequence[_Landed]) -> Iterator[bytes]:
        version = self._version()
        for one in landed:
            yield address_message(version, one.id, Endpoint(self._addresses[one.segment], one.remote.port))

    def _version(self) -> int:
        """That of the messages of the charon that is there. Raises ChannelError where it is not known: it was replaced,
        perhaps."""
        if self._channel.version is None:
            raise ChannelError("charon has not said which release it is")
        return self._channel.version

    def _whose(self) -> int | None:
        """Which charon is there."""
        end = self._channel.charon_socket()
        return None if end is None else end.inode

    def _installs(self, batch: Sequence[Install], segment: int, *, children: bool) -> Iterator[bytes]:
        version = self._version()
        landing = self._addresses[segment]
        for install in batch:
            yield add_message(version, install, landing)
            yield update_message(version, install, landing)
            yield from message_id_messages(version, install)
            if children and install.children:
                # these take over the addresses that their IKE_SA has
                yield address_message(version, install.id, install.remote)
                for child in install.children:
                    yield child_message(version, install.id, child)
                yield address_message(version, install.id, Endpoint(landing, install.remote.port))

    def _activation(self, segment: int) -> Iterator[bytes]:
        version = self._version()
        # charon takes no notice of a TAKE where the segment is not active yet
        yield segment_message(version, MessageType.SEGMENT_TAKE, segment)
        yield segment_message(version, MessageType.SEGMENT_DROP, segment)

    def _activated(self, install: Install, *, children: bool) -> Iterator[bytes]:
        """What follows once it is active and has its peer's address."""
        version = self._version()
        if children:
            for child in install.children:
                yield child_message(version, install.id, child)
        if install.replaces is not None:
            yield delete_message(version, install.replaces)

    async def set_next_id(self, ike_id: IkeId, number: int, *, own: bool) -> None:
        """The message ID of this host's (`own`) or of the peer's next request on an SA. Raises ChannelError."""
        version = self._channel.version
        kind = MessageType.IKE_MID_INITIATOR if own else MessageType.IKE_MID_RESPONDER
        if version is not None:
            await self._channel.send([next_id_message(version, ike_id, kind, number)])

    async def delete(self, ike_ids: Sequence[IkeId]) -> None:
        """Drop SAs without a DELETE or an event."""
        version = self._channel.version
        self._forget_all(ike_ids)
        if version is not None and ike_ids:
            where = self._whose()
            try:
                await self._channel.send([delete_message(version, ike_id) for ike_id in ike_ids])
            except ChannelError:
                # what charon has in its socket it will execute
                self._undeleted |= dict.fromkeys(ike_ids, where)
                raise

    def give_up(self, ike_ids: Sequence[IkeId]) -> None:
        """Have SAs dropped that charon may have or not, before anything else that it is told to do."""
        self._forget_all(ike_ids)
        self._undeleted |= dict.fromkeys(ike_ids, self._whose())

    def _forget_all(self, ike_ids: Sequence[IkeId]) -> None:
        removed = [ike_id.spis for ike_id in ike_ids if self.is_passive(ike_id.spis)]
        for spis in removed:
            self.forget(spis)
        self.watcher.lost(removed)

    async def delete_left(self) -> None:
        """Drop what could not be dropped before. Raises ChannelError."""
        left, self._undeleted = self._undeleted, {}
        here = self._whose()
        if again := [ike_id for ike_id, where in left.items() if where == here and where is not None]:
            await self.delete(again)

    async def resync(self, segments: set[int]) -> None:
        """Ask charon for everything about the SAs of these segments; it rekeys their CHILD_SAs afterwards."""
        version = self._channel.version
        if version is not None:
            await self._channel.send(
                [segment_message(version, MessageType.RESYNC, segment) for segment in sorted(segments)]
            )
