"""Rebuilt IKE_SAs into an unmodified charon, over its HA channel.

An SA is installed as the HA peer's, which leaves it PASSIVE, in a landing segment (`segments`); one toggle of that
segment activates all that were installed into it; then each gets its peer's real address.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import msgspec

from bridge.charon.channel import Channel, ChannelError
from bridge.charon.ha import (
    ADDITIONAL_KEY_EXCHANGES_SINCE,
    PRIVATE_WORDS_SINCE,
    Attr,
    IkeId,
    MessageType,
    encode,
)
from bridge.charon.sa import Condition, Sa
from bridge.charon.segments import LandingChoice, landing_addresses
from bridge.children import NewChild
from bridge.ike.transforms import Suite
from bridge.stub import Endpoint, Identity

FIRST_MESSAGE_ID = 1
"""of the client's requests on a rebuilt SA; IKE_SA_INIT with IKE_SA_SYNC was message 0"""

_PRIVATE = int(Condition.PRIVATE)

FEW = 8
"""SAs in a batch whose activation is not measured apart from their installation: that costs a client time"""

Attributes = list[tuple[Attr, Any]]


class Install(msgspec.Struct, frozen=True, gc=False):
    """All that charon is told of one rebuilt IKE_SA. `local` is this host, `id.initiator` whether it is the client."""

    id: IkeId
    suite: Suite
    sk_d_old: bytes
    nonce_i: bytes
    nonce_r: bytes
    local_id: Identity
    remote_id: Identity
    eap_id: Identity | None
    local: Endpoint
    remote: Endpoint
    connection: str
    conditions: tuple[int, ...]
    extensions: tuple[int, ...]
    local_vips: tuple[str, ...]
    remote_vips: tuple[str, ...]
    children: tuple[NewChild, ...] = ()
    """to be installed with it"""
    message_id: int = FIRST_MESSAGE_ID
    """of the client's next request"""

    def __repr__(self) -> str:
        # keys are in it
        return f"Install({self.id.spi_i.hex()}, {self.id.spi_r.hex()})"

    @classmethod
    def of(
        cls,
        sa: Sa,
        *,
        sk_d_old: bytes,
        nonce_i: bytes,
        nonce_r: bytes,
        local_vips: tuple[str, ...],
        remote_vips: tuple[str, ...],
        children: tuple[NewChild, ...] = (),
        message_id: int = FIRST_MESSAGE_ID,
    ) -> Install:
        """What makes charon have `sa`, whose peers and their identities are known."""
        assert sa.local_id is not None
        assert sa.remote_id is not None
        assert sa.local is not None
        assert sa.remote is not None
        return cls(
            id=sa.id,
            suite=sa.suite,
            sk_d_old=sk_d_old,
            nonce_i=nonce_i,
            nonce_r=nonce_r,
            local_id=sa.local_id,
            remote_id=sa.remote_id,
            eap_id=sa.eap_id,
            local=sa.local,
            remote=sa.remote,
            connection=sa.connection,
            conditions=sa.conditions,
            extensions=sa.extensions,
            local_vips=local_vips,
            remote_vips=remote_vips,
            children=children,
            message_id=message_id,
        )


def add_message(version: int, install: Install, landing: str) -> bytes:
    """IKE_ADD: keys. charon derives as for a rekey; with an empty shared secret that is the draft's SKEYSEED
    (draft-xu-ike-sa-sync-01 section 3.3)."""
    suite = install.suite
    attributes: Attributes = [
        (Attr.IKE_VERSION, 2),
        (Attr.IKE_ID, install.id),
        (Attr.ALG_OLD_PRF, suite.prf),
        (Attr.OLD_SKD, install.sk_d_old),
        (Attr.ALG_ENCR, suite.encr),
    ]
    if suite.encr_len:
        attributes.append((Attr.ALG_ENCR_LEN, suite.encr_len))
    if suite.integ:
        attributes.append((Attr.ALG_INTEG, suite.integ))
    attributes += [
        (Attr.ALG_PRF, suite.prf),
        (Attr.ALG_KE, suite.group),
    ]
    if suite.additional and version >= ADDITIONAL_KEY_EXCHANGES_SINCE:
        # what the SA was made with; none of them is done again
        attributes.append((Attr.ALG_ADD_KES, struct.pack(f"!{len(suite.additional)}H", *suite.additional)))
    attributes += [
        (Attr.NONCE_I, install.nonce_i),
        (Attr.NONCE_R, install.nonce_r),
        (Attr.SECRET, b""),
        (Attr.REMOTE_ADDR, Endpoint(landing, install.remote.port)),
    ]
    return encode(version, MessageType.IKE_ADD, attributes)


