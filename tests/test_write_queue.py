"""Stub changes on their way to a real Redis, which comes and goes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import structlog

from bank_support import PATIENCE, RedisServer, keyring, revised, stub_of
from bridge.bank.interface import Ending
from bridge.bank.redis_bank import RedisBank
from bridge.bank.write_queue import WriteQueue
from bridge.stub.stub import Index, Stub

pytestmark = pytest.mark.redis


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


class WatchedBank(RedisBank):
    """A bank that notes what it is asked to write."""

    bundles: list[list[Index]]

    async def change(self, stubs: Sequence[Stub], endings: Sequence[Ending]) -> tuple[list[bool], list[bool]]:
        self.bundles += [[change.index for change in changes] for changes in (stubs, endings) if changes]
        return await super().change(stubs, endings)


@pytest.fixture
async def bank(server: RedisServer) -> AsyncIterator[WatchedBank]:
    bank = WatchedBank(server.url, keyring(), get_timeout=5.0)
    bank.bundles = []
    yield bank
    await bank.close()


async def written(writer: WriteQueue) -> None:
    """Wait until the bank has it all."""
    async with asyncio.timeout(PATIENCE):
        await writer.flush()


async def failed(writer: WriteQueue) -> None:
    """Wait until an attempt to write did not get through."""
    async with asyncio.timeout(PATIENCE):
        while not writer.counters.failures:  # noqa: ASYNC110 - there is no event of it
            await asyncio.sleep(0.01)


async def test_what_is_submitted_is_soon_in_the_bank(bank: WatchedBank) -> None:
    writer = WriteQueue(bank)
    stub = stub_of()
    writer.submit(stub)
    assert writer.pending == 1
    await written(writer)
    assert writer.pending == 0
    assert await bank.get([stub.index]) == [stub]
    await writer.close()


async def test_changes_of_many_stubs_travel_together(bank: WatchedBank) -> None:
    writer = WriteQueue(bank)
    for _ in range(300):
        writer.submit(stub_of())
    await written(writer)
    assert [len(bundle) for bundle in bank.bundles] == [300]
    await writer.close()


async def test_a_bank_that_takes_nothing_is_tried_with_few_changes(bank: WatchedBank, server: RedisServer) -> None:
    """Each attempt seals what it writes again."""
    server.client.config_set("maxmemory", 1)
    writer = WriteQueue(bank)
    for _ in range(300):
        writer.submit(stub_of())
    async with asyncio.timeout(PATIENCE):
        while len(bank.bundles) < 5:  # noqa: ASYNC110 - there is no event of it
            await asyncio.sleep(0.01)
    assert [len(bundle) for bundle in bank.bundles[:5]] == [300, 16, 16, 16, 16]
    server.client.config_set("maxmemory", 0)
    await written(writer)
    assert max(len(bundle) for bundle in bank.bundles[5:]) > 200
    await writer.close()


async def test_a_full_bank_still_takes_the_deletions_that_wait_with_the_stubs(
    bank: WatchedBank, server: RedisServer
) -> None:
    over, new = stub_of(), stub_of()
    await bank.store([over])
    server.client.config_set("maxmemory", 1)
    writer = WriteQueue(bank)
    writer.submit(new)
    writer.submit_delete(over.index, expires=over.expires)
    async with asyncio.timeout(PATIENCE):
        while writer.counters.deleted < 1:  # noqa: ASYNC110 - there is no event of it
            await asyncio.sleep(0.01)
    assert writer.pending == 1
    server.client.config_set("maxmemory", 0)
    await written(writer)
    assert await bank.get([over.index, new.index]) == [None, new]
    await writer.close()


async def test_no_bundle_is_larger_than_the_largest(bank: WatchedBank) -> None:
    writer = WriteQueue(bank, bundle=100)
    for _ in range(250):
        writer.submit(stub_of())
    await written(writer)
    assert [len(bundle) for bundle in bank.bundles] == [100, 100, 50]
    await writer.close()


async def test_of_several_changes_of_one_stub_only_the_latest_travels(bank: WatchedBank) -> None:
    writer = WriteQueue(bank)
    stub = stub_of()
    for revision in range(1, 6):
        writer.submit(revised(stub, revision))
    await written(writer)
    assert bank.bundles == [[stub.index]]
    assert await bank.get([stub.index]) == [revised(stub, 5)]
    await writer.close()


async def test_a_deletion_takes_the_place_of_the_store_before_it(bank: WatchedBank) -> None:
    writer = WriteQueue(bank)
    stub = stub_of()
    await bank.store([stub])
    writer.submit(revised(stub, 2))
    writer.submit_delete(stub.index, expires=stub.expires)
    await written(writer)
    assert await bank.get([stub.index]) == [None]
    assert writer.counters.deleted == 1
    await writer.close()


async def test_a_store_takes_the_place_of_the_deletion_before_it(bank: WatchedBank) -> None:
    writer = WriteQueue(bank)
    stub = stub_of()
    writer.submit_delete(stub.index, expires=stub.expires)
    writer.submit(revised(stub, 2))
    await written(writer)
    assert await bank.get([stub.index]) == [revised(stub, 2)]
    await writer.close()


async def test_the_stub_of_a_rekeyed_sa_goes_only_when_the_new_one_is_there(bank: WatchedBank) -> None:
    writer = WriteQueue(bank, bundle=1)
    old, new = stub_of(), stub_of()
    writer.submit(old)
    writer.submit(new)
    writer.submit_delete(old.index, expires=old.expires)
    await written(writer)
    assert bank.bundles == [[new.index], [old.index]]
    await writer.close()


async def test_a_newer_revision_in_the_bank_stays_and_is_counted(bank: WatchedBank) -> None:
    writer = WriteQueue(bank)
    stub = stub_of(revision=9)
    await bank.store([stub])
    writer.submit(revised(stub, 8))
    await written(writer)
    assert writer.counters.refused == 1
    assert await bank.get([stub.index]) == [stub]
    await writer.close()


async def test_a_stub_that_cannot_be_encoded_holds_up_no_other(bank: WatchedBank) -> None:
    writer = WriteQueue(bank)
    good, bad = stub_of(), msgspec.structs.replace(stub_of(), remote_vips=("no address",))
    writer.submit(bad)
    writer.submit(good)
    with structlog.testing.capture_logs() as events:
        await written(writer)
    assert await bank.get([good.index, bad.index]) == [good, None]
    assert writer.counters.dropped == 1
    assert [event["index"] for event in events] == [str(bad.index)]
    await writer.close()


# a Redis that comes and goes


async def test_changes_wait_for_redis_and_are_written_when_it_is_back(bank: WatchedBank, server: RedisServer) -> None:
    writer = WriteQueue(bank)
    server.stop()
    stubs = [stub_of() for _ in range(700)]
    for stub in stubs:
        writer.submit(stub)
    await failed(writer)
    assert writer.pending == 700
    server.start()
    await written(writer)
    assert await bank.get([stub.index for stub in stubs]) == stubs
    await writer.close()


async def test_while_redis_is_away_one_stub_takes_one_place(bank: WatchedBank, server: RedisServer) -> None:
    writer = WriteQueue(bank)
    stub = stub_of()
    server.stop()
    writer.submit(stub)
    await failed(writer)
    for revision in range(2, 50):
        writer.submit(revised(stub, revision))
    assert writer.pending == 1
    server.start()
    await written(writer)
    assert await bank.get([stub.index]) == [revised(stub, 49)]
    await writer.close()


async def test_an_outage_is_logged_once_and_so_is_its_end(bank: WatchedBank, server: RedisServer) -> None:
    writer = WriteQueue(bank)
    server.stop()
    with structlog.testing.capture_logs() as events:
        writer.submit(stub_of())
        async with asyncio.timeout(PATIENCE):
            while writer.counters.failures < 3:  # noqa: ASYNC110 - there is no event of it
                await asyncio.sleep(0.01)
        server.start()
        await written(writer)
    assert [event["event"] for event in events] == ["bank-writes-wait", "bank-writes-resume"]
    await writer.close()


async def test_nothing_submitted_is_lost_when_redis_is_killed_in_mid_writing(
    bank: WatchedBank, server: RedisServer
) -> None:
    writer = WriteQueue(bank, bundle=32)
    stubs: list[Stub] = []
    for round_ in range(3):
        half_way = len(stubs) + 500
        for _ in range(1000):
            stubs.append(stub_of())
            writer.submit(stubs[-1])
        async with asyncio.timeout(PATIENCE):
            while writer.counters.stored < half_way:  # noqa: ASYNC110 - there is no event of it
                await asyncio.sleep(0)
        assert writer.pending, f"round {round_}: everything was written before the kill"
        server.kill()
        server.start()
    await written(writer)
    assert await bank.get([stub.index for stub in stubs]) == stubs
    assert writer.counters.dropped == 0
    await writer.close()


async def test_past_the_limit_the_stub_that_expires_first_is_dropped(bank: WatchedBank, server: RedisServer) -> None:
    writer = WriteQueue(bank, limit=10)
    server.stop()
    soon = [stub_of(lifetime=100 + n) for n in range(5)]
    late = [stub_of(lifetime=5000 + n) for n in range(9)]
    over = stub_of()
    writer.submit_delete(over.index, expires=over.expires)
    for stub in (*late[:4], *soon, *late[4:]):
        writer.submit(stub)
    assert writer.pending == 10
    assert writer.counters.dropped == 5
    server.start()
    await written(writer)
    assert await bank.get([stub.index for stub in soon]) == [None] * 5
    assert await bank.get([stub.index for stub in late]) == late
    assert [over.index] in bank.bundles
    await writer.close()


async def test_the_limit_holds_while_a_bundle_comes_back(bank: WatchedBank, server: RedisServer) -> None:
    writer = WriteQueue(bank, limit=10)
    server.freeze()
    early = [stub_of(lifetime=100) for _ in range(10)]
    for stub in early:
        writer.submit(stub)
    await asyncio.sleep(0.05)
    late = [stub_of(lifetime=5000) for _ in range(10)]
    for stub in late:
        writer.submit(stub)
    server.kill()
    await failed(writer)
    assert writer.pending == 10
    server.start()
    await written(writer)
    assert await bank.get([stub.index for stub in late]) == late
    await writer.close()


async def test_updates_of_few_stubs_for_a_long_outage_take_little_memory(
    bank: WatchedBank, server: RedisServer
) -> None:
    writer = WriteQueue(bank, bundle=8)
    server.stop()
    stub = stub_of()
    for revision in range(5000):
        writer.submit(revised(stub, revision))
    assert len(writer._by_expiry) < 20
    server.start()
    await written(writer)
    await writer.close()


async def test_close_writes_what_waits(bank: WatchedBank) -> None:
    writer = WriteQueue(bank)
    stub = stub_of()
    writer.submit(stub)
    await writer.close()
    assert await bank.get([stub.index]) == [stub]


async def test_close_without_redis_ends_in_time_and_says_what_is_lost(bank: WatchedBank, server: RedisServer) -> None:
    writer = WriteQueue(bank)
    server.kill()
    for _ in range(7):
        writer.submit(stub_of(os.urandom(8)))
    with structlog.testing.capture_logs() as events:
        async with asyncio.timeout(PATIENCE):
            await writer.close(patience=0.2)
    assert [event["count"] for event in events if event["event"] == "stub-changes-lost"] == [7]
    assert writer.counters.dropped == 7


async def test_a_writer_that_was_never_used_closes(bank: WatchedBank) -> None:
    writer = WriteQueue(bank)
    await writer.flush()
    await writer.close()
