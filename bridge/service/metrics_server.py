"""Metrics over HTTP, for Prometheus: each user of the host may ask for them, at a cost that is bounded.

The event loop serves them itself, since what is read belongs to it. A pass over the values takes milliseconds with many
IKE_SAs, so there is one in TEXT_SECONDS at most, and all clients get its text meanwhile. Connections are taken one in
BETWEEN_SECONDS, CONNECTIONS at a time, and each is closed after CONNECTION_SECONDS, whatever its client does.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from bridge.service.tasks import end, spawn

TEXT_SECONDS: Final = 1.0
"""for which the values that were read are good"""
BETWEEN_SECONDS: Final = 0.02
"""between two connections that are taken"""
CONNECTIONS: Final = 8
"""that are served at a time; more of them wait in the kernel"""
CONNECTION_SECONDS: Final = 1.0
"""that one may last"""
BACKLOG: Final = 16
HEAD_OCTETS: Final = 8_192
"""of a request, at most"""
_END: Final = b"\r\n\r\n"


class MetricsServer:
    """Serves `registry` at `host` and `port` from `start` until `close`. Raises OSError where the port is taken."""

    def __init__(
        self, registry: CollectorRegistry, host: str, port: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry = registry
        self._clock = clock
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=BACKLOG)
        self._socket.setblocking(False)
        self._places = asyncio.Semaphore(CONNECTIONS)
        self._served: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._text = b""
        self._read_at = float("-inf")

    def start(self) -> None:
        """Begin."""
        self._task = spawn("metrics", self._accept())

    async def close(self) -> None:
        """End, and close all connections."""
        if self._task is not None:
            await end(self._task, *self._served)
        self._socket.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._places.acquire()
            try:
                connection, _ = await loop.sock_accept(self._socket)
            except OSError:
                # it has gone already, or this process has no file descriptor left
                self._places.release()
            else:
                task = spawn("metrics-connection", self._serve(connection))
                self._served.add(task)
                task.add_done_callback(self._over)
            await asyncio.sleep(BETWEEN_SECONDS)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._served.discard(task)
        self._places.release()

    async def _serve(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with connection:
            try:
                async with asyncio.timeout(CONNECTION_SECONDS):
                    head = b""
                    while _END not in head:
                        octets = await loop.sock_recv(connection, HEAD_OCTETS)
                        head += octets
                        if not octets or len(head) > HEAD_OCTETS:
                            return
                    await loop.sock_sendall(connection, self._answer(head))
            except (OSError, TimeoutError):
                # a client that has gone, or is slow
                return

    def _answer(self, head: bytes) -> bytes:
        if not head.startswith(b"GET "):
            return b"HTTP/1.1 405 Method Not Allowed\r\nAllow: GET\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        if self._clock() - self._read_at >= TEXT_SECONDS:
            self._text = generate_latest(self._registry)
            self._read_at = self._clock()
        return (
            f"HTTP/1.1 200 OK\r\nContent-Type: {CONTENT_TYPE_PLAIN_0_0_4}\r\n"
            f"Content-Length: {len(self._text)}\r\nConnection: close\r\n\r\n"
        ).encode() + self._text
