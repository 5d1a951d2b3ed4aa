"""What a gateway concludes from the heartbeats of the others in a real Redis (bridge.gateway.failover)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import structlog

from bank_support import GATEWAY, RedisServer
from bridge.bank import gateway_facts
from bridge.charon.charon import Charon
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.postings import Postings
from bridge.service.tasks import end, spawn
from test_ends_in_banks import Gateway, running, server, until

__all__ = ["server"]

pytestmark = pytest.mark.redis

OTHER = "192.0.2.7"
TTL = 0.4
CALM = 2 * TTL
"""how long the bank has to have worked (bridge.gateway.peer_watch)"""


async def look(gateway: Gateway, written: bool = True) -> None:
    """What the heartbeat does each time (bridge.gateway.heartbeat)."""
    signs = await gateway.bank.gateways()
    alive = [name for name, sign in signs.items() if sign.alive]
    await gateway.failover.own_heartbeat(written, 0.0, alive if written else None)


async def looks(gateway: Gateway, seconds: float, *, written: bool = True) -> None:
    """The same for so long."""
    for _ in range(int(seconds / (TTL / 4))):
        await look(gateway, written)
        await asyncio.sleep(TTL / 4)


@asynccontextmanager
async def beating(gateway: Gateway, address: str) -> AsyncIterator[None]:
    """Another gateway that lives, for the time of the body."""

    async def beat() -> None:
        while True:
            await gateway.bank.heartbeat(address, TTL)
            await asyncio.sleep(TTL / 4)

    task = asyncio.get_running_loop().create_task(beat())
    try:
        yield
    finally:
        await end(task)


def failures(events: list[structlog.typing.EventDict]) -> list[str]:
    return [event["gateway"] for event in events if event["event"] == "gateway-failed"]


@pytest.fixture
def gateway(server: RedisServer) -> Gateway:
    return Gateway(server, detect=TTL)


@pytest.mark.parametrize("keyspace", ["Kg$hzxe", ""])
async def test_a_gateway_without_a_heartbeat_has_failed_whether_its_end_was_received_or_not(
    server: RedisServer, gateway: Gateway, keyspace: str
) -> None:
    server.client.config_set("notify-keyspace-events", keyspace)
    with structlog.testing.capture_logs() as events:
        async with running(gateway):
            async with beating(gateway, OTHER):
                await looks(gateway, CALM + TTL)
                assert failures(events) == []
            await looks(gateway, 4 * TTL)
            assert failures(events) == [OTHER]
            assert OTHER in gateway.prefetch.progress


async def test_a_bank_that_was_emptied_makes_no_gateway_fail(server: RedisServer, gateway: Gateway) -> None:
    with structlog.testing.capture_logs() as events:
        async with running(gateway):
            async with beating(gateway, OTHER):
                await looks(gateway, CALM + TTL)
                server.client.flushall()
                await looks(gateway, 3 * TTL)
            assert failures(events) == []


async def test_a_gateway_that_is_back_does_not_fail_by_what_was_read_before(gateway: Gateway) -> None:
    with structlog.testing.capture_logs() as events:
        async with running(gateway):
            async with beating(gateway, OTHER):
                await looks(gateway, CALM + TTL)
            await looks(gateway, 4 * TTL)
            assert failures(events) == [OTHER]
            await gateway.bank.heartbeat(OTHER, 60.0)
            await until(lambda: not gateway.failover.has_failed(OTHER))
            # heartbeats are read beside others' events
            await gateway.failover.own_heartbeat(True, 0.0, [])
            assert failures(events) == [OTHER]


async def test_while_the_bank_takes_no_heartbeats_no_gateway_fails(server: RedisServer, gateway: Gateway) -> None:
    with structlog.testing.capture_logs() as events:
        async with running(gateway):
            async with beating(gateway, OTHER):
                await looks(gateway, CALM + TTL)
                await gateway.failover.own_heartbeat(False, 0.0, None)
            await looks(gateway, 5 * TTL, written=False)
            assert not server.client.exists(f"ike:gateway:{OTHER}")
            assert failures(events) == []
            # once it has worked for a while, what is still missing has failed
            await looks(gateway, CALM + 4 * TTL)
            assert failures(events) == [OTHER]


async def test_facts_are_posted_when_the_connections_change(server: RedisServer, gateway: Gateway) -> None:
    """A sidecar that starts before swanctl has loaded its connections was no target of a drain for 20 s."""

    async def pools() -> list[object]:
        return []

    gateway.charon.vici.pools = pools  # type: ignore[attr-defined]
    connections: dict[str, Any] = {}
    gateway.charon.tracker.connections = connections

    def posted() -> dict[str, list[str]]:
        facts = gateway_facts.decode(server.client.get(f"ike:facts:{GATEWAY}") or b"")
        return {"none": []} if facts is None else facts.connections

    charon = cast(Charon, gateway.charon)
    postings = Postings(GATEWAY, gateway.bank, charon, gateway.publisher, gateway.failover, GatewayMetrics())
    async with running(gateway):
        task = spawn("facts", postings.keep_facts())
        await until(lambda: posted() == {})
        connections["home"] = SimpleNamespace(children=[SimpleNamespace(name="net")])
        await until(lambda: posted() == {"home": ["net"]})
        await end(task)
