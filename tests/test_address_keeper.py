"""What keeps addresses in use elsewhere (bridge.gateway.address_keeper), without root: charon and bank answer from
memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bridge.bank.interface import BankUnavailable
from bridge.charon.charon import Charon
from bridge.charon.ha_channel import HaChannel
from bridge.charon.ike_sa import IkeSa
from bridge.charon.placeholders import HaPool, Placeholders
from bridge.charon.virtual_ips import VirtualIps
from bridge.gateway.address_book import AddressBook, Holder
from bridge.gateway.address_keeper import STUB_SECONDS, AddressKeeper
from bridge.stub.stub import Index, Stub
from role_support import ike_sa

ADDRESS, ANOTHER = "10.20.0.7", "10.20.0.8"
ELSEWHERE = Index("192.0.2.2", b"spi there")
POOL = HaPool("rw", "10.20.0.0/24", "10.20.0.1", "10.20.0.254")


class Channel:
    """charon's, which takes everything at once."""

    version = 5

    async def send(self, messages: Iterable[bytes]) -> None:
        list(messages)

    async def drained(self) -> None: ...


class Gateway:
    """A gateway with one SA, whose client has ADDRESS; `stubs` and `over` are what the bank says."""

    def __init__(self, limit: int = 100) -> None:
        self.now = 5.0
        self.stubs: dict[str, Stub] = {}
        self.over: set[Index] = set()
        self.away = False
        self.placeholders = Placeholders(cast(HaChannel, Channel()), 16)
        self.placeholders.opened, self.placeholders.inactive = True, set()
        self.sa = ike_sa("rw", "192.0.2.1")
        self.sa.remote_vips = (ADDRESS,)
        tracker = SimpleNamespace(sas={self.sa.id.spis: self.sa}, virtual_ips=VirtualIps(), connections={"rw": None})
        tracker.virtual_ips.put(self.sa.id.spis, self.sa.remote_vips, 0)
        reconciled = asyncio.Event()
        reconciled.set()
        self.charon = SimpleNamespace(
            placeholders=self.placeholders,
            tracker=tracker,
            ready=lambda: True,
            reconciled=reconciled,
            landing=SimpleNamespace(count=16, spared=None),
            reserve_again=self._reserve_again,
        )
        self.keeper = AddressKeeper(
            cast(Charon, self.charon),
            cast(AddressBook, self),
            limit=limit,
            pools=lambda: [POOL],
            clock=lambda: self.now,
        )
        self.keeper.pools = [POOL]

    async def _reserve_again(self, addresses: Sequence[str]) -> None: ...

    async def holders(self, ranges: Sequence[tuple[str, str]]) -> list[Holder]:
        if self.away:
            raise BankUnavailable("away")
        return [Holder(address, stub) for address, stub in self.stubs.items()]

    async def not_over(self, indexes: Sequence[Index]) -> set[Index]:
        if self.away:
            raise BankUnavailable("away")
        return set(indexes) - self.over

    async def ends(self) -> None:
        """The SA is ended, because its session went on elsewhere."""
        await self.keeper.keep(self.sa, ELSEWHERE)
        self.charon.tracker.sas.clear()
        self.charon.tracker.virtual_ips.clear()
        self.keeper.gone(self.sa)

    async def passes(self, seconds: float) -> None:
        self.now += seconds
        await self.keeper.step()


def run(test: Callable[[Gateway], Any], **options: Any) -> None:
    async def work() -> None:
        await test(Gateway(**options))

    asyncio.run(work())


@pytest.mark.parametrize("seconds", [0.1, 31.0, STUB_SECONDS - 1])
def test_an_address_whose_session_went_on_elsewhere_is_kept_while_its_stub_is_on_the_way(seconds: float) -> None:
    async def test(gateway: Gateway) -> None:
        await gateway.ends()
        await gateway.passes(0.1)
        await gateway.passes(seconds)
        assert gateway.placeholders.addresses == {ADDRESS}

    run(test)


def test_it_is_free_when_its_session_is_known_to_have_ended() -> None:
    async def test(gateway: Gateway) -> None:
        await gateway.ends()
        gateway.over.add(ELSEWHERE)
        await gateway.passes(0.1)
        assert gateway.placeholders.addresses == set()

    run(test)


def test_an_end_in_the_bank_has_the_address_looked_at_at_the_next_step() -> None:
    async def test(gateway: Gateway) -> None:
        await gateway.ends()
        await gateway.passes(0.1)
        gateway.over.add(ELSEWHERE)
        for tag in ("192.0.2.77/00", ELSEWHERE.tag):
            gateway.keeper.ended(tag)
        await gateway.passes(0.01)
        assert gateway.placeholders.addresses == set()

    run(test)


def test_it_is_free_when_no_stub_has_come() -> None:
    async def test(gateway: Gateway) -> None:
        await gateway.ends()
        await gateway.passes(0.1)
        await gateway.passes(STUB_SECONDS + 1)
        assert gateway.placeholders.addresses == set()

    run(test)


def test_while_the_bank_is_away_it_is_kept_and_looked_at_again() -> None:
    async def test(gateway: Gateway) -> None:
        await gateway.ends()
        gateway.away = True
        for _ in range(3):
            with pytest.raises(BankUnavailable):
                await gateway.passes(0.1)
        assert gateway.placeholders.addresses == {ADDRESS}
        gateway.away = False
        gateway.over.add(ELSEWHERE)
        await gateway.passes(0.1)
        assert gateway.placeholders.addresses == set()

    run(test)


def test_sessions_that_move_away_get_no_more_placeholders_than_there_may_be() -> None:
    async def test(gateway: Gateway) -> None:
        other: IkeSa = ike_sa("rw", "192.0.2.1")
        other.remote_vips = (ANOTHER,)
        await gateway.keeper.keep(other, ELSEWHERE)
        await gateway.ends()
        assert gateway.placeholders.addresses == {ANOTHER}

    run(test, limit=1)
