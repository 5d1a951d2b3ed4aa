"""What a charon that died left in the kernel, of sessions that go on elsewhere.

The kernel's ESP outlives charon: its SAs, policies and routes stay, and carry the traffic of a session until its client
has resumed. From then on they lead the packets of the inner network to an SA that the client no longer has, and a
routing daemon goes on announcing the route. No charon removes them, not even the next one here. So the sidecar does: as
soon as a session went on elsewhere, and when it has ended or expired.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import structlog

from bridge.bank.interface import BankUnavailable, StubBank
from bridge.bank.keyspace import Event
from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa, sa_of
from bridge.charon.vici_types import ViciError
from bridge.gateway.address_book import AddressBook
from bridge.net import xfrm
from bridge.net.xfrm import EspSa
from bridge.service.metrics import Metrics
from bridge.stub import bank_keys
from bridge.stub.child_sa import wire_spi
from bridge.stub.stub import Index

log = structlog.get_logger()

TABLE: Final = 220
"""charon's routing table, unless charon.routing_table says otherwise"""
LOOK_SECONDS: Final = 30.0
"""between two looks at what no event was about"""
START_SECONDS: Final = 0.5
"""between two looks whether charon is there, at the start"""
PACE: Final = 5
"""a removal that took t seconds is followed by a pause of this many t: it lists all policies"""

Remove = Callable[[Sequence[EspSa], Sequence[EspSa], int], int]


