"""A bank in a Redis Cluster without any reachable node, or without one of them: nothing ends for good, the commands say
one line, and what other nodes have is served."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bank_support import GATEWAY, PASSWORD, PATIENCE, RedisServer, downloaded, ending, listed, stub_of
from bridge.bank import keyspace
from bridge.bank.interface import BankUnavailable
from bridge.bank.keyspace import Keyspace
from bridge.bank.redis_bank import RedisBank
from bridge.bank.redis_url import connect
from bridge.bank.write_queue import WriteQueue
from bridge.charon.charon import Charon
from bridge.gateway.heartbeat import Heartbeat
from bridge.gateway.metrics import GatewayMetrics
from bridge.lab.sidecar import program as sidecar
from bridge.service.tasks import SUPERVISED
from bridge.stub.keyring import Keyring, generate
from bridge.stub.stub import Stub
from test_bank_servers import cluster_url, three_nodes

pytestmark = pytest.mark.redis


@pytest.fixture
def nodes(tmp_path: Path, program: list[str]) -> Iterator[dict[int, RedisServer]]:
    """A Cluster of three primaries, which serves what it has while one of them is away."""
    with three_nodes(tmp_path, program, "--cluster-require-full-coverage", "no") as nodes:
        yield nodes


TRIES = 3


@pytest.fixture
def listened(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Gets an entry whenever the keyspace is about to be listened to."""
    attempts: list[object] = []

    def counted(url: str, timeout: float, **options: bool) -> Any:
        attempts.append(url)
        return connect(url, timeout, **options)

    monkeypatch.setattr(keyspace, "connect", counted)
    return attempts


class Vici:
    """Of a charon that answers."""

    async def version(self) -> str:
        return "5.9.8"


class Sidecar:
    """What of a gateway's sidecar speaks to its bank in the background."""

    def __init__(self, url: str, ring: Keyring) -> None:
        self.failed: list[str] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: self.failed.append(str(context.get(SUPERVISED, context)))
        )
        self.bank = RedisBank(url, ring, get_timeout=1.0)
        self.writer = WriteQueue(self.bank)
        self.hears = False
        self.keyspace = Keyspace(url, ("ike:*",), lambda _: None, self._heard)
        self.keyspace.start()
        reconciled = asyncio.Event()
        reconciled.set()
        charon = SimpleNamespace(alive=lambda: True, reconciled=reconciled, vici=Vici())

        self.refused = 0
        """heartbeats that the bank did not take, one after the other"""

        async def written(took: bool, *_: object) -> None:
            self.refused = 0 if took else self.refused + 1

        self.heartbeat = Heartbeat(self.bank, cast(Charon, charon), GATEWAY, GatewayMetrics(), 1.0, written)
        self.heartbeat.start()

    def _heard(self, hears: bool) -> None:
        self.hears = hears

    async def tries(self, listened: list[object]) -> None:
        """Wait until each part has tried for several times, so that what may fail on the first ways has failed:
        `listened` gets an entry at each attempt to listen."""
        before = len(listened)
        await until(lambda: self.refused >= TRIES and len(listened) - before >= TRIES)
        assert self.failed == []

    async def is_well(self) -> None:
        """Wait until all of it works, with a stub that is stored now."""
        stub = stub_of()
        self.writer.submit(stub)
        await until(lambda: self.heartbeat.bank_writable and self.hears)
        async with asyncio.timeout(PATIENCE):
            await self.writer.flush()
            await self.gives(stub)
        assert self.failed == []

    async def gives(self, stub: Stub) -> None:
        """Wait until a look-up gives the stub: a node that has just come back may say for a moment that the Cluster is
        down."""
        while True:
            with contextlib.suppress(BankUnavailable):
                if await self.bank.get([stub.index]) == [stub]:
                    return
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        await self.keyspace.close()
        await self.heartbeat.close()
        await self.writer.close()
        await self.bank.close()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(2 * PATIENCE):
        while not condition():  # noqa: ASYNC110 - there is no event of it
            await asyncio.sleep(0.05)


def kill(node: RedisServer) -> None:
    node.kill()


def freeze(node: RedisServer) -> None:
    node.freeze()


def back(node: RedisServer) -> None:
    node.thaw() if node.running else node.start()


@pytest.mark.parametrize("away", [kill, freeze])
async def test_a_cluster_may_be_away_and_come_back(
    nodes: dict[int, RedisServer], ring: Keyring, listened: list[object], away: Callable[[RedisServer], None]
) -> None:
    it = Sidecar(cluster_url(list(nodes)), ring)
    await it.is_well()
    for node in nodes.values():
        away(node)
    stub = stub_of()
    it.writer.submit(stub)
    await until(lambda: not it.heartbeat.bank_reachable)
    failures = it.writer.counters.failures
    await it.tries(listened)
    await until(lambda: it.writer.counters.failures - failures >= TRIES)
    assert it.failed == []
    for node in nodes.values():
        back(node)
    await it.is_well()
    async with asyncio.timeout(PATIENCE):
        await it.gives(stub)
    await it.close()


