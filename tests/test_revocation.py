"""Locked-out identities: the marks, and what gateways make of them. With a real Redis and no charon."""

from __future__ import annotations

import asyncio
import base64
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import cast

import msgspec
import pytest

from bank_support import GATEWAY, PASSWORD, RedisServer, keyring, shipped_users, stub_of
from bridge.bank import redis_gateways
from bridge.bank.interface import BankUnavailable, StubBank
from bridge.bank.redis_bank import RedisBank
from bridge.bank.replica import Replica
from bridge.bank.replicated import ReplicatedBank
from bridge.bank.write_queue import WriteQueue
from bridge.charon.charon import Charon
from bridge.charon.ike_sa import sa_of
from bridge.charon.vici_types import SaInfo
from bridge.gateway.endings import Endings
from bridge.gateway.revocation import FILE, LockOut, Revocations
from bridge.stub.bank_keys import REVOKED, REVOKED_STAMP
from bridge.stub.keyring import OVERHEAD, Keyring, SealError
from bridge.stub.revocation import TEXT_MAX, Mark, canonical, open_mark, seal
from bridge.stub.types import Endpoint, Identity

RING = keyring()
NOW = int(time.time())
"""at the beginning of each test"""


@pytest.fixture(autouse=True)
def _now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "NOW", int(time.time()))


def mark(identity: str = "client@example", *, revoked: bool = True, made: int = 1, seconds: int = 3600) -> Mark:
    return Mark(identity, revoked, NOW * 1000 + made, NOW + seconds)


# the mark


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("client@example", "Client@EXAMPLE"),
        ("@gw.example.org", "gw.example.org"),
        ("C=CH, O=strongSwan, CN=alice", "CN=alice,O=strongSwan,C=CH"),
        ("C=CH, CN=alice, E=alice@example", "emailAddress=alice@example,CN=Alice,C=CH"),
        ("O=Example\\, Inc., CN=a", "CN=a,O=Example\\, Inc."),
    ],
)
def test_an_identity_is_the_same_however_it_is_written(one: str, other: str) -> None:
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("alice@example", "bob@example"), ("CN=alice,C=CH", "CN=alice,C=DE"), ("CN=alice", "CN=alice,OU=admin")],
)
def test_two_identities_are_two(one: str, other: str) -> None:
    assert canonical(one) != canonical(other)


def test_a_mark_opens_as_a_mark_alone_and_with_the_banks_key_alone() -> None:
    sealed = seal(mark(), RING)
    assert open_mark(sealed, RING) == mark()
    with pytest.raises(SealError):
        open_mark(sealed, keyring())
    stub = RING.seal(b"\x01", b"ike:stub:{192.0.2.1/00}:0000000000000000")
    with pytest.raises(SealError):
        open_mark(stub, RING)
    with pytest.raises(SealError):
        open_mark(RING.seal(b"\x93\x01", b"ike:{revoked}"), RING)


# what a gateway makes of it


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as running:
        yield running


async def put(bank: StubBank, *marks: Mark, ring: Keyring = RING) -> None:
    await bank.put_revocations({seal(one, ring): one.expires for one in marks}, ())


@pytest.mark.redis
async def test_a_mark_counts_for_the_ike_identity_and_for_that_of_eap(server: RedisServer) -> None:
    bank = RedisBank(server.url, RING)
    revocations = Revocations(bank, RING)
    by_ike = stub_of()
    by_eap = msgspec.structs.replace(by_ike, remote_id=Identity(2, b"any"), eap_id=by_ike.remote_id)
    other = msgspec.structs.replace(by_ike, remote_id=Identity(3, b"other@example"))
    assert not revocations.revoked(by_ike)
    await put(bank, mark())
    await revocations.look()
    assert revocations.revoked(by_ike)
    assert revocations.revoked(by_eap)
    assert revocations.revoked(sa_of(by_ike))
    assert not revocations.revoked(other)
    await bank.close()


