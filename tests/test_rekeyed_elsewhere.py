"""A client that did not get the answer to its rekey resumes elsewhere from the IKE_SA before it: its gateway ends the
one that came of the rekey (bridge.gateway.session_elsewhere)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bank_support import keyring, stub_of
from bridge.bank.interface import Ending, Move
from bridge.bank.keyspace import Event
from bridge.bank.write_queue import WriteQueue
from bridge.charon.ike_sa import IkeSa, sa_of
from bridge.config import GatewayConfig
from bridge.gateway.endings import Endings
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.living import LivingSas
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.publisher import Publisher
from bridge.gateway.revocation import Revocations
from bridge.gateway.session_elsewhere import SessionElsewhere
from bridge.service.tasks import spawn
from bridge.stub import bank_keys
from bridge.stub.stub import Index
from role_support import FakeBank, FakeTime, fake_charon

GATEWAY, ELSEWHERE = "192.0.2.1", "192.0.2.2"


class Gateway:
    """One with an IKE_SA that its client has rekeyed, to `new`."""

    def __init__(self, loop: FakeTime) -> None:
        self.loop = loop
        self.bank = FakeBank()
        bank = self.bank.as_bank()
        self.charon, _, _ = fake_charon("home")
        self.ended: list[IkeSa] = []
        self.charon.end_surely = self._end  # type: ignore[method-assign]
        known = KnownSessions(Endings(), LivingSas(self.charon.tracker), Revocations(bank, keyring()))
        self.writer = WriteQueue(bank)
        self.publisher = Publisher(GatewayConfig(address=GATEWAY), self.writer, bank, known)
        self.elsewhere = SessionElsewhere(self.charon, bank, GatewayMetrics(), rekeyed=self.publisher.rekeys.stubs)
        self.old, self.new, self.other = (sa_of(stub_of(gateway=GATEWAY)) for _ in range(3))
        self.index = self.old.index_here(GATEWAY)
        loop.run(self._start())

    async def _start(self) -> None:
        spawn("elsewhere", self.elsewhere.run())
        for sa in (self.old, self.other):
            self.publisher.publish(sa)
        for sa in (self.new, self.other):
            self.charon.tracker.adopt(sa)
        self.publisher.gone(self.old, [self.new])
        self.publisher.publish(self.new)
        await self.writer.flush()

    async def _end(self, sa: IkeSa) -> None:
        self.ended.append(sa)
        self.publisher.withdraw(sa)
        await self.writer.flush()

    def goes_on_elsewhere(self) -> None:
        """Its client has confirmed, at another gateway, what was rebuilt from the old stub."""
        move = Move(Index(ELSEWHERE, b"12345678"), self.old.expires)
        self.loop.run(self.bank.delete([Ending(self.index, self.old.expires, move=move)]))

    def event(self) -> None:
        self.elsewhere.on_event(Event(bank_keys.moved_key(*self.index), "set"))


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    loop = FakeTime()
    yield Gateway(loop)
    loop.end()


@pytest.mark.parametrize("reported", [True, False])
def test_what_came_of_the_rekey_is_ended_and_has_no_stub(gateway: Gateway, reported: bool) -> None:
    gateway.goes_on_elsewhere()
    # without keyspace events, the comparison with the bank has it looked up
    look = gateway.event if reported else gateway.elsewhere.suspect_rekeyed
    look()
    gateway.loop.pass_time(1.0)
    assert gateway.ended == [gateway.new]
    assert list(gateway.bank.stubs) == [gateway.other.index_here(GATEWAY)]


def test_while_it_did_not_go_on_elsewhere_it_stays(gateway: Gateway) -> None:
    gateway.event()
    gateway.loop.pass_time(1.0)
    assert not gateway.ended


def test_once_the_client_has_the_answer_the_old_stub_says_nothing_of_it(gateway: Gateway) -> None:
    gateway.publisher.rekeys.answered(gateway.new.id.spis)
    gateway.goes_on_elsewhere()
    gateway.event()
    gateway.loop.pass_time(1.0)
    assert not gateway.ended
