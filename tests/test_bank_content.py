"""Every kind of bank content that no gateway wrote, in every form that a bank has: no call fails for it but for the
stub that was spoilt, and no session that ended is resumed."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

import redis
from bank_support import GATEWAY, PATIENCE, RedisServer, downloaded, ending, listed, revised, stub_of
from bridge.bank import open_bank
from bridge.bank.interface import BankUnavailable, StubBank
from bridge.bank.redis_bank import RedisBank
from bridge.bank.write_queue import WriteQueue
from bridge.config import BankConfig
from bridge.stub import bank_keys
from bridge.stub.keyring import OVERHEAD, Keyring
from bridge.stub.stub import Stub
from test_bank_servers import admin, cluster, cluster_url, sentinel

__all__ = ["cluster", "sentinel"]

pytestmark = pytest.mark.redis

OTHER = "192.0.2.2"
HUGE = "9" * 5000


class Place:
    """A bank, and clients for spoiling what is in its Redis: each write goes to all of its servers that take it."""

    def __init__(self, bank: StubBank, *clients: Any) -> None:
        self.bank = bank
        self.clients = clients

    def spoil(self, *command: Any) -> None:
        """Run a command as somebody who may write to the bank."""
        errors = []
        for client in self.clients:
            try:
                client.execute_command(*command)
            except Exception as error:
                errors.append(error)
        if len(errors) == len(self.clients):
            raise errors[0]

    def put(self, key: str, *command: Any) -> None:
        """Replace a key."""
        self.spoil("DEL", key)
        self.spoil(command[0], key, *command[1:])


@pytest.fixture(params=["single", "sentinel", "cluster", "distributed", "mixed"])
async def place(
    request: pytest.FixtureRequest, tmp_path: Path, ring: Keyring, server: RedisServer
) -> AsyncIterator[Place]:
    mode = request.param
    config = BankConfig(url=server.url)
    clients = [server.client]
    others: list[RedisServer] = []
    if mode == "sentinel":
        port = request.getfixturevalue("sentinel")
        config = BankConfig(url=f"redis+sentinel://127.0.0.1:{port}/bank/0")
        bank = await open_bank(config, ring)
        watcher: Any = redis.Redis(port=port)
        address = watcher.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "bank")
        clients = [redis.Redis(port=int(address[1]))]
    elif mode == "cluster":
        ports = request.getfixturevalue("cluster")
        config = BankConfig(url=cluster_url(ports))
        bank = await open_bank(config, ring)
        clients = [admin(port) for port in ports]
    elif mode in ("distributed", "mixed"):
        others = [RedisServer(tmp_path / name) for name in ("near", "peer")]
        for each in others:
            each.start()
        near, peer = others
        clients += [near.client, peer.client]
        config = (
            BankConfig(mode="distributed", url=near.url, peers={OTHER: peer.url}, peer_timeout=0.5)
            if mode == "distributed"
            else BankConfig(mode="mixed", url=server.url, local=near.url, peers={OTHER: peer.url}, peer_timeout=0.5)
        )
        bank = await open_bank(config, ring, serve=True)
    else:
        bank = await open_bank(config, ring)
    yield Place(bank, *clients)
    await bank.close()
    for each in others:
        each.kill()


Spoil = Callable[[Place, Stub], None]


def kinds() -> Iterator[tuple[str, Spoil]]:
    """What somebody who may write to the bank can do about a stub, by name."""
    types: dict[str, tuple[Any, ...]] = {
        "string": ("SET", b"\xff\xfe"),
        "list": ("RPUSH", "x"),
        "set": ("SADD", "x"),
        "hash": ("HSET", "x", "y"),
        "sorted-set": ("ZADD", 1, "x"),
        "stream": ("XADD", "*", "x", "y"),
    }
    keys: dict[str, tuple[Callable[[Stub], str], str]] = {
        "stub": (lambda stub: stub.index.key, "hash"),
        "bucket": (lambda stub: stub.index.bucket, "sorted-set"),
        "tombstones": (lambda stub: stub.index.gone, "sorted-set"),
        "gateways": (lambda _: bank_keys.GATEWAYS, "sorted-set"),
        "heartbeat": (lambda stub: bank_keys.heartbeat_key(stub.index.gateway), "string"),
        "moved": (lambda stub: stub.index.moved, "string"),
        "revoked": (lambda _: bank_keys.REVOKED, "sorted-set"),
        "revoked-stamp": (lambda _: bank_keys.REVOKED_STAMP, "string"),
        "addresses": (lambda stub: bank_keys.addresses_key(stub.remote_vips[0]), "sorted-set"),
        "facts": (lambda stub: bank_keys.posted_key(bank_keys.FACTS_KIND, stub.index.gateway), "string"),
    }
    for what, (key, right) in keys.items():
        for name, command in types.items():
            if name != right:
                yield f"{what}-is-{name}", lambda place, stub, key=key, command=command: place.put(key(stub), *command)  # type: ignore[misc]
    for field in ("revision", "expires", "established", "id_i", "vips", "connection"):
        for name, value in {
            "huge": HUGE,
            "negative": "-1",
            "exponent": "9e99",
            "infinite": "inf",
            "not-a-number": "nan",
            "hexadecimal": "0x7fffffff",
            "octets": b"\xff\xfe\x00\x1b[2J",
            "other-digits": "٣٤",
            "empty": "",
        }.items():
            yield (
                f"field-{field}-{name}",
                lambda place, stub, field=field, value=value: place.spoil("HSET", stub.index.key, field, value),  # type: ignore[misc]
            )
    for name, octets in {"empty": b"", "short": b"x", "junk": os.urandom(300), "large": b"x" * 1_000_000}.items():
        yield (
            f"sealed-{name}",
            lambda place, stub, octets=octets: place.spoil("HSET", stub.index.key, "sealed", octets),  # type: ignore[misc]
        )
    yield "sealed-missing", lambda place, stub: place.spoil("HDEL", stub.index.key, "sealed")
    members: dict[str, Any] = {
        "no-utf-8": b"\xff\xfe",
        "short": "ab",
        "capital": "ABCDEF0123456789",
        "glob": "*",
        "of-another-bucket": "00" * 8,
        "long": "a" * 10_000,
        "address-with-a-zone": "fe80::1%*",
    }
    for name, member in members.items():
        for what in ("bucket", "tombstones", "revoked", "addresses"):
            member_key = keys[what][0]
            yield (
                f"{what}-member-{name}",
                lambda place, stub, key=member_key, member=member: place.spoil("ZADD", key(stub), 2**40, member),  # type: ignore[misc]
            )
        yield (
            f"gateways-member-{name}",
            lambda place, _, member=member: place.spoil("ZADD", bank_keys.GATEWAYS, 2**40, member),  # type: ignore[misc]
        )
    for what in ("bucket", "tombstones", "gateways", "revoked", "addresses"):
        score_key = keys[what][0]
        for score in ("inf", "-inf", "9e99", "-9e99", "0.5"):
            yield (
                f"{what}-score-{score}",
                lambda place, stub, key=score_key, score=score: place.spoil("ZADD", key(stub), score, "00" * 8),  # type: ignore[misc]
            )
    flood = [word for number in range(12_000) for word in (number - 6_000, f"junk {number}")]
    yield "revoked-flood", lambda place, _: place.spoil("ZADD", bank_keys.REVOKED, *flood)
    heartbeat = keys["heartbeat"][0]
    for name, value in {"junk": b"\xff " * 999, "keyless": b"1 ", "many-keys": b"1 " + b"00000000," * 99999}.items():
        yield (
            f"heartbeat-{name}",
            lambda place, stub, value=value: place.put(heartbeat(stub), "SET", value),  # type: ignore[misc]
        )
    for name in (
        "ike:stubs:{\xff}",
        "ike:stubs:{no address/ab}",
        "ike:gone:{x/}",
        "ike:gone:{192.0.2.1/zz}",
        "ike:stub:",
    ):
        yield f"key-{name!a}", lambda place, _, name=name: place.put(name.encode("latin-1"), "ZADD", 2**40, "x")  # type: ignore[misc]


KINDS = dict(kinds())


async def everything_goes_on(place: Place, victim: Stub, other: Stub) -> None:
    """Whatever was done to `victim`: all calls work, and what is said of `other` is true."""
    bank = place.bank
    # a look-up names the other stub, and no more than the true victim
    found = await bank.get([victim.index, other.index])
    assert found[1] == other
    assert found[0] in (None, victim)
    assert (await bank.revisions([other.index, victim.index]))[0] == other.revision
    assert (await bank.ended([other.index]))[0] is False
    # people may look
    for row in await listed(bank):
        assert all(str(value).isprintable() for value in row.as_dict().values())
    assert other.index in {row.index for row in await listed(bank)}
    # marks of moves, of lock-outs, of addresses
    assert await bank.moved([other.index]) == [False]
    await bank.moved([victim.index])
    await bank.revocation_stamp()
    for marks in await bank.revocations():
        assert all(isinstance(mark, bytes) for mark in marks)
    mark = b"of another gateway's key".ljust(OVERHEAD)
    await bank.put_revocations({mark: 2**33}, [])
    assert any(mark in marks for marks in await bank.revocations())
    vip = other.remote_vips[0]
    await bank.addresses([(vip, vip)])
    # what gateways do for each other
    await bank.heartbeat(GATEWAY, 30)
    assert (await bank.gateways())[GATEWAY].alive
    await bank.post(bank_keys.FACTS_KIND, GATEWAY, "{}", 30)
    assert await bank.posted(bank_keys.FACTS_KIND, GATEWAY) == b"{}"
    await bank.reseal(GATEWAY)
    # the victim's gateway goes on
    newer = revised(victim, victim.revision + 1)
    assert (await bank.store([newer, other])) == [True, True]
    assert await bank.get([newer.index, other.index]) == [newer, other]
    assert {stub.index for stub in await downloaded(bank)} == {newer.index, other.index}
    # and ends the session
    await bank.delete([ending(newer), ending(other)])
    assert await bank.ended([newer.index, other.index]) == [True, True]
    assert await bank.store([revised(newer, newer.revision + 1)]) == [False]
    assert await bank.get([newer.index]) == [None]
    assert {each.index for page in [page async for page in bank.endings()] for each in page} >= {newer.index}


async def both(place: Place, rotate: bool = False) -> tuple[Stub, Stub]:
    victim, other = stub_of(b"\xab" + os.urandom(7), revision=10), stub_of(b"\xcd" + os.urandom(7), revision=10)
    await place.bank.heartbeat(GATEWAY, 30)
    await place.bank.store([victim, other])
    return victim, other


@pytest.fixture
async def single(server: RedisServer, ring: Keyring) -> AsyncIterator[Place]:
    bank = RedisBank(server.url, ring, get_timeout=5.0)
    yield Place(bank, server.client)
    await bank.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_no_content_keeps_anything_else_from_working(single: Place, kind: str) -> None:
    victim, other = await both(single)
    KINDS[kind](single, victim)
    await everything_goes_on(single, victim, other)


async def test_in_every_form_of_bank_no_content_keeps_anything_else_from_working(place: Place) -> None:
    for kind, spoil in KINDS.items():
        victim, other = await both(place)
        spoil(place, victim)
        try:
            await everything_goes_on(place, victim, other)
        except (AssertionError, BankUnavailable) as error:
            raise AssertionError(kind) from error
        for client in place.clients:
            client.flushdb()


async def test_a_writer_that_puts_anything_anywhere_stops_nothing(single: Place) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    victim, other = await both(single)
    values: list[Any] = [b"", b"\xff\xfe", HUGE, "inf", "-1", "9e99", "x", "00" * 8, "192.0.2.9", b"\x00" * 20]
    keys = [
        victim.index.key,
        victim.index.bucket,
        victim.index.gone,
        bank_keys.GATEWAYS,
        bank_keys.heartbeat_key(GATEWAY),
        bank_keys.heartbeat_key("192.0.2.9"),
        bank_keys.posted_key(bank_keys.FACTS_KIND, GATEWAY),
    ]
    for _ in range(200):
        key, value = draw.choice(keys), draw.choice(values)
        command: tuple[Any, ...] = draw.choice(
            [
                ("SET", key, value),
                ("HSET", key, draw.choice(["sealed", "revision", "expires", "x"]), value),
                ("ZADD", key, draw.choice(["inf", "-inf", "1", "9e99", str(2**40)]), value),
                ("RPUSH", key, value),
                ("DEL", key),
                ("PERSIST", key),
                ("EXPIRE", key, 10_000_000),
            ]
        )
        try:
            single.clients[0].execute_command(*command)
        except Exception:
            continue
        assert await single.bank.get([other.index]) == [other]
        await single.bank.heartbeat(GATEWAY, 30)
        await single.bank.gateways()
        await listed(single.bank)
        await single.bank.reseal(GATEWAY)
        await single.bank.revisions([victim.index, other.index])
        if draw.random() < 0.3:
            await single.bank.store([victim])
    await single.bank.delete([ending(victim)])
    assert await single.bank.get([victim.index]) == [None]
    assert await single.bank.store([revised(victim, 2**50)]) == [False]


async def test_what_was_spoilt_is_counted_and_logged(single: Place) -> None:
    victim, _ = await both(single)
    single.put(victim.index.bucket, "SET", "x")
    with structlog.testing.capture_logs() as events:
        assert await downloaded(single.bank) != []
    assert single.bank.spoilt == 1
    [event] = [event for event in events if event["event"] == "bank-content-spoilt"]
    assert event["log_level"] == "error"
    assert event["key"] == victim.index.bucket


async def test_a_stub_that_its_bucket_no_longer_lists_counts_as_missing(single: Place) -> None:
    """Its gateway stores it again: else it would be in no download and no rotation."""
    victim, other = await both(single)
    single.spoil("ZREM", victim.index.bucket, victim.index.spi.hex())
    assert await single.bank.revisions([victim.index, other.index]) == [0, 10]


async def test_a_revision_that_was_forged_does_not_keep_the_gateway_from_storing(single: Place) -> None:
    victim, _ = await both(single)
    single.spoil("HSET", victim.index.key, "revision", "9e99")
    assert await single.bank.revisions([victim.index]) == [10]
    assert await single.bank.store([revised(victim, 11)]) == [True]
    # but an older one of the gateway's own is still refused
    single.spoil("HSET", victim.index.key, "revision", "9e99")
    assert await single.bank.store([revised(victim, 9)]) == [False]
    assert await single.bank.get([victim.index]) == [revised(victim, 11)]


async def test_a_spoilt_bucket_holds_up_no_deletion_of_another_one(single: Place) -> None:
    victim, other = await both(single)
    writer = WriteQueue(single.bank)
    for key in (victim.index.bucket, victim.index.gone, victim.index.key):
        single.put(key, "SET", "x")
    writer.submit_delete(victim.index, expires=victim.expires)
    writer.submit_delete(other.index, expires=other.expires)
    async with asyncio.timeout(PATIENCE):
        await writer.flush()
    assert await single.bank.ended([victim.index, other.index]) == [True, True]
    await writer.close()


async def test_a_key_file_of_another_bank_fills_no_log(single: Place, server: RedisServer) -> None:
    await single.bank.store([stub_of() for _ in range(500)])
    stranger = RedisBank(server.url, Keyring({b"....": os.urandom(32)}), get_timeout=5.0)
    with structlog.testing.capture_logs() as events:
        assert await downloaded(stranger) == []
    assert stranger.unreadable == 500
    assert len([event for event in events if event["event"] == "stub-unreadable"]) == 20
    await stranger.close()
