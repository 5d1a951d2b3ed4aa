"""Several gateways asked one soon after the other, as RFC 8305 section 5 tries addresses: the first proven answer
counts.

A gateway that rebuilt the session and is not the first removes it when its confirmation timeout ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from bridge.client.sync_request import Answer, NoAnswerError, RefusedError, Target
from bridge.service.tasks import end

NEXT_SECONDS: Final = 0.25
"""after a gateway was asked, before the next one is (RFC 8305: Connection Attempt Delay)"""

AWAY: Final = "charon-unavailable"
"""the proven reason of a gateway that can resume nothing for now, where others may"""

Ask = Callable[[Target], Awaitable[Answer]]
"""asks one gateway; raises NoAnswerError, RefusedError or OSError"""


class RefusedByError(Exception):
    """No gateway resumes, and this one refused; `why` is what it gave and proved as its reason."""

    def __init__(self, gateway: Target, reason: str, why: str | None) -> None:
        super().__init__(reason)
        self.gateway = gateway
        self.reason = reason
        self.why = why


async def first_answer(
    gateways: Sequence[Target], ask: Ask, on_timeout: Callable[[Target], None], grace: float
) -> tuple[Target, Answer]:
    """The first proven answer, and whose it is. `on_timeout` gets each gateway that does not answer, or proves that its
    charon does not. After another refusal no other gateway is asked, and those that were asked have `grace` seconds
    more.

    Raises NoAnswerError where none answers, RefusedByError where one refuses and none resumes.
    """
    left = list(gateways)
    asked: dict[asyncio.Future[Answer], Target] = {}
    refused: RefusedByError | None = None
    try:
        while left or asked:
            if left and refused is None:
                gateway = left.pop(0)
                asked[asyncio.ensure_future(ask(gateway))] = gateway
            elif not asked:
                break
            wait = grace if refused is not None else NEXT_SECONDS if left else None
            done, _ = await asyncio.wait(asked, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            if refused is not None and not done:
                break
            for task in done:
                gateway = asked.pop(task)
                try:
                    return gateway, task.result()
                except (NoAnswerError, OSError):
                    # an OSError is about the way to this gateway: others may be reached
                    on_timeout(gateway)
                except RefusedError as error:
                    if error.why == AWAY:
                        on_timeout(gateway)
                        continue
                    refused = refused or RefusedByError(gateway, str(error), error.why)
        raise refused if refused is not None else NoAnswerError
    finally:
        await end(*asked)