def update_message(version: int, install: Install, landing: str) -> bytes:
    """IKE_UPDATE: who the peers are; makes the SA PASSIVE. charon wants IKE_ID first."""
    attributes: Attributes = [
        (Attr.IKE_ID, install.id),
        (Attr.LOCAL_ID, install.local_id),
        (Attr.REMOTE_ID, install.remote_id),
    ]
    if install.eap_id is not None:
        attributes.append((Attr.REMOTE_EAP_ID, install.eap_id))
    attributes += [
        (Attr.LOCAL_ADDR, install.local),
        (Attr.REMOTE_ADDR, Endpoint(landing, install.remote.port)),
    ]
    attributes += [(Attr.CONDITIONS, word) for word in _words(version, install.conditions)]
    attributes += [(Attr.EXTENSIONS, word) for word in _words(version, install.extensions)]
    attributes.append((Attr.CONFIG_NAME, install.connection))
    attributes += [(Attr.LOCAL_VIP, Endpoint(vip, 0)) for vip in install.local_vips]
    attributes += [(Attr.REMOTE_VIP, Endpoint(vip, 0)) for vip in install.remote_vips]
    return encode(version, MessageType.IKE_UPDATE, attributes)


def _words(version: int, words: tuple[int, ...]) -> tuple[int, ...]:
    """Those words of conditions or extensions that a charon of this version takes for what they are. An older one
    reads the private word of a newer one's SA as another plain word, which takes NAT_ANY back."""
    return words if version >= PRIVATE_WORDS_SINCE else tuple([word for word in words if not word & _PRIVATE])


def message_id_message(version: int, install: Install) -> bytes:
    """Where the client's requests go on; the gateway's first is 0, where charon starts anyway."""
    kind = MessageType.IKE_MID_INITIATOR if install.id.initiator else MessageType.IKE_MID_RESPONDER
    return encode(version, kind, [(Attr.IKE_ID, install.id), (Attr.MID, install.message_id)])


def address_message(version: int, ike_id: IkeId, remote: Endpoint) -> bytes:
    """IKE_UPDATE that only moves the SA to `remote`; charon applies it in any state."""
    return encode(version, MessageType.IKE_UPDATE, [(Attr.IKE_ID, ike_id), (Attr.REMOTE_ADDR, remote)])


def child_message(version: int, ike_id: IkeId, new: NewChild) -> bytes:
    """CHILD_ADD: charon derives its keys from SK_d and the nonces (RFC 7296 section 2.17) and installs it."""
    child = new.child
    attributes: Attributes = [
        (Attr.IKE_ID, ike_id),
        (Attr.INITIATOR, int(child.initiator)),
        (Attr.INBOUND_SPI, child.spi_in),
        (Attr.OUTBOUND_SPI, child.spi_out),
        (Attr.INBOUND_CPI, 0),
        (Attr.OUTBOUND_CPI, 0),
        (Attr.IPSEC_MODE, child.mode),
        (Attr.IPCOMP, child.ipcomp),
        (Attr.CONFIG_NAME, child.name),
        (Attr.ALG_ENCR, child.encr),
    ]
    if child.encr_len:
        attributes.append((Attr.ALG_ENCR_LEN, child.encr_len))
    if child.integ:
        attributes.append((Attr.ALG_INTEG, child.integ))
    attributes += [(Attr.ESN, child.esn), (Attr.NONCE_I, new.nonce_i), (Attr.NONCE_R, new.nonce_r)]
    attributes += [(Attr.LOCAL_TS, selector) for selector in child.local_ts]
    attributes += [(Attr.REMOTE_TS, selector) for selector in child.remote_ts]
    return encode(version, MessageType.CHILD_ADD, attributes)


