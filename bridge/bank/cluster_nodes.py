"""The nodes of a Redis Cluster, each asked by a client of its own.

redis-py's pipeline for a Cluster closes the connections to all nodes when one of them fails, with all that the others
were asked. Here its client says which node has which slots; all else is asked of the nodes themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import AskError, ClusterDownError, MovedError, TryAgainError
from redis.exceptions import TimeoutError as RedisTimeoutError

from bridge.bank.exchange import exchange
from bridge.bank.redis_url import FAILURES, closed_as_lost, node_client
from bridge.service.tasks import end, spawn

REFRESH_SECONDS: Final = 1.0
"""between two questions who has which slots"""
FOLLOWED: Final = 4
"""times that a command is sent to another node, or again, because its slot is not there or not wholly"""
FOLLOW_SECONDS: Final = 0.1
"""before it is sent a second time"""
PROBE_SECONDS: Final = 0.2
"""between two probes of a node that did not answer in time"""
NODE_SECONDS: Final = 2.0
"""that it has for the answer to one"""
_KEYED_SCRIPTS: Final = ("EVALSHA", "EVAL")
_ELSEWHERE: Final = (AskError, TryAgainError, ClusterDownError)
"""replies of a node that does not have the slot, or not wholly; MovedError is an AskError"""


class ClusterNodes:
    """Clients for the nodes of a Cluster, and what is known of the nodes."""

    def __init__(self) -> None:
        self._clients: dict[str, Redis] = {}
        self._silent: dict[str, asyncio.Task[None]] = {}
        """nodes that did not answer in time, and what probes each: all else fails there immediately, or each write and
        each heartbeat for the other nodes would wait for it"""
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
        moved = await self._follow(cluster, commands, replies, timeout, node_timeout)
        if failed or moved:
            self._look_again(cluster)
        return replies

    async def _follow(
        self,
        cluster: RedisCluster,
        commands: Sequence[tuple[Any, ...]],
        replies: list[Any],
        timeout: float | None,
        node_timeout: float | None,
    ) -> bool:
        """Send those again, to where their nodes say, whose slots have moved or are moving; whether there were any.
        (redis-py's client does so too, and fails with an AttributeError while it reads the map of the slots again.)"""
        followed = False
        for _ in range(FOLLOWED):
            places: dict[tuple[str, bool], list[int]] = {}
            for position, reply in enumerate(replies):
                if isinstance(reply, AskError) and reply.host:
                    asking = not isinstance(reply, MovedError)
                    places.setdefault((self._at(cluster, reply.host, reply.port), asking), []).append(position)
                elif isinstance(reply, _ELSEWHERE):
                    places.setdefault((self._node(cluster, commands[position]), False), []).append(position)
            if not places:
                break
            if followed:
                await asyncio.sleep(FOLLOW_SECONDS)
            followed = True
            for (name, asking), positions in places.items():
                sent = [commands[position] for position in positions]
                if asking:
                    sent = [each for command in sent for each in (("ASKING",), command)]
                try:
                    answer = await self._ask(name, sent, timeout, node_timeout)
                except FAILURES as error:
                    answer = [error] * len(sent)
                for position, reply in zip(positions, answer[1::2] if asking else answer, strict=True):
                    replies[position] = reply
        return followed

    def clients(self, cluster: RedisCluster, commands: Sequence[tuple[Any, ...]]) -> list[Redis]:
        """Clients for the nodes that commands are for."""
        return [self._clients[name] for name in {self._node(cluster, command) for command in commands}]

    def _node(self, cluster: RedisCluster, command: tuple[Any, ...]) -> str:
        """The name of the node that a command is for."""
        node = cluster.nodes_manager.get_node_from_slot(cluster.keyslot(_key(command)))
        return self._at(cluster, node.host, int(node.port))

    def _at(self, cluster: RedisCluster, host: str, port: int) -> str:
        """The name of the node at an address."""
        name = f"{host}:{port}"
        if name not in self._clients:
            self._clients[name] = node_client(cluster, host, port, bare=True)
        return name

    async def _ask(
        self, name: str, commands: Sequence[tuple[Any, ...]], timeout: float | None, node_timeout: float | None
    ) -> list[Any]:
        if name in self._silent:
            raise RedisTimeoutError(f"{name} did not answer a moment ago")
        try:
            async with asyncio.timeout(node_timeout):
                return await exchange(self._clients[name], commands, timeout)
        except (TimeoutError, RedisTimeoutError):
            if name not in self._silent:
                task = self._silent[name] = spawn(f"probe {name}", self._probe(name))
                task.add_done_callback(lambda _: self._silent.pop(name, None))
            raise

    async def _probe(self, name: str) -> None:
        """Ask a node until it answers."""
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            with suppress(*FAILURES), closed_as_lost():
                await exchange(self._clients[name], [("PING",)], NODE_SECONDS)
                return

    def _look_again(self, cluster: RedisCluster) -> None:
        """Ask the nodes in the background who has what now: another one may have taken over."""
        if time.monotonic() - self._refreshed < REFRESH_SECONDS or (self._refresh and not self._refresh.done()):
            return
        self._refreshed = time.monotonic()

        async def refresh() -> None:
            with suppress(*FAILURES):
                await cluster.nodes_manager.initialize()

        self._refresh = spawn("cluster-nodes", refresh())

    async def close(self) -> None:
        """Close the connections."""
        await end(*self._silent.values(), *([self._refresh] if self._refresh is not None else []))
        for client in self._clients.values():
            await client.aclose()


def _key(command: tuple[Any, ...]) -> Any:
    return command[3] if command[0] in _KEYED_SCRIPTS else command[1]
