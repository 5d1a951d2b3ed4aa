"""How many stubs one key has sealed, by gateways that share a real Redis (bridge.bank.seal_volume)."""

from __future__ import annotations

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from bank_support import RedisServer, stub_of
from bridge.bank.redis_bank import RedisBank
from bridge.bank.seal_volume import SEALS_ASK, SEALS_MAX, SealVolume, decode
from bridge.stub.keyring import Keyring

ONE, TWO = "192.0.2.1", "192.0.2.2"
KEYS = {b"key1": b"k" * 32}


class Gateway:
    """What of a gateway seals and counts."""

    def __init__(self, server: RedisServer, address: str | None) -> None:
        self.ring = Keyring(KEYS)
        self.bank = RedisBank(server.url, self.ring, get_timeout=5.0)
        self.volume = SealVolume(self.bank, self.ring, address)

    async def seals(self, count: int) -> None:
        await self.bank.store([stub_of() for _ in range(count)])

    async def counts(self) -> int:
        await self.volume.update([ONE, TWO])
        return self.volume.total


@pytest.mark.redis
async def test_the_seals_of_all_gateways_count_together_and_across_restarts(server: RedisServer) -> None:
    one, two = Gateway(server, ONE), Gateway(server, TWO)
    await one.seals(30)
    await two.seals(12)
    assert await one.counts() == 30
    assert await two.counts() == 42
    restarted = Gateway(server, ONE)
    await restarted.seals(5)
    assert await restarted.counts() == 47
    # what is posted is not added to itself
    assert await restarted.counts() == 47
    # and a bank that lost it gets it back from those that are there
    server.client.flushall()
    assert await two.counts() == 12
    assert await restarted.counts() == 47


@pytest.mark.redis
async def test_a_new_key_is_asked_for_long_before_the_limit(server: RedisServer) -> None:
    assert SEALS_ASK * 4 == SEALS_MAX == 2**32
    server.client.set(f"ike:seals:{TWO}", b'{"%s": %d}' % (b"key1".hex().encode(), SEALS_ASK))
    one = Gateway(server, ONE)
    with structlog.testing.capture_logs() as events:
        assert await one.counts() == SEALS_ASK
        await one.counts()
    [event] = [event for event in events if event["event"] == "key-sealed-much"]
    assert event["log_level"] == "error"
    assert "keygen" in event["fix"]


@pytest.mark.redis
async def test_a_gateway_without_an_address_counts_for_itself(server: RedisServer) -> None:
    one = Gateway(server, None)
    await one.seals(3)
    assert await one.counts() == 3
    assert server.client.keys("ike:seals:*") == []


@given(st.binary(max_size=200))
def test_what_anyone_may_have_posted_raises_nothing(octets: bytes) -> None:
    assert isinstance(decode(octets), dict)


def test_forged_counts_are_bounded() -> None:
    assert decode(b'{"a": 99999999999999, "b": -5}') == {"a": SEALS_MAX, "b": 0}
    assert decode(b'{"a": ' + b"9" * 20_000 + b"}") == {}
