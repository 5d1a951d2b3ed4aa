"""Whether keyspace events of the bank arrive here: a Redis that was started without its configuration takes stubs and
answers, and no gateway notices at once any more that a session ended, a gateway failed or an identity was locked out.

Each heartbeat of this gateway's own is a SET that brings an event. Where they are written, the connection listens, and
no event comes, the bank publishes none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import structlog

from bridge.bank.keyspace import Event
from bridge.stub import bank_keys

log = structlog.get_logger()

SILENT_SECONDS: Final = 5.0
"""without an event, though heartbeats are written: several of them"""


class EventWatch:
    """`own` gives this gateway's address in the index, None while it has none. `clock` gives monotonic seconds."""

    def __init__(self, own: Callable[[], str | None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._own = own
        self._clock = clock
        self._quiet_since: float | None = None
        """the first heartbeat that was written since the last event"""
        self._listening = False
        self.arrive = True
        """False where events ought to arrive and do not"""

    def state(self, listening: bool) -> None:
        """The connection listens from now on, or no longer does; what becomes of that is told elsewhere."""
        self._listening, self._quiet_since = listening, None

    def event(self, event: Event) -> None:
        """Something happened to a heartbeat."""
        if event.event != "set" or event.key.removeprefix(bank_keys.HEARTBEAT) != self._own():
            return
        self._quiet_since = None
        if not self.arrive:
            self.arrive = True
            log.info("keyspace-events-arrive")

    def written(self) -> None:
        """A heartbeat of this gateway was written."""
        if not self._listening:
            return
        now = self._clock()
        if self._quiet_since is None:
            self._quiet_since = now
        elif self.arrive and now - self._quiet_since >= SILENT_SECONDS:
            self.arrive = False
            log.error(
                "keyspace-events-missing",
                effect="ended sessions, failed gateways and lock-outs are noticed by comparison only, within 30 s",
                fix="set notify-keyspace-events Kg$hzxe in redis.conf, and look whether Redis reads that file",
            )
