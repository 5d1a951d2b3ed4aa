"""Values and members in the bank that are larger than any gateway writes: no reader takes them in, which would cost all
of its memory, and all the time that a call has."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable

import pytest

from bank_support import GATEWAY, RedisServer, downloaded, ending, listed, stub_of
from bridge.bank.redis_bank import RedisBank
from bridge.stub import bank_keys
from bridge.stub.keyring import Keyring
from bridge.stub.stub import Stub

pytestmark = pytest.mark.redis

LARGE = b"9" * (8 << 20)
PHANTOM = "192.0.2.9"
Spoil = Callable[[RedisServer, Stub], None]

PLACES: dict[str, Spoil] = {
    "heartbeat": lambda server, _: server.client.set(bank_keys.heartbeat_key(PHANTOM), LARGE),
    "posted": lambda server, _: server.client.set(bank_keys.posted_key(bank_keys.FACTS_KIND, GATEWAY), LARGE),
    "stub": lambda server, victim: server.client.hset(victim.index.key, "sealed", LARGE),
    "readable revision": lambda server, victim: server.client.hset(victim.index.key, "revision", LARGE),
    "mark of a move": lambda server, victim: server.client.set(victim.index.moved, LARGE),
    "bucket": lambda server, victim: server.client.zadd(victim.index.bucket, {LARGE: 4e9}),
    "ended sessions": lambda server, victim: server.client.zadd(victim.index.gone, {LARGE: 4e9}),
    "gateways": lambda server, _: server.client.zadd(bank_keys.GATEWAYS, {LARGE: time.time() + 60}),
    "lock-outs": lambda server, _: server.client.zadd(bank_keys.REVOKED, {LARGE: 4e9}),
    "stamp of lock-outs": lambda server, _: server.client.set(bank_keys.REVOKED_STAMP, LARGE),
}


@pytest.fixture
async def bank(server: RedisServer, ring: Keyring) -> AsyncIterator[RedisBank]:
    made = RedisBank(server.url, ring, get_timeout=10.0, timeout=10.0)
    yield made
    await made.close()


async def all_reads(bank: RedisBank, victim: Stub, other: Stub) -> None:
    """What gateways read; of the other stub and the living gateway all of it is found."""
    assert (await bank.gateways())[GATEWAY].alive
    await bank.posted(bank_keys.FACTS_KIND, GATEWAY)
    assert (await bank.get([victim.index, other.index]))[1] == other
    assert (await bank.revisions([victim.index, other.index]))[1] == other.revision
    assert other in await downloaded(bank)
    assert other.index in [row.index for row in await listed(bank)]
    assert await bank.moved([victim.index, other.index])
    await bank.revocation_stamp()
    await bank.revocations()
    await bank.delete([ending(victim)])
    assert victim.index in [each.index async for page in bank.endings() for each in page]


@pytest.mark.parametrize("place", PLACES)
async def test_what_is_larger_than_a_gateway_writes_is_not_taken_in(
    bank: RedisBank, server: RedisServer, place: str
) -> None:
    victim, other = stub_of(b"\xab" + os.urandom(7), revision=10), stub_of(b"\xcd" + os.urandom(7), revision=10)
    await bank.heartbeat(GATEWAY, 30)
    server.client.zadd(bank_keys.GATEWAYS, {PHANTOM: time.time()})
    await bank.store([victim, other])
    PLACES[place](server, victim)
    before = server.client.info("stats")["total_net_output_bytes"]
    await all_reads(bank, victim, other)
    assert server.client.info("stats")["total_net_output_bytes"] - before < len(LARGE)


async def test_a_stub_with_a_field_of_any_size_is_stored_again(bank: RedisBank, server: RedisServer) -> None:
    victim = stub_of(b"\xab" + os.urandom(7), revision=10)
    await bank.store([victim])
    server.client.hset(victim.index.key, "sealed", LARGE)
    assert await bank.get([victim.index]) == [None]
    assert await bank.store([victim]) == [True]
    assert await bank.get([victim.index]) == [victim]
    assert bank.spoilt
