"""What the two sidecars have in common as processes: starting, being watched, stopping, and what `status` shows."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import structlog
import uvloop

from bridge.config import LogConfig
from bridge.net.raw_socket import RawUdp
from bridge.service import log as logging
from bridge.service.control import Answer
from bridge.service.metrics import Metrics
from bridge.service.systemd import notify
from bridge.service.tasks import SUPERVISED, end

log = structlog.get_logger()

RETRY_SECONDS = 1.0
"""between attempts at something that is missing at start"""


PR_SET_DUMPABLE = 4
"""linux/prctl.h"""
GC_THRESHOLDS = (50_000, 50, 100)
"""objects made, and collections of the younger generation, before each generation is looked through"""
COMPILED = "ike_sa_sync__mypyc"
"""the library that compiled modules load (hatch_build.py)"""


class StartError(Exception):
    """The sidecar cannot run at all; the text names the cause and the fix."""


class TaskFailed(Exception):
    """A background task failed. The log has its name and why; nothing but the exit status is left to be said."""


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run one sidecar to its end. Raises StartError, TaskFailed."""
    # keys are in this process's memory: no core dump may hold them, and no other process of this user read them
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _undumpable()
    spare_collections()
    uvloop.run(main())


def code() -> str:
    """Which form of the modules between packet and answer this process runs."""
    return "compiled" if COMPILED in sys.modules else "pure Python"


def _undumpable() -> None:
    """prctl(2): ptrace and /proc/PID/mem are then for CAP_SYS_PTRACE only, and no handler of core dumps is started."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_DUMPABLE is refused")


def spare_collections() -> None:
    """Have Python look seldom for objects that refer to each other, and never among those that are there. Next to
    nothing here does; to look through 100,000 SAs for it would keep every client waiting."""
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def _announce_ready() -> None:
    """Report to systemd, and on stdout, that the sidecar serves."""
    notify("READY=1")
    print("ready", flush=True)


class _Life:
    """How long the process runs: until SIGTERM, SIGINT, or the failure of a background task (bridge.service.tasks)."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.failed = False
        self._over = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._over.set)
        loop.set_exception_handler(self._report)

    def _report(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        reason = context["message"] if error is None else f"{type(error).__name__}: {error}"
        name = context.get(SUPERVISED)
        if name is None:
            # a callback, which is called again for the next packet; or a task of a library
            log.error("callback-failed", message=context["message"], reason=reason, exc_info=error)
            return
        log.error(
            "task-failed", task=name, reason=reason, exc_info=error, effect="the process ends; systemd restarts it"
        )
        self.failed = True
        self._over.set()

    async def over(self) -> None:
        """Wait for the end; meanwhile the watchdog of systemd is served."""
        watchdog = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(watchdog or None):
                    await self._over.wait()
            if watchdog:
                notify("WATCHDOG=1")
        notify("STOPPING=1")

    async def completes(self, work: Coroutine[Any, Any, None]) -> bool:
        """Run `work` until it returns or this life is over; whether it returned. Its exceptions pass through."""
        task = asyncio.create_task(work, name="start")
        over = asyncio.create_task(self.over(), name="over")
        done, pending = await asyncio.wait({task, over}, return_when=asyncio.FIRST_COMPLETED)
        await end(*pending)
        if task in done:
            task.result()
        return task in done


async def serve(log_as: LogConfig, start: Callable[[AsyncExitStack], Coroutine[Any, Any, None]]) -> None:
    """Start a sidecar's parts, and keep them until a stop signal or the failure of a background task; then stop them
    in order. Raises StartError, TaskFailed."""
    logging.configure(log_as.level, log_as.format)
    life = _Life(asyncio.get_running_loop())
    async with AsyncExitStack() as stack:
        if await life.completes(start(stack)):
            _announce_ready()
            await life.over()
    if life.failed:
        raise TaskFailed


async def retry(name: str, attempt: Callable[[], Awaitable[None] | None], *errors: type[Exception]) -> None:
    """Try until it works; say why not whenever the reason changes."""
    reported = ""
    while True:
        try:
            if (under_way := attempt()) is not None:
                await under_way
        except errors as error:
            # systemd starts strongSwan after the sidecar, also while something is missing here
            notify("READY=1")
            if str(error) != reported:
                log.warning(f"{name}-unavailable", reason=str(error), retrying_every_s=RETRY_SECONDS)
            reported = str(error)
            await asyncio.sleep(RETRY_SECONDS)
        else:
            return


def serve_metrics(stack: AsyncExitStack, metrics: Metrics, address: str | None) -> None:
    """Serve metrics at `address`, if any, until `stack` ends. Raises StartError."""
    if address is None:
        return
    try:
        server = metrics.serve(address)
    except OSError as error:
        raise StartError(f"metrics: {address} cannot be served ({error.strerror}): set another address") from error
    stack.push_async_callback(server.close)


def raw_udp(stack: AsyncExitStack) -> RawUdp:
    """The raw sockets, closed with `stack`. Raises StartError."""
    try:
        raw = RawUdp()
    except OSError as error:
        raise StartError(f"raw sockets: {error}") from error
    stack.callback(raw.close)
    return raw


async def log_level(request: dict[str, Any]) -> Answer:
    """The level that is written, after it was changed if the request names one."""
    if (level := request.get("level")) is not None:
        before = logging.level()
        logging.set_level(str(level))
        log.info("log-level", level_before=before, level_now=level)
    return {"level": logging.level()}
