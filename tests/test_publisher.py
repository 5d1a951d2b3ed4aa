"""Which stubs a gateway keeps in the bank, and what is in them (bridge.gateway.publisher)."""

from __future__ import annotations

from typing import Any, cast

import pytest

from bank_support import keyring, stub_of
from bridge.bank.interface import StubBank
from bridge.bank.write_queue import WriteQueue
from bridge.charon.ike_sa import IkeSa, sa_of
from bridge.config import GatewayConfig, SyncConfig
from bridge.gateway.endings import Endings
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.living import LivingSas
from bridge.gateway.publisher import Publisher
from bridge.gateway.revocation import Revocations
from bridge.stub.stub import Index, Stub
from role_support import fake_charon

GATEWAY = "192.0.2.1"


class Gateway:
    """One with an SA, whose client has rekeyed it; `stubs` are those in the bank."""

    def __init__(self, sync: SyncConfig | None = None) -> None:
        self.stubs: dict[Index, Stub] = {}
        charon, _, _ = fake_charon("home")
        self.endings = Endings()
        bank = cast(StubBank, None)
        config = GatewayConfig(address=GATEWAY, sync=sync or SyncConfig())
        known = KnownSessions(self.endings, LivingSas(charon.tracker), Revocations(bank, keyring()))
        self.publisher = Publisher(config, cast(WriteQueue, self), bank, known)
        self.old, self.new = (sa_of(stub_of()) for _ in range(2))
        for sa in (self.old, self.new):
            self.publisher.publish(sa)
        self.publisher.rekeyed(self.old, self.new.id.spis)

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
    gateway.publisher.answered(getattr(gateway, which).id.spis)
    assert not gateway.has(gateway.old)
    assert gateway.has(gateway.new)


def test_a_request_on_another_shows_nothing(gateway: Gateway) -> None:
    gateway.publisher.answered(sa_of(stub_of()).id.spis)
    assert gateway.has(gateway.old)


def test_when_the_session_ends_both_go(gateway: Gateway) -> None:
    gateway.publisher.withdraw(gateway.new)
    assert not gateway.has(gateway.old)
    assert not gateway.has(gateway.new)


def test_when_charon_is_gone_both_stay(gateway: Gateway) -> None:
    gateway.publisher.lost()
    gateway.publisher.answered(gateway.new.id.spis)
    assert gateway.has(gateway.old)
    assert gateway.has(gateway.new)
