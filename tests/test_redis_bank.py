"""The stub bank in Redis, against real redis-servers."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import msgspec
import pytest
import structlog

from bank_support import GATEWAY, RedisServer, downloaded, ending, keyring, listed, revised, stub_of
from bridge.bank.interface import BankUnavailable, BankUnwritable, Ending, Move
from bridge.bank.redis_bank import RedisBank
from bridge.stub import bank_keys
from bridge.stub.codec import pack_index
from bridge.stub.keyring import Keyring
from bridge.stub.readable import readable_fields
from bridge.stub.stub import Index, Stub
from bridge.stub.types import Identity

pytestmark = pytest.mark.redis


# Initiate, Update, GET


async def test_a_stored_stub_comes_back_whole(bank: RedisBank) -> None:
    stub = stub_of()
    assert await bank.store([stub]) == [True]
    assert await bank.get([stub.index]) == [stub]


async def test_many_stubs_go_and_come_together_in_order(bank: RedisBank) -> None:
    stubs = [stub_of() for _ in range(1500)]
    assert all(await bank.store(stubs))
    missing = Index(GATEWAY, bytes(8))
    assert await bank.get([*(stub.index for stub in stubs), missing]) == [*stubs, None]


async def test_nothing_asked_gives_nothing(bank: RedisBank) -> None:
    assert await bank.store([]) == []
    assert await bank.get([]) == []
    assert await bank.delete([]) == []


async def test_a_newer_revision_is_never_overwritten(bank: RedisBank) -> None:
    newer = stub_of(revision=2**52)
    assert await bank.store([newer]) == [True]
    assert await bank.store([revised(newer, 2**52 - 1)]) == [False]
    assert await bank.get([newer.index]) == [newer]


async def test_the_same_revision_may_be_stored_again(bank: RedisBank) -> None:
    stub = stub_of()
    await bank.store([stub])
    assert await bank.store([stub]) == [True]


async def test_an_update_leaves_nothing_of_the_old_readable_fields(bank: RedisBank, server: RedisServer) -> None:
    stub = stub_of()
    await bank.store([stub])
    await bank.store([msgspec.structs.replace(stub, remote_vips=(), revision=2)])
    assert not server.client.hexists(stub.index.key, "vips")


async def test_a_stub_expires_with_its_sa(bank: RedisBank, server: RedisServer) -> None:
    stub = stub_of()
    await bank.store([stub])
    assert server.client.expiretime(stub.index.key) == stub.expires


async def test_a_stub_whose_expiry_was_taken_from_redis_is_not_given_out(server: RedisServer, ring: Keyring) -> None:
    later = RedisBank(server.url, ring, get_timeout=5.0, wall=lambda: time.time() + 7200)
    stub = stub_of(lifetime=3600)
    await later.store([stub])
    server.client.persist(stub.index.key)
    assert await later.get([stub.index]) == [None]
    await later.close()


async def test_a_stub_that_has_expired_already_leaves_nothing(bank: RedisBank, server: RedisServer) -> None:
    await bank.store([stub_of(lifetime=-10)])
    assert server.client.keys("*") == []


# the index


async def test_the_bucket_lists_a_stub_by_expiry_and_lives_as_long_as_its_last(
    bank: RedisBank, server: RedisServer
) -> None:
    first, last = stub_of(b"\xab" + bytes(7), lifetime=100), stub_of(b"\xab" + bytes(6) + b"\1", lifetime=9000)
    await bank.store([last, first])
    assert server.client.zrange(first.index.bucket, 0, -1, withscores=True) == [
        (first.index.spi.hex().encode(), first.expires),
        (last.index.spi.hex().encode(), last.expires),
    ]
    assert server.client.expiretime(first.index.bucket) == last.expires


async def test_the_bucket_forgets_expired_stubs(bank: RedisBank, server: RedisServer) -> None:
    stub = stub_of(b"\xab" + bytes(7))
    server.client.zadd(stub.index.bucket, {"ab00000000000009": 1000})
    await bank.store([stub])
    assert server.client.zrange(stub.index.bucket, 0, -1) == [stub.index.spi.hex().encode()]


async def test_both_spis_of_a_stub_can_be_read_without_a_key(bank: RedisBank) -> None:
    stub = stub_of()
    await bank.store([stub])
    (row,) = await listed(bank)
    assert (row.spi_i, row.spi_r) == (stub.spi_i.hex(), stub.spi_r.hex())
    assert row.as_dict() == {
        "gateway": GATEWAY,
        "spi": stub.spi_r.hex(),
        "id_i": "client@example",
        "id_r": "gw1.example",
        "eap_id": "",
        "spi_i": stub.spi_i.hex(),
        "spi_r": stub.spi_r.hex(),
        "proposal": "aes128-sha256-x25519",
        "connection": "home",
        "vips": ["10.20.0.7"],
        "established": stub.established,
        "expires": stub.expires,
        "revision": 1,
    }


async def test_the_list_is_of_one_gateway_or_of_all(bank: RedisBank) -> None:
    other = "2001:db8::1"
    await bank.store([stub_of() for _ in range(300)] + [stub_of(gateway=other) for _ in range(20)])
    assert len(await listed(bank)) == 320
    assert {row.index.gateway for row in await listed(bank, other)} == {other}


async def test_forged_readable_fields_reach_no_terminal(bank: RedisBank, server: RedisServer) -> None:
    stub = stub_of()
    await bank.store([stub])
    server.client.hset(stub.index.key, mapping={"id_i": b"\x1b[2J\xff", "revision": "many", "vips": b"\x07"})
    (row,) = await listed(bank)
    assert all(str(value).isprintable() for value in row.as_dict().values())
    assert row.revision == 0


async def test_no_key_is_in_redis_in_the_clear(bank: RedisBank, server: RedisServer) -> None:
    stub = stub_of()
    await bank.store([stub])
    fields = b"".join(server.client.hgetall(stub.index.key).values())
    assert stub.sk_d not in fields
    assert stub.shared_secret is not None
    assert stub.shared_secret not in fields


# Delete


async def test_delete_takes_the_stub_and_its_entry_in_the_bucket(bank: RedisBank, server: RedisServer) -> None:
    stub = stub_of(revision=5)
    await bank.store([stub])
    assert await bank.delete([ending(stub)]) == [True]
    left = set(server.client.keys("*"))
    assert left - {bank_keys.addresses_key("10.20.0.7").encode()} == {stub.index.gone.encode()}


async def test_what_has_ended_does_not_come_back_and_is_known_to_have_ended(bank: RedisBank) -> None:
    stub, other = stub_of(revision=5), stub_of()
    await bank.store([stub, other])
    await bank.delete([ending(stub)])
    assert await bank.store([revised(stub, 6)]) == [False]
    assert await bank.get([stub.index]) == [None]
    assert await bank.ended([stub.index, other.index]) == [True, False]


async def test_the_sign_of_an_end_lives_as_long_as_the_stub_would_have(bank: RedisBank, server: RedisServer) -> None:
    stub = stub_of()
    await bank.store([stub])
    await bank.delete([ending(stub)])
    # and a minute, by which the clocks of gateways may differ
    assert server.client.zscore(stub.index.gone, stub.index.spi.hex()) == stub.expires + 60
    assert server.client.expiretime(stub.index.gone) == stub.expires + 60


async def test_a_deletion_takes_every_revision_whatever_the_readable_one_says(
    bank: RedisBank, server: RedisServer
) -> None:
    stub = stub_of(revision=6)
    await bank.store([stub])
    server.client.hset(stub.index.key, mapping={"revision": "9e99", "expires": "1"})
    assert await bank.delete([ending(stub)]) == [True]
    assert await bank.ended([stub.index]) == [True]
    assert await bank.store([revised(stub, 7)]) == [False]


async def test_a_deletion_leaves_its_tombstone_where_the_stub_is_gone_already(bank: RedisBank) -> None:
    stub = stub_of()
    assert await bank.delete([ending(stub)]) == [False]
    assert await bank.ended([stub.index]) == [True]


async def test_a_tombstone_lives_by_the_sealed_expiry_where_the_caller_does_not_know_it(
    bank: RedisBank, server: RedisServer
) -> None:
    stub = stub_of()
    await bank.store([stub])
    server.client.hset(stub.index.key, "expires", "1")
    assert await bank.delete([Ending(stub.index, 0)]) == [True]
    assert server.client.zscore(stub.index.gone, stub.index.spi.hex()) >= stub.expires


async def test_a_stub_that_was_put_back_is_not_given_out_while_its_tombstone_is_there(
    bank: RedisBank, server: RedisServer
) -> None:
    stub = stub_of()
    await bank.store([stub])
    octets = server.client.dump(stub.index.key)
    await bank.delete([ending(stub)])
    server.client.restore(stub.index.key, 0, octets)
    assert await bank.get([stub.index]) == [None]


async def test_delete_of_what_is_not_there_says_so(bank: RedisBank) -> None:
    assert await bank.delete([ending(stub_of())]) == [False]


# Download


def gone_to(old: Index, new: Index) -> Ending:
    until = int(time.time()) + 60
    return Ending(old, until, move=Move(new, until))


async def test_a_mark_names_the_sa_with_which_a_session_went_on(bank: RedisBank) -> None:
    old, new, other = (stub_of(gateway=gateway).index for gateway in (GATEWAY, "2001:db8::2", GATEWAY))
    await bank.delete([gone_to(old, new)])
    assert await bank.moved([other, old]) == [False, new]


async def test_a_mark_that_a_full_bank_refuses_is_left_to_be_written_though_its_stub_is_deleted(
    bank: RedisBank, server: RedisServer
) -> None:
    stub, new = stub_of(), stub_of(gateway="192.0.2.2").index
    await bank.store([stub])
    server.client.config_set("maxmemory", 1)
    with pytest.raises(BankUnwritable) as failure:
        await bank.delete([gone_to(stub.index, new), ending(stub_of())])
    assert failure.value.left == frozenset({stub.index})
    assert await bank.ended([stub.index]) == [True]
    server.client.config_set("maxmemory", 0)
    await bank.delete([gone_to(stub.index, new)])
    assert await bank.moved([stub.index]) == [new]


async def test_a_mark_expires_with_the_ike_sa_that_it_is_about(bank: RedisBank, server: RedisServer) -> None:
    old, new = stub_of().index, stub_of().index
    until = int(time.time()) + 3600
    await bank.delete([Ending(old, until - 60, move=Move(new, until))])
    assert server.client.expiretime(old.moved) == until


async def test_a_mark_without_the_banks_key_or_about_another_session_does_not_count(
    bank: RedisBank, server: RedisServer
) -> None:
    old, new, other = (stub_of().index for _ in range(3))
    await bank.delete([gone_to(old, new)])
    server.client.set(other.moved, server.client.get(old.moved))
    server.client.set(new.moved, keyring().seal(pack_index(old), new.moved.encode()))
    assert await bank.moved([old, other, new]) == [new, False, False]
    assert bank.unreadable == 2


async def test_download_brings_all_stubs_of_one_gateway_and_no_others(bank: RedisBank) -> None:
    stubs = [stub_of() for _ in range(2000)]
    await bank.store(stubs + [stub_of(gateway="192.0.2.2") for _ in range(100)])
    assert {stub.index: stub for stub in await downloaded(bank)} == {stub.index: stub for stub in stubs}


async def test_download_brings_no_more_at_a_time_than_asked(bank: RedisBank) -> None:
    await bank.store([stub_of() for _ in range(700)])
    assert {len(bundle) <= 50 async for bundle in bank.download(GATEWAY, 50)} == {True}


async def test_download_of_a_bucket_too_large_for_one_page_brings_each_stub_once(bank: RedisBank) -> None:
    stubs = [stub_of(b"\xab" + os.urandom(7)) for _ in range(1500)]
    await bank.store(stubs)
    found = await downloaded(bank, batch=64)
    assert sorted(stub.index for stub in found) == sorted(stub.index for stub in stubs)


async def test_download_leaves_out_what_does_not_open(bank: RedisBank, server: RedisServer) -> None:
    good, bad = stub_of(), stub_of()
    await bank.store([good, bad])
    server.client.hset(bad.index.key, "sealed", b"garbage")
    assert await downloaded(bank) == [good]


async def test_a_download_may_be_left_early(bank: RedisBank) -> None:
    await bank.store([stub_of() for _ in range(600)])
    bundles = bank.download(GATEWAY, 10)
    await anext(bundles)
    await bundles.aclose()
    assert len(await downloaded(bank)) == 600


# what is not believed


async def test_a_stub_moved_to_another_index_does_not_open(bank: RedisBank, server: RedisServer) -> None:
    mine, victims = stub_of(), stub_of()
    await bank.store([mine, victims])
    server.client.copy(mine.index.key, victims.index.key, replace=True)
    assert await bank.get([victims.index]) == [None]
    assert bank.unreadable == 1


@pytest.mark.parametrize("position", [0, 4, 16, 40, -1])
async def test_a_stub_with_an_altered_octet_does_not_open(bank: RedisBank, server: RedisServer, position: int) -> None:
    stub = stub_of()
    await bank.store([stub])
    sealed = bytearray(server.client.hget(stub.index.key, "sealed") or b"")
    sealed[position] ^= 1
    server.client.hset(stub.index.key, "sealed", bytes(sealed))
    assert await bank.get([stub.index]) == [None]


async def test_readable_fields_change_nothing_of_the_stub(bank: RedisBank, server: RedisServer) -> None:
    stub = stub_of()
    await bank.store([stub])
    server.client.hset(stub.index.key, mapping={"id_i": "admin@example", "connection": "root"})
    assert await bank.get([stub.index]) == [stub]


async def test_a_stub_that_does_not_open_is_counted_each_time_and_logged_once(
    bank: RedisBank, server: RedisServer
) -> None:
    stub = stub_of()
    await bank.store([stub])
    stranger = RedisBank(server.url, keyring(), get_timeout=5.0)
    with structlog.testing.capture_logs() as events:
        assert await stranger.get([stub.index]) == [None]
        assert await stranger.get([stub.index]) == [None]
    assert stranger.unreadable == 2
    (event,) = events
    assert event["event"] == "stub-unreadable"
    assert event["index"] == str(stub.index)
    assert "not in the key file" in event["reason"]
    await stranger.close()


def test_identities_are_stored_as_initiator_and_responder_whichever_side_made_the_stub() -> None:
    stub = msgspec.structs.replace(stub_of(), local_id=Identity(2, b"maker"), remote_id=Identity(2, b"peer"))
    assert readable_fields(stub)[:2] == ("peer", "maker")
    assert readable_fields(msgspec.structs.replace(stub, initiator=True))[:2] == ("maker", "peer")


# gateways


async def test_a_heartbeat_lives_for_its_time(bank: RedisBank, server: RedisServer) -> None:
    await bank.heartbeat(GATEWAY, 30)
    assert 29_000 < server.client.pttl(f"ike:gateway:{GATEWAY}") <= 30_000


async def test_ping_returns_how_long_it_took(bank: RedisBank) -> None:
    assert await bank.ping() > 0


async def test_changes_can_be_watched_through_the_keyspace(bank: RedisBank, server: RedisServer) -> None:
    stub = stub_of()
    with server.client.pubsub() as watch:
        watch.psubscribe("__keyspace@0__:ike:stub:*")
        await bank.store([stub])
        await bank.delete([ending(stub)])
        events = []
        while "del" not in events:
            message = watch.get_message(timeout=5)
            assert message is not None
            if message["type"] == "pmessage":
                assert message["channel"].decode() == f"__keyspace@0__:{stub.index.key}"
                events.append(message["data"].decode())
    assert events == ["hset", "expire", "del"]


# Redis that fails


async def test_scripts_are_loaded_again_after_a_restart(bank: RedisBank, server: RedisServer) -> None:
    first, second = stub_of(), stub_of()
    await bank.store([first])
    server.stop()
    server.start()
    assert await bank.store([second]) == [True]
    assert await bank.get([first.index, second.index]) == [first, second]
    assert len(await downloaded(bank)) == 2


async def test_scripts_flushed_behind_its_back_are_loaded_again(bank: RedisBank, server: RedisServer) -> None:
    stubs = [stub_of() for _ in range(50)]
    await bank.store(stubs[:25])
    server.client.script_flush()
    assert all(await bank.store(stubs))
    server.client.script_flush()
    assert all(await bank.delete([ending(stub) for stub in stubs]))


async def test_nothing_acknowledged_is_lost_when_redis_is_killed(bank: RedisBank, server: RedisServer) -> None:
    acknowledged: list[Stub] = []
    enough = asyncio.Event()

    async def store_until_it_fails() -> None:
        while True:
            bundle = [stub_of() for _ in range(20)]
            await bank.store(bundle)
            acknowledged.extend(bundle)
            if len(acknowledged) >= 400:
                enough.set()

    storing = asyncio.create_task(store_until_it_fails())
    await enough.wait()
    server.kill()
    with pytest.raises(BankUnavailable):
        await storing
    server.start()
    assert await bank.get([stub.index for stub in acknowledged]) == acknowledged


async def test_without_a_server_every_call_says_so(tmp_path: Path, ring: Keyring) -> None:
    bank = RedisBank(f"unix://{tmp_path}/nobody", ring)
    stub = stub_of()
    for call in (
        bank.store([stub]),
        bank.get([stub.index]),
        bank.delete([ending(stub)]),
        bank.ping(),
        bank.heartbeat(GATEWAY, 10),
        downloaded(bank),
        listed(bank),
    ):
        with pytest.raises(BankUnavailable):
            await call
    await bank.close()


async def test_a_look_up_does_not_wait_for_a_redis_that_hangs(server: RedisServer, ring: Keyring) -> None:
    bank = RedisBank(server.url, ring, get_timeout=0.1)
    one, other = stub_of(), stub_of()
    await bank.store([one, other])
    server.freeze()
    with pytest.raises(BankUnavailable, match="in time"):
        await bank.get([one.index])
    server.thaw()
    patient = RedisBank(server.url, ring, get_timeout=5.0)
    assert await patient.get([other.index]) == [other]
    # the late answer to the look-up that was given up is nobody's
    assert await bank.get([other.index, one.index]) == [other, one]
    await bank.close()
    await patient.close()


async def test_a_full_redis_refuses_and_forgets_nothing(bank: RedisBank, server: RedisServer) -> None:
    stub = stub_of()
    await bank.store([stub])
    server.client.config_set("maxmemory", 1)
    with pytest.raises(BankUnavailable, match="maxmemory"):
        await bank.store([stub_of()])
    assert await bank.get([stub.index]) == [stub]


async def test_a_full_redis_still_deletes(bank: RedisBank, server: RedisServer) -> None:
    stub = stub_of()
    await bank.store([stub])
    server.client.config_set("maxmemory", 1)
    assert await bank.delete([ending(stub)]) == [True]
    assert await bank.ended([stub.index]) == [True]
    assert await bank.get([stub.index]) == [None]


async def test_a_wrong_password_is_named_and_not_shown(server: RedisServer, ring: Keyring) -> None:
    server.client.config_set("requirepass", "right")
    bank = RedisBank(f"unix://:wr0ng@{server.socket}", ring, get_timeout=5.0)
    with pytest.raises(BankUnavailable) as caught:
        await bank.ping()
    assert "wr0ng" not in str(caught.value)
    await bank.close()


# gateways


@pytest.mark.parametrize("ahead", [-8 * 86_400.0, 8 * 86_400.0, -1.7e9])
async def test_a_gateway_whose_clock_is_wrong_makes_no_other_one_forgotten(
    bank: RedisBank, server: RedisServer, ring: Keyring, ahead: float
) -> None:
    await bank.heartbeat(GATEWAY, 30)
    wrong = RedisBank(server.url, ring, wall=lambda: time.time() + ahead)
    await wrong.heartbeat("192.0.2.2", 30)
    assert [name for name, sign in (await bank.gateways()).items() if sign.alive] == ["192.0.2.2", GATEWAY]
    await bank.heartbeat(GATEWAY, 30)
    assert len(await wrong.gateways()) == 2
    await wrong.close()


async def test_a_gateway_lives_as_long_as_its_heartbeat_whatever_the_set_names(
    bank: RedisBank, server: RedisServer
) -> None:
    await bank.heartbeat(GATEWAY, 30)
    assert (await bank.gateways())[GATEWAY].alive
    server.client.delete(bank_keys.GATEWAYS)
    assert (await bank.gateways())[GATEWAY].alive
    await bank.leave(GATEWAY)
    assert not (await bank.gateways())[GATEWAY].alive
    assert await bank.gateways() == {}


async def test_a_gateway_without_a_heartbeat_for_a_week_is_forgotten(bank: RedisBank, server: RedisServer) -> None:
    server.client.zadd(bank_keys.GATEWAYS, {"192.0.2.8": time.time() - 8 * 86_400, "192.0.2.9": time.time() + 8e6})
    await bank.heartbeat(GATEWAY, 30)
    assert list(await bank.gateways()) == [GATEWAY]
