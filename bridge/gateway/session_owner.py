"""Which of the gateways that share an address owns a session: the bank decides, by compare-and-set of owner and epoch.

A gateway that takes a session over raises its epoch. What an older owner writes is refused, and it drops the session
without a message to the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Final, Protocol

import structlog
from msgspec.structs import replace

from bridge.bank.interface import BankUnavailable, SharedBank, StubBank, Taking
from bridge.bank.write_queue import WriteQueue
from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import SaInfo
from bridge.gateway.endings import Endings
from bridge.gateway.publisher import Publisher
from bridge.gateway.takeover_session import CHANGED, ENDED, owned
from bridge.stub import bank_keys
from bridge.stub.derivation import Derivation
from bridge.stub.stub import Index, Stub

log = structlog.get_logger()

TRIES: Final = 3
"""to become the owner of a session whose stub changes meanwhile"""
BATCH: Final = 256
"""stubs that are read at a time"""
STORE_SECONDS: Final = 2.0
"""that the bank has, and charon, before the answer to `yield`: the fence holds from its beginning"""
PUBLISH_SECONDS: Final = 0.25
"""between two stores of message IDs"""
ANNOUNCED_SECONDS: Final = 60.0
"""that the bank names the gateway which took an address over last"""


async def _nothing(_: IkeSa) -> None:
    """No virtual IP."""


def _epoch(stub: Stub) -> int:
    return stub.derivation.epoch if stub.derivation is not None else 0


class OwnersBank(StubBank, SharedBank, Protocol):
    """A bank of stubs that tells who owns a session."""


class SessionOwner:
    """This gateway, by its own `address`, as the owner of sessions. `dropped` is called with each SA that it drops
    without a message to the client; before that the SA is forgotten."""

    def __init__(
        self,
        address: str,
        charon: Charon,
        bank: OwnersBank,
        publisher: Publisher,
        writer: WriteQueue,
        endings: Endings,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.address = address
        self.lost = 0
        """sessions that another gateway has taken from here"""
        self.dropped: Callable[[IkeSa], None] = lambda _: None
        self.before_drop: Callable[[IkeSa], Awaitable[None]] = _nothing
        """for its virtual IPs, which its session keeps at another gateway"""
        self.lost_at: Callable[[str], None] = lambda _: None
        """called with an address that sessions were lost at"""
        self._charon = charon
        self._bank = bank
        self._publisher = publisher
        self._writer = writer
        self._endings = endings
        self._wall = wall
        self._unpublished: dict[bytes, IkeSa] = {}
        self._lost: dict[Index, None] = {}
        bank.on_taken = self._taken_elsewhere

    # becoming the owner

    async def become(
        self, stubs: Sequence[Stub], obstacle: Callable[[Stub], str]
    ) -> tuple[list[Stub], list[tuple[Stub, str]]]:
        """Own these sessions: the stubs as the bank has them now, and those that this gateway does not own, with the
        reason. `obstacle` is asked again about a stub that has changed meanwhile. Raises BankUnavailable."""
        mine: list[Stub] = []
        others: list[tuple[Stub, str]] = []
        epochs = {stub.index: _epoch(stub) for stub in stubs}
        todo = list(stubs)
        for attempt in range(TRIES):
            if attempt and todo:
                changed, todo = todo, []
                for stub, again in zip(changed, await self._bank.get([stub.index for stub in changed]), strict=True):
                    if again is None:
                        others.append((stub, ENDED))
                    elif again.derivation is None or _epoch(again) > epochs[stub.index]:
                        others.append((again, CHANGED))
                    elif reason := obstacle(again):
                        others.append((again, reason))
                    else:
                        todo.append(again)
            if not todo:
                break
            now = self._wall()
            pairs = [(stub, owned(stub, self.address, now=now)) for stub in todo]
            todo = []
            for (stub, new), said in zip(pairs, await self._bank.take(pairs), strict=True):
                if said is Taking.TAKEN:
                    # what waits to be written is of the epoch before
                    self._writer.discard(new.index)
                    self._endings.remove(new.index)
                    mine.append(new)
                elif said is Taking.ENDED:
                    others.append((stub, ENDED))
                else:
                    todo.append(stub)
        others += [(stub, CHANGED) for stub in todo]
        return mine, others

    async def announce(self, address: str) -> None:
        """Tell a gateway that had the address, and lives, to look whether it has lost sessions: after they have a new
        owner."""
        with contextlib.suppress(BankUnavailable):
            await self._bank.post(bank_keys.TAKEOVER_KIND, address, self.address, ANNOUNCED_SECONDS)

    async def another_takes(self, address: str) -> bool:
        """Whether the gateway that said last that it takes sessions at an address is another one. Raises
        BankUnavailable."""
        said = await self._bank.posted(bank_keys.TAKEOVER_KIND, address)
        return said is not None and said != self.address.encode()

    # being the owner

    def own_request(self, sa: IkeSa) -> None:
        """charon sent a request on an SA: its stub has another message ID."""
        self._unpublished[sa.id.spis] = sa

    async def run(self) -> None:
        """Store the message IDs of this gateway's own requests, those of a moment together; and drop what another
        gateway has."""
        while True:
            await asyncio.sleep(PUBLISH_SECONDS)
            sas, self._unpublished = self._unpublished, {}
            for spis, sa in sas.items():
                if sa.up and self._charon.tracker.sas.get(spis) is sa:
                    self._publisher.publish(sa)
            lost, self._lost = self._lost, {}
            if lost:
                await self._drop_lost(lost)

    def ended(self, stub: Stub) -> None:
        """A session that this gateway owns ended while no sidecar ran."""
        epoch = _epoch(stub)
        self._endings.add(stub.index, stub.expires, epoch)
        self._writer.submit_delete(stub.index, expires=stub.expires, epoch=epoch)

    def keyed(self, sa: IkeSa) -> None:
        """The CHILD_SAs of a session that was taken over have new keys."""
        if sa.derivation is not None and sa.derivation.unkeyed:
            sa.derivation = replace(sa.derivation, unkeyed=False)
            if sa.up:
                self._publisher.publish(sa)

    async def release(self, sas: Iterable[IkeSa]) -> bool:
        """Have the bank know the last message IDs of these, and that they have no owner now; whether it does."""
        for sa in sas:
            if sa.up and sa.derivation is not None:
                sa.derivation = replace(sa.derivation, owner="")
                self._publisher.publish(sa)
        try:
            async with asyncio.timeout(STORE_SECONDS):
                await self._writer.flush()
        except TimeoutError:
            return False
        return True

    # not being the owner

    def _taken_elsewhere(self, index: Index) -> None:
        """The bank refused what this gateway wrote: another one has the session."""
        self._lost[index] = None

    async def look(self) -> None:
        """Whether another gateway has taken sessions that are here: it said that it takes some. Raises
        BankUnavailable."""
        mine = {
            sa.index_here(self.address): sa for sa in self._charon.tracker.established() if sa.derivation is not None
        }
        indexes = list(mine)
        for first in range(0, len(indexes), BATCH):
            bundle = indexes[first : first + BATCH]
            for index, stub in zip(bundle, await self._bank.get(bundle), strict=True):
                ours = mine[index].derivation
                theirs = stub.derivation if stub is not None else None
                if theirs is not None and ours is not None and theirs.epoch > ours.epoch:
                    self._lost[index] = None

    async def _drop_lost(self, lost: Collection[Index]) -> None:
        """Drop those that another gateway has by the bank's word: it also refuses what this gateway wrote before it
        took a session over itself."""
        theirs: dict[Index, Derivation] = {}
        indexes = list(lost)
        try:
            for first in range(0, len(indexes), BATCH):
                bundle = indexes[first : first + BATCH]
                for index, stub in zip(bundle, await self._bank.get(bundle), strict=True):
                    if stub is not None and stub.derivation is not None:
                        theirs[index] = stub.derivation
        except BankUnavailable:
            self._lost |= dict.fromkeys(indexes)
            return
        for index, held in theirs.items():
            if index in self._endings and held.epoch > self._endings.epoch(index):
                self._endings.remove(index)
        sas = []
        for sa in self._charon.tracker.sas.values():
            known = theirs.get(sa.index_here(self.address)) if sa.derivation is not None else None
            if sa.derivation is None or known is None or known.epoch <= sa.derivation.epoch:
                continue
            if known.owner == self.address:
                # charon has reported it again, and does not know of epochs
                sa.derivation = replace(sa.derivation, epoch=known.epoch)
                self._publisher.publish(sa)
            else:
                sas.append(sa)
        self.lost += len(sas)
        for sa in sas:
            log.warning("session-taken-by-another", connection=sa.connection, **sa.id.logged)
        await self.drop(sas)
        for address in {sa.local.address for sa in sas if sa.local is not None}:
            self.lost_at(address)

    async def drop(self, sas: Iterable[IkeSa]) -> None:
        """Remove these from charon without a message to their clients: their sessions go on elsewhere."""
        wanted = list(sas)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STORE_SECONDS):
                for sa in wanted:
                    await self.before_drop(sa)
        left = [sa for sa in wanted if self._charon.tracker.sas.get(sa.id.spis) is sa]
        sharing = self._charon.sharing([sa.id for sa in left])
        # forgotten first: that charon does not list them any more is no end of their sessions
        for sa in left:
            self._charon.tracker.forget(sa.id)
            self._unpublished.pop(sa.id.spis, None)
            self.dropped(sa)
        try:
            async with asyncio.timeout(STORE_SECONDS):
                await self._charon.remove([sa.id for sa in left], sharing=sharing)
        except (TimeoutError, ChannelError) as error:
            # charon hangs, or is gone: the fence keeps it silent
            log.warning("sessions-not-dropped", sessions=len(left), reason=str(error) or "charon hangs")

    async def abandoned(self, address: str) -> tuple[frozenset[str], bool]:
        """Of the owners of sessions at an address that are not here, those that do not have them any more: none, a
        gateway that does not live, or this one; and whether any session is at another gateway. Raises
        BankUnavailable."""
        owners = set()
        async for page in self._bank.download(address, BATCH):
            owners |= {
                stub.derivation.owner
                for stub in page
                if stub.derivation is not None and stub.spi_i + stub.spi_r not in self._charon.tracker.sas
            }
        alive = {gateway for gateway, sign in (await self._bank.gateways()).items() if sign.alive} - {self.address}
        return frozenset(owners - alive), bool(owners & alive)

    async def drop_foreign(
        self, infos: Sequence[SaInfo], away: Collection[str], spared: Collection[bytes]
    ) -> set[bytes]:
        """Of SAs at shared addresses that charon has and this sidecar does not know, drop those that another gateway
        owns or whose address is `away`, but for the `spared` (both SPIs); gives their SPIs. Raises BankUnavailable."""
        stubs = await self._bank.get(
            [Index(info.local.address, info.spi_i if info.initiator else info.spi_r) for info in infos]
        )
        drop = {
            info.spis: IkeId.of(info.spi_i, info.spi_r, info.initiator)
            for info, stub in zip(infos, stubs, strict=True)
            if info.spis not in spared and (info.local.address in away or self._is_anothers(stub))
        }
        if drop:
            log.warning("sessions-of-others-dropped", sessions=len(drop))
            with contextlib.suppress(ChannelError):
                await self._charon.remove(list(drop.values()))
        return set(drop)

    def _is_anothers(self, stub: Stub | None) -> bool:
        return stub is not None and stub.derivation is not None and stub.derivation.owner != self.address
