"""The nodes of a Redis Cluster, each asked by a client of its own.

redis-py's pipeline for a Cluster closes the connections to all nodes when one of them fails, with all that the others
were asked. Here its client says which node has which slots, and follows slots that move; all else is asked of the nodes
themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import AskError, ClusterDownError, TryAgainError
from redis.exceptions import TimeoutError as RedisTimeoutError

from bridge.bank.exchange import exchange
from bridge.bank.redis_url import FAILURES, node_client
from bridge.service.tasks import end, spawn

SILENT_SECONDS: Final = 1.0
"""how long look-ups do not wait for a node that did not answer"""
_KEYED_SCRIPTS: Final = ("EVALSHA", "EVAL")
_ELSEWHERE: Final = (AskError, TryAgainError, ClusterDownError)
"""replies of a node that does not have the slot, or not wholly; MovedError is an AskError"""


class ClusterNodes:
    """Clients for the nodes of a Cluster, and what is known of the nodes."""

    def __init__(self) -> None:
        self._clients: dict[str, Redis] = {}
        self._silent_until: dict[str, float] = {}
        self._refresh: asyncio.Task[None] | None = None
        self._refreshed = 0.0

    async def send(
        self,
        cluster: RedisCluster,
        commands: Sequence[tuple[Any, ...]],
        timeout: float | None,
        node_timeout: float | None,
    ) -> list[Any]:
        """The replies to commands with a key; an exception in the place of each that failed. The replies of a node may
        take `timeout` s, with connecting to it `node_timeout` s. Raises what redis-py does where no node can be asked
        who has what."""
        await cluster.initialize()
        shares: dict[str, list[int]] = {}
        for position, command in enumerate(commands):
            shares.setdefault(self._node(cluster, command), []).append(position)
        answers = await asyncio.gather(
            *(
                self._ask(name, [commands[position] for position in positions], timeout, node_timeout)
                for name, positions in shares.items()
            ),
            return_exceptions=True,
        )
        replies: list[Any] = [None] * len(commands)
        failed = False
        for positions, answer in zip(shares.values(), answers, strict=True):
            if isinstance(answer, BaseException) and not isinstance(answer, FAILURES):
                raise answer
            failed = failed or isinstance(answer, BaseException)
            for number, position in enumerate(positions):
                replies[position] = answer if isinstance(answer, BaseException) else answer[number]
        moved = [position for position, reply in enumerate(replies) if isinstance(reply, _ELSEWHERE)]
        for position in moved:
            try:
                # follows to where the slot is, or waits for it
                replies[position] = await cluster.execute_command(*commands[position])
            except FAILURES as error:
                replies[position] = error
        if failed or moved:
            self._look_again(cluster)
        return replies

    def clients(self, cluster: RedisCluster, commands: Sequence[tuple[Any, ...]]) -> list[Redis]:
        """Clients for the nodes that commands are for."""
        return [self._clients[name] for name in {self._node(cluster, command) for command in commands}]

    def _node(self, cluster: RedisCluster, command: tuple[Any, ...]) -> str:
        """The name of the node that a command is for."""
        node = cluster.nodes_manager.get_node_from_slot(cluster.keyslot(_key(command)))
        if node.name not in self._clients:
            self._clients[node.name] = node_client(cluster, node.host, int(node.port), bare=True)
        return str(node.name)

    async def _ask(
        self, name: str, commands: Sequence[tuple[Any, ...]], timeout: float | None, node_timeout: float | None
    ) -> list[Any]:
        if node_timeout is not None and time.monotonic() < self._silent_until.get(name, 0.0):
            raise RedisTimeoutError(f"{name} did not answer a moment ago")
        try:
            async with asyncio.timeout(node_timeout):
                replies = await exchange(self._clients[name], commands, timeout)
        except FAILURES:
            self._silent_until[name] = time.monotonic() + SILENT_SECONDS
            raise
        self._silent_until.pop(name, None)
        return replies

    def _look_again(self, cluster: RedisCluster) -> None:
        """Ask the nodes in the background who has what now: another one may have taken over."""
        if time.monotonic() - self._refreshed < SILENT_SECONDS or (self._refresh and not self._refresh.done()):
            return
        self._refreshed = time.monotonic()

        async def refresh() -> None:
            with suppress(*FAILURES):
                await cluster.nodes_manager.initialize()

        self._refresh = spawn("cluster-nodes", refresh())

    async def close(self) -> None:
        """Close the connections."""
        if self._refresh is not None:
            await end(self._refresh)
        for client in self._clients.values():
            await client.aclose()


def _key(command: tuple[Any, ...]) -> Any:
    return command[3] if command[0] in _KEYED_SCRIPTS else command[1]
