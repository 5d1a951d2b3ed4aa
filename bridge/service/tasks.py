"""Ending tasks."""

from __future__ import annotations

import asyncio
from typing import Any, Final

AGAIN_SECONDS: Final = 0.1
"""after which a task that did not end is cancelled again"""


async def end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel `tasks`, and return when all have ended, however they did.

    They are cancelled until they are: redis-py loses a cancellation that comes while a connection is made.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=AGAIN_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)
