"""Which stubs a gateway keeps in the bank, and what is in them (bridge.gateway.publisher)."""

from __future__ import annotations

from typing import Any, cast

import pytest

from bank_support import keyring, stub_of
from bridge.bank.interface import StubBank
from bridge.bank.write_queue import WriteQueue
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa, sa_of
from bridge.config import GatewayConfig, SyncConfig
from bridge.gateway.endings import Endings
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.living import LivingSas
from bridge.gateway.publisher import Publisher
from bridge.gateway.revocation import Revocations
from bridge.gateway.unanswered_rekeys import UP_SECONDS
from bridge.service.tasks import spawn
from bridge.stub.stub import Index, Stub
from role_support import FakeTime, fake_charon

GATEWAY = "192.0.2.1"


class Gateway:
    """One with an SA, whose client has rekeyed it, unless that is not `complete`; `stubs` are those in the bank."""

    def __init__(self, sync: SyncConfig | None = None, *, complete: bool = True) -> None:
        self.stubs: dict[Index, Stub] = {}
        charon, _, _ = fake_charon("home")
        self.endings = Endings()
        bank = cast(StubBank, None)
        config = GatewayConfig(address=GATEWAY, sync=sync or SyncConfig())
        known = KnownSessions(self.endings, LivingSas(charon.tracker), Revocations(bank, keyring()))
        self.publisher = Publisher(config, cast(WriteQueue, self), bank, known)
        self.old, self.new, self.winner = (sa_of(stub_of()) for _ in range(3))
        self.winner.id = IkeId.of(self.winner.id.spi_i, self.winner.id.spi_r, True)
        self.publisher.publish(self.old)
        if complete:
            self.publisher.gone(self.old, [self.new])
            self.publisher.publish(self.new)

    def submit(self, stub: Stub) -> None:
        self.stubs[stub.index] = stub

    def submit_delete(self, index: Index, **_: Any) -> None:
        self.stubs.pop(index, None)

    def has(self, sa: IkeSa) -> bool:
        index = sa.index_here(GATEWAY)
        # what has ended no gateway rebuilds
        assert (index in self.stubs) is (index not in self.endings)
        return index in self.stubs


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.mark.parametrize("wanted", [False, True])
def test_the_shared_secret_is_in_a_stub_only_where_it_is_asked_for(wanted: bool) -> None:
    gateway = Gateway(SyncConfig(shared_secret=True)) if wanted else Gateway()
    assert gateway.new.shared_secret is not None
    stub = gateway.stubs[gateway.new.index_here(GATEWAY)]
    assert stub.shared_secret == (gateway.new.shared_secret if wanted else None)


def test_the_stub_of_a_rekeyed_ike_sa_stays_until_the_client_is_known_to_have_the_answer(gateway: Gateway) -> None:
    assert gateway.has(gateway.old)
    assert gateway.has(gateway.new)


@pytest.mark.parametrize("which", ["old", "new"])
def test_a_request_on_either_shows_that_the_client_has_the_answer(gateway: Gateway, which: str) -> None:
    """On the old one it is the DELETE."""
    gateway.publisher.rekeys.answered(getattr(gateway, which).id.spis)
    assert not gateway.has(gateway.old)
    assert gateway.has(gateway.new)


def test_a_request_on_another_shows_nothing(gateway: Gateway) -> None:
    gateway.publisher.rekeys.answered(sa_of(stub_of()).id.spis)
    assert gateway.has(gateway.old)


def test_when_the_session_ends_both_go(gateway: Gateway) -> None:
    gateway.publisher.withdraw(gateway.new)
    assert not gateway.has(gateway.old)
    assert not gateway.has(gateway.new)


def test_when_charon_is_gone_both_stay(gateway: Gateway) -> None:
    gateway.publisher.rekeys.lost()
    gateway.publisher.rekeys.answered(gateway.new.id.spis)
    assert gateway.has(gateway.old)
    assert gateway.has(gateway.new)


@pytest.fixture
def half_made(loop: FakeTime) -> Gateway:
    gateway = Gateway(complete=False)

    async def start() -> None:
        spawn("rekeys", gateway.publisher.rekeys.run())

    loop.run(start())
    return gateway


def test_a_session_that_ended_with_a_rekey_half_made_has_no_stub(loop: FakeTime, half_made: Gateway) -> None:
    """charon reports the new SA before all key exchanges of the rekey are done (RFC 9370)."""
    half_made.publisher.gone(half_made.old, [half_made.new])
    loop.pass_time(UP_SECONDS + 0.1)
    assert not half_made.has(half_made.old)
    assert half_made.publisher.rekeys.heir(half_made.old.id.spis) is None
    assert not list(half_made.publisher.rekeys.stubs())


def test_each_of_two_that_end_together_has_its_own_time(loop: FakeTime, half_made: Gateway) -> None:
    half_made.publisher.gone(half_made.old, [half_made.new])
    loop.pass_time(UP_SECONDS / 2)
    old, new = (sa_of(stub_of()) for _ in range(2))
    half_made.publisher.publish(old)
    half_made.publisher.gone(old, [new])
    half_made.publisher.publish(new)
    loop.pass_time(UP_SECONDS * 2)
    assert not half_made.has(half_made.old)
    assert half_made.has(old)


def test_a_rekey_that_was_completed_in_time_keeps_its_stub(loop: FakeTime, half_made: Gateway) -> None:
    half_made.publisher.gone(half_made.old, [half_made.new])
    loop.pass_time(UP_SECONDS / 2)
    half_made.publisher.publish(half_made.new)
    loop.pass_time(UP_SECONDS * 2)
    assert half_made.has(half_made.old)


def test_where_the_rekey_of_the_gateway_wins_the_old_stub_goes(half_made: Gateway) -> None:
    """Both sides rekeyed the SA at the same time, and charon reported that of the client first."""
    half_made.publisher.gone(half_made.old, [half_made.new, half_made.winner])
    assert half_made.has(half_made.old)
    half_made.publisher.publish(half_made.winner)
    assert not half_made.has(half_made.old)
    assert half_made.has(half_made.winner)
    assert not list(half_made.publisher.rekeys.stubs())


def test_where_the_rekey_of_the_client_wins_the_old_stub_stays(loop: FakeTime, half_made: Gateway) -> None:
    old, new = half_made.old, half_made.new
    half_made.publisher.gone(old, [half_made.winner, new])
    assert half_made.publisher.rekeys.heir(old.id.spis) == new.id.spis
    half_made.publisher.publish(new)
    loop.pass_time(UP_SECONDS * 2)
    assert half_made.has(old)
    assert [spis for _, spis in half_made.publisher.rekeys.stubs()] == [new.id.spis]


def test_of_what_the_gateway_alone_rekeyed_no_stub_stays(half_made: Gateway) -> None:
    half_made.publisher.gone(half_made.old, [half_made.winner])
    assert not half_made.has(half_made.old)