async def test_a_cluster_may_be_away_at_the_start(
    nodes: dict[int, RedisServer], ring: Keyring, listened: list[object]
) -> None:
    for node in nodes.values():
        node.kill()
    it = Sidecar(cluster_url(list(nodes)), ring)
    await it.tries(listened)
    assert not it.heartbeat.bank_reachable
    for call in (it.bank.ping(), downloaded(it.bank), listed(it.bank), it.bank.get([stub_of().index])):
        with pytest.raises(BankUnavailable):
            await call
    for node in nodes.values():
        node.start()
    await it.is_well()
    await it.close()


def at(nodes: dict[int, RedisServer], port: int, stub: Stub) -> bool:
    """Whether a stub's bucket is at a node: its slots are a third of all, in the order of the nodes."""
    slot = nodes[port].client.execute_command("CLUSTER KEYSLOT", stub.index.key)
    return bool(slot * 3 // 16384 == list(nodes).index(port))


@pytest.mark.parametrize("away", [kill, freeze])
async def test_without_one_node_what_the_others_have_is_served_and_deleted(
    nodes: dict[int, RedisServer], ring: Keyring, away: Callable[[RedisServer], None]
) -> None:
    bank = RedisBank(cluster_url(list(nodes)), ring, get_timeout=1.0)
    stubs = [stub_of(os.urandom(8)) for _ in range(60)]
    await bank.store(stubs)
    port = list(nodes)[1]
    lost = [stub for stub in stubs if at(nodes, port, stub)]
    kept = [stub for stub in stubs if stub not in lost]
    assert lost
    assert kept
    away(nodes[port])
    assert await bank.get([stub.index for stub in [*kept, *lost]]) == [*kept, *([None] * len(lost))]
    # no mark there is known, and that is not the same as none
    assert await bank.moved([kept[0].index, lost[0].index]) == [False, None]
    # the next look-up does not even wait
    began = time.monotonic()
    assert await bank.get([kept[0].index, lost[0].index]) == [kept[0], None]
    assert time.monotonic() - began < 0.5
    # changes of its buckets wait, and hold up no others
    writer = WriteQueue(bank)
    for stub in stubs:
        writer.submit_delete(stub.index, expires=stub.expires)
    await until(lambda: 0 < writer.pending <= len(lost))
    assert not any(await bank.get([stub.index for stub in kept]))
    back(nodes[port])
    async with asyncio.timeout(2 * PATIENCE):
        await writer.flush()
    assert all(await bank.ended([stub.index for stub in stubs]))
    assert await bank.delete([ending(stub) for stub in stubs]) == [False] * len(stubs)
    await writer.close()
    await bank.close()


async def test_a_node_that_hangs_holds_one_write_and_none_after_it(
    nodes: dict[int, RedisServer], ring: Keyring
) -> None:
    bank = RedisBank(cluster_url(list(nodes)), ring, timeout=3.0)
    stubs = [stub_of(os.urandom(8)) for _ in range(60)]
    port = list(nodes)[1]
    lost = frozenset(stub.index for stub in stubs if at(nodes, port, stub))
    await bank.store(stubs)
    nodes[port].freeze()
    began = time.monotonic()
    with pytest.raises(BankUnavailable):
        await bank.store(stubs)
    assert time.monotonic() - began < 6.0
    began = time.monotonic()
    with pytest.raises(BankUnavailable) as raised:
        await bank.store(stubs)
    assert time.monotonic() - began < 2.0
    assert raised.value.left == lost
    nodes[port].thaw()
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(BankUnavailable):
                assert await bank.store(stubs) == [True] * len(stubs)
                break
            await asyncio.sleep(0.1)
    await bank.close()


@pytest.mark.parametrize("command", [("stubs", "list"), ("check",)])
def test_without_a_reachable_node_a_command_prints_no_traceback(tmp_path: Path, command: tuple[str, ...]) -> None:
    generate(tmp_path / "bank.key")
    file = tmp_path / "gateway.yaml"
    url = f"redis+cluster://gateway:{PASSWORD}@127.0.0.1:1,127.0.0.1:2"
    file.write_text(f"bank: {{url: '{url}', key_file: {tmp_path}/bank.key}}\n")
    done = subprocess.run([*sidecar(), *command, "-c", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    if command == ("stubs", "list"):
        assert done.stderr.count("\n") == 1
    else:
        assert len([line for line in done.stdout.splitlines() if "is bank.url right" in line]) == 1
