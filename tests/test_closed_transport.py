"""uvloop raises a bare RuntimeError for a write to a connection that has just gone: no task of the bank ends by it."""

from __future__ import annotations

import asyncio

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from bank_support import PATIENCE, RedisServer
from bridge.bank.interface import BankUnavailable
from bridge.bank.keyspace import Keyspace
from bridge.bank.redis_client import RedisClient
from bridge.bank.redis_url import closed_as_lost
from bridge.bank.subscription import Subscription

CLOSED = "unable to perform operation on <TCPTransport closed=True reading=False 0x1>; the handler is closed"


def test_a_closed_handler_is_a_lost_connection_and_a_mistake_stays_a_mistake() -> None:
    with pytest.raises(RedisConnectionError), closed_as_lost():
        raise RuntimeError(CLOSED)
    with pytest.raises(RuntimeError, match="a mistake"), closed_as_lost():
        raise RuntimeError("a mistake")


def test_the_bank_is_unavailable_then() -> None:
    with pytest.raises(BankUnavailable), RedisClient("redis://127.0.0.1:1/0", 1.0).reaching():
        raise RuntimeError(CLOSED)


@pytest.mark.redis
async def test_the_keyspace_is_watched_again(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = Subscription.psubscribe
    failed: list[bool] = []

    async def psubscribe(self: Subscription, *patterns: str) -> None:
        if not failed:
            failed.append(True)
            raise RuntimeError(CLOSED)
        await genuine(self, *patterns)

    monkeypatch.setattr(Subscription, "psubscribe", psubscribe)
    listening = asyncio.Event()
    watch = Keyspace(server.url, ("ike:*",), lambda _: None, lambda state: listening.set() if state else None)
    watch.start()
    async with asyncio.timeout(PATIENCE):
        await listening.wait()
    assert failed
    await watch.close()


async def test_a_pattern_changes_while_the_connection_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def closed(self: Subscription, *patterns: str) -> None:
        raise RuntimeError(CLOSED)

    for method in ("psubscribe", "punsubscribe"):
        monkeypatch.setattr(Subscription, method, closed)
    watch = Keyspace("redis://127.0.0.1:1/0", (), lambda _: None, lambda _: None)
    watch._listening = [Subscription(None)]
    watch._listening[0]._confirmed.add(b"__keyspace@*__:x")
    await watch.add("x")
    await watch.remove("x")


async def test_a_script_is_killed_over_a_connection_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    client = RedisClient("redis://127.0.0.1:1/0", 1.0)

    async def closed() -> None:
        raise RuntimeError(CLOSED)

    monkeypatch.setattr(client.client, "script_kill", closed)
    await client._kill_script()
