"""Downloads of a failed gateway's stubs that break off, and gateways that come and go (bridge.bank.prefetch)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import cast

from bank_support import GATEWAY, PATIENCE, stub_of
from bridge.bank.interface import BankUnavailable, StubBank
from bridge.bank.prefetch import Prefetch
from bridge.stub.stub import Stub

FIRST, SECOND = stub_of(), stub_of()


class Pages:
    """A bank that gives one page, and the second one when it is allowed to; it fails then if `breaks`."""

    def __init__(self, *, breaks: bool = False) -> None:
        self.breaks = breaks
        self.go_on = asyncio.Event()
        self.downloads = 0

    async def download(self, _: str) -> AsyncGenerator[list[Stub]]:
        self.downloads += 1
        yield [FIRST]
        await self.go_on.wait()
        if self.breaks:
            raise BankUnavailable("it stood still")
        yield [SECOND]


async def over(prefetch: Prefetch) -> None:
    async with asyncio.timeout(PATIENCE):
        await prefetch.fetched(GATEWAY)


async def test_a_part_of_the_stubs_is_not_taken_for_all_of_them() -> None:
    bank = Pages(breaks=True)
    prefetch = Prefetch(cast(StubBank, bank))
    prefetch.fetch(GATEWAY)
    assert prefetch.held(GATEWAY) is None
    bank.go_on.set()
    await over(prefetch)
    assert prefetch.progress[GATEWAY].state == "failed"
    assert prefetch.held(GATEWAY) is None
    # served where the bank does not answer, all the same
    assert prefetch.served([FIRST.index, SECOND.index]) == {FIRST.index: FIRST}
    bank.breaks = False
    prefetch.fetch(GATEWAY)
    await over(prefetch)
    assert list(prefetch.held(GATEWAY) or ()) == [FIRST, SECOND]


async def test_more_than_there_is_room_for_is_not_all_of_them() -> None:
    bank = Pages()
    bank.go_on.set()
    prefetch = Prefetch(cast(StubBank, bank), limit=0)
    prefetch.fetch(GATEWAY)
    await over(prefetch)
    assert prefetch.progress[GATEWAY].state == "full"
    assert prefetch.held(GATEWAY) is None


async def test_a_gateway_that_came_back_and_failed_again_is_fetched_again() -> None:
    bank = Pages()
    prefetch = Prefetch(cast(StubBank, bank))
    prefetch.fetch(GATEWAY)
    while not bank.downloads:  # noqa: ASYNC110 - there is no event of it
        await asyncio.sleep(0)
    prefetch.drop(GATEWAY)
    prefetch.fetch(GATEWAY)
    bank.go_on.set()
    await over(prefetch)
    assert bank.downloads == 2
    assert list(prefetch.held(GATEWAY) or ()) == [FIRST, SECOND]
    await prefetch.close()
