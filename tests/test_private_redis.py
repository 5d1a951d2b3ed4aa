"""The private redis-server of a gateway: started, watched, taken over, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import structlog

import redis
from bank_support import PATIENCE, stub_of
from bridge.bank import open_bank
from bridge.bank.interface import BankUnavailable
from bridge.bank.private_redis import PrivateBank
from bridge.config import BankConfig
from bridge.stub.keyring import Keyring

pytestmark = pytest.mark.redis


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Where the server lives; whatever a failed test left there is killed."""
    yield tmp_path / "redis"
    if (pid := server_of(tmp_path / "redis")) is not None:
        os.kill(pid, signal.SIGKILL)


def server_of(directory: Path) -> int | None:
    """The process id of the server in `directory`, if one lives."""
    try:
        pid = int((directory / "redis.pid").read_text())
        alive = "redis-server" in Path(f"/proc/{pid}/cmdline").read_text()
    except (OSError, ValueError):
        return None
    return pid if alive else None


def bank_client(directory: Path) -> redis.Redis:
    return redis.Redis(unix_socket_path=str(directory / "redis.sock"), decode_responses=True)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(PATIENCE):
        while not await condition():  # noqa: ASYNC110 - there is no event of it
            await asyncio.sleep(0.02)


async def answers(bank: PrivateBank) -> bool:
    try:
        await bank.ping()
    except BankUnavailable:
        return False
    return True


async def test_it_serves_after_start_and_is_gone_after_close(directory: Path, ring: Keyring) -> None:
    bank = PrivateBank(directory, ring)
    await bank.start()
    stub = stub_of()
    await bank.store([stub])
    assert await bank.get([stub.index]) == [stub]
    assert server_of(directory) is not None
    await bank.close()
    assert server_of(directory) is None
    assert not bank.socket.exists()


async def test_nobody_else_can_reach_it(directory: Path, ring: Keyring) -> None:
    bank = PrivateBank(directory, ring)
    await bank.start()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert bank.socket.stat().st_mode & 0o777 == 0o700
    with bank_client(directory) as client:
        assert client.config_get("port") == {"port": "0"}
    await bank.close()


async def test_stubs_outlive_an_orderly_stop(directory: Path, ring: Keyring) -> None:
    first = PrivateBank(directory, ring)
    await first.start()
    stub = stub_of()
    await first.store([stub])
    await first.close()
    second = PrivateBank(directory, ring)
    await second.start()
    assert await second.get([stub.index]) == [stub]
    await second.close()


async def test_a_killed_server_is_started_again_with_its_stubs(directory: Path, ring: Keyring) -> None:
    bank = PrivateBank(directory, ring)
    await bank.start()
    stub = stub_of()
    await bank.store([stub])
    pid = server_of(directory)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)

    async def is_new_and_answers() -> bool:
        return server_of(directory) not in (None, pid) and await answers(bank)

    await until(is_new_and_answers)
    assert await bank.get([stub.index]) == [stub]
    await bank.close()


KILLED_SIDECAR = """
import asyncio, os, signal, sys
from bridge.bank.private_redis import PrivateBank
from bridge.stub.keyring import Keyring

async def main():
    bank = PrivateBank(sys.argv[1], Keyring({b"test": b"k" * 32}))
    await bank.start()
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_the_server_of_a_killed_sidecar_is_taken_over_and_stopped_in_the_end(
    directory: Path, ring: Keyring
) -> None:
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED_SIDECAR, str(directory))
    assert await killed.wait() == -signal.SIGKILL
    left = server_of(directory)
    assert left is not None
    bank = PrivateBank(directory, ring)
    await bank.start()
    assert server_of(directory) == left
    await bank.store([stub_of()])
    await bank.close()

    async def is_gone() -> bool:
        # nobody here reaps it: it may stay as a zombie
        return not (directory / "redis.pid").exists()

    await until(is_gone)


async def test_a_second_server_is_never_started_on_the_files_of_a_hanging_one(directory: Path, ring: Keyring) -> None:
    bank = PrivateBank(directory, ring)
    await bank.start()
    pid = server_of(directory)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with structlog.testing.capture_logs() as events:
        second = PrivateBank(directory, ring)
        await second.start()
    assert [event["event"] for event in events] == ["private-redis-failed"]
    assert f"process {pid}, does not answer" in events[0]["reason"]
    os.kill(pid, signal.SIGCONT)
    await until(lambda: answers(second))
    assert server_of(directory) == pid
    await second.close()
    await bank.close()


async def test_a_server_that_cannot_start_is_logged_with_where_to_look(tmp_path: Path, ring: Keyring) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    bank = PrivateBank(occupied / "redis", ring)
    with structlog.testing.capture_logs() as events:
        await bank.start()
    assert events[0]["event"] == "private-redis-failed"
    with pytest.raises(BankUnavailable):
        await bank.ping()
    await bank.close()


async def test_a_server_that_ends_immediately_time_after_time_is_started_ever_more_rarely(
    directory: Path, ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[float] = []

    async def launch(_: PrivateBank) -> int:
        started.append(time.monotonic())
        process = await asyncio.create_subprocess_exec("true")
        return process.pid

    monkeypatch.setattr(PrivateBank, "_launch", launch)
    bank = PrivateBank(directory, ring)
    await bank.start()
    async with asyncio.timeout(60):
        while len(started) < 6:  # noqa: ASYNC110 - there is no event of it
            await asyncio.sleep(0.01)
    await bank.close()
    # at most as often as after 0.04, 0.08, 0.16, 0.32 s
    for number, (one, later) in enumerate(pairwise(started[1:])):
        assert later - one >= 0.04 * 2**number


async def test_a_missing_binary_is_named_with_the_fix(
    directory: Path, ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    bank = PrivateBank(directory, ring)
    with structlog.testing.capture_logs() as events:
        await bank.start()
    assert "install redis-server, or set bank.url" in events[0]["reason"]
    await bank.close()


async def test_ctrl_c_reaches_the_sidecar_and_not_its_server(directory: Path, ring: Keyring) -> None:
    bank = PrivateBank(directory, ring)
    await bank.start()
    pid = server_of(directory)
    assert pid is not None
    assert os.getsid(pid) == pid
    await bank.close()


async def test_whoever_does_not_serve_only_speaks_to_the_server(directory: Path, ring: Keyring) -> None:
    config = BankConfig(runtime=str(directory))
    with pytest.raises(BankUnavailable):
        await (await open_bank(config, ring)).ping()
    assert not directory.exists()
    serving = await open_bank(config, ring, serve=True)
    speaking = await open_bank(config, ring)
    await speaking.ping()
    await speaking.close()
    await serving.ping()
    await serving.close()
    assert server_of(directory) is None


async def test_with_a_url_no_private_server_is_started(directory: Path, ring: Keyring) -> None:
    bank = await open_bank(BankConfig(url=f"unix://{directory}/elsewhere", runtime=str(directory)), ring, serve=True)
    with pytest.raises(BankUnavailable):
        await bank.ping()
    assert not directory.exists()
    await bank.close()
