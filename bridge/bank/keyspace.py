"""What happens in the bank, as it happens: Redis' keyspace notifications, from one server or all of a Cluster.

Redis does not repeat a notification to a client that was not connected. So a watcher reports when it begins to receive
and when it no longer does: what was known from before has to be looked at again. A connection that was lost is a
subscription that was lost (CLIENT KILL, a failover, an output buffer that was full).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final, NamedTuple

import structlog
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.sentinel import SentinelConnectionPool

from bridge.bank.redis_url import FAILURES, Client, closed_as_lost, connect, node_client
from bridge.bank.subscription import Subscription
from bridge.service.tasks import end, spawn

log = structlog.get_logger()

BACK_OFF_MIN: Final = 0.1
BACK_OFF_MAX: Final = 0.5
"""seconds between two attempts to listen: events of a Redis that is back arrive within this time"""
MOVED_SECONDS: Final = 2.0
"""between two looks at which servers are the primaries, where Sentinels or a Cluster know it"""
TIMEOUT: Final = 2.0


class Event(NamedTuple):
    """Something happened to a key."""

    key: str
    event: str
    """what Redis calls it: hset, del, expired, zadd, ..."""


class Keyspace:
    """Listens to the keys that match `patterns` (globs), until `close`.

    `on_event` gets what happens. `on_state` gets True when it begins to receive all of them, False when it no longer
    does. Both are called on the event loop. The URL is one of `bridge.bank.redis_url`.
    """

    def __init__(
        self,
        url: str,
        patterns: tuple[str, ...],
        on_event: Callable[[Event], None],
        on_state: Callable[[bool], None],
    ) -> None:
        self._url = url
        self._patterns = dict.fromkeys(patterns)
        self._on_event = on_event
        self._on_state = on_state
        self._listening: list[Subscription] = []
        self._lost = False
        """the log has that its subscription ended or could not begin, and not yet that it is back"""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen, and begin again whenever Redis goes."""
        self._task = spawn("keyspace", self._keep())

    async def close(self) -> None:
        """Stop listening."""
        if self._task is not None:
            await end(self._task)

    async def add(self, pattern: str) -> None:
        """Listen to the keys of `pattern` too; when this returns, nothing of them is missed, unless `on_state` says so
        now."""
        self._patterns[pattern] = None
        await self._change("psubscribe", pattern)
        for listening in self._listening:
            with contextlib.suppress(TimeoutError):
                await listening.confirmed(_channel(pattern))

    async def remove(self, pattern: str) -> None:
        """Listen to the keys of `pattern` no more."""
        self._patterns.pop(pattern, None)
        await self._change("punsubscribe", pattern)

    async def _change(self, method: str, pattern: str) -> None:
        for listening in self._listening:
            # one that has gone is opened again with the patterns of then
            with contextlib.suppress(*FAILURES), closed_as_lost():
                await getattr(listening, method)(_channel(pattern))

    async def _keep(self) -> None:
        delay = BACK_OFF_MIN
        while True:
            try:
                with closed_as_lost():
                    await self._listen()
            except FAILURES as error:
                if self._listening:
                    delay = BACK_OFF_MIN
                    self._listening = []
                    self._on_state(False)
                if not self._lost:
                    self._lost = True
                    reason = str(error)[:160] or type(error).__name__
                    log.info("bank-unreachable", component="keyspace", reason=reason)
            await asyncio.sleep(delay)
            delay = min(delay * 2, BACK_OFF_MAX)

    async def _listen(self) -> None:
        """Listen until a connection fails, or other servers are the primaries than before."""
        main = connect(self._url, TIMEOUT)
        clients: list[Redis] = []
        listening: list[Subscription] = []
        tasks: list[asyncio.Task[None]] = []
        try:
            clients = await self._bare_clients(main)
            patterns = [_channel(pattern) for pattern in self._patterns]
            for bare in clients:
                listening.append(await Subscription.open(bare, TIMEOUT))
                await listening[-1].psubscribe(*patterns)
            works = [work for each in listening for work in (each.read(self._received), each.probe())]
            tasks = [asyncio.create_task(work) for work in (*works, self._follow(main, listening, patterns))]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await end(*tasks)
            for each in listening:
                with contextlib.suppress(*FAILURES):
                    await each.close()
            for client in (*clients, main):
                with contextlib.suppress(*FAILURES):
                    await client.aclose()

    async def _bare_clients(self, main: Client) -> list[Redis]:
        """One for each primary."""
        if isinstance(main, RedisCluster):
            await main.initialize()
            return [node_client(main, node.host, int(node.port), bare=True) for node in main.get_primaries()]
        bare = connect(self._url, TIMEOUT, bare=True)
        assert not isinstance(bare, RedisCluster)
        return [bare]

    async def _follow(self, client: Client, listening: list[Subscription], channels: list[str]) -> None:
        """Say that all is received once Redis has confirmed it; then until other servers are the primaries."""
        for each in listening:
            for channel in channels:
                await each.confirmed(channel)
        # with what was added meanwhile
        for each in listening:
            await each.psubscribe(*map(_channel, self._patterns))
        self._listening = listening
        if self._lost:
            self._lost = False
            log.info("bank-reachable", component="keyspace")
        self._on_state(True)
        await _until_moved(client, listening)

    def _received(self, channel: bytes, event: bytes) -> None:
        # __keyspace@<database>__:<key>
        key = channel.partition(b"__:")[2]
        self._on_event(Event(key.decode(errors="replace"), event.decode(errors="replace")))


def _channel(pattern: str) -> str:
    return f"__keyspace@*__:{pattern}"


async def _until_moved(client: Client, listening: list[Subscription]) -> None:
    """Ends with TimeoutError when other servers are the primaries than those that are listened to: a primary that was
    cut off from its Sentinels, and not from here, goes on as if it were one. For ever where nothing else knows of
    primaries."""
    if isinstance(client, RedisCluster):
        known = {node.name for node in client.get_primaries()}
        while True:
            await asyncio.sleep(MOVED_SECONDS)
            # the client reads the map of slots again when a command is sent elsewhere; this makes it look in any case
            await client.nodes_manager.initialize()
            if {node.name for node in client.get_primaries()} != known:
                raise TimeoutError("the Cluster has other primaries")
    pool = client.connection_pool
    while True:
        await asyncio.sleep(MOVED_SECONDS)
        if isinstance(pool, SentinelConnectionPool):
            try:
                host, port = await pool.sentinel_manager.discover_master(pool.service_name)
            except FAILURES:
                # no Sentinel answers: the primary that is known may still be the right one
                continue
            if any(each.server != (host, port) for each in listening):
                raise TimeoutError("Sentinel names another primary")
