"""What keeps addresses in use elsewhere (bridge.gateway.address_keeper), without root: charon and bank answer from
memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bridge.bank.interface import BankUnavailable
from bridge.charon.charon import Charon
from bridge.charon.ha_channel import HaChannel
from bridge.charon.ha_segments import SegmentChooser, keeping_segment, landing_addresses
from bridge.charon.half_open import HalfOpenSas
from bridge.charon.handshakes import Handshakes
from bridge.charon.ike_sa import IkeSa
from bridge.charon.placeholders import HaPool, Placeholders
from bridge.charon.virtual_ips import VirtualIps
from bridge.gateway import address_keeper
from bridge.gateway.address_book import AddressBook, Holder
from bridge.gateway.address_keeper import HANDSHAKE_PATIENCE, OWN_HANDSHAKES_SECONDS, STUB_SECONDS, AddressKeeper
from bridge.stub.stub import Index, Stub
from net_support import until
from role_support import ike_sa

WALL = 1_800_000_000.0
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
            wall=lambda: WALL,
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


class Opening:
    """A charon with a handshake in progress in the keeping segment; notes when that was activated."""

    def __init__(self, *, ends: bool, crashes: bool) -> None:
        self.half_open = HalfOpenSas()
        self.landing = SegmentChooser(16, self.half_open)
        self.landing.crashes = crashes
        self.half_open.began(b"one", landing_addresses()[keeping_segment()], 0.0)
        self.handshakes = Handshakes(self.look, self.look_surely)
        self.handshakes.ends = ends
        self.placeholders = self
        self.looked = 0
        self.over_after = 0
        """looks until that handshake is over"""
        self.opened_after: int | None = None
        self.now = 0.0

    async def look(self) -> None:
        self.looked += 1
        self.now += 1.0
        if self.looked == self.over_after:
            self.half_open.ended(b"one")

    async def look_surely(self) -> bool:
        raise AssertionError("nothing is held back here")

    async def open(self) -> None:
        self.opened_after = self.looked


async def opened_after(monkeypatch: pytest.MonkeyPatch, opening: Opening) -> int | None:
    """How many looks the activation of the keeping segment took; each takes a second."""
    monkeypatch.setattr(address_keeper, "TICK_SECONDS", 0.0)
    charon, pools = cast(Charon, opening), list[HaPool]
    keeper = AddressKeeper(charon, cast(AddressBook, None), limit=1, pools=pools, clock=lambda: opening.now)
    await keeper._open_keeping(0.0)
    return opening.opened_after


async def test_the_first_activation_waits_for_the_end_of_a_handshake_that_would_crash_charon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opening = Opening(ends=True, crashes=True)
    opening.over_after = 25
    assert await opened_after(monkeypatch, opening) == 25


async def test_where_it_would_only_end_that_it_waits_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await opened_after(monkeypatch, Opening(ends=True, crashes=False)) == HANDSHAKE_PATIENCE


@pytest.mark.parametrize("crashes", [True, False])
async def test_it_waits_for_handshakes_that_charon_itself_may_just_begin_with_peers_of_that_segment(
    monkeypatch: pytest.MonkeyPatch, crashes: bool
) -> None:
    opening = Opening(ends=True, crashes=crashes)
    opening.half_open.clear()
    opening.landing.peers = lambda: [landing_addresses()[keeping_segment()]]
    assert await opened_after(monkeypatch, opening) == OWN_HANDSHAKES_SECONDS
    opening = Opening(ends=True, crashes=crashes)
    opening.half_open.clear()
    opening.landing.peers = lambda: [landing_addresses()[keeping_segment() - 1]]
    assert await opened_after(monkeypatch, opening) == 1


async def test_connections_that_are_still_being_loaded_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_keeper, "TICK_SECONDS", 0.0)
    loaded: list[dict[str, None]] = [{"one": None, "two": None}, {"one": None, "two": None, "three": None}]
    tracker = SimpleNamespace(connections={"one": None})

    async def read() -> None:
        if loaded:
            tracker.connections = loaded.pop(0)

    charon = cast(Charon, SimpleNamespace(tracker=tracker, read_connections=read, landing=SegmentChooser(1)))
    keeper = AddressKeeper(charon, cast(AddressBook, None), limit=1, pools=list[HaPool])
    await keeper._all_loaded()
    assert list(tracker.connections) == ["one", "two", "three"]


async def test_where_it_ends_none_it_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await opened_after(monkeypatch, Opening(ends=False, crashes=False)) == 1


class HoldOnce:
    """Holds requests back once its rules are in place."""

    def __init__(self) -> None:
        self.rules = False
        self.log: list[str] = []

    def can_hold(self) -> bool:
        return self.rules

    @contextlib.contextmanager
    def holding(self) -> Iterator[Callable[[], bool]]:
        self.log.append("held")
        try:
            yield lambda: True
        finally:
            self.log.append("released")


def started(seconds: float) -> Gateway:
    """One whose charon was started so long ago, and assigns no addresses yet as far as is known."""

    async def since() -> int:
        return int(WALL - seconds)

    gateway = Gateway()
    gateway.charon.vici = SimpleNamespace(started=since)
    gateway.placeholders.opened = False
    return gateway


async def test_requests_wait_from_charons_start_until_it_assigns_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_keeper, "TICK_SECONDS", 0)
    gateway, hold = started(5.0), HoldOnce()
    gateway.charon.handshakes = SimpleNamespace(hold=hold)
    gateway.keeper.settled.set()
    gateway.keeper.charon_connected()
    assert not gateway.keeper.settled.is_set()
    hold.rules = True
    await until(lambda: hold.log == ["held"])
    gateway.keeper.settled.set()
    await until(lambda: hold.log == ["held", "released"])


async def test_no_request_waits_for_a_charon_that_assigns_addresses_already() -> None:
    gateway = Gateway()
    gateway.keeper.settled.set()
    gateway.keeper.charon_connected()
    assert gateway.keeper.settled.is_set()


async def test_no_request_waits_for_a_charon_that_ran_before_its_sidecar_was_started() -> None:
    gateway, hold = started(6.0), HoldOnce()
    gateway.charon.handshakes = SimpleNamespace(hold=hold)
    hold.rules = True
    gateway.keeper.charon_connected()
    waits = gateway.keeper._holding
    assert waits is not None
    await waits
    assert hold.log == []


async def test_one_wait_is_enough_for_a_charon_that_comes_and_goes_and_it_ends_with_the_keeper() -> None:
    gateway, hold = started(0.0), HoldOnce()
    gateway.charon.handshakes = SimpleNamespace(hold=hold)
    hold.rules = True
    # not ready to assign addresses
    gateway.charon.ready = lambda: False
    running = asyncio.create_task(gateway.keeper.run())
    for _ in range(3):
        gateway.keeper.charon_connected()
        await until(lambda: hold.log == ["held"])
    running.cancel()
    await until(running.done)
    assert hold.log == ["held", "released"]


async def test_requests_wait_for_no_longer_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_keeper, "HOLD_SECONDS", 0.2)
    gateway, hold = started(5.0), HoldOnce()
    gateway.charon.handshakes = SimpleNamespace(hold=hold)
    hold.rules = True
    gateway.keeper.charon_connected()
    await until(lambda: hold.log == ["held", "released"])
