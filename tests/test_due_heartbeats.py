"""A gateway that died is noticed when its heartbeat expires, however long Redis takes to come by
(bridge.gateway.due_heartbeats)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from bank_support import PATIENCE, RedisServer, keyring
from bridge.bank.interface import BankUnavailable
from bridge.bank.keyspace import Keyspace
from bridge.bank.redis_bank import RedisBank
from bridge.gateway.due_heartbeats import LATE_SECONDS, DueHeartbeats
from bridge.gateway.peer_watch import PeerState
from bridge.service.tasks import spawn
from bridge.stub import bank_keys
from role_support import FakeTime
from test_bank_comparison import loop
from test_recent_traffic import DEAD, HERE, LIVING, Survivor

__all__ = ["loop"]

DETECT = 1.0


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RedisServer]:
    """It removes nothing that has expired before that is read: as one with very many keys, for a while."""
    with RedisServer(tmp_path, "--enable-debug-command", "yes") as running:
        running.client.execute_command("DEBUG", "SET-ACTIVE-EXPIRE", "0")
        yield running


async def happens(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not what():  # noqa: ASYNC110 - there is no event of it
            await asyncio.sleep(0.01)


@pytest.mark.redis
async def test_a_heartbeat_that_expired_is_noticed_though_redis_has_not_come_by(server: RedisServer) -> None:
    async with AsyncExitStack() as stack:
        bank, of_dead = (RedisBank(server.url, keyring()) for _ in range(2))
        survivor = Survivor(bank)
        listening = asyncio.Event()
        keyspace = Keyspace(
            server.url,
            (f"{bank_keys.HEARTBEAT}*",),
            survivor.failover.heartbeat_event,
            lambda heard: listening.set() if heard else None,
        )
        for close in (bank.close, of_dead.close, survivor.close, keyspace.close):
            stack.push_async_callback(close)
        keyspace.start()
        survivor.failover.start()
        watch = survivor.failover.watch
        async with asyncio.timeout(PATIENCE):
            await listening.wait()
        # seen once, after which only events say anything of it: no further look of this gateway's own is made
        await survivor.failover.own_heartbeat(True, 0.0, [DEAD])
        watch._calm_since -= 10 * DETECT
        await of_dead.heartbeat(DEAD, DETECT)
        await happens(lambda: DEAD in survivor.failover.beats.written)
        assert watch.state(DEAD) is PeerState.ALIVE
        await happens(lambda: watch.state(DEAD) is PeerState.FAILED)


class Looks:
    """Looks at heartbeats, and the times at which they were asked for."""

    def __init__(self, loop: FakeTime) -> None:
        self.times: list[float] = []
        self.away = False
        self._loop = loop
        self.due = DueHeartbeats(DETECT, self._look, clock=loop.time)
        loop.run(self._begin())

    async def _begin(self) -> None:
        spawn("heartbeats", self.due.run())

    async def _look(self) -> None:
        self.times.append(self._loop.time())
        if self.away:
            raise BankUnavailable("it is away")


@pytest.fixture
def looks(loop: FakeTime) -> Looks:
    return Looks(loop)


def test_a_heartbeat_that_comes_again_is_not_looked_for(loop: FakeTime, looks: Looks) -> None:
    for _ in range(30):
        looks.due.beat(DEAD)
        loop.pass_time(DETECT / 3)
    assert looks.times == []
    loop.pass_time(DETECT)
    assert len(looks.times) == 1


def test_each_is_looked_for_when_it_expires_and_once(loop: FakeTime, looks: Looks) -> None:
    began = loop.time()
    looks.due.beat(DEAD)
    loop.pass_time(0.25)
    looks.due.beat(LIVING)
    loop.pass_time(10.0)
    expected = [began + DETECT + LATE_SECONDS, began + 0.25 + DETECT + LATE_SECONDS]
    assert looks.times == pytest.approx(expected)


def test_one_that_is_gone_already_is_not_looked_for(loop: FakeTime, looks: Looks) -> None:
    looks.due.beat(DEAD)
    looks.due.gone(DEAD)
    looks.due.beat(LIVING)
    looks.due.forget(LIVING)
    loop.pass_time(10.0)
    assert looks.times == []
    assert looks.due.written.keys() == {DEAD}


def test_a_bank_that_is_away_does_not_end_it(loop: FakeTime, looks: Looks) -> None:
    looks.away = True
    looks.due.beat(DEAD)
    loop.pass_time(2 * DETECT)
    looks.due.beat(DEAD)
    loop.pass_time(2 * DETECT)
    assert len(looks.times) == 2
    assert HERE not in looks.due.written
