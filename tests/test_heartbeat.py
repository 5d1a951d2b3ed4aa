"""What a gateway knows of its bank by its own heartbeats (bridge.gateway.heartbeat)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import structlog

from bank_support import GATEWAY, RedisServer, ending, revised, stub_of
from bridge.bank.interface import BankUnavailable, BankUnwritable
from bridge.bank.redis_bank import RedisBank
from bridge.charon.charon import Charon
from bridge.gateway.heartbeat import Heartbeat
from bridge.gateway.metrics import GatewayMetrics

pytestmark = pytest.mark.redis


ALIVE: list[bool | None] = [True]
"""what is known of the charon of the fixture"""


@pytest.fixture
def heartbeat(bank: RedisBank) -> Heartbeat:
    reconciled = asyncio.Event()
    reconciled.set()
    charon = SimpleNamespace(alive=lambda: ALIVE[0], reconciled=reconciled, vici=None)
    ALIVE[0] = True

    async def written(*_: object) -> None:
        """What other parts conclude from it is tested elsewhere."""

    return Heartbeat(bank, cast(Charon, charon), GATEWAY, GatewayMetrics(), 1.0, written)


def full(server: RedisServer) -> None:
    server.client.config_set("maxmemory", 1)


def without_quorum(server: RedisServer) -> None:
    server.client.config_set("min-replicas-to-write", 1)


def replica(server: RedisServer) -> None:
    server.client.execute_command("REPLICAOF", "127.0.0.1", "1")
    # as it is for what has been read before: stubs are there, its primary is not
    server.client.config_set("replica-serve-stale-data", "yes")


def better(server: RedisServer) -> None:
    server.client.config_set("maxmemory", 0)
    server.client.config_set("min-replicas-to-write", 0)
    server.client.execute_command("REPLICAOF", "NO", "ONE")


@pytest.mark.parametrize("make", [full, without_quorum, replica])
async def test_a_bank_that_takes_no_writes_still_gives_stubs(
    bank: RedisBank, server: RedisServer, heartbeat: Heartbeat, make: Callable[[RedisServer], None]
) -> None:
    stub = stub_of()
    await bank.store([stub])
    await heartbeat.beat()
    assert (heartbeat.bank_reachable, heartbeat.bank_writable, heartbeat.doubtful) == (True, True, False)
    make(server)
    with structlog.testing.capture_logs() as events:
        await heartbeat.beat()
        await heartbeat.beat()
    assert [event["event"] for event in events] == ["bank-unwritable"]
    assert (heartbeat.bank_reachable, heartbeat.bank_writable, heartbeat.doubtful) == (True, False, True)
    assert await bank.get([stub.index]) == [stub]
    with pytest.raises(BankUnwritable):
        await bank.store([revised(stub, 2)])
    if make is not full:
        with pytest.raises(BankUnwritable):
            await bank.delete([ending(stub)])
    better(server)
    with structlog.testing.capture_logs() as events:
        await heartbeat.beat()
    assert [event["event"] for event in events] == ["bank-writable"]
    # what is missing now may have been refused a moment ago
    assert (heartbeat.bank_writable, heartbeat.doubtful) == (True, True)


async def test_a_bank_that_is_away_is_neither_readable_nor_writable(
    bank: RedisBank, server: RedisServer, heartbeat: Heartbeat
) -> None:
    await heartbeat.beat()
    server.kill()
    await heartbeat.beat()
    assert (heartbeat.bank_reachable, heartbeat.bank_writable, heartbeat.doubtful) == (False, False, True)
    with pytest.raises(BankUnavailable):
        await bank.ping()


@pytest.mark.parametrize("alive", [None, False])
async def test_a_gateway_whose_charon_is_not_there_or_is_not_known_yet_has_no_heartbeat(
    bank: RedisBank, heartbeat: Heartbeat, alive: bool | None
) -> None:
    ALIVE[0] = alive
    await heartbeat.beat()
    assert await bank.gateways() == {}
    ALIVE[0] = True
    await heartbeat.beat()
    assert (await bank.gateways())[GATEWAY].alive


async def test_a_gateway_that_has_not_read_its_charons_sas_yet_has_no_heartbeat(
    bank: RedisBank, heartbeat: Heartbeat
) -> None:
    heartbeat._charon.reconciled.clear()
    await heartbeat.beat()
    assert await bank.gateways() == {}


async def test_a_bank_that_was_emptied_is_noticed_at_the_next_heartbeat(bank: RedisBank, server: RedisServer) -> None:
    noticed: list[bool] = []
    bank.on_return = lambda: noticed.append(True)
    await bank.heartbeat(GATEWAY, 1.0)
    await bank.heartbeat(GATEWAY, 1.0)
    assert not noticed
    server.client.flushall()
    await bank.heartbeat(GATEWAY, 1.0)
    assert noticed == [True]