@pytest.mark.redis
async def test_a_look_is_fresh_for_a_moment_from_its_beginning_and_only_if_the_bank_answered(
    server: RedisServer,
) -> None:
    now = 100.0
    bank = RedisBank(server.url, RING)
    revocations = Revocations(bank, RING, clock=lambda: now)
    assert not revocations.fresh
    await revocations.look()
    assert revocations.fresh
    now += 0.021
    assert not revocations.fresh
    server.stop()
    with pytest.raises(BankUnavailable):
        await revocations.look()
    assert not revocations.fresh
    await bank.close()


@pytest.mark.redis
async def test_a_newer_mark_lets_in_again_and_an_older_one_changes_nothing(server: RedisServer) -> None:
    bank = RedisBank(server.url, RING)
    revocations = Revocations(bank, RING)
    await put(bank, mark())
    await revocations.look()
    await put(bank, mark(revoked=False, made=2))
    await revocations.look()
    assert not revocations.revoked(stub_of())
    # replayed by who can write to the bank
    await put(bank, mark())
    await revocations.look()
    assert not revocations.revoked(stub_of())
    assert len((await bank.revocations())[0]) == 1
    await bank.close()


@pytest.mark.redis
async def test_a_mark_that_was_taken_away_from_the_bank_counts_on_and_comes_back(server: RedisServer) -> None:
    bank = RedisBank(server.url, RING)
    revocations = Revocations(bank, RING)
    await put(bank, mark())
    await revocations.look()
    server.client.flushall()
    await revocations.look()
    assert revocations.revoked(stub_of())
    [[sealed]] = await bank.revocations()
    assert open_mark(sealed, RING) == mark()
    await bank.close()


@pytest.mark.redis
async def test_without_the_key_no_client_is_locked_out(server: RedisServer) -> None:
    bank = RedisBank(server.url, RING)
    revocations = Revocations(bank, RING)
    await put(bank, mark(), ring=keyring())
    server.client.zadd(REVOKED, {"junk": NOW + 100})
    await revocations.look()
    assert not revocations.revoked(stub_of())
    assert revocations.active() == []
    # one may be of a gateway with another key file, the other is of none
    assert revocations.unreadable == 1
    assert bank.spoilt == 1
    assert server.client.zcard(REVOKED) == 1
    await bank.close()


def junk(kind: str, count: int) -> dict[bytes, int]:
    """Members that someone without the key adds, with their scores: all lower than that of a mark."""
    key_id = RING.ids[0] if kind == "known key" else b"\0\0\0\0"
    start = b"" if kind == "short" else key_id + bytes(OVERHEAD)
    return {start + b"%d" % number: (-1 if kind == "expired" else NOW + 60) for number in range(count)}


@pytest.mark.redis
@pytest.mark.parametrize("kind", ["short", "known key", "foreign key", "expired"])
async def test_no_number_of_other_members_hides_a_mark_and_they_are_removed(server: RedisServer, kind: str) -> None:
    bank = RedisBank(server.url, RING)
    server.client.zadd(REVOKED, junk(kind, 12_000))
    await put(bank, mark())
    revocations = Revocations(bank, RING)
    await revocations.look()
    assert revocations.revoked(stub_of())
    [[sealed]] = await bank.revocations()
    assert open_mark(sealed, RING) == mark()
    assert server.client.zrange(REVOKED, 0, -1) == [sealed]
    assert bank.spoilt == (0 if kind == "expired" else 12_000)
    await bank.close()


@pytest.mark.redis
async def test_a_look_that_takes_too_long_is_followed_by_the_next_which_goes_on(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_gateways, "MARKS_SECONDS", 0.0)
    bank = RedisBank(server.url, RING)
    server.client.zadd(REVOKED, junk("short", 3_000))
    await put(bank, mark())
    revocations = Revocations(bank, RING)
    left, looks = 3_001, 0
    while left > 1:
        # the stamp says that there is more
        await revocations.look()
        left, before, looks = server.client.zcard(REVOKED), left, looks + 1
        assert left < before
    assert looks > 1
    await revocations.look()
    assert revocations.revoked(stub_of())
    await bank.close()


