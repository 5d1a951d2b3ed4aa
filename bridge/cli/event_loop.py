"""Commands that wait: their event loop, and how a signal ends them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

Result = TypeVar("Result")

INSIST_SECONDS: Final = 1.0
"""after which a command that has not ended is cancelled again: code may swallow a cancellation"""


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` to its end, or until SIGTERM cancels it, which ends the process with 143. SIGINT raises
    KeyboardInterrupt, as in `asyncio.run`.

    An exception that a signal handler of Python raises can come up in any line, also in one whose exceptions are
    ignored (a destructor, a callback). The loop's own handlers run between two steps of it.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        return asyncio.run(_until_signal(work))
    finally:
        signal.signal(signal.SIGTERM, before)


async def _until_signal(work: Coroutine[Any, Any, Result]) -> Result:
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    ended = False

    def end() -> None:
        nonlocal ended
        ended = True
        if not task.done():
            task.cancel()
            loop.call_later(INSIST_SECONDS, end)

    loop.add_signal_handler(signal.SIGTERM, end)
    try:
        return await task
    except asyncio.CancelledError:
        if not ended:
            raise
    raise SystemExit(128 + signal.SIGTERM)
