"""The bank's Redis as operators set it up: with users, by Sentinel, as a Cluster."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

import redis
from bank_support import GATEWAY, PASSWORD, PATIENCE, RedisServer, downloaded, ending, listed, shipped_users, stub_of
from bridge.bank.interface import BankUnavailable
from bridge.bank.keyspace import Keyspace
from bridge.bank.redis_bank import RedisBank
from bridge.bank.redis_url import connect
from bridge.check import Grade
from bridge.check.bank import bank as check_bank
from bridge.config import BankConfig, GatewayConfig
from bridge.stub.keyring import Keyring

pytestmark = pytest.mark.redis


# users


@pytest.fixture
def guarded(tmp_path: Path, program: list[str]) -> Iterator[RedisServer]:
    """A server with the shipped users."""
    settings = shipped_users(tmp_path / "users.acl")
    with RedisServer(tmp_path, *settings, program=program, username="admin", password=PASSWORD) as server:
        yield server


async def test_a_gateway_needs_no_more_than_the_shipped_rights(guarded: RedisServer) -> None:
    old, new = {b"old1": os.urandom(32)}, {b"new1": os.urandom(32)}
    ring = Keyring(old)
    bank = RedisBank(f"unix://gateway:{PASSWORD}@{guarded.socket}", ring, get_timeout=5.0)
    stub, other = stub_of(), stub_of()
    await bank.ping()
    await bank.store([stub, other])
    entries = await bank.addresses([("10.20.0.7", "10.20.0.7")])
    assert {entry.of for entry in entries} == {stub.index, other.index}
    await bank.forget_addresses(entries)
    assert not await bank.addresses([("10.20.0.0", "10.20.255.255")])
    assert await bank.get([stub.index]) == [stub]
    assert await bank.look([stub.index]) == [(stub, False)]
    assert await bank.revisions([stub.index]) == [1]
    stub = msgspec.structs.replace(stub, revision=2, remote_vips=())
    assert await bank.store([stub]) == [True]
    assert await bank.get([stub.index]) == [stub]
    assert len(await downloaded(bank)) == 2
    assert len(await listed(bank)) == 2
    await bank.heartbeat(GATEWAY, 10)
    assert (await bank.gateways())[GATEWAY].alive
    await bank.post("stats", GATEWAY, "{}", 10)
    assert await bank.delete([ending(stub)]) == [True]
    assert await bank.ended([stub.index]) == [True]
    assert [each.index async for page in bank.endings() for each in page] == [stub.index]
    ring.replace(Keyring(new | old))
    ring.prefer(new)
    assert await bank.reseal(GATEWAY) == 1
    await bank.close()


async def test_a_gateway_may_watch_the_keyspace(guarded: RedisServer, ring: Keyring) -> None:
    url = f"unix://gateway:{PASSWORD}@{guarded.socket}"
    heard: asyncio.Queue[str] = asyncio.Queue()
    ready = asyncio.Event()
    keyspace = Keyspace(url, ("ike:gateway:*",), lambda event: heard.put_nowait(event.key), lambda _: ready.set())
    keyspace.start()
    bank = RedisBank(url, ring, get_timeout=5.0)
    async with asyncio.timeout(PATIENCE):
        await ready.wait()
        await bank.heartbeat(GATEWAY, 10)
        assert await heard.get() == f"ike:gateway:{GATEWAY}"
    await keyspace.close()
    await bank.close()


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ("Kg$hzxe", "sends its keyspace events"),
        ("Kg$h", "sends no events for expired"),
        ("", "sends no events for del, expired, hset, set"),
    ],
)
async def test_check_receives_with_a_gateways_rights_the_events_of_the_bank(
    guarded: RedisServer, events: str, told: str
) -> None:
    guarded.client.config_set("notify-keyspace-events", events)
    config = GatewayConfig(bank=BankConfig(url=f"unix://gateway:{PASSWORD}@{guarded.socket}"))
    [found] = [finding for finding in await check_bank(config, None) if finding.name == "keyspace events"]
    assert told in found.text
    assert (found.grade is Grade.OK) == (events == "Kg$hzxe")


@pytest.mark.parametrize("user", ["gateway", "monitor"])
@pytest.mark.parametrize("command", ["FLUSHALL", "CONFIG SET maxmemory 1", "SET other 1", "GET other", "KEYS *"])
def test_the_shipped_users_may_do_nothing_else(guarded: RedisServer, user: str, command: str) -> None:
    client = redis.Redis(unix_socket_path=str(guarded.socket), username=user, password=PASSWORD)
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command.split())  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("user", ["gateway", "monitor"])
def test_the_shipped_users_read_no_settings(guarded: RedisServer, user: str) -> None:
    """masterauth and the passphrase of the TLS key are among them."""
    client = redis.Redis(unix_socket_path=str(guarded.socket), username=user, password=PASSWORD)
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.config_get("*")


async def test_a_script_without_end_is_killed_by_the_gateways(guarded: RedisServer, ring: Keyring) -> None:
    bank = RedisBank(f"unix://gateway:{PASSWORD}@{guarded.socket}", ring, get_timeout=5.0)
    stub = stub_of()
    await bank.store([stub])

    def hang() -> None:
        client: Any = redis.Redis(unix_socket_path=str(guarded.socket), username="gateway", password=PASSWORD)
        with pytest.raises(redis.exceptions.RedisError):
            client.evalsha(client.script_load("while true do end"), 0)

    hanging = asyncio.create_task(asyncio.to_thread(hang))
    deadline = time.monotonic() + PATIENCE
    await asyncio.sleep(0.1)
    while True:
        try:
            assert await bank.get([stub.index]) == [stub]
        except BankUnavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        else:
            break
    await hanging
    assert time.monotonic() < deadline
    await bank.close()


async def test_a_monitor_reads_who_a_stub_is_of(guarded: RedisServer, ring: Keyring) -> None:
    bank = RedisBank(f"unix://gateway:{PASSWORD}@{guarded.socket}", ring, get_timeout=5.0)
    stub = stub_of()
    await bank.store([stub])
    client = redis.Redis(unix_socket_path=str(guarded.socket), username="monitor", password=PASSWORD)
    shown = client.hgetall(stub.index.key)
    assert (shown[b"id_i"], shown[b"vips"]) == (b"client@example", b"10.20.0.7")
    await bank.close()


def test_a_monitor_changes_nothing(guarded: RedisServer) -> None:
    client = redis.Redis(unix_socket_path=str(guarded.socket), username="monitor", password=PASSWORD)
    assert client.hmget(stub_of().index.key, "id_i") == [None]
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.hset(stub_of().index.key, "id_i", "forged")


# Sentinel and Cluster


_given: set[int] = set()
"""a port that was free a moment ago is given once: its server may not listen yet"""


def free_port() -> int:
    """A TCP port of loopback that no process uses, and whose cluster bus port is a valid one."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port: int = listener.getsockname()[1]
        if port < 55_000 and port not in _given:
            _given.add(port)
            return port


