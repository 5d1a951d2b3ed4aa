"""Sessions that had traffic last are announced first: what a gateway posts of them, and what another one does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import redis
from bank_support import PASSWORD, PATIENCE, RedisServer, keyring, stub_of
from bridge.bank import recent_traffic, replica_in
from bridge.bank.interface import DOWNLOAD_BATCH, StubBank
from bridge.bank.keyspace import Event
from bridge.bank.prefetch import Prefetch
from bridge.bank.recent_traffic import OCTETS_MAX, SESSIONS_MAX, TTL, decode, encode
from bridge.bank.redis_bank import RedisBank
from bridge.bank.replicated import ReplicatedBank
from bridge.charon.ike_sa import sa_of
from bridge.charon.vici_types import ChildInfo, SaInfo, parse_ike_sa
from bridge.config import FailoverConfig
from bridge.gateway.announced_failure import HEAD_START
from bridge.gateway.announcer import LIVES, TRIAL, TRIAL_SECONDS
from bridge.gateway.failover import Failover
from bridge.gateway.other_gateways import order
from bridge.gateway.traffic_times import LATELY_SECONDS, TrafficTimes
from bridge.ike.stub_exchange import parse_stub_message
from bridge.stub import bank_keys
from bridge.stub.stub import Index, Stub
from role_support import Wire, fake_charon
from test_bank_servers import cluster_url, three_primaries
from test_sa_tracker import Clock, tracker

DEAD, HERE, LIVING = "192.0.2.1", "192.0.2.2", "192.0.2.3"


def index_of(number: int, gateway: str = DEAD) -> Index:
    return Index(gateway, number.to_bytes(8))


# what is posted


def test_what_is_posted_is_read_again_in_the_same_order() -> None:
    sessions = [index_of(9), index_of(2, "2001:db8::1"), index_of(5)]
    assert decode(encode(sessions).encode()) == sessions


def test_no_more_sessions_are_posted_or_read_than_are_announced_first() -> None:
    text = encode(index_of(number, "2001:db8:1111:2222:3333:4444:5555:6666") for number in range(2 * SESSIONS_MAX))
    assert len(text) < OCTETS_MAX
    assert len(decode(text.encode())) == SESSIONS_MAX
    longer = b"[" + b",".join([b'"192.0.2.1/0000000000000001"'] * 2 * SESSIONS_MAX) + b"]"
    assert decode(longer) == [index_of(1)]


JUNK = [
    b"",
    b"{",
    b"[1]",
    b'"192.0.2.1/0000000000000001"',
    b'["192.0.2.1"]',
    b'["192.0.2.1/0000000000000001", "x"]',
    b'["\xff/0000000000000001"]',
    b'["fe80::1%*/0000000000000001"]' + b" " * OCTETS_MAX,
    b"[" * 50_000,
]


@pytest.mark.parametrize("octets", [*JUNK, None, "text"])
def test_what_no_gateway_posts_says_nothing(octets: object) -> None:
    assert decode(octets) == []


@given(st.binary())
def test_any_octets_are_read_without_harm(octets: bytes) -> None:
    decode(octets)


# what charon lists


def listed(stub: Stub, *idle: int | None) -> SaInfo:
    """What VICI lists of a session, whose CHILD_SAs got their last packets so many seconds ago."""
    info = parse_ike_sa(
        "home", {"initiator-spi": stub.spi_i.hex().encode(), "responder-spi": stub.spi_r.hex().encode()} | ENDPOINTS
    )
    children = [ChildInfo("net", "INSTALLED", number, idle_in=seconds) for number, seconds in enumerate(idle)]
    return info._replace(children=tuple(children))


ENDPOINTS: dict[str, Any] = {"local-host": DEAD.encode(), "remote-host": b"198.51.100.7"}


def test_charons_list_says_when_the_last_packet_came_in() -> None:
    child = {"name": b"net", "state": b"INSTALLED", "use-in": b"7", "packets-in": b"1"}
    section = {"initiator-spi": b"00" * 8, "responder-spi": b"00" * 8, "child-sas": {"net-1": child}} | ENDPOINTS
    assert parse_ike_sa("home", section).children[0].idle_in == 7


def test_the_session_with_the_latest_traffic_is_the_first() -> None:
    known, _, clock = tracker()
    times = TrafficTimes(known, clock=clock)
    stubs = [stub_of() for _ in range(5)]
    for stub in stubs:
        sa = sa_of(stub)
        known.sas[sa.id.spis] = sa
    old, idle, two_children, just_now, never = stubs
    times.told(listed(old, 30))
    times.told(listed(idle, int(LATELY_SECONDS) + 1))
    times.told(listed(two_children, None, 5))
    times.told(listed(just_now, 0))
    times.told(listed(never, None))
    assert times.changed
    assert times.latest() == [just_now.index, two_children.index, old.index]
    assert not times.changed
    # the next list, a minute later
    clock.now += 60
    times.told(listed(just_now, 61))
    times.told(listed(old, 1))
    del known.sas[two_children.spi_i + two_children.spi_r]
    assert times.latest() == [old.index]


def test_a_session_without_a_stub_is_not_named() -> None:
    known, _, clock = tracker()
    times, stub = TrafficTimes(known, clock=clock), stub_of()
    sa = sa_of(stub)
    sa.published_at = ""
    known.sas[sa.id.spis] = sa
    times.told(listed(stub, 0))
    assert times.latest() == []


# what another gateway does with it


class Survivor:
    """The gateway HERE, with its real bank."""

    def __init__(self, bank: StubBank, clock: Callable[[], float] = time.monotonic) -> None:
        self.bank = bank
        self.wire = Wire()
        self.prefetch = Prefetch(bank)
        charon, _, _ = fake_charon("home")
        self.failover = Failover(
            FailoverConfig(rate=100_000), HERE, bank, self.prefetch, charon, self.wire, lambda index: False, clock=clock
        )

    async def sees_fail(self, gateway: str) -> None:
        """The heartbeat of another gateway is there, and then that gateway takes it away."""
        await self.failover.own_heartbeat(True, 0.0, [gateway])
        self.failover.heartbeat_event(Event(bank_keys.heartbeat_key(gateway), "del"))

    def announced(self) -> list[bytes]:
        """The responder's SPIs of the sessions, in the order of their first announcements."""
        return list(dict.fromkeys(parse_stub_message(octets).spi_r for _, octets in self.wire.sent))

    async def has_announced(self, count: int) -> list[bytes]:
        async with asyncio.timeout(PATIENCE):
            while len(self.announced()) < count:  # noqa: ASYNC110 - there is no event of it
                await asyncio.sleep(0.01)
        return self.announced()

    async def close(self) -> None:
        await self.failover.close()
        await self.prefetch.close()


