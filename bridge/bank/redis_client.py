"""One Redis server, Sentinel set or Cluster: commands in pipelines, scripts by digest, failures in one shape."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import structlog
from redis.asyncio import RedisCluster
from redis.exceptions import NoScriptError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from bridge.bank.interface import BankUnavailable, BankUnwritable
from bridge.bank.redis_url import FAILURES, Client, connect
from bridge.service import shipped_files
from bridge.stub.types import printable

log = structlog.get_logger()

_REFUSED_WRITES: Final = re.compile("\\b(OOM|READONLY|NOREPLICAS|MISCONF) ")
"""in the replies by which a Redis that answers reads says that it takes no writes now"""
SILENT_SECONDS: Final = 1.0
"""how long look-ups do not wait for a node of a Cluster that did not answer"""
_BUSY: Final = "BUSY "
_KEYED_SCRIPTS: Final = ("EVALSHA", "EVAL")


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
        self._scripts = scripts
        self._silent_until: dict[str, float] = {}

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
        self, commands: Sequence[tuple[Any, ...]], *, writing: bool = False, node_timeout: float | None = None
    ) -> list[Any]:
        """The replies to `commands`, sent together; an exception in the place of each that failed alone: by what its
        key holds, or because its node of a Cluster does not answer. Scripts that Redis does not know are loaded.

        `writing`: in one transaction, where there is one server. Redis then goes to its disk once for all, instead of
        after every 16 KB that it reads. `node_timeout`: seconds that one node of a Cluster may take; one that took
        longer is not waited for again for a moment.

        Raises BankUnavailable where nothing could be asked; some of the commands may have been carried out then.
        """
        try:
            replies = await self._replies(commands, writing and not isinstance(self.client, RedisCluster), node_timeout)
        except BankUnavailable as error:
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
        self, commands: Sequence[tuple[Any, ...]], transaction: bool, node_timeout: float | None
    ) -> list[Any]:
        with self.reaching():
            replies = await self._send(commands, transaction, node_timeout)
            unknown = [position for position, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
            if unknown:
                for script in self._scripts:
                    await self.client.script_load(script.source)
                again = await self._send([commands[position] for position in unknown], transaction, node_timeout)
                for position, reply in zip(unknown, again, strict=True):
                    replies[position] = reply
        return replies

    async def _send(
        self, commands: Sequence[tuple[Any, ...]], transaction: bool, node_timeout: float | None
    ) -> list[Any]:
        if not isinstance(self.client, RedisCluster):
            try:
                return await _pipeline(self.client, commands, transaction)
            except OutOfMemoryError:
                # a full Redis queues nothing; one by one, what needs no memory gets through
                return await _pipeline(self.client, commands, False)
        # each node by itself: one that does not answer keeps the answers of the others from nobody
        await self.client.initialize()
        shares: dict[str, list[int]] = {}
        for position, command in enumerate(commands):
            shares.setdefault(self._node(self.client, command), []).append(position)
        answers = await asyncio.gather(
            *(
                self._ask_node(node, [commands[position] for position in positions], node_timeout)
                for node, positions in shares.items()
            ),
            return_exceptions=True,
        )
        replies: list[Any] = [None] * len(commands)
        for positions, answer in zip(shares.values(), answers, strict=True):
            if isinstance(answer, BaseException) and not isinstance(answer, Exception):
                raise answer
            for number, position in enumerate(positions):
                replies[position] = answer if isinstance(answer, BaseException) else answer[number]
        return replies

    async def _ask_node(self, node: str, commands: Sequence[tuple[Any, ...]], node_timeout: float | None) -> list[Any]:
        """The replies of one node of a Cluster."""
        if node_timeout is not None and time.monotonic() < self._silent_until.get(node, 0.0):
            raise RedisTimeoutError(f"{node} did not answer a moment ago")
        try:
            async with asyncio.timeout(node_timeout):
                replies = await _pipeline(self.client, commands, False)
        except FAILURES:
            self._silent_until[node] = time.monotonic() + SILENT_SECONDS
            raise
        self._silent_until.pop(node, None)
        return replies

    @staticmethod
    def _node(cluster: RedisCluster, command: tuple[Any, ...]) -> str:
        """The name of the node that a command with a key is for."""
        key = command[3] if command[0] in _KEYED_SCRIPTS else command[1]
        node = cluster.nodes_manager.get_node_from_slot(cluster.keyslot(key))
        return str(node.name)

    async def _kill_script(self) -> None:
        """Somebody runs a script without end, and Redis answers nothing else: the bank's own take milliseconds."""
        with suppress(*FAILURES):
            await self.client.script_kill()
            log.error("bank-script-killed", reason="a script ran without end", fix="rotate the passwords of the bank")

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Every way in which Redis fails within, as BankUnavailable."""
        try:
            yield
        except TimeoutError:
            raise BankUnavailable("Redis did not answer in time") from None
        except FAILURES as error:
            raise unavailable(error) from None

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()


async def _pipeline(client: Client, commands: Sequence[tuple[Any, ...]], transaction: bool) -> list[Any]:
    pipeline = client.pipeline(transaction=transaction)
    for command in commands:
        pipeline.execute_command(*command)
    replies: list[Any] = await pipeline.execute(raise_on_error=False)
    return replies


def is_wrong_type(reply: object) -> bool:
    """Whether a command failed because its key holds something of another type."""
    return isinstance(reply, RedisError) and "WRONGTYPE" in str(reply)


def unavailable(error: Exception) -> BankUnavailable:
    """What a failure of Redis means for the bank. One line, short: redis-py repeats whole commands in some of its
    errors, in front of what Redis said."""
    text = str(error).rpartition("caused error: ")[2].strip("(),\"'") or type(error).__name__
    refuses = isinstance(error, OutOfMemoryError | ReadOnlyError) or _REFUSED_WRITES.search(text) is not None
    return (BankUnwritable if refuses else BankUnavailable)(f"Redis: {printable(text)[:160]}")
