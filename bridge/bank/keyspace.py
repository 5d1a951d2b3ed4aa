"""What happens in the bank, as it happens: Redis' keyspace notifications, from one server or all of a Cluster.

Redis repeats nothing to whoever was not there. So a watcher tells when it begins to hear and when it no longer does:
what it knew from before is to be looked at again.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import structlog
from redis.asyncio import Redis, RedisCluster

from bridge.bank.redis_url import FAILURES, connect
from bridge.service.tasks import end, spawn

log = structlog.get_logger()

BACK_OFF_MIN: Final = 0.1
BACK_OFF_MAX: Final = 0.5
"""seconds between two attempts to listen: a Redis that is back is heard within this time"""
PROBE_SECONDS: Final = 5.0
"""how often a silent connection is asked whether it lives"""
TIMEOUT: Final = 2.0

_CHANNEL: Final = re.compile(rb"__keyspace@\d+__:(.*)", re.DOTALL)


class Event(NamedTuple):
    """Something happened to a key."""

    key: str
    event: str
    """what Redis calls it: hset, del, expired, zadd, ..."""


class Keyspace:
    """Listens to the keys that match `patterns` (globs), until `close`.

    `on_event` gets what happens. `on_state` gets True when it begins to hear all of it, False when it no longer does.
    Both are called on the event loop. The URL is one of `bridge.bank.redis_url`.
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
        self._listening: list[Any] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen, and begin again whenever Redis goes."""
        self._task = spawn("keyspace", self._keep())

    async def close(self) -> None:
        """Stop listening."""
        if self._task is not None:
            await end(self._task)

    async def add(self, pattern: str) -> None:
        """Listen to the keys of `pattern` too; when this returns, nothing of them is missed."""
        self._patterns[pattern] = None
        await self._change("psubscribe", pattern)

    async def remove(self, pattern: str) -> None:
        """Listen to the keys of `pattern` no more."""
        self._patterns.pop(pattern, None)
        await self._change("punsubscribe", pattern)

    async def _change(self, method: str, pattern: str) -> None:
        for listening in self._listening:
            # one that has gone is opened again with the patterns of then
            with contextlib.suppress(*FAILURES):
                await getattr(listening, method)(_channel(pattern))

    async def _keep(self) -> None:
        delay, told = BACK_OFF_MIN, False
        while True:
            try:
                await self._listen()
            except FAILURES as error:
                if self._listening:
                    delay, told = BACK_OFF_MIN, False
                    self._listening = []
                    self._on_state(False)
                if not told:
                    log.info("keyspace-unheard", reason=str(error)[:160] or type(error).__name__)
                    told = True
            await asyncio.sleep(delay)
            delay = min(delay * 2, BACK_OFF_MAX)

    async def _listen(self) -> None:
        """Listen until a connection fails, or the Cluster has other primaries than before."""
        main = connect(self._url, TIMEOUT)
        clients: list[Redis] = []
        tasks: list[asyncio.Task[None]] = []
        try:
            if isinstance(main, RedisCluster):
                await main.initialize()
                options = {
                    key: value
                    for key, value in main.connection_kwargs.items()
                    if key in ("username", "password", "socket_timeout", "socket_connect_timeout", "protocol")
                    or key.startswith("ssl")
                }
                tls = "rediss" if any(key.startswith("ssl") for key in options) else "redis"
                options = {key: value for key, value in options.items() if key != "ssl"}
                for node in main.get_primaries():
                    host = f"[{node.host}]" if ":" in node.host else node.host
                    clients.append(Redis.from_url(f"{tls}://{host}:{node.port}", **options))
            else:
                clients.append(main)
            listening = [client.pubsub() for client in clients]
            for each in listening:
                await each.psubscribe(*(_channel(pattern) for pattern in self._patterns))
            self._listening = listening
            self._on_state(True)
            tasks = [asyncio.create_task(self._read(each)) for each in listening]
            if isinstance(main, RedisCluster):
                tasks.append(asyncio.create_task(_until_moved(main)))
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await end(*tasks)
            for client in {*clients, main}:
                with contextlib.suppress(*FAILURES):
                    await client.aclose()

    async def _read(self, listening: Any) -> None:
        silent = False
        while True:
            message = await listening.get_message(timeout=PROBE_SECONDS)
            if message is None:
                if silent:
                    raise TimeoutError("Redis does not answer")
                silent = True
                await listening.ping()
                continue
            silent = False
            if message["type"] == "pmessage" and (match := _CHANNEL.fullmatch(message["channel"])):
                self._on_event(Event(match[1].decode(errors="replace"), message["data"].decode(errors="replace")))


def _channel(pattern: str) -> str:
    return f"__keyspace@*__:{pattern}"


async def _until_moved(cluster: RedisCluster) -> None:
    """Returns when the Cluster has other primaries."""
    known = {node.name for node in cluster.get_primaries()}
    while True:
        await asyncio.sleep(PROBE_SECONDS)
        # the client reads the map of slots anew when a command is sent elsewhere; this makes it look in any case
        await cluster.nodes_manager.initialize()
        if {node.name for node in cluster.get_primaries()} != known:
            raise TimeoutError("the Cluster has other primaries")
