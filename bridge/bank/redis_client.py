"""One Redis server, Sentinel set or Cluster: commands in pipelines, scripts by digest, failures in one shape."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import structlog
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import (
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from bridge.bank.cluster_nodes import ClusterNodes
from bridge.bank.exchange import exchange
from bridge.bank.interface import BankUnavailable, BankUnwritable
from bridge.bank.redis_url import FAILURES, Client, closed_as_lost, connect
from bridge.service import shipped_files
from bridge.stub.types import printable

log = structlog.get_logger()

_REFUSED_WRITES: Final = re.compile(r"\b(OOM|READONLY|NOREPLICAS|MISCONF) ")
"""in the replies by which a Redis that answers reads says that it takes no writes now"""
_BUSY: Final = "BUSY "


class Script:
    """A Lua script that is shipped in redis/, called by its digest."""

    def __init__(self, name: str) -> None:
        self.source = shipped_files.path(f"redis/{name}.lua").read_bytes()
        self.digest = hashlib.sha1(self.source, usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str | bytes], arguments: Iterable[Any]) -> tuple[Any, ...]:
        """The command that runs it. All `keys` belong to one bucket."""
        return ("EVALSHA", self.digest, len(keys), *keys, *arguments)


class RedisClient:
    """What a URL of `bridge.bank.redis_url` leads to; connects when it is first used. `timeout` in seconds."""

    def __init__(self, url: str, timeout: float, scripts: Sequence[Script] = ()) -> None:
        self.client: Client = connect(url, timeout)
        """for what is seldom asked"""
        bare = None if isinstance(self.client, RedisCluster) else connect(url, timeout, bare=True)
        assert not isinstance(bare, RedisCluster)
        self._bare: Redis | None = bare
        """for all else, where there is one server"""
        self._timeout = timeout
        self._scripts = scripts
        self._nodes = ClusterNodes()
        self._stale = False

    def renew(self) -> None:
        """Another server may be the primary: ask Sentinel before the next command. A primary that hung, or that
        Sentinel alone cannot reach, answers again over the connections that lie ready, acknowledges writes, and loses
        them when Sentinel makes a replica of it. Only where there is a Sentinel."""
        self._stale = self._bare is not None and isinstance(self._bare.connection_pool, SentinelConnectionPool)

    @property
    def is_cluster(self) -> bool:
        """Whether it leads to a Cluster."""
        return isinstance(self.client, RedisCluster)

    async def pipeline(self, commands: Sequence[tuple[Any, ...]], *, writing: bool = False) -> list[Any]:
        """The replies to `commands`, as `replies` gives them.

        Raises BankUnavailable where any of them failed; some of the others may have been carried out then.
        """
        replies = await self.replies(commands, writing=writing)
        for reply in replies:
            if isinstance(reply, Exception):
                raise unavailable(reply) from None
        return replies

    async def replies(
        self,
        commands: Sequence[tuple[Any, ...]],
        *,
        writing: bool = False,
        within: float | None = None,
        node_timeout: float | None = None,
    ) -> list[Any]:
        """The replies to `commands`, sent together; an exception in the place of each that failed alone: by what its
        key holds, or because its node of a Cluster does not answer. Scripts that Redis does not know are loaded.

        `writing`: in one transaction, where there is one server. Redis then goes to its disk once for all, instead of
        after every 16 KB that it reads. `within`: seconds that all of it may take, connecting included. `node_timeout`:
        seconds that one node of a Cluster may take; one that took longer is not waited for again for a moment.

        Raises BankUnavailable where nothing could be asked; some of the commands may have been carried out then.
        """
        try:
            with self.reaching():
                if within is None:
                    replies = await self._replies(commands, writing, self._timeout, node_timeout)
                else:
                    async with asyncio.timeout(within):
                        replies = await self._replies(commands, writing, None, node_timeout)
        except BankUnavailable as error:
            self.renew()
            if _BUSY in str(error):
                await self._kill_script()
            raise
        failed = [reply for reply in replies if isinstance(reply, Exception)]
        if any(_BUSY in str(reply) for reply in failed):
            await self._kill_script()
        if failed and len(failed) == len(replies) and not any(isinstance(each, ResponseError) for each in failed):
            # no node of the Cluster answers
            raise unavailable(failed[0]) from None
        return replies

    async def _replies(
        self, commands: Sequence[tuple[Any, ...]], writing: bool, timeout: float | None, node_timeout: float | None
    ) -> list[Any]:
        replies = await self._send(commands, writing, timeout, node_timeout)
        unknown = [position for position, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            await self._load([commands[position] for position in unknown])
            again = await self._send([commands[position] for position in unknown], writing, timeout, node_timeout)
            for position, reply in zip(unknown, again, strict=True):
                replies[position] = reply
        return replies

    async def _send(
        self, commands: Sequence[tuple[Any, ...]], writing: bool, timeout: float | None, node_timeout: float | None
    ) -> list[Any]:
        if isinstance(self.client, RedisCluster):
            return await self._nodes.send(self.client, commands, timeout, node_timeout)
        assert self._bare is not None
        if self._stale:
            self._stale = False
            for client in (self._bare, self.client):
                # those in use are closed when they are given back, as soon as a new one has found another primary
                await client.connection_pool.disconnect(inuse_connections=False)
        try:
            return await exchange(self._bare, commands, timeout, transaction=writing)
        except OutOfMemoryError:
            # a full Redis queues nothing; one by one, what needs no memory gets through
            return await exchange(self._bare, commands, timeout)

    async def _load(self, commands: Sequence[tuple[Any, ...]]) -> None:
        """Load the scripts, in a Cluster where `commands` are for."""
        clients = [self.client]
        if isinstance(self.client, RedisCluster):
            clients = [*self._nodes.clients(self.client, commands)]
        for client in clients:
            for script in self._scripts:
                await client.script_load(script.source)

    async def _kill_script(self) -> None:
        """A script runs without end, and Redis answers nothing else: the bank's own scripts take milliseconds."""
        with suppress(*FAILURES), closed_as_lost():
            await self.client.script_kill()
            log.error("bank-script-killed", reason="a script ran without end", fix="rotate the passwords of the bank")

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Every way in which Redis fails within, as BankUnavailable."""
        try:
            with closed_as_lost():
                yield
        except TimeoutError:
            raise BankUnavailable("Redis did not answer in time") from None
        except FAILURES as error:
            raise unavailable(error) from None

    async def close(self) -> None:
        """Close the connections."""
        await self._nodes.close()
        if self._bare is not None:
            await self._bare.aclose()
        await self.client.aclose()


def is_wrong_type(reply: object) -> bool:
    """Whether a command failed because its key holds something of another type."""
    return isinstance(reply, RedisError) and "WRONGTYPE" in str(reply)


def unavailable(error: Exception) -> BankUnavailable:
    """What a failure of Redis means for the bank. One line, short: redis-py repeats whole commands in some of its
    errors, in front of what Redis said."""
    text = str(error).rpartition("caused error: ")[2].strip("(),\"'") or type(error).__name__
    refuses = isinstance(error, OutOfMemoryError | ReadOnlyError) or _REFUSED_WRITES.search(text) is not None
    return (BankUnwritable if refuses else BankUnavailable)(f"Redis: {printable(text)[:160]}")
