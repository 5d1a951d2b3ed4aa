"""Rebuilt IKE_SAs into an unmodified charon, over its HA channel.

An SA is installed as the HA peer's, which leaves it PASSIVE, with an address of one of charon's segments
(`ha_segments`); activating that segment activates all that were installed into it; then each gets its peer's address.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import chain

import structlog

from bridge.charon.ha_channel import ChannelError, HaChannel
from bridge.charon.ha_commands import (
    Install,
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
from bridge.stub.types import Endpoint

log = structlog.get_logger()

LOOK_SHARE = 10
"""a look for handshakes in progress that took t seconds is repeated after this many t"""
FEW = 8
"""SAs in a batch whose activation is not measured apart from their installation: that costs a client time"""


Look = Callable[[], Awaitable[None]]
"""asks VICI which SAs are in state CONNECTING"""


async def no_look() -> None:
    """Look where nothing can be asked."""


class Installer:
    """Installs batches into one charon, one after the other. Raises ChannelError when charon is not there.

    `look` is awaited before each activation; `blocked` is called while each segment has a handshake in progress.
    """

    def __init__(
        self,
        channel: HaChannel,
        landing: SegmentChooser,
        look: Look = no_look,
        blocked: Callable[[], None] = lambda: None,
    ) -> None:
        self.toggle_seconds = 0.0
        """how long the last activation kept the SAs of its segment from answering, at most"""
        self._channel = channel
        self._landing = landing
        self._look = look
        self._blocked = blocked
        self._addresses = landing_addresses(landing.count)
        self._landing_addresses = frozenset(self._addresses.values())
        self._landed: list[Install] = []
        self._afterwards: list[bytes] = []
        """what follows once these are active"""
        self._where: int | None = None
        """the charon that has them"""
        self._one_at_a_time = asyncio.Lock()

    async def install(self, batch: Sequence[Install]) -> None:
        """Install and activate all of `batch`; done when charon has them established.

        Raises HaError, with nothing sent, where one of them does not fit the format; ChannelError.
        """
        async with self._one_at_a_time:
            await self._land(batch)
            await self._activate()

    async def land(self, batch: Sequence[Install]) -> None:
        """Have charon take in all of `batch`, for the next activation. Raises as `install`."""
        async with self._one_at_a_time:
            await self._land(batch)

    async def activate(self) -> None:
        """Activate all that landed; done when charon has them established. Raises ChannelError, and then they are not
        to be had any more."""
        async with self._one_at_a_time:
            await self._activate()

    def lands_at(self, address: str) -> bool:
        """Whether SAs have this address between their installation and their activation."""
        return address in self._landing_addresses

    def wait(self) -> float:
        """Seconds until an activation costs running SAs no more than their share, and no handshake."""
        now = asyncio.get_running_loop().time()
        if self._landing.blocked(now):
            self._blocked()
        return self._landing.wait(now)

    async def _land(self, batch: Sequence[Install]) -> None:
        segment = self._landing.next(asyncio.get_running_loop().time())
        # all of it before any is sent: of an incomplete message charon would derive other keys
        messages, afterwards = list(self._installs(batch, segment)), list(self._activated(batch))
        if not self._landed:
            self._where = self._whose()
        await self._channel.send(messages)
        self._landed += batch
        self._afterwards += afterwards

    async def _activate(self) -> None:
        clock = asyncio.get_running_loop().time
        batch, self._landed = self._landed, []
        afterwards, self._afterwards = self._afterwards, []
        if self._whose() != self._where:
            raise ChannelError("charon was restarted before the rebuilt SAs were active")
        installed_in = self._landing.next(clock())
        few = len(batch) <= FEW
        # charon has all of them before it is asked for handshakes: until then they look like some
        await self._channel.drained()
        segment = await self._free_segment()
        if segment != installed_in:
            await self._channel.send(self._moved(batch, segment))
            if not few:
                await self._channel.drained()
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
        self._landing.established.update(self._landing.segment_of(install.remote.address) for install in batch)

    async def _free_segment(self) -> int:
        """A segment without a handshake in progress. Waits where each has one: charon ends them after a while."""
        clock = asyncio.get_running_loop().time
        began = clock()
        waited = False
        while True:
            looked = clock()
            await self._look()
            took = clock() - looked
            # what charon has reported meanwhile
            self._channel.receive()
            segment = self._landing.to_activate(clock())
            if segment is not None:
                if waited:
                    log.info("activation-delayed", seconds=round(clock() - began, 3))
                return segment
            waited = True
            self._blocked()
            await asyncio.sleep(max(BLOCKED_SECONDS, min(LOOK_SHARE * took, LONGEST_PAUSE)))

    def _moved(self, batch: Sequence[Install], segment: int) -> Iterator[bytes]:
        version = self._version()
        for install in batch:
            yield address_message(version, install.id, Endpoint(self._addresses[segment], install.remote.port))

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

    def _installs(self, batch: Sequence[Install], segment: int) -> Iterator[bytes]:
        version = self._version()
        landing = self._addresses[segment]
        for install in batch:
            yield add_message(version, install, landing)
            yield update_message(version, install, landing)
            yield from message_id_messages(version, install)

    def _activation(self, segment: int) -> Iterator[bytes]:
        version = self._version()
        # charon takes no notice of a TAKE where the segment is not active yet
        yield segment_message(version, MessageType.SEGMENT_TAKE, segment)
        yield segment_message(version, MessageType.SEGMENT_DROP, segment)

    def _activated(self, batch: Sequence[Install]) -> Iterator[bytes]:
        """What follows once they are active."""
        version = self._version()
        for install in batch:
            yield address_message(version, install.id, install.remote)
            # these take over the addresses that their IKE_SA has
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
        if version is not None and ike_ids:
            await self._channel.send([delete_message(version, ike_id) for ike_id in ike_ids])

    async def resync(self, segments: set[int]) -> None:
        """Ask charon for everything about the SAs of these segments; it rekeys their CHILD_SAs afterwards."""
        version = self._channel.version
        if version is not None:
            await self._channel.send(
                [segment_message(version, MessageType.RESYNC, segment) for segment in sorted(segments)]
            )
