"""How a gateway compares its bank with its charon (bridge.gateway.bank_reconciler), without root and without a Redis:
bank and charon answer from memory, and the clock does not pass by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, cast

import pytest

from bank_support import GATEWAY, keyring, stub_of
from bridge.bank.keyspace import Event
from bridge.bank.prefetch import Prefetch
from bridge.bank.write_queue import WriteQueue
from bridge.charon.ike_sa import IkeSa, sa_of
from bridge.charon.vici_types import SaInfo
from bridge.config import GatewayConfig
from bridge.gateway.bank_reconciler import COMPARE_SECONDS, LEARN_SECONDS, BankReconciler
from bridge.gateway.endings import Endings
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.living import LivingSas
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.publisher import Publisher
from bridge.gateway.revocation import Revocations
from bridge.gateway.session_elsewhere import SessionElsewhere
from bridge.stub import bank_keys
from bridge.stub.stub import Index, Stub
from bridge.stub.types import Endpoint
from role_support import FakeBank, FakeTime, fake_charon

SHARED = "192.0.2.10"
OTHER = "192.0.2.77"
SOON = 1.0
"""seconds in which a comparison that is due is over"""


class Bank(FakeBank):
    """What a comparison asks of a bank beside that, and in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    async def _reach(self, question: str) -> None:
        self.done.append(question)
        await super()._reach(question)

    async def revisions(self, indexes: Sequence[Index]) -> list[int | None]:
        await self._reach("revisions")
        return [self.stubs[index].revision if index in self.stubs else 0 for index in indexes]

    async def download(self, gateway: str) -> AsyncIterator[list[Stub]]:
        await self._reach("download")
        yield [stub for stub in self.stubs.values() if stub.index.gateway == gateway]

    async def post(self, kind: str, gateway: str, value: str, ttl: float) -> None: ...

    async def revocations(self) -> list[tuple[bytes, ...]]:
        return []


class Vici:
    """charon, that runs since `since` and lists what `listed` says."""

    connected = True

    def __init__(self) -> None:
        self.since = time.time() - 3600
        self.listed: list[SaInfo] = []

    async def started(self) -> float:
        return self.since

    async def each_sas(self, take: Callable[[list[SaInfo]], None]) -> None:
        take(self.listed)

    async def pools(self) -> list[str]:
        return []


class Gateway:
    """A gateway's reconciler, with the parts that it works with."""

    def __init__(self, loop: FakeTime) -> None:
        self.loop = loop
        self.bank = Bank()
        bank = self.bank.as_bank()
        self.charon, _, _ = fake_charon("home")
        self.vici = Vici()
        self.charon.vici = cast(Any, self.vici)
        self.charon.reconciled.set()
        self.endings = Endings()
        self.writer = WriteQueue(bank)
        self.prefetch = Prefetch(bank)
        self.known = known = KnownSessions(self.endings, LivingSas(self.charon.tracker), Revocations(bank, keyring()))
        config = GatewayConfig(address=GATEWAY)
        self.publisher = Publisher(config, self.writer, bank, known)
        elsewhere = SessionElsewhere(self.charon, bank, GatewayMetrics())
        self.reconciler = BankReconciler(config, bank, self.charon, self.publisher, known, elsewhere)

    def start(self, seconds: float = SOON) -> None:
        async def begin() -> None:
            self.reconciler.start()

        self.loop.run(begin())
        self.loop.pass_time(seconds)

    def sa(self, stub: Stub | None = None) -> IkeSa:
        """charon has an SA, and this gateway has published it."""
        sa = sa_of(stub or stub_of())
        self.charon.tracker.sas[sa.id.spis] = sa
        self.loop.run(self._published(sa))
        return sa

    async def _published(self, sa: IkeSa) -> None:
        self.publisher.publish(sa)
        await self.writer.flush()

    def has(self, sa: IkeSa) -> bool:
        return index_of(sa) in self.bank.stubs

    def event(self, key: str, what: str) -> None:
        self.reconciler.gone_event(Event(key, what))

    def returned(self) -> None:
        """The bank was away, and is back."""
        self.loop.run(self._returned())
        self.loop.pass_time(SOON)

    async def _returned(self) -> None:
        self.reconciler.returned()


def index_of(sa: IkeSa) -> Index:
    return sa.index_here(GATEWAY)