def delete_message(version: int, ike_id: IkeId) -> bytes:
    """IKE_DELETE: charon drops the SA in silence, no DELETE to the peer, no updown event."""
    return encode(version, MessageType.IKE_DELETE, [(Attr.IKE_ID, ike_id)])


def segment_message(version: int, kind: MessageType, segment: int) -> bytes:
    """SEGMENT_TAKE, SEGMENT_DROP or RESYNC of one segment."""
    return encode(version, kind, [(Attr.SEGMENT, segment)])


class Installer:
    """Installs batches into one charon, one after the other. Raises ChannelError when charon is not there."""

    def __init__(self, channel: Channel, landing: LandingChoice) -> None:
        self.toggles = 0
        self.toggle_seconds = 0.0
        """how long the last activation kept the SAs of its segment from answering, at most"""
        self._channel = channel
        self._landing = landing
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
        """Seconds until an activation costs running SAs no more than their share."""
        return self._landing.wait(asyncio.get_running_loop().time())

    async def _land(self, batch: Sequence[Install]) -> None:
        segment = self._landing.next(asyncio.get_running_loop().time())
        # all of it before any is sent: what charon was told half it would derive other keys for
        messages, afterwards = list(self._installs(batch, segment)), list(self._activated(batch))
        if not self._landed:
            self._where = self._whose()
        await self._channel.send(messages)
        self._landed += batch
        self._afterwards += afterwards

    async def _activate(self) -> None:
        clock = asyncio.get_running_loop().time
        segment = self._landing.next(clock())
        batch, self._landed = self._landed, []
        afterwards, self._afterwards = self._afterwards, []
        if self._whose() != self._where:
            raise ChannelError("charon was restarted before the rebuilt SAs were active")
        if len(batch) > FEW:
            await self._channel.drained()
            began = clock()
            await self._channel.send(self._toggle(segment))
            await self._channel.drained()
            self.toggle_seconds = clock() - began
            await self._channel.send(afterwards)
            await self._channel.drained()
        else:
            began = clock()
            await self._channel.send(chain(self._toggle(segment), afterwards))
            await self._channel.drained()
            self.toggle_seconds = clock() - began
        self._landing.disturbed(segment, clock(), self.toggle_seconds)
        self._landing.established.update(self._landing.segment_of(install.remote.address) for install in batch)
        self.toggles += 1

    def _whose(self) -> int | None:
        """Which charon is there."""
        end = self._channel.charon_socket()
        return None if end is None else end.inode

    def _installs(self, batch: Sequence[Install], segment: int) -> Iterator[bytes]:
        version = self._channel.version
        assert version is not None
        landing = self._addresses[segment]
        for install in batch:
            yield add_message(version, install, landing)
            yield update_message(version, install, landing)
            yield message_id_message(version, install)

    def _toggle(self, segment: int) -> Iterator[bytes]:
        version = self._channel.version
        assert version is not None
        # charon takes no notice of a TAKE where the segment is not active yet
        yield segment_message(version, MessageType.SEGMENT_TAKE, segment)
        yield segment_message(version, MessageType.SEGMENT_DROP, segment)

    def _activated(self, batch: Sequence[Install]) -> Iterator[bytes]:
        """What follows once they are active."""
        version = self._channel.version
        assert version is not None
        for install in batch:
            yield address_message(version, install.id, install.remote)
            # these take over the addresses that their IKE_SA has
            for child in install.children:
                yield child_message(version, install.id, child)

    async def add_children(self, ike_id: IkeId, children: Sequence[NewChild]) -> None:
        """Install CHILD_SAs of an IKE_SA that is there; done when charon has them."""
        version = self._channel.version
        assert version is not None
        await self._channel.send([child_message(version, ike_id, child) for child in children])
        await self._channel.drained()

    async def delete(self, ike_ids: Sequence[IkeId]) -> None:
        """Drop SAs in silence."""
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
