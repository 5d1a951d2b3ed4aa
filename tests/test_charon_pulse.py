"""Whether a charon that is there answers (bridge.gateway.charon_pulse)."""

from __future__ import annotations

import asyncio

from structlog.testing import capture_logs

from bridge.charon.vici_types import ViciError
from bridge.gateway.charon_pulse import HUNG, CharonPulse
from role_support import FakeTime


class Vici:
    """`answer`: seconds that it takes, None for one that is not there."""

    answer: float | None = 0.0

    async def version(self) -> str:
        if self.answer is None:
            raise ViciError("no such file")
        await asyncio.sleep(self.answer)
        return "5.9.8"


def test_one_that_does_not_answer_hangs_until_it_does() -> None:
    loop = FakeTime()
    loop.run(_hangs_until_it_answers())
    loop.end()


async def _hangs_until_it_answers() -> None:
    vici = Vici()
    pulse = CharonPulse(vici, 0.1)
    with capture_logs() as events:
        await pulse.ask()
        assert not pulse.hangs
        vici.answer = HUNG + 3600
        await pulse.ask()
        await pulse.ask()
        assert pulse.hangs
        vici.answer = 0.0
        await pulse.ask()
    assert not pulse.hangs
    assert [event["event"] for event in events] == ["charon-not-answering", "charon-answers-again"]


async def test_one_that_is_not_there_does_not_hang() -> None:
    vici = Vici()
    vici.answer = None
    pulse = CharonPulse(vici, 0.1)
    await pulse.ask()
    assert not pulse.hangs
