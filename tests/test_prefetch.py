"""Stubs of failed gateways, fetched ahead (bridge.bank.prefetch), out of a real Redis."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from bank_support import GATEWAY, PATIENCE, RedisServer, ending, stub_of
from bridge.bank.interface import BankUnavailable
from bridge.bank.keyspace import Event, Keyspace
from bridge.bank.prefetch import Prefetch
from bridge.bank.redis_bank import RedisBank
from bridge.stub.keyring import Keyring

pytestmark = pytest.mark.redis


async def fetched(cache: Prefetch) -> str:
    """Fetch the gateway's stubs; the state in the end."""
    cache.fetch(GATEWAY)
    async with asyncio.timeout(PATIENCE):
        while cache.progress[GATEWAY].state == "running":  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.01)
    return cache.progress[GATEWAY].state


async def test_what_was_fetched_is_found_without_the_bank(bank: RedisBank, server: RedisServer) -> None:
    stubs = [stub_of() for _ in range(300)]
    await bank.store(stubs)
    cache = Prefetch(bank)
    assert await fetched(cache) == "done"
    assert cache.progress[GATEWAY].stubs == 300
    server.kill()
    assert await cache.get([stub.index for stub in stubs]) == stubs
    assert cache.hits == 300
    with pytest.raises(BankUnavailable):
        await cache.get([stub_of().index])


async def test_a_bank_that_hangs_is_waited_for_half_the_time_of_a_look_up(bank: RedisBank, server: RedisServer) -> None:
    stub = stub_of()
    await bank.store([stub])
    cache = Prefetch(bank, patience=0.2)
    await fetched(cache)
    server.freeze()
    began = time.monotonic()
    assert await cache.get([stub.index]) == [stub]
    assert 0.2 <= time.monotonic() - began < 1.0
    server.thaw()


async def test_a_bank_that_answers_is_believed_before_memory(bank: RedisBank) -> None:
    """Whatever the keyspace told, or did not."""
    stub, other = stub_of(), stub_of()
    await bank.store([stub, other])
    cache = Prefetch(bank)
    await fetched(cache)
    await bank.delete([ending(stub)])
    assert await cache.get([stub.index, other.index]) == [None, other]
    assert cache.hits == 0


async def test_while_no_keyspace_events_arrive_nothing_is_answered_from_memory(
    bank: RedisBank, server: RedisServer
) -> None:
    stub = stub_of()
    await bank.store([stub])
    cache = Prefetch(bank)
    await fetched(cache)
    cache.on_state(False)
    assert cache.size == 0
    server.kill()
    with pytest.raises(BankUnavailable):
        await cache.get([stub.index])


async def test_a_stub_that_changes_in_the_bank_is_let_go(bank: RedisBank, server: RedisServer) -> None:
    stub, other = stub_of(), stub_of()
    await bank.store([stub, other])
    cache = Prefetch(bank)
    hears, gone = asyncio.Event(), asyncio.Event()

    def heard(event: Event) -> None:
        cache.on_event(event)
        gone.set()

    keyspace = Keyspace(server.url, ("ike:none",), heard, lambda state: hears.set() if state else None)
    cache.attach(keyspace)
    keyspace.start()
    async with asyncio.timeout(PATIENCE):
        await hears.wait()
        await fetched(cache)
        await bank.delete([ending(stub)])
        await gone.wait()
    await keyspace.close()
    assert cache.size == 1
    server.kill()
    assert await cache.get([stub.index, other.index]) == [None, other]


async def test_a_fetched_stub_that_expired_is_not_served_from_memory(
    bank: RedisBank, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = stub_of()
    await bank.store([stub])
    cache = Prefetch(bank)
    await fetched(cache)
    server.kill()
    monkeypatch.setattr(time, "time", lambda: stub.expires + 1)
    with pytest.raises(BankUnavailable):
        await cache.get([stub.index])
    assert (cache.hits, cache.size) == (0, 1)


async def test_no_more_is_kept_than_there_is_room_for(bank: RedisBank) -> None:
    await bank.store([stub_of() for _ in range(2000)])
    cache = Prefetch(bank, limit=500)
    assert await fetched(cache) == "full"
    # what came with the last bundle is kept
    assert 500 < cache.size <= 500 + 256


async def test_a_download_that_breaks_off_says_so(bank: RedisBank, server: RedisServer) -> None:
    server.kill()
    assert await fetched(Prefetch(bank)) == "failed"


async def test_a_gateway_that_is_back_is_asked_again_for_everything(bank: RedisBank) -> None:
    await bank.store([stub_of() for _ in range(10)])
    cache = Prefetch(bank)
    await fetched(cache)
    cache.drop(GATEWAY)
    assert cache.size == 0


async def test_with_a_bank_at_hand_stubs_are_fetched_into_it(bank: RedisBank, ring: Keyring, tmp_path: Path) -> None:
    stubs = [stub_of() for _ in range(10)]
    await bank.store(stubs)
    with RedisServer(tmp_path / "near") as near:
        own = RedisBank(near.url, ring, get_timeout=5.0)
        cache = Prefetch(bank, near=own)
        assert await fetched(cache) == "done"
        assert cache.size == 0
        assert await own.get([stub.index for stub in stubs]) == stubs
        await own.close()
