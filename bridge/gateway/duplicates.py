"""Two sessions with one virtual IP: a handshake here was given an address that a session elsewhere has.

It happens with pools that do not know of each other, and with an in-memory pool after a restart of charon. Each new
session's addresses are looked up in the bank, together with those of others that came in the same second. Where another
peer's session has one, the newer session is ended here, so that its client comes again and gets another address
(`sync.duplicate_address`), a few times; then it is left alone, for its pool would give it the same one for ever.

    NEW --no other session has an address of it--> forgotten
     '--another has--> DOUBTFUL --still, CONFIRM_SECONDS later--> reported, or ended
                           '--no longer--> forgotten
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from bridge.bank.interface import BankUnavailable
from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import ViciError
from bridge.config import SyncConfig
from bridge.gateway.address_book import AddressBook, Holder
from bridge.gateway.metrics import GatewayMetrics
from bridge.service.metrics import Metrics
from bridge.stub.stub import Index
from bridge.stub.types import Identity

log = structlog.get_logger()

LOOK_SECONDS: Final = 1.0
"""between two looks into the bank"""
CONFIRM_SECONDS: Final = 2.0
"""after which a duplicate must still be there: a rekey, or a session that is just ending, makes one for a moment"""
ENDS_OF_ONE_PEER: Final = 3
"""how often one peer's session is ended in ENDS_SECONDS: an in-memory pool gives it the same address again"""
ENDS_SECONDS: Final = 3600.0
PENDING_MAX: Final = 100_000


async def _nothing(_: IkeSa, __: Index) -> None:
    """Nothing is to be done before a session is ended."""


class Duplicates:
    """Looks after the addresses of new sessions from `run` on. `address` is this gateway's in the index."""

    def __init__(
        self,
        charon: Charon,
        book: AddressBook,
        sync: SyncConfig,
        metrics: GatewayMetrics,
        address: str | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.before_end: Callable[[IkeSa, Index], Awaitable[None]] = _nothing
        """called with a session and the one elsewhere that has its address, before the session is ended"""
        self.found: dict[bytes, Holder] = {}
        """sessions here, by both SPIs, that share an address with one elsewhere, which is the value"""
        self._charon = charon
        self._book = book
        self._sync = sync
        self._metrics = metrics
        self._address = address
        self._clock = clock
        self._due: dict[bytes, float] = {}
        """when to look at a session's addresses next"""
        self._seen: dict[bytes, tuple[str, ...]] = {}
        """what was looked up"""
        self._ended: dict[Identity, list[float]] = {}

    def gauges(self, metrics: Metrics) -> None:
        """How many are known, for `status`."""
        text = "sessions here with a virtual IP that another peer's session has too"
        metrics.gauge("duplicate_address_sessions", text, lambda: len(self))

    def __len__(self) -> int:
        """How many sessions here are known to share an address."""
        return len(self.found)

    def changed(self, sa: IkeSa) -> None:
        """An SA came up or changed. One that was rebuilt here brought its address along; its session is the older."""
        if not sa.adopted:
            self._look_at(sa)

    def known(self, sa: IkeSa) -> None:
        """An SA is here from before the sidecar started."""
        if sa.predecessor is None:
            self._look_at(sa)

    def _look_at(self, sa: IkeSa) -> None:
        spis = sa.id.spis
        if sa.up and sa.remote_vips and self._seen.get(spis) != sa.remote_vips:
            self._seen[spis] = sa.remote_vips
            if len(self._due) < PENDING_MAX:
                self._due[spis] = self._clock()

    def gone(self, sa: IkeSa) -> None:
        """An SA ended."""
        self._forget(sa.id.spis)

    def _forget(self, spis: bytes) -> None:
        self._due.pop(spis, None)
        self._seen.pop(spis, None)
        self.found.pop(spis, None)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look()
            except BankUnavailable:
                # what is due stays due
                continue

    async def look(self) -> None:
        """Look up what is due. Raises BankUnavailable."""
        now = self._clock()
        sas: list[IkeSa] = []
        for spis in [spis for spis, due in self._due.items() if due <= now]:
            sa = self._charon.tracker.sas.get(spis)
            if sa is None or not sa.up:
                self._forget(spis)
            else:
                sas.append(sa)
        if not sas:
            return
        addresses = {address for sa in sas for address in sa.remote_vips}
        holders: dict[str, list[Holder]] = {}
        for holder in await self._book.holders([(address, address) for address in sorted(addresses)]):
            holders.setdefault(holder.address, []).append(holder)
        for sa in sas:
            others = [h for address in sa.remote_vips for h in holders.get(address, ()) if self._is_another(sa, h)]
            if not others:
                self._due.pop(sa.id.spis, None)
                self.found.pop(sa.id.spis, None)
            elif sa.id.spis not in self.found:
                self.found[sa.id.spis] = others[0]
                self._due[sa.id.spis] = now + CONFIRM_SECONDS
            else:
                self._due.pop(sa.id.spis, None)
                await self._settle(sa, others[0])

    def _is_another(self, sa: IkeSa, holder: Holder) -> bool:
        """Whether a stub is of another peer's session, which is not newer than `sa`: the newer one's gateway acts."""
        stub, here = holder.stub, sa.index_here(self._address)
        if stub.index == (sa.published or here):
            return False
        if (stub.remote_id, stub.eap_id) == (sa.remote_id, sa.eap_id):
            # its own session from before, which it did not end: of a pool that gives a user one address (RADIUS)
            return False
        if stub.index.gateway == here.gateway and stub.spi_i + stub.spi_r not in self._charon.tracker.sas:
            # of a charon that was here before this one: older, also where both are of one second
            return True
        return (stub.established, stub.index) <= (sa.established, here)

    async def _settle(self, sa: IkeSa, holder: Holder) -> None:
        self._metrics.duplicates.inc()
        ends = self._sync.duplicate_address == "end-newer" and self._may_end(sa)
        log.error(
            "duplicate-address",
            address=holder.address,
            spi_i=sa.id.spi_i.hex(),
            spi_r=sa.id.spi_r.hex(),
            peer=sa.remote.address if sa.remote else "",
            other=str(holder.stub.index),
            ended=ends,
            fix="use HA pools (docs/network.md), or pools that do not overlap",
        )
        if not ends:
            return
        try:
            await self.before_end(sa, holder.stub.index)
            await self._end(sa)
        except ViciError as error:
            log.warning("duplicate-not-ended", reason=str(error))
            self._due[sa.id.spis] = self._clock() + CONFIRM_SECONDS

    async def _end(self, sa: IkeSa) -> None:
        found = await self._charon.vici.find_sa(sa.connection, sa.id.spis)
        if found is not None:
            await self._charon.vici.end_sa(found.unique_id)

    def _may_end(self, sa: IkeSa) -> bool:
        who = sa.eap_id or sa.remote_id
        if who is None:
            return False
        now = self._clock()
        ends = [then for then in self._ended.get(who, ()) if then > now - ENDS_SECONDS]
        if len(ends) >= ENDS_OF_ONE_PEER:
            return False
        if len(self._ended) >= PENDING_MAX:
            self._ended.clear()
        self._ended[who] = [*ends, now]
        return True
