"""`ike-sa-sync monitor` against a real Redis."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bank_support import GATEWAY, RedisServer, keyring, shipped_users, stub_of
from bridge.bank.redis import RedisBank

pytestmark = pytest.mark.redis


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[tuple[RedisBank, asyncio.subprocess.Process, RedisServer]]:
    """A bank with the shipped users, and a monitor that runs as the user `monitor`."""
    (tmp_path / "gateway.yaml").write_text(f"address: {GATEWAY}\n")
    settings = shipped_users(tmp_path / "users.acl")
    with RedisServer(tmp_path, *settings, username="gateway", password="secret") as server:
        bank = RedisBank(f"unix://gateway:secret@{server.socket}", keyring(), get_timeout=5.0)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bridge.cli", "monitor", "--json", "-c", str(tmp_path / "gateway.yaml")),
            *("--url", f"unix://monitor:secret@{server.socket}"),
            stdout=subprocess.PIPE,
        )
        yield bank, process, server
        process.kill()
        await process.wait()
        await bank.close()


async def until(process: asyncio.subprocess.Process, **wanted: Any) -> dict[str, Any]:
    """The next line that has all that is `wanted`."""
    assert process.stdout is not None
    async with asyncio.timeout(20):
        while True:
            line = await process.stdout.readline()
            assert line, "the monitor ended"
            told: dict[str, Any] = json.loads(line)
            if wanted.items() <= told.items():
                return told


async def test_it_tells_what_happens_to_stubs(
    watched: tuple[RedisBank, asyncio.subprocess.Process, RedisServer],
) -> None:
    bank, process, _ = watched
    await until(process, event="reachable")
    stub = stub_of()
    await bank.store([stub])
    await until(process, kind="stub", event="stored", gateway=GATEWAY, spi=stub.index.spi.hex())
    await bank.delete([(stub.index, 1)])
    await until(process, kind="stub", event="deleted", spi=stub.index.spi.hex())
    brief = stub_of(lifetime=1)
    await bank.store([brief])
    await until(process, kind="stub", event="expired", spi=brief.index.spi.hex())


async def test_it_tells_of_a_gateway_that_fails(
    watched: tuple[RedisBank, asyncio.subprocess.Process, RedisServer],
) -> None:
    bank, process, _ = watched
    await until(process, event="reachable")
    await bank.heartbeat(GATEWAY, 0.3)
    await until(process, kind="gateway", event="alive", gateway=GATEWAY)
    await until(process, kind="gateway", event="failed", gateway=GATEWAY)


async def test_it_shows_stubs_and_counters_of_each_gateway(
    watched: tuple[RedisBank, asyncio.subprocess.Process, RedisServer],
) -> None:
    bank, process, _ = watched
    await bank.store([stub_of() for _ in range(30)])
    await bank.post("stats", GATEWAY, json.dumps({"resumptions_total": 7.0, "refusals_total[no-stub]": 2.0}), 60)
    await bank.heartbeat(GATEWAY, 60)
    while not (rows := (await until(process, kind="gateways"))["gateways"]):
        pass
    [row] = rows
    assert (row["gateway"], row["alive"], row["stubs"]) == (GATEWAY, True, 30)
    assert (row["resumed"], row["fallbacks"], row["reasons"]) == (7, 2, {"no-stub": 2})


async def test_it_goes_on_after_redis_was_away(
    watched: tuple[RedisBank, asyncio.subprocess.Process, RedisServer],
) -> None:
    bank, process, server = watched
    await until(process, event="reachable")
    server.kill()
    await until(process, event="lost")
    server.start()
    await until(process, event="reachable")
    stub = stub_of()
    await bank.store([stub])
    await until(process, event="stored", spi=stub.index.spi.hex())
