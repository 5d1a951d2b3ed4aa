"""Background tasks: begun under supervision, and ended.

asyncio keeps the exception of a task that no caller awaits until the garbage collector finds the task. Every background
task is therefore begun with `spawn`, which reports its failure to the event loop's exception handler when it happens;
`bridge.service.process` has that handler log the task's name and end the process, in order. (An asyncio.TaskGroup would
cancel all other tasks first, and then there is no writer left to store the last stub changes.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

AGAIN_SECONDS: Final = 0.1
"""after which a task that did not end is cancelled again"""
SUPERVISED: Final = "supervised"
"""key of the exception handler's context: the name of the task that failed"""

Result = TypeVar("Result")

_running: set[asyncio.Task[Any]] = set()
"""the event loop itself holds tasks by weak references only"""


def spawn(name: str, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
    """Begin `work` in the background; `name` is for the log. Errors that it is to survive it catches itself: any
    exception that leaves it ends the process."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    _running.add(task)
    task.add_done_callback(_report)
    return task


def _report(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    error: BaseException | None
    if not task.cancelled():
        error = task.exception()
    elif task.cancelling():
        return
    else:
        # no caller cancelled it: something that it awaited was cancelled, and took it along
        error = asyncio.CancelledError("cancelled from within")
    if error is not None:
        context = {"message": f"task {task.get_name()!r} failed", "exception": error, SUPERVISED: task.get_name()}
        task.get_loop().call_exception_handler(context)


async def end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel `tasks`, and return when all have ended, however they did.

    They are cancelled until they are: redis-py loses a cancellation that comes while a connection is made.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=AGAIN_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)
