"""What a confirmation asks the bank (bridge.gateway.stub_lookup): whether the session has ended meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest

from bridge.bank.interface import BankUnavailable
from bridge.gateway.endings import Endings
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.stub_lookup import StubLookup
from bridge.stub.stub import Index

pytestmark = pytest.mark.asyncio

FIRST, SECOND, THIRD = (Index("192.0.2.1", bytes([number]) * 8) for number in (1, 2, 3))


class Bank:
    """Answers what has ended, and notes how often it was asked."""

    def __init__(self, *ended: Index) -> None:
        self.gone = set(ended)
        self.asked: list[list[Index]] = []
        self.failure: Exception | None = None

    async def ended(self, indexes: Sequence[Index]) -> list[bool | None]:
        self.asked.append(list(indexes))
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        return [index in self.gone for index in indexes]


def lookup_in(bank: Any, *, reachable: bool = True) -> StubLookup:
    unused: Any = None
    known = KnownSessions(Endings(), unused, unused)
    return StubLookup(unused, bank, unused, known, GatewayMetrics(), reachable=lambda: reachable, timeout=1.0)


async def test_those_that_are_confirmed_at_once_are_asked_about_at_once() -> None:
    bank = Bank(SECOND)
    assert await lookup_in(bank).ended((FIRST, SECOND, THIRD)) == {SECOND}
    assert bank.asked == [[FIRST, SECOND, THIRD]]


async def test_the_bank_is_not_asked_about_what_ended_here() -> None:
    bank = Bank()
    lookup = lookup_in(bank)
    lookup._endings.add(FIRST, int(time.time()) + 100)
    assert await lookup.ended((FIRST,)) == {FIRST}
    assert await lookup.ended((FIRST, SECOND)) == {FIRST}
    assert bank.asked == [[SECOND]]


async def test_a_bank_that_does_not_answer_knows_of_no_end_of_any_of_them() -> None:
    bank = Bank(FIRST, SECOND)
    bank.failure = BankUnavailable("away")
    lookup = lookup_in(bank)
    assert await lookup.ended((FIRST, SECOND)) == set()
    bank.failure = None
    assert await lookup.ended((FIRST,)) == {FIRST}
    assert await lookup_in(bank, reachable=False).ended((FIRST,)) == set()


class Marks:
    """Of locked-out identities, which cannot be read because of a mistake, or of the bank."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.fresh = False
        self.looks = 0

    async def look(self) -> None:
        self.looks += 1
        if self.failure is not None:
            raise self.failure


async def looked_up_with(marks: Any) -> None:
    unused: Any = None
    known = KnownSessions(Endings(), unused, marks)
    lookup = StubLookup(unused, unused, unused, known, GatewayMetrics(), reachable=lambda: True, timeout=1.0)

    async def nothing(*_: Any) -> None:
        pass

    lookup._ask = nothing  # type: ignore[assignment, method-assign]
    await lookup.find([])


async def test_a_mistake_in_the_look_at_lock_outs_does_not_end_unseen() -> None:
    with pytest.raises(ZeroDivisionError):
        await looked_up_with(Marks(ZeroDivisionError()))


async def test_a_bank_that_does_not_give_the_lock_outs_ends_no_look_up() -> None:
    await looked_up_with(Marks(BankUnavailable("away")))


async def test_the_bank_is_asked_about_lock_outs_for_each_look_up_unless_it_has_just_been() -> None:
    marks = Marks()
    await looked_up_with(marks)
    await looked_up_with(marks)
    assert marks.looks == 2
    marks.fresh = True
    await looked_up_with(marks)
    assert marks.looks == 2
