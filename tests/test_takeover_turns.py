"""News of the kernel and of VRRP at the same time: one command after the other (bridge.gateway.takeover)."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from bridge.gateway.takeover import Takeover

SHARED, OTHER = "192.0.2.100", "2001:db8::100"


class Fence:
    """One that takes its time."""

    def __init__(self) -> None:
        self.addresses: set[str] = set()
        self.changes = 0
        self.in_place = True

    async def around(self, addresses: set[str]) -> None:
        await asyncio.sleep(0)
        self.addresses = addresses
        self.changes += 1


class Owner:
    """Of no session."""

    async def release(self, *_: Any) -> bool:
        return True

    async def announce(self, *_: Any) -> None:
        pass

    async def drop(self, *_: Any) -> None:
        pass


class Taker:
    """It finds none."""

    async def take(self, *_: Any) -> None:
        pass


def takeover(fence: Fence, *present: str, owner: Owner | None = None) -> Takeover:
    charon: Any = SimpleNamespace(tracker=SimpleNamespace(sas={}, established=lambda: iter(())))
    parts: list[Any] = [charon, owner or Owner(), Taker(), SimpleNamespace(under_way=lambda _: 0), fence]
    return Takeover((SHARED, OTHER), *parts, present=lambda: present, here_seconds=0.0)


async def settled(one: Takeover) -> str:
    """The state that an address is in when nothing is under way."""
    for _ in range(20):
        await asyncio.sleep(0)
    row = one.status()[0]
    return str(row["state"])


async def test_a_yield_after_a_takeover_counts() -> None:
    fence = Fence()
    one = takeover(fence, SHARED)
    await asyncio.gather(one.take({"address": SHARED}), one.give_up({"address": SHARED}))
    assert (await settled(one), fence.addresses) == ("away", {SHARED, OTHER})


async def test_a_takeover_after_a_yield_counts() -> None:
    fence = Fence()
    one = takeover(fence, SHARED)
    await asyncio.gather(one.give_up({"address": SHARED}), one.take({"address": SHARED}))
    assert (await settled(one), fence.addresses) == ("here", {OTHER})


async def test_a_takeover_of_an_address_that_is_not_at_this_host_is_refused() -> None:
    """The script of a VRRP that flaps comes late, or an operator is at the wrong host: the sessions stay where the
    address is."""
    fence = Fence()
    one = takeover(fence, "192.0.2.1")
    answer = await one.take({"address": SHARED})
    assert "not at this host" in answer["error"]
    assert (await settled(one), fence.changes) == ("away", 0)


async def test_all_addresses_are_fenced_before_one_of_them_is_given_up() -> None:
    """A gateway that loses its uplink loses all of them at once, and its bank."""

    class Stuck(Owner):
        async def release(self, *_: Any) -> bool:
            return await asyncio.Event().wait()

    fence = Fence()
    one = takeover(fence, SHARED, OTHER, owner=Stuck())
    for address in (SHARED, OTHER):
        await one.take({"address": address})
    await settled(one)
    assert fence.addresses == set()
    one._charon.tracker.sas[b""] = SimpleNamespace(local=SimpleNamespace(address=SHARED))  # type: ignore[assignment]
    tasks = [asyncio.ensure_future(one.give_up({"address": address})) for address in (SHARED, OTHER)]
    await settled(one)
    assert fence.addresses == {SHARED, OTHER}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
