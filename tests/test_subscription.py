"""The watch of the bank's keyspace: a subscription that was lost is seen as lost, and after a failover it is at the
primary."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import structlog
from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import ConnectionError as RedisConnectionError

import redis
from bank_support import PASSWORD, PATIENCE, RedisServer, shipped_users
from bridge.bank import keyspace as module
from bridge.bank import subscription
from bridge.bank.keyspace import Event, Keyspace
from bridge.bank.redis_url import connect
from bridge.bank.subscription import Subscription
from test_bank_servers import admin, cluster, cluster_url, free_port, sentinel

__all__ = ["cluster", "sentinel"]

pytestmark = pytest.mark.redis


class Watched:
    """What a watcher was told."""

    def __init__(self) -> None:
        self.states: asyncio.Queue[bool] = asyncio.Queue()
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    async def state(self) -> bool:
        async with asyncio.timeout(PATIENCE):
            return await self.states.get()

    async def event(self) -> Event:
        async with asyncio.timeout(PATIENCE):
            return await self.events.get()


@asynccontextmanager
async def watching(url: str, *patterns: str) -> AsyncIterator[tuple[Watched, Keyspace]]:
    watched = Watched()
    keyspace = Keyspace(url, patterns or ("ike:*",), watched.events.put_nowait, watched.states.put_nowait)
    keyspace.start()
    try:
        assert await watched.state()
        yield watched, keyspace
    finally:
        await keyspace.close()


def kill_pubsub(client: Any) -> None:
    assert client.execute_command("CLIENT", "KILL", "TYPE", "pubsub") > 0


def overflow(client: Any) -> None:
    """More than Redis keeps for a client that reads slowly."""
    client.config_set("client-output-buffer-limit", "pubsub 65536 65536 1")
    client.publish("__keyspace@0__:ike:x", b"x" * 1_000_000)


@pytest.mark.parametrize("lose", [kill_pubsub, overflow])
async def test_a_connection_that_redis_drops_is_a_lost_subscription(
    server: RedisServer, lose: Callable[[Any], None]
) -> None:
    async with watching(server.url) as (watched, _):
        lose(server.client)
        assert await watched.state() is False
        assert await watched.state() is True
        server.client.set("ike:after", "x")
        while (await watched.event()).key != "ike:after":
            pass


async def test_in_a_cluster_a_connection_that_one_node_drops_is_a_lost_subscription(cluster: list[int]) -> None:
    async with watching(cluster_url(cluster)) as (watched, _):
        kill_pubsub(admin(cluster[1]))
        assert await watched.state() is False
        assert await watched.state() is True


async def test_a_redis_that_hangs_is_a_lost_subscription(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription, "PROBE_SECONDS", 0.5)
    async with watching(server.url) as (watched, keyspace):
        server.freeze()
        try:
            assert await watched.state() is False
        finally:
            server.thaw()
        assert await watched.state() is True
        # its answers to probes are no events, and keep the subscription
        await keyspace.add("other:*")
        server.client.set("other:after", "x")
        assert await watched.event() == Event("other:after", "set")


async def test_a_pattern_is_not_added_to_a_connection_that_was_lost(server: RedisServer) -> None:
    client = connect(server.url, 1.0, bare=True)
    lost = await Subscription.open(cast(Redis, client), 1.0)
    await lost.psubscribe("x*")
    reading = asyncio.create_task(lost.read(lambda channel, data: None))
    await lost.confirmed("x*")
    kill_pubsub(server.client)
    with pytest.raises(RedisConnectionError):
        await reading
    with pytest.raises(RedisConnectionError):
        await lost.psubscribe("y*")
    assert server.client.pubsub_numpat() == 0
    await lost.close()
    await client.aclose()


async def test_nothing_is_said_to_be_received_before_redis_has_confirmed_it(tmp_path: Path) -> None:
    """A user who may not subscribe gets no word that all is received."""
    users = tmp_path / "users.acl"
    shipped_users(users)
    users.write_text(users.read_text() + f"user mute on >{PASSWORD} ~ike:* +@all -psubscribe\n")
    with RedisServer(tmp_path, "--aclfile", str(users), username="admin", password=PASSWORD) as server:
        states: list[bool] = []
        keyspace = Keyspace(f"unix://mute:{PASSWORD}@{server.socket}", ("ike:*",), lambda _: None, states.append)
        with structlog.testing.capture_logs() as events:
            keyspace.start()
            async with asyncio.timeout(PATIENCE):
                while not events:  # noqa: ASYNC110 - there is no event of it
                    await asyncio.sleep(0.01)
        assert events[0]["component"] == "keyspace"
        assert states == []
        await keyspace.close()


async def test_nothing_is_missed_of_a_pattern_once_it_was_added(server: RedisServer) -> None:
    async with watching(server.url, "ike:gateway:*") as (watched, keyspace):
        for number in range(50):
            await keyspace.add(f"ike:stub:{number}:*")
            server.client.set(f"ike:stub:{number}:x", "y")
            assert await watched.event() == Event(f"ike:stub:{number}:x", "set")


async def test_after_a_failover_that_killed_no_connection_the_watch_is_at_the_new_primary(
    tmp_path: Path, sentinel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the old primary is cut off from its Sentinels, and not from this gateway."""
    monkeypatch.setattr(module, "MOVED_SECONDS", 0.1)
    port = free_port()
    watcher: Any = redis.Redis(port=sentinel)
    with RedisServer(tmp_path / "promoted", "--port", str(port)) as promoted:
        async with watching(f"redis+sentinel://127.0.0.1:{sentinel}/bank/0") as (watched, _):
            watcher.execute_command("SENTINEL REMOVE", "bank")
            watcher.execute_command("SENTINEL MONITOR", "bank", "127.0.0.1", port, 1)
            assert await watched.state() is False
            assert await watched.state() is True
            promoted.client.set("ike:after", "x")
            assert (await watched.event()).key == "ike:after"


async def test_without_sentinels_the_watch_of_the_known_primary_goes_on(
    sentinel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOVED_SECONDS", 0.05)
    asked: list[bool] = []
    genuine = Sentinel.discover_master

    async def discover(self: Any, name: str) -> Any:
        asked.append(True)
        return await genuine(self, name)

    monkeypatch.setattr(Sentinel, "discover_master", discover)
    watcher: Any = redis.Redis(port=sentinel)
    address = watcher.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "bank")
    async with watching(f"redis+sentinel://127.0.0.1:{sentinel}/bank/0") as (watched, _):
        watcher.shutdown(nosave=True)
        before = len(asked)
        async with asyncio.timeout(PATIENCE):
            while len(asked) < before + 3:  # noqa: ASYNC110 - there is no event of it
                await asyncio.sleep(0.01)
        redis.Redis(port=int(address[1])).set("ike:after", "x")
        assert (await watched.event()).key == "ike:after"
        assert watched.states.empty()