class LeftInKernel:
    """IKE_SAs that charon lost, and whose CHILD_SAs the kernel may still have; `run` is a task. `address`: that of the
    stubs of this gateway; None: each SA's own."""

    def __init__(
        self,
        charon: Charon,
        bank: StubBank,
        address: str | None,
        *,
        outbound: Callable[[int], dict[EspSa, str]] = xfrm.outbound,
        remove: Remove = xfrm.remove,
        look: float = LOOK_SECONDS,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._every = look
        self._charon = charon
        self._bank = bank
        self._address = address
        self._outbound = outbound
        self._book = AddressBook(bank)
        self._remove = remove
        self._wall = wall
        self.removed: Callable[[IkeSa], None] = lambda _: None
        """called with each SA that the kernel has nothing of any more"""
        self._failures = 0
        self._lost: dict[bytes, IkeSa] = {}
        """by both SPIs"""
        self._published: set[Index] = set()
        """the indexes of their stubs: events of others are not about them"""
        self._suspected: set[Index] = set()
        self._over: dict[bytes, IkeSa] = {}
        """those that are to be removed"""
        self._wake = asyncio.Event()

    def gauges(self, metrics: Metrics) -> None:
        """How many there are, and what went wrong, for `status`."""
        metrics.gauge("sessions_left_in_kernel", "sessions that charon lost and whose ESP may go on", lambda: len(self))
        metrics.total(
            "left_in_kernel_failures",
            "attempts to look for, or to remove, what a charon that died left in the kernel, that failed",
            lambda: self._failures,
        )

    def __len__(self) -> int:
        """How many there are."""
        return len(self._lost)

    def lost(self, sas: Iterable[IkeSa]) -> None:
        """charon was restarted, and has none of these."""
        self._lose(sas)
        self._suspected |= self._published
        self._wake.set()

    def _lose(self, sas: Iterable[IkeSa]) -> None:
        for sa in sas:
            self._lost[sa.id.spis] = sa
            if sa.published is not None:
                self._published.add(sa.published)

    def over(self, sa: IkeSa) -> None:
        """An SA of a charon that is gone, or hangs; its session went on elsewhere."""
        self._over[sa.id.spis] = sa
        self._wake.set()

    def on_event(self, event: Event) -> None:
        """Something happened to a key of the bank."""
        if self._lost and event.event == "set" and (named := bank_keys.read_moved_key(event.key)) is not None:
            index = Index(*named)
            if index in self._published:
                self._suspected.add(index)
                self._wake.set()

    async def run(self) -> None:
        """Remove what is over, until it is cancelled."""
        known, looked = False, time.monotonic()
        while True:
            ready = self._charon.reconciled.is_set()
            if ready and not known:
                known = await self._found()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every if ready else START_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            began = time.monotonic()
            try:
                await self._moved()
                if self._lost and began - looked >= self._every:
                    looked = began
                    await self._look()
            except BankUnavailable as error:
                log.info(error.event, component="left-in-kernel", reason=str(error))
            await self._remove_all()
            await asyncio.sleep(PACE * (time.monotonic() - began))

    async def _found(self) -> bool:
        """Look what is left of a charon that died while no sidecar ran; whether that could be found out. What the bank
        has a stub of stays; all else ended or went on elsewhere."""
        try:
            left = await asyncio.to_thread(self._outbound, TABLE)
            if not left:
                return True
            # asked afterwards: it has what was set up or rekeyed meanwhile
            # by their SPIs alone: the kernel has the address of a client that is moving, or of an SA that is not active
            # yet, earlier or later than VICI
            living = {wire_spi(child.spi_out) for info in await self._charon.vici.list_sas() for child in info.children}
            left = {sa: of for sa, of in left.items() if sa.spi not in living}
            for address in {*left.values(), *([self._address] if self._address else [])}:
                async for page in self._bank.download(address):
                    for sa in map(sa_of, page):
                        outbound, _ = esp_sas(sa)
                        if not left.keys().isdisjoint(outbound):
                            self._lose([sa])
                            for each in outbound:
                                left.pop(each, None)
            if left:
                policies = await asyncio.to_thread(self._remove, list(left), [], TABLE)
                log.info("left-in-kernel-removed", policies=policies)
        except (BankUnavailable, ViciError, OSError) as error:
            self._failures += 1
            log.warning("left-in-kernel-not-read", reason=str(error), again_s=self._every)
            return False
        return True

    async def _moved(self) -> None:
        """Find those that are suspected and have a mark: sealed, it alone proves that a session went on."""
        suspected, self._suspected = self._suspected, set()
        found = {sa.published: sa for sa in self._lost.values() if sa.published in suspected}
        indexes = [index for index in found if index is not None]
        if not indexes:
            return
        for index, new in zip(indexes, await self._bank.moved(indexes), strict=True):
            if new:
                self._over[found[index].id.spis] = found[index]

    async def _look(self) -> None:
        """Find those of which no event came: that moved, ended or expired, or whose virtual IP another session has."""
        self._suspected = set(self._published)
        await self._moved()
        now = self._wall()
        kept = {}
        for spis, sa in self._lost.items():
            until = sa.stub_expires or sa.expires
            if until and until <= now:
                self._over[spis] = sa
            elif sa.published is not None and spis not in self._over:
                kept[sa.published] = sa
        for (_, sa), ended in zip(kept.items(), await self._bank.ended(list(kept)), strict=True):
            if ended:
                self._over[sa.id.spis] = sa
        of = {address: sa for sa in self._lost.values() for address in sa.remote_vips}
        for holder in await self._book.holders([(address, address) for address in of]):
            if holder.stub.index != of[holder.address].published:
                self._over[of[holder.address].id.spis] = of[holder.address]

    async def _remove_all(self) -> None:
        over = list(self._over.values())
        if not over:
            return
        here = self._charon.tracker.sas
        # one that was taken over as it is has the same SPIs again
        doomed = {sa.id.spis: sa for sa in over if sa.id.spis not in self._lost or sa.id.spis not in here}
        living = outbound_of(sa for spis, sa in here.items() if spis not in doomed)
        outbound = [each for each in outbound_of(doomed.values()) if each not in living]
        inbound = [each for sa in doomed.values() for each in esp_sas(sa)[1]]
        try:
            policies = await asyncio.to_thread(self._remove, outbound, inbound, TABLE)
        except OSError as error:
            self._failures += 1
            log.warning("left-in-kernel-not-removed", reason=str(error), sas=len(over))
            return
        for sa in over:
            self._over.pop(sa.id.spis, None)
            self._lost.pop(sa.id.spis, None)
            if sa.published is not None:
                self._published.discard(sa.published)
            self.removed(sa)
        if policies:
            log.info("left-in-kernel-removed", sas=len(over), policies=policies)


def outbound_of(sas: Iterable[IkeSa]) -> set[EspSa]:
    """The outbound ESP SAs of these. Their SPIs were chosen by the clients: one that knows another's, behind the same
    NAT, can have the same in its own session."""
    return {each for sa in sas for each in esp_sas(sa)[0]}


def esp_sas(sa: IkeSa) -> tuple[list[EspSa], list[EspSa]]:
    """The ESP SAs of its CHILD_SAs, outbound and inbound."""
    if sa.local is None or sa.remote is None:
        return [], []
    return (
        [EspSa(sa.remote.address, wire_spi(child.spi_out)) for child in sa.children],
        [EspSa(sa.local.address, wire_spi(child.spi_in)) for child in sa.children],
    )
