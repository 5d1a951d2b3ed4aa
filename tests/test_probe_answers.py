"""How a gateway answers a client that asks whether it still has its SA (bridge.gateway.client_stubs)."""

from __future__ import annotations

from typing import Any

import pytest

from bank_support import GATEWAY, keyring, stub_of
from bridge.charon.ike_sa import sa_of
from bridge.charon.sa_tracker import SaTracker
from bridge.gateway.client_stubs import ANSWERS_A_SECOND, PROBED_SECONDS, ClientStubs
from bridge.gateway.lost_sas import LOST_SECONDS
from bridge.gateway.metrics import GatewayMetrics
from bridge.ike.stub_exchange import (
    MoveStatus,
    StubMessage,
    StubSa,
    build_announcement,
    build_probe,
    move_message_id,
    parse_stub_message,
    verify,
)
from role_support import FakeTime, Request, Wire

SURVIVOR = "192.0.2.2"


class Silent:
    """A listener of the tracker's."""

    def changed(self, sa: Any) -> None: ...
    def gone(self, sa: Any) -> None: ...
    def verified(self, ike_id: Any) -> None: ...
    def down(self, sa: Any) -> None: ...


class Gateway:
    """One that has the SA of a stub. `alive`: whether its charon runs, None while that hangs."""

    def __init__(self, alive: bool | None = True) -> None:
        self.alive, self.now = alive, 100.0
        self.wire = Wire()
        self.tracker = SaTracker(Silent(), wall=lambda: 1.8e9, clock=lambda: 100.0)
        self.stub = stub_of()
        self.tracker.adopt(sa_of(self.stub))
        self.stubs = ClientStubs(
            "off",
            keyring(),
            self.tracker,
            self.wire,
            GATEWAY,
            GatewayMetrics(),
            clock=lambda: self.now,
        )
        self.stubs.alive = lambda: self.alive
        self.tracker.on_lost.append(self.stubs.lost.put)

    def probe(self, sk_d: bytes | None = None, src: str = "") -> list[tuple[StubMessage, StubMessage]]:
        """The client asks; the question, with each answer."""
        stub, index = self.stub, (self.stub.index.gateway, self.stub.index.spi)
        gateway = StubSa(stub.spi_i, stub.spi_r, False, index, stub.suite.prf, sk_d or stub.sk_d)
        client = StubSa(stub.spi_i, stub.spi_r, True, index, stub.suite.prf, sk_d or stub.sk_d)
        announcement = build_announcement(gateway, SURVIVOR, move_message_id(1.8e9))
        octets = build_probe(client, parse_stub_message(announcement), b"n" * 32)
        assert self.stubs.received(Request(src or stub.remote.address, octets)) is None
        sent, self.wire.sent = self.wire.sent, []
        return [(parse_stub_message(octets), parse_stub_message(answer)) for _, answer in sent]

    def answer(self) -> MoveStatus:
        [(probe, answer)] = self.probe()
        assert verify(answer, self.stub.suite.prf, self.stub.sk_d, before=probe)
        assert answer.move is not None
        return answer.move.status


def test_one_whose_charon_has_the_sa_says_so() -> None:
    assert Gateway().answer() is MoveStatus.HERE


def test_one_whose_charon_is_gone_says_so() -> None:
    assert Gateway(alive=False).answer() is MoveStatus.NOT_HERE


def test_one_whose_charon_hangs_does_not_answer() -> None:
    assert Gateway(alive=None).probe() == []


def test_one_whose_charon_was_restarted_says_for_a_while_that_it_has_lost_the_sa() -> None:
    loop, gateway = FakeTime(), Gateway()

    async def restarted() -> None:
        gateway.tracker.forget_all()

    loop.run(restarted())
    assert gateway.answer() is MoveStatus.NOT_HERE
    gateway.now += PROBED_SECONDS + 0.01
    assert gateway.probe(b"?" * 32) == []
    loop.pass_time(LOST_SECONDS)
    gateway.now += LOST_SECONDS
    assert gateway.probe() == []
    loop.end()


@pytest.mark.parametrize("alive", [True, False])
def test_a_question_that_is_not_proved_has_no_answer(alive: bool) -> None:
    assert Gateway(alive).probe(b"?" * 32) == []


def test_a_probe_that_is_repeated_is_answered_once_in_a_while_and_costs_the_other_sas_nothing() -> None:
    gateway = Gateway()
    answers = sum(len(gateway.probe()) for _ in range(2 * ANSWERS_A_SECOND))
    assert answers == 1
    gateway.stub = stub_of(spi=b"another!")
    gateway.tracker.adopt(sa_of(gateway.stub))
    assert gateway.answer() is MoveStatus.HERE
    gateway.now += PROBED_SECONDS + 0.01
    assert gateway.answer() is MoveStatus.HERE


def test_a_probe_from_another_address_than_the_clients_has_no_answer() -> None:
    gateway = Gateway()
    assert gateway.probe(src="203.0.113.9") == []
    assert gateway.answer() is MoveStatus.HERE
