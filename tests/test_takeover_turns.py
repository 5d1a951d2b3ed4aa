"""News of the kernel and of VRRP at the same time: one command after the other (bridge.gateway.takeover)."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from bridge.gateway.takeover import Takeover

SHARED = "192.0.2.100"


class Fence:
    """One that takes its time."""

    def __init__(self) -> None:
        self.addresses: set[str] = set()

    async def around(self, addresses: set[str]) -> None:
        await asyncio.sleep(0)
        self.addresses = addresses


class Owner:
    """Of no session."""

    async def store(self, *_: Any) -> bool:
        return True

    async def drop(self, *_: Any) -> None:
        pass


class Taker:
    """It finds none."""

    async def take(self, *_: Any) -> None:
        pass


def takeover(fence: Fence) -> Takeover:
    charon: Any = SimpleNamespace(tracker=SimpleNamespace(sas={}, established=lambda: iter(())))
    parts: list[Any] = [charon, Owner(), Taker(), SimpleNamespace(under_way=lambda _: 0), fence]
    return Takeover((SHARED,), *parts)


async def settled(one: Takeover) -> str:
    """The state that an address is in when nothing is under way."""
    for _ in range(20):
        await asyncio.sleep(0)
    [row] = one.status()
    return str(row["state"])


async def test_a_yield_after_a_takeover_counts() -> None:
    fence = Fence()
    one = takeover(fence)
    await asyncio.gather(one.take({"address": SHARED}), one.give_up({"address": SHARED}))
    assert (await settled(one), fence.addresses) == ("away", {SHARED})


async def test_a_takeover_after_a_yield_counts() -> None:
    fence = Fence()
    one = takeover(fence)
    await asyncio.gather(one.give_up({"address": SHARED}), one.take({"address": SHARED}))
    assert (await settled(one), fence.addresses) == ("here", set())
