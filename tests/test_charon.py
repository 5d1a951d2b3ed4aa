"""How the sidecar keeps in step with its charon, where the lab's is too fast to show it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from bridge.charon.charon import Charon
from bridge.charon.vici_types import SaInfo, ViciError
from bridge.config import HaConfig


class SlowVici:
    """Takes long to list the IKE_SAs."""

    connected = True

    def __init__(self) -> None:
        self.connections: dict[str, Any] = {}
        self.asked = asyncio.Event()

    async def list_connections(self) -> dict[str, Any]:
        return self.connections

    async def each_sas(self, take: Callable[[list[SaInfo]], None]) -> float:
        await asyncio.sleep(1)
        self.asked.set()
        raise ViciError("it took a second")


async def until(condition: Callable[[], bool]) -> None:
    # the next comparison is 30 s away
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - there is no event of it
            await asyncio.sleep(0.05)


async def test_connections_loaded_after_a_slow_comparison_are_known_before_the_next_one() -> None:
    charon = Charon("/nowhere", HaConfig())
    vici = SlowVici()
    charon._reconciler._vici = cast(Any, vici)
    task = asyncio.create_task(charon._reconciler.run())
    try:
        await until(vici.asked.is_set)
        vici.connections = {"gw": object()}
        # charon has just been started
        await until(lambda: "gw" in charon.tracker.connections)
        vici.connections = {"gw": object(), "second": object()}
        # somebody asks for it
        await until(lambda: charon.connection("second") is not None)
    finally:
        task.cancel()
