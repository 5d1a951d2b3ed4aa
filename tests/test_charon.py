"""How the sidecar keeps in step with its charon, where the lab's is too fast to show it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from bridge.charon import handshake_list
from bridge.charon.charon import Charon
from bridge.charon.vici_types import SaInfo, ViciError
from bridge.config import HaConfig
from bridge.stub.types import Endpoint


class SlowVici:
    """Takes long to list the IKE_SAs."""

    connected = True

    def __init__(self) -> None:
        self.connections: dict[str, Any] = {}
        self.asked = asyncio.Event()

    async def plugins(self) -> list[str]:
        return ["vici"]

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
    charon._reconciler._vici = charon._reconciler.connections._vici = cast(Any, vici)
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


class BusyVici:
    """Has handshakes in progress; says how it was asked."""

    connected = True

    def __init__(self, half_open: int, unnamed: list[SaInfo], named: list[SaInfo]) -> None:
        self.count, self.unnamed, self.named = half_open, unnamed, named
        self.asked: list[str] = []

    async def half_open(self) -> int:
        self.asked.append("count")
        return self.count

    async def list_sas(self, connection: str) -> list[SaInfo]:
        self.asked.append(connection)
        return self.unnamed

    async def each_sas(self, take: Callable[[list[SaInfo]], None]) -> float:
        self.asked.append("all")
        take(self.unnamed + self.named)
        return 0.0


def connecting(name: str, address: str) -> SaInfo:
    here, there = Endpoint("192.0.2.1", 500), Endpoint(address, 500)
    spis = address.encode()[-8:], bytes(8)
    return SaInfo(name, *spis, False, 2, "CONNECTING", here, there, (), (), 0, None, None, (), "%any", "%any", "")


UNNAMED, NAMED = connecting("(unnamed)", "192.0.2.7"), connecting("gw", "192.0.2.8")


async def looked(vici: BusyVici, *, crashes: bool = False, took: float = 0.0) -> list[str]:
    """Where handshakes are in progress, as charon says."""
    charon = Charon("/nowhere", HaConfig())
    charon._handshake_list._vici = cast(Any, vici)
    charon._reconciler.listing_took = took
    charon.landing.crashes = crashes
    await charon._handshake_list.look()
    return sorted(charon.tracker.half_open.addresses())


async def test_without_handshakes_in_progress_charon_is_asked_for_their_number_only() -> None:
    vici = BusyVici(0, [], [])
    assert await looked(vici) == []
    assert vici.asked == ["count"]


async def test_handshakes_of_peers_that_are_not_authenticated_are_listed_alone() -> None:
    vici = BusyVici(1, [UNNAMED], [])
    assert await looked(vici) == ["192.0.2.7"]
    assert vici.asked == ["count", "(unnamed)"]


@pytest.mark.parametrize(("crashes", "took", "asked"), [(False, 0.01, True), (False, 2.0, False), (True, 2.0, True)])
async def test_all_sas_are_listed_where_that_is_quick_or_charon_would_crash(
    crashes: bool, took: float, asked: bool
) -> None:
    vici = BusyVici(2, [UNNAMED], [NAMED])
    found = await looked(vici, crashes=crashes, took=took)
    assert ("all" in vici.asked) is asked
    assert found == ["192.0.2.7"] + ["192.0.2.8"] * asked


class Processing(BusyVici):
    """Counts handshakes, and lists each only once it was asked often enough."""

    def __init__(self, unnamed: list[tuple[int, SaInfo]], named: list[tuple[int, SaInfo]], *, count: int) -> None:
        super().__init__(count, [], [])
        self.later = (unnamed, named)

    async def half_open(self) -> int:
        times = self.asked.count("count")
        self.unnamed, self.named = ([info for after, info in kind if after <= times] for kind in self.later)
        return await super().half_open()


async def looked_surely(vici: BusyVici) -> tuple[bool, list[str]]:
    charon = Charon("/nowhere", HaConfig())
    charon._handshake_list._vici = cast(Any, vici)
    return await charon._handshake_list.look_surely(), sorted(charon.tracker.half_open.addresses())


async def test_a_request_that_charon_has_yet_to_process_is_waited_for() -> None:
    vici = Processing([(3, UNNAMED)], [], count=1)
    assert await looked_surely(vici) == (True, ["192.0.2.7"])
    assert vici.asked.count("count") == 4


async def test_handshakes_of_peers_that_have_a_name_take_a_list_of_all() -> None:
    vici = Processing([], [(0, NAMED)], count=1)
    assert await looked_surely(vici) == (True, ["192.0.2.8"])
    # what has just arrived is processed in less
    assert vici.asked == ["count", "(unnamed)", "count", "(unnamed)", "all"]


async def test_where_charon_does_not_process_what_it_has_nothing_is_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake_list, "SETTLE_SECONDS", 0.02)
    vici = Processing([(0, UNNAMED)], [], count=2)
    assert await looked_surely(vici) == (False, ["192.0.2.7"])
    # unless it has counted wrongly all the time
    monkeypatch.setattr(handshake_list, "UNSETTLED_SECONDS", -1.0)
    assert await looked_surely(vici) == (True, ["192.0.2.7"])
