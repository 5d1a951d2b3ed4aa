"""The gateways that sessions came from, watched for a while.

A gateway that lives reports itself that a session left it, even if it stops soon afterwards, as at the end of a drain.
For one that failed, the gateway where the session goes on does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Final

from bridge.gateway.hook_session import Name
from bridge.service.tasks import end, spawn
from bridge.stub.stub import Stub

WATCH_SECONDS: Final = 40.0
"""that a session's previous gateway is watched for, beyond the time after which it counts as failed; more than a
sidecar that was stopped in order has for its return"""
DETECTIONS: Final = 5
"""how many times the detection's time it may take to know that a gateway failed"""
WATCH_EACH: Final = 1.0
BEAT_SECONDS: Final = 0.2
"""a heartbeat this long after the resumption is of a gateway that has received the mark of the move"""
WATCHED_MAX: Final = 50_000
"""sessions whose previous gateway is watched"""


class PreviousGateways:
    """`failed` returns whether another gateway has failed, which is known some `detect` seconds later; `beats` when
    each wrote its last heartbeat (monotonic seconds)."""

    def __init__(
        self,
        failed: Callable[[str], bool],
        beats: Mapping[str, float],
        *,
        detect: float = 1.0,
    ) -> None:
        self.on_lost: Callable[[Name, Stub], None] = lambda previous, stub: None
        """called with a session of a gateway that failed, and its stub there"""
        self._failed = failed
        self._beats = beats
        self._detect = detect
        self._watched: dict[Name, tuple[Stub, float, float]] = {}
        """sessions of other gateways that went on here, since when, and until when those gateways are watched"""
        self._task: asyncio.Task[None] | None = None

    def watch(self, previous: Name, old: Stub) -> None:
        """A session went on here from its `old` stub."""
        if len(self._watched) >= WATCHED_MAX:
            return
        now = time.monotonic()
        self._watched[previous] = old, now, now + DETECTIONS * self._detect + WATCH_SECONDS
        if self._task is None or self._task.done():
            self._task = spawn("previous-gateways", self._keep_watching())

    async def _keep_watching(self) -> None:
        while self._watched:
            await asyncio.sleep(WATCH_EACH)
            now = time.monotonic()
            for name, (old, since, until) in list(self._watched.items()):
                if self._beats.get(name.gateway, 0.0) > since + BEAT_SECONDS or until < now:
                    del self._watched[name]
                elif self._failed(name.gateway):
                    del self._watched[name]
                    self.on_lost(name, old)

    async def close(self) -> None:
        """End."""
        if self._task is not None:
            await end(self._task)