class Places:
    """The bank of the gateway that will fail, and that of HERE: in one Redis, in a Cluster, or a Redis each."""

    def __init__(self, directory: Path, stack: AsyncExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self._ring = keyring()
        self.client: Any = None
        """a client for tampering with the first of them"""

    async def open(self, kind: str) -> tuple[StubBank, StubBank]:
        """Both."""
        both = await self._distributed() if kind == "distributed" else self._shared(kind)
        for bank in both:
            self._stack.push_async_callback(bank.close)
        return both

    def _server(self, name: str) -> RedisServer:
        server = self._stack.enter_context(RedisServer(self._directory / name))
        self.client = self.client or server.client
        return server

    def _shared(self, kind: str) -> tuple[StubBank, StubBank]:
        if kind == "one":
            url = self._server(kind).url
        else:
            ports = self._stack.enter_context(three_primaries(self._directory, ["redis-server"]))
            url = cluster_url(ports)
            self.client = redis.RedisCluster("127.0.0.1", ports[0], username="admin", password=PASSWORD)
        return self.bank(url), self.bank(url)

    def bank(self, url: str) -> RedisBank:
        return RedisBank(url, self._ring, get_timeout=5.0)

    async def _distributed(self) -> tuple[StubBank, StubBank]:
        urls = {name: self._server(name).url for name in (DEAD, HERE)}
        banks = []
        for near, far in ((DEAD, HERE), (HERE, DEAD)):
            tiers = [replica_in(name, urls[name], self.bank(urls[name])) for name in (near, far)]
            banks.append(ReplicatedBank(tiers[0], None, tiers[1:], copies=1, peer_timeout=5.0))
            await banks[-1].start()
        return banks[0], banks[1]


@pytest.fixture
async def places(tmp_path: Path) -> AsyncIterator[Places]:
    async with AsyncExitStack() as stack:
        yield Places(tmp_path, stack)


def stubs_of(count: int, gateway: str = DEAD) -> list[Stub]:
    """Their SPIs are spread over the buckets."""
    return [
        stub_of((number * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8), gateway=gateway) for number in range(1, count + 1)
    ]


@pytest.mark.redis
@pytest.mark.parametrize("kind", ["one", "cluster", "distributed"])
async def test_the_sessions_with_traffic_are_announced_before_hundreds_of_idle_ones(places: Places, kind: str) -> None:
    of_dead, of_here = await places.open(kind)
    stubs = stubs_of(400)
    await of_dead.store(stubs)
    busy = stubs[100:120]
    # more than the trial, and one that is gone
    await of_dead.post(
        bank_keys.TRAFFIC_KIND, DEAD, encode([index_of(1), *(stub.index for stub in busy)]), recent_traffic.TTL
    )
    survivor = Survivor(of_here)
    survivor.failover.start()
    await survivor.sees_fail(DEAD)
    announced = await survivor.has_announced(len(stubs))
    assert announced[: len(busy)] == [stub.spi_r for stub in busy]
    assert sorted(announced) == sorted(stub.spi_r for stub in stubs)
    await survivor.close()


@pytest.mark.redis
async def test_clients_with_traffic_do_not_wait_for_the_download_of_all_stubs(places: Places) -> None:
    of_dead, of_here = await places.open("one")
    stubs = stubs_of(30)
    await of_dead.store(stubs)
    await of_dead.post(bank_keys.TRAFFIC_KIND, DEAD, encode(stub.index for stub in stubs[:3]), TTL)
    clock = Clock()
    survivor = Survivor(of_here, clock)
    survivor.failover.start()
    clock.now = 1.0
    await survivor.sees_fail(DEAD)
    await survivor.has_announced(3)
    assert survivor.prefetch.progress == {}
    # they do not come
    clock.now += HEAD_START
    await survivor.has_announced(TRIAL)
    clock.now += TRIAL_SECONDS
    await survivor.has_announced(30)
    assert survivor.prefetch.progress[DEAD].stubs == 30
    await survivor.close()


FORGED: dict[str, Callable[[Any, str], object]] = {
    "a list": lambda client, key: client.rpush(key, "192.0.2.1/0000000000000001"),
    "a hash": lambda client, key: client.hset(key, "a", "b"),
    "a set": lambda client, key: client.sadd(key, "x"),
    "no JSON": lambda client, key: client.set(key, b"\xff{"),
    "numbers": lambda client, key: client.set(key, "[1, 2]"),
    "too long": lambda client, key: client.set(key, "[" + " " * OCTETS_MAX + "]"),
}


@pytest.mark.redis
@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize("kind", ["one", "cluster"])
async def test_what_was_forged_changes_nothing_but_the_order(places: Places, kind: str, forged: str) -> None:
    of_dead, of_here = await places.open(kind)
    stubs = stubs_of(30)
    await of_dead.store(stubs)
    FORGED[forged](places.client, bank_keys.posted_key(bank_keys.TRAFFIC_KIND, DEAD))
    survivor = Survivor(of_here)
    survivor.failover.start()
    await survivor.sees_fail(DEAD)
    assert sorted(await survivor.has_announced(len(stubs))) == sorted(stub.spi_r for stub in stubs)
    await survivor.close()


@pytest.mark.redis
async def test_the_sessions_of_a_gateway_that_lives_are_not_announced_because_they_were_named(places: Places) -> None:
    of_dead, of_here = await places.open("one")
    stub = next(one for one in stubs_of(9) if order(one.index, [HERE, LIVING])[0] == HERE)
    [foreign] = stubs_of(1, LIVING)
    await of_dead.store([stub, foreign])
    await of_dead.heartbeat(LIVING, 60)
    await of_dead.post(bank_keys.TRAFFIC_KIND, DEAD, encode([foreign.index, stub.index]), TTL)
    survivor = Survivor(of_here)
    survivor.failover.start()
    await survivor.sees_fail(DEAD)
    await survivor.has_announced(1)
    assert [row["stubs"] for row in survivor.failover.status()] == [1]
    assert survivor.announced() == [stub.spi_r]
    await survivor.close()


@pytest.mark.redis
async def test_what_was_posted_expires(places: Places) -> None:
    of_dead, _ = await places.open("one")
    await of_dead.post(bank_keys.TRAFFIC_KIND, DEAD, encode([index_of(1)]), TTL)
    assert 0 < places.client.ttl(bank_keys.posted_key(bank_keys.TRAFFIC_KIND, DEAD)) <= TTL


class Slow(RedisBank):
    """A bank that never says what was posted about traffic."""

    async def posted(self, kind: str, gateway: str) -> bytes | None:
        if kind == bank_keys.TRAFFIC_KIND:
            await asyncio.Event().wait()
        return await super().posted(kind, gateway)


@pytest.mark.redis
async def test_a_bank_that_is_slow_to_say_keeps_no_session_waiting(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        bank = Slow(server.url, keyring(), get_timeout=5.0)
        stubs = stubs_of(3)
        await bank.store(stubs)
        survivor = Survivor(bank)
        survivor.failover.start()
        await survivor.sees_fail(DEAD)
        assert len(await survivor.has_announced(len(stubs))) == len(stubs)
        await survivor.close()
        await bank.close()


class HeldBack(RedisBank):
    """A bank whose stubs cannot be downloaded before `go`."""

    go: asyncio.Event

    async def download(self, gateway: str, batch: int = DOWNLOAD_BATCH) -> AsyncGenerator[list[Stub]]:
        await self.go.wait()
        async with aclosing(super().download(gateway, batch)) as pages:
            async for page in pages:
                yield page


@pytest.mark.redis
@pytest.mark.parametrize("lives", [True, False], ids=["a-client-said-that-it-lives", "back"])
async def test_a_gateway_that_fails_again_while_its_stubs_are_read_is_announced_again(
    tmp_path: Path, lives: bool
) -> None:
    with RedisServer(tmp_path) as server:
        bank = HeldBack(server.url, keyring(), get_timeout=5.0)
        bank.go = asyncio.Event()
        stubs = stubs_of(TRIAL - 1)
        await bank.store(stubs)
        await bank.post(bank_keys.TRAFFIC_KIND, DEAD, encode(stub.index for stub in stubs[:3]), TTL)
        survivor = Survivor(bank)
        survivor.failover.start()
        await survivor.sees_fail(DEAD)
        await survivor.has_announced(3)
        survivor.failover.heartbeat_event(Event(bank_keys.heartbeat_key(DEAD), "set"))
        if lives:
            survivor.failover._announcer.end(DEAD, LIVES, time.monotonic())
        new = stub_of((99).to_bytes(8))
        await bank.store([new])
        await survivor.sees_fail(DEAD)
        bank.go.set()
        announced = await survivor.has_announced(TRIAL)
        assert sorted(announced) == sorted(stub.spi_r for stub in [*stubs, new])
        # a client that says that it lives only delays the announcements of the second failure
        assert not survivor.failover._announcer._failures[DEAD].back
        await survivor.close()
        await bank.close()
