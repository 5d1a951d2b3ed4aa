"""The program of `hooks.session`: called for one event after the other of a session, for several sessions at a time.

An event waits in a queue of its own key, so that events of one key are handed over in order. The event loop waits for
nothing here: the program reads its event from a file in memory, what it writes is read as it comes, and one that takes
too long is ended with all that it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import Process
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, NamedTuple

import msgspec
import structlog

from bridge.gateway.metrics import GatewayMetrics
from bridge.service.tasks import end, spawn
from bridge.stub.types import printable

log = structlog.get_logger()

PARALLEL: Final = 8
"""programs that run at a time"""
PENDING_MAX: Final = 50_000
"""events that wait; further ones are lost, and counted"""
SAID_OCTETS: Final = 300
"""of what a program writes, that the log repeats if it fails"""
FAILURES: Final = ("not-started", "status", "timeout", "dropped")
"""why an event was not taken"""
CLOSE_SECONDS: Final = 20.0
"""that events have left when the sidecar stops"""
ENVIRONMENT: Final = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}

Build = Callable[[], dict[str, Any]]
"""makes the event when its turn has come"""


async def _at_once() -> None:
    """Nothing is to be done before the program is called."""


class Call(NamedTuple):
    """One call of the program, when its turn has come: `before` is awaited first, `after` is called once the program
    was called, with success or not, or the event was dropped; not where the sidecar stops before that."""

    event: str
    build: Build
    before: Callable[[], Awaitable[None]] = _at_once
    after: Callable[[], None] = lambda: None


class HookProgram:
    """Calls `program`, each time for `timeout` seconds at most."""

    def __init__(self, program: str, timeout: float, metrics: GatewayMetrics) -> None:
        self._program = program
        self._timeout = timeout
        self._metrics = metrics
        self._queues: dict[str, deque[Call]] = {}
        self._slots = asyncio.Semaphore(PARALLEL)
        self._workers: set[asyncio.Task[None]] = set()
        self._pending = 0
        self._last_failure: dict[str, Any] | None = None

    def __len__(self) -> int:
        """How many events wait or are being handled."""
        return self._pending

    @property
    def last_failure(self) -> dict[str, Any] | None:
        """The event, its session and the reason of the last call that failed."""
        return self._last_failure

    def call(self, key: str, call: Call) -> None:
        """Call the program, after all earlier calls of `key`."""
        if self._pending >= PENDING_MAX:
            self._failed(call.event, call.build(), "dropped", f"{PENDING_MAX} events wait already")
            call.after()
            return
        self._pending += 1
        queue = self._queues.get(key)
        if queue is not None:
            queue.append(call)
            return
        self._queues[key] = deque([call])
        worker = spawn("session-hook", self._work(key))
        self._workers.add(worker)
        worker.add_done_callback(self._workers.discard)

    async def close(self) -> None:
        """Wait for what is left, for a while, and drop the rest."""
        if self._workers:
            await asyncio.wait(self._workers, timeout=CLOSE_SECONDS)
        if self._pending:
            log.warning("hook-events-dropped", count=self._pending, reason="the sidecar stops")
        await end(*self._workers)

    async def _work(self, key: str) -> None:
        queue = self._queues[key]
        try:
            while queue:
                call = queue.popleft()
                try:
                    async with self._slots:
                        await call.before()
                        await self._call(call.event, call.build())
                    call.after()
                finally:
                    self._pending -= 1
        finally:
            del self._queues[key]

    async def _call(self, event: str, facts: dict[str, Any]) -> None:
        self._metrics.hook_called(event)
        try:
            with _file(msgspec.json.encode(facts) + b"\n") as stdin, _Output() as output:
                process = await asyncio.create_subprocess_exec(
                    self._program,
                    stdin=stdin,
                    stdout=output.end,
                    stderr=output.end,
                    env=ENVIRONMENT,
                    cwd="/",
                    start_new_session=True,
                )
                status = await self._status(process)
                said = output.said()
        except (OSError, ValueError) as error:
            self._failed(event, facts, "not-started", str(error))
            return
        if status is None:
            self._failed(event, facts, "timeout", f"it ran for more than {self._timeout:g} s", said)
        elif status:
            self._failed(event, facts, "status", f"it ended with status {status}", said)

    async def _status(self, process: Process) -> int | None:
        """How it ended; None where it did not in time, and was ended with all that it started."""
        try:
            return await asyncio.wait_for(process.wait(), self._timeout)
        except TimeoutError:
            return None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()

    def _failed(self, event: str, facts: dict[str, Any], kind: str, reason: str, said: str = "") -> None:
        self._metrics.hook_failed(kind)
        session = facts.get("session", "")
        self._last_failure = {"event": event, "session": session, "reason": reason, "time": facts.get("time")}
        log.error("hook-failed", hook_event=event, session=session, reason=reason, said=said, program=self._program)


class _Output:
    """What a program writes: its first octets. It is read as it comes, or the program would wait."""

    def __init__(self) -> None:
        self._octets = b""
        self._read = self.end = -1

    def __enter__(self) -> _Output:
        self._read, self.end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read, False)
        asyncio.get_running_loop().add_reader(self._read, self._readable)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._read)
        os.close(self._read)
        os.close(self.end)

    def _readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            octets = os.read(self._read, 65536)
            self._octets += octets[: SAID_OCTETS - len(self._octets)]

    def said(self) -> str:
        """For the log."""
        self._readable()
        return printable(self._octets.decode(errors="replace").strip())


@contextlib.contextmanager
def _file(octets: bytes) -> Iterator[int]:
    """A file in memory with these octets, to be read from its beginning."""
    number = os.memfd_create("session-event", os.MFD_CLOEXEC)
    try:
        with os.fdopen(number, "wb", closefd=False) as file:
            file.write(octets)
        os.lseek(number, 0, os.SEEK_SET)
        yield number
    finally:
        os.close(number)
