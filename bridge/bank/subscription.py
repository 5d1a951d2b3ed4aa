"""A subscription to one Redis, over one connection: what it receives, until that connection is lost.

As with bridge.bank.exchange, the connection is redis-py's, which logs in, does TLS and follows Sentinel, and its client
is left out. That reads each message with a timer of its own, three times the CPU time, and connects and subscribes
again by itself, without a word about what it missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from hiredis import pack_command
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

PROBE_SECONDS: Final = 5.0
"""after which a connection without messages is probed; it is lost where no answer comes within the same time"""
CONFIRM_SECONDS: Final = 2.0
"""in which Redis confirms a subscription"""

OnMessage = Callable[[bytes, bytes], None]
"""called with the channel and the data of a message"""


class Subscription:
    """Patterns that one server sends messages for. Every method raises what redis-py does, and TimeoutError, once the
    connection is lost; it is not connected again."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._confirmed: set[bytes] = set()
        self._news = asyncio.Event()
        self._heard = asyncio.get_running_loop().time()

    @classmethod
    async def open(cls, client: Redis, timeout: float) -> Subscription:
        """Connect, within `timeout` s. `client` is a bare one (bridge.bank.redis_url)."""
        connections = client.connection_pool
        async with asyncio.timeout(timeout):
            connection: Any = await connections.get_connection()  # type: ignore[no-untyped-call]
        # there may be nothing to read for as long as nothing happens
        connection.socket_timeout = None
        return cls(connection)

    @property
    def server(self) -> tuple[str, int]:
        """Host and port of the server, where it has them."""
        return self._connection.host, self._connection.port

    async def psubscribe(self, *patterns: str) -> None:
        """Ask for the messages of channels that match `patterns` too."""
        await self._send("PSUBSCRIBE", *patterns)

    async def punsubscribe(self, *patterns: str) -> None:
        """Ask for those no more."""
        self._confirmed.difference_update(pattern.encode() for pattern in patterns)
        await self._send("PUNSUBSCRIBE", *patterns)

    async def _send(self, *command: Any) -> None:
        if not self._connection.is_connected:
            # redis-py would connect again
            raise RedisConnectionError("the subscription was lost")
        await self._connection.send_packed_command(pack_command(command))

    async def confirmed(self, pattern: str) -> None:
        """Wait until Redis has confirmed that this connection gets what `pattern` names. Raises TimeoutError."""
        async with asyncio.timeout(CONFIRM_SECONDS):
            while pattern.encode() not in self._confirmed:
                await self._news.wait()

    async def read(self, on_message: OnMessage) -> None:
        """Pass on messages until the connection is lost."""
        connection, time = self._connection, asyncio.get_running_loop().time
        while True:
            # returns immediately while there is something left of what was received at a time
            message = await connection.read_response()
            self._heard = time()
            if message[0] == b"pmessage":
                on_message(message[2], message[3])
            elif message[0] == b"psubscribe":
                self._confirmed.add(message[1])
                self._news.set()
                self._news = asyncio.Event()

    async def probe(self) -> None:
        """Probe the connection whenever nothing was received for a while. Raises TimeoutError."""
        time = asyncio.get_running_loop().time
        while True:
            heard = self._heard
            await asyncio.sleep(max(heard + PROBE_SECONDS - time(), 0.0))
            if self._heard > heard:
                continue
            await self._send("PING")
            await asyncio.sleep(PROBE_SECONDS)
            if self._heard == heard:
                raise TimeoutError("Redis does not answer")

    async def close(self) -> None:
        """Let go of the connection."""
        await self._connection.disconnect(nowait=True)
