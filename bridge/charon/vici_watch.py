"""charon's VICI events, and whether charon is there at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Final

import structlog

from bridge.charon.vici_client import ViciClient
from bridge.charon.vici_session import FAILURES, ViciSession
from bridge.charon.vici_types import Event, Section, ViciError, as_text, parse_event
from bridge.service.tasks import end, spawn

log = structlog.get_logger()

EVENTS: Final = ("ike-updown", "ike-rekey", "ike-update", "child-updown", "child-rekey")
RETRY_SECONDS: Final = 0.1
"""between attempts to reach a charon that is not there"""


class ViciWatch(ViciClient):
    """A ViciClient that also listens, from `start` to `close`.

    `on_event` gets each Event, `on_connect` charon's release whenever the socket is (re)connected, `on_disconnect`
    is called when it is lost; each in a turn of the event loop of its own, in order.
    """

    def __init__(
        self,
        path: str,
        *,
        on_event: Callable[[Event], None],
        on_connect: Callable[[str], None],
        on_disconnect: Callable[[], None],
    ) -> None:
        super().__init__(path)
        self.connected = False
        self._on_event = on_event
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._tasks: list[asyncio.Task[None]] = []
        self._logged = False
        """whether the log says that charon is not there"""

    def start(self) -> None:
        """Begin to listen."""
        self._tasks.append(spawn("vici-events", self._listen()))

    async def close(self) -> None:
        """Stop listening."""
        await end(*self._tasks)

    async def _listen(self) -> None:
        while True:
            try:
                await self._listen_once()
            except FAILURES as error:
                if not self._logged:
                    reason = str(error) or "charon closed the connection"
                    log.warning(
                        "charon-unreachable",
                        vici=self.path,
                        reason=reason,
                        fix="start strongSwan: systemctl start strongswan",
                    )
                self._logged = True
            await asyncio.sleep(RETRY_SECONDS)

    async def _listen_once(self) -> None:
        call = asyncio.get_running_loop().call_soon
        async with ViciSession.open(self.path) as session:
            release = as_text((await session.request("version")).get("version"))
            for kind in EVENTS:
                await session.register(kind)
            # none is missed from here on
            self._logged = False
            call(self._connected, release)
            try:
                async with aclosing(session.events()) as events:
                    async for kind, message in events:
                        for event in _read(kind, message):
                            call(self._on_event, event)
            finally:
                call(self._disconnected)

    def _connected(self, release: str) -> None:
        self.connected = True
        self._on_connect(release)

    def _disconnected(self) -> None:
        self.connected = False
        self._on_disconnect()


def _read(kind: str, message: Section) -> list[Event]:
    try:
        return parse_event(kind, message)
    except ViciError as error:
        log.warning("vici-event-unreadable", kind=kind, reason=str(error))
        return []
