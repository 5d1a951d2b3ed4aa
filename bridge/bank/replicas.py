"""Several banks, and how they are asked and told: which of them, in which order, and how long each is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Final, TypeVar

import structlog

from bridge.bank.interface import BankUnavailable, BankUnwritable, StubBank
from bridge.bank.replica import Replica, Word
from bridge.service.tasks import end, spawn

log = structlog.get_logger()

Answer = TypeVar("Answer")

LATE_TIMES: Final = 2.0
"""times `peer_timeout` that a bank may take for a heartbeat before it is not asked what another one can answer"""


class Replicas:
    """A gateway's own bank is `near`, the others are `far`: the central one, if there is any, and those of `peers`.

    `peer_timeout` in seconds: that `ask_soon` waits for far banks. `serving`: heartbeats show which bank hangs.
    """

    def __init__(self, near: Replica, central: Replica | None, peers: Sequence[Replica], peer_timeout: float) -> None:
        self.near = near
        self.central = central
        self.peers = list(peers)
        self.far = [*([central] if central else []), *peers]
        self.all = [near, *self.far]
        self.peer_timeout = peer_timeout
        self.serving = False
        self._asking: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Let go of all banks."""
        await end(*self._asking)
        await asyncio.gather(*(tier.close() for tier in self.all))

    async def ask_soon(
        self, question: Callable[[StubBank], Awaitable[Answer]], patiently: Sequence[Replica] | None = None
    ) -> dict[Replica, Answer]:
        """The answers of banks within reach: of the near and the central one, or those to ask `patiently`, and of
        others as far as they come within `peer_timeout`. A bank that is late with an answer to a heartbeat is not
        asked. Raises BankUnavailable if there is no answer. Unless `serving` no heartbeat shows which bank hangs: then
        all answers are waited for."""
        if not self.serving:
            return await self.ask(question)
        up = [tier for tier in self.all if tier.up] or self.all
        asked = [tier for tier in up if tier.behind <= LATE_TIMES * self.peer_timeout] or up
        tasks = {tier: spawn(f"ask {tier.name}", _answer_of(tier, question)) for tier in asked}
        for task in tasks.values():
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        await asyncio.wait(tasks.values(), timeout=self.peer_timeout)
        hand = (self.near, self.central) if patiently is None else patiently
        if patient := [task for tier, task in tasks.items() if tier in hand]:
            await asyncio.wait(patient)
        pending = set(tasks.values())
        while True:
            answers = {tier: task.result() for tier, task in tasks.items() if task.done()}
            given = {tier: answer for tier, answer in answers.items() if not isinstance(answer, BankUnavailable)}
            if given:
                return given
            if not pending:
                raise BankUnavailable("none of the banks answers")
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)

    async def ask(self, question: Callable[[StubBank], Awaitable[Answer]]) -> dict[Replica, Answer]:
        """The answers of all banks within reach. Raises BankUnavailable if there is none."""
        up = [tier for tier in self.all if tier.up] or self.all
        answers = await each_of(up, lambda tier: tier.answer(question(tier.bank)))
        if not answers:
            raise BankUnavailable("none of the banks answers")
        return answers

    async def read_all(self, read: Callable[[Replica], AsyncGenerator[Answer]]) -> AsyncGenerator[Answer]:
        """What `read` gives of each bank that answers, one after the other. Raises BankUnavailable if none does."""
        complete = 0
        for tier in [tier for tier in self.all if tier.up]:
            try:
                async with aclosing(read(tier)) as pages:
                    async for page in pages:
                        yield page
                complete += 1
            except BankUnavailable as error:
                log.warning(error.event, component="list", bank=tier.name, reason=str(error))
        if not complete:
            raise BankUnavailable("none of the banks answers")

    async def tell(self, word: Word) -> None:
        """Tell all banks. Waits for those at hand until they answer or `peer_timeout` is over, and for one in any case:
        the others of a bank that hangs get it in time. Unless `serving` for all. Raises BankUnavailable."""
        at_hand = [tier for tier in self.all if tier.up and not tier.behind]
        said = {tier: tier.say(word) for tier in self.all}
        if not self.serving:
            await asyncio.wait(said.values())
        elif at_hand:
            await asyncio.wait([said[tier] for tier in at_hand], timeout=self.peer_timeout)
        pending = set(said.values())
        while not any(each.done() and each.exception() is None for each in said.values()):
            if not pending:
                kind = BankUnwritable if any(tier.up for tier in self.all) else BankUnavailable
                raise kind("none of the banks took it")
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)


async def _answer_of(tier: Replica, question: Callable[[StubBank], Awaitable[Answer]]) -> Answer | BankUnavailable:
    try:
        return await tier.answer(question(tier.bank))
    except BankUnavailable as error:
        return error


async def each_of(tiers: Iterable[Replica], ask: Callable[[Replica], Awaitable[Answer]]) -> dict[Replica, Answer]:
    """The answers of those banks that answer, asked in parallel."""
    asked = list(tiers)
    answers = await asyncio.gather(*(ask(tier) for tier in asked), return_exceptions=True)
    given: dict[Replica, Answer] = {}
    for tier, answer in zip(asked, answers, strict=True):
        if isinstance(answer, BaseException):
            if not isinstance(answer, BankUnavailable):
                raise answer
        else:
            given[tier] = answer
    return given
