"""Rotation of the bank's keys, between gateways that share a real Redis."""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import structlog

from bank_support import PATIENCE, RedisServer, stub_of
from bridge.bank.key_file import KeyFile
from bridge.bank.key_rotation import KeyRotation, Pace
from bridge.bank.redis_bank import RedisBank
from bridge.service.tasks import end
from bridge.stub.keyring import Keyring, generate

pytestmark = pytest.mark.redis

ONE, TWO = "192.0.2.1", "192.0.2.2"
SETTLE = 1.0
LOOK = 0.05
SHARED = "192.0.2.100"


class Sidecar:
    """What of a gateway's sidecar has to do with keys: its key file, bank, heartbeat and rotation."""

    def __init__(self, address: str, file: Path, url: str) -> None:
        self.address = address
        self.file = file
        self.ring = Keyring.load(file)
        self.bank = RedisBank(url, self.ring, get_timeout=5.0)
        self.later = 0.0
        """seconds that its clock is ahead of this one"""
        self.rotation = KeyRotation(
            self.bank,
            KeyFile(self.ring, file),
            address,
            shared=(SHARED,),
            pace=Pace(settle=SETTLE, look=LOOK),
            wall=lambda: time.time() + self.later,
        )
        self.beating = True
        self._tasks = [asyncio.create_task(self.rotation.run()), asyncio.create_task(self._beat())]

    async def _beat(self) -> None:
        while True:
            if self.beating:
                await self.bank.heartbeat(self.address, SETTLE)
            await asyncio.sleep(SETTLE / 4)

    async def close(self) -> None:
        await end(*self._tasks)
        await self.bank.close()

    @property
    def ids(self) -> list[str]:
        """The ids of the keys in the file."""
        return [line[:8] for line in self.file.read_text().splitlines() if not line.startswith("#")]

    @property
    def sealing(self) -> str:
        return self.ring.sealing.hex()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
async def pair(server: RedisServer, tmp_path: Path) -> AsyncIterator[tuple[Sidecar, Sidecar]]:
    files = tmp_path / "one.key", tmp_path / "two.key"
    generate(files[0])
    files[1].write_bytes(files[0].read_bytes())
    files[1].chmod(0o600)
    async with AsyncExitStack() as stack:
        sidecars = [Sidecar(*given, server.url) for given in zip((ONE, TWO), files, strict=True)]
        for sidecar in sidecars:
            stack.push_async_callback(sidecar.close)
        yield sidecars[0], sidecars[1]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - there is no event of it
            await asyncio.sleep(0.02)


async def has_loaded(sidecar: Sidecar) -> None:
    await until(lambda: sidecar.rotation.status()["keys"] == sidecar.ids)


def give(sidecar: Sidecar, other: Sidecar) -> None:
    """Copy the key file of `other`, as an operator does."""
    sidecar.file.write_bytes(other.file.read_bytes())


async def test_a_new_key_does_not_seal_while_a_living_gateway_lacks_it(pair: tuple[Sidecar, Sidecar]) -> None:
    one, _ = pair
    old = one.sealing
    generate(one.file, add=True)
    await has_loaded(one)
    await asyncio.sleep(2 * SETTLE)
    assert one.sealing == old


async def test_a_new_key_seals_everywhere_and_what_was_sealed_before_is_sealed_again(
    pair: tuple[Sidecar, Sidecar], server: RedisServer
) -> None:
    one, two = pair
    stubs = [stub_of(gateway=ONE) for _ in range(300)] + [stub_of(gateway=TWO) for _ in range(300)]
    # an address that both share
    stubs += [stub_of(gateway=SHARED) for _ in range(50)]
    await one.bank.store(stubs)
    new = generate(one.file, add=True)
    give(two, one)
    await until(lambda: one.sealing == two.sealing == new)
    await until(lambda: one.rotation.status()["resealed"] and two.rotation.status()["resealed"])
    client = server.client
    assert {client.hget(stub.index.key, "sealed")[:4].hex() for stub in stubs} == {new}
    # the old key may go now, and every stub still opens
    old = one.ids[1]
    for sidecar in pair:
        lines = sidecar.file.read_text().splitlines(keepends=True)
        sidecar.file.write_text("".join(line for line in lines if not line.startswith(old)))
        await has_loaded(sidecar)
    assert await two.bank.get([stub.index for stub in stubs]) == stubs


async def test_at_every_moment_of_a_rotation_every_gateway_opens_every_stub(pair: tuple[Sidecar, Sidecar]) -> None:
    one, two = pair
    stubs = []

    async def store_and_get() -> None:
        stub = stub_of(gateway=ONE)
        stubs.append(stub)
        await one.bank.store([stub])
        for sidecar in pair:
            sample = stubs[-50:]
            assert await sidecar.bank.get([stub.index for stub in sample]) == sample

    new = generate(one.file, add=True)
    for _ in range(20):
        await store_and_get()
    give(two, one)
    async with asyncio.timeout(PATIENCE):
        while not one.sealing == two.sealing == new:
            await store_and_get()
    for _ in range(20):
        await store_and_get()


