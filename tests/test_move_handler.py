"""What a client makes of a Move (bridge.client.move_handler)."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.sa_tracker import SaTracker
from bridge.client.move_handler import ANSWER_SECONDS, MoveHandler
from bridge.client.outcome import Outcome, Result
from bridge.ike.stub_exchange import (
    Move,
    MoveStatus,
    StubMessage,
    StubSa,
    build_move,
    move_message_id,
    parse_stub_message,
    verify,
)
from bridge.ike.transforms import Suite
from bridge.stub.types import Endpoint

GATEWAY, TARGET = "192.0.2.1", "192.0.2.2"
SK_D = b"d" * 32
SUITE = Suite(12, 128, 12, 5, 31)
NOW = move_message_id(1_800_000_000)


class Nobody:
    def changed(self, sa: IkeSa) -> None: ...
    def gone(self, sa: IkeSa) -> None: ...
    def verified(self, ike_id: Any) -> None: ...
    def down(self, sa: Any) -> None: ...


class Client:
    """A client with one session; `moves` are where it was told to go, `told` what it said of that."""

    def __init__(self) -> None:
        self.tracker = tracker = SaTracker(Nobody(), wall=time.time, clock=time.monotonic)
        self.now = 1000.0
        self.sa = IkeSa(
            IkeId.of(b"initiate", b"responds", True),
            SUITE,
            SK_D,
            up=True,
            local=Endpoint("192.0.2.10", 4500),
            remote=Endpoint(GATEWAY, 4500),
            connection="home",
        )
        tracker.adopt(self.sa)
        self.moves: list[tuple[str, str]] = []
        self.asked_away: list[IkeSa] = []
        self.told: list[tuple[MoveStatus, int]] = []
        self.busy = False
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._mover = MoveHandler(
            tracker,
            self,
            lambda sa: {GATEWAY, TARGET} if sa is self.sa else None,
            self.asked_away.append,
            self._begin,
            clock=lambda: self.now,
        )
        self._last: StubMessage | None = None

    def _begin(self, sa: IkeSa, to: str) -> asyncio.Task[Outcome] | None:
        if self.busy:
            return None
        self.moves.append((sa.connection, to))

        async def move() -> Outcome:
            return await self.outcome

        return asyncio.create_task(move())

    def send(self, src: str, sport: int, dst: str, dport: int, payload: bytes, marker: bool) -> None:
        assert (src, sport, dst, dport, marker) == ("192.0.2.10", 4500, GATEWAY, 4500, True)
        told = parse_stub_message(payload)
        assert isinstance(told.move, Move)
        # as the answer to what was asked last
        assert verify(told, SUITE.prf, SK_D, before=self._last)
        self.told.append((told.move.status, told.message_id))

    def asked(self, message_id: int = NOW, target: str = TARGET, sk_d: bytes = SK_D) -> None:
        """The gateway, or somebody, sends a Move."""
        gateways = StubSa(b"initiate", b"responds", False, (GATEWAY, b"responds"), SUITE.prf, sk_d)
        self._last = parse_stub_message(build_move(gateways, target, message_id))
        self._mover.asked(self._last)


async def test_a_move_is_accepted_and_answered() -> None:
    client = Client()
    client.asked()
    assert client.moves == [("home", TARGET)]
    assert client.told == [(MoveStatus.MOVING, NOW)]


async def test_a_move_that_is_not_proved_is_not_accepted() -> None:
    client = Client()
    client.asked(sk_d=b"?" * 32)
    assert client.moves == []
    assert client.told == []
    # nor does it keep the client from a true one with a lesser message ID
    client.asked(NOW - 1)
    assert client.moves == [("home", TARGET)]


async def test_a_move_that_is_asked_again_is_accepted_once_and_answered_again() -> None:
    client = Client()
    client.asked()
    client.asked()
    assert client.moves == [("home", TARGET)]
    assert client.told == [(MoveStatus.MOVING, NOW)] * 2


async def test_an_older_move_is_not_accepted_and_not_answered() -> None:
    client = Client()
    client.asked(NOW)
    client.asked(NOW - 1)
    assert len(client.moves) == len(client.told) == 1
    client.asked(NOW + 1)
    assert client.told[-1] == (MoveStatus.MOVING, NOW + 1)


async def test_a_target_that_is_no_gateway_of_the_session_is_refused() -> None:
    client = Client()
    client.asked(target="192.0.2.77")
    assert client.moves == []
    assert client.told == [(MoveStatus.NOT_CONFIGURED, NOW)]


async def test_a_client_that_moves_already_says_so() -> None:
    client = Client()
    client.busy = True
    client.asked()
    assert client.told == [(MoveStatus.BUSY, NOW)]


async def test_for_a_while_after_it_moved_a_client_answers_the_gateway_that_asked() -> None:
    client = Client()
    client.asked()
    client.outcome.set_result(Outcome(Result.RESUMED, "home-gw2", TARGET))
    for _ in range(5):
        await asyncio.sleep(0)
    # the old SA is gone, and the first report was lost
    client.tracker.forget(client.sa.id)
    client.asked()
    assert client.told == [(MoveStatus.MOVING, NOW)] * 2
    # nobody else is answered, nor is anything else asked of it
    client.asked(sk_d=b"?" * 32)
    client.asked(NOW + 1)
    client.now += ANSWER_SECONDS + 1
    client.asked()
    assert len(client.told) == 2
    assert client.moves == [("home", TARGET)]


async def test_a_move_that_fails_is_reported_with_its_reason() -> None:
    for reason, status in (("no-answer", MoveStatus.NO_ANSWER), ("refused", MoveStatus.REFUSED)):
        client = Client()
        client.asked()
        client.outcome.set_result(Outcome(Result.FAILED, "home", TARGET, reason=reason))
        for _ in range(5):
            await asyncio.sleep(0)
        assert client.told == [(MoveStatus.MOVING, NOW), (status, NOW)]