@pytest.mark.redis
async def test_a_flood_that_takes_a_mark_of_another_key_along_does_not_unlock(server: RedisServer) -> None:
    """The gateway that removes it lacks the key; the one that has it gives the mark back, and it stays."""
    one, other = keyring(), RING
    knows, lacks = RedisBank(server.url, other), RedisBank(server.url, one)
    await put(knows, mark())
    enforcing, without = Revocations(knows, other), Revocations(lacks, one)
    await enforcing.look()
    server.client.zadd(REVOKED, junk("foreign key", 12_000))
    await without.read()
    await enforcing.look()
    assert enforcing.revoked(stub_of())
    for _ in range(2):
        await without.read()
        [[sealed]] = await knows.revocations()
        assert open_mark(sealed, other) == mark()
    assert without.unreadable == 1
    await knows.close()
    await lacks.close()


@pytest.mark.redis
async def test_a_score_that_someone_lowered_takes_no_mark_away(server: RedisServer) -> None:
    bank = RedisBank(server.url, RING)
    await put(bank, mark())
    [[sealed]] = await bank.revocations()
    server.client.zadd(REVOKED, {sealed: -1})
    await put(bank, mark("other@example"))
    revocations = Revocations(bank, RING)
    await revocations.look()
    assert revocations.revoked(stub_of())
    assert server.client.zcard(REVOKED) == 2
    await bank.close()


@pytest.mark.redis
async def test_a_mark_that_has_expired_is_removed(server: RedisServer) -> None:
    bank = RedisBank(server.url, RING)
    await put(bank, mark(seconds=-1))
    server.client.zadd(REVOKED, {server.client.zrange(REVOKED, 0, -1)[0]: 2**40})
    assert await bank.revocations() == [[]]
    assert server.client.zcard(REVOKED) == 0
    await bank.close()


@pytest.mark.redis
async def test_where_a_user_may_remove_nothing_marks_are_found_all_the_same(tmp_path: Path) -> None:
    settings = shipped_users(tmp_path / "users.acl")
    with RedisServer(tmp_path / "redis", *settings, username="admin", password=PASSWORD) as server:
        bank = RedisBank(f"unix://gateway:{PASSWORD}@{server.socket}", RING)
        await put(bank, mark())
        server.client.zadd(REVOKED, junk("short", 5_000))
        server.client.execute_command("ACL", "SETUSER", "gateway", "-zrem")
        revocations = Revocations(bank, RING)
        await revocations.look()
        assert revocations.revoked(stub_of())
        assert server.client.zcard(REVOKED) == 5_001
        await bank.close()


@pytest.mark.redis
async def test_the_longest_identity_that_may_be_locked_out_is_read_back(server: RedisServer) -> None:
    bank = RedisBank(server.url, RING)
    longest = mark("\U0001f600" * TEXT_MAX)
    await put(bank, longest)
    [[sealed]] = await bank.revocations()
    assert open_mark(sealed, RING) == longest
    await bank.close()


@pytest.mark.redis
async def test_the_shipped_users_may_do_what_it_takes(tmp_path: Path) -> None:
    settings = shipped_users(tmp_path / "users.acl")
    with RedisServer(tmp_path / "redis", *settings, username="admin", password=PASSWORD) as server:
        bank = RedisBank(f"unix://gateway:{PASSWORD}@{server.socket}", RING)
        await put(bank, mark())
        revocations = Revocations(bank, RING)
        await revocations.look()
        assert revocations.revoked(stub_of())
        await bank.put_revocations({}, (await bank.revocations())[0])
        assert await bank.revocations() == [[]]
        await bank.close()


@pytest.mark.redis
async def test_keys_of_a_wrong_type_are_put_right(server: RedisServer) -> None:
    bank = RedisBank(server.url, RING)
    server.client.set(REVOKED, "x")
    server.client.zadd(REVOKED_STAMP, {"x": 1})
    revocations = Revocations(bank, RING)
    await revocations.look()
    await put(bank, mark())
    await revocations.look()
    assert revocations.revoked(stub_of())
    await bank.close()