async def test_a_redis_that_was_emptied_and_names_no_gateway_does_not_let_a_new_key_seal(
    pair: tuple[Sidecar, Sidecar], server: RedisServer
) -> None:
    one, two = pair
    old = one.sealing
    generate(one.file, add=True)
    await has_loaded(one)
    two.beating = False
    server.client.flushdb()
    await asyncio.sleep(SETTLE / 2)
    two.beating = True
    await asyncio.sleep(2 * SETTLE)
    assert one.sealing == old


async def test_a_gateway_that_starts_seals_as_those_that_live_can_open(
    pair: tuple[Sidecar, Sidecar], server: RedisServer, tmp_path: Path
) -> None:
    one, _ = pair
    old = one.sealing
    await until(lambda: server.client.exists(f"ike:gateway:{TWO}") == 1)
    file = tmp_path / "three.key"
    file.write_bytes(one.file.read_bytes())
    file.chmod(0o600)
    generate(file, add=True)
    three = Sidecar("192.0.2.3", file, server.url)
    assert three.sealing == old
    await asyncio.sleep(2 * SETTLE)
    assert three.sealing == old
    await three.close()


async def test_a_gateway_alone_uses_the_first_key_of_its_file(pair: tuple[Sidecar, Sidecar]) -> None:
    one, two = pair
    await two.close()
    new = generate(one.file, add=True)
    await until(lambda: one.sealing == new)


@pytest.mark.parametrize("content", ["", "nonsense\n"])
async def test_a_spoilt_key_file_leaves_the_keys_in_memory_in_use(pair: tuple[Sidecar, Sidecar], content: str) -> None:
    one, _ = pair
    ids = one.ids
    one.file.write_text(content)
    await asyncio.sleep(5 * LOOK)
    assert one.rotation.status()["keys"] == ids
    # and the next good one is taken
    one.file.write_text(f"{os.urandom(4).hex()} {base64.b64encode(os.urandom(32)).decode()}\n")
    await has_loaded(one)


async def test_the_key_of_the_next_epoch_seals_once_all_have_it_and_replaces_the_one_before_in_the_file(
    server: RedisServer, tmp_path: Path
) -> None:
    files = tmp_path / "one.key", tmp_path / "two.key"
    first = generate(files[0], epoch=86_400)
    files[1].write_bytes(files[0].read_bytes())
    files[1].chmod(0o600)
    async with AsyncExitStack() as stack:
        one, two = (Sidecar(*given, server.url) for given in zip((ONE, TWO), files, strict=True))
        for sidecar in (one, two):
            stack.push_async_callback(sidecar.close)
        stub = stub_of(gateway=ONE)
        await one.bank.store([stub])
        one.later = 86_400
        await until(lambda: len(one.ring.ids) == 2)
        await asyncio.sleep(3 * SETTLE)
        # the other one's clock has yet to come there
        assert one.sealing == first
        assert one.ids == [first]
        two.later = 86_400
        await until(lambda: one.sealing == two.sealing != first)
        await until(lambda: one.ids == two.ids == [one.sealing])
        assert server.client.hget(stub.index.key, "sealed")[:4].hex() == one.sealing
        assert await two.bank.get([stub.index]) == [stub]


async def test_a_phantom_gateway_does_not_keep_a_new_key_from_use_without_a_report(
    pair: tuple[Sidecar, Sidecar], server: RedisServer
) -> None:
    one, two = pair
    one.rotation._pace = one.rotation._pace._replace(patience=SETTLE)
    server.client.set("ike:gateway:198.51.100.66", "1 ")
    server.client.zadd("ike:gateways", {"198.51.100.66": time.time()})
    with structlog.testing.capture_logs() as events:
        new = generate(one.file, add=True)
        give(two, one)
        await until(lambda: one.rotation.status()["waits_for"] == ["198.51.100.66"])
        await asyncio.sleep(2 * SETTLE)
    [event] = [event for event in events if event["event"] == "key-waits-for-gateways" and event["key"] == new]
    assert event["gateways"] == "198.51.100.66"
    assert one.sealing != new
    server.client.delete("ike:gateway:198.51.100.66")
    await until(lambda: one.sealing == two.sealing == new)
    assert one.rotation.status()["waits_for"] == []


async def test_a_bank_that_takes_no_heartbeats_lets_no_new_key_seal(
    pair: tuple[Sidecar, Sidecar], server: RedisServer
) -> None:
    """All gateways but this one seem dead there, and lack the key."""
    one, two = pair
    old = one.sealing
    doubtful = True
    one.rotation._doubtful = lambda: doubtful
    two.beating = False
    generate(one.file, add=True)
    await has_loaded(one)
    await until(lambda: not server.client.exists(f"ike:gateway:{TWO}"))
    await asyncio.sleep(3 * SETTLE)
    assert one.sealing == old
    doubtful = False
    await until(lambda: one.sealing != old)
