"""Several banks asked together, and one that missed ends (bridge.bank.replicas, bridge.bank.catch_up)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest

from bridge.bank import catch_up
from bridge.bank.catch_up import CatchUp
from bridge.bank.interface import BankUnavailable, Ending
from bridge.bank.replica import Replica
from bridge.bank.replicas import Replicas
from bridge.service.tasks import end, spawn
from bridge.stub.stub import Index

ENDED = Ending(Index("192.0.2.1", b"ended..."), 2_000_000_000)


class Bank:
    """It has `stubs`, and knows of `ends`; with `away` it does not answer, with `hangs` not yet."""

    def __init__(self, *ends: Ending) -> None:
        self.ends = list(ends)
        self.stubs: set[Index] = set()
        self.away = False
        self.answers = asyncio.Event()
        self.answers.set()

    async def ping(self) -> float:
        if self.away:
            raise BankUnavailable("away")
        await self.answers.wait()
        return 0.0

    async def endings(self) -> AsyncIterator[list[Ending]]:
        await self.ping()
        yield self.ends

    async def revisions(self, indexes: Sequence[Index]) -> list[int | None]:
        return [1 if index in self.stubs else 0 for index in indexes]

    async def delete(self, endings: Sequence[Ending]) -> list[bool]:
        there = [ending.index in self.stubs for ending in endings]
        self.stubs -= {ending.index for ending in endings}
        return there

    async def close(self) -> None:
        pass


def of(bank: Bank, name: str) -> Replica:
    return Replica(name, cast(Any, bank))


async def test_the_near_bank_learns_the_ends_that_a_far_one_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catch_up, "SETTLE_SECONDS", 0.0)
    near, far = Bank(), Bank(ENDED)
    near.stubs.add(ENDED.index)
    mine, others = of(near, "local"), of(far, "peer")
    catching = CatchUp(mine, [others])
    catching.returned(mine)
    assert others in catching
    assert not catching.done
    task = spawn("catch-up", catching.run())
    while not catching.done:  # noqa: ASYNC110 - no event tells of it
        await asyncio.sleep(0)
    await end(task)
    assert not near.stubs
    assert others not in catching


async def test_a_bank_that_is_away_stays_one_that_may_know_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catch_up, "SETTLE_SECONDS", 0.0)
    near, far = Bank(), Bank(ENDED)
    far.away = True
    mine, others = of(near, "local"), of(far, "peer")
    catching = CatchUp(mine, [others])
    catching.returned(others)
    task = spawn("catch-up", catching.run())
    while others.up:  # noqa: ASYNC110 - no event tells of it
        await asyncio.sleep(0)
    await end(task)
    assert others in catching
    assert catching.done, "it cannot be asked"


async def test_the_answers_are_those_of_the_banks_that_answer() -> None:
    near, far = Bank(), Bank()
    near.away = True
    banks = Replicas(of(near, "local"), None, [of(far, "peer")], 0.1)
    assert [tier.name for tier in await banks.ask(lambda bank: bank.ping())] == ["peer"]
    far.away = True
    with pytest.raises(BankUnavailable):
        await banks.ask(lambda bank: bank.ping())


async def test_a_far_bank_that_hangs_is_not_waited_for_by_a_gateway_that_serves() -> None:
    near, far = Bank(), Bank()
    far.answers.clear()
    banks = Replicas(of(near, "local"), None, [of(far, "peer")], 0.01)
    banks.serving = True
    assert [tier.name for tier in await banks.ask_soon(lambda bank: bank.ping())] == ["local"]
    await banks.close()
