"""What a gateway concludes from how long its heartbeats take (bridge.gateway.heartbeat)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import cast

import pytest
import structlog

from bank_support import PATIENCE
from bridge.bank.interface import BEATS, GatewaySign, StubBank
from bridge.charon.charon import Charon
from bridge.gateway.heartbeat import SLOW_SECONDS, Heartbeat
from bridge.gateway.metrics import GatewayMetrics
from bridge.service.tasks import end, spawn

HERE, OTHER = "192.0.2.1", "192.0.2.2"
DETECT = 1.0


class FarBank:
    """A bank whose answers take `seconds` each; a heartbeat is one answer, a list of the gateways two."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seconds = 0.0

    async def ping(self) -> float:
        return self.seconds

    async def heartbeat(self, _: str, __: float) -> float:
        return self.seconds

    async def gateways(self) -> dict[str, GatewaySign]:
        # all are asked at the same time, and this takes the longest
        self.now += 2 * self.seconds
        return {HERE: GatewaySign(True, frozenset()), OTHER: GatewaySign(True, frozenset())}


class Beating:
    """A gateway's heartbeats at that bank, and what was reported of each."""

    def __init__(self) -> None:
        self.bank = FarBank()
        self.reports: list[tuple[bool, float, Collection[str] | None]] = []
        reconciled = asyncio.Event()
        reconciled.set()
        charon = SimpleNamespace(alive=lambda: True, reconciled=reconciled, vici=None)
        self.heartbeat = Heartbeat(
            cast(StubBank, self.bank),
            cast(Charon, charon),
            HERE,
            GatewayMetrics(),
            DETECT,
            self._written,
            clock=lambda: self.bank.now,
        )

    async def _written(self, written: bool, seconds: float, others: Collection[str] | None) -> None:
        self.reports.append((written, seconds, others))

    async def beat_for(self, seconds: float) -> list[str]:
        """The log's events."""
        until = self.bank.now + seconds
        with structlog.testing.capture_logs() as events:
            while self.bank.now < until:
                await self.heartbeat.beat()
                self.bank.now += DETECT / 3
        return [event["event"] for event in events]


async def test_a_bank_that_is_far_is_measured_by_the_write_alone() -> None:
    it = Beating()
    it.bank.seconds = 0.25
    await it.heartbeat.beat()
    assert it.reports == [(True, 0.25, (OTHER,))]


async def test_a_bank_that_is_always_too_slow_to_notice_failures_is_reported_once() -> None:
    it = Beating()
    it.bank.seconds = 0.4
    assert "bank-slow" not in await it.beat_for(SLOW_SECONDS - 2)
    assert await it.beat_for(2 * SLOW_SECONDS) == ["bank-slow"]
    it.bank.seconds = 0.1
    assert await it.beat_for(SLOW_SECONDS) == []
    it.bank.seconds = 0.4
    assert await it.beat_for(2 * SLOW_SECONDS) == ["bank-slow"]


async def test_heartbeats_that_come_less_often_than_they_expire_make_those_of_others_doubtful() -> None:
    it = Beating()
    it.bank.seconds = 0.4
    await it.heartbeat.beat()
    assert not it.heartbeat.doubtful
    it.bank.seconds = 0.6
    await it.heartbeat.beat()
    assert it.heartbeat.bank_writable
    assert it.heartbeat.doubtful


class SlowBank(FarBank):
    """A bank whose answers take longer than a gateway waits between two heartbeats, and what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    async def _take(self, what: str) -> float:
        await asyncio.sleep(1.2 * SOON / BEATS)
        self.asked.append(what)
        return 1.2 * SOON / BEATS

    async def heartbeat(self, _: str, __: float) -> float:
        return await self._take("heartbeat")

    async def leave(self, _: str) -> None:
        self.asked.append("leave")


SOON = 0.3
"""`detect`, in a test that takes so long"""


@pytest.mark.parametrize("what", ["charon", "uplink"])
async def test_a_gateway_that_cannot_serve_says_so_however_slow_its_bank_is(what: str) -> None:
    bank = SlowBank()
    reconciled = asyncio.Event()
    reconciled.set()
    lost: list[str] = []
    charon = SimpleNamespace(alive=lambda: "charon" not in lost, reconciled=reconciled, vici=None)

    async def written(*_: object) -> None:
        """What other parts conclude from it is tested elsewhere."""

    heartbeat = Heartbeat(
        cast(StubBank, bank),
        cast(Charon, charon),
        HERE,
        GatewayMetrics(),
        SOON,
        written,
        cut_off=lambda _: "uplink" in lost,
    )
    run = spawn("heartbeat", heartbeat._run())
    await until(lambda: len(bank.asked) >= 3)
    lost.append(what)
    bank.asked.clear()
    await until(lambda: "leave" in bank.asked)
    # the one that was under way
    assert bank.asked in (["leave"], ["heartbeat", "leave"])
    await end(run)


async def test_no_heartbeat_is_written_for_a_charon_that_ended_since_the_last_look() -> None:
    it = Beating()
    asked: list[str] = []

    async def leave(_: str) -> None:
        asked.append("leave")

    async def heartbeat(_: str, __: float) -> float:
        asked.append("heartbeat")
        return 0.0

    it.bank.leave, it.bank.heartbeat = leave, heartbeat  # type: ignore[attr-defined, method-assign]
    await it.heartbeat.beat()
    it.heartbeat._charon.alive = lambda: False  # type: ignore[method-assign]
    await it.heartbeat.beat()
    assert asked == ["heartbeat", "leave"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - there is no event of it
            await asyncio.sleep(0.01)
