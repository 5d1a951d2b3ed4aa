"""How long a Redis that answers nothing holds the bank (bridge.bank.exchange)."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from bank_support import GATEWAY, keyring
from bridge.bank.interface import BankUnavailable
from bridge.bank.redis_bank import RedisBank

SECONDS = 1.0


@pytest.fixture
def silent() -> Iterator[str]:
    """Host and port where connections are accepted and nothing is ever said, as those of a stopped Redis."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield "{}:{}".format(*listening.getsockname())


async def heartbeat_of(url: str) -> float:
    """The seconds until it failed."""
    bank = RedisBank(url, keyring(), timeout=SECONDS)
    began = time.monotonic()
    with pytest.raises(BankUnavailable):
        await bank.heartbeat(GATEWAY, 1.0)
    took = time.monotonic() - began
    await bank.close()
    return took


async def test_a_redis_that_accepts_connections_and_says_nothing_holds_a_command_for_its_time(silent: str) -> None:
    assert await heartbeat_of(f"redis://gateway:secret@{silent}/0") < 3 * SECONDS


async def test_sentinels_that_say_nothing_hold_a_command_for_the_same_time(silent: str) -> None:
    assert await heartbeat_of(f"redis+sentinel://{silent},{silent},{silent}/bank/0") < 3 * SECONDS
