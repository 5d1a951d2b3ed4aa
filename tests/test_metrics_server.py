"""A user of the host who asks for metrics without end does not stop the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from bridge.service.metrics_server import CONNECTION_SECONDS, CONNECTIONS, MetricsServer


class Served:
    """A server, and how often its values were read."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.now = 0.0
        self.reads = 0
        registry = CollectorRegistry()
        Gauge("value", "a value", registry=registry).set_function(self._read)
        self.server = MetricsServer(registry, "127.0.0.1", port, clock=lambda: self.now)

    def _read(self) -> float:
        self.reads += 1
        return float(self.reads)

    async def ask(self, request: bytes = b"GET /metrics HTTP/1.1\r\n\r\n") -> bytes:
        """The whole answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            return await reader.read()
        finally:
            writer.close()


@pytest.fixture
async def served(unused_tcp_port: int) -> AsyncIterator[Served]:
    served = Served(unused_tcp_port)
    served.server.start()
    try:
        yield served
    finally:
        await served.server.close()


async def test_all_who_ask_within_a_second_get_what_was_read_once(served: Served) -> None:
    answers = await asyncio.gather(*(served.ask() for _ in range(12)))
    assert len(set(answers)) == 1
    # read for each of them, the event loop would have stood still for 12 times as long
    assert served.reads == 1


async def test_after_a_second_the_values_are_read_again(served: Served) -> None:
    assert b"value 1.0" in await served.ask()
    served.now = 0.9
    assert b"value 1.0" in await served.ask()
    served.now = 1.0
    assert b"value 2.0" in await served.ask()


async def test_connections_that_say_nothing_are_closed_and_then_others_are_served(served: Served) -> None:
    silent = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(CONNECTIONS)]
    began = time.monotonic()
    assert b"value 1.0" in await served.ask()
    # it waited until one of them was closed
    assert time.monotonic() - began > CONNECTION_SECONDS / 2
    for reader, writer in silent:
        assert await reader.read() == b""
        writer.close()


async def test_a_request_that_has_no_end_is_not_read_to_its_end(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"GET /" + bytes(100_000))
    # closed with octets that were not read, which is a reset
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()


async def test_what_is_no_get_is_refused(served: Served) -> None:
    assert (await served.ask(b"POST / HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 405 ")
    assert served.reads == 0


async def test_the_port_is_free_after_the_end(unused_tcp_port: int) -> None:
    for _ in range(2):
        served = Served(unused_tcp_port)
        served.server.start()
        assert b"200 OK" in await served.ask()
        await served.server.close()