@contextmanager
def three_primaries(tmp_path: Path, program: list[str], *more: str, option: str = "--port") -> Iterator[list[int]]:
    """The ports of a Cluster of three primaries with the shipped users; `option` sets the port that serves."""
    with three_nodes(tmp_path, program, *more, option=option) as nodes:
        yield list(nodes)


@contextmanager
def three_nodes(
    tmp_path: Path, program: list[str], *more: str, option: str = "--port"
) -> Iterator[dict[int, RedisServer]]:
    """The servers of such a Cluster, by port."""
    ports = [free_port() for _ in range(3)]
    with ExitStack() as stack:
        clients = []
        nodes: dict[int, RedisServer] = {}
        for epoch, (port, bounds) in enumerate(zip(ports, ((0, 5460), (5461, 10922), (10923, 16383)), strict=True), 1):
            directory = tmp_path / str(port)
            directory.mkdir()
            settings = ("--cluster-enabled", "yes", option, str(port), *shipped_users(directory / "users.acl"), *more)
            node = stack.enter_context(
                RedisServer(directory, *settings, program=program, username="admin", password=PASSWORD)
            )
            node.client.execute_command("CLUSTER ADDSLOTSRANGE", *bounds)
            # as redis-cli does: nodes of one epoch change it among themselves, while a test moves slots by it
            node.client.execute_command("CLUSTER SET-CONFIG-EPOCH", epoch)
            node.client.execute_command("CLUSTER MEET", "127.0.0.1", ports[0])
            clients.append(node.client)
            nodes[port] = node
        deadline = time.monotonic() + PATIENCE
        while not all(whole(client) for client in clients):
            assert time.monotonic() < deadline, "the Cluster does not form"
            time.sleep(0.1)
        yield nodes


