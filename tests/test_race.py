"""Several gateways asked one soon after the other (bridge.client.race)."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from bridge.client.race import NEXT_SECONDS, RefusedByError, first_answer
from bridge.client.sync_request import Answer, NoAnswerError, RefusedError, Target

ONE, TWO, THREE = (Target(f"192.0.2.{number}", "home") for number in (1, 2, 3))
ANSWER = cast(Answer, object())


class Gateways:
    """What each does with a question: an exception, or an answer, after so many seconds."""

    def __init__(self, **does: tuple[float, object]) -> None:
        self._does = {target: does.get(name, (99.0, NoAnswerError())) for name, target in NAMES.items()}
        self.asked: list[tuple[Target, float]] = []
        self.silent: list[Target] = []
        self.cancelled: list[Target] = []
        self._began = 0.0

    async def ask(self, target: Target) -> Answer:
        loop = asyncio.get_running_loop()
        self._began = self._began or loop.time()
        self.asked.append((target, loop.time() - self._began))
        seconds, outcome = self._does[target]
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled.append(target)
            raise
        if isinstance(outcome, Exception):
            raise outcome
        return cast(Answer, outcome)

    async def race(self, *targets: Target) -> tuple[Target, Answer]:
        return await first_answer(targets, self.ask, self.silent.append, 0.05)


NAMES = {"one": ONE, "two": TWO, "three": THREE}


async def test_the_next_gateway_is_asked_a_quarter_of_a_second_after_one_that_does_not_answer() -> None:
    gateways = Gateways(two=(0.01, ANSWER))
    assert await gateways.race(ONE, TWO, THREE) == (TWO, ANSWER)
    assert [target for target, _ in gateways.asked] == [ONE, TWO]
    assert gateways.asked[1][1] >= NEXT_SECONDS
    assert gateways.cancelled == [ONE]


async def test_a_gateway_that_answers_soon_is_the_only_one_asked() -> None:
    gateways = Gateways(one=(0.01, ANSWER))
    assert await gateways.race(ONE, TWO) == (ONE, ANSWER)
    assert len(gateways.asked) == 1


async def test_a_slow_first_gateway_still_counts_before_a_second_one_that_does_not_answer() -> None:
    gateways = Gateways(one=(0.4, ANSWER))
    assert await gateways.race(ONE, TWO) == (ONE, ANSWER)
    assert gateways.cancelled == [TWO]


async def test_after_a_refusal_those_that_were_asked_have_a_moment_more() -> None:
    gateways = Gateways(one=(0.27, ANSWER), two=(0.0, RefusedError()))
    assert await gateways.race(ONE, TWO, THREE) == (ONE, ANSWER)
    gateways = Gateways(two=(0.0, RefusedError()))
    with pytest.raises(RefusedByError) as caught:
        await gateways.race(ONE, TWO, THREE)
    assert caught.value.gateway is TWO
    assert [target for target, _ in gateways.asked] == [ONE, TWO]


async def test_a_gateway_that_proves_that_its_charon_is_away_is_as_one_that_does_not_answer() -> None:
    gateways = Gateways(one=(0.0, RefusedError("charon-unavailable")), two=(0.01, ANSWER))
    assert await gateways.race(ONE, TWO, THREE) == (TWO, ANSWER)
    assert gateways.silent == [ONE]
    # without delay
    assert gateways.asked[1][1] < NEXT_SECONDS
    gateways = Gateways(**dict.fromkeys(NAMES, (0.0, RefusedError("charon-unavailable"))))
    with pytest.raises(NoAnswerError):
        await gateways.race(ONE, TWO, THREE)
    assert len(gateways.asked) == len(NAMES)


async def test_without_any_answer_every_gateway_was_asked_and_named() -> None:
    silent: dict[str, Any] = dict.fromkeys(NAMES, (0.0, NoAnswerError()))
    gateways = Gateways(**silent)
    with pytest.raises(NoAnswerError):
        await gateways.race(ONE, TWO, THREE)
    assert gateways.silent == [ONE, TWO, THREE]
