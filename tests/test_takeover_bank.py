"""Who owns a session of gateways that share an address: a compare-and-set in the bank."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
from msgspec.structs import replace

from bank_support import RedisServer, stub_of
from bridge.bank.interface import Ending, Taking
from bridge.bank.redis_bank import RedisBank
from bridge.gateway.endings import Endings
from bridge.gateway.takeover_session import owned
from bridge.stub.derivation import Derivation
from bridge.stub.keyring import Keyring
from bridge.stub.stub import Index, Stub
from test_bank_servers import cluster_url, three_nodes

pytestmark = pytest.mark.redis

SHARED, FIRST, SECOND, THIRD = "192.0.2.100", "192.0.2.1", "192.0.2.2", "192.0.2.3"
NOW = 1_700_000_000.0


class Banks(NamedTuple):
    """The bank as two gateways see it, and what each has heard that another one took."""

    first: RedisBank
    second: RedisBank
    lost: dict[str, list[Index]]


@pytest.fixture
async def banks(server: RedisServer, ring: Keyring) -> AsyncIterator[Banks]:
    async for made in two_gateways(server.url, ring):
        yield made


@pytest.fixture
async def cluster_banks(tmp_path: Path, program: list[str], ring: Keyring) -> AsyncIterator[Banks]:
    """In a Cluster of three nodes."""
    with three_nodes(tmp_path, program) as nodes:
        async for made in two_gateways(cluster_url(list(nodes)), ring):
            yield made


async def two_gateways(url: str, ring: Keyring) -> AsyncIterator[Banks]:
    first, second = RedisBank(url, ring, get_timeout=5.0), RedisBank(url, ring, get_timeout=5.0)
    lost: dict[str, list[Index]] = {FIRST: [], SECOND: []}
    first.on_taken, second.on_taken = lost[FIRST].append, lost[SECOND].append
    yield Banks(first, second, lost)
    await first.close()
    await second.close()


def session(owner: str = FIRST, *, revision: int = 1) -> Stub:
    derivation = Derivation(b"i" * 32, b"r" * 32, b"s" * 32, b"", b"", 0, 4, 7, owner)
    return replace(stub_of(gateway=SHARED, revision=revision), derivation=derivation)


async def stored(banks: Banks) -> Stub:
    stub = session()
    assert await banks.first.store([stub]) == [True]
    return stub


async def test_a_gateway_that_takes_a_session_over_owns_it(banks: Banks) -> None:
    stub = await stored(banks)
    mine = owned(stub, SECOND, now=NOW)
    assert await banks.second.take([(stub, mine)]) == [Taking.TAKEN]
    assert await banks.first.get([stub.index]) == [mine]
    [[row]] = [page async for page in banks.first.list(SHARED)]
    assert (row.owner, row.epoch) == (SECOND, 2)


async def test_of_two_gateways_that_take_it_at_the_same_time_one_succeeds(banks: Banks) -> None:
    stub = await stored(banks)
    said = await asyncio.gather(
        banks.first.take([(stub, owned(stub, SECOND, now=NOW))]),
        banks.second.take([(stub, owned(stub, THIRD, now=NOW))]),
    )
    assert sorted(one for [one] in said) == [Taking.CHANGED, Taking.TAKEN]


async def test_what_the_older_owner_writes_is_refused_and_it_hears_of_it(banks: Banks) -> None:
    stub = await stored(banks)
    mine = owned(stub, SECOND, now=NOW)
    await banks.second.take([(stub, mine)])
    assert await banks.first.store([replace(stub, revision=2**50)]) == [False]
    assert await banks.first.get([stub.index]) == [mine]
    assert banks.lost == {FIRST: [stub.index], SECOND: []}
    # the new owner goes on
    assert await banks.second.store([replace(mine, revision=mine.revision + 1)]) == [True]


async def test_the_older_owner_cannot_end_it(banks: Banks) -> None:
    stub = await stored(banks)
    mine = owned(stub, SECOND, now=NOW)
    await banks.second.take([(stub, mine)])
    assert await banks.first.delete([Ending(stub.index, stub.expires, 1)]) == [False]
    assert await banks.first.get([stub.index]) == [mine]
    assert banks.lost[FIRST] == [stub.index]
    assert await banks.second.delete([Ending(stub.index, stub.expires, 2)]) == [True]
    assert await banks.first.get([stub.index]) == [None]


async def test_a_session_that_ended_cannot_be_taken(banks: Banks) -> None:
    stub = await stored(banks)
    await banks.first.delete([Ending(stub.index, stub.expires, 1)])
    assert await banks.second.take([(stub, owned(stub, SECOND, now=NOW))]) == [Taking.CHANGED]
    assert await banks.second.get([stub.index]) == [None]


async def test_what_changed_since_it_was_read_cannot_be_taken(banks: Banks) -> None:
    stub = await stored(banks)
    await banks.first.store([replace(stub, revision=2)])
    assert await banks.second.take([(stub, owned(stub, SECOND, now=NOW))]) == [Taking.CHANGED]


async def test_a_forged_epoch_takes_no_session_from_its_owner(banks: Banks, server: RedisServer) -> None:
    """Anyone with write access to the bank can change the readable fields; the sealed part alone counts."""
    stub = await stored(banks)
    with server.client as client:
        client.hset(stub.index.key, "epoch", "99")
    newer = replace(stub, revision=5)
    assert await banks.first.store([newer]) == [True]
    assert await banks.first.get([stub.index]) == [newer]
    with server.client as client:
        client.hset(stub.index.key, "epoch", "99")
    assert await banks.first.delete([Ending(stub.index, stub.expires, 1)]) == [True]
    assert banks.lost[FIRST] == []


async def test_many_sessions_are_taken_in_one_go(banks: Banks) -> None:
    stubs = [session() for _ in range(1000)]
    assert all(await banks.first.store(stubs))
    pairs = [(stub, owned(stub, SECOND, now=NOW)) for stub in stubs]
    assert set(await banks.second.take(pairs)) == {Taking.TAKEN}


async def test_an_end_that_a_gateway_remembers_deletes_no_session_that_was_taken_over_since(banks: Banks) -> None:
    """What a gateway repeats to a bank that was away, also after a restart (bridge.gateway.bank_reconciler)."""
    stub = await stored(banks)
    endings = Endings(wall=lambda: NOW)
    assert stub.derivation is not None
    endings.add(stub.index, stub.expires, stub.derivation.epoch)
    mine = owned(stub, SECOND, now=NOW)
    await banks.second.take([(stub, mine)])
    assert await banks.first.delete(list(endings.all())) == [False]
    assert await banks.first.get([stub.index]) == [mine]


async def test_in_a_cluster_each_session_has_one_owner_too(cluster_banks: Banks) -> None:
    first, second, lost = cluster_banks
    stubs = [session() for _ in range(200)]
    assert all(await first.store(stubs))
    pairs = [(stub, owned(stub, SECOND, now=NOW)) for stub in stubs]
    assert set(await second.take(pairs)) == {Taking.TAKEN}
    assert set(await first.take(pairs)) == {Taking.CHANGED}
    assert await first.store([replace(stub, revision=2**50) for stub in stubs]) == [False] * 200
    assert await first.delete([Ending(stub.index, stub.expires, 1) for stub in stubs]) == [False] * 200
    assert set(lost[FIRST]) == {stub.index for stub in stubs}
    found = [stub async for page in second.download(SHARED) for stub in page]
    assert {stub.derivation.owner for stub in found if stub.derivation} == {SECOND}