@pytest.mark.redis
async def test_a_mark_ends_with_its_time(server: RedisServer) -> None:
    bank = RedisBank(server.url, RING)
    now = float(NOW)
    revocations = Revocations(bank, RING, wall=lambda: now)
    await put(bank, mark(seconds=100))
    await revocations.look()
    now = NOW + 99
    assert revocations.revoked(stub_of())
    now = NOW + 100
    assert not revocations.revoked(stub_of())
    await bank.close()


@pytest.mark.redis
async def test_a_restart_remembers_marks_and_believes_no_line_that_does_not_open(
    server: RedisServer, tmp_path: Path
) -> None:
    bank = RedisBank(server.url, RING)
    await put(bank, mark())
    await Revocations(bank, RING, tmp_path).look()
    with (tmp_path / FILE).open("a") as file:
        file.write("junk\nAAAA\n")
    server.client.flushall()
    again = Revocations(bank, RING, tmp_path)
    assert again.revoked(stub_of())
    await bank.close()


@pytest.mark.redis
async def test_marks_that_could_not_be_saved_once_are_saved_later(server: RedisServer, tmp_path: Path) -> None:
    bank, state = RedisBank(server.url, RING), tmp_path / "state"
    await put(bank, mark())
    state.write_text("in the way of the folder")
    revocations = Revocations(bank, RING, state)
    await revocations.read()
    state.unlink()
    await revocations.read()
    await bank.close()
    assert Revocations(bank, RING, state).revoked(stub_of())


@pytest.mark.redis
async def test_a_mark_is_sealed_again_with_a_newer_key_once(server: RedisServer) -> None:
    [(old, key)] = RING_KEYS.items()
    bank = RedisBank(server.url, RING)
    both = Keyring({b"newn": b"n" * 32, old: key})
    await put(bank, mark(), ring=Keyring({old: key}))
    first, second = Revocations(bank, both), Revocations(bank, both)
    await first.look()
    await second.look()
    await first.look()
    [[sealed]] = await bank.revocations()
    assert sealed[:4] == b"newn"
    stamp = server.client.get(REVOKED_STAMP)
    await first.look()
    await second.look()
    assert server.client.get(REVOKED_STAMP) == stamp
    # who seals with the older one still leaves it so
    both.prefer([old])
    await first.read()
    assert await bank.revocations() == [[sealed]]
    await bank.close()


RING_KEYS = {b"oldo": b"o" * 32}


@pytest.mark.redis
async def test_of_several_banks_each_gets_it_also_one_that_was_away(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "near") as near, RedisServer(tmp_path / "far") as far:
        both = ReplicatedBank(
            Replica("local", RedisBank(near.url, RING)),
            None,
            [Replica("192.0.2.9", RedisBank(far.url, RING))],
            peer_timeout=1.0,
        )
        far.kill()
        with pytest.raises(BankUnavailable, match=r"192\.0\.2\.9"):
            await put(both, mark())
        far.start()
        revocations = Revocations(both, RING)
        await both.ping()
        await both.heartbeat(GATEWAY, 10)
        await revocations.read()
        assert revocations.revoked(stub_of())
        for server in (near, far):
            [[sealed]] = await RedisBank(server.url, RING).revocations()
            assert open_mark(sealed, RING) == mark()
        await both.close()


class FakeCharon:
    """A charon that ends what it is told to, or cannot be asked."""

    def __init__(self) -> None:
        self.reconciled = asyncio.Event()
        self.reconciled.set()
        self.ended: list[Collection[bytes]] = []
        self.news = asyncio.Event()
        self.tracker = self.vici = self
        self.stubs = [stub_of()]
        self.sas: dict[bytes, object] = {}
        self.unknown: list[SaInfo] = []

    def established(self) -> list[object]:
        return [sa_of(stub) for stub in self.stubs]

    async def each_sas(self, take: Callable[[list[SaInfo]], None]) -> float:
        take(self.unknown)
        return 0.0

    async def end_sa(self, unique_id: str) -> None:
        self.unknown = [info for info in self.unknown if info.unique_id != unique_id]
        self.news.set()

    async def end(self, spis: Collection[bytes]) -> int:
        self.ended.append(spis)
        self.news.set()
        self.stubs = [stub for stub in self.stubs if stub.spi_i + stub.spi_r not in spis]
        return len(spis)


