"""One virtual IP, one session: who has the addresses of a session that is to be rebuilt here.

An address may belong to another session by the time a session comes (back) to a gateway: a pool of charon that was
emptied by a restart gives it to the next client. Two CHILD_SAs with the same selectors share a reqid, and what the
servers answer to one client goes, decrypted, to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bridge.bank.interface import BankUnavailable, StubBank
from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import Unique
from bridge.stub.stub import Index, Stub


class AddressHolders:
    """Finds which IKE_SAs of this charon have an address of a stub's. `address` is this gateway's in the index. `heir`
    gives both SPIs of what a client has rekeyed an SA (both SPIs) to, while it may lack the answer."""

    def __init__(
        self,
        charon: Charon,
        bank: StubBank,
        address: str | None,
        *,
        heir: Callable[[bytes], bytes | None] = lambda _: None,
    ) -> None:
        self._charon = charon
        self._bank = bank
        self._address = address
        self._heir = heir

    def beside(self, stub: Stub) -> set[bytes]:
        """The SAs here, by both SPIs, that have an address of the stub's, and what its SA was rekeyed to; but not the
        SA that the stub describes."""
        spis = stub.spi_i + stub.spi_r
        holders = self._charon.tracker.virtual_ips.holders(stub.remote_vips)
        holders.discard(spis)
        heir = self._heir(spis)
        return holders if heir is None else holders | {heir}

    def of_others(self, stub: Stub) -> set[bytes]:
        """Those of another session, as far as is known here: not the SA that the stub's was rebuilt from or rekeyed to,
        and not what its client left behind when it set up another one, at a gateway that gave it the same address."""
        replaces, heir = self._replaces(stub), self._heir(stub.spi_i + stub.spi_r)
        return {
            spis
            for spis in self.beside(stub)
            if spis != heir
            and (stub.predecessor is None or self._index(spis) != stub.predecessor)
            and not _is_left_behind(self._charon.tracker.sas.get(spis), stub, replaces=replaces)
        }

    async def moved_away(self, stubs: Sequence[Stub]) -> set[bytes]:
        """Those of them whose session went on at another gateway or ended, according to the bank: leftovers, which
        charon has yet to notice. Empty while the bank does not answer."""
        found = [
            (spis, index)
            for spis in set().union(*(self.of_others(stub) for stub in stubs))
            if (index := self._index(spis)) is not None
        ]
        if not found:
            return set()
        try:
            ended = await self._bank.ended([index for _, index in found])
        except BankUnavailable:
            return set()
        return {spis for (spis, _), over in zip(found, ended, strict=True) if over}

    def _replaces(self, stub: Stub) -> bool:
        """Whether a newer session of a peer ends the older one here, whichever host it is of."""
        connection = self._charon.connection(stub.connection)
        return connection is not None and connection.unique is Unique.REPLACE

    def _index(self, spis: bytes) -> Index | None:
        sa = self._charon.tracker.sas.get(spis)
        return None if sa is None or sa.local is None else sa.published or sa.index_here(self._address)


def _is_left_behind(sa: IkeSa | None, stub: Stub, *, replaces: bool) -> bool:
    """Whether an SA is of the stub's client, and was set up before the stub's was. A younger one, or one of another
    host, may be another device of the same user: it keeps its address."""
    return (
        sa is not None
        and sa.remote_id is not None
        and (sa.remote_id, sa.eap_id, sa.connection) == (stub.remote_id, stub.eap_id, stub.connection)
        and 0 < sa.established < stub.established
        and (replaces or sa.remote == stub.remote)
    )