@pytest.fixture
def cluster(tmp_path: Path, program: list[str]) -> Iterator[list[int]]:
    """The ports of a Cluster of three primaries with the shipped users."""
    with three_primaries(tmp_path, program) as ports:
        yield ports


def cluster_url(ports: list[int]) -> str:
    """The URL of a Cluster for a gateway."""
    return f"redis+cluster://gateway:{PASSWORD}@" + ",".join(f"127.0.0.1:{port}" for port in ports)


def admin(port: int) -> Any:
    """A client for looking at a node, and for managing it; untyped, since redis-py leaves open what replies are."""
    return redis.Redis(port=port, username="admin", password=PASSWORD)


def whole(client: Any) -> bool:
    """Whether a node knows the other two and finds every slot served."""
    info = client.execute_command("CLUSTER INFO")
    return bool(info["cluster_known_nodes"] == "3" and info["cluster_state"] == "ok")


async def test_a_cluster_is_a_bank_like_any_other(cluster: list[int], ring: Keyring) -> None:
    bank = RedisBank(cluster_url(cluster), ring, get_timeout=5.0)
    stubs = [stub_of() for _ in range(600)]
    assert all(await bank.store(stubs))
    assert await bank.get([stub.index for stub in stubs]) == stubs
    assert {entry.of for entry in await bank.addresses([("10.0.0.0", "10.255.255.255")])} == {
        stub.index for stub in stubs
    }
    assert len(await downloaded(bank)) == 600
    assert len(await listed(bank)) == 600
    assert all(admin(port).dbsize() for port in cluster)
    for port in cluster:
        admin(port).script_flush()
    assert all(await bank.delete([ending(stub) for stub in stubs]))
    await bank.heartbeat(GATEWAY, 10)
    assert await bank.ping() > 0
    await bank.close()


@pytest.fixture
def sentinel(tmp_path: Path, program: list[str]) -> Iterator[int]:
    """The port of a Sentinel that watches a primary named `bank`."""
    port, sentinel_port = free_port(), free_port()
    watcher = tmp_path / "sentinel"
    watcher.mkdir()
    conf = watcher / "sentinel.conf"
    conf.write_text(f"sentinel monitor bank 127.0.0.1 {port} 1\n")
    settings = ("--port", str(sentinel_port), "--sentinel")
    with (
        RedisServer(tmp_path, "--port", str(port), program=program),
        RedisServer(watcher, *settings, program=program, conf=conf),
    ):
        yield sentinel_port


async def test_sentinel_leads_to_the_primary(sentinel: int, ring: Keyring) -> None:
    bank = RedisBank(f"redis+sentinel://127.0.0.1:{sentinel}/bank/0", ring, get_timeout=5.0)
    stub = stub_of()
    await bank.store([stub])
    assert await bank.get([stub.index]) == [stub]
    await bank.close()


@pytest.mark.parametrize(
    "url",
    [
        "http://host",
        "redis+sentinel://host",
        "redis+sentinel://host/service/database",
        "redis+cluster://host:port",
        "redis+cluster://",
    ],
)
def test_a_url_of_no_known_form_is_refused_without_repeating_it(url: str) -> None:
    url = url.replace("://", "://user:pa55word@")
    with pytest.raises(ValueError, match=r"URL|must start with one of redis://") as caught:
        connect(url, 1.0)
    assert "pa55word" not in str(caught.value)