def listed(stub: Stub, state: str = "ESTABLISHED") -> SaInfo:
    values: dict[str, Any] = dict.fromkeys(SaInfo._fields)
    values |= {"spi_i": stub.spi_i, "spi_r": stub.spi_r, "initiator": stub.initiator, "state": state}
    return SaInfo(**values)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTime]:
    async def inline(work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    # the fake clock does not wait for threads
    monkeypatch.setattr(asyncio, "to_thread", inline)
    loop = FakeTime()
    yield loop
    loop.end()


@pytest.fixture
def gateway(loop: FakeTime) -> Gateway:
    return Gateway(loop)


def test_a_bank_that_lost_its_stubs_gets_them_again(gateway: Gateway) -> None:
    kept, lost = gateway.sa(), gateway.sa()
    del gateway.bank.stubs[index_of(lost)]
    gateway.start()
    assert gateway.has(lost)
    # and only those that it lacks
    assert gateway.bank.stubs[index_of(kept)].revision == kept.revision
    assert gateway.bank.asked["store"] == 3


def test_the_comparison_comes_again_by_itself(gateway: Gateway) -> None:
    sa = gateway.sa()
    gateway.start()
    del gateway.bank.stubs[index_of(sa)]
    gateway.loop.pass_time(COMPARE_SECONDS - 2 * SOON)
    assert not gateway.has(sa)
    gateway.loop.pass_time(3 * SOON)
    assert gateway.has(sa)


def test_a_session_that_went_on_elsewhere_is_not_stored_again_and_is_remembered(gateway: Gateway) -> None:
    sa = gateway.sa()
    del gateway.bank.stubs[index_of(sa)]
    gateway.bank.over.add(index_of(sa))
    gateway.start()
    assert not gateway.has(sa)
    assert index_of(sa) in gateway.endings
    # also in a bank that forgets the end
    gateway.bank.over.clear()
    gateway.returned()
    assert not gateway.has(sa)


def test_ends_come_before_stubs(gateway: Gateway) -> None:
    gateway.sa()
    ended = stub_of()
    gateway.endings.add(ended.index, int(time.time()) + 3600)
    gateway.bank.done.clear()
    gateway.start()
    steps = [step for step in gateway.bank.done if step in ("delete", "revisions")]
    assert steps[:2] == ["delete", "revisions"]
    assert ended.index in gateway.bank.over


def test_a_bank_that_comes_back_gets_all_ends_again(gateway: Gateway) -> None:
    ends = [stub_of().index for _ in range(3)]
    gateway.start()
    for index in ends:
        gateway.endings.add(index, int(time.time()) + 3600)
    gateway.bank.over |= set(ends)
    gateway.returned()
    assert gateway.bank.asked["delete"] == 1
    gateway.loop.pass_time(2 * COMPARE_SECONDS)
    # a bank that still has the latest of them needs nothing
    assert gateway.bank.asked["delete"] == 1


def test_a_bank_that_is_away_is_compared_as_soon_as_it_answers(gateway: Gateway) -> None:
    sa = gateway.sa()
    del gateway.bank.stubs[index_of(sa)]
    gateway.bank.away = True
    gateway.start(10.0)
    assert not gateway.has(sa)
    gateway.bank.away = False
    gateway.loop.pass_time(SOON)
    assert gateway.has(sa)


def test_the_stub_of_an_sa_that_is_not_resumable_is_left_alone(gateway: Gateway) -> None:
    sa = gateway.sa()
    del gateway.bank.stubs[index_of(sa)]
    sa.resumable = False
    gateway.start()
    assert not gateway.has(sa)


@pytest.mark.parametrize(
    ("case", "stays"),
    [
        ("ended without a sidecar", False),
        ("listed", True),
        ("waits to be deleted", False),
        ("of a charon before", True),
    ],
)
def test_at_the_start_stubs_of_sas_that_ended_meanwhile_go(gateway: Gateway, case: str, stays: bool) -> None:
    stub = stub_of()
    gateway.bank.stubs[stub.index] = stub
    if case == "of a charon before":
        gateway.vici.since = time.time() + 60
    elif case != "ended without a sidecar":
        gateway.vici.listed = [listed(stub, "ESTABLISHED" if case == "listed" else "DELETING")]
    gateway.start()
    assert (stub.index in gateway.bank.stubs) is stays


def test_what_was_deleted_at_the_start_is_deleted_again_in_a_replica_that_was_behind(gateway: Gateway) -> None:
    stub = stub_of()
    gateway.bank.stubs[stub.index] = stub
    gateway.start()
    # a failover: the bank has the stub, and nothing of its end
    gateway.bank.over.clear()
    gateway.bank.stubs[stub.index] = stub
    gateway.returned()
    assert stub.index not in gateway.bank.stubs
    assert stub.index in gateway.bank.over


def test_stubs_of_other_gateways_are_not_touched_at_the_start(gateway: Gateway) -> None:
    stub = stub_of(gateway=OTHER)
    gateway.bank.stubs[stub.index] = stub
    gateway.start()
    assert stub.index in gateway.bank.stubs


def test_after_the_start_a_stub_that_is_not_known_stays(gateway: Gateway) -> None:
    gateway.start()
    stub = stub_of()
    gateway.bank.stubs[stub.index] = stub
    gateway.loop.pass_time(2 * COMPARE_SECONDS)
    assert stub.index in gateway.bank.stubs


def test_an_end_that_the_bank_reports_is_learned_immediately(gateway: Gateway) -> None:
    sa = gateway.sa()
    gateway.start()
    gateway.bank.over.add(index_of(sa))
    octet = sa.local_spi[:1].hex()
    reported: list[str] = []
    gateway.reconciler.on_ending = reported.append
    gateway.event(f"{bank_keys.GONE}{{{GATEWAY}/{octet}}}", "zadd")
    gateway.loop.pass_time(LEARN_SECONDS + 0.1)
    assert index_of(sa) in gateway.endings
    assert reported == [f"{GATEWAY}/{octet}"]


def test_an_end_at_another_gateway_is_passed_on_and_has_nothing_looked_up(gateway: Gateway) -> None:
    sa = gateway.sa()
    gateway.start()
    gateway.bank.over.add(index_of(sa))
    reported: list[str] = []
    gateway.reconciler.on_ending = reported.append
    gateway.event(f"{bank_keys.GONE}{{{OTHER}/{sa.local_spi[:1].hex()}}}", "zadd")
    gateway.loop.pass_time(LEARN_SECONDS + 0.1)
    assert len(reported) == 1
    assert index_of(sa) not in gateway.endings


@pytest.mark.parametrize("resumed", [False, True])
def test_a_session_at_a_shared_address_is_recovered_whether_it_was_resumed_or_not(
    gateway: Gateway, resumed: bool
) -> None:
    gateway.publisher._shared = (SHARED,)
    stub = stub_of(gateway=GATEWAY if resumed else SHARED)
    info = listed(stub)._replace(local=Endpoint(SHARED, 4500))
    gateway.bank.stubs[stub.index] = stub
    found = gateway.loop.run(gateway.publisher.recover([info]))
    assert found is not None
    assert [sa.id.spis for sa in found] == [info.spis]