async def test_what_is_known_is_enforced_while_the_bank_that_knows_other_sas_is_away(tmp_path: Path) -> None:
    """As after a restart of the sidecar: charon has sessions whose keys only the bank has."""
    (tmp_path / FILE).write_bytes(base64.b64encode(seal(mark(), RING)) + b"\n")
    bank = RedisBank("redis://127.0.0.1:1/0", RING)
    charon = FakeCharon()
    charon.reconciled.clear()
    [stub] = charon.stubs
    endings, writer = Endings(), WriteQueue(bank)
    lock_out = LockOut(Revocations(bank, RING, tmp_path), bank, cast(Charon, charon), endings, writer, GATEWAY)
    task = asyncio.create_task(lock_out.run())
    async with asyncio.timeout(5):
        await charon.news.wait()
    assert charon.ended == [{stub.spi_i + stub.spi_r}]
    assert stub.index in endings
    task.cancel()
    await writer.close(0.0)
    await bank.close()


async def test_a_session_that_only_the_bank_knows_is_ended_by_its_identity_while_the_bank_is_away(
    tmp_path: Path,
) -> None:
    (tmp_path / FILE).write_bytes(base64.b64encode(seal(mark(), RING)) + b"\n")
    bank = RedisBank("redis://127.0.0.1:1/0", RING)
    charon = FakeCharon()
    charon.reconciled.clear()
    charon.stubs = []

    def info(number: int, identity: str, eap_identity: str = "") -> SaInfo:
        own, peer = Endpoint(GATEWAY, 4500), Endpoint("198.51.100.7", 4500)
        ids = ("gw", identity, eap_identity, str(number))
        spi = number.to_bytes(8)
        return SaInfo("home", spi, spi, False, 2, "ESTABLISHED", own, peer, (), (), 0, None, None, (), *ids)

    other = info(2, "other@example")
    charon.unknown = [info(1, "Client@example"), other, info(3, "C=CH, CN=x", "client@example")]
    lock_out = LockOut(
        Revocations(bank, RING, tmp_path), bank, cast(Charon, charon), Endings(), WriteQueue(bank), GATEWAY
    )
    task = asyncio.create_task(lock_out.run())
    async with asyncio.timeout(5):
        while charon.unknown != [other]:
            await charon.news.wait()
            charon.news.clear()
    task.cancel()
    await bank.close()


@pytest.mark.redis
async def test_a_living_sa_is_ended_and_its_stub_deleted_and_one_that_comes_up_later_too(server: RedisServer) -> None:
    bank = RedisBank(server.url, RING)
    charon = FakeCharon()
    [stub] = charon.stubs
    other = msgspec.structs.replace(stub_of(), remote_id=Identity(3, b"other@example"))
    charon.stubs.append(other)
    await bank.store([stub, other])
    writer, endings = WriteQueue(bank), Endings()
    revocations = Revocations(bank, RING)
    lock_out = LockOut(revocations, bank, cast(Charon, charon), endings, writer, GATEWAY)
    await put(bank, mark())
    task = asyncio.create_task(lock_out.run())

    async def until_ended(count: int) -> None:
        for _ in range(200):
            if len(charon.ended) == count:
                return
            await asyncio.sleep(0.02)
        pytest.fail("not ended")

    await until_ended(1)
    await writer.flush()
    assert charon.ended == [{stub.spi_i + stub.spi_r}]
    assert stub.index in endings
    assert await bank.get([stub.index, other.index]) == [None, other]
    charon.stubs.append(stub_of())
    lock_out.soon()
    await until_ended(2)
    task.cancel()
    await writer.close()
    await bank.close()
