"""Waits shorter than the event loop's timers (bridge.charon.nap)."""

from __future__ import annotations

import asyncio
import time

import pytest

from bridge.charon.nap import Naps


async def test_a_nap_ends_by_itself_and_leaves_the_event_loop_to_others() -> None:
    naps, turns = Naps(), 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    working = asyncio.create_task(others())
    began = time.monotonic()
    await naps.nap(0.001)
    assert time.monotonic() - began >= 0.001
    assert turns
    working.cancel()
    naps.close()


async def test_all_that_wait_wake_with_the_first() -> None:
    naps = Naps()
    async with asyncio.timeout(0.5):
        await asyncio.gather(naps.nap(0.001), naps.nap(0.9))
    naps.close()


async def test_one_that_is_cancelled_keeps_no_other_waiting() -> None:
    naps = Naps()
    first, second = asyncio.create_task(naps.nap(0.01)), asyncio.create_task(naps.nap(0.01))
    await asyncio.sleep(0)
    first.cancel()
    async with asyncio.timeout(5):
        await second
        await naps.nap(0.0001)
    with pytest.raises(asyncio.CancelledError):
        await first
    naps.close()


def test_it_serves_one_event_loop_after_the_other() -> None:
    naps = Naps()
    for _ in range(2):
        asyncio.run(naps.nap(0.0001))
    naps.close()
