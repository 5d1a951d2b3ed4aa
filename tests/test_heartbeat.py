"""What a gateway knows of its bank by its own heartbeats (bridge.gateway.heartbeat)."""

from __future__ import annotations

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


@pytest.fixture
def heartbeat(bank: RedisBank) -> Heartbeat:
    charon = SimpleNamespace(channel=SimpleNamespace(charon_socket=lambda: None), vici=None)

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
