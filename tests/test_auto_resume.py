"""When a client moves a lost session by itself (bridge.client.auto_resume), without root and without a lab: attempts
end as the tests say, and the clock does not pass by itself."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any, cast

import msgspec
import pytest

from bridge.charon.vici_types import SaInfo, ViciError
from bridge.client.auto_resume import NEWS_SECONDS, RETURN_MAX, RETURN_MIN, AutoResume
from bridge.client.outcome import Outcome, Result
from bridge.client.sessions import Session, Sessions
from role_support import FakeTime, fake_charon
from test_switchover import NEW, OLD, ike_sa


class Client:
    """An AutoResume whose attempts end as `results` says, the last of them for ever."""

    def __init__(self, loop: FakeTime, *results: Result) -> None:
        self.loop = loop
        self.began = loop.time()
        self.charon, _, _ = fake_charon("gw1")
        self.charon.vici = cast(Any, self)
        self.charon.reconciled.set()
        self.results = list(results)
        self.attempts: list[float] = []
        """when each began"""
        self.there = True
        self.stands_for: set[str] = set()
        self.listed: list[str] | None = []
        self.returning = AutoResume(self.charon, cast(Sessions, self), self.begin)

    # what it asks of the sessions

    def has(self, session: Session) -> bool:
        return self.there

    def may_stand_for(self, connection: str, session: Session) -> bool:
        return connection in self.stands_for

    async def list_sas(self) -> list[SaInfo]:
        if self.listed is None:
            raise ViciError("charon is away")
        values: dict[str, Any] = dict.fromkeys(SaInfo._fields)
        return [SaInfo(**(values | {"connection": name})) for name in self.listed]

    async def attempt(self) -> Outcome:
        await asyncio.sleep(0.5)
        result = self.results.pop(0) if len(self.results) > 1 else self.results[0]
        empty = dict.fromkeys(field.name for field in msgspec.structs.fields(Outcome))
        return Outcome(**cast(Any, empty | {"result": result, "children": ()}))

    def begin(self, session: Session) -> asyncio.Task[Outcome]:
        self.attempts.append(self.loop.time() - self.began)
        return asyncio.get_running_loop().create_task(self.attempt())

    def start(self, session: Session) -> None:
        async def begin() -> None:
            self.returning.start(session)

        self.loop.run(begin())

    def restore(self, *sessions: Session) -> asyncio.Task[None]:
        return self.loop.create_task(self.returning.restored(sessions))


@pytest.fixture
def session() -> Session:
    return Session("default", ike_sa("gw1", OLD))


def test_a_lost_session_is_moved_soon_and_once(loop: FakeTime, session: Session) -> None:
    client = Client(loop, Result.RESUMED)
    client.start(session)
    loop.pass_time(RETURN_MAX)
    assert client.attempts == [pytest.approx(NEWS_SECONDS)]


def test_it_is_tried_again_at_longer_and_longer_intervals(loop: FakeTime, session: Session) -> None:
    client = Client(loop, Result.FAILED)
    client.start(session)
    loop.pass_time(20 * RETURN_MAX)
    pauses = [round(later - one - 0.5, 3) for one, later in pairwise(client.attempts)]
    assert pauses[0] == pytest.approx(RETURN_MIN)
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(RETURN_MAX)


def test_after_a_full_handshake_it_is_over(loop: FakeTime, session: Session) -> None:
    client = Client(loop, Result.FAILED, Result.FALLBACK)
    client.start(session)
    loop.pass_time(20 * RETURN_MAX)
    assert len(client.attempts) == 2


def test_a_session_that_came_up_by_itself_is_left_alone(loop: FakeTime, session: Session) -> None:
    client = Client(loop, Result.FAILED)
    client.start(session)
    new = ike_sa("gw1", NEW)
    session.sas[new.id.spis] = new
    loop.pass_time(RETURN_MAX)
    assert client.attempts == []


def test_a_session_that_expired_is_left_alone(loop: FakeTime, session: Session) -> None:
    client = Client(loop, Result.FAILED)
    client.there = False
    client.start(session)
    loop.pass_time(RETURN_MAX)
    assert client.attempts == []


def test_two_losses_of_one_session_are_one_return(loop: FakeTime, session: Session) -> None:
    client = Client(loop, Result.RESUMED)
    client.start(session)
    client.start(session)
    loop.pass_time(RETURN_MAX)
    assert len(client.attempts) == 1


def test_a_return_that_was_stopped_can_begin_again(loop: FakeTime, session: Session) -> None:
    client = Client(loop, Result.RESUMED)
    client.start(session)
    client.returning.stop(session)
    client.start(session)
    loop.pass_time(RETURN_MAX)
    assert len(client.attempts) == 1


def test_the_sessions_of_a_host_that_came_up_wait_for_their_connection(loop: FakeTime, session: Session) -> None:
    client = Client(loop, Result.RESUMED)
    connections = client.charon.tracker.connections
    client.charon.tracker.connections = {}
    restored = client.restore(session)
    loop.pass_time(20.0)
    assert client.attempts == []
    client.charon.tracker.connections = connections
    loop.pass_time(3 * NEWS_SECONDS)
    assert restored.done()
    assert len(client.attempts) == 1


def test_a_session_that_charon_begins_itself_is_not_resumed_beside_it(loop: FakeTime, session: Session) -> None:
    client = Client(loop, Result.RESUMED)
    client.listed, client.stands_for = ["gw1"], {"gw1"}
    client.restore(session)
    loop.pass_time(20.0)
    assert client.attempts == []


def test_a_charon_that_goes_away_again_has_begun_none(loop: FakeTime, session: Session) -> None:
    client = Client(loop, Result.RESUMED)
    client.listed, client.stands_for = None, {"gw1"}
    client.restore(session)
    loop.pass_time(20.0)
    assert len(client.attempts) == 1
