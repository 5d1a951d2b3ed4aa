"""Which stubs have which virtual IP (bridge.bank.address_index), in a real Redis."""

from __future__ import annotations

import msgspec
import pytest

from bank_support import RedisServer, ending, stub_of
from bridge.bank.interface import AddressEntry
from bridge.bank.redis_bank import RedisBank
from bridge.stub import bank_keys
from bridge.stub.stub import Stub

pytestmark = pytest.mark.redis


def stub_with(*vips: str, lifetime: int = 3600) -> Stub:
    return msgspec.structs.replace(stub_of(lifetime=lifetime), remote_vips=vips)


async def found(bank: RedisBank, first: str, last: str | None = None) -> set[AddressEntry]:
    return set(await bank.addresses([(first, last or first)]))


async def test_a_stub_is_found_by_each_of_its_addresses(bank: RedisBank) -> None:
    stub = stub_with("10.20.1.7", "fd20::1:7")
    await bank.store([stub])
    assert await found(bank, "10.20.1.7") == {AddressEntry("10.20.1.7", stub.index)}
    assert await found(bank, "fd20::1:7") == {AddressEntry("fd20::1:7", stub.index)}
    assert await found(bank, "10.20.1.8") == set()


async def test_a_pool_is_one_look_up_whatever_networks_it_spans(bank: RedisBank) -> None:
    inside = [stub_with("10.20.0.1"), stub_with("10.21.255.254")]
    outside = [stub_with("10.19.255.255"), stub_with("10.22.0.0")]
    await bank.store(inside + outside)
    assert {entry.of for entry in await found(bank, "10.20.0.0", "10.21.255.255")} == {stub.index for stub in inside}


async def test_two_stubs_with_one_address_are_both_found(bank: RedisBank) -> None:
    stubs = [stub_with("10.20.1.7"), stub_with("10.20.1.7")]
    await bank.store(stubs)
    assert {entry.of for entry in await found(bank, "10.20.1.7")} == {stub.index for stub in stubs}


async def test_an_entry_stays_until_a_reader_who_found_no_stub_takes_it_away(bank: RedisBank) -> None:
    stub = stub_with("10.20.1.7")
    await bank.store([stub])
    await bank.delete([ending(stub)])
    entries = await found(bank, "10.20.1.7")
    assert {entry.of for entry in entries} == {stub.index}
    await bank.forget_addresses(list(entries))
    assert await found(bank, "10.20.1.7") == set()


async def test_the_index_lives_as_long_as_the_longest_of_its_stubs(bank: RedisBank, server: RedisServer) -> None:
    key = bank_keys.addresses_key("10.20.1.7")
    long, short = stub_with("10.20.1.7", lifetime=7200), stub_with("10.20.1.8", lifetime=60)
    for stub in (long, short):
        await bank.store([stub])
        assert server.client.expiretime(key) == long.expires


async def test_what_no_gateway_wrote_is_no_entry(bank: RedisBank, server: RedisServer) -> None:
    stub = stub_with("10.20.1.7")
    await bank.store([stub])
    key = bank_keys.addresses_key("10.20.1.7")
    server.client.zadd(key, {b"\x07": 0, b"\x07 of nobody": 0, b"\x07" * 24: 0, b"\x07" + b"\xff" * 40: 0})
    assert {entry.of for entry in await found(bank, "10.20.1.7")} == {stub.index}


async def test_a_key_of_another_type_costs_neither_the_stub_nor_the_index(bank: RedisBank, server: RedisServer) -> None:
    server.client.set(bank_keys.addresses_key("10.20.1.7"), "spoilt")
    assert await found(bank, "10.20.1.7") == set()
    server.client.set(bank_keys.addresses_key("10.20.1.7"), "spoilt")
    stub = stub_with("10.20.1.7")
    assert await bank.store([stub]) == [True]
    assert {entry.of for entry in await found(bank, "10.20.1.7")} == {stub.index}


async def test_a_refused_stub_has_no_entry(bank: RedisBank) -> None:
    stub = stub_with("10.20.1.7")
    await bank.delete([ending(stub)])
    assert await bank.store([stub]) == [False]
    assert await found(bank, "10.20.1.7") == set()


@pytest.mark.parametrize("first", ["0.0.0.0", "::"])
def test_a_range_spans_a_bounded_number_of_keys(first: str) -> None:
    last = {"0.0.0.0": "255.255.255.255", "::": "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}[first]
    assert len(list(bank_keys.addresses_ranges(first, last))) == bank_keys.NETWORKS_MAX
