"""From the SAs of this gateway to stubs in the bank: Initiate, Update and Delete Stub (draft-xu-ike-sa-sync-01
section 3.4), and back at start, so that charon need not be asked for what the bank still has."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import structlog

from bridge.bank.interface import BankUnavailable, StubBank
from bridge.bank.write_queue import WriteQueue
from bridge.charon.ike_sa import IkeSa, gateway_address, sa_of
from bridge.charon.vici_types import SaInfo
from bridge.config import GatewayConfig
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.unanswered_rekeys import UnansweredRekeys
from bridge.stub.stub import Index

log = structlog.get_logger()


class Publisher:
    """Keeps one stub per SA of this gateway in the bank. Its index has the configured address, or where there is none
    the local address of each SA; SAs at one of the addresses that gateways share are indexed under it."""

    def __init__(
        self,
        config: GatewayConfig,
        writer: WriteQueue,
        bank: StubBank,
        known: KnownSessions,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.addresses: set[str] = set()
        """the gateway's own addresses in the index, of stubs that were stored since the start"""
        self._writer = writer
        self._bank = bank
        self._address = config.address
        self._sync = config.sync
        self._shared = config.takeover.addresses
        self._endings = known.endings
        self._living = known.living
        self._revocations = known.revocations
        self.locked_out: Callable[[], None] = lambda: None
        """called for an SA of an identity that is locked out"""
        self.on_address: Callable[[str], None] = lambda _: None
        """called with the gateway's own address in the index of each stub that is stored"""
        self._wall = wall
        self.rekeys = UnansweredRekeys(self._take_back)

    @property
    def own_addresses(self) -> set[str]:
        """Those of `addresses` that only this gateway has: sessions at a shared one are at the gateway that has
        it."""
        return self.addresses.difference(self._shared)

    def publish(self, sa: IkeSa) -> None:
        """Store the stub of an SA that is up, as it is now. That of a session which ended is not stored again; that of
        an SA which is not resumable after all is deleted."""
        self.rekeys.came_up(sa)
        if self._revocations.revoked(sa):
            self.locked_out()
            return
        self._living.put(sa)
        index = sa.index_here(self._address)
        if not sa.resumable:
            self._take_back(sa)
            return
        if index in self._endings:
            return
        # milliseconds: grows with every change, and across restarts of the sidecar
        sa.revision = max(sa.revision + 1, int(self._wall() * 1000))
        expires = sa.expires
        if self._sync.lifetime is not None:
            expires = min(expires, int(self._wall()) + self._sync.lifetime)
        before = sa.published
        if before is not None and before != index:
            # it moved to another address of this gateway
            self._writer.submit_delete(before, expires=sa.stub_expires)
        sa.published_at, sa.stub_expires = index.gateway, expires
        if index.gateway not in self._shared:
            # another gateway may have that one by now
            self.addresses.add(index.gateway)
            self.on_address(index.gateway)
        self._writer.submit(sa.stub(index, with_secret=self._sync.shared_secret, expires=expires))

    def deleting(self, sa: IkeSa) -> None:
        """Delete the stub of an SA that charon waits to see deleted: its client may not answer for minutes."""
        if sa.index_here(self._address) not in self._endings:
            log.info("sa-being-deleted", connection=sa.connection, **sa.id.logged)
            self.withdraw(sa)

    def gone(self, sa: IkeSa, heirs: Sequence[IkeSa]) -> None:
        """An SA ended, which was being rekeyed to these. Its client, if it has rekeyed it, may come back with the old
        one until a request shows that it has the answer: that stub stays."""
        if all(heir.id.initiator for heir in heirs):
            self.withdraw(sa)
            return
        self._living.take_out(sa)
        self.rekeys.begin(sa, heirs)

    def withdraw(self, sa: IkeSa) -> None:
        """Delete the stub of an SA that ended."""
        self._living.take_out(sa)
        self.rekeys.answered(sa.id.spis)
        self._take_back(sa)

    def _take_back(self, sa: IkeSa) -> None:
        if (sa.resumable or sa.published_at) and sa.local is not None:
            index = sa.published or sa.index_here(self._address)
            expires = max(sa.stub_expires, sa.expires)
            epoch = sa.derivation.epoch if sa.derivation is not None else 0
            self._endings.add(index, expires, epoch)
            self._writer.submit_delete(index, expires=expires, epoch=epoch)
            sa.published_at = ""

    def _indexes(self, info: SaInfo) -> list[Index]:
        """Where the stub of an IKE_SA may be: at an address that gateways share, that of a session which was resumed
        lies under the gateway's own one."""
        local, spi = info.local.address, info.spi_i if info.initiator else info.spi_r
        own = Index(gateway_address(self._address, local), spi)
        return [Index(local, spi), own] if local in self._shared and own.gateway != local else [own]

    async def recover(self, infos: list[SaInfo]) -> list[IkeSa] | None:
        """SAs that charon has and this sidecar does not know, from their stubs. None while the bank is away."""
        sought = [(info, index) for info in infos for index in self._indexes(info)]
        found: list[IkeSa] = []
        try:
            stubs = await self._bank.get([index for _, index in sought])
        except BankUnavailable as error:
            log.warning(error.event, component="recovery", reason=str(error))
            return None
        for (info, _), stub in zip(sought, stubs, strict=True):
            if stub is not None and stub.spi_i + stub.spi_r == info.spis:
                sa = sa_of(stub)
                if sa.predecessor is not None:
                    self._endings.add(sa.predecessor, stub.expires)
                self._living.put(sa)
                found.append(sa)
        log.info("recovered", listed=len(infos), from_bank=len(found))
        return found
