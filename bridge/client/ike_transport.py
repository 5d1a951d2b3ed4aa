"""Requests of this client's own over charon's ports, and the answers to them, which charon receives too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import structlog

from bridge.net.interface import Sender
from bridge.net.packet import Datagram, has_marker
from bridge.stub.types import Endpoint

log = structlog.get_logger()

BACK_OFF: Final = 1.8
"""each retransmission waits this much longer than the one before, as charon's do"""
QUEUED: Final = 64
"""answers to one request that may wait; more is a flood"""


class IkeTransport:
    """Sends requests, and passes each answer to the attempt with its SPIi. Datagrams arrive through `datagram`."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._waiting: dict[bytes, asyncio.Queue[Datagram]] = {}

    def datagram(self, datagram: Datagram) -> None:
        """An answer to IKE_SA_INIT or INFORMATIONAL that reached this host."""
        queue = self._waiting.get(datagram.ike[:8])
        if queue is not None and queue.qsize() < QUEUED:
            queue.put_nowait(datagram)

    @contextmanager
    def answers(self, spi_i: bytes) -> Iterator[asyncio.Queue[Datagram]]:
        """The answers to requests with `spi_i` that arrive within the block."""
        queue = self._waiting[spi_i] = asyncio.Queue()
        try:
            yield queue
        finally:
            del self._waiting[spi_i]

    def send(self, local: Endpoint, remote: Endpoint, request: bytes) -> None:
        """Send one IKE message, with a non-ESP marker where these ports need it."""
        marker = has_marker(local.port, remote.port)
        try:
            self._sender.send(local.address, local.port, remote.address, remote.port, request, marker)
        except OSError as error:
            # no route now: the next retransmission may have one
            spi_i = request[:8].hex()
            log.info("request-not-sent", gateway=remote.address, reason=error.strerror, spi_i=spi_i)

    async def exchange(
        self,
        local: Endpoint,
        remote: Endpoint,
        request: bytes,
        answered_by: Callable[[bytes], bool],
        *,
        retransmit: float,
        timeout: float,
    ) -> bool:
        """Send `request` until an answer is one by `answered_by`; False after `timeout` s. `retransmit`: seconds until
        the first retransmission."""
        with self.answers(request[:8]) as answers:
            try:
                async with asyncio.timeout(timeout):
                    while True:
                        self.send(local, remote, request)
                        try:
                            async with asyncio.timeout(retransmit):
                                while not answered_by((await answers.get()).ike):
                                    pass
                                return True
                        except TimeoutError:
                            retransmit *= BACK_OFF
            except TimeoutError:
                return False
